"""The house: imports go one way, and importing the package stays light."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_fnl"
FLOORS = [
    {
        "functional",
        "tensors",
        "spectral",
        "suggest",
        "truncation",
        "selectors",
        "config",
        "vocabulary_loss",
        "choose",
        "folders",
        "processes",
        "hub",
        "extras",
    },
    {"layers", "do_conv"},
    {"products", "padding", "calibration", "surgery", "ranks"},
    {"decay", "diagnostics", "optim", "pruning", "interpolation"},
    {"models"},
    {"training", "planning"},
    {"cli", "report"},
    {"public", "__main__"},
]
# Files that may import a neighbour on their own floor.
NEIGHBOURS = {
    ("config", "selectors"),
    ("folders", "hub"),
    ("config", "spectral"),
    ("config", "suggest"),
    ("spectral", "suggest"),
    ("decay", "optim"),
    ("tensors", "config"),
    ("tensors", "spectral"),
    ("truncation", "spectral"),
    ("surgery", "calibration"),
    ("calibration", "padding"),
    ("surgery", "ranks"),
    ("cli", "report"),
    ("training", "planning"),
}
HEAVY = {"datasets", "evaluate", "deepspeed", "matplotlib", "typer"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it; a relative import keeps its dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def room(path: Path) -> str:
    """The part of the house that a file belongs to: ``layers`` for ``layers/linear.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def may_import(importer: str, imported: str) -> bool:
    return floor(imported) < floor(importer) or importer == imported or (importer, imported) in NEIGHBOURS


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        pytest.param("optim", "products", True, id="down"),
        pytest.param("products", "optim", False, id="up"),
        pytest.param("layers", "layers", True, id="within-a-package"),
        pytest.param("config", "spectral", True, id="neighbour"),
        pytest.param("spectral", "config", False, id="neighbour-the-other-way"),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_file_has_its_floor(path):
    assert any(room(path) in rooms for rooms in FLOORS), f"{ids(path)} stands on no floor: add it to FLOORS"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_are_absolute(path):
    assert [name for name in imports(path) if name.startswith(".")] == []


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_down(path):
    ours = [name.split(".") for name in imports(path) if name.split(".")[0] == "hf_fnl"]
    assert ["hf_fnl"] not in ours, "a file inside the package imports its roof"
    assert [".".join(name) for name in ours if not may_import(room(path), name[1])] == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "training" / "tasks").glob("*.py")), ids=ids)
def test_tasks_know_no_model_class(path):
    assert [name for name in imports(path) if name.startswith("hf_fnl.models")] == []


def test_importing_the_package_pulls_in_nothing_heavy():
    code = f"import json, sys, hf_fnl; print(json.dumps(sorted({HEAVY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
