"""What ``hf-fnl plan`` says of runs that nobody here has the GPUs for: memory by engine, and scaling of BERT-large."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.house.record import write_result
from benchmarks.house.tables import markdown_table
from hf_fnl.planning import ENGINES, GIB, Plan, Setup, facts_of, meta_model, plan, plan_of
from hf_fnl.utils.files import write_text

MODELS = ("bert-base", "bert-large", "gpt2-xl")
GPUS = (8, 64, 1024)
RANKS = {"dense": {}, "factorized": {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 256}}
LENGTHS = {"bert-base": 128, "bert-large": 128, "gpt2-xl": 1024}
BATCHES = {"bert-base": 32, "bert-large": 32, "gpt2-xl": 4}


def memory(model: str, engine: str, *, offload: bool = False) -> dict[str, Any]:
    """GiB of each of the 8 GPUs of a machine, where HSDP is FSDP2, in bf16 with FLAMBe."""
    setup = Setup(engine=engine, gpus=8, batch_size=BATCHES[model], sequence_length=LENGTHS[model], offload=offload)
    found = plan(lambda: meta_model(model), setup)
    held = found.memory
    parts = {part: getattr(held, part) for part in ("parameters", "gradients", "optimizer", "activations", "buffers")}
    return {
        "model": model,
        "batch": f"{setup.batch_size} x {setup.sequence_length}",
        "engine": f"{engine}, offload" if offload else engine,
        **{part: round(size / GIB, 2) for part, size in parts.items()},
        "peak": round(held.total / GIB, 2),
        "host": round(held.host / GIB, 2),
        "sent, MB": round(sum(message.sent for message in found.messages) / 1e6),
    }


def scaling(engine: str, form: str) -> list[dict[str, Any]]:
    """Bytes and operations of a step of BERT-large, one row for each number of GPUs."""
    setup = Setup(engine=engine, gpus=8, batch_size=BATCHES["bert-large"], sequence_length=LENGTHS["bert-large"])
    facts = facts_of(meta_model("bert-large", **RANKS[form]), setup)
    plans = [plan_of(facts, replace(setup, gpus=gpus)) for gpus in GPUS]
    return [{"engine": engine, "gpus": found.setup.gpus, "form": form, **_costs(found)} for found in plans]


def _costs(found: Plan) -> dict[str, Any]:
    sent = {message.purpose: message.sent / 1e6 for message in found.messages}
    total = sum(found.flops.values())
    return {
        "parameters": found.facts.parameters,
        "peak, GiB": found.memory.total / GIB,
        "sent, MB": sum(sent.values()),
        "decay and norms, MB": sum(sent.get(name, 0.0) for name in ("norms", "Grams", "cut heads and rows")),
        "TFLOPs of a GPU": total / found.setup.gpus / 1e12,
        "TFLOPs of all": total / 1e12,
        "decay, share of operations": found.flops["decay"] / total,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write ``plan_memory.json`` and ``plan_bert_large.json``, and tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = parser.parse_args(arguments).out
    command = shlex.join(["python", "-m", "benchmarks.plans", *arguments])
    held = [memory(model, engine) for model in MODELS for engine in ENGINES if engine != "hsdp"]
    held += [memory(model, "zero2", offload=True) for model in MODELS]
    costs = [row for form in RANKS for engine in ENGINES for row in scaling(engine, form)]
    for name, rows in {"plan_memory": held, "plan_bert_large": costs}.items():
        write_result(out / f"{name}.json", {"command": command, "ranks": RANKS["factorized"], "rows": rows})
        write_text(out / f"{name}.md", f"{markdown_table(rows)}\n\n`{command}`\n")
    return {"memory": held, "scaling": costs}


if __name__ == "__main__":
    main()
