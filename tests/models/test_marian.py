"""Factorized Marian: ranks of encoder and decoder, ties, labels, and the parts of its products."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    Head,
    factorized_layers,
    run,
)
from marian_cases import DECODER, HEADS, LOW, MT, PRE_NORM, SEPARATE, SIZES, UNTIED
from safetensors import safe_open
from torch.testing import assert_close
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hf_fnl import find_products

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # layers of float32, whose weights went through a decomposition
EXACT = {"rtol": 0, "atol": 0}
LM_HEADS = {name: head for name, head in HEADS.items() if head.name != "Model"}
each_lm_head = pytest.mark.parametrize("head", LM_HEADS.values(), ids=LM_HEADS)


def test_ranks_by_layer_go_through_the_encoder_and_then_the_decoder() -> None:
    model = MT.build({"qk_rank": [1, None, 3, 4, 5], "ffn_rank": [None, 2, 3, None, 5]})
    widths = {p.name: p.factors(model)[0].shape[-1] for p in find_products(model, ["qk"])}
    assert [widths[f"model.encoder.layers.{n}.self_attn.qk"] for n in range(2)] == [1, 7]
    for attention in ("self_attn", "encoder_attn"):
        assert [widths[f"model.decoder.layers.{n}.{attention}.qk"] for n in range(3)] == [3, 4, 5]
    assert {name.partition(".")[2]: layer.rank for name, layer in factorized_layers(model).items()} == {
        f"{name}.{ffn}": rank
        for name, rank in {"encoder.layers.1": 2, "decoder.layers.0": 3, "decoder.layers.2": 5}.items()
        for ffn in ("fc1", "fc2")
    }


@pytest.mark.parametrize(
    ("head", "table"), [(MT, "embedding"), (SEPARATE, "embedding:encoder")], ids=["shared", "separate"]
)
def test_every_selector_can_have_an_initialization_of_its_own(head: Head, table: str) -> None:
    ones = ["qk:encoder", "ov:cross", "linear:decoder", table]
    model = head.build(LOW, factor_init=dict.fromkeys(ones, "spectral_ones"), pad_token_id=None)
    chosen = find_products(model, ones)
    for product in find_products(model):
        factor = product.factors(model)[0].detach()
        gram = factor.mT @ factor
        if product in chosen:
            assert_close(gram, torch.eye(gram.shape[-1]).expand_as(gram), **CLOSE)
        else:
            assert factor.std().item() == pytest.approx(SIZES["init_std"], rel=0.3)


# Names and ties


@each_lm_head
def test_what_the_stock_model_ties_is_tied_factor_by_factor_and_so_it_is_loaded(head: Head, tmp_path: Path) -> None:
    ours, stock = head.build(LOW), head.build_stock()
    ours.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    names = [name for name in factorized_layers(ours) if name.endswith(("shared", "embed_tokens", "lm_head"))]
    assert len(names) >= 2
    for first in names:
        for second in names:
            tied = stock.get_submodule(first).weight is stock.get_submodule(second).weight
            for factor in ("U", "V"):
                for model in (ours, loaded):
                    a, b = (model.get_parameter(f"{name}.{factor}") for name in (first, second))
                    assert (a is b) == tied, (first, second)
    expected = {  # by which savers and loaders know what to leave out
        name.replace("weight", factor): source.replace("weight", factor)
        for name, source in stock.all_tied_weights_keys.items()
        for factor in ("U", "V")
    }
    assert expected.items() <= ours.all_tied_weights_keys.items()


# Losses and inputs


def test_labels_say_what_the_decoder_is_given() -> None:
    model, batch = MT.build(LOW), MT.batch()
    labels = batch.pop("labels")
    given = model.prepare_decoder_input_ids_from_labels(labels)
    assert given[:, 0].tolist() == [SIZES["decoder_start_token_id"]] * len(labels)
    expected = run(model, {**batch, "decoder_input_ids": given})["logits"]
    assert_close(run(model, {**batch, "labels": labels})["logits"], expected, **EXACT)
    assert_close(run(model, {**batch, "labels": labels, "decoder_input_ids": given})["logits"], expected, **EXACT)


# Products


@pytest.mark.parametrize("head", [MT, DECODER], ids=["translation", "decoder"])
def test_products_have_their_parts(head: Head) -> None:
    model = head.build({"qk_rank": 3, "ov_rank": 2})
    parts = ["cross", None] if head.name == "ForCausalLM" else ["encoder", "decoder", "cross"]
    for kind in ("qk", "ov"):
        assert {p.part for p in find_products(model, [kind])} == set(parts)


def test_an_untied_model_has_a_product_for_each_table_that_is_used() -> None:
    found = {p.name: p.kind for p in find_products(UNTIED.build({"embedding_rank": 5}), ["embedding", "linear"])}
    assert found == {
        "model.encoder.embed_tokens": "embedding",
        "model.decoder.embed_tokens": "embedding",
        "lm_head": "linear",
    }


# Checkpoints


def trained(head: Head, ranks: dict[str, Any], dtype: torch.dtype = torch.float32, **fields: Any):
    """A model none of whose trainable parameters is what it starts as."""
    model = head.build(ranks, **fields).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def positions(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model.base_model.get_submodule(f"{part}.embed_positions").weight for part in ("encoder", "decoder")]


@pytest.mark.parametrize("head", [MT, PRE_NORM], ids=["post-norm", "pre-norm"])
def test_positions_are_computed_and_neither_saved_nor_trained(head: Head, tmp_path: Path) -> None:
    model = trained(head, LOW)
    expected = MarianSinusoidalPositionalEmbedding(40, SIZES["d_model"]).create_weight()
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    for weight in (*positions(model), *positions(loaded)):
        assert torch.equal(weight, expected)
        assert not weight.requires_grad
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        kept = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(weights.keys()) == {*kept, "final_logits_bias"}


def test_the_decoder_of_a_translation_checkpoint(tmp_path: Path) -> None:
    model = trained(MT, {"qk_rank": [1, 2, 3, 4, 5], "ov_rank": 2}, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    decoder = DECODER.auto_class.from_pretrained(tmp_path)
    assert decoder.config.qk_rank == [3, 4, 5]
    assert_close(dict(decoder.model.decoder.state_dict()), dict(model.model.decoder.state_dict()), **EXACT)
    assert torch.equal(decoder.lm_head.weight, model.lm_head.weight)
