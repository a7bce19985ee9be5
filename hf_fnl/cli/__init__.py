"""The command line ``hf-fnl``: factorize, merge, inspect and report."""

from hf_fnl.cli.app import app, main

__all__ = ["app", "main"]
