"""What the factorized model families share: initialization, checked loading, and the way back to a stock model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_fnl.config import FactorizationConfig
from hf_fnl.layers import Factorized
from hf_fnl.spectral import spectral_init_heads


class HeadProjection(nn.Linear):
    """A projection to or from attention heads, whose weight is drawn by the attention that holds its partner."""


class FactorizedAttention(nn.Module):
    """Mixin of an attention whose per-head products have ranks of their own.

    A family's attention names its :class:`HeadProjection` layers in ``projections``; query, key and value weights are
    ``(heads * rank, hidden)``, the output weight is ``(hidden, heads * rank)``. The softmax scale stays that of a dense
    head, ``(hidden / heads) ** -0.5``: a product of lower rank approximates the dense one and keeps its scale.
    """

    num_heads: int
    factorization: FactorizationConfig

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """Query, key, value and output."""
        raise NotImplementedError

    @torch.no_grad()
    def init_heads_(self, std: float) -> None:
        """Draw the four dense weights as the stock model would, and cut every head to its ranks.

        Writes only what a checkpoint has not set; draws nothing if it has set everything.
        """
        weights = [projection.weight for projection in self.projections()]
        if all(is_loaded(weight) or weight.is_meta for weight in weights):
            return
        query, key, value, output = weights
        hidden = query.shape[1]
        ranks, method = self.factorization, self.factorization.init
        dense = [draw_normal_(query.new_empty(hidden, hidden), std) for _ in weights]
        Q_h, K_h, V_h = (weight.unflatten(0, (self.num_heads, -1)).mT for weight in dense[:3])
        O_h = dense[3].unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        Q_h, K_h = _cut_heads(Q_h, K_h, ranks.qk_rank, method, std)
        V_h, O_h = _cut_heads(V_h, O_h, ranks.ov_rank, method, std)
        for weight, factor in zip((query, key, value), (Q_h, K_h, V_h), strict=True):
            init.copy_(weight, factor.mT.flatten(0, 1))
        init.copy_(output, O_h.transpose(0, 1).flatten(1))


def _cut_heads(left: Tensor, right: Tensor, rank: int | None, method: str, std: float) -> tuple[Tensor, Tensor]:
    if rank is None:
        return left, right
    if method == "default":
        left, right = (draw_normal_(factor.new_empty(*factor.shape[:2], rank), std) for factor in (left, right))
        return left, right
    return spectral_init_heads(left, right, rank, method)


def draw_normal_(weight: Tensor, std: float) -> Tensor:
    """Fill a weight as Transformers' own ``_init_weights`` does."""
    return weight.normal_(0.0, std)


def is_loaded(parameter: Tensor) -> bool:
    """Whether ``from_pretrained`` has set this parameter, by the mark that Transformers leaves on it."""
    return getattr(parameter, "_is_hf_initialized", False)


class FactorizedPreTrainedModel(PreTrainedModel):
    """Mixin before a stock ``PreTrainedModel``: draws factors as the stock model draws the weights they stand for.

    With the same seed, a model of full rank starts with exactly the products of the stock model.
    """

    dense_class: ClassVar[type[PreTrainedModel]]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Transformers skips modules without parameters of their own in classes that are not its own, to protect loaded
        # weights from unguarded writes. An attention is such a module and draws its heads; all writes here are guarded.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Factorized):
            _init_factors(module, std)
        elif isinstance(module, FactorizedAttention):
            module.init_heads_(std)
        elif isinstance(module, HeadProjection):
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers, which however draws a product anew, with a log entry only, if its form has changed.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            ValueError: If the checkpoint holds a parameter in another shape, or a product in another form, than the
                configuration says, unless ``ignore_mismatched_sizes``.
        """
        source = pretrained_model_name_or_path
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, info = super().from_pretrained(source, *args, **options, **kwargs)
        except SafetensorError as error:
            folder = Path(source or "", kwargs.get("subfolder") or "")
            raise OSError(f"the weights in {_unreadable_file(folder)} are truncated or corrupt: {error}") from error
        if not ignore_mismatched_sizes:
            _check_loaded(model, source, info)
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in Transformers, for a dense embedding.

        Raises:
            ValueError: If the embedding is factorized.
        """
        if isinstance(self.get_input_embeddings(), Factorized):
            raise ValueError(
                "resize_token_embeddings needs a dense embedding; merge() the model first or set embedding_rank=None"
            )
        return super().resize_token_embeddings(*args, **kwargs)

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """The stock model that computes the same, with every product multiplied out.

        Heads narrower than ``hidden / heads`` are padded with zeros. This model is left as it is.

        Returns:
            A model of ``dense_class`` on the same device, in the same dtype and mode. It can be saved, loaded and
            deployed without ``hf_fnl``.
        """
        with init.no_init_weights():
            dense = self.dense_class(self.config.to_dense())
        dense.to(device=self.device, dtype=self.dtype)
        dense.load_state_dict(self._dense_state_dict())
        dense.tie_weights()
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)

    def _dense_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and in the shapes of the stock model."""
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, Factorized):
                for factor in ("U", "M", "V"):
                    state.pop(f"{name}.{factor}", None)
                state[f"{name}.weight"] = module.composed()
        return state


def _check_loaded(model: PreTrainedModel, source: object, info: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` if a checkpoint's parameters are not those of the model that was to hold them."""
    faults = [
        f"{name} has shape {tuple(theirs)} in the checkpoint and {tuple(ours)} in the model"
        for name, theirs, ours in info["mismatched_keys"]
    ]

    def holder(name: str) -> str:  # the module, whose name in the checkpoint of a backbone has no prefix
        return name.removeprefix(f"{model.base_model_prefix}.").rpartition(".")[0]

    unexpected = {holder(name): name for name in sorted(info["unexpected_keys"])}
    for missing in info["missing_keys"]:
        if (found := unexpected.get(holder(missing))) is not None:
            faults.append(f"the checkpoint holds {found} where the model holds {missing}")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {min(faults)}{more}. Leave the ranks as its "
            "config.json has them, or pass ignore_mismatched_sizes=True to start what does not fit anew"
        )


def _unreadable_file(folder: Path) -> Path:
    """The first weight file in a folder that cannot be opened; the folder itself if it is not one on this disk."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return file
    return folder


def _init_factors(module: Factorized, std: float) -> None:
    """Guarded initialization of a factorized layer: nothing is drawn or decomposed if a checkpoint set all of it."""
    if not all(is_loaded(factor) or factor.is_meta for factor in module.factors()):
        values = module.fresh_factors(lambda weight: draw_normal_(weight, std))
        for factor, value in zip(module.factors(), values, strict=True):
            init.copy_(factor, value)
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)


def pad_heads(weight: Tensor, num_heads: int, head_dim: int, dim: int = 0) -> Tensor:
    """Widen ``num_heads`` heads that lie side by side along ``dim`` to ``head_dim`` each, with zeros."""
    heads = weight.unflatten(dim, (num_heads, -1))
    missing = head_dim - heads.shape[dim + 1]
    padding = [0, 0] * (heads.ndim - dim - 2) + [0, missing]
    return nn.functional.pad(heads, padding).flatten(dim, dim + 1)
