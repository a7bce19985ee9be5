"""What the factorized model families share: initialization, checked loading, and the way back to a stock model."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_fnl.calibration import Calibration
from hf_fnl.config import LayerRank, RankRule
from hf_fnl.layers import Factorized
from hf_fnl.models.attention import FactorizedAttention, HeadProjection, draw_normal_, is_loaded
from hf_fnl.models.cards import write_upload_card
from hf_fnl.models.conversion import Shared, fill_, ranks_by_rule
from hf_fnl.models.loading import load_checked

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
            init_factors(module, std)
        elif isinstance(module, FactorizedAttention):
            module.init_heads_(std)
        elif isinstance(module, HeadProjection):
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which however draws a product anew, with a log entry only, if its form has changed.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            ValueError: If the checkpoint holds a parameter in another shape, or a product in another form, than the
                configuration says, unless ``ignore_mismatched_sizes``.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Here `push_to_hub` and `save_pretrained(push_to_hub=True)` meet, with their card already in the folder.
        write_upload_card(working_dir, self, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

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
            OSError: If a weight file is truncated or corrupt.
            TypeError: If ``dense`` is not of ``dense_class``.
            ValueError: If no rank is given, or both ranks and a rule, a rank does not fit, a rule cannot be met, or a
                weight is not finite.
        """
        if not isinstance(dense, PreTrainedModel):
            dense = load_checked(cls.dense_class.from_pretrained, dense)
        if type(dense) is not cls.dense_class:
            raise TypeError(f"{cls.__name__} is made from a {cls.dense_class.__name__}, got a {type(dense).__name__}")
        ranks = {"qk_rank": qk_rank, "ov_rank": ov_rank, "ffn_rank": ffn_rank, "embedding_rank": embedding_rank}
        given = [name for name, rank in ranks.items() if rank is not None]
        if (rule is None) == (not given):
            raise ValueError(f"give ranks or a rule, one of them; got {', '.join(given) or 'neither'}")
        if rule is not None:
            ranks |= cls._ranks_by_rule(dense, rule, kinds, calibration)
        config = cls.config_class.from_dense(dense.config, **ranks)
        with init.no_init_weights():
            model = cls._from_config(config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation)
        model.to(dense.device).eval()
        fill_(model, dense, calibration)
        if model.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)

    @classmethod
    def _ranks_by_rule(
        cls, dense: PreTrainedModel, rule: RankRule, kinds: Sequence[str], calibration: Calibration | None
    ) -> dict[str, LayerRank]:
        shared = {option.removesuffix("_rank"): layers for option, layers in cls._shared_ranks(dense).items()}
        unknown = sorted(set(kinds) - set(shared))
        if unknown or not kinds:
            raise ValueError(f"kinds must be any of {', '.join(shared)}, got {', '.join(unknown) or 'none'}")
        return ranks_by_rule(
            dense,
            {f"{kind}_rank": shared[kind] for kind in kinds},
            rule,
            projections=cls.attention_class.projections,
            num_heads=dense.config.num_attention_heads,
            calibration=calibration,
        )

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


def init_factors(module: Factorized, std: float) -> None:
    """Guarded initialization of a factorized layer: nothing is drawn or decomposed if a checkpoint set all of it."""
    if not all(is_loaded(factor) or factor.is_meta for factor in module.factors()):
        values = module.fresh_factors(lambda weight: draw_normal_(weight, std))
        for factor, value in zip(module.factors(), values, strict=True):
            init.copy_(factor, value)
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)
