"""Merging multiplies every product out: what remains is a stock BERT with the same outputs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bert_cases import BACKBONE, DECODER, FULL, HEADS, LOW, MASKED_LM
from family import Head, run
from torch.testing import assert_close

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def with_random_vectors(head: Head, ranks: dict[str, int], **fields: object) -> torch.nn.Module:
    """A model whose biases and norms are not what they start as, so that losing one shows."""
    model = head.build(ranks, **fields)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


@each_head
@pytest.mark.parametrize("ranks", [LOW, FULL, {"ov_rank": 3}, {}], ids=["low", "full", "only-ov", "none"])
def test_the_merged_model_is_stock_and_computes_the_same(head: Head, ranks: dict[str, int]) -> None:
    model = with_random_vectors(head, ranks)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    merged = model.merge()
    assert type(merged) is head.stock
    assert merged.config.model_type == "bert"
    assert not hasattr(merged.config, "qk_rank")
    assert not merged.training
    assert_close(run(merged, head.batch()), run(model, head.batch()), **CLOSE)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_merging_keeps_ties_dtype_mode_labels_and_generation() -> None:
    merged = MASKED_LM.build(LOW).to(torch.bfloat16).train().merge()
    assert merged.cls.predictions.decoder.weight is merged.bert.embeddings.word_embeddings.weight
    assert merged.cls.predictions.decoder.bias is merged.cls.predictions.bias
    assert merged.dtype == torch.bfloat16
    assert merged.training
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert HEADS["next-sentence"].build(LOW, **labels).merge().config.id2label == labels["id2label"]
    model = DECODER.build(LOW)
    model.generation_config.max_new_tokens = 7
    assert model.merge().generation_config.max_new_tokens == 7


def test_merging_an_untied_decoder_keeps_both_matrices() -> None:
    model = MASKED_LM.build(LOW, tie_word_embeddings=False)
    merged = model.merge()
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert_close(run(merged, MASKED_LM.batch()), run(model, MASKED_LM.batch()), **CLOSE)


def test_the_merged_weights_do_not_share_memory_with_the_model() -> None:
    model = BACKBONE.build(LOW)
    merged = model.merge()
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in merged.parameters()}


LOAD_WITHOUT_US = """
import sys
import torch, transformers
sys.modules["hf_fnl"] = None  # an import of it fails
folder = sys.argv[1]
for case in sorted(__import__("os").listdir(folder)):
    batch, expected = torch.load(f"{folder}/{case}/io.pt", weights_only=True)
    config = transformers.AutoConfig.from_pretrained(f"{folder}/{case}")
    (name,) = config.architectures
    model, info = getattr(transformers, name).from_pretrained(f"{folder}/{case}", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        outputs = model(**batch)
    for key, value in expected.items():
        torch.testing.assert_close(outputs[key], value, rtol=1e-4, atol=1e-4)
    print(case, name)
"""


def test_a_merged_checkpoint_loads_without_this_package(tmp_path: Path) -> None:
    for name, head in HEADS.items():
        model = with_random_vectors(head, LOW)
        model.merge().save_pretrained(tmp_path / name)
        torch.save((head.batch(), run(model, head.batch())), tmp_path / name / "io.pt")
    command = [sys.executable, "-c", LOAD_WITHOUT_US, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [word for name in sorted(HEADS) for word in (name, HEADS[name].stock.__name__)]
