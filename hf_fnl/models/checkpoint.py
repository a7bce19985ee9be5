"""Checkpoints of models that went through surgery.

Transformers builds a model, lets a *quantization method* change it, and then loads the weights. Surgery is registered
as such a method under the name ``hf_fnl``: the factorized layers are put in their places before the weights arrive.
What comes back is no quantized model but an ordinary one, which trains, casts and saves as any other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

import hf_fnl.models
from hf_fnl.layers import Factorized
from hf_fnl.models.base import init_factors
from hf_fnl.models.division import partition_
from hf_fnl.models.loading import load_checked
from hf_fnl.surgery.record import QUANT_METHOD, Layers, SurgeryConfig, models_in, update_records_
from hf_fnl.surgery.restore import empty_layers
from hf_fnl.surgery.swap import swap_

_FIRST_FACTORS = ("U", "out_core")  # the name of one factor of every factorized layer
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class SurgeryLoader(HfQuantizer):
    """Puts factorized layers into a model before its weights are loaded."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        layers = _without_dense(self.quantization_config.layers, checkpoint_files or ())
        swap_(model, empty_layers(model, layers), models_in(model))

    @torch.no_grad()
    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Draw what the checkpoint lacks, and leave a model that does not count as quantized."""
        for layer in model.modules():
            if isinstance(layer, Factorized):
                init_factors(layer, getattr(model.config, "initializer_range", 0.02))
        self.remove_quantization_config(model)
        update_records_([model])
        if is_deepspeed_zero3_enabled():
            partition_(model)

    def is_serializable(self) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def _without_dense(layers: Layers, files: Sequence[str | os.PathLike]) -> Layers:
    """The layers of a record without those that weight files hold as dense ones.

    A dense model that was made from the configuration of a factorized one has that one's record.
    """
    names: set[str] = set()
    for file in files:
        if not str(file).endswith(".safetensors"):
            return layers
        with safe_open(file, framework="pt") as weights:
            names.update(weights.keys())
    if names and not any(name.rpartition(".")[2] in _FIRST_FACTORS for name in names):
        return {}  # whatever the names of the layers are in the files of this architecture
    return {name: record for name, record in layers.items() if f"{name}.weight" not in names}


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
        OSError: If there is no such folder or file, or a weight file is truncated or corrupt.
        ValueError: If the checkpoint's parameters are not those that its configuration says, unless
            ``ignore_mismatched_sizes``, or the configuration names no known class.
    """
    folder = Path(path_or_id, kwargs.get("subfolder") or "")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"{folder} holds no config.json, which a model's folder needs")
    if auto_class is None:
        options = {name: value for name, value in kwargs.items() if name in _HUB_OPTIONS}
        auto_class = _saved_class(path_or_id, AutoConfig.from_pretrained(path_or_id, **options))
    return load_checked(auto_class.from_pretrained, path_or_id, **kwargs)


def _saved_class(path_or_id: str | os.PathLike, config: PreTrainedConfig) -> Any:
    names = config.architectures or []
    for name in names:
        for library in (hf_fnl.models, transformers):
            if hasattr(library, name):
                return getattr(library, name)
    raise ValueError(
        f"the config.json of {path_or_id} names no model class of transformers or hf_fnl in architectures, but "
        f"{', '.join(names) or 'nothing'}; pass the class as auto_class"
    )
