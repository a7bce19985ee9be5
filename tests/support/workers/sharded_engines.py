"""Trains a small BERT with the bare optimizer, under one engine after another, in two processes.

Arguments: a folder for results, and cases in JSON, each with a ``name``, an ``engine`` and its options. Writes the
weights of each case into ``<name>.pt``, and what ran into ``facts.json``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_cases import batches, build, optimizer_for
from torch import nn

from hf_fnl.utils.processes import close_process_group

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def micro_batches(step_batch: torch.Tensor, case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return step_batch.chunk(WORLD)[RANK].chunk(case.get("accumulation", 1))


def clip_and_step(model: nn.Module, optimizer: torch.optim.Optimizer, case: dict[str, Any]) -> None:
    if "clip" in case:
        torch.nn.utils.clip_grad_norm_(model.parameters(), case["clip"])
    optimizer.step()
    optimizer.zero_grad()


def with_torch(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str, dict[str, bool]]:
    """DDP, FSDP2 or HSDP."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build(case)
    optimizer = None
    if case["engine"] == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = optimizer_for(model, case)
    else:
        shape = {"fsdp2": (WORLD,), "hsdp": (1, WORLD), "replicated": (WORLD, 1)}[case["engine"]]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[2 - len(shape) :])
        policy = MixedPrecisionPolicy()
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = optimizer_for(model, case)
    for batch in batches(case):
        micro = micro_batches(batch, case)
        for part in micro:
            (wrapped(input_ids=part, labels=part).loss / len(micro)).backward()
        clip_and_step(model, optimizer, case)
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return weights, type(optimizer).__name__, {}


def private_fields(model: nn.Module, engine: Any, stage: int) -> dict[str, bool]:
    """Whether each private field of DeepSpeed that ``hf_fnl.optim.zero`` reads means what is believed there."""
    marked: list[Any] = list(model.parameters())
    full = [tuple(parameter.shape) for parameter in build({}).parameters()]
    if stage == 0:
        return {}
    if stage < 3:
        return {
            "_hp_mapping": all(hasattr(p, "_hp_mapping") for p in marked),
            "_dp_group": {dist.get_world_size(p._dp_group) for p in marked} == {WORLD},
        }
    places = [engine.optimizer.grad_position[engine.optimizer.get_param_id(p)] for p in marked]
    flats = engine.optimizer.fp32_partitioned_groups_flat
    parts = [
        flats[number][offset : offset + p.ds_tensor.ds_numel]
        for (number, offset, _), p in zip(places, marked, strict=True)
    ]
    return {
        "ds_id": len({p.ds_id for p in marked}) == len(marked),
        "ds_shape": [tuple(p.ds_shape) for p in marked] == full,
        "ds_numel": [p.ds_numel for p in marked] == [math.prod(shape) for shape in full],
        "ds_tensor": all(-(-p.ds_numel // WORLD) == p.ds_tensor.ds_numel for p in marked),
        "ds_process_group": {dist.get_world_size(p.ds_process_group) for p in marked} == {WORLD},
        "_z3_optimizer": all(p._z3_optimizer is engine.optimizer for p in marked),
        "grad_position, get_param_id": len({tuple(place[:2]) for place in places}) == len(marked),
        "fp32_partitioned_groups_flat": all(
            torch.equal(part.to(p.dtype), p.ds_tensor.view(-1)) for part, p in zip(parts, marked, strict=True)
        ),
    }


def with_deepspeed(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], str, dict[str, bool]]:
    """ZeRO-0 to 3."""
    import deepspeed

    model = build(case)
    zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 0, **case.get("zero", {})}
    accumulation = case.get("accumulation", 1)
    config = {
        "train_micro_batch_size_per_gpu": 12 // WORLD // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": case.get("clip", 0.0),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.get("config", {}),
    }
    optimizer = optimizer_for(model, case)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for batch in batches(case):
        for part in micro_batches(batch, case):
            loss = engine(input_ids=part, labels=part).loss
            engine.backward(loss)
            engine.step()
    weights = {}
    for name, parameter in model.named_parameters():
        # DeepSpeed's own way to the float32 weights is wrong under round_robin_gradients (0.19.8).
        is_master = parameter.dtype == torch.float32 and case["stage"] < 3
        weights[name] = parameter if is_master else deepspeed.utils.safe_get_full_fp32_param(parameter)
    running, fields = type(engine.basic_optimizer).__name__, private_fields(model, engine, case["stage"])
    engine.destroy()
    return weights, running, fields


def main(folder: Path, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if any(case["engine"] == "deepspeed" for case in cases):
        import deepspeed

        deepspeed.init_distributed("gloo")
    facts = {}
    for case in cases:
        run = with_deepspeed if case["engine"] == "deepspeed" else with_torch
        try:
            weights, optimizer, fields = run(case)
        except Exception:
            facts[case["name"]] = traceback.format_exc()
            break
        facts[case["name"]] = {"optimizer": optimizer, "fields": fields}
        if RANK == 0:
            torch.save({name: w.detach().float().clone() for name, w in weights.items()}, folder / f"{case['name']}.pt")
    if RANK == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    close_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
