"""Factorized GPT-2: its configuration, backbone and every head that Transformers has for GPT-2."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Tokenizer
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as stock

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.configuration import LayerRank, NarrowHeadsConfig
from hf_fnl.models.cuts import Names
from hf_fnl.models.forwards import extends
from hf_fnl.models.losses import head_loss, is_plain
from hf_fnl.models.register import register


@strict
class FactorizedGPT2Config(NarrowHeadsConfig, GPT2Config):
    """Configuration of a GPT-2 whose matrices are held as factors.

    The other ranks and ``factor_init`` are those of :class:`~hf_fnl.models.configuration.FactorizedConfig`, every other
    field is :class:`GPT2Config`'s. Kamalakara et al. 2022 set ``qkv_rank`` and ``ffn_rank`` to 62.5 % of ``n_embd`` and
    leave the output projection of the attention dense.

    Args:
        qkv_rank: Rank of the one matrix ``(n_embd, 3 n_embd)`` that gives queries, keys and values, and of both input
            matrices of a cross-attention, up to ``n_embd``; in the place of ``qk_rank`` and ``ov_rank``. A number, or a
            list with one for each layer.
        fused_loss: In training, compute the loss of a language model without holding all logits; its output then has
            none.

    Raises:
        ValueError: If a rank does not fit the model, ``qkv_rank`` is given together with ``qk_rank`` or ``ov_rank``, or
            ``factor_init`` is unknown.
    """

    model_type = "factorized_gpt2"
    dense_class = GPT2Config

    qkv_rank: LayerRank = None
    fused_loss: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        heads = [option for option in ("qk_rank", "ov_rank") if getattr(self, option) is not None]
        if self.qkv_rank is not None and heads:
            raise ValueError(
                f"qkv_rank factorizes the queries', keys' and values' matrix as a whole and {heads[0]} cuts its heads: "
                "give one of them"
            )

    @property
    def feed_forward_size(self) -> int:
        """Width inside of a feed-forward block."""
        return self.n_inner or 4 * self.n_embd


class FactorizedGPT2PreTrainedModel(FactorizedPreTrainedModel):
    """Base class of the backbone and the heads."""

    config_class = FactorizedGPT2Config
    # Most stock heads return the mean over their own batch, whatever the number of items that the Trainer passes.
    accepts_loss_kwargs = False
    names = Names(
        attention=("h.*.attn", "h.*.crossattention"),
        ffn=("h.*.mlp.c_fc", "h.*.mlp.c_proj"),
        embedding=("wte",),
        qkv=("h.*.attn.c_attn", "h.*.crossattention.c_attn", "h.*.crossattention.q_attn"),
        end_of_branch=("h.*.mlp.c_proj", "h.*.attn.c_proj", "h.*.crossattention.c_proj"),
    )

    @property
    def branch_std(self) -> float:
        """Smaller the deeper the model is: a layer has two branches."""
        return self.config.initializer_range / math.sqrt(2 * self.config.n_layer)


class FactorizedGPT2Model(FactorizedGPT2PreTrainedModel, stock.GPT2Model):
    """The backbone of GPT-2 with its matrices held as factors, as its configuration says."""


FactorizedGPT2PreTrainedModel.backbone_class = FactorizedGPT2Model


class FactorizedGPT2LMHeadModel(FactorizedGPT2PreTrainedModel, stock.GPT2LMHeadModel):
    """Left-to-right language modelling."""

    accepts_loss_kwargs = True

    @extends(stock.GPT2LMHeadModel.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> CausalLMOutputWithCrossAttentions:
        """As the stock model; in training with ``fused_loss`` and labels the output has no logits.

        It has them where the loss function or the computation of ``lm_head`` is another than that of its class.

        Args:
            labels: ``(batch, length)``, not shifted, -100 where nothing is to be predicted; or, as ``shift_labels``,
                the label of each position.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.
        """
        shifted = inputs.pop("shift_labels", None)
        shifted = None if shifted is None else shifted.contiguous()  # may be a part of longer ones
        has_labels, keep = labels is not None or shifted is not None, inputs.get("logits_to_keep", 0)
        is_fused = self.training and self.config.fused_loss and has_labels and isinstance(keep, int) and keep == 0
        if not is_fused or self.loss_function is not ForCausalLMLoss or not is_plain(self.lm_head):
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shifted} if has_labels else {}
            given = {name: value for name, value in options.items() if value is not None}
            return super().forward(labels=shifted if labels is None else labels, **inputs, **given)
        ignored = inputs.pop("ignore_index", IGNORE_INDEX)
        inputs.pop("logits_to_keep", None)
        outputs = self.transformer(**inputs)
        if shifted is None:
            assert labels is not None
            shifted = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        options = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignored}
        loss = head_loss(self.lm_head, outputs.last_hidden_state, shifted, **options)
        kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=loss, **kept)


class FactorizedGPT2DoubleHeadsModel(FactorizedGPT2PreTrainedModel, stock.GPT2DoubleHeadsModel):
    """Language modelling and multiple choice."""


class FactorizedGPT2ForSequenceClassification(FactorizedGPT2PreTrainedModel, stock.GPT2ForSequenceClassification):
    """Classification or regression of a sequence by its last token."""


class FactorizedGPT2ForTokenClassification(FactorizedGPT2PreTrainedModel, stock.GPT2ForTokenClassification):
    """Classification of every token."""


class FactorizedGPT2ForQuestionAnswering(FactorizedGPT2PreTrainedModel, stock.GPT2ForQuestionAnswering):
    """Extractive question answering."""


register(
    FactorizedGPT2Config,
    GPT2Tokenizer,
    AutoModel=FactorizedGPT2Model,
    AutoModelForPreTraining=FactorizedGPT2LMHeadModel,
    AutoModelForCausalLM=FactorizedGPT2LMHeadModel,
    AutoModelForSequenceClassification=FactorizedGPT2ForSequenceClassification,
    AutoModelForTokenClassification=FactorizedGPT2ForTokenClassification,
    AutoModelForQuestionAnswering=FactorizedGPT2ForQuestionAnswering,
)
