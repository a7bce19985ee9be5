"""Bytes that the processes of a run hand to each other in a step, by purpose."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from hf_fnl.planning.facts import FactorFacts, Facts
from hf_fnl.planning.setup import FP32, Setup

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all_reduce", "all_gather", "reduce_scatter"
BROADCAST, EXCHANGE = "broadcast", "all_to_all"


@dataclass(frozen=True)
class Message:
    """What one GPU takes part in during a step.

    Args:
        purpose: What for.
        collective: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``broadcast`` or ``all_to_all``.
        payload: Bytes of the whole tensors: what is reduced, or what is there once everything is gathered; of an
            exchange what the process that sends most hands over.
        group: Processes that take part, ``n``.
    """

    purpose: str
    collective: str
    payload: int
    group: int

    @property
    def sent(self) -> float:
        """Bytes that each process sends in a ring: ``2 (n - 1) / n`` of an all-reduce, ``(n - 1) / n`` of the others.

        In a broadcast a process passes on what it receives, ``(n - 1) / n`` of the payload on average.
        """
        if self.collective == EXCHANGE:
            return self.payload
        rounds = 2 if self.collective == ALL_REDUCE else 1
        return rounds * self.payload * (self.group - 1) / self.group


def messages(facts: Facts, setup: Setup) -> list[Message]:
    """All messages of a step; none on one GPU.

    Left out is what holds steps together, some tens of bytes each: the loss, the norm of all gradients, counts.
    """
    if setup.gpus == 1:
        return []
    engine = {
        "ddp": _ddp,
        "fsdp2": _fsdp2,
        "hsdp": _fsdp2,
        "zero1": _zero12,
        "zero2": _zero12,
        "zero3": _zero3,
    }[setup.engine]
    return [message for message in (*engine(facts, setup), *_optimizer(facts, setup)) if message.sent > 0]


def _ddp(facts: Facts, setup: Setup) -> list[Message]:
    """Gradients once a step, in fp32; a mark for each used parameter; buffers."""
    return [
        Message("gradients", ALL_REDUCE, FP32 * facts.parameters, setup.gpus),
        Message("buffers", BROADCAST, facts.buffer_bytes, setup.gpus),
        Message("used parameters", ALL_REDUCE, 4 * len(facts.shapes), setup.gpus),
    ]


def _fsdp2(facts: Facts, setup: Setup) -> list[Message]:
    """Layers are gathered for each pass, the rest once; gradients are divided once a step.

    accelerate reshards layers after the forward pass, and the unit of the whole model, which holds the tied embedding,
    not. While steps accumulate, gradients stay whole. HSDP then adds them up over its replicas.
    """
    padded = {name: padded_rows(shape, setup.shards) for name, shape in facts.shapes.items()}
    in_layers = sum(padded[name] for layer in facts.layers for name in layer if name in padded)
    everything, passes = sum(padded.values()), setup.accumulation
    return [
        Message("parameters, forward", ALL_GATHER, passes * setup.width * everything, setup.shards),
        Message("parameters, backward", ALL_GATHER, passes * setup.width * in_layers, setup.shards),
        Message("gradients", REDUCE_SCATTER, setup.width * everything, setup.shards),
        Message("gradients of replicas", ALL_REDUCE, setup.width * everything // setup.shards, setup.replicas),
    ]


def _zero12(facts: Facts, setup: Setup) -> list[Message]:
    """DeepSpeed reduces by all-reduce, in stage 2 in every forward pass, and gathers updated parameters."""
    passes = setup.accumulation if setup.engine == "zero2" else 1
    padded = sum(setup.gpus * partition for partition in partitions(facts, setup.gpus))
    return [
        Message("gradients", ALL_REDUCE, passes * setup.width * facts.parameters, setup.gpus),
        Message("updated parameters", ALL_GATHER, setup.width * padded, setup.gpus),
    ]


def _zero3(facts: Facts, setup: Setup) -> list[Message]:
    """Large parameters are gathered for each use in each pass, small ones after the step; gradients are divided."""
    padded = {name: padded_flat(math.prod(shape), setup.gpus) for name, shape in facts.shapes.items()}
    resident = persistent(facts)
    gathered = sum(padded[name] for name in facts.uses if name not in resident)
    passes = setup.accumulation
    return [
        Message("parameters, forward", ALL_GATHER, passes * setup.width * gathered, setup.gpus),
        Message("parameters, backward", ALL_GATHER, passes * setup.width * gathered, setup.gpus),
        Message("gradients", REDUCE_SCATTER, passes * setup.width * sum(padded.values()), setup.gpus),
        Message("small parameters", ALL_GATHER, setup.width * sum(padded[name] for name in resident), setup.gpus),
    ]


def _optimizer(facts: Facts, setup: Setup) -> list[Message]:
    """LAMB's two norms of a parameter, the Gram matrices of decayed factors, and what a boundary cuts, in fp32."""
    if setup.shards == 1 or setup.optimizer == "adamw_torch":
        return []
    return [
        Message("norms", ALL_REDUCE, 2 * FP32 * len(facts.shapes), setup.shards),
        Message("Grams", ALL_REDUCE, sum(FP32 * f.heads * f.rank**2 for f in facts.factors), setup.shards),
        Message("cut heads and rows", EXCHANGE, FP32 * max(exchanged(facts, setup)), setup.shards),
    ]


def padded_rows(shape: tuple[int, ...], shards: int) -> int:
    """Elements of a tensor whose rows are dealt out evenly, the last shares filled up."""
    return -(-shape[0] // shards) * shards * math.prod(shape[1:])


def padded_flat(numel: int, shards: int) -> int:
    """Elements of a flat tensor in even shares, the last one filled up."""
    return -(-numel // shards) * shards


def partitions(facts: Facts, gpus: int) -> list[int]:
    """Elements of each group of parameters that ZeRO-1 and 2 give to a GPU; DeepSpeed aligns them to two."""
    sizes = [sum(math.prod(facts.shapes[name]) for name in names) for names in facts.groups]
    return [padded_flat(size, 2 * gpus) // gpus for size in sizes]


def persistent(facts: Facts) -> set[str]:
    """What ZeRO-3 leaves whole everywhere: parameters of up to ten times the hidden size, for ``"auto"``."""
    return {name for name, shape in facts.shapes.items() if math.prod(shape) <= 10 * facts.hidden_size}


def exchanged(facts: Facts, setup: Setup) -> list[int]:
    """Elements that each process sends so that heads and rows that boundaries cut become whole.

    Who holds a part of one sends it to all others that do.
    """
    begins, sent = _begins(facts, setup), [0] * setup.shards
    for factor in facts.factors:
        whole = math.prod(facts.shapes[factor.name])
        ends = [min(max(begin, 0), whole) for begin in begins[factor.name]]
        for parts in _cut_units(factor, [*ends, whole]).values():
            for rank, length in parts.items():
                sent[rank] += length * (len(parts) - 1)
    return sent


def _cut_units(factor: FactorFacts, ends: list[int]) -> dict[int, dict[int, int]]:
    """How much of which unit each process holds; units that one process holds whole are left out."""
    last = factor.first + factor.count * factor.unit
    held: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        low, high = max(start, factor.first), min(stop, last)
        if low < high:
            for unit in {(low - factor.first) // factor.unit, (high - 1 - factor.first) // factor.unit}:
                begin = factor.first + unit * factor.unit
                held[unit][rank] = min(high, begin + factor.unit) - max(low, begin)
    return {unit: parts for unit, parts in held.items() if len(parts) > 1}


def _begins(facts: Facts, setup: Setup) -> dict[str, list[int]]:
    """Where in each parameter the shares of all processes but the first begin."""
    shards = setup.shards
    if setup.is_fsdp:
        rows = {name: (-(-shape[0] // shards), math.prod(shape[1:])) for name, shape in facts.shapes.items()}
        return {name: [k * count * width for k in range(1, shards)] for name, (count, width) in rows.items()}
    if setup.engine == "zero3":
        shares = {name: padded_flat(math.prod(shape), shards) // shards for name, shape in facts.shapes.items()}
        return {name: [k * share for k in range(1, shards)] for name, share in shares.items()}
    begins: dict[str, list[int]] = {}
    for names, partition in zip(facts.groups, partitions(facts, shards), strict=True):
        offset = 0
        for name in names:
            begins[name] = [k * partition - offset for k in range(1, shards)]
            offset += math.prod(facts.shapes[name])
    return begins
