"""TensorLy-Torch's layers, holding the factors of ours."""

from __future__ import annotations

import copy

import torch
from tltorch import FactorizedConv, TTTensor, TuckerTensor
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fnl.layers import TensorizedConv2d

IMPLEMENTATIONS = ("factorized", "reconstructed")
TOLERANCE = 1e-5  # of outputs of order one, in float64


def with_tensorly_torch(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """A copy of a model in which their layers take the places of our tensorized ones, which have as many parameters.

    Args:
        model: Left as it is.
        implementation: One of ``IMPLEMENTATIONS``: a chain of small convolutions, or one of the kernel multiplied out.

    Raises:
        RuntimeError: If a layer of theirs computes something else than ours.
    """
    theirs = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, TensorizedConv2d):
            _check(layer, implementation)
            theirs.set_submodule(name, tensorly_torch_layer(layer, implementation))
    return theirs


def tensorly_torch_layer(layer: TensorizedConv2d, implementation: str) -> FactorizedConv:
    """Their layer with our cores, in which height and width have changed places.

    Their Tensor-Train runs from the input channels over height and width to the output channels, and ours from the
    output channels over height and width to the input channels. A Tucker decomposition of theirs has a factor for
    each axis of the kernel as well; it is the identity.
    """
    if layer.scheme == "tt":
        out_core, height_core, width_core, in_core = layer.factors()
        train = (in_core.mT[None], width_core.permute(2, 1, 0), height_core.permute(2, 1, 0), out_core.mT[..., None])
        weight = TTTensor([_parameter(core) for core in train])
    else:
        out_core, core, in_core = layer.factors()
        identities = (torch.eye(size, dtype=core.dtype, device=core.device) for size in reversed(layer.kernel_size))
        weight = TuckerTensor(_parameter(core.mT), [_parameter(factor) for factor in (out_core, in_core, *identities)])
    options = {name: getattr(layer, name)[::-1] for name in ("stride", "padding", "dilation")}
    return FactorizedConv.from_factorization(weight, implementation=implementation, bias=layer.bias, **options)


def _parameter(core: Tensor) -> nn.Parameter:
    return nn.Parameter(core.detach().clone(memory_format=torch.contiguous_format))


@torch.no_grad()
def _check(layer: TensorizedConv2d, implementation: str) -> None:
    layer = copy.deepcopy(layer).double()
    x = torch.randn(2, layer.in_channels, 5, 7, dtype=torch.float64, device=layer.factors()[0].device)
    error = (tensorly_torch_layer(layer, implementation)(x.mT).mT - layer(x)).abs().max().item()
    if not error < TOLERANCE:
        raise RuntimeError(f"their {layer.scheme} layer, {implementation}, is {error:.1e} from ours; nothing was timed")
