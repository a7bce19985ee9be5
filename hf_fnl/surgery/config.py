"""Options: how ranks are chosen, and which layers of any model are factorized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral

from hf_fnl.attention.selectors import ATTENTION_KINDS
from hf_fnl.layers.conv import CONV_SCHEMES
from hf_fnl.math.spectral import DRAWN_METHODS, check_method
from hf_fnl.math.tensors import TENSOR_SCHEMES
from hf_fnl.utils.suggest import did_you_mean

RULES = ("rank", "rank_scale", "ratio", "energy", "budget", "layer_ratio")  # each says ranks by itself
LAYER_KINDS = ("linear", "embedding", "conv")
SURGERY_KINDS = (*LAYER_KINDS, *ATTENTION_KINDS)
KINDS = ("qk", "ov", "qkv", "ffn", *LAYER_KINDS)  # of our classes, and of layers


@dataclass(frozen=True, kw_only=True)
class RankRule:
    """Rule by which ranks are chosen; exactly one of the first six options is given.

    Where a rule other than ``rank`` and ``rank_scale`` asks for so high a rank that the factors would hold as many
    parameters as the matrix, the matrix stays dense.

    Args:
        rank: The same rank everywhere.
        rank_scale: Share of the largest rank: of ``min(m, n)``, or of the width of a head.
        ratio: Share of all parameters of the model that stay at most, those of dense layers included, as a file size
            shows it, by one scale for all ranks. Tied weights count once.
        energy: Every product gets the smallest rank that keeps this share of ``||W||_F^2``.
        budget: As ``ratio``, but given where spectra or the loss need it.
        layer_ratio: As ``ratio``, of the parameters of the chosen matrices alone.
        multiple_of: Ranks are multiples of this, which hardware likes to be 8 or 64.

    Raises:
        ValueError: If none or several are given, or one is out of range.
    """

    rank: int | None = None
    rank_scale: float | None = None
    ratio: float | None = None
    energy: float | None = None
    budget: float | None = None
    layer_ratio: float | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        given = {name: value for name in RULES if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(RULES)}; got {str(self) or 'none'}")
        ((name, value),) = given.items()
        if name != "rank" and not 0 < value <= self._largest(name):
            raise ValueError(f"{name} must be above 0 and at most {self._largest(name)}, got {value}")
        for name in ("rank", "multiple_of"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
                raise ValueError(f"{name} must be an integer and at least 1, got {value!r}")

    def _largest(self, option: str) -> float:
        return 1

    def __str__(self) -> str:
        given = {name: getattr(self, name) for name in RULES}
        return ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class FactorizationConfig(RankRule):
    """Which layers of a model are held as products, at which ranks, and how their factors start.

    The largest rank, which ``rank_scale`` is a share of, is here ``min(m, n)``. That is ``min(in * kh * kw, out)`` for
    a convolution with ``conv_scheme="channel"`` (Kamalakara et al. 2022, Sec. 3.1.2); with ``"spatial"`` it is the
    rows of the kernel's matrix, ``out * kh`` (Khodak et al. 2021, Sec. 3), and a rank that this makes higher than the
    matrix can have is lowered to that, unless ``overcomplete``.

    Args:
        kinds: Any of ``"linear"`` (``torch.nn.Linear`` and GPT-2's ``Conv1D``), ``"embedding"``, ``"conv"``, and of
            ``"qk"`` and ``"ov"``: the products of every head of an attention, whose largest rank is the width of a
            head. Patterns mean them by the name of the attention, as it is or followed by ``.qk`` or ``.ov``.
        include: Patterns of module names, as for a shell: ``"*.mlp.*"``. One of them has to match. Layers of classes
            derived from stock ones, with the same forward pass, need another pattern than ``"*"``.
        exclude: Patterns of names that are left dense.
        init: ``"spectral"``, ``"spectral_ones"`` or, for a model that has not been trained, ``"default"`` or ``"he"``;
            see :class:`~hf_fnl.layers.base.FactorizedMatrix`.
        conv_scheme: ``"spatial"``, a column of the kernel after a row (Khodak et al. 2021); ``"channel"``, the kernel
            into ``rank`` channels and then 1-by-1 (Kamalakara et al. 2022); or ``"tt"`` or ``"tucker"``, the kernel as
            a tensor, see :class:`~hf_fnl.layers.TensorizedConv2d`.
        overcomplete: Allows ranks above those of the matrices, for training that is multiplied back afterwards, and a
            ``rank_scale`` above 1. Factors are drawn: ``init`` is ``"default"`` or ``"he"``.
        deep: Holds ``U M V^T`` with ``M`` starting as the identity.

    The three ways of Khodak et al. 2021, Sec. 5, to train an overcomplete network are ``rank_scale=1`` ("full"),
    ``rank_scale=1, deep=True`` ("deep") and ``rank_scale=3`` ("wide"), all of them with ``overcomplete=True``.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    kinds: Sequence[str] = ("linear",)
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    init: str = "spectral"
    conv_scheme: str = "spatial"
    overcomplete: bool = False
    deep: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_method(self.init)
        for option in ("kinds", "include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise ValueError(f"{option} must be a sequence of names, got the string {getattr(self, option)!r}")
        unknown = sorted(set(self.kinds) - set(SURGERY_KINDS))
        if unknown or not self.kinds:
            hint = did_you_mean(unknown[0], SURGERY_KINDS) if unknown else ""
            known = ", ".join(SURGERY_KINDS)
            raise ValueError(f"kinds must be any of {known}, got {', '.join(unknown) or 'none'}{hint}")
        schemes = (*CONV_SCHEMES, *TENSOR_SCHEMES)
        if self.conv_scheme not in schemes:
            hint = did_you_mean(self.conv_scheme, schemes)
            raise ValueError(f"conv_scheme must be one of {', '.join(schemes)}, got {self.conv_scheme!r}{hint}")
        if self.conv_scheme in TENSOR_SCHEMES:
            self._check_tensors()
        plain = [kind for kind in ("embedding", *ATTENTION_KINDS) if kind in self.kinds]
        if plain and (self.overcomplete or self.deep):
            raise ValueError(f"overcomplete and deep are for linear layers and convolutions, not for kind {plain[0]!r}")
        if self.overcomplete and self.init not in DRAWN_METHODS:
            raise ValueError(f"overcomplete factors are drawn: set init='default' or 'he', got {self.init!r}")
        if self.overcomplete and self.rank is None and self.rank_scale is None:
            raise ValueError("overcomplete needs rank or rank_scale: other rules look for fewer parameters")

    def _check_tensors(self) -> None:
        given = {
            "kinds other than conv": set(self.kinds) != {"conv"},
            "deep": self.deep,
            "overcomplete": self.overcomplete,
            "init='spectral_ones'": self.init == "spectral_ones",
            "energy": self.energy is not None,
            "budget": self.budget is not None,
        }
        if wrong := [option for option, is_given in given.items() if is_given]:
            raise ValueError(f"conv_scheme={self.conv_scheme!r} factorizes tensors, and does not go with {wrong[0]}")

    def _largest(self, option: str) -> float:
        return math.inf if self.overcomplete and option == "rank_scale" else super()._largest(option)

    def matches(self, name: str) -> bool:
        """Return whether a module of this name is meant."""
        return _matches(name, self.include) and not self.excludes(name)

    def matches_explicitly(self, name: str) -> bool:
        """Return whether a module of this name is meant by a pattern other than ``"*"``."""
        return self.matches(name) and _matches(name, [pattern for pattern in self.include if pattern != "*"])

    def excludes(self, name: str) -> bool:
        """Return whether a module of this name is excluded."""
        return _matches(name, self.exclude)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
