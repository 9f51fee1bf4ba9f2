"""Intake: any folder, any file: what it is, whose it is, and what became of it."""
