"""FLAMBe: LAMB that decays products instead of their factors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from hf_fnl.attention import Product
from hf_fnl.optim.groups import by_name, check_factors
from hf_fnl.optim.lamb import Lamb, Terms
from hf_fnl.optim.product_decay import ProductDecay
from hf_fnl.optim.sharding import Shards


class FLAMBe(Lamb):
    r"""LAMB with Frobenius decay of products (Khodak et al. 2021, Sec. 6).

    In the update of a factor ``p`` of a product ``W``, ``weight_decay * p`` becomes ``weight_decay * F_p``, where
    ``F_p`` is the gradient of ``||W||_F^2 / 2``, summed over the heads that share ``p``; the trust ratio is that of the
    full parameter. The decay stands inside it, as that of LAMB does: a larger ``weight_decay`` turns a step and leaves
    it ``lr ||p||`` long, where the paper's text subtracts ``lr * weight_decay * F_p``. All other parameters, and what a
    parameter holds beside factors, are updated as by :class:`Lamb`.
    All products are taken as they are before the step. Where parameters are sharded (FSDP2, ZeRO), the processes add up
    one ``(heads, r, r)`` matrix per factor in each step, and exchange the rows and heads that are cut.

    Args:
        params: Named parameters, ``model.named_parameters()``, or groups of them; see
            :func:`~hf_fnl.optim.parameter_groups`.
        products: The products to decay, from :func:`~hf_fnl.attention.find_products`. Their factors are found by name
            at every step, so that a wrapper may replace the parameters in ``param_groups``.
        lr: As in :class:`Lamb`, like ``betas``, ``eps`` and ``compiled``.
        weight_decay: Coefficient of decay, of products and of all other parameters.

    Raises:
        ValueError: If the parameters have no names, there is no product, a product is a tensor, a factor is missing,
            frozen or in two products, the factors of a product have different ``weight_decay``, or an option is out of
            range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        products: Sequence[Product],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        compiled: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, compiled=compiled)
        self.products = tuple(products)
        _check_matrices(self.products)
        check_factors(self.products, self.param_groups)
        _check_decays(self.products, self.param_groups)
        self._decay = ProductDecay()

    def _take_terms(self, shards: Shards | None) -> Terms:
        """Return ``F_p`` of the factors of all products as they are now."""
        named = by_name(self.param_groups) if shards is None else {}
        decayed = {name for name, (_, group) in named.items() if group["weight_decay"] != 0}
        chosen = [p for p in self.products if shards or not decayed.isdisjoint(p.parameter_names)]
        return self._decay.take(chosen, {name: parameter for name, (parameter, _) in named.items()}, shards).write

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "products": self.products, "_decay": ProductDecay()}


def _check_matrices(products: Sequence[Product]) -> None:
    if tensors := [product.name for product in products if product.is_tensor]:
        raise ValueError(
            f"FLAMBe decays products of matrices, and {', '.join(tensors)} are tensors; "
            "use Lamb or another optimizer with FrobeniusDecay"
        )


def _check_decays(products: Sequence[Product], groups: list[dict[str, Any]]) -> None:
    named = by_name(groups)
    for product in products:
        decays = {name: named[name][1]["weight_decay"] for name in product.parameter_names}
        if len(set(decays.values())) > 1:
            listed = ", ".join(f"{name}: {decay}" for name, decay in decays.items())
            raise ValueError(f"product {product.name}: its factors have different weight_decay ({listed})")
