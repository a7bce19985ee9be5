"""Every architecture of Transformers with few and small layers, made from its configuration class alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig

_LARGEST = 30_000_000  # parameters; more is not small
# What the names of sizes end in, or are, and the size instead; the first that matches counts.
_SIZES = (
    (r"experts?_per_tok|num_selected|top_?k|n_shared", 2),
    (r"(num|n)_(local_|routed_)?experts$", 4),
    (r"n_group$|topk_group$", 1),
    (r"(kv|key_value)_heads|num_kv", 2),
    (r"heads?$", 4),
    (r"(^|_)n?_?layers?$|depth$|num_blocks$", 2),
    (r"mamba|ssm|conv|kernel", None),
    (r"head_(dim|size)$|^d_kv$|^d_head$|lora_rank|rotary_dim", 8),
    (r"vocab_size", 64),
    (r"max_.*position|n_positions|max_seq|max_source|max_target|n_ctx", 128),
    (r"intermediate|ffn|d_ff$|d_inner|n_inner|mlp_dim|feed_forward|inner_dim", 32),
    (r"hidden_size|d_model|n_embd|^dim$|embed_dim|embedding_size|hidden_dim|width$|emb_dim|proj\w*_dim|coder_dim", 32),
    (r"image_size", 32),
    (r"window_size", 2),
    (r"patch_size", 8),
)
_LISTS = ((r"layers$|depths|num_blocks", 1), (r"heads", 4), (r"hidden_sizes|dims?$|channels", 32))
_KEPT = ("model_type", "transformers_version", "architectures", "dtype", "rope_parameters", "rope_scaling")
# Where the sizes above do not go with each other; the first with which a model can be built counts.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": 8, "num_key_value_heads": 4},
    {"num_hidden_layers": 4},
    {"prediction_length": 4},
)


def small_config(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of the class with all sizes small, in those inside it too."""
    default = cls()
    nested = {name: getattr(default, name, None) for name in cls.sub_configs}
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name not in nested and name not in _KEPT and not name.endswith("layer_types"):
            small = _small(name, value)
            options |= {} if small == value else {name: small}
    rope = getattr(default, "rope_parameters", None)
    if rope and "rope_type" in rope:  # parts of half of a head of width 8, where positions have three dimensions
        half = int(4 * rope.get("partial_rotary_factor", 1))
        options["rope_parameters"] = {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    options |= {name: value for name, value in changes.items() if hasattr(default, name)}
    options |= {name: small_config(type(inner)).to_dict() for name, inner in nested.items() if inner is not None}
    return cls(**options)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return next(([size] * len(value) for pattern, size in _LISTS if re.search(pattern, name)), value)
    if type(value) is not int:
        return value
    if name.endswith("token_id"):
        return value if value < 64 else 3
    size = next((size for pattern, size in _SIZES if re.search(pattern, name)), None)
    return value if size is None else min(value, size)


def architectures() -> list[str]:
    """Model types that have a model without a head."""
    return [name for name, cls in CONFIG_MAPPING.items() if cls in MODEL_MAPPING]


def build(name: str) -> nn.Module:
    """A small model with random parameters, all of which matter, in float64.

    Raises:
        Exception: Whatever its class raises if its sizes do not go with each other or a package is missing.
    """
    cls = CONFIG_MAPPING[name]
    model_class = MODEL_MAPPING[cls]
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    errors = []
    for variant in _VARIANTS:
        try:
            config = small_config(cls, **variant)
            config._attn_implementation = config._experts_implementation = "eager"
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in model_class(config).parameters())
            break
        except Exception as error:
            errors.append(error)
    else:
        raise errors[0]
    if count > _LARGEST:
        raise ValueError(f"{name} has {count:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


def calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs that may be a model's, one after the other."""
    names = inspect.signature(model.forward).parameters
    config = model.config.get_text_config()
    ids = 5 + torch.arange(12).view(2, 6) % 40
    size = getattr(model.config, "image_size", 32)
    size = size if isinstance(size, int) else 32
    tokens = {key: ids for key in ("input_ids", "decoder_input_ids") if key in names}
    embedded = {"inputs_embeds": torch.randn(2, 6, getattr(config, "hidden_size", None) or 32, dtype=torch.float64)}
    pixels = {"pixel_values": torch.randn(2, getattr(model.config, "num_channels", 3), size, size, dtype=torch.float64)}
    video = {"pixel_values": torch.randn(2, getattr(model.config, "num_frames", 2), 3, size, size, dtype=torch.float64)}
    boxes = {"bbox": torch.zeros(*ids.shape, 4, dtype=torch.long)}
    features = [(n, 3000) for n in (80, 128)] + [(n, 256) for n in (80, 128)] + [(100, n) for n in (32, 80, 128, 160)]
    sounds = [{"input_features": torch.randn(2, *shape, dtype=torch.float64)} for shape in features]
    waves = [(4000,), (1, 4000), (getattr(model.config, "max_length", None) or 1024, 128)]
    sounds += [{"input_values": torch.randn(2, *shape, dtype=torch.float64)} for shape in waves]
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
    known = [tokens, embedded, pixels, tokens | pixels, tokens | boxes, tokens | boxes | pixels, video, tokens | video]
    for inputs in [*known, *(decoder | sound for sound in sounds)]:
        if inputs and set(inputs) <= set(names):
            yield inputs
