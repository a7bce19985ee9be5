"""What two processes hand to each other in a step, under every engine, beside what ``hf-fnl plan`` says; and its time.

The bytes are those of the tensors that every collective is given. With ``TRAFFIC_WIRE=1`` in the environment (Linux, as
root) the processes are on two hosts, network namespaces that this program makes and removes, and the bytes that the
network interface of one of them sends are counted, too. ``TRAFFIC_SCALE=4`` makes the model wider, so that headers of
messages weigh less. All of this is about processes on a CPU; on a GPU only the plans are shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.house.sweeps import Sweep
from benchmarks.house.theme import Options, Theme
from benchmarks.house.timing import Row
from benchmarks.two_processes import output, run_two, two_hosts
from hf_fnl.planning import Setup, facts_of, meta_model, plan_of

ROOT = Path(__file__).parents[2]
WORKERS = {"traffic": ROOT / "tests" / "workers" / "traffic.py", "steps": ROOT / "benchmarks" / "sharded_steps.py"}
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OPTIMIZERS = ("adamw_torch", "flambe")
DECAY = {"Grams": "grams", "cut heads and rows": "cuts"}  # what the plan and what the optimizer call it
# Beside what the plan lists, a step sends the number of labels, norms of all gradients, and flags.
MARGIN = 256  # bytes
STEP = "step of two processes"

sys.path.insert(0, str(ROOT / "tests"))


def count(folder: Path, cases: Sequence[str], *, wire: bool = False, timeout: float = 900) -> dict[str, Any]:
    """Train a small BERT on two processes for each case.

    Args:
        folder: Where the processes write.
        cases: ``ENGINE/ACCUMULATION/DTYPE/OPTIMIZER`` each, and ``/HIDDEN_SIZE`` where it is another.
        wire: Put the processes on two hosts, and count what the network interface sends.
        timeout: Seconds for all cases.

    Returns:
        What was counted in a step, by case.

    Raises:
        RuntimeError: If a case was not done; the output of the processes is in the message.
    """
    with two_hosts() if wire else contextlib.nullcontext(()) as hosts:
        run_two([str(WORKERS["traffic"]), str(folder), *cases], folder, hosts=hosts, timeout=timeout)
    counted = {case: folder / case.replace("/", "-") / "traffic.json" for case in cases}
    if missing := [case for case, path in counted.items() if not path.exists()]:
        raise RuntimeError(f"not done: {', '.join(missing)}\n{output(folder)}")
    return {case: json.loads(path.read_text()) for case, path in counted.items()}


def compare(case: str, counted: dict[str, Any]) -> Row:
    """One row: bytes that collectives were given and that the plan says, and bytes on the wire, where counted."""
    from traffic_cases import planned

    messages = planned(case).messages
    payloads: Counter[str] = Counter()
    for message in messages:
        payloads[message.collective] += message.payload
    given = {kind: counted["given"].get(kind, 0.0) for kind in payloads}
    others = sum(counted["given"].values()) - sum(given.values())
    row: Row = {"workload": "bytes of a process in a step", "case": case, "engine": counted["distributed_type"]}
    for kind in sorted(payloads):
        row |= {f"{kind} planned": payloads[kind], f"{kind} counted": round(given[kind])}
    differences = [abs(given[kind] - payloads[kind]) for kind in payloads]
    row |= {"others": round(others), "largest difference": round(max(differences))}
    # gloo has no reduce-scatter of its own: torch does it by an all-reduce, which sends twice as much as NCCL's ring.
    by_gloo = sum(message.sent * (1 + (message.collective == "reduce_scatter")) for message in messages)
    row |= {"sent planned, ring": round(sum(message.sent for message in messages))}
    wire = counted["wire"]["bytes"]
    return row | ({"sent planned, gloo": round(by_gloo), "wire": round(wire), "ratio": wire / by_gloo} if wire else {})


def decay(case: str, counted: dict[str, Any]) -> Row:
    """One row: bytes of the decay, which grow with ranks and heads, and not with the width of the model."""
    from traffic_cases import planned

    messages = planned(case).messages
    sent = sum(message.sent for message in messages if message.purpose in DECAY)
    payloads = {name: sum(m.payload for m in messages if m.purpose == purpose) for purpose, name in DECAY.items()}
    row: Row = {"workload": "bytes of the decay in a step", "case": case}
    for name, payload in payloads.items():
        row |= {f"{name} planned": payload, f"{name} counted": round(counted["optimizer"].get(name, 0))}
    return row | {"share of all sent": sent / sum(message.sent for message in messages)}


def _traffic_cases(options: Options) -> list[str]:
    rest = options.pick(full=("1/fp32/flambe", "2/bf16/flambe"), quick=("1/fp32/flambe",), tiny=("1/fp32/flambe",))
    return [f"{engine}/{how}" for engine in _engines(options) for how in rest]


def _widths(options: Options) -> list[int]:
    from traffic_cases import SIZES

    return [SIZES["hidden_size"] * times for times in options.pick(full=(1, 2, 4, 8), quick=(1, 2, 4), tiny=(1, 2, 4))]


def _engines(options: Options) -> list[str]:
    found = options.pick(full=ENGINES, quick=ENGINES, tiny=("fsdp2",))
    return [engine for engine in found if not engine.startswith("zero") or importlib.util.find_spec("deepspeed")]


_COUNTED: dict[str, dict[str, Any]] = {}  # one launch serves the check, the rows and the sweep


def check(options: Options) -> None:
    """Raise unless what the processes hand over is what the plan says."""
    _COUNTED.clear()
    if options.on_gpu:
        return
    cases = _traffic_cases(options)
    wider = [f"fsdp2/1/fp32/flambe/{width}" for width in _widths(options)] if options.sweeps else []
    with tempfile.TemporaryDirectory() as folder:
        _COUNTED.update(count(Path(folder), [*cases, *wider], wire=os.environ.get("TRAFFIC_WIRE") == "1"))
    for case, counted in _COUNTED.items():
        row = compare(case, counted)
        if row["largest difference"] > MARGIN:
            raise RuntimeError(f"{case}: what is sent is not what the plan says: {row}")


def measure(options: Options) -> Iterator[Row]:
    """Bytes by engine, bytes of the decay, and steps of two processes with FLAMBe and with AdamW."""
    if options.on_gpu:
        reason = "the processes of this theme talk through gloo, on a CPU"
        yield {"workload": STEP, "case": "all engines", "not_measured": reason}
        return
    cases = _traffic_cases(options)
    yield from (compare(case, _COUNTED[case]) for case in cases)
    yield from (decay(case, _COUNTED[case]) for case in cases if not case.startswith("ddp"))
    if not importlib.util.find_spec("deepspeed"):
        yield {"workload": STEP, "case": "zero1, zero2, zero3", "not_measured": "deepspeed is not installed"}
    yield from _steps(options)


def _steps(options: Options) -> Iterator[Row]:
    """Steps of two processes that share this machine's cores: they show what an optimizer costs, and no speed."""
    if options.size == "tiny":
        yield {"workload": STEP, "case": "all engines", "not_measured": "left out of this size"}
        return
    turns, steps = (3, 12) if options.size == "full" else (2, 6)
    width = "480" if options.size == "full" else "240"
    cases = [f"{engine}/{optimizer}" for engine in _engines(options) for optimizer in OPTIMIZERS]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steps.json"
        run_two([str(WORKERS["steps"]), str(file), str(turns), str(steps), width, *cases], Path(folder))
        if not file.exists():
            raise RuntimeError(f"the steps were not timed:\n{output(Path(folder))}")
        found = json.loads(file.read_text())
    for case in cases:
        yield _step_row(case, found[case], found[f"{case.split('/')[0]}/{OPTIMIZERS[0]}"], width)


def _step_row(case: str, turns: list[list[dict[str, float]]], others: list[list[dict[str, float]]], width: str) -> Row:
    """Medians; the ratio is that of medians within a turn."""

    def typical(steps: list[dict[str, float]]) -> float:
        return median(sum(step.values()) for step in steps)

    steps = [step for turn in turns for step in turn]
    total = sum(sum(step.values()) for step in steps)
    return {
        "workload": STEP,
        "case": case,
        "hidden_size": int(width),
        "milliseconds": 1e3 * typical(steps),
        f"by {OPTIMIZERS[0]}": median(typical(a) / typical(b) for a, b in zip(turns, others, strict=True)),
        **{
            f"share of {phase}": sum(step.get(phase, 0.0) for step in steps) / total
            for phase in ("communication", "decay", "optimizer")
        },
    }


def sweeps(options: Options) -> Iterator[Sweep]:
    """What a GPU sends as there are more GPUs, from plans; and what two processes sent as the model got wider."""
    yield from _more_gpus(options)
    if not options.on_gpu:
        yield _wider(options)


def _more_gpus(options: Options) -> Iterator[Sweep]:
    gpus = (8, 64, 1024)
    model = options.pick(full="bert-large", quick="bert-base", tiny="bert-base")
    all_sent: dict[str, list[tuple[float, float]]] = {}
    decay_sent: dict[str, list[tuple[float, float]]] = {}
    gradients: list[tuple[float, float]] = []
    for engine in options.pick(full=(*ENGINES, "hsdp"), quick=(*ENGINES, "hsdp"), tiny=("ddp", "zero3")):
        setup = Setup(engine=engine, gpus=8)
        facts = facts_of(meta_model(model, ffn_rank=192, ov_rank=32, qk_rank=32), setup)
        for number in gpus:
            messages = plan_of(facts, Setup(engine=engine, gpus=number)).messages
            all_sent.setdefault(engine, []).append((number, sum(m.sent for m in messages) / 2**20))
            sent = sum(m.sent for m in messages if m.purpose in DECAY)
            if sent:
                decay_sent.setdefault(engine, []).append((number, sent / 2**20))
        gradients = [(number, 2 * 4 * facts.parameters * (number - 1) / number / 2**20) for number in gpus]
    title = f"{model}, ffn 192, qk/ov 32"
    limit = {"gradients in fp32, once around a ring": gradients}
    note = "FSDP2 fills the rows of every tensor up to a multiple of the GPUs, which counts where they are many."
    yield Sweep(f"sent by a GPU: {title}", "GPUs", "MiB a step", all_sent, limit, note)
    note = "However many GPUs there are, the part of each has two ends, where rows and heads are cut."
    yield Sweep(f"sent for the decay: {title}", "GPUs", "MiB a step", decay_sent, {}, note)


def _wider(options: Options) -> Sweep:
    found = {width: _COUNTED[f"fsdp2/1/fp32/flambe/{width}"] for width in _widths(options)}
    lines = {
        "all collectives": [(width, sum(counted["given"].values())) for width, counted in found.items()],
        "decay": [
            (width, sum(counted["optimizer"][name] for name in DECAY.values())) for width, counted in found.items()
        ],
    }
    note = "Grams are of the size of the ranks; the rows and heads that a boundary cuts are as wide as the model."
    return Sweep("two processes under FSDP2, counted", "hidden size", "bytes a step", lines, {}, note)


THEME = Theme("sharded", check, measure, sweeps, environment=("TRAFFIC_SCALE", "TRAFFIC_WIRE"))
