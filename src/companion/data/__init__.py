"""Data: the embedded cohort, prepared files and formats."""
