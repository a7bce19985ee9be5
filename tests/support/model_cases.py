"""The heads of all families together, for what holds of every one of them."""

import bert_cases
import gpt2_cases
import llama_cases
import pytest
from family import Head

HEADS: dict[str, Head] = {
    f"{family}-{name}": head
    for family, heads in {"bert": bert_cases.HEADS, "gpt2": gpt2_cases.HEADS, "llama": llama_cases.HEADS}.items()
    for name, head in heads.items()
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def some(*names: str) -> pytest.MarkDecorator:
    """These heads only."""
    return pytest.mark.parametrize("head", [HEADS[name] for name in names], ids=names)


def each_head_with_ranks(*levels: str) -> pytest.MarkDecorator:
    """Every head with every set of ranks of its family.

    Args:
        levels: ``"full"``, ``"low"``, or both.
    """
    cases = {
        f"{name}-{level}-{ranks}": (head, values)
        for name, head in HEADS.items()
        for level in levels
        for ranks, values in getattr(head.family, level).items()
    }
    return pytest.mark.parametrize(("head", "ranks"), cases.values(), ids=cases)
