"""Output matrices over a vocabulary that are tied to a word embedding, which may be factorized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_fnl.layers import FactorizedLinear
from hf_fnl.models.attention import draw_normal_, is_loaded
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.vocabulary_loss import vocabulary_loss


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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        tied = self.config.tie_word_embeddings and module is self.get_output_embeddings()
        if tied and isinstance(module, FactorizedLinear) and not is_loaded(module.U):
            # Replaced by the embedding's factors right after this. The stock model draws its own all the same, and
            # equal seeds are to give equal weights: draw it too, decompose nothing.
            draw_normal_(module.U.new_empty(module.shape), self.config.initializer_range)
        else:
            super()._init_weights(module)


def head_loss(
    head: nn.Linear | FactorizedLinear,
    hidden_states: Tensor,
    labels: Tensor,
    *,
    table: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of an output matrix, dense or factorized, without all of its logits in memory.

    Args:
        head: The output matrix.
        hidden_states: ``(..., hidden)``.
        labels: ``(...)``, -100 where nothing is to be predicted.
        table: In the place of the weight of a dense ``head``; see :func:`~hf_fnl.models.tied_rows.tied_inputs`.
        num_items_in_batch: As in :func:`~hf_fnl.vocabulary_loss.vocabulary_loss`.
    """
    weight: Tensor = head.weight if table is None else table
    if isinstance(head, FactorizedLinear):
        hidden_states, weight = hidden_states @ head.V, head.U
    return vocabulary_loss(hidden_states, weight, labels, bias=head.bias, num_items_in_batch=num_items_in_batch)
