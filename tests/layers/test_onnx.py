"""A truncated BERT or GPT-2, exported to ONNX, computes the same in onnxruntime at any batch and length."""

from pathlib import Path

import gpt2_cases
import pytest
import torch
from bert_cases import BACKBONE, HEADS, MASKED_LM, SIZES
from family import Head, random_vectors_, run
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

pytest.importorskip("onnx", reason="the export writes with onnx")
pytest.importorskip("onnxscript", reason="the export translates with onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported models run in onnxruntime")

# From inside torch's own exporter.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")

LOGITS, ANSWERS = ["logits"], ["start_logits", "end_logits"]
CASES = {
    "merged-backbone": (BACKBONE, True, ["last_hidden_state", "pooler_output"]),
    "merged-masked-lm": (MASKED_LM, True, LOGITS),
    "merged-question-answering": (HEADS["question-answering"], True, ANSWERS),
    "factorized-masked-lm": (MASKED_LM, False, LOGITS),
    "merged-gpt2": (gpt2_cases.LM, True, LOGITS),
    "factorized-gpt2": (gpt2_cases.LM, False, LOGITS),
}


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Ids with half of the last sequence masked."""
    ids = torch.randint(1, SIZES["vocab_size"], (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, ids.shape)}


def export(model: PreTrainedModel, outputs: list[str], file: Path) -> None:
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    example = inputs(2, 9)
    torch.onnx.export(
        model,
        kwargs=example,
        f=file,
        output_names=outputs,
        dynamic_shapes=dict.fromkeys(example, axes),
        dynamo=True,
        verbose=False,
    )


@pytest.mark.parametrize(("head", "merged", "outputs"), CASES.values(), ids=CASES)
def test_an_exported_model_computes_the_same(head: Head, merged: bool, outputs: list[str], tmp_path: Path) -> None:
    stock = random_vectors_(head.build_stock(use_cache=False))
    model = head.ours.from_dense(stock, **head.family.low["all"])
    model = model.merge() if merged else model
    export(model, outputs, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((2, 9), (3, 13), (5, 4)):
        feed = inputs(batch, length)
        results = session.run(outputs, {name: value.numpy() for name, value in feed.items()})
        expected = run(model, feed)
        for name, result in zip(outputs, results, strict=True):
            assert_close(torch.from_numpy(result), expected[name], rtol=1e-4, atol=1e-4)
