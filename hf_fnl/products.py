"""Products in a model: every matrix that it holds only as factors.

A product names its factors; it never keeps their tensors, so a wrapper may replace the parameters of a model (as
``accelerate`` does under FSDP) and the products stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_fnl.functional import product, squared_frobenius_norm
from hf_fnl.layers import Factorized

KINDS = ("linear", "embedding", "qk", "ov")


@dataclass(frozen=True)
class Factor:
    """Where one factor of a product lives.

    Args:
        name: Name of the parameter in ``model.named_parameters()``.
        num_heads: Heads that the parameter holds side by side; ``None`` where it is the factor itself.
        heads_first: Whether the parameter is ``(heads * r, m)``, as a query weight, or ``(m, heads * r)``, as the
            weight of an attention's output.
    """

    name: str
    num_heads: int | None = None
    heads_first: bool = True

    def view(self, parameter: Tensor) -> Tensor:
        """The factor as a view of its parameter: ``(m, r)``, or ``(heads, m, r)``. Writing to it writes there."""
        if self.num_heads is None:
            return parameter
        if self.heads_first:
            return parameter.unflatten(0, (self.num_heads, -1)).mT
        return parameter.unflatten(1, (self.num_heads, -1)).transpose(0, 1)


@dataclass(frozen=True)
class Product:
    """A matrix that a model holds only as factors.

    Args:
        name: Name of the module that holds it, followed by the kind for the products of an attention.
        kind: ``"linear"``, ``"embedding"``, ``"qk"`` (per head ``Q_h K_h^T``) or ``"ov"`` (per head ``V_h O_h^T``).
        parts: The factors in the order in which they are multiplied.
    """

    name: str
    kind: str
    parts: tuple[Factor, ...]

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold the factors."""
        return tuple(part.name for part in self.parts)

    def factors(self, source: nn.Module | Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The factors as views of the parameters of ``source``, a model or a mapping from names to parameters.

        Returns:
            ``(U, V)`` or ``(U, M, V)`` of shapes ``(m, r)``, ``(r, r)`` and ``(n, r)``; attention products have a
            leading dimension, the heads.
        """
        lookup = source.get_parameter if isinstance(source, nn.Module) else source.__getitem__
        return tuple(part.view(lookup(part.name)) for part in self.parts)

    def matrix(self, source: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """The product itself, ``(m, n)`` or ``(heads, m, n)``. Large: for tests and merging, not for training."""
        return product(*self.factors(source))

    def frobenius_norm(self, source: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """``||W||_F``, one value for each head of an attention product, from the Gram matrices of the factors."""
        return squared_frobenius_norm(*self.factors(source)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class AttentionProjections:
    """The four linear layers of an attention, as an adapter found them."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    num_heads: int


def _bert_attention(module: nn.Module) -> AttentionProjections | None:
    """BERT's layout, shared by RoBERTa, ELECTRA and others: ``self.query/key/value`` and ``output.dense``."""
    inner: Any = getattr(module, "self", None)
    projections: list[Any] = [getattr(inner, name, None) for name in ("query", "key", "value")]
    projections.append(getattr(getattr(module, "output", None), "dense", None))
    if not all(isinstance(projection, nn.Linear) for projection in projections):
        return None
    query, key, value, output = projections
    return AttentionProjections(query, key, value, output, inner.num_attention_heads)


ATTENTION_ADAPTERS: list[Callable[[nn.Module], AttentionProjections | None]] = [_bert_attention]


def find_products(model: nn.Module, kinds: Iterable[str] | None = None) -> list[Product]:
    """List the products of a model, stock or ours, in the order of its modules.

    Parameters that are tied appear once, under the name that ``named_parameters`` gives them.

    Args:
        model: Any module; unwrapped, so that names are those of its own ``named_parameters``.
        kinds: Any of ``"linear"``, ``"embedding"``, ``"qk"``, ``"ov"``; all that the model has unless given.

    Raises:
        ValueError: If a kind is unknown, or the model has no product of a kind that was asked for, or none at all.
    """
    wanted = KINDS if kinds is None else tuple(kinds)
    if unknown := sorted(set(wanted) - set(KINDS)):
        raise ValueError(f"unknown kind of product {', '.join(unknown)}; known are {', '.join(KINDS)}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[tuple[str, ...], Product] = {}
    for candidate in _all_products(model, names):
        found.setdefault(candidate.parameter_names, candidate)
    present = {p.kind for p in found.values()}
    if missing := [kind for kind in wanted if kind not in present and (kinds is not None or not present)]:
        raise ValueError(
            f"{type(model).__name__} has no product of kind {', '.join(missing)}; "
            f"it has: {', '.join(sorted(present)) or 'none'}"
        )
    return [p for p in found.values() if p.kind in wanted]


def _all_products(model: nn.Module, names: dict[int, str]) -> Iterator[Product]:
    for path, module in model.named_modules():
        if isinstance(module, Factorized):
            parts = tuple(Factor(names[id(p)]) for p in module.factors())
            yield Product(path, module.kind, parts)
        for adapter in ATTENTION_ADAPTERS:
            if (attention := adapter(module)) is not None:
                yield from _attention_products(path, attention, names)
                break


def _attention_products(path: str, attention: AttentionProjections, names: dict[int, str]) -> Iterator[Product]:
    def factor(projection: nn.Module, heads_first: bool = True) -> Factor:
        return Factor(names[id(projection.weight)], attention.num_heads, heads_first)

    yield Product(f"{path}.qk", "qk", (factor(attention.query), factor(attention.key)))
    yield Product(f"{path}.ov", "ov", (factor(attention.value), factor(attention.output, heads_first=False)))
