"""A trained stock Marian, truncated, and a factorized one, multiplied out: equal at full rank, best below it."""

import copy
from typing import Any

import pytest
import torch
from family import Head, random_vectors_, run
from marian_cases import FULL, LOW, MT, PRE_NORM, SEPARATE, UNTIED
from torch import Tensor
from transformers import PreTrainedModel

from hf_fnl import RankRule, find_products


def source_of(head: Head, **fields: Any) -> PreTrainedModel:
    return random_vectors_(head.build_source(**fields))


def lost(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.detach().double() - theirs.detach().double()).square().sum((-2, -1))


def test_data_lower_the_error_of_what_comes_out() -> None:
    head = PRE_NORM
    source, batch = source_of(head), head.batch()
    ranks = {"qk_rank": 4, "ov_rank": 4, "ffn_rank": 12}
    expected = run(source, batch)["logits"]
    plain, calibrated = (
        lost(run(head.ours.from_dense(source, **ranks, calibration=data), batch)["logits"], expected).sum()
        for data in (None, batch)
    )
    assert calibrated < plain


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


# And back


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
