"""A trained stock Marian, truncated, and a factorized one, multiplied out: equal at full rank, best below it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Head, factorized_layers, random_vectors_, run
from marian_cases import BACKBONE, DECODER, FULL, HEADS, LOW, MT, PRE_NORM, SEPARATE, UNTIED
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl import RankRule, find_products

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 0, "atol": 0}
POST_NORM = {name: head for name, head in HEADS.items() if not name.startswith("pre-norm")}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
calibrated_or_not = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])


def source_of(head: Head, **fields: Any) -> PreTrainedModel:
    """What a head is made from: the stock model, or with LayerNorm before the blocks ours without factors."""
    model = head.build_stock(**fields) if head in POST_NORM.values() else head.build({}, **fields)
    for buffer in model.buffers():  # the bias of the logits
        buffer.normal_()
    return random_vectors_(model)


def tail(matrix: Tensor, rank: int) -> Tensor:
    """What the best approximation of this rank loses."""
    return torch.linalg.svdvals(matrix.detach().double())[..., rank:].square().sum(-1)


def lost(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.detach().double() - theirs.detach().double()).square().sum((-2, -1))


@each_head
@calibrated_or_not
@pytest.mark.parametrize("ranks", [FULL, {"qk_rank": 7}, {"ffn_rank": 21}], ids=["all", "qk", "ffn"])
def test_full_rank_computes_the_same(head: Head, ranks: dict[str, int], calibrated: bool) -> None:
    source, batch = source_of(head), head.batch()
    model = head.ours.from_dense(source, **ranks, calibration=batch if calibrated else None)
    assert type(model) is head.ours
    assert_close(run(model, batch), run(source, batch), **CLOSE)
    assert_close(run(model.merge(), head.batch(7)), run(source, head.batch(7)), **CLOSE)


@each_head
def test_every_product_is_the_best_approximation(head: Head) -> None:
    source = source_of(head)
    model = head.ours.from_dense(source, **LOW)
    for name, layer in factorized_layers(model).items():
        whole = source.get_submodule(name).weight
        assert_close(lost(layer.composed(), whole), tail(whole, layer.rank), rtol=1e-4, atol=1e-6)
    ov = {p.name: p.matrix(source) for p in find_products(source, ["ov"])}  # a query-key product is cut with its biases
    for product in find_products(model, ["ov"]):
        assert_close(lost(product.matrix(model), ov[product.name]), tail(ov[product.name], 2), rtol=1e-4, atol=1e-6)
    assert len(ov) == (6 if head.name == "ForCausalLM" else 8)


@each_head
@calibrated_or_not
def test_the_merged_model_computes_what_the_truncated_one_does(head: Head, calibrated: bool) -> None:
    batch = head.batch()
    model = head.ours.from_dense(source_of(head), **LOW, calibration=batch if calibrated else None)
    assert_close(run(model.merge(), batch), run(model, batch), **CLOSE)


@pytest.mark.parametrize("head", [MT, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_data_lower_the_error_of_what_comes_out(head: Head) -> None:
    source, batch = source_of(head), head.batch()
    ranks = {"qk_rank": 4, "ov_rank": 4, "ffn_rank": 12}
    expected = run(source, batch)["logits"]
    plain, calibrated = (
        lost(run(head.ours.from_dense(source, **ranks, calibration=data), batch)["logits"], expected).sum()
        for data in (None, batch)
    )
    assert calibrated < plain


@calibrated_or_not
@pytest.mark.parametrize("rule", ["rank_scale", "budget"])
@pytest.mark.parametrize("head", [MT, SEPARATE, PRE_NORM, DECODER], ids=["mt", "separate", "pre-norm", "decoder"])
def test_every_rule_chooses_every_kind(head: Head, rule: str, calibrated: bool) -> None:
    model = head.ours.from_dense(
        source_of(head),
        rule=RankRule(**{rule: 0.6}),
        kinds=("qk", "ov", "ffn", "embedding"),
        calibration=head.batch() if calibrated else None,
    )
    chosen = [getattr(model.config, f"{kind}_rank") for kind in ("qk", "ov", "ffn", "embedding")]
    assert any(chosen)
    assert torch.isfinite(run(model, head.batch())["logits"]).all()
    if rule == "rank_scale":
        assert chosen == [4, 4, 13, 13]


def test_a_share_of_the_parameters_is_met() -> None:
    fields = {"d_model": 48, "encoder_ffn_dim": 130, "decoder_ffn_dim": 96}
    source = source_of(MT, **fields)
    model = MT.ours.from_dense(source, rule=RankRule(layer_ratio=0.5))

    def matrices(model: PreTrainedModel) -> int:
        layers = [*model.model.encoder.layers, *model.model.decoder.layers]
        # The biases of queries, keys and values are as wide as the heads.
        found = [(name, p) for layer in layers for name, p in layer.named_parameters()]
        return sum(
            p.numel() for name, p in found if p.ndim > 1 or name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))
        )

    assert 0.98 * 0.5 <= matrices(model) / matrices(source) <= 0.5
    model = MT.ours.from_dense(source, rule=RankRule(ratio=0.5))
    before, after = (sum(p.numel() for p in each.parameters()) for each in (source, model))
    assert 0.98 * 0.5 <= after / before <= 0.5


def test_a_model_is_factorized_in_place_and_generates() -> None:
    model = source_of(PRE_NORM)
    expected = copy.deepcopy(model).generate(**source_batch(), max_new_tokens=5, do_sample=False)
    model.factorize_(**FULL)
    assert len(find_products(model, ["embedding", "linear"])) == 11
    assert torch.equal(model.generate(**source_batch(), max_new_tokens=5, do_sample=False), expected)


def source_batch() -> dict[str, Tensor]:
    return {name: value for name, value in MT.batch().items() if name != "labels"}


def test_the_source_is_left_as_it_is() -> None:
    source = source_of(MT).train()
    before = copy.deepcopy(source.state_dict())
    model = MT.ours.from_dense(source, **LOW, calibration=MT.batch())
    assert_close(dict(source.state_dict()), dict(before), **EXACT)
    ours, theirs = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, source))
    assert not ours & theirs
    assert model.training
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith("embed_positions.weight"))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (BACKBONE.build_stock, TypeError, "is made from a MarianMTModel, got a MarianModel"),
        (PRE_NORM.build_stock, TypeError, "is made from a MarianMTModel, got a PegasusForConditionalGeneration"),
        (lambda: MT.build(LOW), ValueError, "is factorized already, with qk_rank, ov_rank, ffn_rank, embedding_rank"),
        (
            lambda: MT.build_stock(d_model=24, decoder_attention_heads=4),
            ValueError,
            "encoder_attention_heads and decoder_attention_heads must be the same, got 3 and 4",
        ),
    ],
    ids=["backbone", "pegasus", "factorized", "heads"],
)
def test_what_it_is_not_made_from(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MT.ours.from_dense(build(), qk_rank=2)


# And back


@each_head
@pytest.mark.parametrize("ranks", [LOW, FULL, {"ov_rank": 3}, {}], ids=["low", "full", "only-ov", "none"])
def test_the_merged_model_is_stock_and_computes_the_same(head: Head, ranks: dict[str, int]) -> None:
    model = random_vectors_(head.build(ranks))
    before = copy.deepcopy(dict(model.state_dict()))
    merged = model.merge()
    assert type(merged) is head.stock
    assert merged.config.model_type == ("marian" if head in POST_NORM.values() else "pegasus")
    assert not set(merged.config.to_dict()) & {*LOW, "factor_init", "normalize_before"}
    assert_close(run(merged, head.batch()), run(model, head.batch()), **CLOSE)
    assert_close(dict(model.state_dict()), before, **EXACT)


@pytest.mark.parametrize("head", [MT, SEPARATE, UNTIED, PRE_NORM], ids=["mt", "separate", "untied", "pre-norm"])
def test_the_merged_model_generates_the_same_and_keeps_ties(head: Head) -> None:
    model = random_vectors_(head.build(LOW)).train()
    model.generation_config.max_new_tokens = 6
    model.final_logits_bias.normal_()
    merged = model.merge()
    assert merged.training
    options = {"num_beams": 2, "do_sample": False}
    model.eval()
    merged.eval()
    assert torch.equal(merged.generate(**source_batch(), **options), model.generate(**source_batch(), **options))
    assert (merged.lm_head.weight is merged.model.decoder.embed_tokens.weight) == (head is not UNTIED)


LOAD_WITHOUT_US = """
import os, sys, torch, transformers
sys.modules["hf_fnl"] = None  # an import of it fails
for case in sorted(os.listdir(sys.argv[1])):
    folder = f"{sys.argv[1]}/{case}"
    batch, expected = torch.load(f"{folder}/io.pt", weights_only=True)
    (name,) = transformers.AutoConfig.from_pretrained(folder).architectures
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = model(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    print(name)
"""


def test_a_merged_checkpoint_loads_without_this_package(tmp_path: Path) -> None:
    heads = {"a": MT, "b": PRE_NORM, "c": SEPARATE, "d": DECODER}
    for name, head in heads.items():
        model = random_vectors_(head.build(LOW))
        model.merge().save_pretrained(tmp_path / name)
        torch.save((head.batch(), run(model, head.batch())["logits"]), tmp_path / name / "io.pt")
    command = [sys.executable, "-c", LOAD_WITHOUT_US, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [head.stock.__name__ for head in heads.values()]
