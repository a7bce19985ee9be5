"""Base classes of factorized layers: modules that hold their weight as factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hf_fnl.layers.weight import HoldsFactors
from hf_fnl.math.factors import product
from hf_fnl.math.spectral import (
    DRAWN_METHODS,
    check_method,
    check_rank,
    check_split_method,
    draw_factor,
    spectral_init,
)

if TYPE_CHECKING:
    from typing_extensions import Self


Dense = TypeVar("Dense", bound=nn.Module)


class Factorized(HoldsFactors):
    """A layer that holds factors in the place of a weight.

    Args:
        rank: The rank of the factors.
        init: One of ``hf_fnl.math.spectral.INIT_METHODS``.

    Attributes:
        kind: What kind of product the layer is; see :class:`~hf_fnl.attention.Product`.
        dense_classes: Classes of the dense layers whose place it takes.
        shape: Shape of the product of the factors.
        bias: The bias, ``None`` where there is none.

    Raises:
        ValueError: If ``init`` is unknown.
    """

    kind: ClassVar[str]
    dense_classes: ClassVar[tuple[type[nn.Module], ...]]
    shape: tuple[int, ...]
    bias: nn.Parameter | None

    def __init__(self, rank: int, *, init: str = "spectral") -> None:
        super().__init__()
        check_method(init)
        self.rank, self.init = rank, init

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense: Any, rank: int, **options: Any) -> Self:
        """Split the weight of a dense layer, which is left as it is.

        Args:
            dense: The layer to split; its options, device, dtype, memory format, bias and ``requires_grad`` carry over.
                On the meta device only the shapes do.
            rank: Rank of the factors, at most that of the weight.
            **options: As the constructor takes them: ``init``, which is ``"spectral"`` or ``"spectral_ones"``, and
                where the class has them ``scheme``, ``deep`` and ``overcomplete``.

        Raises:
            ImportError: If a kernel is to be decomposed and TensorLy is not installed.
            ValueError: If ``rank`` or an option is not allowed, the weight is not finite, pruned or parametrized, or
                ``dense`` computes what factors cannot stand for, as a layer of another class, a depthwise convolution
                or an embedding with ``max_norm``.
        """
        check_split_method(options.get("init", "spectral"))
        layer = cls.empty_like(dense, rank, **options)
        layer.set_factors_(layer.split(dense.weight))
        layer.set_bias_(getattr(dense, "bias", None))
        return layer

    @classmethod
    def empty_like(cls, dense: Any, rank: int, **options: Any) -> Self:
        """As :meth:`from_dense` with any ``init``, but for the parameters, which are not set yet."""
        cls._check_dense(dense)
        given = {**cls.options_like(dense), **options, "device": "meta", "dtype": dense.weight.dtype}
        return cls(rank=rank, **given).placed_like(dense)

    @classmethod
    def _check_dense(cls, dense: nn.Module) -> None:
        if not any(computes_as(type(dense), stock) for stock in cls.dense_classes):
            wanted = " or ".join(stock.__name__ for stock in cls.dense_classes)
            raise ValueError(f"{cls.__name__} takes the place of a {wanted} with its forward pass, got {dense}")
        if "weight" not in dict(dense.named_parameters(recurse=False)):
            raise ValueError(f"the weight of {dense} is pruned or parametrized: make it a plain one first")

    @classmethod
    def options_like(cls, dense: Any) -> dict[str, Any]:
        """Return the constructor's arguments, but for the rank, of a layer in the place of ``dense``."""
        raise NotImplementedError

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Values for :meth:`factors` from the dense layer's weight."""
        raise NotImplementedError

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        return self.shape

    def draw_(self, weight: Tensor) -> None:
        """Fill a weight as the dense layer's own initialization would, :class:`torch.nn.Linear`'s unless overridden."""
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def fresh_factors(self, draw: Callable[[Tensor], object] | None = None) -> tuple[Tensor, ...]:
        """New initial values for :meth:`factors`, by the layer's ``init``.

        Args:
            draw: Fills a dense weight in place; :meth:`draw_` unless given.
        """
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors anew, then the bias as :class:`torch.nn.Linear` does; nothing on the meta device."""
        if self.factors()[0].is_meta:
            return
        self.set_factors_(self.fresh_factors())
        if self.bias is not None:
            fan_in = math.prod(self.dense_shape) // len(self.bias)
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def add_bias_(self, size: int | None) -> None:
        """Add a bias that is not set yet, in the dtype and on the device of the factors, or none."""
        bias = None if size is None else nn.Parameter(self.factors()[0].detach().new_empty(size))
        self.register_parameter("bias", bias)

    def placed_like(self, dense: nn.Module) -> Self:
        """Take the device, the mode and ``requires_grad`` of ``dense``; the parameters are not set yet."""
        weight = dense.get_parameter("weight")
        layer = self if weight.is_meta else self.to_empty(device=weight.device)
        for factor in layer.factors():
            factor.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(dense.get_parameter("bias").requires_grad)
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """The plain layer with the factors multiplied out; this layer is left as it is."""
        raise NotImplementedError

    @torch.no_grad()
    def fill_dense_(self, dense: Dense) -> Dense:
        """Give a dense layer the product, the bias and the mode; its weight is trained if a factor is."""
        factors, weight = self.factors(), dense.get_parameter("weight")
        if not factors[0].is_meta:
            weight.copy_(self.dense_weight())
        weight.requires_grad_(any(factor.requires_grad for factor in factors))
        if self.bias is not None:
            if not self.bias.is_meta:
                dense.get_parameter("bias").copy_(self.bias)
            dense.get_parameter("bias").requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    @torch.no_grad()
    def set_factors_(self, values: tuple[Tensor, ...]) -> None:
        """Copy ``values`` into the factors, in the order of :meth:`factors`."""
        for parameter, value in zip(self.factors(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def set_bias_(self, values: Tensor | None) -> None:
        """Copy ``values`` into the bias, if there is one."""
        if self.bias is not None and values is not None:
            self.bias.copy_(values)


def computes_as(dense: type[nn.Module], stock: type[nn.Module]) -> bool:
    """Whether a class is a stock class, or a subclass with the same forward pass."""
    methods = ("forward", "_conv_forward", "__call__", "__getattr__")
    return issubclass(dense, stock) and all(getattr(dense, m, None) is getattr(stock, m, None) for m in methods)


def factorized_layers(model: nn.Module) -> list[Factorized]:
    """List the factorized layers of a model; layers that share factors count once."""
    layers: dict[Tensor, Factorized] = {}
    for module in model.modules():
        if isinstance(module, Factorized):
            layers.setdefault(module.factors()[0], module)
    return list(layers.values())


class FactorizedMatrix(Factorized):
    """A layer whose matrix ``W`` of shape ``(m, n)`` is held as ``U V^T``, or as ``U M V^T`` when ``deep``.

    Args:
        shape: Shape ``(m, n)`` of the dense matrix.
        rank: Columns of the factors. At most ``min(m, n)``, any number where ``overcomplete``.
        init: ``"spectral"`` and ``"spectral_ones"`` split a weight that is drawn as the dense layer's. The others draw
            ``U`` as the weight of ``Linear(rank, m)`` and ``V^T`` as that of ``Linear(n, rank)``: ``"default"`` as the
            dense layer's, which at one small standard deviation ``s``, as BERT's, makes products of entries at
            ``s^2 sqrt(rank)``, far below those of a dense weight; ``"he"`` by the rule of He et al. 2015 for the fan-in
            of each, the baseline of Kamalakara et al. 2022. Overcomplete layers are drawn by ``"default"`` or ``"he"``.
        deep: Adds a middle factor ``M (rank, rank)``, which starts as the identity (Khodak et al. 2021, Sec. 5).
        overcomplete: Allows a rank above ``min(m, n)``, for training that is multiplied back afterwards.

    Raises:
        ValueError: If ``rank`` or ``init`` is not allowed.
    """

    shape: tuple[int, int]

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        *,
        init: str = "spectral",
        deep: bool = False,
        overcomplete: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rank, init=init)
        m, n = shape
        if overcomplete and rank > min(m, n):
            self.init = init if init in DRAWN_METHODS else "default"
        else:
            check_rank(rank, min(m, n))
        self.shape, self.overcomplete = shape, overcomplete
        self.U = nn.Parameter(torch.empty(m, rank, device=device, dtype=dtype))
        if deep:
            self.M = nn.Parameter(torch.empty(rank, rank, device=device, dtype=dtype))
        else:
            self.register_parameter("M", None)
        self.V = nn.Parameter(torch.empty(n, rank, device=device, dtype=dtype))

    def factors(self) -> tuple[Tensor, ...]:
        """``(U, V)`` or ``(U, M, V)``."""
        return (self.U, self.V) if self.M is None else (self.U, self.M, self.V)

    def composed(self) -> Tensor:
        """The dense matrix, shape ``(m, n)``."""
        return product(*self.factors())

    def weight_from(self, *factors: Tensor) -> Tensor:
        """The dense layer's weight as a function of the factors."""
        return product(*factors)

    @torch.no_grad()
    def fresh_factors(self, draw: Callable[[Tensor], object] | None = None) -> tuple[Tensor, ...]:
        """As in :class:`Factorized`."""
        draw, (m, n) = draw or self.draw_, self.shape
        if self.init in DRAWN_METHODS:
            Vt, U = self.V.new_empty(self.rank, n), self.U.new_empty(m, self.rank)
            for factor in (Vt, U):
                draw_factor(factor, draw, self.init)
            return self.with_identity(U, Vt.mT.contiguous())
        weight = self.U.new_empty(m, n)
        draw(weight)
        return self.with_identity(*spectral_init(weight, self.rank, self.init))

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The leading singular triples of the weight, shared out between ``U`` and ``V``."""
        return self.with_identity(*spectral_init(self.matrix_of(weight), self.rank, self.init))

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The dense layer's weight as the matrix ``(m, n)``."""
        return weight

    def with_identity(self, U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
        """``(U, V)``, or ``(U, I, V)`` where the layer is deep."""
        return (U, V) if self.M is None else (U, torch.eye(self.rank, dtype=U.dtype, device=U.device), V)
