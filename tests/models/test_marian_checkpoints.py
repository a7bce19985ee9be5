"""A checkpoint of factorized Marian comes back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import Head
from marian_cases import DECODER, LOW, MT, PRE_NORM, SIZES
from safetensors import safe_open
from torch.testing import assert_close
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

EXACT = {"rtol": 0, "atol": 0}
each_norm = pytest.mark.parametrize("head", [MT, PRE_NORM], ids=["post-norm", "pre-norm"])


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


@each_norm
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
