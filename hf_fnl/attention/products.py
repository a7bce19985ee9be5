"""Products of a model: matrices that it holds only as factors, and views of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TypeAlias

from torch import Tensor, nn

import hf_fnl.math.factors as functional
import hf_fnl.math.tensors as tensors

Source: TypeAlias = nn.Module | Mapping[str, Tensor]  # a model, or its parameters by name


@dataclass(frozen=True)
class Factor:
    """One factor of a product, as a part of a parameter.

    Args:
        name: Name of the parameter in ``model.named_parameters()``.
        heads: How many heads lie side by side: ``(heads,)``, or ``(key_value_heads, group)`` where heads are grouped;
            the factor that a group shares has ``(key_value_heads, 1)``. ``None`` where there are no heads.
        dim: Dimension of the parameter along which heads lie: 0 for a query weight ``(heads * r, m)``, 1 for the weight
            of an attention's output, ``(m, heads * r)``.
        section: First index and length along ``dim`` of the part of the parameter that is meant; ``None`` for all.
    """

    name: str
    heads: tuple[int, ...] | None = None
    dim: int = 0
    section: tuple[int, int] | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The factor as a view of its parameter: ``(m, r)``, or ``(*heads, m, r)``. Writing to it writes there."""
        if self.heads is None:
            return parameter
        part = parameter if self.section is None else parameter.narrow(self.dim, *self.section)
        part = part.unflatten(self.dim, (*self.heads, -1))
        return part.mT if self.dim == 0 else part.movedim(0, -2)

    def overlaps(self, other: Factor) -> bool:
        """Whether both hold some element of the same parameter."""
        if self.name != other.name or self.section is None or other.section is None or self.dim != other.dim:
            return self.name == other.name
        (start, length), (other_start, other_length) = self.section, other.section
        return start < other_start + other_length and other_start < start + length


@dataclass(frozen=True)
class Product:
    """A matrix, or the kernel of a convolution, that a model holds only as factors.

    Args:
        name: Name of the module that holds it, followed by the kind for the products of an attention.
        kind: ``"linear"``, ``"embedding"``, ``"conv"``, ``"qk"`` (per head ``Q_h K_h^T``), ``"ov"`` (per head
            ``V_h O_h^T``) or ``"tensor"`` (a kernel held as the cores of a tensor decomposition). Those of an attention
            are products of the weights: where it rotates or normalizes queries and keys, its scores are no longer
            ``x Q_h K_h^T x^T``.
        places: Where the factors lie, in the order in which they are multiplied.
        part: Where in the model it is: ``"encoder"``, ``"decoder"`` or ``"cross"`` for cross-attentions; ``None`` where
            there are no such parts, or if several share it.
    """

    name: str
    kind: str
    places: tuple[Factor, ...]
    part: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} of {self.name}: {', '.join(self.parameter_names)}"

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold the factors, each once."""
        return tuple(dict.fromkeys(factor.name for factor in self.places))

    def factors(self, source: Source) -> tuple[Tensor, ...]:
        """The factors as views of the parameters of ``source``, a model or a mapping from names to parameters.

        ``(U, V)`` or ``(U, M, V)`` of shapes ``(m, r)``, ``(r, r)`` and ``(n, r)``, led by the heads of an attention;
        where these are grouped by ``(key_value_heads, group)`` for query and output, and ``(key_value_heads, 1)`` for
        what a group shares. For a tensor the cores, as :mod:`hf_fnl.math.tensors` describes them.
        """
        return tuple(factor.view(_parameter(source, factor.name)) for factor in self.places)

    @property
    def is_tensor(self) -> bool:
        """Whether the factors are the cores of a tensor."""
        return self.kind == "tensor"

    @property
    def _maths(self) -> ModuleType:
        return tensors if self.is_tensor else functional

    def matrix(self, source: Source) -> Tensor:
        """The product itself, ``(m, n)`` or ``(*heads, m, n)``; for a tensor the kernel as ``(out, in * kh * kw)``.

        Large: for tests and merging, not for training.
        """
        W = self._maths.product(*self.factors(source))
        return W.flatten(1) if self.is_tensor else W

    def squared_frobenius_norm(self, source: Source) -> Tensor:
        """``||W||_F^2``, one value for each head of an attention product; differentiable."""
        return self._maths.squared_frobenius_norm(*self.factors(source))

    def frobenius_norm(self, source: Source) -> Tensor:
        """``||W||_F``, one value for each head of an attention product."""
        return self.squared_frobenius_norm(source).clamp(min=0).sqrt()

    def decay_gradients(self, source: Source) -> tuple[Tensor, ...]:
        """Gradients of ``||W||_F^2 / 2`` with respect to every factor, summed over the heads that share it."""
        return self._maths.decay_gradients(*self.factors(source))

    def singular_values(self, source: Source) -> Tensor:
        """Singular values of :meth:`matrix` that can differ from zero, descending, for each head of an attention."""
        return self._maths.singular_values(*self.factors(source))


def beside_factors(products: Iterable[Product], source: Source) -> dict[str, Tensor]:
    """Return what parameters hold beside factors, as GPT-2's fused projection does beside the values of ``ov``.

    Returns:
        Such parameters by name, copied, with all factors set to zero; differentiable. None that is a factor from end
        to end.
    """
    by_name: dict[str, list[Factor]] = {}
    for factor in (factor for each in products for factor in each.places):
        by_name.setdefault(factor.name, []).append(factor)
    rest = {}
    for name, factors in by_name.items():
        parameter = _parameter(source, name)
        if sum(factor.view(parameter).numel() for factor in factors) < parameter.numel():
            rest[name] = parameter.clone()
            for factor in factors:
                factor.view(rest[name]).zero_()
    return rest


def _parameter(source: Source, name: str) -> Tensor:
    return source.get_parameter(name) if isinstance(source, nn.Module) else source[name]
