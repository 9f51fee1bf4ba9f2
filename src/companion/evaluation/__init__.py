"""Judges: metrics, populations, a segmenter."""
