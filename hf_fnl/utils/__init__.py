"""Helpers that know nothing of factors: files, folders, the Hub, processes, messages."""
