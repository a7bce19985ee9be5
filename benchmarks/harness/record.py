"""Results as JSON files that say which commit of the repository made them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_fnl.utils.files import write_json

ROOT = Path(__file__).parents[2]
CODE = ("hf_fnl", "benchmarks", "run_scripts", ":(exclude)benchmarks/results")  # what results follow from


def revision(root: Path = ROOT) -> dict[str, str | None]:
    """Return the commit that a checkout is at.

    Args:
        root: Top folder of the checkout.

    Returns:
        ``commit``, the full hash, with ``-dirty`` behind it where the code differs from it; or ``commit`` of ``None``
        and ``commit_unknown``, the reason.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():
            return _unknown(f"{root.name} is no checkout of its own")  # such as a package inside of another project
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--", *CODE)
    except FileNotFoundError:
        return _unknown("git is not installed")
    except subprocess.CalledProcessError as error:
        return _unknown((error.stderr.strip().splitlines() or ["git failed"])[0])
    return {"commit": f"{commit}-dirty" if changes else commit}


def command_line(module: str, words: Iterable[str]) -> str:
    """Return the command that runs a module; of a path from the root, which nobody else has, its last part."""
    return shlex.join(["python", "-m", module, *(Path(word).name if word.startswith("/") else word for word in words)])


def write_result(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write a result with its commit, and return both.

    Args:
        path: The JSON file.
        result: What was measured. Its own ``commit`` stays: what takes long asks for :func:`revision` when it begins.
    """
    result = {**({} if "commit" in result else revision()), **result}
    write_json(path, result)
    return result


def _unknown(reason: str) -> dict[str, str | None]:
    return {"commit": None, "commit_unknown": reason}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
