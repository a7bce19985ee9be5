"""Output matrices over a vocabulary that are tied to a word embedding, which may be factorized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_fnl.layers import FactorizedLinear
from hf_fnl.math.vocabulary_loss import vocabulary_loss
from hf_fnl.models.attention import draw_normal_, is_loaded
from hf_fnl.models.base import FactorizedPreTrainedModel


def tied_factors(tied: Mapping[str, str], factorized: bool) -> dict[str, str]:
    """What is tied to what, factor by factor where the stock model ties a ``weight``.

    Args:
        tied: Names of a stock model's tied weights, as its ``_tied_weights_keys`` has them.
        factorized: Whether these weights are held as factors.
    """
    if not factorized:
        return dict(tied)
    owners = [(ours.removesuffix("weight"), theirs.removesuffix("weight")) for ours, theirs in tied.items()]
    return {f"{ours}{factor}": f"{theirs}{factor}" for ours, theirs in owners for factor in ("U", "V")}


def vocabulary_layer(dense: nn.Linear, rank: int | None, method: str) -> nn.Linear | FactorizedLinear:
    """An output matrix without values: as it is, or held as factors of a rank."""
    return dense if rank is None else FactorizedLinear.empty_like(dense, rank, init=method)


class TiedVocabulary(FactorizedPreTrainedModel):
    """Mixin of a model whose output matrix is tied to its word embedding, factor by factor."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which keeps keys and values in pages of one width.

        Raises:
            ValueError: If heads have several widths.
        """
        if not hasattr(self.config, "head_dim"):
            raise ValueError(
                "continuous batching needs keys and values of one width, got "
                f"qk_rank={self.config.qk_rank} and ov_rank={self.config.ov_rank}: give both one number, call "
                "generate(), or merge() the model first"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        tied = self.config.tie_word_embeddings and module is self.get_output_embeddings()
        if tied and isinstance(module, FactorizedLinear) and not is_loaded(module.U):
            # Replaced by the embedding's factors right after this. The stock model draws its own all the same, and
            # equal seeds are to give equal weights: draw it too, decompose nothing.
            draw_normal_(module.U.new_empty(module.shape), self.config.initializer_range)
        else:
            super()._init_weights(module)


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling a module is its class's own forward with its own parameters, and nothing else.

    Only then may a computation go around the call. It is not so for a module of another class, which may be a subclass,
    a wrapper such as LoRA's, or parametrized or sharded; nor if a parameter is quantized or divided, ``forward`` was
    replaced, or there is a hook of any kind.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    parameters = list(module.parameters())
    return (
        type(module) in classes
        and "forward" not in vars(module)
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and bool(parameters)
        and all(type(parameter) in (nn.Parameter, FakeTensor) for parameter in parameters)  # fake: of a plan
    )


def head_loss(
    head: nn.Linear | FactorizedLinear,
    hidden_states: Tensor,
    labels: Tensor,
    *,
    table: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Cross-entropy of a plain output matrix, dense or factorized, without all of its logits in memory.

    Args:
        head: The output matrix, one that :func:`is_plain`.
        hidden_states: ``(..., hidden)``.
        labels: ``(...)``, -100 where nothing is to be predicted.
        table: In the place of the weight of a dense ``head``; see :func:`~hf_fnl.models.tied_rows.tied_inputs`.
        options: As in :func:`~hf_fnl.math.vocabulary_loss.vocabulary_loss`.
    """
    weight: Tensor = head.weight if table is None else table
    if isinstance(head, FactorizedLinear):
        hidden_states, weight = hidden_states @ head.V, head.U
        if head.M is not None:
            hidden_states = F.linear(hidden_states, head.M)
    return vocabulary_loss(hidden_states, weight, labels, bias=head.bias, **options)


def causal_loss(
    model: PreTrainedModel, outputs: ModelOutput, labels: Tensor | None, shift_labels: Tensor | None, **options: Any
) -> ModelOutput:
    """The outputs of a left-to-right language model with the loss of its ``loss_function``, where there are labels.

    Args:
        model: The model.
        outputs: With the logits, without a loss.
        labels: ``(batch, length)``, not shifted.
        shift_labels: ``(batch, length)``, the label of each position, in the place of ``labels``.
        options: Others of the loss function; those that are ``None`` are not passed on.
    """
    if labels is None and shift_labels is None:
        return outputs
    if shift_labels is not None:
        options["shift_labels"] = shift_labels.contiguous()  # may be a part of longer ones
    given = {name: value for name, value in options.items() if value is not None}
    loss = model.loss_function(outputs.logits, labels, vocab_size=model.config.vocab_size, **given)
    return with_loss(outputs, loss)


def with_loss(outputs: ModelOutput, loss: Tensor) -> ModelOutput:
    """The outputs of a model that computed no loss, with one, which comes first where outputs become a tuple."""
    return type(outputs)(loss=loss, **outputs)
