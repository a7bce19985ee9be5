"""What two processes hand to each other in a step, under every engine, beside what ``hf-fnl plan`` says.

Counted twice: the tensors that every collective is given, and, with ``--wire`` (Linux, as root), the bytes that the
network interface of one of two hosts sends. The hosts are network namespaces that this program makes and removes.
``TRAFFIC_SCALE=4`` in the environment makes the model wider, so that headers of messages weigh less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import machine, markdown_table
from hf_fnl.training.files import write_json, write_text

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "workers" / "traffic.py"
CASES = tuple(
    f"{engine}/{rest}"
    for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for rest in ("1/fp32/flambe", "2/bf16/flambe")
)
# Beside what the plan lists, a step sends the number of labels, norms of all gradients, and flags.
MARGIN = 256  # bytes

sys.path.insert(0, str(ROOT / "tests"))


def count(folder: Path, cases: Sequence[str], *, wire: bool = False, timeout: float = 900) -> dict[str, Any]:
    """Train a small BERT on two processes for each case.

    Args:
        folder: Where the processes write.
        cases: ``ENGINE/ACCUMULATION/DTYPE/OPTIMIZER`` each.
        wire: Put the processes on two hosts, and count what the network interface sends.
        timeout: Seconds for all cases.

    Returns:
        What was counted in a step, by case.

    Raises:
        RuntimeError: If a case was not done; the output of the processes is in the message.
    """
    with hosts() if wire else contextlib.nullcontext([]) as names:
        _run(folder, cases, names, timeout)
    counted = {case: folder / case.replace("/", "-") / "traffic.json" for case in cases}
    if missing := [case for case, path in counted.items() if not path.exists()]:
        output = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
        raise RuntimeError(f"not done: {', '.join(missing)}\n{output}")
    return {case: json.loads(path.read_text()) for case, path in counted.items()}


def _run(folder: Path, cases: Sequence[str], hosts: Sequence[str], timeout: float) -> None:
    work = [str(WORKER), str(folder), *cases]
    launch = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(_free_port())]
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
        with (folder / f"{rank}.log").open("w") as log:
            both = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment | interface}
            running.append(subprocess.Popen(command, **both))  # type: ignore[call-overload]
    try:
        for process in running:
            process.wait(timeout)
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def hosts() -> Iterator[list[str]]:
    """Two network namespaces and a cable between them, whose ends are named as they are."""
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
        raise RuntimeError(f"ip {arguments}: {done.stderr.strip()}; --wire needs Linux, iproute2 and root")


def _address(rank: int) -> str:
    return f"10.77.1.{rank + 1}"


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def compare(case: str, counted: dict[str, Any]) -> dict[str, Any]:
    """One row: bytes that collectives were given and that the plan says, and bytes on the wire, where counted."""
    from traffic_cases import planned

    messages = planned(case).messages
    payloads: Counter[str] = Counter()
    for message in messages:
        payloads[message.collective] += message.payload
    given = {kind: counted["given"].get(kind, 0.0) for kind in payloads}
    others = sum(counted["given"].values()) - sum(given.values())
    row = {"case": case, "engine": counted["distributed_type"]}
    for kind in sorted(payloads):
        row |= {f"{kind} planned": payloads[kind], f"{kind} counted": round(given[kind])}
    differences = [abs(given[kind] - payloads[kind]) for kind in payloads]
    row |= {"others": round(others), "largest difference": round(max(differences))}
    # gloo has no reduce-scatter of its own: torch does it by an all-reduce, which sends twice as much as NCCL's ring.
    by_gloo = sum(message.sent * (1 + (message.collective == "reduce_scatter")) for message in messages)
    row |= {"sent planned, ring": round(sum(message.sent for message in messages))}
    wire = counted["wire"]["bytes"]
    return row | ({"sent planned, gloo": round(by_gloo), "wire": round(wire), "ratio": wire / by_gloo} if wire else {})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Count, compare, and write ``sharded.json`` and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wire", action="store_true", help="two network namespaces; needs root")
    parser.add_argument("--cases", nargs="+", default=CASES, help="ENGINE/ACCUMULATION/DTYPE/OPTIMIZER each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        counted = count(Path(folder), options.cases, wire=options.wire)
    rows = [compare(case, found) for case, found in counted.items()]
    scale = os.environ.get("TRAFFIC_SCALE")
    command = (f"TRAFFIC_SCALE={scale} " if scale else "") + shlex.join(
        ["python", "-m", "benchmarks.sharded", *arguments]
    )
    result = {"command": command, "machine": machine("cpu"), "unit": "bytes of a process in a step", "rows": rows}
    write_json(options.out / "sharded.json", result)
    write_text(options.out / "sharded.md", f"{markdown_table(rows)}\n\n`{command}`\n")
    return result


if __name__ == "__main__":
    main()
