"""Vision models by name, and which of their layers the papers factorize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, ResNetForImageClassification

from hf_fnl.vision.models.base import check_sizes
from hf_fnl.vision.models.cifar_resnet import CifarResNetForImageClassification
from hf_fnl.vision.models.vgg import VGGForImageClassification
from hf_fnl.vision.models.wide_resnet import WideResNetForImageClassification

# Class and fields of the configuration; where a width or image size is not said, it is the default of the class.
PRESETS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    **{
        f"resnet{depth}": (CifarResNetForImageClassification, {"depth": depth})
        for depth in (20, 32, 44, 56, 110)  # He et al. 2016, Table 6
    },
    # Wang et al. 2020: twice the channels, and shortcuts that are convolutions
    "resnet32x2": (CifarResNetForImageClassification, {"depth": 32, "width": 32, "shortcut": "conv"}),
    "vgg19": (VGGForImageClassification, {"depth": 19}),
    "wrn28-10": (WideResNetForImageClassification, {"depth": 28, "widen_factor": 10}),
    "resnet50": (ResNetForImageClassification, {"image_size": 224}),
}


def vision_model(
    name: str,
    *,
    num_labels: int,
    image_size: int | None = None,
    num_channels: int = 3,
    width: int | None = None,
    id2label: Mapping[int, str] | None = None,
) -> PreTrainedModel:
    """Return a model of published sizes, freshly drawn.

    Args:
        name: One of ``PRESETS``: ``"resnet20"`` to ``"resnet110"``, ``"resnet32x2"``, ``"vgg19"``, ``"wrn28-10"`` or
            ``"resnet50"``, which is Transformers' own.
        num_labels: Classes.
        image_size: Height and width of the images in pixels; the preset's own unless given.
        num_channels: Channels of the images.
        width: Channels of the first convolution, by which all others change; the preset's own unless given.
        id2label: Names of the classes.

    Raises:
        ValueError: If the name is unknown, a size is too small, or there are not as many names as classes.
    """
    if name not in PRESETS:
        raise ValueError(f"the model must be one of {', '.join(PRESETS)}, got {name!r}")
    check_sizes(num_labels=num_labels, image_size=image_size, num_channels=num_channels, width=width)
    model_class, preset = PRESETS[name]
    fields = {**preset, "num_channels": num_channels, "num_labels": num_labels}
    if image_size is not None:
        fields["image_size"] = image_size
    if width is not None and model_class is ResNetForImageClassification:  # stages have four times the inner channels
        fields |= {"embedding_size": width, "hidden_sizes": [4 * width, 8 * width, 16 * width, 32 * width]}
    elif width is not None:
        fields["width"] = width
    if id2label is not None:
        if len(id2label) != num_labels:
            raise ValueError(f"id2label must name num_labels={num_labels} classes, got {len(id2label)} names")
        fields |= {"id2label": dict(id2label), "label2id": {label: number for number, label in id2label.items()}}
    return model_class(model_class.config_class(**fields))


def inner_convolutions(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all convolutions but the first, which the papers factorize: what ``include`` may be.

    Khodak et al. 2021 leave the first and the last layer dense, of which the last is no convolution; Kamalakara et al.
    2022 leave the first one.

    Args:
        model: Any image classifier whose convolutions are ``torch.nn.Conv2d``, in the order in which they run.

    Raises:
        ValueError: If there is at most one convolution.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if len(names) < 2:
        found = f"only {names[0]}, the first" if names else "none"
        raise ValueError(f"{type(model).__name__} has no inner convolution: of torch.nn.Conv2d it holds {found}")
    return tuple(names[1:])
