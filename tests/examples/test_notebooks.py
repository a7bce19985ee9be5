"""The notebooks run, in small, and were saved as they ran; what each shows it asserts in a cell of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# In one process, which imports torch once, each in a folder of its own.
RUN = """
import json, os, pathlib, sys
for path in map(pathlib.Path, sys.argv[1:]):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    os.mkdir(path.stem)
    os.chdir(path.stem)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    os.chdir("..")
    print("ran", path.name)
"""


def notebook(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]


def text_of(path: Path, kind: str) -> str:
    return "\n".join("".join(cell["source"]) for cell in notebook(path)["cells"] if cell["cell_type"] == kind)


def test_the_page_has_each() -> None:
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert sorted(re.findall(r"\((\w+\.ipynb)\)", page)) == [path.name for path in NOTEBOOKS]


def test_they_run(tmp_path: Path) -> None:
    small = {"HF_FNL_SMALL": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *map(str, NOTEBOOKS)],
        cwd=tmp_path,
        env=os.environ | small,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert re.findall(r"^ran (.+)$", done.stdout, re.MULTILINE) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_was_saved_as_it_ran(path: Path) -> None:
    """From the first cell to the last, without errors, progress bars or places of a machine, and with pictures."""
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    assert printed
    assert not re.search(r"/(root|home|tmp|work|usr)/|it/s", printed)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_shows_is_asserted(path: Path) -> None:
    assert "assert " in text_of(path, "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path, "markdown")) if "://" not in link]
    assert links
    assert [link for link in links if not (path.parent / link.partition("#")[0]).exists()] == []
