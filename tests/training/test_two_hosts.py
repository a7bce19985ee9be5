"""Two hosts, which are network namespaces joined by a cable of their own, train what one process trains."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import Job, do, largest_difference
from launching import launches

pytestmark = launches
WORKER = Path(__file__).parents[1] / "support" / "workers" / "engine_runs.py"
PORT = "29540"  # nobody else listens in a namespace of one's own
RUN = "split groups"
LAUNCH = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
_numbers = itertools.count()


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """For each of two hosts, with which words a command begins that is to run there; addresses are 10.77.0.1 and .2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("two hosts are network namespaces, which need root and iproute2")
    # Names of interfaces have at most 15 characters.
    names = [f"fnl{os.getpid() % 10**6}n{next(_numbers) % 10**3}h{host}" for host in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)

    try:
        made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, timeout=30)
        if made.returncode:
            pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for host, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{host}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}"] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)


@pytest.fixture
def run_on_both(hosts: list[list[str]], tmp_path: Path) -> Iterator[Callable[[list[str]], str]]:
    """Launches a run on both hosts, waits for it and returns what they said; none of its processes stays."""
    started: list[subprocess.Popen[bytes]] = []

    def run(options: list[str]) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for rank, host in enumerate(hosts):
            command = [*host, sys.executable, "-m", "accelerate.commands.launch", *options]
            command += ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
            command += ["--main_process_ip", "10.77.0.1", "--main_process_port", PORT, "--mixed_precision", "no"]
            command += ["--dynamo_backend", "no", str(WORKER), str(tmp_path), str(tmp_path / "plan.json")]
            with (tmp_path / f"host{rank}.log").open("w") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        for process in started:
            process.wait(timeout=300)
        return "".join((tmp_path / f"host{rank}.log").read_text()[-3000:] for rank in range(2))

    yield run
    for process in started:
        process.terminate()  # the launcher ends its processes then
    for process in started:
        process.wait(timeout=60)


def test_two_hosts_give_what_one_process_gives(run_on_both, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps([("launched", RUN)]))
    said = run_on_both(LAUNCH)
    written, one = (Job(engine, RUN).folder(tmp_path) for engine in ("launched", "one"))
    assert (written / "facts.json").exists(), said
    do(Job("one", RUN), tmp_path)
    facts, expected = (json.loads((folder / "facts.json").read_text()) for folder in (written, one))
    assert (facts["distributed_type"], facts["optimizer"]) == ("DistributedType.FSDP", "FLAMBe")
    assert facts["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert largest_difference(*(torch.load(folder / "weights.pt") for folder in (written, one))) < 2e-6
