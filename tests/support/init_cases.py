"""Small models of every family, and one factorized by surgery, for the tests of initialization in many processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from hf_fnl import (
    FactorizationConfig,
    FactorizedBertConfig,
    FactorizedBertForMaskedLM,
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    FactorizedMarianConfig,
    FactorizedMarianMTModel,
    factorize_,
)

_RANKS = {"qk_rank": 5, "ov_rank": 3, "ffn_rank": 8, "embedding_rank": 13}
_BERT: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 21,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_GPT2: dict[str, Any] = {
    "vocab_size": 53,
    "n_embd": 21,
    "n_layer": 3,
    "n_head": 3,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_MARIAN: dict[str, Any] = {
    "vocab_size": 53,
    "d_model": 18,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 25,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": 1,
}


@dataclass(frozen=True)
class Case:
    """A model: its class, what makes its configuration, surgery on it, and the list of its layers."""

    model_class: type[PreTrainedModel]
    config: Callable[[], Any]
    layers: str
    factorize: Callable[[PreTrainedModel], object] | None = None

    def alone(self) -> tuple[PreTrainedModel, torch.Tensor]:
        """The model as one process makes it, and where it leaves the random stream."""
        torch.manual_seed(0)
        model = self.model_class(self.config())
        if self.factorize is not None:
            self.factorize(model)
        return model, torch.get_rng_state()


def _surgery(model: PreTrainedModel) -> object:
    config = FactorizationConfig(rank=7, kinds=("linear", "embedding"), exclude=("*token_type*", "*seq_relationship*"))
    return factorize_(model, config)


CASES = {
    "bert": Case(
        FactorizedBertForMaskedLM, lambda: FactorizedBertConfig(**_BERT, **_RANKS, pad_token_id=0), "bert.encoder.layer"
    ),
    "gpt2": Case(FactorizedGPT2LMHeadModel, lambda: FactorizedGPT2Config(**_GPT2, **_RANKS), "transformer.h"),
    "marian": Case(
        FactorizedMarianMTModel, lambda: FactorizedMarianConfig(**_MARIAN, **_RANKS), "model.decoder.layers"
    ),
    "surgery": Case(BertForMaskedLM, lambda: BertConfig(**_BERT), "bert.encoder.layer", _surgery),
}
