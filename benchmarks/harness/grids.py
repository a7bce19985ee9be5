"""Trainings that run once, and go on where they were broken off."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.record import revision, write_result


def run_once(
    command: list[str], done: Path, *, working_folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a script unless it is done: its metrics, its command, and what its processes took.

    Args:
        command: Path of the script and its arguments, which have to let it go on where it was broken off.
        done: The file of metrics that it writes at the end; its log is beside that file's folder.
        working_folder: Where it runs; that of this process unless given.
        environment: Its variables; those of this process unless given.

    Returns:
        The metrics, ``command``, and ``commit``, ``seconds`` and ``peak_memory_bytes`` over all parts in which it ran.

    Raises:
        RuntimeError: If it failed, or ended without its metrics.
    """
    usage_file = done.parent.with_name(f"{done.parent.name}.usage.json")
    if not done.exists():
        log = done.parent.with_name(f"{done.parent.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        started, made_with = time.time(), revision()
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=working_folder,
                env=environment,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # or Popen takes it for running still
        earlier = json.loads(usage_file.read_text()) if usage_file.exists() else {"seconds": 0, "peak_memory_bytes": 0}
        spent = {
            **made_with,
            "seconds": earlier["seconds"] + time.time() - started,
            "peak_memory_bytes": max(earlier["peak_memory_bytes"], usage.ru_maxrss * 1024),
        }
        if earlier.get("commit"):  # the commits of all parts
            parts = [*earlier["commit"].split(", then "), made_with["commit"] or "unknown"]
            spent["commit"] = ", then ".join(dict.fromkeys(parts))
        write_result(usage_file, spent)
        if status != 0 or not done.exists():
            raise RuntimeError(f"{shlex.join(command)} failed; its output is in {log}")
    usage_found = json.loads(usage_file.read_text()) if usage_file.exists() else {}
    return {"command": shlex.join(["python", *command]), "commit": None, **usage_found, **json.loads(done.read_text())}
