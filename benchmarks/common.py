"""What all benchmarks share: cases timed in turns, the machine they ran on, results as JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_fnl.training.files import write_json, write_text

REPORTED_PACKAGES = ("torch", "transformers", "accelerate", "hf_fnl")


def parse(theme: str, description: str | None, quick: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read ``--device``, ``--quick`` and ``--out``, the options of every theme.

    Args:
        theme: Name of the module.
        description: Shown by ``--help``.
        quick: What ``--quick`` leaves out.
        argv: Arguments; those of the process unless given.

    Returns:
        The options, and as ``command`` the command line that gives them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and Markdown")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", f"benchmarks.{theme}", *arguments])
    return options


def interleave(cases: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Time cases side by side: every round runs each case once, beginning with another one each time.

    Whatever slows the machine for a while then slows all cases, so ratios within a round are steadier than times.

    Args:
        cases: What to time, by name.
        rounds: Rounds that are timed.
        warmup: Rounds before them that are not.

    Returns:
        The seconds of every case, one for each timed round.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(cases[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def _timed(case: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    case()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def count_flops(model: PreTrainedModel, step: Callable[[PreTrainedModel, Any], object], batch: Any) -> int:
    """Floating-point operations of all matrix products in a step, those of the attention scores among them."""
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")  # plain products, which the counter knows on every device
    with FlopCounterMode(display=False) as counter:
        step(model, batch)
    model.set_attn_implementation(kernel)
    return counter.get_total_flops()


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
        The metrics, ``command``, and ``seconds`` and ``peak_memory_bytes`` over all parts in which it ran.

    Raises:
        RuntimeError: If it failed, or ended without its metrics.
    """
    usage_file = done.parent.with_name(f"{done.parent.name}.usage.json")
    if not done.exists():
        log = done.parent.with_name(f"{done.parent.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.time()
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
            "seconds": earlier["seconds"] + time.time() - started,
            "peak_memory_bytes": max(earlier["peak_memory_bytes"], usage.ru_maxrss * 1024),
        }
        write_json(usage_file, spent)
        if status != 0 or not done.exists():
            raise RuntimeError(f"{shlex.join(command)} failed; its output is in {log}")
    usage_found = json.loads(usage_file.read_text()) if usage_file.exists() else {}
    return {"command": shlex.join(["python", *command]), **usage_found, **json.loads(done.read_text())}


def add_cell(path: Path, name: str, cell: dict[str, Any], command: str) -> dict[str, Any]:
    """Add a finished cell of a grid of trainings to its results: JSON, and a table of Markdown beside it.

    Args:
        path: The JSON; what other cells wrote there stays.
        name: Of the cell.
        cell: Its figures, and the commands that gave them, which the table leaves out.
        command: The command that runs the grid.

    Returns:
        All that the JSON holds.
    """
    result = json.loads(path.read_text()) if path.exists() else {}
    result |= {"command": command, "machine": machine("cpu")}
    result["cells"] = {**result.get("cells", {}), name: cell}
    write_json(path, result)
    rows = [{key: row[key] for key in row if not key.startswith("command")} for row in result["cells"].values()]
    write_text(path.with_suffix(".md"), f"{markdown_table(rows)}\n\n`{command}`\n")
    return result


def machine(device: str) -> dict[str, Any]:
    """The processor or GPU, the threads that torch uses, and the versions that matter."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in REPORTED_PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(theme: str, device: str, rows: Sequence[dict[str, Any]], command: str, folder: Path) -> Path:
    """Write ``<theme>-<device>.json`` (machine, command, rows) and the rows as a table of Markdown beside it.

    Args:
        theme: Name of the benchmark.
        device: ``"cpu"`` or ``"cuda"``.
        rows: Lines of the table; a key that a row lacks is an empty cell there.
        command: The command that measures them again.
        folder: Made if it does not exist.

    Returns:
        The path of the JSON.
    """
    path = folder / f"{theme}-{device}.json"
    report = {"command": command, "machine": machine(device), "rows": list(rows)}
    write_json(path, report)
    write_text(path.with_suffix(".md"), f"{markdown_table(rows)}\n\n`{command}`\n")
    return path


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table, in the order in which their keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
