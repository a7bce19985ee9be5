"""A trained stock BERT, truncated: ranks by its spectra, better still with data; what is refused.

What it shares with the other families is elsewhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import (
    BACKBONE,
    LOW,
    MASKED_LM,
    NO_DROPOUT,
    SEQUENCE,
    SIZES,
    tokens,
)
from family import Head, random_vectors_, run
from torch import Tensor
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from hf_fnl import FactorizedBertForMaskedLM, FactorizedBertModel, RankRule

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
EXACT = {"rtol": 0, "atol": 0}
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


def test_a_budget_spends_where_spectra_are_flat() -> None:
    stock = stock_of(BACKBONE)
    with torch.no_grad():
        for block in (stock.encoder.layer[0].intermediate, stock.encoder.layer[0].output):
            P, S, Qt = torch.linalg.svd(block.dense.weight, full_matrices=False)
            block.dense.weight.copy_(P * S * 0.5 ** torch.arange(len(S)) @ Qt)
    model = FactorizedBertModel.from_dense(stock, rule=RankRule(budget=0.85), kinds=["ffn"])
    steep, flat = model.config.ffn_rank
    assert flat is None or steep < flat


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


def test_several_batches_are_one() -> None:
    stock = stock_of(BACKBONE)
    torch.manual_seed(3)
    ids = torch.randint(1, 53, (4, 9))
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    whole = {"input_ids": ids, "attention_mask": mask}
    parts = [{name: value[:2] for name, value in whole.items()}, {name: value[2:, :5] for name, value in whole.items()}]
    one, several = (FactorizedBertModel.from_dense(stock, **LOW, calibration=data) for data in (whole, parts))
    assert_close(run(several, whole), run(one, whole), rtol=1e-3, atol=1e-3)


# From a folder


def test_a_folder_is_as_good_as_a_model(tmp_path: Path) -> None:
    stock = stock_of(MASKED_LM)
    stock.save_pretrained(tmp_path)
    ours = FactorizedBertForMaskedLM.from_dense(stock, **LOW)
    for source in (tmp_path, str(tmp_path)):
        model = FactorizedBertForMaskedLM.from_dense(source, **LOW)
        assert_close(run(model, MASKED_LM.batch()), run(ours, MASKED_LM.batch()), **CLOSE)


def test_folders_that_hold_no_stock_model(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        FactorizedBertModel.from_dense(str(tmp_path / "nothing-here"), **LOW)
    MASKED_LM.build({"ffn_rank": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.V where the model holds .*\.weight"):
        FactorizedBertForMaskedLM.from_dense(tmp_path, **LOW)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "give ranks or a rule, one of them; got neither", id="nothing"),
        pytest.param({"qk_rank": 3, "rule": RankRule(ratio=0.5)}, "one of them; got qk_rank", id="both"),
        pytest.param({"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8", id="qk-rank"),
        pytest.param({"ffn_rank": [3, 22]}, r"ffn_rank must be in \[1, 21\], got 22", id="rank-in-a-list"),
        pytest.param({"ov_rank": [3]}, "ov_rank needs a number or one for each of 2 layers, got 1", id="short-list"),
        pytest.param({"rule": RankRule(rank=8)}, r"rank of qk in layer 0 must be in \[1, 7\], got 8", id="rule-rank"),
        pytest.param(
            {"rule": RankRule(ratio=0.01)},
            r"ratio=0\.01 cannot .* embedding .*: try kinds=qk,ov,ffn,embedding",
            id="ratio",
        ),
        pytest.param({"rule": RankRule(energy=1.0)}, "leaves every matrix dense", id="all-dense"),
        pytest.param(
            {"rule": RankRule(rank=3), "kinds": ["qk", "mlp"]}, "any of qk, ov, ffn, embedding, got mlp", id="kind"
        ),
        pytest.param({"rule": RankRule(rank=3), "kinds": []}, "any of qk, ov, ffn, embedding, got none", id="no-kind"),
        pytest.param({"ffn_rank": 3, "calibration": []}, "there are no calibration batches", id="no-data"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        FactorizedBertModel.from_dense(BACKBONE.build_stock(), **options)
    assert isinstance(error.value, ValueError) or type(error.value).__name__.startswith("StrictDataclass")


def test_only_the_stock_class_is_truncated() -> None:
    with pytest.raises(TypeError, match="FactorizedBertModel is made from a BertModel, got a "):
        FactorizedBertModel.from_dense(SEQUENCE.build_stock(), **LOW)


def test_unknown_ranks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"FactorizedBertModel has the ranks .*, got qkv_rank"):
        FactorizedBertModel.from_dense(BACKBONE.build_stock(), qkv_rank=3)


@pytest.mark.parametrize(
    ("name", "options", "calibrated"),
    [
        ("embeddings.word_embeddings", LOW, False),
        ("encoder.layer.1.output.dense", {"rule": RankRule(budget=0.6), "kinds": ["qk", "ffn", "embedding"]}, True),
        ("encoder.layer.1.attention.self.key", LOW, True),
    ],
)
def test_weights_that_are_not_finite(name: str, options: dict[str, Any], calibrated: bool) -> None:
    stock = BACKBONE.build_stock()
    stock.get_submodule(name).weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        FactorizedBertModel.from_dense(stock, **options, calibration=tokens() if calibrated else None)
