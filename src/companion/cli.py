"""The `companion` command: run a notebook, run the workflow, write the index of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import companion

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def run(
    notebook: Annotated[Path, typer.Argument(help="notebook with one cell tagged 'parameters'")],
    file: Annotated[Path | None, typer.Option("-f", "--file", help="YAML file of parameters")] = None,
    pairs: Annotated[list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="a parameter")] = None,
    out: Annotated[str | None, typer.Option(help="folder of the results (parameter 'out')")] = None,
):
    """Execute NOTEBOOK; its results, run.json and executed copy land in one folder."""
    from companion.runner import merge, run_notebook

    print(run_notebook(notebook, merge(file, pairs or []), out))


@app.command()
def index(runs: Annotated[Path, typer.Argument(help="folder that holds the runs")] = Path("runs")):
    """Write RUNS/index.html: one offline page with every run, its figures and numbers."""
    from companion.index import write_index

    print(write_index(runs))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def batch(
    context: typer.Context,
    profile: Annotated[str, typer.Option(help="local, slurm, or a Snakemake profile's folder")] = "local",
    config: Annotated[Path | None, typer.Option(help="YAML file that lists the runs")] = None,
    folder: Annotated[Path | None, typer.Option(help="where runs/ is; default: the project")] = None,
):
    """Do all runs of workflow/config.yaml that are not up to date. Other options go to Snakemake."""
    from companion.batch import run_batch

    raise typer.Exit(run_batch(profile, config, folder, context.args))


@app.command()
def version():
    """Print the version."""
    print(companion.__version__)


def main() -> None:
    """Run the command; what the user can mend is one line and exit code 1, never a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        sys.exit(f"companion: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
