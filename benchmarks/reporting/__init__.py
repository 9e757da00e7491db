"""Recorded benchmark runs: as a page, compared with each other, held against a baseline."""
