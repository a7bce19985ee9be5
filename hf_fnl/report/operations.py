"""What a forward pass of a model costs, in the unit that suits what it reads."""

from __future__ import annotations

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_fnl.optim.diagnostics import Figures, forward_flops


def operations(model: PreTrainedModel) -> dict[str, Figures | int]:
    """Floating-point operations of a model, under the name of their unit: for a token, or for an image.

    Those for an image are left out where the configuration does not say how large images are.
    """
    if model.main_input_name != "pixel_values":
        return {"FLOPs per token": forward_flops(model)}
    size = getattr(model.config, "image_size", None)
    return {} if size is None else {"FLOPs per image": image_flops(model, size)}


def image_flops(model: PreTrainedModel, size: int | tuple[int, int]) -> int:
    """Operations of a forward pass over one image, as torch counts them while the model runs on the meta device.

    Counted are convolutions, matrix products and attention, two operations for each multiplication and addition.

    Args:
        model: A model of ``pixel_values``; nothing is computed and nothing changes.
        size: Height and width of the image, or one number for both.
    """
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.empty(1, model.config.num_channels, height, width, dtype=model.dtype, device="meta")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, on_meta, (), {"pixel_values": images})
    return counter.get_total_flops()
