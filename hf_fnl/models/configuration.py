"""What the configurations of the factorized families share: ranks, their check, and the way to stock ones and back."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PreTrainedConfig

from hf_fnl.surgery.config import RANK_OPTIONS, LayerRank, TransformerRanks
from hf_fnl.utils.suggest import did_you_mean

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
        self.ranks.check(
            head_dim=self.dense_head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.feed_forward_size,
            vocab_size=self.smallest_vocabulary,
            num_layers=self.num_layers_of_ranks,
        )

    def _check_spelling(self, names: Iterable[str]) -> None:
        ours = [*self.rank_options(), "factor_init"]
        for name in names:
            if "rank" in name.split("_") or get_close_matches(name, ours, cutoff=0.8):
                listed = ", ".join(ours)
                if name == "qk_rank":
                    why = "under rotary positions queries and keys are no product"
                    raise TypeError(f"{type(self).__name__} has {listed}, and no qk_rank: {why}")
                raise TypeError(f"{type(self).__name__} has {listed}, got {name}{did_you_mean(name, ours)}")

    @property
    def ranks(self) -> TransformerRanks:
        """The fields that say ranks."""
        ranks = {option: getattr(self, option) for option in self.rank_options()}
        return TransformerRanks(**ranks, init=self.factor_init)

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
        return [option for option in RANK_OPTIONS if option in ours]

    def to_dense(self) -> PreTrainedConfig:
        """Return the configuration of the stock model of the same sizes."""
        ours = {field.name for field in fields(self)} - {field.name for field in fields(self.dense_class)}
        values: dict[str, Any] = self.to_dict()  # type: ignore[attr-defined]
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
        layers = [self.ranks.of_layer(number) for number in range(self.num_layers_of_ranks)]
        widths = {max(rank or self.dense_head_dim for rank in (layer.qk, layer.ov)) for layer in layers}
        if len(widths) != 1:
            raise AttributeError(f"heads are {', '.join(map(str, sorted(widths)))} wide, so they have no one head_dim")
        return widths.pop()
