"""A plan of a run: memory, traffic and operations of a step, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from hf_fnl.planning.facts import Facts, facts_of
from hf_fnl.planning.memory import Memory, memory_of
from hf_fnl.planning.setup import ENGINES, Setup
from hf_fnl.planning.traffic import Message, messages

GIB = 2**30
RESERVED = 0.1  # share of a GPU's memory for the CUDA context, NCCL and the fragments of the allocator
ADAM_FLOPS, LAMB_FLOPS = 14, 20  # of one element: moments, correction, root, quotient, update; and two norms, decay


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`plan` found.

    Args:
        setup: The run.
        facts: The model in it.
        memory: Bytes on a GPU.
        messages: What a GPU sends in a step.
        flops: Operations of a step of all GPUs, by purpose.
        limit: Bytes that a GPU has, if that was said.
        smallest: The engine that keeps most on each GPU and still fits; ``None`` if none does or there is no limit.
    """

    setup: Setup
    facts: Facts
    memory: Memory
    messages: tuple[Message, ...]
    flops: dict[str, float]
    limit: float | None = None
    smallest: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether a GPU's memory suffices, with a tenth of it reserved; ``None`` if it is not known."""
        return None if self.limit is None else _fits(self.memory, self.limit)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, as JSON holds it."""
        sent = {m.purpose: {"collective": m.collective, "payload": m.payload, "sent": m.sent} for m in self.messages}
        total = sum(self.flops.values())
        return {
            "setup": asdict(self.setup),
            "parameters": self.facts.parameters,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "messages": sent,
            "sent_per_step": sum(message.sent for message in self.messages),
            "flops": {**self.flops, "total": total, "per_gpu": total / self.setup.gpus},
            "memory_limit": self.limit,
            "fits": self.fits,
            "smallest_engine": self.smallest,
        }


def plan(build: Callable[[], PreTrainedModel], setup: Setup, *, limit: float | None = None) -> Plan:
    """Plan a run.

    Args:
        build: Makes the model on ``meta``; called once for each engine that is looked at.
        setup: The run.
        limit: Bytes of memory of a GPU.

    Raises:
        ValueError: If the model and the setup do not fit together.
    """
    found = plan_of(facts_of(build(), setup), setup)
    return found if limit is None else replace(found, limit=limit, smallest=smallest_engine(build, setup, limit))


def plan_of(facts: Facts, setup: Setup) -> Plan:
    """The plan of a model that has been looked at; the number of GPUs may be another than then."""
    return Plan(
        setup=setup,
        facts=facts,
        memory=memory_of(facts, setup),
        messages=tuple(messages(facts, setup)),
        flops=flops_of(facts, setup),
    )


def smallest_engine(build: Callable[[], PreTrainedModel], setup: Setup, limit: float) -> str | None:
    """The first engine of :data:`ENGINES`, which are in the order of their traffic, that fits into ``limit`` bytes."""
    for engine in ENGINES:
        if (setup.offload and engine == "ddp") or (engine == "hsdp" and setup.gpus % setup.gpus_per_node):
            continue
        other = replace(setup, engine=engine)
        if _fits(memory_of(facts_of(build(), other), other), limit):
            return engine
    return None


def flops_of(facts: Facts, setup: Setup) -> dict[str, float]:
    """Operations of a step on all GPUs together.

    Forward and backward are the products of matrices that torch counts. Decay takes ``4 m r^2`` for each factor
    ``(m, r)`` of a head: its Gram matrix, and the product with the other one. Under DDP every GPU does all of the
    decay and of the optimizer, otherwise its share.
    """
    passes = setup.accumulation * setup.gpus
    decay = sum(4 * factor.heads * factor.rows * factor.rank**2 for factor in facts.factors)
    update = (ADAM_FLOPS if setup.optimizer == "adamw_torch" else LAMB_FLOPS) * facts.parameters
    again = facts.layer_flops_share * facts.forward_flops if setup.checkpointing else 0
    return {
        "forward": passes * facts.forward_flops,
        "backward": passes * (facts.backward_flops + again),
        "decay": setup.replicas * decay,
        "optimizer": setup.replicas * update,
    }


def _fits(memory: Memory, limit: float) -> bool:
    return memory.total <= (1 - RESERVED) * limit
