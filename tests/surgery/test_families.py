"""One table of families: cut with data, layers and heads at once, saved, read, generating, and dense again.

What stays dense is named. Of mixtures of experts, the layers of experts are cut where they are linear layers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from stock_cases import FAMILIES, batch, build, logits, merged
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl import FactorizationConfig, factorize_, load, merge_, to_linear_
from hf_fnl.layers import FactorizedLinear, HeadProjection, LinearPair

each_family = pytest.mark.parametrize("name", FAMILIES)


def cut(name: str, rank_scale: float) -> tuple[PreTrainedModel, Any]:
    model = build(name)
    config = FactorizationConfig(kinds=(*FAMILIES[name].kinds, "linear"), rank_scale=rank_scale)
    return model, factorize_(model, config, calibration=[batch(model, 40)])


@each_family
def test_at_full_rank_data_change_nothing_and_what_stays_dense_is_named(name: str) -> None:
    family, expected = FAMILIES[name], logits(build(name))
    model, done = cut(name, 1.0)
    assert {replacement.kind for replacement in done.replacements} == {*family.kinds, "linear"}
    assert any(name.endswith(family.values) for name in done.layers)
    assert any(name.endswith(family.layer) for name in done.layers)
    tables = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    assert {name for name in done.skipped if not name.endswith(family.skipped)} <= tables
    assert all(any(name.endswith(end) for name in done.skipped) for end in family.skipped)
    assert_close(logits(model), expected, rtol=1e-2, atol=1e-2 * expected.std().item())


@each_family
def test_cut_it_is_saved_read_generates_and_is_made_dense_again(name: str, tmp_path: Path) -> None:
    family, dense = FAMILIES[name], build(name)
    model, done = cut(name, 0.4)
    values, layer = (
        next(module for name, module in model.named_modules() if name.endswith(end))
        for end in (family.values, family.layer)
    )
    assert isinstance(values, HeadProjection)
    assert values.heads[-1][1] == round(0.4 * values.dense_width)
    assert isinstance(layer, FactorizedLinear)
    assert model.num_parameters() == dense.num_parameters() - done.parameters_before + done.parameters_after
    expected = logits(model)
    model.save_pretrained(tmp_path / "cut")
    loaded = load(tmp_path / "cut")
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    if model.can_generate():
        found = words(loaded)
        assert torch.equal(found, words(loaded, use_cache=False))
        assert torch.equal(found, words(merged(loaded)))
    to_linear_(loaded)
    assert any(isinstance(module, LinearPair) for module in loaded.modules())
    assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    merge_(loaded)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    loaded.save_pretrained(tmp_path / "plain")
    assert "hf_fnl" not in (tmp_path / "plain" / "config.json").read_text()


def words(model: PreTrainedModel, **options: Any) -> Tensor:
    ids = batch(model)["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **options)
