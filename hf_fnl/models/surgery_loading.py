"""Loading of saved models that went through surgery.

Transformers builds a model, lets a *quantization method* change it, and then loads the weights. Surgery is registered
as such a method under the name ``hf_fnl``: the factorized layers are put in their places before the weights arrive.
What comes back is no quantized model but an ordinary one, which trains, casts and saves as any other; or, if it was
quantized afterwards, one that the other method loaded.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_fnl.layers import Factorized
from hf_fnl.models.base import init_factors
from hf_fnl.models.loading import load_checked
from hf_fnl.surgery.record import (
    QUANT_METHOD,
    Layers,
    method_of,
    models_in,
    quantization_of,
    subclasses,
    update_records_,
)
from hf_fnl.surgery.restore import empty_layers
from hf_fnl.surgery.swap import swap_
from hf_fnl.utils.folders import check_model
from hf_fnl.workarounds import check_shapes

_FIRST_FACTORS = ("U", "out_core")  # the name of one factor of every factorized layer
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class SurgeryConfig(QuantizationConfigMixin):
    """The record of surgery, as it is read from ``config.json``.

    Args:
        layers: Rank, scheme of a convolution and other options, by the name of the layer.
        quant_method: Name of the method, ``"hf_fnl"``.
        quantization: The ``quantization_config`` of another method that the factorized model went through, if any.
        quantize: Quantize in loading, for the weights in the files are not.
    """

    def __init__(
        self,
        layers: Layers,
        quant_method: str = QUANT_METHOD,
        quantization: Mapping[str, Any] | None = None,
        quantize: bool = False,
    ) -> None:
        self.layers, self.quant_method, self.quantization, self.quantize = layers, quant_method, quantization, quantize


class _Surgery:
    """Mixin before a quantizer of Transformers: puts factorized layers into a model before its weights are loaded."""

    def __init__(self, record: SurgeryConfig, pre_quantized: bool = True, **kwargs: Any) -> None:
        self.layers, other = record.layers, record.quantization
        config = record if other is None else AutoQuantizationConfig.from_dict(dict(other))
        self.is_quantized = other is not None
        in_files = pre_quantized and not record.quantize
        super().__init__(config, pre_quantized=in_files, **kwargs)  # type: ignore[call-arg]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        shapes = _shapes_in(checkpoint_files or ())
        layers = {**_found_beside(model, shapes), **_without_dense(self.layers, model, shapes)}
        new = empty_layers(model, layers)
        for name, layer in model.named_modules():
            if isinstance(new.get(layer), Factorized) and f"{name}.weight" in shapes:
                del new[layer]  # tied by the configuration, and not in the files
        swap_(model, new, models_in(model))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return super()._process_model_before_weight_loading(  # type: ignore[misc]
            model, checkpoint_files=checkpoint_files, **kwargs
        )

    @torch.no_grad()
    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Draw what the checkpoint lacks; what no other method quantized does not count as quantized."""
        if not self.is_quantized:
            check_shapes(model, self._shapes)
        for layer in model.modules():
            # What is on the meta device now is on disk.
            if isinstance(layer, Factorized) and not layer.factors()[0].is_meta:
                init_factors(layer, getattr(model.config, "initializer_range", 0.02))
        if not self.is_quantized:
            self.remove_quantization_config(model)
        else:
            super().postprocess_model(model, **kwargs)  # type: ignore[misc]
            update_records_([model])

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """As in Transformers, for a model that is no longer quantized; its factorized layers stay on record."""
        super().remove_quantization_config(model)  # type: ignore[misc]
        update_records_([model])


class SurgeryLoader(_Surgery, HfQuantizer):
    """The quantizer of ``quant_method="hf_fnl"``, which quantizes nothing by itself.

    For a model that was quantized after surgery it is the quantizer of that method, with surgery before it.
    """

    def __new__(cls, record: SurgeryConfig, **kwargs: Any) -> Any:
        """Return the quantizer for a record."""
        if record.quantization is None:
            return super().__new__(cls)
        other = type(AutoHfQuantizer.from_config(record.quantization, pre_quantized=not record.quantize))
        combined: Any = type(f"Surgery{other.__name__}", (_Surgery, other), {"__module__": __name__})
        return combined(record, **kwargs)

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _shapes_in(files: Sequence[str | os.PathLike]) -> dict[str, tuple[int, ...]]:
    """The shapes of what weight files hold, by name; nothing if one is not in the format of safetensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return {}
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


def _found_beside(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Layers:
    """Records of matrices that weight files hold as factors under the names of layers at the top of a model.

    A class that has a part of another model and a projection of that reads the record of the part only.
    """
    layers = (name for name, layer in model.named_children() if isinstance(layer, nn.Linear))
    found = {name: shapes[f"{name}.U"][1] for name in layers if f"{name}.U" in shapes}
    return {name: {"rank": rank} | ({"deep": True} if f"{name}.M" in shapes else {}) for name, rank in found.items()}


def _without_dense(layers: Layers, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> Layers:
    """The layers of a record without those that weight files hold as dense ones, as they are in ``model``.

    A dense model that was made from the configuration of a factorized one has that one's record.
    """
    # Whatever the names of the layers are in the files of this architecture.
    has_factors = not shapes or any(name.rpartition(".")[2] in _FIRST_FACTORS for name in shapes)
    has_pairs = not shapes or any(re.search(r"\.0\.[^.]+$", name) for name in shapes)
    dense = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    def is_dense(name: str, record: Mapping[str, Any]) -> bool:
        weight = f"{name}.weight"
        if "heads" in record:
            return weight in shapes and shapes[weight] == dense.get(weight)
        return weight in shapes or not (has_pairs if record.get("linear") else has_factors)

    return {name: record for name, record in layers.items() if not is_dense(name, record)}


# A second import, as in a notebook, finds the method registered.
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(SurgeryLoader)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(SurgeryConfig)


def load(path_or_id: str | os.PathLike, auto_class: Any = None, **kwargs: Any) -> Any:
    """Load a model of Transformers: stock, factorized by its class, or factorized by surgery.

    Args:
        path_or_id: Folder or Hub id.
        auto_class: A model class, or an Auto class. The one that the checkpoint was saved from unless given.
        **kwargs: For its ``from_pretrained``. With ``quantization_config`` the model is quantized when it is loaded,
            also if it is factorized: its layers that are plain linear ones, as :func:`~hf_fnl.to_linear_` makes them.

    Returns:
        The model in evaluation mode; nothing is decomposed on the way.

    Raises:
        OSError: If there is no such folder or file, the Hub has no such model or cannot be asked, or a weight file is
            truncated or corrupt.
        ValueError: If the checkpoint's parameters are not those that its configuration says, unless
            ``ignore_mismatched_sizes``; it is quantized already; the configuration names no known class, or one that
            needs code of its own; or a file lies outside of the folder.
    """
    # With these options the Hub need not be asked.
    if not {"cache_dir", "local_files_only"} & set(kwargs) or Path(path_or_id).expanduser().exists():
        check_model(path_or_id, kwargs.get("subfolder") or "", kwargs.get("token"))
    kwargs = {"use_safetensors": True, **kwargs}
    path_or_id = Path(path_or_id).expanduser() if Path(path_or_id).expanduser().is_dir() else path_or_id
    options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
    if kwargs.get("quantization_config") is not None:
        config = kwargs.get("config") or read_config(path_or_id, **options)
        kwargs |= _with_quantization(config, kwargs.pop("quantization_config"))
    if auto_class is None:
        config = read_config(path_or_id, **options)
        auto_class = saved_class(path_or_id, config)
        if "dtype" not in kwargs and "float8" in str(config.dtype):
            warnings.warn(f"{path_or_id} holds float8 weights, which are read as bfloat16 without a loss", stacklevel=2)
            kwargs["dtype"] = torch.bfloat16
    return load_checked(auto_class.from_pretrained, path_or_id, **kwargs)


def _with_quantization(config: PreTrainedConfig, quantization: Any) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` by which a model of a configuration is quantized when it is loaded."""
    record = getattr(config, "quantization_config", None)
    if record is None or method_of(record) != QUANT_METHOD:
        return {"quantization_config": quantization}
    if (other := quantization_of(record)) is not None:
        raise ValueError(f"quantization_config: the model is quantized already, with {method_of(other)}")
    config = copy.deepcopy(config)
    config.quantization_config = {**record, "quantization": quantization.to_dict(), "quantize": True}
    return {"config": config}


def read_config(path_or_id: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """The configuration of a model; a ``ValueError`` if that needs code of its own, which is not run."""
    try:
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False, **options)
    except (RecursionError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"the config.json of {path_or_id} is damaged: {error}") from error
    except ValueError as error:
        if unknown := re.search("model type `(.*?)` but Transformers does not recognize", str(error)):
            raise ValueError(
                f"{path_or_id} has model type {unknown[1]}, which neither Transformers nor hf_fnl knows: import the "
                "module that registers it first, and use Python, for the commands know the families of hf_fnl only"
            ) from error
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path_or_id} needs code of its own, and hf_fnl runs none that it finds in a model's folder: load the "
            "model yourself with trust_remote_code=True and give it to factorize_"
        ) from error


def saved_class(source: str | os.PathLike, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of model, of hf_fnl or Transformers, that a configuration was saved from.

    Raises:
        ValueError: If it names none: what else these packages hold, as functions, is not called.
    """
    names = config.architectures if isinstance(config.architectures, list) else [config.architectures]
    names = [name for name in names if isinstance(name, str)]
    ours = {found.__name__: found for found in subclasses(PreTrainedModel) if found.__module__.startswith("hf_fnl.")}
    for name in names:
        named: Any = ours.get(name) or getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named is not PreTrainedModel:
            return named
    raise ValueError(
        f"the config.json of {source} names no model class of transformers or hf_fnl in architectures, but "
        f"{', '.join(names) or 'nothing'}; pass the class as auto_class"
    )
