"""Which matrices of a transformer are held as products, at which ranks, and how their factors start."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fnl.spectral import check_method, check_rank


@dataclass(frozen=True, kw_only=True)
class FactorizationConfig:
    """Ranks of the products of a transformer; ``None`` leaves a matrix dense.

    Args:
        qk_rank: Rank of every head's query-key product ``Q_h K_h^T``; at most the width of a dense head.
        ov_rank: Rank of every head's output-value product ``V_h O_h^T``; at most the width of a dense head.
        ffn_rank: Rank of both feed-forward matrices of a layer.
        embedding_rank: Rank of the word embedding, and of the output matrix that is tied to it.
        init: ``"spectral"`` (Khodak et al. 2021), ``"spectral_ones"`` (Kamalakara et al. 2022) or ``"default"``.

    Raises:
        ValueError: If a rank is below 1 or ``init`` is unknown.
    """

    qk_rank: int | None = None
    ov_rank: int | None = None
    ffn_rank: int | None = None
    embedding_rank: int | None = None
    init: str = "spectral"

    def __post_init__(self) -> None:
        check_method(self.init)
        for option in ("qk_rank", "ov_rank", "ffn_rank", "embedding_rank"):
            rank = getattr(self, option)
            if rank is not None and rank < 1:
                raise ValueError(f"{option} must be at least 1 (or None for a dense matrix), got {rank}")

    def check(self, *, hidden_size: int, num_heads: int, intermediate_size: int, vocab_size: int) -> None:
        """Raise a ``ValueError`` that names the option if a rank does not fit a model of these sizes."""
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads} heads"
            )
        limits = {
            "qk_rank": hidden_size // num_heads,
            "ov_rank": hidden_size // num_heads,
            "ffn_rank": min(hidden_size, intermediate_size),
            "embedding_rank": min(hidden_size, vocab_size),
        }
        for option, limit in limits.items():
            rank = getattr(self, option)
            if rank is not None:
                check_rank(rank, limit, option)
