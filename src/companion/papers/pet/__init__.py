"""PET dose enhancement (PET)."""
