"""Surgery on convolutional networks: overcomplete, deep and tensorized kernels, and ratios of whole networks."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from vision_cases import OURS

from hf_fnl import FactorizationConfig, factorize_, find_products, merge_, vision_model
from hf_fnl.layers import Factorized, TensorizedConv2d
from hf_fnl.surgery import restore_
from hf_fnl.vision.models import inner_convolutions

CASE = OURS["resnet-pad"]


def config(model: nn.Module, **options):
    return FactorizationConfig(kinds=("conv",), include=inner_convolutions(model), **options)


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | Factorized)}


FULL = {"overcomplete": True, "init": "default", "rank_scale": 1}
WAYS = {
    "deep": {**FULL, "deep": True},
    "wide": {**FULL, "rank_scale": 3},
    "low-rank-deep": {"rank_scale": 0.3, "deep": True},
    "channel": {"rank_scale": 0.5, "conv_scheme": "channel"},
    "tt": {"rank_scale": 0.4, "conv_scheme": "tt"},
    "tucker": {"rank": 3, "conv_scheme": "tucker"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_network_in_every_form_saves_loads_and_merges(way, tmp_path):
    model, batch = CASE.build(), CASE.batch()
    names = set(dict(model.named_parameters()))
    options = config(model, **WAYS[way])
    record = factorize_(model, options).to_dict()
    before = model(**batch)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, before.logits)
    other = CASE.build()
    restore_(other, record)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(**batch).logits, before.logits)
    merge_(loaded)
    assert set(dict(loaded.named_parameters())) == names
    assert torch.allclose(loaded(**batch).logits, before.logits, atol=1e-4)


@pytest.mark.parametrize(("scheme", "scale"), [("spatial", 0.1), ("channel", 0.5)])
def test_ranks_of_resnet50_are_those_of_the_papers(scheme, scale):
    """K21, Sec. 3: a share of ``out k``. K22, Sec. 3.1.2: of ``min(in k k, out)``, which is never more than dense."""
    with torch.device("meta"):
        model = vision_model("resnet50", num_labels=1000)
    shapes = {name: layer.weight.shape for name, layer in convolutions(model).items()}
    replacements = factorize_(model, config(model, rank_scale=scale, conv_scheme=scheme)).replacements
    assert len(replacements) == 52
    for replacement in replacements:
        out_channels, in_channels, height, width = shapes[replacement.name]
        if scheme == "channel":
            full = largest = min(in_channels * height * width, out_channels)
            assert replacement.parameters_after <= replacement.parameters_before
        else:
            full, largest = out_channels * height, min(out_channels * height, in_channels * width)
        assert replacement.rank == min(math.floor(scale * full + 0.5), largest)


@pytest.mark.parametrize(
    ("sizes", "options", "ranks"),
    [
        pytest.param((512, 128, 1), {}, {"channel": 38, "spatial": 38}, id="reduces"),
        pytest.param((64, 256, 1), {}, {"channel": 19, "spatial": 64}, id="widens"),
        pytest.param((4, 64, 3), {}, {"channel": 11, "spatial": 12}, id="few-channels"),
        pytest.param((32, 64, 3), {"groups": 8}, {"channel": 11, "spatial": 12}, id="groups"),
        pytest.param((16, 64, (3, 1)), {}, {"channel": 14, "spatial": 16}, id="column"),
    ],
)
def test_a_rank_scale_is_a_share_of_the_rank_of_the_scheme(sizes, options, ranks):
    for scheme, rank in ranks.items():
        model = nn.Sequential(nn.Conv2d(*sizes, **options))
        factorize_(model, FactorizationConfig(kinds=("conv",), rank_scale=0.3, conv_scheme=scheme))
        assert model[0].rank == rank


@pytest.mark.parametrize(("way", "scale"), [("deep", 1), ("wide", 3)])
def test_overcomplete_ranks_are_those_of_the_paper(way, scale):
    model = CASE.build()
    shapes = {name: layer.weight.shape for name, layer in convolutions(model).items()}
    factorize_(model, config(model, **WAYS[way]))
    layers = {name: layer for name, layer in convolutions(model).items() if isinstance(layer, Factorized)}
    assert set(layers) == set(shapes) - {next(iter(shapes))}
    for name, layer in layers.items():
        assert layer.rank == scale * shapes[name][0] * shapes[name][2]
        assert (layer.M is not None) == (way == "deep")
        if way == "deep":
            assert torch.equal(layer.M, torch.eye(layer.rank))


@pytest.mark.parametrize("scheme", ["spatial", "channel", "tt", "tucker"])
def test_factors_are_drawn_as_the_model_draws_its_kernels(scheme):
    model = OURS["wide-resnet"].build(width=24)
    torch.manual_seed(0)
    factorize_(model, config(model, rank=18, conv_scheme=scheme, init="default"))
    layer = max((m for m in model.modules() if isinstance(m, Factorized)), key=lambda m: math.prod(m.dense_shape))
    for kernel in layer.chain(*layer.factors()):
        fan_out = kernel.shape[0] * kernel[0, 0].numel()
        assert kernel.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.15)  # He et al. 2015


@pytest.mark.parametrize(("scheme", "ratio"), [("spatial", 0.3), ("channel", 0.7), ("tt", 0.3), ("tucker", 0.7)])
def test_a_ratio_of_the_whole_network_is_met(scheme, ratio):
    model = CASE.build(width=24)
    total = sum(p.numel() for p in model.parameters())
    factorize_(model, config(model, ratio=ratio, conv_scheme=scheme))
    assert sum(p.numel() for p in model.parameters()) / total == pytest.approx(ratio, rel=0.01)


def test_a_ratio_that_cannot_be_met_names_the_closest():
    model = CASE.build()
    with pytest.raises(ValueError, match=r"ratio=0.01 cannot be met: .* the closest ratio is 0\.\d+") as error:
        factorize_(model, config(model, ratio=0.01))
    closest = float(re.search(r"closest ratio is (0\.\d+)", str(error.value))[1])
    copied = copy.deepcopy(model)
    factorize_(copied, config(copied, ratio=closest))
    total = sum(p.numel() for p in model.parameters())
    factorize_(model, config(model, rank=1))
    assert sum(p.numel() for p in model.parameters()) / total == pytest.approx(closest, rel=1e-3)


def test_energies_of_tensors_are_what_is_kept():
    model = CASE.build()
    kernels = {name: layer.weight.detach().clone() for name, layer in convolutions(model).items()}
    result = factorize_(model, config(model, rank=4, conv_scheme="tt"))
    for replacement in result.replacements:
        layer, kernel = model.get_submodule(replacement.name), kernels[replacement.name]
        assert isinstance(layer, TensorizedConv2d)
        error = (kernel - layer.dense_weight()).square().sum() / kernel.square().sum()
        assert replacement.energy == pytest.approx(1 - error.item(), abs=1e-5)
        assert replacement.parameters_after == sum(factor.numel() for factor in layer.factors())
        assert replacement.shape == tuple(kernel.shape)
    assert {product.kind for product in find_products(model)} == {"tensor"}


@pytest.mark.parametrize("scheme", ["spatial", "tt", "tucker"])
def test_a_kernel_of_zeros_keeps_all_of_its_energy(scheme):
    model = nn.Sequential(nn.Conv2d(5, 7, 3))
    nn.init.zeros_(model[0].weight)
    result = factorize_(model, FactorizationConfig(kinds=("conv",), rank=2, conv_scheme=scheme))
    assert [replacement.energy for replacement in result.replacements] == [1.0]
    assert not model[0].dense_weight().any()


def test_a_rank_above_the_matrix_is_an_error_unless_overcomplete():
    model = CASE.build()
    with pytest.raises(ValueError, match=r"rank of .* must be in \[1, 15\], got 16"):
        factorize_(model, config(model, rank=16))
    factorize_(model, config(model, rank=16, overcomplete=True, init="default"))
    assert {layer.rank for layer in convolutions(model).values() if isinstance(layer, Factorized)} == {16}


@pytest.mark.parametrize(("options", "rank"), [({**FULL, "deep": True}, 5), ({**FULL, "rank_scale": 3}, 15)])
def test_linear_layers_are_overcomplete_as_well(options, rank):
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 11))
    record = factorize_(model, FactorizationConfig(**options)).to_dict()
    assert {layer.rank for layer in model.modules() if isinstance(layer, Factorized)} == {rank}
    other = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 11))
    restore_(other, record)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 7)
    expected = model(x)
    torch.testing.assert_close(other(x), expected)
    merge_(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_deep_product_of_a_trained_weight_is_its_truncation():
    dense = nn.Linear(13, 11)
    deep, plain = (
        factorize_(nn.Sequential(copy.deepcopy(dense)), FactorizationConfig(rank=4, deep=d)) for d in (True, False)
    )
    (first,), (second,) = deep.replacements, plain.replacements
    assert first.energy == pytest.approx(second.energy)
    assert first.parameters_after == second.parameters_after + 4 * 4


@pytest.mark.parametrize("scheme", ["spatial", "tucker"])
def test_kernels_on_disk_are_read_from_there(scheme, tmp_path):
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).eval()
    factorize_(model, FactorizationConfig(rank=3, kinds=("conv",), conv_scheme=scheme))
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    offloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model", **options)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    with torch.no_grad():
        assert_close(offloaded(images).logits, model(images).logits)
