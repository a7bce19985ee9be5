"""Processes that torch connects, forked from one that has imported what they need: a launch costs no imports."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser

from benchmarks.ports import free_port

# Tests that launch belong to one group, so that one of pytest's processes alone makes the process to fork from.
launches = pytest.mark.xdist_group("launches")

SCRIPTS = Path(__file__).parents[2] / "run_scripts"
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed reads when it is imported
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["datasets", "torch.distributed.fsdp", "hf_fnl.training.trainer", "hf_fnl", "deepspeed"])


def launch(
    script: Path | str, *arguments: str, processes: int = 2, timeout: float = 300, **environment: str
) -> tuple[list[int], str]:
    """Run a script in some processes, as torchrun does; one process is on its own.

    Args:
        script: The file, whose ``__name__`` is ``"__main__"``.
        arguments: Its arguments.
        processes: How many.
        timeout: Seconds after which they are ended.
        environment: Variables beside those of this process and of torchrun.

    Returns:
        The exit code of every process, and the end of what they printed. Where one fails, the others are ended.
    """
    common = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    torchrun |= {"LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(processes)]
        running = []
        for rank, log in enumerate(logs):
            places = torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            work = str(script), list(map(str, arguments)), common | places, str(log)
            running.append(FORKS.Process(target=_run, args=work))
        for process in running:
            process.start()
        _wait(running, time.monotonic() + timeout)
        output = "\n".join(log.read_text()[-4000:] for log in logs if log.exists())
    return [process.exitcode for process in running], output


def accelerate_launch(*arguments: str) -> None:
    """Do what ``accelerate launch`` does with these arguments, but that the processes are forked.

    Raises:
        AssertionError: If a process fails.
    """

    def run(args: argparse.Namespace) -> None:
        codes, output = launch(args.training_script, *args.training_script_args, processes=int(args.nproc_per_node))
        assert not any(codes), output

    with mock.patch("torch.distributed.run.run", run):
        launch_command(launch_command_parser().parse_args(arguments))


def _wait(running: list, until: float) -> None:
    try:
        while any(process.is_alive() for process in running):
            if time.monotonic() > until or any(process.exitcode for process in running):
                break
            time.sleep(0.05)
    finally:
        for process in running:
            process.join(1)  # of those that fail each may have something to say
            process.kill()
            process.join()


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    gc.freeze()  # as in conftest.py
    os.environ.clear()
    os.environ.update(environment)
    written = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
