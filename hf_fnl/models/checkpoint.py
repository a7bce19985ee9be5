"""Checkpoints of models that went through surgery.

Transformers builds a model, lets a *quantization method* change it, and then loads the weights. Surgery is registered
as such a method under the name ``hf_fnl``: the factorized layers are put in their places before the weights arrive.
What comes back is no quantized model but an ordinary one, which trains, casts and saves as any other.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from hf_fnl.layers import Factorized
from hf_fnl.models.base import init_factors
from hf_fnl.models.loading import load_checked
from hf_fnl.surgery.record import QUANT_METHOD, Layers, SurgeryConfig, models_in, update_records_
from hf_fnl.surgery.restore import empty_layers
from hf_fnl.surgery.swap import swap_
from hf_fnl.utils.folders import check_model

_FIRST_FACTORS = ("U", "out_core")  # the name of one factor of every factorized layer
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class SurgeryLoader(HfQuantizer):
    """Puts factorized layers into a model before its weights are loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        layers = _without_dense(self.quantization_config.layers, model, checkpoint_files or ())
        swap_(model, empty_layers(model, layers), models_in(model))

    @torch.no_grad()
    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Draw what the checkpoint lacks, and leave a model that does not count as quantized."""
        for layer in model.modules():
            # What is on the meta device now is on disk.
            if isinstance(layer, Factorized) and not layer.factors()[0].is_meta:
                init_factors(layer, getattr(model.config, "initializer_range", 0.02))
        self.remove_quantization_config(model)
        update_records_([model])

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _without_dense(layers: Layers, model: PreTrainedModel, files: Sequence[str | os.PathLike]) -> Layers:
    """The layers of a record without those that weight files hold as dense ones, as they are in ``model``.

    A dense model that was made from the configuration of a factorized one has that one's record.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not str(file).endswith(".safetensors"):
            return layers
        with safe_open(file, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    # Whatever the names of the layers are in the files of this architecture.
    has_factors = not shapes or any(name.rpartition(".")[2] in _FIRST_FACTORS for name in shapes)
    dense = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    def is_dense(name: str, record: Mapping[str, Any]) -> bool:
        weight = f"{name}.weight"
        if "heads" in record:
            return weight in shapes and shapes[weight] == dense.get(weight)
        return not has_factors or weight in shapes

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
        **kwargs: For its ``from_pretrained``.

    Returns:
        The model in evaluation mode; nothing is decomposed on the way.

    Raises:
        OSError: If there is no such folder or file, the Hub has no such model or cannot be asked, or a weight file is
            truncated or corrupt.
        ValueError: If the checkpoint's parameters are not those that its configuration says, unless
            ``ignore_mismatched_sizes``; the configuration names no known class, or one that needs code of its own; or a
            file lies outside of the folder.
    """
    # With these options the Hub need not be asked.
    if not {"cache_dir", "local_files_only"} & set(kwargs) or Path(path_or_id).expanduser().exists():
        check_model(path_or_id, kwargs.get("subfolder") or "", kwargs.get("token"))
    kwargs = {"use_safetensors": True, **kwargs}
    path_or_id = Path(path_or_id).expanduser() if Path(path_or_id).expanduser().is_dir() else path_or_id
    if auto_class is None:
        options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
        config = read_config(path_or_id, **options)
        auto_class = saved_class(path_or_id, config)
        if "dtype" not in kwargs and "float8" in str(config.dtype):
            warnings.warn(f"{path_or_id} holds float8 weights, which are read as bfloat16 without a loss", stacklevel=2)
            kwargs["dtype"] = torch.bfloat16
    return load_checked(auto_class.from_pretrained, path_or_id, **kwargs)


def read_config(path_or_id: str | os.PathLike, **options: Any) -> PreTrainedConfig:
    """The configuration of a model; a ``ValueError`` if that needs code of its own, which is not run."""
    try:
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False, **options)
    except (RecursionError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"the config.json of {path_or_id} is damaged: {error}") from error
    except ValueError as error:
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
    ours = {found.__name__: found for found in _subclasses(PreTrainedModel) if found.__module__.startswith("hf_fnl.")}
    for name in names:
        named: Any = ours.get(name) or getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named is not PreTrainedModel:
            return named
    raise ValueError(
        f"the config.json of {source} names no model class of transformers or hf_fnl in architectures, but "
        f"{', '.join(names) or 'nothing'}; pass the class as auto_class"
    )


def _subclasses(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)
