"""The vision models: published sizes, outputs, initialization, loss, checkpoints, surgery, and what bad input gets."""

import copy
import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from vision_cases import (
    CASES,
    OURS,
    VisionCase,
    each_classifier,
    each_family,
    reference_resnet,
    reference_vgg,
    reference_wide_resnet,
)

from hf_fnl import FactorizationConfig, factorize_, load, merge_
from hf_fnl.layers import FactorizedConv2d
from hf_fnl.vision.models import (
    PRESETS,
    CifarResNetConfig,
    VGGConfig,
    WideResNetConfig,
    inner_convolutions,
    vision_model,
)

EXACT = {"rtol": 0, "atol": 0}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def resnet_size(depth: int, width: int, *, projected: bool = False) -> int:
    """Parameters by the layer table of He et al. 2016, Sec. 4.2, for ten classes."""
    count, total = (depth - 2) // 6, 27 * width + 2 * width
    for before, after in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        total += 9 * before * after + (2 * count - 1) * 9 * after**2 + 2 * count * 2 * after
        total += (before * after + 2 * after) * (projected and before != after)
    return total + (4 * width + 1) * 10


def wide_resnet_size(depth: int, factor: int) -> int:
    """Parameters by Table 1 of Zagoruyko & Komodakis 2016, for ten classes."""
    count, widths = (depth - 4) // 6, (16, 16 * factor, 32 * factor, 64 * factor)
    total = 27 * 16
    for before, after in pairwise(widths):
        total += 9 * before * after + (2 * count - 1) * 9 * after**2 + before * after
        total += 2 * before + (2 * count - 1) * 2 * after
    return total + 2 * widths[-1] + (widths[-1] + 1) * 10


def vgg_size(*convolutions: int) -> int:
    """Parameters of normalized convolutions of these widths in a row, for ten classes."""
    sizes = sum(9 * before * after + 2 * after for before, after in pairwise((3, *convolutions)))
    return sizes + (convolutions[-1] + 1) * 10


VGG19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)
PUBLISHED = {  # parameters, and their millions in two digits
    "resnet20": (resnet_size(20, 16), "0.27"),
    "resnet32": (resnet_size(32, 16), "0.46"),
    "resnet44": (resnet_size(44, 16), "0.66"),
    "resnet56": (resnet_size(56, 16), "0.85"),
    "resnet110": (resnet_size(110, 16), "1.7"),
    "resnet32x2": (resnet_size(32, 32, projected=True), "1.9"),
    "vgg19": (vgg_size(*sum(VGG19, ())), "20"),
    "wrn28-10": (wide_resnet_size(28, 10), "36"),
    "resnet50": (23_528_522, "24"),  # Transformers' own: 25 557 032 for 1000 classes
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = vision_model(name, num_labels=10)
    exact, millions = PUBLISHED[name]
    assert parameters(model) == exact
    assert f"{exact / 1e6:.2g}" == millions
    assert model.config.image_size == (224 if name == "resnet50" else 32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_other_sizes_and_labels(name: str) -> None:
    names = {0: "no", 1: "yes", 2: "maybe"}
    with torch.device("meta"):
        model = vision_model(name, num_labels=3, image_size=48, num_channels=1, width=4, id2label=names)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.in_channels, first.out_channels, model.config.image_size) == (1, 4, 48)
    assert model.config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    assert model(torch.zeros(2, 1, 48, 48, device="meta")).logits.shape == (2, 3)


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "resnet-pad": functools.partial(reference_resnet, count=1),
    "resnet-conv": functools.partial(reference_resnet, count=2),
    "vgg": functools.partial(reference_vgg, counts=(1, 1, 2, 2, 2)),
    "wide-resnet": functools.partial(reference_wide_resnet, count=2),
    "wide-resnet-1": functools.partial(reference_wide_resnet, count=1),
}


@pytest.mark.parametrize(("case", "reference"), [(OURS[name], REFERENCES[name]) for name in OURS], ids=OURS)
@torch.no_grad()
def test_outputs_are_those_of_the_papers_networks(case: VisionCase, reference: Callable[..., Tensor]) -> None:
    model, batch = case.build().double(), case.batch()
    pixels = batch["pixel_values"].double()
    features = reference(pixels, model.backbone.state_dict())
    outputs = model.backbone(pixels)
    assert_close(outputs.last_hidden_state, features)
    assert_close(outputs.pooler_output, features.mean((2, 3)))
    assert_close(model(pixels).logits, model.classifier(features.mean((2, 3))))
    assert features.shape[1] == model.config.hidden_size


DRAWS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "resnet-pad": (nn.init.kaiming_normal_, nn.init.kaiming_normal_),
    "vgg": (nn.init.kaiming_normal_, functools.partial(nn.init.normal_, std=0.01)),
    "wide-resnet": (
        functools.partial(nn.init.kaiming_normal_, mode="fan_out"),
        functools.partial(nn.init.kaiming_uniform_, a=5**0.5),
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.usefixtures("poisoned_memory")
def test_layers_are_drawn_as_in_the_original_code(name: str) -> None:
    model = OURS[name].build()
    layers = nn.Conv2d(5, 7, 3), nn.Linear(5, 7)
    for layer, draw in zip(layers, DRAWS[name], strict=True):
        torch.manual_seed(3)
        expected = draw(torch.empty_like(layer.weight))
        torch.manual_seed(3)
        model._init_weights(layer)
        assert_close(layer.weight, expected, **EXACT)
        assert not layer.bias.any()
    norm = nn.BatchNorm2d(5).to_empty(device="cpu")
    model._init_weights(norm)
    assert_close(dict(norm.state_dict()), dict(nn.BatchNorm2d(5).state_dict()), **EXACT)


@each_family
@pytest.mark.usefixtures("poisoned_memory")
def test_construction_leaves_no_memory_uninitialized(case: VisionCase) -> None:
    for name, tensor in case.build().state_dict().items():
        assert torch.isfinite(tensor).all(), name


@each_family
def test_the_loss_is_the_cross_entropy_and_adds_up_over_parts_of_a_batch(case: VisionCase) -> None:
    model, batch = case.build(), case.batch()
    batch["labels"][1] = -100
    whole = model(**batch)
    chances = whole.logits.log_softmax(-1)
    kept = [row for row, label in enumerate(batch["labels"]) if label >= 0]
    assert_close(whole.loss, -chances[kept, batch["labels"][kept]].mean())
    parts = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, None))]
    assert_close(sum(model(**part, num_items_in_batch=torch.tensor(4)).loss for part in parts), whole.loss)
    assert model(batch["pixel_values"]).loss is None
    assert_close(model(**batch, return_dict=False), (whole.loss, whole.logits), **EXACT)


@pytest.mark.parametrize("count", [None, 5], ids=["alone", "in-a-larger-batch"])
def test_the_loss_is_taken_in_float32(count: int | None) -> None:
    case = OURS["resnet-pad"]
    model, batch = case.build().bfloat16(), case.batch()
    outputs = model(batch["pixel_values"].bfloat16(), batch["labels"], num_items_in_batch=count)
    assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits.float(), batch["labels"]))


@each_family
def test_hidden_states_are_those_of_the_stem_and_of_each_stage(case: VisionCase) -> None:
    model, pixels = case.build(), case.batch()["pixel_values"]
    seen: list[Tensor] = []
    for module in (model.backbone.stem, *model.backbone.stages):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    features = model.backbone(pixels, output_hidden_states=True)
    assert len(features.hidden_states) == len(model.backbone.stages) + 1 == len(seen)
    assert_close(features.hidden_states[:-1], tuple(seen[:-1]), **EXACT)
    assert features.hidden_states[-1] is features.last_hidden_state
    assert_close(model(pixels, output_hidden_states=True).hidden_states, features.hidden_states)
    assert model(pixels).hidden_states is None
    assert model.backbone(pixels, return_dict=False)[1].shape == features.pooler_output.shape
    model.config.output_hidden_states = True
    assert_close(model(pixels).hidden_states, features.hidden_states)
    assert model(pixels, output_hidden_states=False).hidden_states is None


@each_family
def test_a_checkpoint_comes_back_bitwise(case: VisionCase, tmp_path: Path) -> None:
    model = case.build()
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForImageClassification.from_pretrained(tmp_path), load(tmp_path)):
        assert type(loaded) is type(model)
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert_close(dict(backbone.state_dict()), dict(model.backbone.state_dict()), **EXACT)


def factorized(case: VisionCase, **options: object) -> PreTrainedModel:
    model = case.build()
    layers = inner_convolutions(model)
    factorize_(model, FactorizationConfig(kinds=("conv",), include=layers, **options))
    assert {name for name, layer in model.named_modules() if isinstance(layer, FactorizedConv2d)} == set(layers)
    return model


@each_classifier
@pytest.mark.usefixtures("poisoned_memory")
def test_a_factorized_model_comes_back_bitwise_and_merges(case: VisionCase, tmp_path: Path) -> None:
    model, batch = factorized(case, rank_scale=0.4), case.batch()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    expected = model(**batch)
    assert_close(loaded(**batch).logits, expected.logits)
    merge_(loaded)
    assert parameters(loaded) == parameters(case.build())
    assert_close(loaded(**batch).logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_one_graph_computes_the_same() -> None:
    model, batch = OURS["wide-resnet-1"].build(), OURS["wide-resnet-1"].batch()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for mode in (False, True):
        expected, outputs = model.train(mode)(**batch), compiled.train(mode)(**batch)
        assert_close((outputs.loss, outputs.logits), (expected.loss, expected.logits))


@each_family
def test_channels_last_stays_so_and_computes_the_same(case: VisionCase) -> None:
    model, batch = case.build(), case.batch()
    expected = model.backbone(batch["pixel_values"]).last_hidden_state
    model.to(memory_format=torch.channels_last)
    outputs = model.backbone(batch["pixel_values"].contiguous(memory_format=torch.channels_last)).last_hidden_state
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@each_classifier
def test_inner_convolutions_are_all_but_the_first(case: VisionCase) -> None:
    model = case.build()
    convolutions = {name for name, module in model.named_modules() if type(module) is nn.Conv2d}
    order: list[str] = []
    for name in convolutions:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    model(**case.batch())
    assert set(inner_convolutions(model)) == set(order[1:])
    assert set(order) == convolutions


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: CifarResNetConfig(depth=21), r"6 n \+ 2, got 21; the nearest is 20", id="resnet-depth"),
        pytest.param(lambda: CifarResNetConfig(depth=2), r"6 n \+ 2, got 2; the nearest is 8", id="no-block"),
        pytest.param(lambda: WideResNetConfig(depth=26), r"6 n \+ 4, got 26; the nearest is 28", id="wide-depth"),
        pytest.param(lambda: VGGConfig(depth=12), "depth must be one of 11, 13, 16, 19, got 12", id="vgg-depth"),
        pytest.param(lambda: CifarResNetConfig(shortcut="A"), "one of pad, conv, got 'A'", id="shortcut"),
        pytest.param(lambda: CifarResNetConfig(width=0), "width must be at least 1, got 0", id="width"),
        pytest.param(lambda: WideResNetConfig(widen_factor=0), "widen_factor must be at least 1", id="widen-factor"),
        pytest.param(lambda: WideResNetConfig(dropout=1.0), "dropout must be at least 0 and below 1", id="dropout"),
        pytest.param(lambda: VGGConfig(image_size=8), "image_size must be at least 16, got 8", id="image-size"),
        pytest.param(lambda: VGGConfig(num_channels=0), "num_channels must be at least 1", id="channels"),
        pytest.param(lambda: VGGConfig(num_labels=0), "num_labels must be at least 1", id="labels"),
        pytest.param(lambda: vision_model("resnet18", num_labels=3), "one of resnet20, .*, resnet50, got", id="name"),
        pytest.param(lambda: vision_model("resnet50", num_labels=3, width=0), "width must be at least 1", id="stock"),
        pytest.param(
            lambda: vision_model("vgg19", num_labels=3, id2label={0: "a"}), "num_labels=3 classes, got 1", id="id2label"
        ),
        pytest.param(lambda: inner_convolutions(nn.Conv2d(3, 5, 1)), "only .*, the first", id="one-convolution"),
        pytest.param(lambda: inner_convolutions(nn.Linear(3, 5)), "it holds none", id="no-convolution"),
    ],
)
def test_bad_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("resnet-pad", (2, 1, 9, 9), id="channels"),
        pytest.param("resnet-pad", (2, 9, 9, 3), id="channels-behind"),
        pytest.param("resnet-pad", (3, 9, 9), id="no-batch"),
        pytest.param("vgg", (2, 3, 18, 15), id="too-small"),
    ],
)
def test_bad_images(name: str, shape: tuple[int, ...]) -> None:
    channels, smallest = 3, 16 if name == "vgg" else 1
    message = rf"\(batch, {channels}, height, width\) of at least {smallest} pixels a side, got \(\d, "
    with pytest.raises(ValueError, match=message):
        CASES[name].build()(torch.zeros(shape))
