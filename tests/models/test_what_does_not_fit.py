"""What does not fit a family is refused at once, and the message says what, where, and what to change."""

from pathlib import Path
from typing import Any

import bert_cases
import gpt2_cases
import marian_cases
import pytest
import torch
from bert_cases import BERT, MASKED_LM
from family import Family, Head, Ranks, run, run_double
from gpt2_cases import GPT2, LM, LOW_QKV
from marian_cases import MARIAN, MT, PRE_NORM, SEPARATE
from model_cases import HEADS
from torch.testing import assert_close

from hf_fnl import RankRule

LOW = {family.name: family.low["all"] for family in (BERT, GPT2, MARIAN)}


def table(*cases: tuple[Any, ...]) -> Any:
    """Cases that are named by their number and what comes before their last entry."""
    return [pytest.param(*case, id=f"{number}-{case[-2]}") for number, case in enumerate(cases)]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    table(
        (BERT, {"qk_rank": 0}, r"qk_rank must be in \[1, 7\], got 0"),
        (BERT, {"ffn_rank": []}, "ffn_rank needs a number or one for each of 2 layers, got 0"),
        (BERT, {"embedding_rank": [3, 3]}, "'embedding_rank' expected int"),
        (BERT, {"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8"),
        (BERT, {"ffn_rank": 22}, r"ffn_rank must be in \[1, 21\], got 22"),
        (BERT, {"vocab_size": 15, "embedding_rank": 16}, r"embedding_rank must be in \[1, 15\], got 16"),
        (BERT, {"num_attention_heads": 4}, r"multiple of num_attention_heads, got 21 and 4 heads"),
        (BERT, {"factor_init": "random"}, r"one of spectral, spectral_ones, default, he, got 'random'"),
        (BERT, {"factor_init": "spectral_one"}, "got 'spectral_one'; did you mean spectral_ones"),
        (BERT, {"factor_init": {"mlp": "spectral"}}, r"a key of factor_init must be any of linear, .* got 'mlp'"),
        (BERT, {"ffn_rank": 2.5}, r"'ffn_rank' expected int"),
        (BERT, {"sparse_prediction": "yes"}, r"'sparse_prediction' expected bool"),
        (GPT2, {"n_inner": None, "ffn_rank": 22}, r"ffn_rank must be in \[1, 21\], got 22"),
        (GPT2, {"n_inner": 17, "ffn_rank": 18}, r"ffn_rank must be in \[1, 17\], got 18"),
        (GPT2, {"qkv_rank": [3, 22]}, r"qkv_rank must be in \[1, 21\], got 22"),
        (GPT2, {"qkv_rank": 3, "qk_rank": 2}, "factorizes .* as a whole and qk_rank cuts its heads: give one"),
        (GPT2, {"factor_init": {"ov:middle": "spectral"}}, "got 'ov:middle'"),
        (MARIAN, {"ov_rank": [1, 2, 3]}, r"ov_rank needs a number or one for each of 5 layers, got 3"),
        (MARIAN, {"qk_rank": [1, 2], "is_encoder_decoder": False}, r"qk_rank needs .* each of 3 layers, got 2"),
        (MARIAN, {"decoder_ffn_dim": 5, "ffn_rank": 6}, r"ffn_rank must be in \[1, 5\], got 6"),
        (MARIAN, {"decoder_vocab_size": 15, "embedding_rank": 16}, r"embedding_rank must be in \[1, 15\], got 16"),
        (MARIAN, {"encoder_attention_heads": 7}, "encoder_attention_heads and decoder_.* got 7 and 3"),
        (MARIAN, {"normalize_before": True, "share_encoder_decoder_embeddings": False}, "normalize_before=True needs"),
    ),
)
def test_a_configuration(family: Family, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        family.config(**{**family.sizes, **fields})


@pytest.mark.parametrize(
    ("saved", "ranks", "loaded", "changes", "message"),
    table(
        (MASKED_LM, LOW["Bert"], MASKED_LM, {"ffn_rank": 7}, r"intermediate\.dense\.U has shape \(32, 8\) .*\(32, 7\)"),
        (MASKED_LM, LOW["Bert"], MASKED_LM, {"qk_rank": 3}, r"self\.key\.bias has shape \(15,\) .*\(9,\) .*\(and 7"),
        (MASKED_LM, LOW["Bert"], MASKED_LM, {"ov_rank": None}, r"output\.dense\.weight .* \(21, 6\) .* \(21, 21\)"),
        (MASKED_LM, LOW["Bert"], MASKED_LM, {"embedding_rank": 12}, r"word_embeddings\.U .* \(53, 13\) .* \(53, 12\)"),
        (LM, LOW["GPT2"], LM, {"qk_rank": 3}, r"c_attn\.bias has shape \(36,\) .* \(24,\) in the model \(and 3 more\)"),
        (MT, LOW["Marian"], MT, {"qk_rank": 3}, r"k_proj\.bias has shape \(15,\) in the checkpoint and \(9,\)"),
        # Whose factors the model has no place for.
        (bert_cases.BACKBONE, LOW["Bert"], MASKED_LM, None, r"intermediate\.dense\.V where the model holds .*\.weight"),
        (gpt2_cases.BACKBONE, LOW["GPT2"], LM, None, r"holds .*mlp\.\w+\.V where the model holds .*\.weight"),
        (gpt2_cases.BACKBONE, LOW_QKV, LM, None, r"c_attn\.V where the model holds .*c_attn\.weight"),
    ),
)
def test_a_checkpoint_of_other_ranks(
    saved: Head, ranks: Ranks, loaded: Head, changes: Ranks | None, message: str, tmp_path: Path
) -> None:
    saved.build(ranks).save_pretrained(tmp_path)
    family = saved.family
    lacking = {name: value for name, value in ranks.items() if name not in ("ffn_rank", "qkv_rank")}
    fields = {"config": family.config(**{**family.sizes, **lacking})} if changes is None else changes
    with pytest.raises(ValueError, match=message) as error:
        loaded.auto_class.from_pretrained(tmp_path, **fields)
    assert str(tmp_path) in str(error.value)
    assert "ignore_mismatched_sizes" in str(error.value)
    assert isinstance(error.value, RuntimeError)  # as Transformers raises for shapes
    assert loaded.auto_class.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("head", "ranks"),
    [(MASKED_LM, {"ffn_rank": 8}), (MASKED_LM, {"qk_rank": 5}), (LM, {"qkv_rank": 5}), (LM, {"embedding_rank": 13})],
    ids=["bert-ffn", "bert-qk", "gpt2-qkv", "gpt2-embedding"],
)
def test_a_stock_checkpoint_is_not_cut_silently(head: Head, ranks: Ranks, tmp_path: Path) -> None:
    head.build_stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit {head.ours.__name__}"):
        head.ours.from_pretrained(tmp_path, config=head.family.config(**head.family.sizes, **ranks))


@pytest.mark.parametrize("kept", [0, 100, -1], ids=["empty", "half-a-header", "last-byte"])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    MASKED_LM.build(LOW["Bert"]).save_pretrained(tmp_path, max_shard_size="8KB")
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match="truncated or corrupt") as error:
        MASKED_LM.auto_class.from_pretrained(tmp_path)
    assert str(file) in str(error.value)


# What is made from a stock model


@pytest.mark.parametrize(
    ("name", "options", "message"),
    table(
        ("bert", {}, "give ranks or a rule, one of them; got neither"),
        ("bert", {"qk_rank": 3, "rule": RankRule(ratio=0.5)}, "one of them; got qk_rank"),
        ("bert", {"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8"),
        ("bert", {"rule": RankRule(rank=8)}, r"rank of qk in layer 0 must be in \[1, 7\], got 8"),
        ("bert", {"rule": RankRule(ratio=0.01)}, r"ratio=0\.01 cannot be met: .* \(see kinds\)"),
        ("bert", {"rule": RankRule(energy=1.0)}, "leaves every matrix dense"),
        ("bert", {"rule": RankRule(rank=3), "kinds": ["qk", "mlp"]}, "any of qk, ov, ffn, embedding, got mlp"),
        ("bert", {"rule": RankRule(rank=3), "kinds": []}, "any of qk, ov, ffn, embedding, got none"),
        ("bert", {"ffn_rank": 3, "calibration": []}, "there are no calibration batches"),
        ("bert", {"qkv_rank": 3}, "FactorizedBertModel has the ranks .*, got qkv_rank"),
        ("gpt2", {"qkv_rank": 3, "qk_rank": 2}, "qk_rank cuts its heads: give one of them"),
        ("gpt2", {"rule": RankRule(rank=3), "kinds": ["qkv", "ov"]}, "ov_rank cuts its heads"),
    ),
)
def test_options(name: str, options: dict[str, Any], message: str) -> None:
    head = HEADS[f"{name}-backbone"]
    with pytest.raises(Exception, match=message) as error:
        head.ours.from_dense(head.build_stock(), **options)
    kinds = (ValueError, TypeError)
    assert isinstance(error.value, kinds) or type(error.value).__name__.startswith("StrictDataclass")


@pytest.mark.parametrize(
    ("head", "build", "error", "message"),
    table(
        (bert_cases.BACKBONE, bert_cases.SEQUENCE.build_stock, TypeError, "is made from a BertModel, got a "),
        (MT, PRE_NORM.build_stock, TypeError, "is made from a MarianMTModel, got a PegasusForConditionalGeneration"),
        (MT, lambda: MT.build(LOW["Marian"]), ValueError, "is factorized already, with qk_rank, ov_rank, ffn_rank, em"),
        (MT, lambda: MT.build_stock(d_model=24, decoder_attention_heads=4), ValueError, "the same, got 3 and 4"),
    ),
)
def test_another_class(head: Head, build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        head.ours.from_dense(build(), qk_rank=2)


def test_folders_that_hold_no_stock_model(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        MASKED_LM.ours.from_dense(str(tmp_path / "nothing-here"), **LOW["Bert"])
    MASKED_LM.build({"ffn_rank": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.V where the model holds .*\.weight"):
        MASKED_LM.ours.from_dense(tmp_path, **LOW["Bert"])


_BUDGET = {"rule": RankRule(budget=0.6), "kinds": ["qk", "ffn", "embedding"]}


@pytest.mark.parametrize(
    ("head", "name", "options", "calibrated"),
    [
        (bert_cases.BACKBONE, "embeddings.word_embeddings", LOW["Bert"], False),
        (bert_cases.BACKBONE, "encoder.layer.1.output.dense", _BUDGET, True),
        (bert_cases.BACKBONE, "encoder.layer.1.attention.self.key", LOW["Bert"], True),
        (gpt2_cases.CROSS_LM, "transformer.h.0.crossattention.q_attn", LOW["GPT2"], False),
        (gpt2_cases.CROSS_LM, "transformer.h.1.attn.c_attn", LOW_QKV, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_are_not_finite(head: Head, name: str, options: dict[str, Any], calibrated: bool) -> None:
    stock = head.build_stock()
    stock.get_submodule(name).weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        head.ours.from_dense(stock, **options, calibration=head.batch() if calibrated else None)


# Vocabularies of another size


@pytest.mark.parametrize(
    "head", [bert_cases.SEQUENCE, marian_cases.BACKBONE, SEPARATE], ids=["bert", "marian", "marian-separate"]
)
def test_a_factorized_embedding_is_not_resized(head: Head) -> None:
    model = head.build(head.family.low["all"])
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    with pytest.raises(TypeError, match="FactorizedEmbedding"):  # as Transformers says it
        model.resize_token_embeddings(60)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == before
    assert model.config.vocab_size == head.family.sizes["vocab_size"]


@pytest.mark.parametrize("size", [60, 50], ids=["more", "fewer"])
@pytest.mark.parametrize(
    "head", [bert_cases.PRETRAINING, LM, MT, PRE_NORM], ids=["bert", "gpt2", "marian", "marian-pre-norm"]
)
def test_a_dense_embedding_is_resized_with_all_that_share_it(head: Head, size: int, tmp_path: Path) -> None:
    model = head.build({**head.family.low["all"], "embedding_rank": None})
    bias = getattr(model.get_output_embeddings(), "bias", None)
    before = None if bias is None else torch.nn.init.normal_(bias).detach().clone()
    table = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    output, both = model.get_output_embeddings(), min(size, len(table))
    assert output.weight is model.get_input_embeddings().weight
    assert torch.equal(output.weight[:both], table[:both])
    assert {getattr(model.config, name, size) for name in ("vocab_size", "decoder_vocab_size")} == {size}
    if before is not None:
        assert torch.equal(output.bias[:both], before[:both])
        assert not output.bias[both:].any()
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    words = ("input_ids", "labels")
    batch = {name: value.clamp(max=both - 1) for name, value in head.batch().items() if name in words}
    assert_close(run_double(loaded, batch), run_double(model, batch))
    outputs = run(model, batch)
    assert outputs.get("logits", outputs.get("prediction_logits")).shape[-1] == size


def test_separate_embeddings_are_resized_apart() -> None:
    model = SEPARATE.build({**LOW["Marian"], "embedding_rank": None})
    model.resize_token_embeddings(60, mean_resizing=False)
    model.resize_decoder_token_embeddings(55)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (60, 55)
    assert run(model, SEPARATE.batch())["logits"].shape[-1] == 55
