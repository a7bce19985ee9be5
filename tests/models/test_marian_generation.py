"""What a factorized Marian generates: the stock model's tokens, with any cache, search and padding."""

from typing import Any

import pytest
import torch
from family import Head
from marian_cases import DECODER, FULL, LOW, MT, PRE_NORM, SEPARATE, source
from torch import Tensor

HEADS = {"shared": MT, "separate": SEPARATE, "pre-norm": PRE_NORM}
SEARCHES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
each_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)


def generate(model: torch.nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(4)  # of sampling
    return model.generate(**batch, max_new_tokens=8, **options)


def padded(side: str) -> dict[str, Tensor]:
    """Sentences of which one is padded on the given side."""
    torch.manual_seed(1)
    batch = source()
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    return batch


@each_head
@pytest.mark.parametrize(("search", "side"), [("beams", "left"), ("sampling", "right")])
def test_full_rank_generates_the_tokens_of_the_stock_model(head: Head, search: str, side: str) -> None:
    ours, stock = (
        generate(model, padded(side), **SEARCHES[search]) for model in (head.build(FULL), head.build_stock())
    )
    assert torch.equal(ours, stock)
    assert ours.shape[1] > 3


@each_head
@each_search
def test_every_cache_gives_the_same_tokens(head: Head, search: dict[str, Any]) -> None:
    model = head.build({"qk_rank": 5, "ov_rank": 2}, attention="eager" if head is SEPARATE else "sdpa")
    expected, *others = (generate(model, padded("right"), **search, **cache) for cache in CACHES.values())
    for tokens in others:
        assert torch.equal(tokens, expected)


def test_generated_scores_are_those_of_one_forward_pass() -> None:
    model, batch = MT.build(LOW), padded("right")
    found = model.generate(**batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(**batch, decoder_input_ids=found.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(found.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_the_decoder_alone_generates_with_fewer_layers_in_the_encoder() -> None:
    model = DECODER.build(LOW, encoder_layers=1)
    prompt = {name: value[:, :3] for name, value in padded("left").items()}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    tokens = generate(model, prompt, do_sample=False)
    assert torch.equal(tokens, generate(model, prompt, do_sample=False, use_cache=False))
    assert torch.equal(tokens, generate(model.merge(), prompt, do_sample=False))
