"""An embedding whose table is a product of factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.layers.base import FactorizedMatrix
from hf_fnl.math.spectral import DRAWN_METHODS


class FactorizedEmbedding(FactorizedMatrix):
    r"""Rows of ``W = U V^T``, shape ``(num_embeddings, embedding_dim)``, looked up in ``U`` and widened by ``V``.

    Args:
        num_embeddings: Size of the vocabulary.
        embedding_dim: Size of an embedding.
        rank: Columns of ``U (num_embeddings, rank)`` and ``V (embedding_dim, rank)``.
        padding_idx: Row that starts as zero and gets no gradient.
        init: ``"spectral"``, ``"spectral_ones"``, ``"default"`` or ``"he"``; see
            :class:`~hf_fnl.layers.base.FactorizedMatrix`.

    Raises:
        ValueError: If ``rank`` or ``init`` is not allowed.
    """

    kind = "embedding"
    dense_classes = (nn.Embedding,)
    # As of the only embeddings that can be factorized, for code that looks rows up as this one would.
    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        init: str = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((num_embeddings, embedding_dim), rank, init=init, device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.add_bias_(None)
        self.reset_parameters()

    def draw_(self, weight: Tensor) -> None:
        """Draw as :class:`torch.nn.Embedding` does."""
        nn.init.normal_(weight)

    @torch.no_grad()
    def fresh_factors(self, draw: Callable[[Tensor], object] | None = None) -> tuple[Tensor, ...]:
        """New initial values of a table whose padding row is zero."""
        draw = draw or self.draw_

        def draw_table(weight: Tensor) -> None:
            draw(weight)
            if self.padding_idx is not None and self.init not in DRAWN_METHODS:
                weight[self.padding_idx] = 0

        U, V = super().fresh_factors(draw_table)
        if self.padding_idx is not None:
            U[self.padding_idx] = 0
        return U, V

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ids of any shape to embeddings of that shape times ``(embedding_dim,)``."""
        return F.linear(F.embedding(input_ids, self.U, self.padding_idx), self.V)

    @classmethod
    def options_like(cls, dense: nn.Embedding) -> dict[str, Any]:
        """Return its sizes; a ``ValueError`` if it rescales its rows in the forward pass or has sparse gradients."""
        if dense.max_norm is not None or dense.scale_grad_by_freq or dense.sparse:
            raise ValueError("an embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be factorized")
        return {name: getattr(dense, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}

    def to_dense(self) -> nn.Embedding:
        """The plain embedding with ``W`` multiplied out; this layer is left as it is."""
        dense = nn.utils.skip_init(
            nn.Embedding,
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            device=self.U.device,
            dtype=self.U.dtype,
        )
        return self.fill_dense_(dense)

    def extra_repr(self) -> str:
        """Sizes, as :class:`torch.nn.Embedding` shows them, and the rank."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{padding}"
