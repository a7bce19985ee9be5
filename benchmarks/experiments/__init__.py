"""Rows of published tables: read, run and set beside the paper's numbers."""
