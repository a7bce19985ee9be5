"""Base class of the factorized families: a stock model whose layers and heads are cut as its configuration says."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.layers.heads import narrow_
from hf_fnl.layers.partitioned import is_partitioned
from hf_fnl.models.configuration import FactorizedConfig, LayerRank
from hf_fnl.models.cuts import Names, check_methods, cuts_of, layer_in, names_in_backbone, ranks_by_rule
from hf_fnl.models.loading import load_checked
from hf_fnl.surgery.calibration_data import Calibration, CalibrationData
from hf_fnl.surgery.config import RankRule
from hf_fnl.surgery.cut import check_values, cut
from hf_fnl.surgery.heads import HeadTarget
from hf_fnl.surgery.record import MADE, models_in
from hf_fnl.surgery.swap import check_present, swap_
from hf_fnl.surgery.targets import Cut
from hf_fnl.utils.suggest import did_you_mean, listed
from hf_fnl.workarounds import full_parameters, name_causal_loss_

if TYPE_CHECKING:
    from typing_extensions import Self


class FactorizedPreTrainedModel(PreTrainedModel):
    """Mixin before a stock ``PreTrainedModel``: what the stock model draws is cut as the configuration says.

    With the same seed, a model of full rank starts with exactly the weight matrices of the stock model.

    Attributes:
        dense_class: The stock class.
        names: Where the family's matrices lie.
        backbone_class: The family's class without a head.
        shapes_heads: Whether its attentions may shape heads as wide as their rank; see
            :func:`~hf_fnl.layers.heads.narrow_`.
    """

    config: Any
    config_class: ClassVar[type[FactorizedConfig]]
    dense_class: ClassVar[type[PreTrainedModel]]
    names: ClassVar[Names]
    backbone_class: ClassVar[type[PreTrainedModel]]
    shapes_heads: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        stock = [base for base in cls.__bases__ if not issubclass(base, FactorizedPreTrainedModel)]
        if stock and issubclass(stock[0], PreTrainedModel):
            cls.dense_class = stock[0]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return ``False``: all that initializes weights is stock code, in which every write is guarded.

        In others Transformers skips modules without parameters of their own, such as GPT-2's feed-forward blocks, which
        scale a layer.
        """
        return False

    def post_init(self) -> None:
        """Initialize the stock model; then, the first time, cut it as the configuration says."""
        is_first = not hasattr(self, "all_tied_weights_keys")  # a class that adds a layer of its own calls this again
        name_causal_loss_(self)
        if is_first and type(self.base_model) is self.backbone_class.dense_class:
            setattr(self, self.base_model_prefix, as_class(self.base_model, self.backbone_class))
        super().post_init()
        if is_first and any(map(is_partitioned, self.parameters())):
            name = type(self).__name__
            raise ValueError(
                f"DeepSpeed divided the layers of this {name} before they could be cut: make it by {name}(config) "
                "outside of deepspeed.zero.Init, and DeepSpeed divides it when it starts"
            )
        if is_first:
            self.add_model_tags(["hf_fnl", "low-rank"])  # on the Hub
            self._cut_(cuts_of(self, self.config))

    def initialize_weights(self) -> None:
        """As in Transformers; factors that a checkpoint lacks are drawn."""
        for module in self.modules():
            if isinstance(module, Factorized) and not is_loaded(module):
                init_factors(module, self._std)
        super().initialize_weights()

    @property
    def _std(self) -> float:
        return getattr(self.config, "initializer_range", None) or self.config.init_std

    @property
    def branch_std(self) -> float:
        """Standard deviation with which the stock model draws the layers at the end of a residual branch."""
        return self._std

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which however draws a matrix anew, with a log entry only, if its form has changed.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            CheckpointMismatchError: If the checkpoint holds a parameter in another shape, or a matrix in another form,
                than the configuration says, unless ``ignore_mismatched_sizes``. It is a ``ValueError``, and a
                ``RuntimeError`` as in Transformers.
        """
        with full_parameters():
            return load_checked(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    def get_submodule(self, target: str) -> nn.Module:
        """As in torch; the name of a factor, too, gives the layer that holds it.

        PEFT looks for the word embedding by the parameter that is as long as the vocabulary.
        """
        name, _, attribute = target.rpartition(".")
        if attribute in ("U", "V") and isinstance(holder := super().get_submodule(name), Factorized):
            return holder
        return super().get_submodule(target)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which keeps keys and values in pages of one width.

        Raises:
            ValueError: If heads of different layers have different widths.
        """
        if not hasattr(self.config, "head_dim"):
            raise ValueError(
                "continuous batching needs keys and values of one width, got "
                f"qk_rank={self.config.qk_rank} and ov_rank={self.config.ov_rank}: give both one number, call "
                "generate(), or merge() the model first"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @classmethod
    def from_dense(cls, dense: PreTrainedModel | str | os.PathLike, **options: Any) -> Self:
        """Truncate a trained stock model.

        Args:
            dense: A model of ``dense_class``, or its Hub id or folder; or a model of this class that holds no factors.
                It is left as it is.
            **options: Those of :meth:`factorize_`.

        Returns:
            A model of this class on the same device, in the same dtype and mode.

        Raises:
            OSError: If a weight file is truncated or corrupt.
            TypeError: If ``dense`` is of another class, or a rank is no field of the configuration.
            ValueError: As :meth:`factorize_`, or if a tensor of ``dense`` has no place in a model of this class.
        """
        if not isinstance(dense, PreTrainedModel):
            dense = load_checked(cls.dense_class.from_pretrained, dense)
        check_present(dense, f"{cls.__name__}.from_dense")
        if type(dense) not in (cls, cls.dense_class):
            raise TypeError(f"{cls.__name__} is made from a {cls.dense_class.__name__}, got a {type(dense).__name__}")
        if type(dense) is cls:
            dense._check_dense()
        config = cls.config_class.from_dense(dense.config)
        with init.no_init_weights(), full_parameters():
            model = cls._from_config(config, dtype=dense.dtype, attn_implementation=dense.config._attn_implementation)
        model.to(dense.device)
        _fill_(model, dense)
        model.factorize_(**options)
        if model.can_generate():
            model.generation_config = copy.deepcopy(dense.generation_config)
        return model.train(dense.training)

    def _check_dense(self) -> None:
        if given := [option for option in self.config.rank_options() if getattr(self.config, option) is not None]:
            name = type(self).__name__
            raise ValueError(f"the {name} is factorized already, with {', '.join(given)}; merge() it first")

    @torch.no_grad()
    def factorize_(
        self,
        *,
        rule: RankRule | None = None,
        kinds: Sequence[str] | None = None,
        calibration: Calibration | None = None,
        factor_init: str | Mapping[str, str] | None = None,
        **ranks: LayerRank,
    ) -> None:
        r"""Truncate this model, which holds no factors yet, in place.

        Every matrix becomes its best approximation of the given rank in the Frobenius norm; with ``calibration``, the
        one whose outputs are nearest, in mean square, for what these data are in front of it. Biases of heads are cut
        with them. At full rank the outputs are those of the dense model. Parameters are new: an optimizer that holds
        the old ones has to be told. See :class:`~hf_fnl.training.DenseThenLowRank`.

        Args:
            rule: Chooses the ranks.
            kinds: What ``rule`` is applied to: any of ``"qk"``, ``"ov"``, ``"ffn"``, ``"embedding"`` and ``"qkv"`` that
                the configuration has. Heads and feed-forward matrices unless given.
            calibration: Inputs of the model, one batch or several, with an ``attention_mask`` where they are padded.
                Some ten thousand tokens are enough. Outputs count by what the loss feels of them, that of ``labels`` or
                else the distance from what the model returned before.
            factor_init: As in the configuration, whose it is unless given, but only what cuts weights: ``"spectral"``
                or ``"spectral_ones"``.
            **ranks: In place of a rule, the fields of the configuration that are ranks, such as ``ov_rank=32``.

        Raises:
            TypeError: If a rank is no field of the configuration.
            ValueError: If the model holds factors, no rank is given, or both ranks and a rule, a rank does not fit, a
                rule cannot be met, or a weight is not finite. The model is then as it was.
        """
        check_present(self, f"{type(self).__name__}.factorize_")
        self._check_dense()
        options = self.config.rank_options()
        if unknown := sorted(set(ranks) - set(options)):
            hint = did_you_mean(unknown[0], options)
            raise TypeError(f"{type(self).__name__} has the ranks {', '.join(options)}, got {listed(unknown)}{hint}")
        given = [name for name, rank in ranks.items() if rank is not None]
        if (rule is None) == (not given):
            raise ValueError(f"give ranks or a rule, one of them; got {', '.join(given) or 'neither'}")
        data = None if calibration is None else CalibrationData(self, calibration)
        if rule is not None:
            ranks |= ranks_by_rule(self, rule, kinds, data)
        config = copy.deepcopy(self.config)
        for option, value in {**ranks, **({} if factor_init is None else {"factor_init": factor_init})}.items():
            setattr(config, option, value)
        config = type(config).from_dense(config)  # which checks what was set
        cuts = cuts_of(self, config)
        check_methods(cuts, config.factor_init, calibrated=calibration is not None)
        check_values((each.target for each in cuts), calibrated=calibration is not None)
        self._cut_(cuts, data)
        self._hold_config_(config)

    def _hold_config_(self, config: Any) -> None:
        """Give this model, and what is inside of it, another configuration in the place of its own."""
        old = self.config
        for name in ("_attn_implementation", "_name_or_path", "architectures"):
            if hasattr(old, name):
                setattr(config, name, getattr(old, name))
        for module in self.modules():
            if getattr(module, "config", None) is old:
                module.config = config

    def layer_number(self, name: str, number: int) -> int:
        """Return the place in a list of ranks of the layer that a name has ``number`` in."""
        return number

    def _cut_(self, cuts: Sequence[Cut], data: CalibrationData | None = None) -> None:
        ends = (
            layer for name, layer in names_in_backbone(self) if layer_in(self.names.end_of_branch, name) is not None
        )
        stds = dict.fromkeys(ends, self.branch_std)
        replacements = cut(self, cuts, data, stds)
        for dense, layer in replacements.items():
            if data is not None and isinstance(layer, Factorized) and getattr(dense, "bias", None) is not None:
                dense.get_parameter("bias").copy_(layer.get_parameter("bias"))
        swap_(self, replacements, models_in(self))
        attentions = {each.target.module_name: None for each in cuts if isinstance(each.target, HeadTarget)}
        for name in attentions if self.shapes_heads else ():
            narrow_(self.get_submodule(name))

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Return the stock model that computes the same, with factors multiplied out.

        Heads narrower than those of the stock model are filled up with zeros. This model is left as it is.

        Returns:
            A model of ``dense_class`` on the same device, in the same dtype and mode. It can be saved, loaded and
            deployed without ``hf_fnl``.

        Raises:
            ValueError: If the parameters are not all present, or one has no place in the stock model, as those of an
                adapter or of a layer that a subclass adds.
        """
        check_present(self, "merge")
        config = self.config.to_dense()
        with init.no_init_weights():
            dense = self.dense_class(config)
        dense.to(device=self.device, dtype=self.dtype)
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, MADE):
                for parameter, _ in module.named_parameters():
                    state.pop(f"{name}.{parameter}", None)
                state |= {f"{name}.{key}": value for key, value in module.to_dense().state_dict().items()}
        if foreign := [name for name in state if name not in dense.state_dict()]:
            raise ValueError(
                f"merge: a {type(dense).__name__} has no place for {foreign[0]} (of {len(foreign)}): merge an adapter "
                "of PEFT first (merge_and_unload), and take a layer of your own out"
            )
        dense.load_state_dict(state)
        dense.tie_weights()
        if self.can_generate():
            dense.generation_config = copy.deepcopy(self.generation_config)
        return dense.train(self.training)


def as_class(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Return a model of another class that has the modules and attributes of one; its constructor is not run."""
    other: PreTrainedModel = model_class.__new__(model_class)  # type: ignore[call-overload]
    PreTrainedModel.__init__(other, model.config)  # tells Transformers which outputs the class can record
    vars(other).update(vars(model))
    return other


@torch.no_grad()
def _fill_(ours: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Give a model of ours without factors the weights of a stock model; all tensors of both are accounted for."""
    ours.tie_weights()  # which a construction that initializes nothing leaves out
    theirs, state = dense.state_dict(), ours.state_dict()
    name_of_dense, name_of_ours = type(dense).__name__, type(ours).__name__
    if lost := [name for name, value in theirs.items() if name not in state or state[name].shape != value.shape]:
        but = f": its own has shape {tuple(state[lost[0]].shape)}" if lost[0] in state else ""
        raise ValueError(f"a {name_of_ours} has no place for {listed(lost)} of the {name_of_dense}{but}")
    layers = {name for name, _ in dense.named_modules() if name}  # what dense lacks is a subclass's own, and drawn
    if missing := [name for name in state if name not in theirs and name.rpartition(".")[0] in layers]:
        raise ValueError(f"the {name_of_dense} lacks {listed(missing)}, which a {name_of_ours} has")
    ours.load_state_dict(theirs, strict=False)
    held = ours.state_dict()
    for target, source in ours.all_tied_weights_keys.items():
        same = (
            torch.allclose(held[n], theirs[n], rtol=0, atol=0, equal_nan=True) for n in (target, source) if n in theirs
        )
        if not all(same):
            raise ValueError(
                f"a {name_of_ours} holds {source} and {target} as one, which differ in the {name_of_dense}: set "
                "tie_word_embeddings=False in its configuration"
            )
    trained = {name: p.requires_grad for name, p in dense.named_parameters(remove_duplicate=False)}
    for name, parameter in ours.named_parameters():
        if name in trained:
            parameter.requires_grad_(trained[name])
            parameter._is_hf_initialized = True  # as of what is loaded: never drawn anew
    if any(name not in trained for name, _ in ours.named_parameters()):
        ours.initialize_weights()


def is_loaded(held: Tensor | nn.Module) -> bool:
    """Return whether a parameter, or a module, is loaded or drawn, by the mark that Transformers leaves on it."""
    return getattr(held, "_is_hf_initialized", False)


def init_factors(module: Factorized, std: float) -> None:
    """Draw the factors of a layer, and zero its bias, unless a checkpoint set all of them."""
    if not all(is_loaded(factor) for factor in module.factors()):
        draw = functools.partial(_draw_as_stock_, module, std=std)
        for factor, value in zip(module.factors(), module.fresh_factors(draw), strict=True):
            init.copy_(factor, value)
    if getattr(module, "bias", None) is not None:
        init.zeros_(module.bias)


def _draw_as_stock_(module: Factorized, weight: Tensor, std: float) -> None:
    """Fill ``weight (out, in)`` with what the stock model draws, which ``Conv1D`` holds transposed."""
    if isinstance(module, FactorizedLinear) and module.dense_class is Conv1D:
        weight.copy_(weight.new_empty(weight.shape[::-1]).normal_(0.0, std).mT)
    else:
        weight.normal_(0.0, std)


def adopt_modules_(model: PreTrainedModel, other: PreTrainedModel) -> None:
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
