"""Norms of products over a run, and training that keeps to those of another run (Khodak et al. 2021, Fig. 3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_fnl.attention import Product
from hf_fnl.utils.files import write_bytes

NORMS_FILE = "product_norms.safetensors"


def read_norms(folder: str | os.PathLike[str]) -> tuple[list[str], Tensor]:
    """Read what :class:`RecordNorms` wrote into the folder of a run.

    Returns:
        Names of the products, and their Frobenius norms ``(steps, products)``.

    Raises:
        FileNotFoundError: If the run recorded none.
    """
    path = Path(folder) / NORMS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {NORMS_FILE}: train that run with --record_norms true")
    with safe_open(path, framework="pt") as file:
        return file.metadata()["products"].split("\n"), file.get_tensor("norms")


class RecordNorms(TrainerCallback):
    """Callback that writes the Frobenius norm of every product after every step into the folder of the run.

    The file grows with each checkpoint, and a resumed run goes on with it.

    Args:
        products: The products.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products
        self._norms: list[Tensor] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        """Read what was recorded up to the step at which the run starts."""
        self._norms = []
        if state.global_step:
            _, norms = read_norms(args.output_dir)
            self._norms = list(norms[: state.global_step])

    @torch.no_grad()
    def on_step_end(self, *more: Any, model: nn.Module, **kwargs: Any) -> None:
        """Record, without waiting for the device."""
        self._norms.append(_norms(self.products, model))

    def on_save(self, args: TrainingArguments, state: TrainerState, *more: Any, **kwargs: Any) -> None:
        """Write all that was recorded."""
        if state.is_world_process_zero:
            names = "\n".join(product.name for product in self.products)
            content = save({"norms": torch.stack([row.cpu() for row in self._norms])}, {"products": names})
            write_bytes(Path(args.output_dir) / NORMS_FILE, content)

    on_train_end = on_save


class FollowNorms(TrainerCallback):
    """Callback that rescales every product after every step to the norm that it had then in another run.

    All factors of a product are multiplied by the same number.

    Args:
        products: The products.
        folder: The other run.

    Raises:
        FileNotFoundError: If that run recorded no norms.
        ValueError: If it had other products, or, when the training begins, fewer steps.
    """

    def __init__(self, products: Sequence[Product], folder: str | os.PathLike[str]) -> None:
        names, norms = read_norms(folder)
        if missing := sorted(set(names) ^ {product.name for product in products}):
            raise ValueError(f"the run in {folder} has other products: {missing[0]} is only in one of both")
        order = [names.index(product.name) for product in products]
        self.products, self.folder, self._norms = products, folder, norms[:, order]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *more: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Bring the norms to the device."""
        if state.max_steps > len(self._norms):
            raise ValueError(
                f"the run in {self.folder} recorded {len(self._norms)} steps, and this one has {state.max_steps}"
            )
        self._norms = self._norms.to(next(model.parameters()).device)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, *more: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        """Rescale."""
        scales = self._norms[state.global_step - 1] / _norms(self.products, model)
        for product, scale in zip(self.products, scales, strict=True):
            for factor in (factors := product.factors(model)):
                factor.mul_(scale ** (1 / len(factors)))


def _norms(products: Sequence[Product], model: nn.Module) -> Tensor:
    """Return Frobenius norms ``(products,)``; of an attention that over all its heads."""
    return torch.stack([product.frobenius_norm(model).float().norm() for product in products])
