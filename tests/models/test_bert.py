"""Factorized BERT: heads of unequal ranks, padding, caches; what it shares with the other families is elsewhere."""

import math
import warnings

import pytest
import torch
from bert_cases import (
    BACKBONE,
    CROSS_DECODER,
    DECODER,
    FULL,
    LOW,
    MASKED_LM,
    SIZES,
    tokens,
)
from family import Head, attentions, needs_flex_attention, run
from torch import Tensor, nn
from torch.testing import assert_close

from hf_fnl import find_products

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two layers of float32, whose weights went through a decomposition


@pytest.mark.slow  # compiles a kernel
@needs_flex_attention
def test_flex_attention_equals_sdpa_at_unequal_ranks() -> None:
    fields = {"qk_rank": 4, "ov_rank": 2, "hidden_size": 24}  # its kernel takes no odd widths
    expected = run(BACKBONE.build(fields), tokens_of_seed_one())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.compile and of the block mask, none of them ours
        actual = run(BACKBONE.build(fields, attention="flex_attention"), tokens_of_seed_one())
    assert_close(actual, expected, **CLOSE)


def tokens_of_seed_one() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return tokens()


def test_default_draws_every_factor_as_a_weight() -> None:
    model = MASKED_LM.build(LOW, factor_init="default")
    for product in find_products(model):
        for factor in product.factors(model):
            assert factor.std().item() == pytest.approx(SIZES["initializer_range"], rel=0.25)


def reference_attention(block: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """An attention block of BERT, head by head, as the paper writes it."""
    query, key, value, output = attentions(block)[""].spans
    heads = block.self.num_attention_heads
    scale = 1 / math.sqrt(x.shape[-1] // heads)
    result = output.bias.expand_as(x)
    for h in range(heads):
        W_q, W_k, W_v = (p.weight.chunk(heads)[h] for p in (query, key, value))
        b_q, b_k, b_v = (p.bias.chunk(heads)[h] for p in (query, key, value))
        W_o = output.weight.chunk(heads, dim=1)[h]
        scores = (x @ W_q.mT + b_q) @ (x @ W_k.mT + b_k).mT * scale
        scores = scores.masked_fill(mask[:, None, :] == 0, -math.inf)
        result = result + scores.softmax(-1) @ (x @ W_v.mT + b_v) @ W_o.mT
    return block.output.LayerNorm(x + result)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("ranks", [{"qk_rank": 5, "ov_rank": 2}, {"ov_rank": 3}], ids=str)
def test_heads_of_unequal_ranks_against_a_reference(ranks: dict[str, int], attention: str) -> None:
    model = BACKBONE.build(ranks, attention=attention)
    for projection in attentions(model.encoder.layer[0].attention)[""].spans:
        torch.nn.init.normal_(projection.bias)
    batch = tokens_of_seed_one()
    states = run(model, batch, output_hidden_states=True)["hidden_states"]
    layer = model.encoder.layer[0]
    with torch.no_grad():
        expected = layer.feed_forward_chunk(reference_attention(layer.attention, states[0], batch["attention_mask"]))
    assert_close(states[1], expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # since Transformers 5.24
@pytest.mark.parametrize("head", [DECODER, CROSS_DECODER], ids=["decoder", "cross-decoder"])
def test_a_cache_of_unequal_widths_changes_nothing(head: Head) -> None:
    model, batch = head.build(LOW), head.batch()
    del batch["labels"]
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = run(model, batch, use_cache=False)["logits"]
    memory = {name: value for name, value in batch.items() if name.startswith("encoder")}
    steps, cache = [], None
    with torch.no_grad():
        for stop in range(1, batch["input_ids"].shape[1] + 1):
            now = {name: batch[name][:, stop - 1 : stop] for name in ("input_ids", "token_type_ids")}
            mask = batch["attention_mask"][:, :stop]
            output = model(**now, **memory, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert_close(torch.cat(steps, dim=1), expected, **CLOSE)


def test_generation_equals_the_stock_model_and_needs_no_cache() -> None:
    prompt = {"input_ids": DECODER.batch()["input_ids"][:, :3], "attention_mask": torch.ones(4, 3, dtype=torch.long)}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    full = DECODER.build(FULL).generate(**prompt, **settings)
    assert full.shape == (4, 8)
    assert torch.equal(full, DECODER.build_stock().generate(**prompt, **settings))
    low = DECODER.build(LOW)
    assert torch.equal(low.generate(**prompt, **settings), low.generate(**prompt, **settings, use_cache=False))
