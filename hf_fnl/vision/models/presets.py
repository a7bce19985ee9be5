"""Vision models by name, and which of their layers the papers factorize."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, ResNetForImageClassification

from hf_fnl.vision.models.base import check_sizes
from hf_fnl.vision.models.cifar_resnet import CifarResNetForImageClassification
from hf_fnl.vision.models.vgg import VGGForImageClassification
from hf_fnl.vision.models.wide_resnet import WideResNetForImageClassification


def _first_width(width: int) -> dict[str, Any]:
    return {"width": width}


def _bottleneck_widths(width: int) -> dict[str, Any]:
    """Channels of the stages of Transformers' ResNet, four times those between their 1-by-1 convolutions."""
    return {"embedding_size": width, "hidden_sizes": [4 * width, 8 * width, 16 * width, 32 * width]}


@dataclass(frozen=True)
class Preset:
    """A model class and the sizes of one of its published models.

    Args:
        model_class: The image classifier.
        width: Channels of the first convolution.
        image_size: Height and width of the images in pixels.
        fields: Further fields of the configuration.
        widths: Maps ``width`` to the fields of the configuration that are channels.
    """

    model_class: type[PreTrainedModel]
    width: int
    image_size: int = 32
    fields: Mapping[str, Any] = field(default_factory=dict)
    widths: Callable[[int], dict[str, Any]] = _first_width


PRESETS: dict[str, Preset] = {
    **{
        f"resnet{depth}": Preset(CifarResNetForImageClassification, 16, fields={"depth": depth})
        for depth in (20, 32, 44, 56, 110)  # He et al. 2016, Table 6
    },
    # Wang et al. 2020: twice the channels, and shortcuts that are convolutions
    "resnet32x2": Preset(CifarResNetForImageClassification, 32, fields={"depth": 32, "shortcut": "conv"}),
    "vgg19": Preset(VGGForImageClassification, 64, fields={"depth": 19}),
    "wrn28-10": Preset(WideResNetForImageClassification, 16, fields={"depth": 28, "widen_factor": 10}),
    "resnet50": Preset(ResNetForImageClassification, 64, image_size=224, widths=_bottleneck_widths),
}


def vision_model(
    name: str,
    *,
    num_labels: int,
    image_size: int | None = None,
    num_channels: int = 3,
    width: int | None = None,
    id2label: Mapping[int, str] | None = None,
    label2id: Mapping[str, int] | None = None,
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
        label2id: Their numbers; those in ``id2label`` unless given.

    Raises:
        ValueError: If the name is unknown, a size is too small, or there are not as many names as classes.
    """
    if name not in PRESETS:
        raise ValueError(f"the model must be one of {', '.join(PRESETS)}, got {name!r}")
    check_sizes(num_labels=num_labels, image_size=image_size, num_channels=num_channels, width=width)
    preset = PRESETS[name]
    config = preset.model_class.config_class(
        **preset.fields,
        **preset.widths(preset.width if width is None else width),
        image_size=preset.image_size if image_size is None else image_size,
        num_channels=num_channels,
        **_labels(num_labels, id2label, label2id),
    )
    return preset.model_class(config)


def _labels(num_labels: int, id2label: Mapping[int, str] | None, label2id: Mapping[str, int] | None) -> dict[str, Any]:
    if id2label is None:
        return {"num_labels": num_labels}
    if len(id2label) != num_labels:
        raise ValueError(f"id2label must name num_labels={num_labels} classes, got {len(id2label)} names")
    numbers = {label: number for number, label in id2label.items()} if label2id is None else dict(label2id)
    return {"id2label": dict(id2label), "label2id": numbers}


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
