"""Factorized Llama: its configuration, backbone and language model."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as stock

from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.configuration import FactorizedConfig
from hf_fnl.models.cuts import Names
from hf_fnl.models.register import register


@strict
class FactorizedLlamaConfig(FactorizedConfig, LlamaConfig):
    """Configuration of a Llama whose matrices are held as factors.

    Queries and keys turn with their positions and are no factors of one matrix, so there is no ``qk_rank``. The ranks
    and ``factor_init`` are those of :class:`~hf_fnl.models.configuration.FactorizedConfig`, every other field is
    :class:`LlamaConfig`'s. Heads that share a value share its rank.

    Raises:
        ValueError: If a rank does not fit the model or ``factor_init`` is unknown.
    """

    model_type = "factorized_llama"
    dense_class = LlamaConfig


class FactorizedLlamaPreTrainedModel(FactorizedPreTrainedModel):
    """Base class of the backbone and the head."""

    config_class = FactorizedLlamaConfig
    shapes_heads = False  # under rotary positions, whose tables have the width of a dense head
    names = Names(
        attention=("layers.*.self_attn",),
        ffn=("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj", "layers.*.mlp.down_proj"),
        embedding=("embed_tokens",),
    )


class FactorizedLlamaModel(FactorizedLlamaPreTrainedModel, stock.LlamaModel):
    """The backbone of Llama with its matrices held as factors, as its configuration says."""


FactorizedLlamaPreTrainedModel.backbone_class = FactorizedLlamaModel


class FactorizedLlamaForCausalLM(FactorizedLlamaPreTrainedModel, stock.LlamaForCausalLM):
    """Left-to-right language modelling."""


register(FactorizedLlamaConfig, None, AutoModel=FactorizedLlamaModel, AutoModelForCausalLM=FactorizedLlamaForCausalLM)
