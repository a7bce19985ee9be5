"""Starts two processes of a run, on this machine or on two hosts that are network namespaces."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def run_two(work: Sequence[str], logs: Path, *, hosts: Sequence[str] = (), timeout: float = 900) -> None:
    """Run a script as two processes that torch connects, and wait for them.

    Args:
        work: The script and its arguments.
        logs: Folder of what they print.
        hosts: Names of two hosts from :func:`two_hosts`; this machine unless given.
        timeout: Seconds for all of it.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WIRE": ""}
    commands = [[*launch, "--nproc_per_node", "2", "--master_addr", "127.0.0.1", *work]]
    if hosts:
        nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", _address(0)]
        commands = [
            ["ip", "netns", "exec", host, *launch, *nodes, "--node_rank", str(rank), *work]
            for rank, host in enumerate(hosts)
        ]
    running = []
    for rank, command in enumerate(commands):
        interface = {"GLOO_SOCKET_IFNAME": hosts[rank], "WIRE": hosts[rank]} if hosts else {}
        with (logs / f"{rank}.log").open("w") as log:
            both = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment | interface}
            running.append(subprocess.Popen(command, **both))  # type: ignore[call-overload]
    try:
        for process in running:
            process.wait(timeout)
    finally:
        for process in running:
            process.terminate()  # a launcher that is killed leaves its processes behind
        for process in running:
            process.wait()


def output(logs: Path) -> str:
    """The end of what the processes printed."""
    return "\n".join(log.read_text()[-3000:] for log in sorted(logs.glob("*.log")))


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Two network namespaces and a cable between them, whose ends are named as they are; needs root."""
    names = [f"fnl{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _ip(f"netns add {name}")
        _ip(f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
        for rank, name in enumerate(names):
            _ip(f"-n {name} addr add {_address(rank)}/24 dev {name}")
            _ip(f"-n {name} link set {name} up")
            _ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {arguments}: {done.stderr.strip()}; two hosts need Linux, iproute2 and root")


def _address(rank: int) -> str:
    return f"10.77.1.{rank + 1}"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]
