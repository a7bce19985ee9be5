"""What a training run costs on N GPUs, before it is started: memory, bytes sent and operations of a step."""

from hf_fnl.planning.facts import Facts, facts_of
from hf_fnl.planning.memory import Memory, memory_of
from hf_fnl.planning.plan import GIB, Plan, flops_of, plan, plan_of, smallest_engine
from hf_fnl.planning.setup import DTYPES, ENGINES, OPTIMIZERS, Setup
from hf_fnl.planning.sources import PRESETS, fresh_model, meta_model
from hf_fnl.planning.traffic import Message, messages

__all__ = [
    "DTYPES",
    "ENGINES",
    "GIB",
    "OPTIMIZERS",
    "PRESETS",
    "Facts",
    "Memory",
    "Message",
    "Plan",
    "Setup",
    "facts_of",
    "flops_of",
    "fresh_model",
    "memory_of",
    "messages",
    "meta_model",
    "plan",
    "plan_of",
    "smallest_engine",
]
