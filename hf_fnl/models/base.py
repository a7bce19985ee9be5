"""What the factorized model families share: initialization, checked loading, and the way back to a stock model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_fnl.config import LayerRank, RankRule
from hf_fnl.layers import Factorized
from hf_fnl.models.attention import FactorizedAttention, HeadProjection, draw_normal_, is_loaded
from hf_fnl.models.conversion import Calibration, Shared, fill_, ranks_by_rule

if TYPE_CHECKING:
    from typing_extensions import Self


class FactorizedPreTrainedModel(PreTrainedModel):
    """Mixin before a stock ``PreTrainedModel``: draws factors as the stock model draws the weights they stand for.

    With the same seed, a model of full rank starts with exactly the products of the stock model.
    """

    dense_class: ClassVar[type[PreTrainedModel]]
    attention_class: ClassVar[type[FactorizedAttention]]

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

    @classmethod
    def _shared_ranks(cls, dense: PreTrainedModel) -> Shared:
        """For each rank of the configuration and each layer, the modules of ``dense`` that have it."""
        raise NotImplementedError

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        dense: PreTrainedModel | str | os.PathLike,
        *,
        qk_rank: LayerRank = None,
        ov_rank: LayerRank = None,
        ffn_rank: LayerRank = None,
        embedding_rank: int | None = None,
        rule: RankRule | None = None,
        kinds: Sequence[str] = ("qk", "ov", "ffn"),
        calibration: Calibration | None = None,
    ) -> Self:
        r"""Truncate a trained stock model.

        Every product becomes its best approximation of the given rank in the Frobenius norm; with ``calibration``, the
        one whose outputs are nearest, in mean square, for what these data are in front of it. Biases of heads are cut
        with them. At full rank the outputs are those of the stock model.

        Args:
            dense: A model of ``dense_class``, or its Hub id or folder. It is left as it is.
            qk_rank: Rank of every head's query-key product: a number, or a list with one for each layer.
            ov_rank: Rank of every head's output-value product, likewise.
            ffn_rank: Rank of both feed-forward matrices of a layer, likewise.
            embedding_rank: Rank of the word embedding.
            rule: Chooses the ranks instead.
            kinds: What ``rule`` is applied to: any of ``"qk"``, ``"ov"``, ``"ffn"`` and ``"embedding"``.
            calibration: Inputs of the model, one batch or several, with an ``attention_mask`` where they are padded.
                All of it runs through the model at once. Some ten thousand tokens are enough.

        Returns:
            A model of this class on the same device, in the same dtype and mode.

        Raises:
            TypeError: If ``dense`` is not of ``dense_class``.
            ValueError: If no rank is given, or both ranks and a rule, a rank does not fit, a rule cannot be met, or a
                weight is not finite.
        """
        if not isinstance(dense, PreTrainedModel):
            dense = cls.dense_class.from_pretrained(dense)
        if type(dense) is not cls.dense_class:
            raise TypeError(f"{cls.__name__} is made from a {cls.dense_class.__name__}, got a {type(dense).__name__}")
        ranks = {"qk_rank": qk_rank, "ov_rank": ov_rank, "ffn_rank": ffn_rank, "embedding_rank": embedding_rank}
        given = [name for name, rank in ranks.items() if rank is not None]
        if (rule is None) == (not given):
            raise ValueError(f"give ranks or a rule, one of them; got {', '.join(given) or 'neither'}")
        if rule is not None:
            shared = cls._shared_ranks(dense)
            known = [name.removesuffix("_rank") for name in shared]
            if not kinds or (unknown := sorted(set(kinds) - set(known))):
                raise ValueError(f"kinds must be any of {', '.join(known)}, got {', '.join(unknown or ['none'])}")
            ranks |= ranks_by_rule(
                dense,
                {f"{kind}_rank": shared[f"{kind}_rank"] for kind in kinds},
                rule,
                projections=cls.attention_class.projections,
                num_heads=dense.config.num_attention_heads,
                calibration=calibration,
            )
        config = cls.config_class.from_dense(dense.config, **ranks)
        with init.no_init_weights():
            model = cls._from_config(config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation)
        model.to(dense.device).eval()
        fill_(model, dense, calibration)
        if model.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)

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
