"""One of two processes: trains a tiny BERT under engines one after another, and counts what it hands to the others.

``torchrun ... tests/workers/traffic.py FOLDER ENGINE/ACCUMULATION/DTYPE/OPTIMIZER[/HIDDEN_SIZE] ...``; with the name of
a network interface as ``WIRE`` in the environment, also what that sent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from hf_fnl.utils.processes import leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from traffic_cases import LENGTH, STEPS, traffic_examples, traffic_model

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments, Lamb
from hf_fnl.optim.sharding import shards_of

FIRST_COUNTED = 2  # engines find out in the first steps in which order a model uses its parameters

# Which argument of torch's operation holds the whole tensors.
COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
}


class Payloads(TorchDispatchMode):
    """Counts the bytes that every kind of collective is given, whoever calls it: Python or the reducer of DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            if name in COLLECTIVES:
                kind, index = COLLECTIVES[name]
                tensors = [leaf for leaf in tree_leaves(args[index]) if isinstance(leaf, torch.Tensor)]
                self.bytes[kind] += sum(tensor.nbytes for tensor in tensors)
            elif name not in ("barrier", "monitored_barrier_"):
                self.bytes[f"unknown: {name}"] += 1
        return func(*args, **(kwargs or {}))


class Snapshots(TrainerCallback):
    """What has been counted when steps begin."""

    def __init__(self, payloads: Payloads) -> None:
        self.payloads, self.at, self.optimizer = payloads, [], None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.optimizer()
        purposes = shards_of(optimizer).collectives if isinstance(optimizer, Lamb) else None
        sent = {} if purposes is None else dict(purposes.sent)
        self.at.append({"given": dict(self.payloads.bytes), "optimizer": sent, "wire": {"bytes": wire()}})

    def per_step(self) -> dict[str, dict[str, float]]:
        first, last = self.at[FIRST_COUNTED], self.at[-1]
        steps = len(self.at) - 1 - FIRST_COUNTED
        return {of: {key: (count - first[of].get(key, 0)) / steps for key, count in last[of].items()} for of in last}


def wire() -> int:
    name = os.environ.get("WIRE")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text()) if name else 0


def options_of(engine: str, accumulation: str, dtype: str, optimizer: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": int(accumulation),
        "bf16": dtype == "bf16",
        "optim": optimizer,
    }
    if engine == "fsdp2":
        return options | {"fsdp": True, "fsdp_config": {"version": 2}}
    if engine.startswith("zero"):
        folder = Path(__file__).parents[2] / "run_scripts" / "launch"
        return options | {"deepspeed": str(folder / f"{engine}.json")}
    return options


def train(folder: Path, engine: str, accumulation: str, dtype: str, optimizer: str, *hidden_size: str) -> None:
    args = FLAMBeTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options_of(engine, accumulation, dtype, optimizer),
    )
    payloads = Payloads()
    snapshots = Snapshots(payloads)
    model = traffic_model("cpu", *hidden_size)
    trainer = FLAMBeTrainer(model, args, train_dataset=traffic_examples(LENGTH), callbacks=[snapshots])
    snapshots.optimizer = trainer.running_optimizer
    if trainer.is_fsdp_enabled and dtype == "bf16":
        # accelerate does so where it selects FSDP itself.
        trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    with payloads:
        trainer.train()
    if trainer.is_world_process_zero():
        facts = {"distributed_type": str(trainer.accelerator.distributed_type), **snapshots.per_step()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "traffic.json").write_text(json.dumps(facts))


def main(folder: str, *cases: str) -> None:
    torch.distributed.init_process_group("gloo")
    for case in cases:
        for variable in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[variable]  # what accelerate noted of the engine before
        train(Path(folder) / case.replace("/", "-"), *case.split("/"))
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
