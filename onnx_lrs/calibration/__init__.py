"""Samples and statistics: where the three wings meet."""
