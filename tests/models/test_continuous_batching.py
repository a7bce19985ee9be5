"""Continuous batching with heads that were cut, beside generating prompt by prompt."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from hf_fnl import FactorizedGPT2Config, FactorizedGPT2LMHeadModel

SIZES = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "pad_token_id": 0}
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11]]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def model(**ranks):
    torch.manual_seed(0)
    config = FactorizedGPT2Config(**SIZES, initializer_range=0.3, **ranks)
    return FactorizedGPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "ranks",
    [{"qk_rank": 5, "ov_rank": 5}, {"qk_rank": 5, "ov_rank": 3}, {"ov_rank": 5}, {"ffn_rank": 7, "qkv_rank": 7}],
    ids=["heads", "unequal", "one of both", "layers"],
)
def test_batches_get_the_words_of_single_prompts(ranks):
    ours = model(**ranks)
    alone = [ours.generate(torch.tensor([prompt]), **OPTIONS)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    pages = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else as many as the memory holds
    outputs = ours.generate_batch(
        PROMPTS, generation_config=GenerationConfig(**OPTIONS), continuous_batching_config=pages
    )
    assert {tuple(each.prompt_ids): each.generated_tokens for each in outputs.values()} == {
        tuple(prompt): words for prompt, words in zip(PROMPTS, alone, strict=True)
    }


def test_layers_of_several_widths_are_refused_before_anything_runs():
    ranks = {"qk_rank": [5, 3], "ov_rank": [5, 3]}
    with pytest.raises(ValueError, match=r"keys and values of one width.*generate\(\), or merge\(\)"):
        model(**ranks).generate_batch(PROMPTS, generation_config=GenerationConfig(**OPTIONS))


def test_a_configuration_says_how_wide_its_heads_are():
    cases = ({}, {"qk_rank": 5, "ov_rank": 5}, {"qk_rank": 8}, {"qk_rank": 3, "ov_rank": 5}, {"ov_rank": 5})
    assert [model(**ranks).config.head_dim for ranks in cases] == [8, 5, 8, 5, 8]
    assert [model(**ranks).transformer.h[0].attn.head_dim for ranks in cases] == [8, 5, 8, 5, 8]
