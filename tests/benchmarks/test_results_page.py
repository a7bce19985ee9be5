"""The page of results is what the plans and the results of their runs give, and no hand has changed it."""

import shutil

from benchmarks.results_page import ROOT, main


def test_the_page_and_its_tables_are_those_of_the_results(tmp_path):
    results = ROOT / "benchmarks" / "results" / "grids"
    shutil.copytree(results, tmp_path / "grids")
    main(["--results", str(tmp_path / "grids"), "--docs", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    for table in results.glob("*/table.*"):
        assert (tmp_path / "grids" / table.relative_to(results)).read_text() == table.read_text()
