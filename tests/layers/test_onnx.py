"""A truncated BERT or GPT-2, exported to ONNX, computes the same in onnxruntime at any batch and length.

Merged models are of stock classes, whose export is not ours.
"""

from pathlib import Path

import gpt2_cases
import pytest
import torch
from bert_cases import MASKED_LM, SIZES
from family import Head, random_vectors_, run
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

pytest.importorskip("onnx", reason="the export writes with onnx")
pytest.importorskip("onnxscript", reason="the export translates with onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="exported models run in onnxruntime")

# From inside torch's own exporter.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Ids with half of the last sequence masked."""
    ids = torch.randint(1, SIZES["vocab_size"], (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, ids.shape)}


def export(model: PreTrainedModel, file: Path) -> None:
    axes = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    example = inputs(2, 9)
    torch.onnx.export(
        model,
        kwargs=example,
        f=file,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(example, axes),
        dynamo=True,
        verbose=False,
    )


@pytest.mark.parametrize(
    ("head", "layers"), [(MASKED_LM, "num_hidden_layers"), (gpt2_cases.LM, "n_layer")], ids=["bert", "gpt2"]
)
def test_an_exported_model_computes_the_same(head: Head, layers: str, tmp_path: Path) -> None:
    stock = random_vectors_(head.build_stock(use_cache=False, **{layers: 1}))
    model = head.ours.from_dense(stock, **head.family.low["all"])
    export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((2, 9), (5, 4)):
        feed = inputs(batch, length)
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in feed.items()})
        assert_close(torch.from_numpy(logits), run(model, feed)["logits"], rtol=1e-4, atol=1e-4)
