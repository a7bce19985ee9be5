"""Base classes of the factorized configurations: ranks, their check, and the way to stock ones and back."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from hf_fnl.attention.selectors import Selector
from hf_fnl.math.spectral import check_method, check_rank
from hf_fnl.surgery.record import QUANT_METHOD, method_of
from hf_fnl.utils.suggest import did_you_mean

LayerRank = int | list[int | None] | None  # one for all layers, or one for each

_OF_A_CLASS = {"model_type", "architectures", "transformers_version"}  # what a configuration of another class has anew


@dataclass(kw_only=True, repr=False)
class FactorizedConfig:
    """Mixin before a stock configuration: the fields that say ranks.

    Args:
        ov_rank: Rank of every head's output-value product, up to the width of a dense head; ``None`` leaves the stock
            projections. This and ``ffn_rank`` are numbers, or lists with one entry for each layer. Spectral
            initialization cuts the dense head's product to this rank; the authors' code balances the product of a head
            of this width, which the width of a dense head does here.
        ffn_rank: Rank of the feed-forward matrices of a layer, up to the smaller of their sides; ``None`` leaves them
            dense.
        embedding_rank: Rank of the word embedding and of the output matrix tied to it; ``None`` leaves them dense.
        factor_init: ``"spectral"`` (Khodak et al. 2021), ``"spectral_ones"`` (Kamalakara et al. 2022), ``"he"`` (each
            factor with the variance 2 / fan-in: the baseline of the latter) or ``"default"`` (each factor at
            ``initializer_range``, so that products start far smaller than dense weights); or one of them for each
            selector, such as ``{"linear": "spectral"}``, and ``"default"`` for the rest.

    Raises:
        TypeError: If an option is misspelt, for what a configuration does not know it keeps as it is.
        ValueError: If a rank does not fit the model or ``factor_init`` is unknown.
    """

    dense_class: ClassVar[type[PreTrainedConfig]]
    if TYPE_CHECKING:
        hidden_size: int
        num_attention_heads: int
        num_hidden_layers: int
        intermediate_size: int
        vocab_size: int

    ov_rank: LayerRank = None
    ffn_rank: LayerRank = None
    embedding_rank: int | None = None
    factor_init: str | dict[str, str] = "spectral"

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_spelling(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        for selector in () if isinstance(self.factor_init, str) else self.factor_init:
            Selector.parse(selector, "a key of factor_init")
        for method in [self.factor_init] if isinstance(self.factor_init, str) else self.factor_init.values():
            check_method(method)
        self._check_ranks()

    def _check_ranks(self) -> None:
        """Raise a ``ValueError`` that names the option if a rank does not fit the model."""
        limits = {
            "qk_rank": self.dense_head_dim,
            "ov_rank": self.dense_head_dim,
            "ffn_rank": min(self.hidden_size, self.feed_forward_size),
            "qkv_rank": self.hidden_size,
            "embedding_rank": min(self.hidden_size, self.smallest_vocabulary),
        }
        for option in self.rank_options():
            ranks, count = getattr(self, option), self.num_layers_of_ranks
            if isinstance(ranks, list) and len(ranks) != count:
                raise ValueError(f"{option} needs a number or one for each of {count} layers, got {len(ranks)}")
            for rank in ranks if isinstance(ranks, list) else [ranks]:
                if rank is not None:
                    check_rank(rank, limits[option], option)

    def _check_spelling(self, names: Iterable[str]) -> None:
        ours = [*self.rank_options(), "factor_init"]
        for name in names:
            if "rank" in name.split("_") or get_close_matches(name, ours, cutoff=0.8):
                listed = ", ".join(ours)
                if name == "qk_rank":
                    why = "under rotary positions queries and keys are no product"
                    raise TypeError(f"{type(self).__name__} has {listed}, and no qk_rank: {why}")
                raise TypeError(f"{type(self).__name__} has {listed}, got {name}{did_you_mean(name, ours)}")

    def rank_in_layer(self, option: str, number: int) -> int | None:
        """Return the rank that a field gives to the layer of a number, from 0; ``None`` where it is dense."""
        ranks = getattr(self, option)
        return ranks[number] if isinstance(ranks, list) else ranks

    def method_of(self, kind: str, part: str | None) -> str:
        """Return how factors of a kind of product start in a part of the model, by ``factor_init``."""
        if isinstance(self.factor_init, str):
            return self.factor_init
        return self.factor_init.get(f"{kind}:{part}", self.factor_init.get(kind, "default"))

    @property
    def dense_head_dim(self) -> int:
        """Width of a head of the stock model: its ``head_dim`` where it has that field, as Llama and its kin do.

        Raises:
            ValueError: If heads do not share the hidden size out.
        """
        if (head_dim := vars(self).get("head_dim")) is not None:
            return int(head_dim)
        hidden_size, num_heads = self.hidden_size, self.num_attention_heads
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {hidden_size} and {num_heads} heads"
            )
        return hidden_size // num_heads

    @property
    def feed_forward_size(self) -> int:
        """Width inside of a feed-forward block."""
        return self.intermediate_size

    @property
    def smallest_vocabulary(self) -> int:
        """Rows of the smallest word embedding."""
        return self.vocab_size

    @property
    def num_layers_of_ranks(self) -> int:
        """Entries of a list of ranks."""
        return self.num_hidden_layers

    @classmethod
    def rank_options(cls) -> list[str]:
        """Return the names of the fields that are ranks."""
        ours = {field.name for field in fields(cls)}
        return [option for option in ("qk_rank", "ov_rank", "ffn_rank", "qkv_rank", "embedding_rank") if option in ours]

    def to_dense(self) -> PreTrainedConfig:
        """Return the configuration of the stock model of the same sizes."""
        ours = {field.name for field in fields(self)} - {field.name for field in fields(self.dense_class)}
        values: dict[str, Any] = self.to_dict()  # type: ignore[attr-defined]
        if method_of(values.get("quantization_config", {})) == QUANT_METHOD:  # the record of surgery on a model of ours
            ours.add("quantization_config")
        return self.dense_class(**{key: value for key, value in values.items() if key not in ours | _OF_A_CLASS})

    @classmethod
    def from_dense(cls, dense: PreTrainedConfig, **ranks: Any) -> Any:
        """Return this configuration with the sizes of a stock one, or of one of this class."""
        values = {key: value for key, value in dense.to_dict().items() if key not in _OF_A_CLASS}
        return cls(**{**values, **ranks})


@dataclass(kw_only=True, repr=False)
class NarrowHeadsConfig(FactorizedConfig):
    """The same for a family whose queries and keys are factors, too, and whose heads are as wide as their rank.

    Args:
        qk_rank: Rank of every head's query-key product, up to the width of a dense head, as ``ov_rank``, from which it
            may differ.
    """

    qk_rank: LayerRank = None

    @property
    def head_dim(self) -> int:
        """Width of a head's queries, keys and values, by which Transformers lays out some caches before it has any.

        Raises:
            AttributeError: If layers have several widths.
        """
        widths = {
            max(self.rank_in_layer(option, number) or self.dense_head_dim for option in ("qk_rank", "ov_rank"))
            for number in range(self.num_layers_of_ranks)
        }
        if len(widths) != 1:
            raise AttributeError(f"heads are {', '.join(map(str, sorted(widths)))} wide, so they have no one head_dim")
        return widths.pop()
