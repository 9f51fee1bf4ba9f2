"""The shell around the notebooks: runs, their catalogue, the runner, the batch engine, pages, the doctor, the CLI."""
