"""Narrow values are cached as narrow, in every class of cache: shapes, bytes, and the words of the merged model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_cases import GPT2, GROUPS, HEADS, VOCAB, WIDTH, build, merged
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    Cache,
    DynamicCache,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import QuantizedLayer

from hf_fnl import (
    FactorizationConfig,
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    factorize_,
    find_products,
    load,
    merge_,
    to_linear_,
)

RANK = 2
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def cut(name: str, rank: int = RANK) -> PreTrainedModel:
    model = build(name)
    factorize_(model, FactorizationConfig(kinds=("ov",), rank=rank))
    return model


def prompt() -> Tensor:
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def generate(model: PreTrainedModel, **options: Any) -> Any:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    return model.generate(prompt(), attention_mask=mask, return_dict_in_generate=True, **OPTIONS, **options)


def widths(cache: Any) -> set[tuple[int, int]]:
    """Width of keys and of values in the layers of a cache."""
    return {(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers}


def size(cache: Any) -> int:
    """Bytes of the values in a cache."""
    return sum(layer.values.numel() * layer.values.element_size() for layer in cache.layers)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "phi3", "gpt2", "opt", "t5"])
def test_generating_holds_narrow_values_and_gives_the_words_of_the_merged_model(name: str, cache: str | None) -> None:
    model = cut(name)
    found, expected = (generate(each, cache_implementation=cache) for each in (model, merged(model)))
    assert torch.equal(found.sequences, expected.sequences)
    caches = [getattr(each.past_key_values, "self_attention_cache", each.past_key_values) for each in (found, expected)]
    assert [widths(each) for each in caches] == [{(WIDTH, RANK)}, {(WIDTH, WIDTH)}]
    assert [layer.values.shape[:-1] for layer in caches[0].layers] == [
        each.keys.shape[:-1] for each in caches[0].layers
    ]
    assert caches[0].layers[0].values.shape[1] == getattr(model.config, "num_key_value_heads", HEADS)
    assert size(caches[0]) * WIDTH == size(caches[1]) * RANK


def test_beams_and_a_prompt_in_chunks_and_an_assistant() -> None:
    model = cut("llama")
    plain, assistant = merged(model), cut("llama", rank=1)
    for options in (
        {"num_beams": 3},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 3, "cache_implementation": "static"},
    ):
        assert torch.equal(generate(model, **options).sequences, generate(plain, **options).sequences), options
    one = {"input_ids": prompt()[:1], "attention_mask": torch.ones(1, 7, dtype=torch.long), **OPTIONS}
    expected = plain.generate(**one)
    assert torch.equal(model.generate(**one, assistant_model=assistant), expected)


def test_the_quantized_cache_is_as_much_smaller() -> None:
    model = cut("llama")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    try:
        found, expected = generate(model, **options), generate(merged(model), **options)
    except ValueError as error:
        pytest.skip(f"this Transformers has no such cache: {error}")
    assert torch.equal(found.sequences, expected.sequences)
    values, wide = (each.past_key_values.layers[0]._quantized_values[0] for each in (found, expected))
    assert values.shape == (2, GROUPS, 12, RANK)
    assert values.nbytes * WIDTH == wide.nbytes * RANK


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_values_are_narrow_beside_two_linear_layers(name: str, tmp_path: Path) -> None:
    model = cut(name)
    factorize_(model, FactorizationConfig(rank=RANK))
    before = [product.name for product in find_products(model, ["ov"])]
    to_linear_(model)
    assert [product.name for product in find_products(model, ["ov"])] == before
    model.save_pretrained(tmp_path)
    cache = generate(load(tmp_path)).past_key_values
    assert widths(getattr(cache, "self_attention_cache", cache)) == {(WIDTH, RANK)}


def test_values_of_images_are_cached_as_wide_as_their_attention_reads_them() -> None:
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8, "max_num_tiles": 1}
    vision |= {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0], "vision_output_dim": 32}
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=3)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    factorize_(model, FactorizationConfig(kinds=("ov",), rank=3, include=("*language_model*",)))
    inputs: dict[str, Any] = {
        "input_ids": prompt().clamp(min=4),
        "pixel_values": torch.randn(2, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 7, 1, 1, dtype=torch.long),
    }
    options = {**OPTIONS, "return_dict_in_generate": True}
    found, expected = model.generate(**inputs, **options), merged(model).generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert [layer.values.shape[-1] for layer in found.past_key_values.layers] == [3, 8]


class Grouped(QuantizedLayer):
    """Layer of a cache that holds whole groups of entries, as the backends of Transformers do."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        return tensor.reshape(len(tensor), -1, self.q_group_size), tensor.shape

    def _dequantize(self, q_tensor: Any) -> Tensor:
        return q_tensor[0].reshape(q_tensor[1])


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # since Transformers 5.24
@pytest.mark.parametrize(("group", "kept"), [(2, 4), (4, 4), (WIDTH, WIDTH)])
def test_values_fill_the_groups_of_a_quantized_cache(group: int, kept: int) -> None:
    model = cut("llama", rank=3)
    layers = [Grouped(q_group_size=group, residual_length=3) for _ in range(model.config.num_hidden_layers)]
    found = generate(model, past_key_values=Cache(layers=layers))
    assert torch.equal(found.sequences, generate(merged(model)).sequences)
    assert layers[0]._quantized_values[1][-1] == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformers offloads from a GPU only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache(cache: str) -> None:
    model = cut("llama").cuda()
    ids = prompt().cuda()
    options = {**OPTIONS, "cache_implementation": cache, "return_dict_in_generate": True, "disable_compile": True}
    found, expected = model.generate(ids, **options), merged(model).generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert widths(found.past_key_values) == {(WIDTH, RANK)}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # since Transformers 5.24
def test_a_cache_that_holds_wide_values_keeps_them() -> None:
    model, ids = cut("llama"), prompt()
    early = StaticCache(config=model.config, max_cache_len=12)
    early.early_initialization(2, GROUPS, WIDTH, torch.float32, torch.device("cpu"))
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        merged(model)(ids[:, :4], past_key_values=filled)
        for cache, rest in ((early, ids), (filled, ids[:, 4:])):
            logits = model(rest, past_key_values=cache).logits
            assert_close(logits, expected[:, -logits.shape[1] :], rtol=1e-4, atol=1e-4)
            assert widths(cache) == {(WIDTH, WIDTH)}


def test_saving_copying_and_merging(tmp_path) -> None:
    model = cut("llama")
    model.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (load(tmp_path), copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert widths(generate(each).past_key_values) == {(WIDTH, RANK)}
        merge_(each)
        assert widths(generate(each).past_key_values) == {(WIDTH, WIDTH)}
        assert not any(module._forward_pre_hooks for module in each.modules())


def test_heads_of_two_ranks_in_a_model_of_ours() -> None:
    torch.manual_seed(0)
    config = FactorizedGPT2Config(**GPT2, qk_rank=4, ov_rank=3, initializer_range=0.3)
    model = FactorizedGPT2LMHeadModel(config).eval()
    found, expected = generate(model), generate(model.merge())
    assert widths(found.past_key_values) == {(4, 3)}
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks by a name that Transformers gives up
@pytest.mark.parametrize(("target", "width"), [("v_proj", WIDTH), ("o_proj", RANK)])
def test_an_adapter_around_values_widens_them(target: str, width: int) -> None:
    """LoRA's update of the values is as wide as the attention's heads, and its output matrix reads as much."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    adapted = peft.get_peft_model(cut("llama"), config).eval()
    found = generate(adapted)
    assert widths(found.past_key_values) == {(WIDTH, width)}
    assert torch.equal(found.sequences, generate(adapted, use_cache=False).sequences)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # since Transformers 5.24
def test_a_compiled_step_is_one_graph() -> None:
    model, cache = cut("llama"), StaticCache(config=build("llama").config, max_cache_len=9)
    ids = prompt()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        model(ids[:, :-1], past_key_values=cache)
        assert_close(step(ids[:, -1:], past_key_values=cache).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert widths(cache) == {(WIDTH, RANK)}
