"""Imports between the rooms of the package go one way, and importing it stays light."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_fnl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_fnl"
# From the lowest to the highest; a file imports from its own room and lower ones.
ROOMS = (
    "utils",
    "workarounds",
    "math",
    "layers",
    "attention",
    "surgery",
    "optim",
    "models",
    "planning",
    "training",
    "tasks",
    "vision",
    "report",
    "scripts",
    "cli",
    "public",
    "__main__",
)
HEAVY = {"datasets", "evaluate", "deepspeed", "matplotlib", "typer", "num2words", "sacrebleu", "sacremoses"}

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
    """The folder, or the module, of the package that a file belongs to: ``layers`` for ``layers/linear.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_the_design_lists_the_rooms_in_their_order():
    (listed,) = re.findall(
        r"```\n(utils.*?)```", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert re.findall(r"^\w+", listed, flags=re.MULTILINE) == [name for name in ROOMS if name != "__main__"]


def test_every_file_lies_in_a_room():
    assert [ids(path) for path in FILES if room(path) not in ROOMS] == [], "add it to ROOMS"


def test_imports_are_absolute_and_go_down():
    wrong = []
    for path in FILES:
        allowed = ROOMS[: ROOMS.index(room(path)) + 1]
        for name in imports(path):
            ours, *inside = name.split(".")
            if name.startswith(".") or (ours == "hf_fnl" and (not inside or inside[0] not in allowed)):
                wrong.append(f"{ids(path)}: {name or '.'}")
    assert wrong == []


def test_tasks_know_no_model_class():
    tasks = (PACKAGE / "tasks").glob("*.py")
    assert [ids(path) for path in tasks if any(name.startswith("hf_fnl.models") for name in imports(path))] == []


PROGRAM = """
import json, sys, hf_fnl
assert hf_fnl.factorize_ and "FLAMBe" in dir(hf_fnl)
from hf_fnl import Lamb
from transformers import AutoConfig
assert type(AutoConfig.for_model("factorized_bert")).__name__ == "FactorizedBertConfig"
print(json.dumps(sorted(sys.modules)))
"""


def test_importing_the_package_pulls_in_nothing_heavy(tmp_path):
    """And in a program of the name of our command, which waits for nothing, all that is asked for is there."""
    (tmp_path / "hf-fnl").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "hf-fnl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert HEAVY & {*json.loads(done.stdout.splitlines()[-1])} == set()


def test_public_names_are_few_and_those_of_before_are_found():
    names = set(hf_fnl.__all__)
    assert len(names) == len(hf_fnl.__all__) <= 45
    moved = {
        "CifarResNetModel",
        "FactorizedMarianForCausalLM",
        "vision_model",
        "Section",
        "restore_",
        "model_card",
    }
    assert not moved & names
    assert all(hasattr(hf_fnl, name) for name in names | moved)
