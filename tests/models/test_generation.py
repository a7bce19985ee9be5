"""Every family generates what its merged model and, at full rank, the stock model do, with any search and cache."""

from typing import Any

import bert_cases
import gpt2_cases
import llama_cases
import marian_cases
import pytest
import torch
from family import Head, Ranks
from torch import Tensor
from transformers import PreTrainedModel

CASES: dict[str, tuple[Head, str, dict[str, Any]]] = {
    "bert": (bert_cases.DECODER, "all", {}),
    "gpt2": (gpt2_cases.LM, "all", {}),
    "gpt2-qkv": (gpt2_cases.LM, "qkv", {"attention": "eager"}),
    "gpt2-cross": (gpt2_cases.CROSS_LM, "all", {}),
    "llama": (llama_cases.HEADS["lm"], "all", {}),
    "marian": (marian_cases.MT, "all", {}),
    "marian-separate": (marian_cases.SEPARATE, "all", {"attention": "eager"}),
    "marian-pre-norm": (marian_cases.PRE_NORM, "all", {}),
    "marian-decoder": (marian_cases.DECODER, "all", {}),
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "sampling": {"do_sample": True, "top_k": 9, "temperature": 1.3},
}
CACHES: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}
each_case = pytest.mark.parametrize(("head", "ranks", "fields"), CASES.values(), ids=CASES)
each_search = pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)


def prompt(head: Head) -> dict[str, Tensor]:
    """Sentences to be translated, of which one is padded, or words to go on from."""
    batch = {name: x for name, x in head.batch().items() if name not in ("labels", "token_type_ids")}
    if head.name == "MTModel":
        return batch
    ids = batch.pop("input_ids")[:, :4]
    states = {} if head.family.name == "Marian" else batch  # of an encoder, which its generation passes on wrongly
    return {**states, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def words(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)  # of sampling
    inputs = {name: x.to(model.device) for name, x in inputs.items()}
    return model.generate(**inputs, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **options)


@each_case
@each_search
def test_every_cache_and_the_merged_model_give_the_same_words(
    head: Head, ranks: str, fields: dict[str, Any], search: dict[str, Any]
) -> None:
    model, inputs = head.build(head.family.low[ranks], **fields), prompt(head)
    expected = words(model, inputs, **search)
    assert expected.shape[1] >= 8
    for cache in CACHES.values():
        assert torch.equal(words(model, inputs, **search, **cache), expected), cache
    assert torch.equal(words(model.merge(), inputs, **search), expected)
    if "encoder_hidden_states" in inputs:
        others = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(0)}
        assert not torch.equal(words(model, others, **search), expected)


@each_case
@each_search
def test_full_rank_gives_the_words_of_the_stock_model(
    head: Head, ranks: str, fields: dict[str, Any], search: dict[str, Any]
) -> None:
    ours, stock = head.build(head.family.full[ranks], **fields), head.build_stock(**fields)
    assert torch.equal(words(ours, prompt(head), **search), words(stock, prompt(head), **search))


def test_a_model_in_training_mode_generates_with_its_logits() -> None:
    head = gpt2_cases.LM
    model = head.build(gpt2_cases.LOW, **gpt2_cases.NO_DROPOUT)
    expected = words(model, prompt(head))
    assert torch.equal(words(model.train(), prompt(head)), expected)


def test_a_decoder_alone_generates_with_fewer_layers_in_the_encoder() -> None:
    head = marian_cases.DECODER
    model = head.build(marian_cases.LOW, encoder_layers=1)
    assert torch.equal(words(model, prompt(head)), words(model.merge(), prompt(head)))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="a cache is offloaded from an accelerator")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("ranks", [gpt2_cases.LOW, gpt2_cases.LOW_QKV], ids=["heads", "qkv"])
def test_a_cache_in_the_memory_of_the_host_gives_the_same_words(cache: str, ranks: Ranks) -> None:
    model = gpt2_cases.LM.build(ranks).to(torch.accelerator.current_accelerator())
    inputs = prompt(gpt2_cases.LM)
    assert torch.equal(words(model, inputs, cache_implementation=cache), words(model, inputs))
