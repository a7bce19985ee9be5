"""A trained stock BERT, truncated: ranks by its spectra, better still with data; what is refused.

What it shares with the other families is elsewhere.
"""

from collections.abc import Iterator

import pytest
import torch
from bert_cases import (
    BACKBONE,
    NO_DROPOUT,
    SIZES,
)
from family import Head, random_vectors_, run
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from hf_fnl import FactorizedBertForMaskedLM, FactorizedBertModel, RankRule

HEADS_OF = SIZES["num_attention_heads"]


def stock_of(head: Head) -> PreTrainedModel:
    return random_vectors_(head.build_stock())


def lost(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.detach().double() - theirs.detach().double()).square().sum((-2, -1))


def to_heads(projection: torch.nn.Linear, *, bias: bool) -> Tensor:
    """``Q``, or ``[Q; b_q]``, of every head."""
    weight = projection.weight.unflatten(0, (HEADS_OF, -1)).mT
    return torch.cat([weight, projection.bias.unflatten(0, (HEADS_OF, 1, -1))], 1) if bias else weight


def head_products(attention: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """``[Q; b_q] K^T`` and ``V O^T`` of every head."""
    inner = attention.self
    O_h = attention.output.dense.weight.unflatten(1, (HEADS_OF, -1)).transpose(0, 1)
    return (
        to_heads(inner.query, bias=True) @ to_heads(inner.key, bias=False).mT,
        to_heads(inner.value, bias=False) @ O_h.mT,
    )


# By spectra


def test_energy_is_kept_in_every_product() -> None:
    stock = stock_of(BACKBONE)
    with torch.no_grad():  # large and nearly of rank one
        stock.encoder.layer[0].output.dense.weight[:, :1] *= 100
    model = FactorizedBertModel.from_dense(stock, rule=RankRule(energy=0.8), kinds=["ffn", "ov"])
    assert model.config.qk_rank is None
    for ours, theirs in zip(model.encoder.layer, stock.encoder.layer, strict=True):
        # Both matrices of a layer share a rank, and their shares count equally; so do the heads, by their energies.
        pairs = [
            (getattr(ours, name).dense.weight, getattr(theirs, name).dense.weight)
            for name in ("intermediate", "output")
        ]
        shares = [1 - lost(a, b) / b.detach().square().sum() for a, b in pairs]
        assert sum(shares) / 2 >= 0.8 - 1e-6
        (_, cut), (_, whole) = head_products(ours.attention), head_products(theirs.attention)
        assert 1 - lost(cut, whole).sum() / whole.detach().square().sum() >= 0.8 - 1e-6


# In the metric of data


def rule_id(rule: RankRule) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(rule).items() if value not in (None, 1))


def chains(count: int, seed: int) -> Tensor:
    """Sentences of a language in which every word has one successor."""
    vocab = SIZES["vocab_size"]
    successor = torch.randint(1, vocab, (vocab,), generator=torch.Generator().manual_seed(0))
    words = [torch.randint(1, vocab, (count,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(10):
        words.append(successor[words[-1]])
    return torch.stack(words, 1)


def masked(ids: Tensor) -> dict[str, Tensor]:
    """Every fifth word is to be predicted."""
    hidden = torch.arange(ids.numel()).view_as(ids) % 5 == 0
    return {"input_ids": ids.masked_fill(hidden, 0), "labels": ids.masked_fill(~hidden, -100)}


@pytest.fixture(scope="module")
def trained() -> Iterator[BertForMaskedLM]:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**{**SIZES, **NO_DROPOUT, "initializer_range": 0.3}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.zero_grad()
        model(**masked(chains(64, seed=step))).loss.backward()
        optimizer.step()
    model.eval().zero_grad()
    return model


@pytest.mark.parametrize(
    "rule",
    [RankRule(layer_ratio=0.5), RankRule(budget=0.7)],
    ids=rule_id,
)
def test_calibration_loses_less_on_data_that_it_has_not_seen(trained: BertForMaskedLM, rule: RankRule) -> None:
    calibration = {"input_ids": masked(chains(200, seed=1000))["input_ids"]}
    held_out = masked(chains(500, seed=1001))
    plain = FactorizedBertForMaskedLM.from_dense(trained, rule=rule)
    calibrated = FactorizedBertForMaskedLM.from_dense(trained, rule=rule, calibration=calibration)
    losses = [float(run(model, held_out)["loss"]) for model in (trained, calibrated, plain)]
    assert losses[0] < 1.0
    assert losses[0] < losses[1] < losses[2]
