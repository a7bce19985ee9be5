"""The page of results is what the plans and the results of their runs give, and no hand has changed it."""

import json
import shutil
from pathlib import Path

from benchmarks.results_page import ROOT, main


def test_the_page_and_its_tables_are_those_of_the_results(tmp_path):
    results = ROOT / "benchmarks" / "results" / "grids"
    shutil.copytree(results, tmp_path / "grids")
    main(["--results", str(tmp_path / "grids"), "--docs", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    for table in results.glob("*/table.*"):
        assert _figures(tmp_path / "grids" / table.relative_to(results)) == _figures(table)


def _figures(table: Path) -> object:
    """What a table says, numbers to twelve digits: Python 3.10 rounds a standard deviation otherwise."""
    text = table.read_text()
    return json.loads(text, parse_float=lambda given: f"{float(given):.12g}") if table.suffix == ".json" else text
