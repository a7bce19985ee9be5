"""Small BERTs, one case for every head, shared by the tests of BERT."""

from typing import Any

import torch
from family import Family, Head, encoder_states, token_ids
from torch import Tensor

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
BERT = Family(
    "Bert",
    SIZES,
    {"all": FULL, "one-layer": {"qk_rank": [7, None]}},
    {"all": LOW, "only-ov": {"ov_rank": 3}},
    "encoder.layer.{}",
)
BATCH, LENGTH = 4, 11


def tokens(*shape: int) -> dict[str, Tensor]:
    """Random ids without padding ids, with the end of the first sequence masked."""
    batch = token_ids(shape or (BATCH, LENGTH), 1, SIZES["vocab_size"])
    return {**batch, "token_type_ids": torch.randint(2, batch["input_ids"].shape)}


def masked_labels(*label_counts: int) -> Tensor:
    """Labels ``(batch, LENGTH)`` with the given number of labelled positions in each row."""
    labels = torch.full((len(label_counts), LENGTH), -100)
    for row, count in zip(labels, label_counts, strict=True):
        row[torch.randperm(LENGTH)[:count]] = torch.randint(SIZES["vocab_size"], (count,))
    return labels


def labels(high: int, *shape: int) -> Tensor:
    """Random class labels."""
    return torch.randint(high, shape or (BATCH,))


_ROWS = (3, 1, 5, 2)
_DECODER = {"is_decoder": True}
_SQUAD = {"start_positions": torch.tensor([0, 3, 5, 40]), "end_positions": torch.tensor([1, 3, 9, 40])}

BACKBONE = Head(BERT, "Model", "AutoModel", tokens)
PRETRAINING = Head(
    BERT,
    "ForPreTraining",
    "AutoModelForPreTraining",
    lambda: {**tokens(), "labels": masked_labels(*_ROWS), "next_sentence_label": labels(2)},
)
MASKED_LM = Head(BERT, "ForMaskedLM", "AutoModelForMaskedLM", lambda: {**tokens(), "labels": masked_labels(*_ROWS)})
DECODER = Head(
    BERT, "LMHeadModel", "AutoModelForCausalLM", lambda: {**tokens(), "labels": masked_labels(*_ROWS)}, config=_DECODER
)
CROSS_DECODER = Head(
    BERT,
    "LMHeadModel",
    "AutoModelForCausalLM",
    lambda: {**DECODER.inputs(), **encoder_states(BATCH, SIZES["hidden_size"])},
    config={**_DECODER, "add_cross_attention": True},
)
SEQUENCE = Head(
    BERT,
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
        BERT,
        "ForNextSentencePrediction",
        "AutoModelForNextSentencePrediction",
        lambda: {**tokens(), "labels": labels(2)},
    ),
    "sequence": SEQUENCE,
    "multiple-choice": Head(
        BERT,
        "ForMultipleChoice",
        "AutoModelForMultipleChoice",
        lambda: {**tokens(BATCH, 3, LENGTH), "labels": labels(3)},
    ),
    "tokens": Head(
        BERT,
        "ForTokenClassification",
        "AutoModelForTokenClassification",
        lambda: {**tokens(), "labels": labels(5, BATCH, LENGTH)},
        config={"num_labels": 5},
    ),
    "question-answering": Head(
        BERT, "ForQuestionAnswering", "AutoModelForQuestionAnswering", lambda: {**tokens(), **_SQUAD}
    ),
}
LM_HEADS = {name: HEADS[name] for name in ("pretraining", "masked-lm", "decoder")}
