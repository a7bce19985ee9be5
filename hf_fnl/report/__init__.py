"""Reports on runs and models: tables of their matrices, and one page with everything."""

from hf_fnl.report.inspection import Matrix, inspect_model, read_energies
from hf_fnl.report.page import write_report

__all__ = ["Matrix", "inspect_model", "read_energies", "write_report"]
