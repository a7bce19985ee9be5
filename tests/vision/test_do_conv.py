"""DO-Conv: the kernel is at first what it was, trains as a product, and multiplies back."""

from __future__ import annotations

import pytest
import torch
from pruning_cases import batch, image_trainer, state, tiny_net, tiny_resnet
from torch import nn
from torch.nn.utils import parametrize
from transformers import ResNetForImageClassification

from hf_fnl.vision.do_conv import merge_do_conv_, over_parametrize_

CONVS = [
    pytest.param({"in_channels": 2, "out_channels": 5, "kernel_size": 3}, id="square"),
    pytest.param({"in_channels": 3, "out_channels": 2, "kernel_size": (2, 5), "bias": False}, id="oblong"),
    pytest.param({"in_channels": 6, "out_channels": 9, "kernel_size": 3, "groups": 3}, id="groups"),
    pytest.param({"in_channels": 4, "out_channels": 8, "kernel_size": (1, 3), "groups": 4}, id="depthwise"),
]


def parametrized(options: dict) -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution whose factors were moved, and the kernel that it began with."""
    torch.manual_seed(0)
    conv = nn.Conv2d(**options)
    kernel = conv.weight.detach().clone()
    assert over_parametrize_(conv) == [""]
    return conv, kernel


@pytest.mark.parametrize("options", CONVS)
def test_the_kernel_is_at_first_what_it_was(options):
    conv, kernel = parametrized(options)
    assert torch.equal(conv.weight, kernel)
    out, channels, height, width = kernel.shape
    W, D = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    assert W.shape == (out, channels, height * width)
    assert D.shape == (conv.in_channels, height * width, height * width)
    assert D.count_nonzero() == 0


@pytest.mark.parametrize("options", CONVS)
def test_each_filter_is_a_matrix_of_its_channel_times_a_vector(options):
    conv, kernel = parametrized(options)
    W, D = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    torch.nn.init.normal_(D)
    per_group = conv.out_channels // conv.groups
    for o in range(kernel.shape[0]):
        for i in range(kernel.shape[1]):
            channel = o // per_group * kernel.shape[1] + i
            expected = (torch.eye(D.shape[1]) + D[channel]) @ W[o, i]
            torch.testing.assert_close(conv.weight[o, i].flatten(), expected)


@pytest.mark.parametrize("options", CONVS)
def test_merged_convolutions_have_the_same_outputs(options):
    conv, kernel = parametrized(options)
    torch.nn.init.normal_(conv.parametrizations.weight.original1)
    inputs = torch.randn(3, conv.in_channels, 7, 6)
    outputs = conv(inputs)
    assert merge_do_conv_(conv) == [""]
    assert type(conv) is nn.Conv2d
    assert isinstance(conv.weight, nn.Parameter)
    assert conv.weight.requires_grad
    assert conv.weight.shape == kernel.shape
    torch.testing.assert_close(conv(inputs), outputs)


def test_a_trained_network_multiplies_back_into_a_stock_one(tmp_path):
    net, plain = tiny_resnet(), tiny_resnet()
    names = over_parametrize_(net)
    assert names == [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    pixels = batch()["pixel_values"]
    torch.testing.assert_close(net.eval()(pixels).logits, plain.eval()(pixels).logits)
    before = state(net)
    image_trainer(tmp_path, net).train()
    after = state(net)
    assert all(not torch.equal(after[name], before[name]) for name in after if "parametrizations" in name)
    outputs = net.eval()(pixels).logits
    assert merge_do_conv_(net) == names
    net.save_pretrained(tmp_path / "stock")
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "stock").eval()
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(loaded(pixels).logits, outputs)


def test_only_the_layers_that_are_named_change():
    net = tiny_net()
    assert over_parametrize_(net, include=["middle", "head"]) == ["middle"]
    assert not parametrize.is_parametrized(net.stem)


def test_a_kernel_that_is_merged_without_gradients_can_be_trained():
    conv = nn.Conv2d(2, 3, 3)
    over_parametrize_(conv)
    with torch.no_grad():
        merge_do_conv_(conv)
    conv(torch.ones(1, 2, 3, 3)).sum().backward()
    torch.testing.assert_close(conv.weight.grad, torch.ones_like(conv.weight))


def test_nothing_to_change_is_an_error():
    with pytest.raises(ValueError, match="Conv2d has no convolutions with a kernel larger than 1 x 1"):
        over_parametrize_(nn.Conv2d(2, 3, 1))
    with pytest.raises(ValueError, match="TinyNet has no over-parametrized convolution"):
        merge_do_conv_(tiny_net())
