"""What does not fit is refused at once, and the message says what, where, and what to change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import BACKBONE, LOW, MASKED_LM, PRETRAINING, SEQUENCE, SIZES
from family import Head, run, run_double
from torch.testing import assert_close

from hf_fnl import FactorizedBertConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_rank": 0}, r"qk_rank must be at least 1 .*got 0"),
        ({"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8"),
        ({"ffn_rank": 22}, r"ffn_rank must be in \[1, 21\], got 22"),
        ({"vocab_size": 15, "embedding_rank": 16}, r"embedding_rank must be in \[1, 15\], got 16"),
        ({"num_attention_heads": 4}, r"multiple of num_attention_heads, got 21 and 4 heads"),
        ({"factor_init": "random"}, r"one of spectral, spectral_ones, default, he, got 'random'"),
        ({"ffn_rank": 2.5}, r"'ffn_rank' expected int"),
        ({"sparse_prediction": "yes"}, r"'sparse_prediction' expected bool"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        FactorizedBertConfig(**{**SIZES, **fields})


def without_ffn() -> FactorizedBertConfig:
    return FactorizedBertConfig(**SIZES, **{**LOW, "ffn_rank": None})


@pytest.mark.parametrize(
    ("head", "fields", "message"),
    [
        (
            MASKED_LM,
            {"ffn_rank": 7},
            r"layer\.0\.intermediate\.dense\.U has shape \(32, 8\) in the checkpoint and \(32, 7\) in the model",
        ),
        (MASKED_LM, {"qk_rank": 3}, r"self\.key\.bias has shape \(15,\) .* \(9,\) in the model \(and 7 more\)"),
        (MASKED_LM, {"ov_rank": None}, r"output\.dense\.weight has shape \(21, 6\) .* \(21, 21\)"),
        (MASKED_LM, {"embedding_rank": 12}, r"word_embeddings\.U has shape \(53, 13\) .* \(53, 12\)"),
        (MASKED_LM, {"config": without_ffn()}, r"holds .*intermediate\.dense\.V where the model holds .*\.weight"),
        (SEQUENCE, {"config": without_ffn()}, r"holds .*intermediate\.dense\.V where the model holds .*\.weight"),
    ],
    ids=["ffn", "qk", "dense-ov", "embedding", "dense-ffn", "dense-ffn-new-head"],
)
def test_a_checkpoint_of_other_ranks(head: Head, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (BACKBONE if "config" in fields else MASKED_LM).build(LOW).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        head.auto_class.from_pretrained(tmp_path, **fields)
    assert str(tmp_path) in str(error.value)
    assert "ignore_mismatched_sizes" in str(error.value)
    assert head.auto_class.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("ranks", [{"ffn_rank": 8}, {"qk_rank": 5}], ids=str)
def test_a_stock_checkpoint_is_not_cut_silently(ranks: dict[str, int], tmp_path: Path) -> None:
    MASKED_LM.build_stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit FactorizedBertForMaskedLM"):
        MASKED_LM.ours.from_pretrained(tmp_path, config=FactorizedBertConfig(**SIZES, **ranks))


@pytest.mark.parametrize("kept", [0, 100, -1], ids=["empty", "half-a-header", "last-byte"])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    MASKED_LM.build(LOW).save_pretrained(tmp_path, max_shard_size="8KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match="truncated or corrupt") as error:
        MASKED_LM.auto_class.from_pretrained(tmp_path)
    assert str(file) in str(error.value)


def test_a_factorized_embedding_is_not_resized() -> None:
    with pytest.raises(ValueError, match="embedding_rank=None"):
        SEQUENCE.build(LOW).resize_token_embeddings(60)


@pytest.mark.parametrize("size", [60, 50], ids=["more", "fewer"])
def test_a_dense_embedding_is_resized_with_its_decoder(size: int, tmp_path: Path) -> None:
    model = PRETRAINING.build({**LOW, "embedding_rank": None})
    torch.nn.init.normal_(model.cls.predictions.bias)
    before = model.cls.predictions.bias.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    decoder, bias = model.get_output_embeddings(), model.cls.predictions.bias
    assert decoder.weight is model.get_input_embeddings().weight
    assert decoder.weight.shape == (size, SIZES["hidden_size"])
    assert model.config.vocab_size == size
    both = min(size, SIZES["vocab_size"])
    assert torch.equal(bias[:both], before[:both])
    assert not bias[both:].any()
    model.save_pretrained(tmp_path)
    batch = {"input_ids": torch.randint(1, both, (2, 7))}
    assert_close(run_double(PRETRAINING.auto_class.from_pretrained(tmp_path), batch), run_double(model, batch))
    assert run(model, batch)["prediction_logits"].shape == (2, 7, size)
