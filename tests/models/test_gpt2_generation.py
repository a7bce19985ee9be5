"""Factorized GPT-2 generates the same words with every cache, with and without padding."""

from typing import Any

import pytest
import torch
from family import Ranks
from gpt2_cases import CROSS_LM, FULL, FULL_QKV, LM, LOW, LOW_QKV, SIZES
from torch import Tensor

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
    "sampling": {"do_sample": True, "top_k": 9, "temperature": 1.3},
}
CACHES = [
    pytest.param({"cache_implementation": "static"}, id="static"),
    pytest.param({"use_cache": False}, id="no-cache"),
]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
each_form = pytest.mark.parametrize("ranks", [LOW, LOW_QKV], ids=["heads", "qkv"])


def prompt(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: torch.nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return model.generate(**inputs, **{"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options})


@each_form
@each_strategy
@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_gives_the_same_words(ranks: Ranks, strategy: dict[str, Any], cache: dict[str, Any]) -> None:
    model = LM.build(ranks)
    expected = generate(model, prompt(), **strategy, cache_implementation="dynamic")
    assert expected.shape[1] == 5 + 12
    assert torch.equal(generate(model, prompt(), **strategy, **cache), expected)


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_a_cache_in_the_memory_of_the_host_gives_the_same_words(cache: str) -> None:
    if not torch.accelerator.is_available():
        pytest.skip("a cache is offloaded from an accelerator")
    for ranks in (LOW, LOW_QKV):
        model = LM.build(ranks).to(torch.accelerator.current_accelerator())
        expected = generate(model, prompt())
        assert torch.equal(generate(model, prompt(), cache_implementation=cache), expected)


@each_strategy
@pytest.mark.parametrize(("ranks", "attention"), [(FULL, "eager"), (FULL_QKV, "sdpa")], ids=["heads", "qkv"])
def test_full_rank_generates_as_the_stock_model(ranks: Ranks, strategy: dict[str, Any], attention: str) -> None:
    ours, stock = (build(attention=attention) for build in (lambda **o: LM.build(ranks, **o), LM.build_stock))
    assert torch.equal(generate(ours, prompt(), **strategy), generate(stock, prompt(), **strategy))


@each_form
@each_strategy
def test_the_merged_model_generates_the_same(ranks: Ranks, strategy: dict[str, Any]) -> None:
    model = LM.build(ranks)
    assert torch.equal(generate(model.merge(), prompt(), **strategy), generate(model, prompt(), **strategy))


@each_form
@each_strategy
def test_words_depend_on_an_encoder_that_every_cache_remembers(ranks: Ranks, strategy: dict[str, Any]) -> None:
    model, batch = CROSS_LM.build(ranks), CROSS_LM.batch()
    inputs = {**prompt(4, 3), **{name: value for name, value in batch.items() if name.startswith("encoder")}}
    expected = generate(model, inputs, **strategy)
    assert torch.equal(generate(model, inputs, **strategy, use_cache=False), expected)
    assert not torch.equal(generate(model, prompt(4, 3), **strategy), expected)
    full, stock = CROSS_LM.build(FULL), CROSS_LM.build_stock()
    assert torch.equal(generate(full, inputs, **strategy), generate(stock, inputs, **strategy))


def test_a_model_in_training_mode_generates_with_its_logits() -> None:
    model = LM.build(LOW, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    expected = generate(model, prompt())
    assert torch.equal(generate(model.train(), prompt()), expected)
