"""LAMB as NVIDIA's BERT pretraining computes it, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ReferenceLamb:
    """Moves copies of the parameters in ``groups``, which are ``{"params": [(name, p), ...], "lr":, "weight_decay":}``.

    Groups and gradients are those that the optimizer under test gets; ``parameters`` is what it should arrive at.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        self.betas, self.eps = betas, eps
        self.parameters = {name: p.detach().clone() for group in groups for name, p in group["params"]}
        self.options = {name: (group["lr"], group["weight_decay"]) for group in groups for name, _ in group["params"]}
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self.steps = dict.fromkeys(self.parameters, 0)

    def decay_terms(self) -> dict[str, Tensor]:
        """What weight decay multiplies."""
        return dict(self.parameters)

    def step(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One update; parameters without a gradient stay."""
        terms = self.decay_terms()
        for name, gradient in gradients.items():
            if gradient is not None:
                self._move(name, gradient, terms[name])

    def _move(self, name: str, gradient: Tensor, decay_term: Tensor) -> None:
        (beta1, beta2), (lr, weight_decay) = self.betas, self.options[name]
        m, v = self.moments[name]
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        self.moments[name] = m, v
        self.steps[name] += 1
        m_hat = m / (1 - beta1 ** self.steps[name])
        v_hat = v / (1 - beta2 ** self.steps[name])
        update = m_hat / (v_hat.sqrt() + self.eps) + weight_decay * decay_term
        parameter = self.parameters[name]
        parameter_norm, update_norm = parameter.norm(), update.norm()
        ratio = parameter_norm / update_norm if weight_decay != 0 and parameter_norm > 0 and update_norm > 0 else 1.0
        self.parameters[name] = parameter - lr * ratio * update
