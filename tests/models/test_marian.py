"""Factorized Marian computes what the stock model computes: every head, layout and kernel."""

import math

import pytest
import torch
from family import (
    Head,
    add,
    factorized_layers,
    gradients,
    loss_and_gradients,
    random_vectors_,
    run,
)
from marian_cases import BACKBONE, DECODER, HEADS, LOW, MT, NO_DROPOUT, SEPARATE, SIZES, UNTIED
from torch import Tensor
from torch.testing import assert_close

from hf_fnl import FrobeniusDecay, find_products, parameter_groups

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # layers of float32, whose weights went through a decomposition
EXACT = {"rtol": 0, "atol": 0}
each_kernel = pytest.mark.parametrize("attention", ["eager", "sdpa"])
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


def reference_attention(block: torch.nn.Module, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """An attention of Marian, head by head, as the paper writes it."""
    heads, result = block.num_heads, block.out_proj.bias
    for h in range(heads):
        W_q, W_k, W_v = (p.weight.chunk(heads)[h] for p in (block.q_proj, block.k_proj, block.v_proj))
        b_q, b_k, b_v = (p.bias.chunk(heads)[h] for p in (block.q_proj, block.k_proj, block.v_proj))
        scores = (x @ W_q.mT + b_q) @ (memory @ W_k.mT + b_k).mT / math.sqrt(x.shape[-1] // heads)
        weights = scores.masked_fill(mask == 0, -math.inf).softmax(-1)
        result = result + weights @ (memory @ W_v.mT + b_v) @ block.out_proj.weight.chunk(heads, dim=1)[h].mT
    return result


@each_kernel
@pytest.mark.parametrize("ranks", [{"qk_rank": 5, "ov_rank": 2}, {"ov_rank": 3}], ids=str)
def test_heads_of_unequal_ranks_against_a_reference(ranks: dict[str, int], attention: str) -> None:
    model, batch = random_vectors_(BACKBONE.build(ranks, attention=attention)), BACKBONE.batch()
    found = run(model, batch, output_hidden_states=True)
    x, memory, mask = found["decoder_hidden_states"][0], found["encoder_last_hidden_state"], batch["attention_mask"]
    layer = model.decoder.layers[0]
    with torch.no_grad():
        causal = torch.ones(x.shape[1], x.shape[1]).tril()
        x = layer.self_attn_layer_norm(x + reference_attention(layer.self_attn, x, x, causal))
        x = layer.encoder_attn_layer_norm(x + reference_attention(layer.encoder_attn, x, memory, mask[:, None, :]))
        x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
    assert_close(found["decoder_hidden_states"][1], x, **CLOSE)


# Names and ties


@each_lm_head
def test_what_the_stock_model_ties_is_tied_factor_by_factor(head: Head) -> None:
    ours, stock = head.build(LOW), head.build_stock()
    names = [name for name in factorized_layers(ours) if name.endswith(("shared", "embed_tokens", "lm_head"))]
    assert len(names) >= 2
    for first in names:
        for second in names:
            tied = stock.get_submodule(first).weight is stock.get_submodule(second).weight
            for factor in ("U", "V"):
                a, b = (ours.get_parameter(f"{name}.{factor}") for name in (first, second))
                assert (a is b) == tied, (first, second)
    expected = {  # by which savers and loaders know what to leave out
        name.replace("weight", factor): source.replace("weight", factor)
        for name, source in stock.all_tied_weights_keys.items()
        for factor in ("U", "V")
    }
    assert expected.items() <= ours.all_tied_weights_keys.items()


# Losses and inputs


@each_lm_head
def test_parts_of_a_batch_add_up(head: Head) -> None:
    model, batch = head.build(LOW, **NO_DROPOUT), head.batch()
    whole = loss_and_gradients(model, batch)
    items = (batch["labels"] != -100).sum()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, None))]
    total = add([loss_and_gradients(model, part, num_items_in_batch=items) for part in parts])
    assert_close(total, whole, rtol=1e-4, atol=1e-5)
    assert head.ours.accepts_loss_kwargs


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


def test_decay_of_cross_attentions_is_the_gradient_of_their_norms() -> None:
    model = MT.build(LOW)
    products = find_products(model, ["ov:cross"])
    assert len(products) == SIZES["decoder_layers"]
    squares = [product.matrix(model).square().sum() for product in products]
    expected = gradients(model, sum(squares) / 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups = parameter_groups(model, weight_decay=0.0, products=products, frobenius_decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with FrobeniusDecay(optimizer, products, 0.3, mode="decoupled"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert_close(parameter.data, before[name] - 0.03 * expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert {name for name, g in expected.items() if g.any()} == {n for p in products for n in p.parameter_names}


def test_an_untied_model_has_a_product_for_each_table_that_is_used() -> None:
    found = {p.name: p.kind for p in find_products(UNTIED.build({"embedding_rank": 5}), ["embedding", "linear"])}
    assert found == {
        "model.encoder.embed_tokens": "embedding",
        "model.decoder.embed_tokens": "embedding",
        "lm_head": "linear",
    }
