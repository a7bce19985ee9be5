"""Scoring rules of the tasks."""
