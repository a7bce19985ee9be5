"""What the factorized model families share: initialization, checked loading, and the way back to a stock model."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.layers.whole import is_partitioned
from hf_fnl.models.attention import (
    FactorizedAttention,
    HeadConv1D,
    HeadProjection,
    dense_heads,
    draw_normal_,
    is_loaded,
)
from hf_fnl.models.cards import UploadsCard
from hf_fnl.models.conversion import Shared, fill_, ranks_by_rule
from hf_fnl.models.division import partition_
from hf_fnl.models.loading import check_files, load_checked
from hf_fnl.models.recording import meta_parameters
from hf_fnl.models.sharded_init import make_partitioned
from hf_fnl.models.splitting import split_later, splitting_together
from hf_fnl.surgery.calibration import Calibration
from hf_fnl.surgery.config import LayerRank, RankRule
from hf_fnl.surgery.ranks import UnreachableShare
from hf_fnl.surgery.swap import check_present
from hf_fnl.utils.suggest import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self


class FactorizedPreTrainedModel(UploadsCard, PreTrainedModel):
    """Mixin before a stock ``PreTrainedModel``: draws factors as the stock model draws the weights they stand for.

    With the same seed, a model of full rank starts with exactly the products of the stock model.
    """

    dense_class: ClassVar[type[PreTrainedModel]]
    attention_class: ClassVar[type[FactorizedAttention]]

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # Transformers skips modules without parameters of their own in classes that are not its own, to protect loaded
        # weights from unguarded writes. An attention is such a module and draws its heads; all writes here are guarded.
        super()._initialize_weights(module, is_custom_code=False)

    def initialize_weights(self) -> None:
        """As in Transformers; what is drawn on a GPU is decomposed together where shapes are equal."""
        with splitting_together():
            super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Factorized):
            init_factors(module, std)
        elif isinstance(module, FactorizedAttention):
            module.init_heads_(std)
        elif isinstance(module, HeadProjection | HeadConv1D):
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        # Under ZeRO-3, Transformers divides each layer as soon as it is made. But a factorized layer needs the sizes of
        # the one that it replaces, and an attention draws its query, key, value and output together.
        if not is_deepspeed_zero3_enabled() or modeling_utils._is_ds_init_called:
            return super()._from_config(config, **kwargs)

        def make() -> Any:
            with modeling_utils.set_zero3_state():
                return cls._from_config(config, **kwargs)

        return make_partitioned(make)

    @classmethod
    def get_init_context(cls, dtype: torch.dtype, is_quantized: bool, is_ds_init_called: bool, *args: Any) -> list[Any]:
        """As in Transformers, but layers draw nothing for the meta device, where torch is slow to draw nothing.

        For ZeRO-3 the model is made on the meta device, too, and divided before weights are loaded.
        """
        if not is_deepspeed_zero3_enabled():
            return [*super().get_init_context(dtype, is_quantized, is_ds_init_called, *args), init.no_init_weights()]
        if is_quantized or is_ds_init_called:
            return super().get_init_context(dtype, is_quantized, is_ds_init_called, *args)
        contexts = super().get_init_context(dtype, is_quantized, True, *args)
        return [*contexts, init.no_init_weights(), meta_parameters(), modeling_utils.set_zero3_state()]

    @staticmethod
    def _load_pretrained_model(model: Any, *args: Any, **kwargs: Any) -> Any:
        # Of a model or, into one that has its weights, of an adapter.
        load = PreTrainedModel._load_pretrained_model
        if is_deepspeed_zero3_enabled() and not any(map(is_partitioned, model.parameters())):
            given = inspect.signature(load).bind(model, *args, **kwargs).arguments
            config = given["load_config"]
            if not config.is_quantized:
                # Only the first process reads the weights, so all look whether they fit, or one would raise alone.
                check_files(model, config.pretrained_model_name_or_path, given["checkpoint_files"] or ())
                partition_(model)
        return load(model, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which however draws a product anew, with a log entry only, if its form has changed.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            CheckpointMismatchError: If the checkpoint holds a parameter in another shape, or a product in another form,
                than the configuration says, unless ``ignore_mismatched_sizes``. It is a ``ValueError``, and a
                ``RuntimeError`` as in Transformers.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """As in torch; the name of a factor, too, gives the layer that holds it.

        PEFT looks for the word embedding by the parameter that is as long as the vocabulary.
        """
        name, _, attribute = target.rpartition(".")
        if attribute in ("U", "V") and isinstance(holder := super().get_submodule(name), Factorized):
            return holder
        return super().get_submodule(target)

    def _get_resized_embeddings(self, old_embeddings: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # Here all ways to resize an embedding meet.
        if isinstance(old_embeddings, Factorized):
            raise ValueError("only a dense embedding is resized; merge() the model first or set embedding_rank=None")
        return super()._get_resized_embeddings(old_embeddings, *args, **kwargs)

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
        rule: RankRule | None = None,
        kinds: Sequence[str] = ("qk", "ov", "ffn"),
        calibration: Calibration | None = None,
        factor_init: str | Mapping[str, str] | None = None,
        **ranks: LayerRank,
    ) -> Self:
        r"""Truncate a trained stock model.

        Every product becomes its best approximation of the given rank in the Frobenius norm; with ``calibration``, the
        one whose outputs are nearest, in mean square, for what these data are in front of it. Biases of heads are cut
        with them. At full rank the outputs are those of the stock model.

        Args:
            dense: A model of ``dense_class``, or its Hub id or folder; or a model of this class that holds no factors.
                It is left as it is.
            rule: Chooses the ranks.
            kinds: What ``rule`` is applied to: any of ``"qk"``, ``"ov"``, ``"ffn"``, ``"embedding"`` and, where the
                configuration has it, ``"qkv"``.
            calibration: Inputs of the model, one batch or several, with an ``attention_mask`` where they are padded.
                All of it runs through the model at once. Some ten thousand tokens are enough.
            factor_init: As in the configuration, but only what cuts weights: ``"spectral"`` or ``"spectral_ones"``.
                ``None`` takes that of ``dense``, where this is a model of this class, and else ``"spectral"``.
            **ranks: In place of a rule, the fields of the configuration that are ranks, such as ``qk_rank=32``.

        Returns:
            A model of this class on the same device, in the same dtype and mode.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            TypeError: If ``dense`` is of another class, or a rank is no field of the configuration.
            ValueError: If no rank is given, or both ranks and a rule, a rank does not fit, a rule cannot be met, a
                weight is not finite, or a tensor of ``dense`` has no place in a model of this class.
        """
        if not isinstance(dense, PreTrainedModel):
            dense = load_checked(cls.dense_class.from_pretrained, dense)
        check_present(dense, f"{cls.__name__}.from_dense")
        cls._check_source(dense)
        if unknown := sorted(set(ranks) - set(cls.config_class.rank_options())):
            options = ", ".join(cls.config_class.rank_options())
            hint = did_you_mean(unknown[0], cls.config_class.rank_options())
            raise TypeError(f"{cls.__name__} has the ranks {options}, got {', '.join(unknown)}{hint}")
        given = [name for name, rank in ranks.items() if rank is not None]
        if (rule is None) == (not given):
            raise ValueError(f"give ranks or a rule, one of them; got {', '.join(given) or 'neither'}")
        if rule is not None:
            ranks |= cls._ranks_by_rule(dense, rule, kinds, calibration)
        config = cls.config_class.from_dense(
            dense.config, **ranks, **({} if factor_init is None else {"factor_init": factor_init})
        )
        with init.no_init_weights(), modeling_utils.set_zero3_state():
            model = cls._from_config(config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation)
        model.to(dense.device).eval()
        fill_(model, dense, calibration)
        if model.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)

    @classmethod
    def _check_source(cls, dense: PreTrainedModel) -> None:
        if type(dense) is cls:
            given = [option for option in dense.config.rank_options() if getattr(dense.config, option) is not None]
            if given:
                raise ValueError(f"the {cls.__name__} is factorized already, with {', '.join(given)}; merge() it first")
        elif type(dense) is not cls.dense_class:
            raise TypeError(f"{cls.__name__} is made from a {cls.dense_class.__name__}, got a {type(dense).__name__}")

    def factorize_(self, **options: Any) -> None:
        """Truncate this model, which holds no factors yet, in place; the options are those of :meth:`from_dense`.

        Modules are replaced and parameters are new: an optimizer that holds the old ones has to be told. See
        :class:`~hf_fnl.training.DenseThenLowRank`.
        """
        take_over_(self, type(self).from_dense(self, **options))

    @classmethod
    def _ranks_by_rule(
        cls, dense: PreTrainedModel, rule: RankRule, kinds: Sequence[str], calibration: Calibration | None
    ) -> dict[str, LayerRank]:
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        shared = {option.removesuffix("_rank"): layers for option, layers in cls._shared_ranks(dense).items()}
        unknown = sorted(set(kinds) - set(shared))
        if unknown or not kinds:
            hint = did_you_mean(unknown[0], shared) if unknown else ""
            raise ValueError(f"kinds must be any of {', '.join(shared)}, got {', '.join(unknown) or 'none'}{hint}")
        try:
            return ranks_by_rule(
                dense,
                {f"{kind}_rank": shared[kind] for kind in kinds},
                rule,
                projections=cls.attention_class.projections,
                num_heads=dense.config.num_attention_heads,
                calibration=calibration,
            )
        except UnreachableShare as error:
            more = f". The word embedding stays dense: try kinds={','.join(kinds)},embedding"
            wanted = "embedding" not in kinds and "stay dense" in str(error)
            raise UnreachableShare(f"{error}{more if wanted else ''}") from error

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """The stock model that computes the same, with every product multiplied out.

        Heads narrower than ``hidden / heads`` are padded with zeros. This model is left as it is.

        Returns:
            A model of ``dense_class`` on the same device, in the same dtype and mode. It can be saved, loaded and
            deployed without ``hf_fnl``.

        Raises:
            ValueError: If the parameters are not all present, or one has no place in the stock model, as those of an
                adapter or of a layer that a subclass adds.
        """
        check_present(self, "merge")
        with init.no_init_weights():
            dense = self.dense_class(self.config.to_dense())
        dense.to(device=self.device, dtype=self.dtype)
        places = dense.state_dict().keys()
        # A factor stands for the weight of its layer.
        foreign = [n for n in self.state_dict() if not {n, n.rpartition(".")[0] + ".weight"} & places]
        if foreign:
            raise ValueError(
                f"merge: a {type(dense).__name__} has no place for {foreign[0]} (of {len(foreign)}): merge an adapter "
                "of PEFT first (merge_and_unload), and take a layer of your own out"
            )
        dense.load_state_dict(self._dense_state_dict())
        dense.tie_weights()
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)

    def _dense_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names and in the shapes of the stock model."""
        state = dict(self.state_dict())
        names = {module: name for name, module in self.named_modules()}
        for module, name in names.items():
            if isinstance(module, Factorized):
                for factor in ("U", "M", "V"):
                    state.pop(f"{name}.{factor}", None)
                state[f"{name}.weight"] = module.dense_weight()
            elif isinstance(module, FactorizedAttention):
                head_dim = self.config.hidden_size // module.num_heads
                for layer, (weight, bias) in dense_heads(module, head_dim).items():
                    state[f"{names[layer]}.weight"] = weight
                    if bias is not None:
                        state[f"{names[layer]}.bias"] = bias
        return state


def is_initialized(model: PreTrainedModel) -> bool:
    """Whether ``post_init`` has run: a class that adds a layer of its own calls it again."""
    return hasattr(model, "all_tied_weights_keys")


def take_over_(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give a model, in place, the modules and the configuration of another of its class, which is not used any more.

    Modules whose activations are recomputed in the backward pass go on so.
    """
    before = dict(model.named_modules())
    for name, module in other.named_modules():
        if getattr(before.get(name), "gradient_checkpointing", False):
            for attribute in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                setattr(module, attribute, getattr(before[name], attribute))
    for name in ("_modules", "config", "_tied_weights_keys", "all_tied_weights_keys"):
        setattr(model, name, getattr(other, name))


class FactorizedBackbone(FactorizedPreTrainedModel):
    """Mixin before a stock backbone in which some modules give way to factorized ones."""

    def post_init(self) -> None:
        """Put factorized modules in the place of the stock ones, the first time, then initialize the model."""
        if not is_initialized(self):
            with init.no_init_weights():
                self._replace_modules()
        super().post_init()

    def _replace_modules(self) -> None:
        raise NotImplementedError


def init_factors(module: Factorized, std: float) -> None:
    """Guarded initialization of a factorized layer: nothing is drawn or decomposed if a checkpoint set all of it."""
    if not all(is_loaded(factor) for factor in module.factors()):
        draw = functools.partial(draw_as_stock_, module, std=std)
        if not split_later(module, draw):
            for factor, value in zip(module.factors(), module.fresh_factors(draw), strict=True):
                init.copy_(factor, value)
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)


def draw_as_stock_(module: Factorized, weight: Tensor, std: float) -> None:
    """Fill ``weight (out, in)`` with what the stock model draws, which ``Conv1D`` holds transposed."""
    if isinstance(module, FactorizedLinear) and module.dense_class is Conv1D:
        weight.copy_(draw_normal_(weight.new_empty(weight.shape[::-1]), std).mT)
    else:
        draw_normal_(weight, std)
