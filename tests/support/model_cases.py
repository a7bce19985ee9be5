"""The heads of all families together, for what holds of every one of them."""

import bert_cases
import gpt2_cases
import llama_cases
import marian_cases
import pytest
from family import Head

HEADS: dict[str, Head] = {
    f"{family}-{name}": head
    for family, heads in {
        "bert": bert_cases.HEADS,
        "gpt2": gpt2_cases.HEADS,
        "llama": llama_cases.HEADS,
        "marian": marian_cases.HEADS,
    }.items()
    for name, head in heads.items()
}
# A head of each family that has all that its others have.
TYPICAL = ("bert-cross-decoder", "gpt2-cross-lm", "llama-biases", "marian-separate")
NO_DROPOUT = {
    "Bert": bert_cases.NO_DROPOUT,
    "GPT2": gpt2_cases.NO_DROPOUT,
    "Llama": {},
    "Marian": marian_cases.NO_DROPOUT,
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def some(*names: str) -> pytest.MarkDecorator:
    """These heads only."""
    return pytest.mark.parametrize("head", [HEADS[name] for name in names], ids=names)


def each_head_with_ranks(*levels: str) -> pytest.MarkDecorator:
    """Every head with the first set of ranks of its family, and a typical one of each family with all sets.

    Args:
        levels: ``"full"``, ``"low"``, or both.
    """
    cases = {
        f"{name}-{level}-{ranks}": (head, values)
        for name, head in HEADS.items()
        for level in levels
        for ranks, values in getattr(head.family, level).items()
        if ranks == "all" or name in TYPICAL
    }
    return pytest.mark.parametrize(("head", "ranks"), cases.values(), ids=cases)
