"""Small BERTs, one case for every head, shared by the tests of BERT."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import hf_fnl
from hf_fnl import FactorizedBertConfig

# Coprime where they can be, so that a transposed matrix cannot pass. A wide initializer, so that every weight shows.
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FULL = {"qk_rank": 7, "ov_rank": 7, "ffn_rank": 21, "embedding_rank": 21}
LOW = {"qk_rank": 5, "ov_rank": 2, "ffn_rank": 8, "embedding_rank": 13}
BATCH, LENGTH = 4, 11


def tokens(*shape: int) -> dict[str, Tensor]:
    """Random ids without padding ids, with the end of the first sequence masked."""
    ids = torch.randint(1, SIZES["vocab_size"], shape or (BATCH, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, ..., 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, ids.shape)}


def masked_labels(*label_counts: int) -> Tensor:
    """Labels ``(batch, LENGTH)`` with the given number of labelled positions in each row."""
    labels = torch.full((len(label_counts), LENGTH), -100)
    for row, count in zip(labels, label_counts, strict=True):
        row[torch.randperm(LENGTH)[:count]] = torch.randint(SIZES["vocab_size"], (count,))
    return labels


def labels(high: int, *shape: int) -> Tensor:
    """Random class labels."""
    return torch.randint(high, shape or (BATCH,))


@dataclass(frozen=True)
class Head:
    """A head of BERT: its classes by the end of their names, what it is fed, and fields its configuration needs."""

    name: str
    auto: str
    inputs: Callable[[], dict[str, Tensor]]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> type[PreTrainedModel]:
        return getattr(hf_fnl, f"FactorizedBert{self.name}")

    @property
    def stock(self) -> type[PreTrainedModel]:
        return getattr(transformers, f"Bert{self.name}")

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, self.auto)

    def build(self, ranks: dict[str, int], *, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
        """Our model, drawn from seed 0, in evaluation mode."""
        config = FactorizedBertConfig(**{**SIZES, **self.config, **ranks, **fields})
        torch.manual_seed(0)
        return self.ours._from_config(config, attn_implementation=attention).eval()

    def build_stock(self, *, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
        """The stock model, drawn from seed 0, in evaluation mode."""
        torch.manual_seed(0)
        config = BertConfig(**{**SIZES, **self.config, **fields})
        return self.stock._from_config(config, attn_implementation=attention).eval()

    def batch(self) -> dict[str, Tensor]:
        """Inputs with labels, the same at every call."""
        torch.manual_seed(1)
        return self.inputs()


def _memory() -> dict[str, Tensor]:
    mask = torch.ones(BATCH, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"encoder_hidden_states": torch.randn(BATCH, 6, SIZES["hidden_size"]), "encoder_attention_mask": mask}


_ROWS = (3, 1, 5, 2)
_DECODER = {"is_decoder": True}
_SQUAD = {"start_positions": torch.tensor([0, 3, 5, 40]), "end_positions": torch.tensor([1, 3, 9, 40])}

BACKBONE = Head("Model", "AutoModel", tokens)
PRETRAINING = Head(
    "ForPreTraining",
    "AutoModelForPreTraining",
    lambda: {**tokens(), "labels": masked_labels(*_ROWS), "next_sentence_label": labels(2)},
)
MASKED_LM = Head("ForMaskedLM", "AutoModelForMaskedLM", lambda: {**tokens(), "labels": masked_labels(*_ROWS)})
DECODER = Head(
    "LMHeadModel", "AutoModelForCausalLM", lambda: {**tokens(), "labels": masked_labels(*_ROWS)}, config=_DECODER
)
CROSS_DECODER = Head(
    "LMHeadModel",
    "AutoModelForCausalLM",
    lambda: {**DECODER.inputs(), **_memory()},
    config={**_DECODER, "add_cross_attention": True},
)
SEQUENCE = Head(
    "ForSequenceClassification",
    "AutoModelForSequenceClassification",
    lambda: {**tokens(), "labels": labels(5)},
    config={"num_labels": 5},
)
HEADS = {
    "backbone": BACKBONE,
    "pretraining": PRETRAINING,
    "masked-lm": MASKED_LM,
    "decoder": DECODER,
    "cross-decoder": CROSS_DECODER,
    "next-sentence": Head(
        "ForNextSentencePrediction",
        "AutoModelForNextSentencePrediction",
        lambda: {**tokens(), "labels": labels(2)},
    ),
    "sequence": SEQUENCE,
    "multiple-choice": Head(
        "ForMultipleChoice",
        "AutoModelForMultipleChoice",
        lambda: {**tokens(BATCH, 3, LENGTH), "labels": labels(3)},
    ),
    "tokens": Head(
        "ForTokenClassification",
        "AutoModelForTokenClassification",
        lambda: {**tokens(), "labels": labels(5, BATCH, LENGTH)},
        config={"num_labels": 5},
    ),
    "question-answering": Head("ForQuestionAnswering", "AutoModelForQuestionAnswering", lambda: {**tokens(), **_SQUAD}),
}
LM_HEADS = {name: HEADS[name] for name in ("pretraining", "masked-lm", "decoder")}


def run(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Every tensor that the model returns; a cache is left out."""
    with torch.no_grad():
        outputs = model(**batch, **options)
    return {key: value for key, value in outputs.items() if key != "past_key_values"}


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter name; zero where there is none."""
    model.zero_grad()
    loss.backward()
    zero = torch.zeros(())
    return {n: (zero.expand_as(p) if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
