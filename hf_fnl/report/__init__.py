"""Reports on runs and models: tables of their matrices, pictures, and one page with everything."""

from hf_fnl.report.inspection import Matrix, inspect_model, read_energies
from hf_fnl.report.page import write_report
from hf_fnl.report.pictures import plot_diagnostics, plot_loss

__all__ = ["Matrix", "inspect_model", "plot_diagnostics", "plot_loss", "read_energies", "write_report"]
