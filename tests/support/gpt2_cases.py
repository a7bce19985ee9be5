"""Small GPT-2s, one case for every head, shared by the tests of GPT-2."""

from typing import Any

import torch
from family import Family, Head, encoder_states, token_ids
from torch import Tensor

# Coprime where they can be, so that a transposed matrix cannot pass. A wide initializer, so that every weight shows.
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "n_embd": 21,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 32,
    "n_positions": 40,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FULL = {"qk_rank": 7, "ov_rank": 7, "ffn_rank": 21, "embedding_rank": 21}
FULL_QKV = {"qkv_rank": 21, "ffn_rank": 21}
LOW = {"qk_rank": 5, "ov_rank": 2, "ffn_rank": 8, "embedding_rank": 13}
LOW_QKV = {"qkv_rank": 11, "ffn_rank": 8}
GPT2 = Family(
    "GPT2",
    SIZES,
    {"all": FULL, "qkv": FULL_QKV, "one-layer": {"qk_rank": [7, None]}},
    {"all": LOW, "only-ov": {"ov_rank": 3}, "qkv": LOW_QKV},
    "h.{}",
)
BATCH, LENGTH = 4, 11


def tokens(*shape: int) -> dict[str, Tensor]:
    """Random ids without special ones, with the end of the first sequence masked."""
    return token_ids(shape or (BATCH, LENGTH), 3, SIZES["vocab_size"])


def next_words() -> dict[str, Tensor]:
    """Tokens of which all but the masked ones are to be predicted."""
    batch = tokens()
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _choices() -> dict[str, Tensor]:
    batch = tokens(BATCH, 3, LENGTH)
    ends = torch.randint(7, (BATCH, 3))  # none of them masked
    return {**batch, "mc_token_ids": ends, "mc_labels": torch.randint(3, (BATCH,)), "labels": batch["input_ids"]}


_SPANS = {"start_positions": torch.tensor([0, 3, 5, 40]), "end_positions": torch.tensor([1, 3, 9, 40])}

BACKBONE = Head(GPT2, "Model", "AutoModel", tokens)
LM = Head(GPT2, "LMHeadModel", "AutoModelForCausalLM", next_words)
CROSS_LM = Head(
    GPT2,
    "LMHeadModel",
    "AutoModelForCausalLM",
    lambda: {**next_words(), **encoder_states(BATCH, SIZES["n_embd"])},
    config={"add_cross_attention": True},
)
DOUBLE = Head(GPT2, "DoubleHeadsModel", None, _choices)
SEQUENCE = Head(
    GPT2,
    "ForSequenceClassification",
    "AutoModelForSequenceClassification",
    lambda: {**tokens(), "labels": torch.randint(5, (BATCH,))},
    config={"num_labels": 5},
)
HEADS = {
    "backbone": BACKBONE,
    "lm": LM,
    "cross-lm": CROSS_LM,
    "double": DOUBLE,
    "sequence": SEQUENCE,
    "tokens": Head(
        GPT2,
        "ForTokenClassification",
        "AutoModelForTokenClassification",
        lambda: {**tokens(), "labels": torch.randint(5, (BATCH, LENGTH))},
        config={"num_labels": 5},
    ),
    "question-answering": Head(
        GPT2, "ForQuestionAnswering", "AutoModelForQuestionAnswering", lambda: {**tokens(), **_SPANS}
    ),
}
