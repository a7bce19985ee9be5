"""One small model of each architecture that surgery is tried on, with inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

# Coprime where they can be, so that a transposed matrix cannot pass.
_BERT = {
    "vocab_size": 53,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
_BATCH, _LENGTH = 2, 7


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _BERT["vocab_size"], (_BATCH, _LENGTH))}


def _text_to_text() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"][:, :5]}


def _pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(_BATCH, 3, size, size)}


@dataclass(frozen=True)
class Architecture:
    """A model class, sizes for its configuration, inputs, and a class that shares its backbone."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]] = _tokens
    backbone: str = ""
    tied: tuple[str, ...] = ()  # layers that share the weight of the input embedding

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model)

    def build(self, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        """A model in evaluation mode none of whose parameters is what it starts as."""
        torch.manual_seed(0)
        config = self.model_class.config_class(**{**self.config, **fields})
        model = self.model_class._from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return self.inputs()


ARCHITECTURES = {
    "bert": Architecture("BertForPreTraining", _BERT, backbone="BertModel", tied=("cls.predictions.decoder",)),
    "roberta": Architecture("RobertaForMaskedLM", _BERT, backbone="RobertaModel", tied=("lm_head.decoder",)),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        {
            "vocab_size": 53,
            "n_embd": 21,
            "n_layer": 2,
            "n_head": 3,
            "n_inner": 32,
            "n_positions": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        backbone="GPT2Model",
        tied=("lm_head",),
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        {
            "vocab_size": 53,
            "hidden_size": 21,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "ffn_dim": 32,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 13,
        },
        backbone="OPTModel",
        tied=("lm_head",),
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        {
            "vocab_size": 53,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 35,
        },
        backbone="LlamaModel",
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        {
            "vocab_size": 53,
            "d_model": 21,
            "d_kv": 7,
            "num_layers": 2,
            "num_heads": 3,
            "d_ff": 32,
            "decoder_start_token_id": 0,
        },
        _text_to_text,
        backbone="T5Model",
        tied=("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        {
            "hidden_size": 21,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 32,
            "image_size": 12,
            "patch_size": 4,
            "num_labels": 5,
        },
        lambda: _pixels(12),
        backbone="ViTModel",
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 1], "layer_type": "basic", "num_labels": 5},
        lambda: _pixels(32),
        backbone="ResNetModel",
    ),
}
ALL_KINDS = ("linear", "embedding", "conv")


class TiedToy(nn.Module):
    """A language model of plain torch, with a layer that has two names and one that is used as a weight only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 7, bias=False)])
        self.again = self.layers[0]
        self.head = nn.Linear(7, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layers[1](self.layers[0](self.embedding(ids)).relu())
        return self.head(x + self.again(x).sum(-1, keepdim=True))
