"""Convolutional networks of the two papers, registered with Transformers' Auto classes when imported.

They are plain models; :func:`~hf_fnl.surgery.factorize_` makes them low-rank, tensorized or overcomplete.
"""

from hf_fnl.vision.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification, CifarResNetModel
from hf_fnl.vision.models.presets import PRESETS, inner_convolutions, vision_model
from hf_fnl.vision.models.vgg import VGGConfig, VGGForImageClassification, VGGModel
from hf_fnl.vision.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification, WideResNetModel

__all__ = [
    "PRESETS",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarResNetModel",
    "VGGConfig",
    "VGGForImageClassification",
    "VGGModel",
    "WideResNetConfig",
    "WideResNetForImageClassification",
    "WideResNetModel",
    "inner_convolutions",
    "vision_model",
]
