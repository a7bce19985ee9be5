"""Bytes that a step needs on a GPU, and beside it in the memory of the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_fnl.planning.facts import Facts
from hf_fnl.planning.setup import DTYPES, FP32, Setup
from hf_fnl.planning.traffic import padded_flat, padded_rows, partitions, persistent

MOMENTS = 2 * FP32  # bytes of a parameter's two moments


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Args:
        parameters: The model's weights that stay here.
        gradients: Gradients before the step.
        optimizer: Master weights in fp32, where they are not the model's, and both moments.
        activations: What the backward pass needs, with bf16 copies of weights where autocast makes some.
        buffers: What is sent or has arrived: buckets of gradients, gathered parameters.
        workspace: What a step of the optimizer takes for a while, when activations and buffers are free again.
        host: Bytes in the memory of the host, of this GPU's process.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    workspace: int
    host: int

    @property
    def total(self) -> int:
        """The peak, as of the tensors: what PyTorch itself and the fragments of its allocator take comes on top."""
        resident = self.parameters + self.gradients + self.optimizer
        return resident + max(self.activations + self.buffers, self.workspace)


def memory_of(facts: Facts, setup: Setup) -> Memory:
    """What a GPU needs; see :class:`Memory`."""
    held = {"ddp": _ddp, "fsdp2": _fsdp2, "hsdp": _fsdp2}.get(setup.engine, _zero)(facts, setup)
    return Memory(activations=activations(facts, setup), **held)


def activations(facts: Facts, setup: Setup) -> int:
    """What autograd keeps; with checkpointing the inputs of layers, and all of the largest layer in its turn."""
    if not (setup.checkpointing and facts.layers):
        return facts.activations
    return facts.activations - sum(facts.layer_activations) + sum(facts.layer_inputs) + max(facts.layer_activations)


def _ddp(facts: Facts, setup: Setup) -> dict[str, int]:
    """All of everything; the buckets of DDP are a second copy of the gradients."""
    size = FP32 * facts.parameters
    return {
        "parameters": size,
        "gradients": size,
        "optimizer": MOMENTS * facts.parameters,
        "buffers": size if setup.gpus > 1 else 0,
        "workspace": size,
        "host": 0,
    }


def _fsdp2(facts: Facts, setup: Setup) -> dict[str, int]:
    """Shards in fp32; gathered are the unit of the whole model, the layer at work and the next one.

    Gradients of a layer are whole until they are divided; all are while steps accumulate.
    """
    shard = FP32 * sum(padded_rows(shape, setup.shards) for shape in facts.shapes.values()) // setup.shards
    sizes = [sum(math.prod(facts.shapes[name]) for name in layer if name in facts.shapes) for layer in facts.layers]
    layer, rest = max(sizes, default=0), facts.parameters - sum(sizes)
    gathered = setup.width * (rest + 2 * layer)
    whole_gradients = setup.width * (facts.parameters if setup.accumulation > 1 else rest + 2 * layer)
    state = {"parameters": shard, "gradients": shard, "optimizer": MOMENTS * shard // FP32}
    moved = sum(state.values()) if setup.offload else 0
    return {
        **(dict.fromkeys(state, 0) if setup.offload else state),
        "buffers": gathered + whole_gradients,
        "workspace": 0 if setup.offload else shard,
        "host": moved,
    }


def _zero(facts: Facts, setup: Setup) -> dict[str, int]:
    """DeepSpeed: weights in the dtype of the model, whole up to stage 2; masters in fp32 also where that is fp32.

    Before a step the gradients of a GPU's share are copied to fp32.
    """
    width, stage = DTYPES[setup.dtype], int(setup.engine[-1])
    share = sum(partitions(facts, setup.gpus))
    if stage == 3:
        share = sum(padded_flat(math.prod(shape), setup.gpus) for shape in facts.shapes.values()) // setup.gpus
    state = (FP32 + MOMENTS) * share
    bucket = width * min(facts.parameters, max(facts.hidden_size**2, max(map(math.prod, facts.shapes.values()))))
    offloaded = state + FP32 * share if setup.offload else 0
    return {
        "parameters": width * (share if stage == 3 else facts.parameters),
        "gradients": width * (facts.parameters if stage == 1 else share),
        "optimizer": 0 if setup.offload else state,
        "buffers": 2 * bucket + (width * _gathered(facts) if stage == 3 else 0),
        "workspace": 0 if setup.offload else 2 * FP32 * share,
        "host": offloaded,
    }


def _gathered(facts: Facts) -> int:
    """Elements that ZeRO-3 has whole at a time, as it is configured here: small parameters, and the largest one."""
    small = sum(math.prod(facts.shapes[name]) for name in persistent(facts))
    return small + max(map(math.prod, facts.shapes.values()))
