"""Frobenius decay of products, for any torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fnl.attention import Product, beside_factors
from hf_fnl.math.precision import no_autocast
from hf_fnl.optim.groups import by_name, check_factors
from hf_fnl.optim.lamb import Lamb
from hf_fnl.optim.product_decay import ProductDecay
from hf_fnl.optim.sharding import Sharding

MODES = ("penalty", "coupled", "decoupled")


def frobenius_penalty(
    products: Sequence[Product], source: nn.Module | Mapping[str, Tensor], weight_decay: float
) -> Tensor:
    r"""``weight_decay / 2 * sum ||W||_F^2`` over products and heads (Khodak et al. 2021, Def. 3.2).

    What a parameter holds beside factors is penalized as a matrix of its own, so that no part of it goes undecayed.

    Args:
        products: The products, one at least.
        source: The model that holds them, or a mapping from names to parameters.
        weight_decay: The coefficient.

    Returns:
        A differentiable scalar in float32 or better, to be added to the loss.
    """
    if not products:
        raise ValueError("a Frobenius penalty needs at least one product, got none")
    with no_autocast(products[0].factors(source)[0].device):
        squares = [product.squared_frobenius_norm(source).sum() for product in products]
    beside = beside_factors(products, source).values()
    squares += [rest.square().sum(dtype=torch.promote_types(rest.dtype, torch.float32)) for rest in beside]
    return weight_decay / 2 * torch.stack(squares).sum()


class FrobeniusDecay:
    r"""Decay of products in the steps of an optimizer, in place of ordinary decay of their factors.

    With ``F_p`` the gradient of ``||W||_F^2 / 2`` with respect to a factor ``p``, summed over the heads that share it:

    - ``"coupled"``: ``p.grad += weight_decay * F_p`` before the step, as ``weight_decay`` in :class:`torch.optim.SGD`,
      and with the opposite sign where the optimizer maximizes;
    - ``"decoupled"``: ``p -= lr * weight_decay * F_p`` before the step, as in :class:`torch.optim.AdamW`, with the
      ``lr`` of the group of ``p``;
    - ``"penalty"``: the steps are left alone, :meth:`penalty` is to be added to the loss.

    What a parameter holds beside factors gets ordinary decay by the same coefficient: ``p`` in the place of ``F_p``.
    Parameters without gradient are passed over, as optimizers do. The decay lasts until :meth:`remove`, or to the end
    of a ``with`` block. Factors are found by name at each step, so that a wrapper may replace the parameters; except
    for a penalty, they may lie in parts on several processes (FSDP2, ZeRO). A copy of the optimizer has no decay, for
    torch copies no hooks: make another :class:`FrobeniusDecay` for it.

    Args:
        optimizer: Any optimizer over named parameters, or what accelerate made of it.
        products: The products to decay. Their factors are in groups with ``weight_decay`` 0, as
            :func:`~hf_fnl.optim.parameter_groups` makes them with ``frobenius_decay=0``.
        weight_decay: Coefficient of the decay.
        mode: One of ``MODES``.

    Raises:
        ValueError: If ``mode`` is unknown, ``weight_decay`` negative, there is no product, the parameters have no
            names, or a factor is missing, frozen, in two products or under ordinary decay.
    """

    def __init__(
        self, optimizer: Optimizer, products: Sequence[Product], weight_decay: float, *, mode: str = "decoupled"
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode of Frobenius decay must be one of {', '.join(MODES)}, got {mode!r}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay of Frobenius decay must be finite and not negative, got {weight_decay}")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper takes no hooks
        self.optimizer, self.products, self.weight_decay, self.mode = optimizer, tuple(products), weight_decay, mode
        check_factors(self.products, optimizer.param_groups)
        _check_no_ordinary_decay(self.products, optimizer.param_groups)
        self._decay, self._sharding = ProductDecay(), Sharding(optimizer.param_groups)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def __getstate__(self) -> Any:
        raise TypeError("a FrobeniusDecay cannot be copied or saved: make another for the copy of the optimizer")

    def penalty(self) -> Tensor:
        """:func:`frobenius_penalty` of the products as they are now: a differentiable scalar."""
        parameters = {name: parameter for name, (parameter, _) in by_name(self.optimizer.param_groups).items()}
        return frobenius_penalty(self.products, parameters, self.weight_decay)

    @torch.no_grad()
    def add_gradients_(self, scale: float = 1.0) -> None:
        """Add ``scale * weight_decay * F_p`` to the gradients, which a scaler multiplied by ``scale``.

        For a training that clips: added before, a coupled decay is a penalty in the loss. :meth:`remove` it first.
        """
        for _, gradient, F, group in self._due():
            sign = -1 if group.get("maximize") else 1
            gradient.add_(F, alpha=sign * scale * self.weight_decay)

    def remove(self) -> None:
        """Stop decaying in the steps of the optimizer."""
        self._handle.remove()

    def __enter__(self) -> FrobeniusDecay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.mode == "penalty":
            return
        if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise ValueError(
                f"Frobenius decay with mode={self.mode!r} needs the gradients before the step, where a closure has not "
                "computed them yet; use mode='penalty', or call step() without a closure"
            )
        if isinstance(optimizer, Lamb):
            optimizer.check()
        # A fused optimizer divides gradients by the scale of a GradScaler itself, and skips those that overflow.
        scale, overflowed = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if overflowed:
            return
        if self.mode == "coupled":
            self.add_gradients_(1.0 if scale is None else float(scale))
            return
        for parameter, _, F, group in self._due():
            parameter.sub_(F * (group["lr"] * self.weight_decay))

    def _due(self) -> list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
        """Factors that have a gradient, their gradients, ``F_p`` from all products as they are now, and groups."""
        groups = self.optimizer.param_groups
        shards = self._sharding.find(groups)
        if shards is None:
            held = [(name, p, p.grad, group) for name, (p, group) in by_name(groups).items()]
        else:
            due = [(shard, shard.owner.grad, group) for group, each in shards.due for shard in each]
            held = [(s.name, s.of(s.owner), None if g is None else s.of(g), group) for s, g, group in due]
        terms = self._decay.take(self.products, {name: p for name, p, _, _ in held}, shards)
        return [
            (p, gradient, terms.write([name], [p], [torch.empty_like(p)])[0], group)
            for name, p, gradient, group in held
            if name in terms and gradient is not None
        ]


def _check_no_ordinary_decay(products: Sequence[Product], groups: list[dict[str, Any]]) -> None:
    named = by_name(groups)
    for product in products:
        for name in product.parameter_names:
            ordinary = named[name][1].get("weight_decay", 0)
            if ordinary != 0:
                raise ValueError(
                    f"product {product.name}: its factor {name} is under Frobenius decay and in a group with "
                    f"weight_decay={ordinary}; pass frobenius_decay=0.0 to parameter_groups"
                )
