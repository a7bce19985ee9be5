"""Small Marians, one case for every head and layout, shared by the tests of Marian."""

from typing import Any

import torch
import transformers
from family import Family, Head, encoder_states
from torch import Tensor
from transformers import PegasusConfig, PreTrainedConfig, PreTrainedModel

# Coprime where they can be, so that a transposed matrix cannot pass. A wide initializer, so that every weight shows.
SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "d_model": 21,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 26,
    "max_position_embeddings": 40,
    "init_std": 0.3,
    "scale_embedding": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
NO_DROPOUT = {"dropout": 0.0}
FULL = {"qk_rank": 7, "ov_rank": 7, "ffn_rank": 21, "embedding_rank": 21}
LOW = {"qk_rank": 5, "ov_rank": 2, "ffn_rank": 8, "embedding_rank": 13}
MARIAN = Family("Marian", SIZES, {"all": FULL}, {"all": LOW, "only-ov": {"ov_rank": 3}}, "decoder.layers.{}")
BATCH, SOURCE, TARGET = 4, 9, 7


class PreNormHead(Head):
    """A head with LayerNorm before its blocks, which is a head of Pegasus where nothing is factorized."""

    @property
    def stock(self) -> type[PreTrainedModel]:
        return getattr(
            transformers, {"MTModel": "PegasusForConditionalGeneration"}.get(self.name, f"Pegasus{self.name}")
        )

    @property
    def stock_config(self) -> type[PreTrainedConfig]:
        return PegasusConfig

    def build_source(self, **fields: Any) -> PreTrainedModel:
        """A model of ours without factors."""
        return self.build({}, **fields)

    def build_stock(self, *, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
        config = self.family.config(**{**self.family.sizes, **self.config, **fields}).to_dense()
        torch.manual_seed(0)
        return self.stock._from_config(config, attn_implementation=attention).eval()


def source() -> dict[str, Tensor]:
    """Sentences without special tokens, the first of which ends early."""
    ids = torch.randint(3, 47, (BATCH, SOURCE))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair() -> dict[str, Tensor]:
    """Sentences and what the decoder is given."""
    return {**source(), "decoder_input_ids": torch.randint(3, 47, (BATCH, TARGET))}


def translation() -> dict[str, Tensor]:
    """Sentences and their translations, the first of which ends early."""
    labels = torch.randint(3, 47, (BATCH, TARGET))
    labels[0, 4:] = -100
    return {**source(), "labels": labels}


def continuation() -> dict[str, Tensor]:
    """What a decoder alone is given, beside the states of some encoder."""
    states = encoder_states(BATCH, SIZES["d_model"])
    return {**source(), "labels": torch.randint(3, 47, (BATCH, SOURCE)), **states}


_SEQ2SEQ = ("MTModel", "AutoModelForSeq2SeqLM", translation)
_SEPARATE = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 47}
_UNTIED = {"tie_word_embeddings": False}
_PRE_NORM = {"normalize_before": True}

BACKBONE = Head(MARIAN, "Model", "AutoModel", pair)
MT = Head(MARIAN, *_SEQ2SEQ)
SEPARATE = Head(MARIAN, *_SEQ2SEQ, config=_SEPARATE)
UNTIED = Head(MARIAN, *_SEQ2SEQ, config=_UNTIED)
PRE_NORM = PreNormHead(MARIAN, *_SEQ2SEQ, config=_PRE_NORM)
_ALONE = {"encoder_layers": SIZES["decoder_layers"]}  # by which the stock model counts the layers of a cache
DECODER = Head(MARIAN, "ForCausalLM", "AutoModelForCausalLM", continuation, config=_ALONE)
HEADS = {
    "backbone": BACKBONE,
    "pre-norm-backbone": PreNormHead(MARIAN, "Model", "AutoModel", pair, config=_PRE_NORM),
    "translation": MT,
    "separate": SEPARATE,
    "untied": UNTIED,
    "separate-untied": Head(MARIAN, *_SEQ2SEQ, config={**_SEPARATE, **_UNTIED}),
    "pre-norm": PRE_NORM,
    "decoder": DECODER,
    "pre-norm-decoder": PreNormHead(
        MARIAN, "ForCausalLM", "AutoModelForCausalLM", continuation, config={**_PRE_NORM, **_ALONE}
    ),
}
