"""Pruning: which weights stay, that the others stay zero, and that nothing else of a model changes."""

from __future__ import annotations

import math

import pytest
import torch
from pruning_cases import (
    SIZES,
    assert_same,
    batch,
    image_trainer,
    state,
    tiny_net,
    tiny_resnet,
)
from torch import nn

from hf_fnl import parameter_groups
from hf_fnl.vision.pruning import (
    METHODS,
    TEMPERATURE,
    choose_masks,
    finalize_,
    grasp_scores,
    prune_,
    smart_counts,
    snip_scores,
    sparsity,
    weights_to_keep,
)

TOTAL = sum(SIZES.values())


@pytest.mark.parametrize("keep", [1, 29, TOTAL])
@pytest.mark.parametrize("method", ["magnitude", "snip", "grasp"])
def test_the_highest_scores_of_all_layers_stay(method, keep):
    net, data = tiny_net(), batch()
    scores = {
        "magnitude": lambda: {name: net.get_submodule(name).weight.detach().abs() for name in SIZES},
        "snip": lambda: snip_scores(net, data),
        "grasp": lambda: grasp_scores(net, data),
    }[method]()
    ranked = sorted(
        ((float(value), name, index) for name, score in scores.items() for index, value in enumerate(score.flatten())),
        reverse=True,
    )
    stay = {(name, index) for _, name, index in ranked[:keep]}
    masks = choose_masks(net, keep, method=method, batch=data)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: net.get_submodule(name).weight.shape for name in SIZES
    }
    assert stay == {(name, int(i)) for name, mask in masks.items() for i in mask.flatten().nonzero()}


@pytest.mark.parametrize("method", METHODS)
def test_pruning_counts_exactly_and_zeroes_exactly(method):
    net = tiny_net()
    before = state(net)
    prune_(net, 101, method=method, batch=batch())
    assert sum(int(net.get_submodule(name).weight_mask.sum()) for name in SIZES) == 101
    for name in SIZES:
        layer = net.get_submodule(name)
        expected = before[f"{name}.weight"] * layer.weight_mask
        assert torch.equal(layer.weight_orig, expected)
        assert torch.equal(layer.weight, expected)


def test_snip_is_weight_times_gradient():
    net, slow = tiny_net(), tiny_net()
    slow.dropout.p = 0.0
    slow(**batch()).loss.backward()
    for name, score in snip_scores(net, batch()).items():
        layer = slow.get_submodule(name)
        torch.testing.assert_close(score, (layer.weight * layer.weight.grad).abs().detach())


def test_grasp_is_weight_times_hessian_times_gradient():
    """The product with the Hessian by central differences of the gradient, along the gradient."""
    net, data = tiny_net().double(), {"labels": batch()["labels"], "pixel_values": batch()["pixel_values"].double()}
    scores = grasp_scores(net, data)
    net.dropout.p = 0.0
    weights = [net.get_submodule(name).weight for name in scores]

    def gradient(step: float, along=None) -> list[torch.Tensor]:
        for weight, direction in zip(weights, along or [], strict=False):
            weight.data += step * direction
        loss = nn.functional.cross_entropy(net(data["pixel_values"]).logits / TEMPERATURE, data["labels"])
        return list(torch.autograd.grad(loss, weights))

    g = gradient(0.0)
    before, after = gradient(-1e-3, g), gradient(2e-3, g)
    gradient(-1e-3, g)
    for score, weight, low, high in zip(scores.values(), weights, before, after, strict=True):
        torch.testing.assert_close(score, weight.detach() * (high - low) / 2e-3, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("scores", [snip_scores, grasp_scores])
def test_scoring_leaves_the_model_as_it_was(scores, training):
    net = tiny_net().train(training)
    net.norm.eval()
    net.norm.running_mean.normal_()
    before, random_state = state(net), torch.get_rng_state()
    with torch.no_grad():
        first = scores(net, batch())
    assert_same(state(net), before)
    assert [m.training for m in net.modules()] == [training if m is not net.norm else False for m in net.modules()]
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    net.norm.running_mean.normal_()
    assert_same(scores(net, batch()), first)  # neither statistics nor dropout matter


def layers_of(sizes: list[int], *, classifier: bool) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {f"conv{i}": nn.Conv2d(1, size, 1) for i, size in enumerate(sizes)}
    return layers | ({"head": nn.Linear(1, 10)} if classifier else {})


@pytest.mark.parametrize(
    ("sizes", "classifier", "keep", "expected"),
    [
        # factors 12, 6, 2: 100 * 12 : 100 * 6 : 100 * 2
        pytest.param([100, 100, 100], False, 20, [12, 6, 2], id="convolutions"),
        # the classifier is the first from the output and keeps 3 of 10; factors 20, 12, 6
        pytest.param([100, 100, 100], True, 3 + 38, [20, 12, 6, 3], id="classifier"),
        # 100 * 12 : 50 * 6 : 100 * 2 for 34 weights is 24, 6, 4
        pytest.param([100, 50, 100], False, 34, [24, 6, 4], id="sizes"),
        # the first layer is full at 10; 6 : 2 for the rest
        pytest.param([10, 100, 100], False, 90, [10, 60, 20], id="full"),
        pytest.param([10, 100, 100], False, 210, [10, 100, 100], id="all full"),
        pytest.param([10, 20], True, 37, [10, 20, 7], id="more for the classifier"),
        pytest.param([], True, 4, [4], id="classifier alone"),
        # 12 : 6 : 2 for 7 weights is 4.2, 2.1, 0.7
        pytest.param([100, 100, 100], False, 7, [4, 2, 1], id="rounded"),
    ],
)
def test_smart_ratios(sizes, classifier, keep, expected):
    assert list(smart_counts(layers_of(sizes, classifier=classifier), keep).values()) == expected


@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_a_share_of_the_network_is_met_exactly(ratio):
    net = tiny_resnet()
    total = sum(p.numel() for p in net.parameters())
    prune_(net, weights_to_keep(net, ratio), method="magnitude")
    assert sparsity(net) == {"nonzero": round(ratio * total), "total": total, "ratio": round(ratio * total) / total}
    finalize_(net)
    assert sparsity(net)["nonzero"] == round(ratio * total)


@pytest.mark.parametrize("ratio", [0.01, 1.2])
def test_a_share_that_cannot_be_met_names_those_that_can(ratio):
    net = tiny_net()
    with pytest.raises(ValueError, match=rf"ratio must be in \[.*, 1\], for 18 of 444 .*; got {ratio}") as error:
        weights_to_keep(net, ratio)
    lowest = float(str(error.value).partition("[")[2].partition(",")[0])
    assert (weights_to_keep(net, lowest), weights_to_keep(net, 1.0)) == (1, TOTAL)


@pytest.mark.parametrize("optim", ["sgd", "lamb"])
def test_training_leaves_pruned_weights_at_zero(tmp_path, optim):
    net = tiny_net()
    prune_(net, 150, method="magnitude")
    momentum = {"optim_args": "momentum=0.9,nesterov=True"} if optim == "sgd" else {"optim_args": None}
    trainer = image_trainer(tmp_path, net, optim=optim, **momentum)
    before = state(net)
    trainer.train()
    for name in SIZES:
        layer = net.get_submodule(name)
        assert torch.equal(layer.weight_mask, before[f"{name}.weight_mask"])
        assert layer.weight_orig[layer.weight_mask == 0].count_nonzero() == 0
        assert not torch.equal(layer.weight_orig, before[f"{name}.weight_orig"])
    assert sparsity(net)["nonzero"] == 150 + 18
    groups = {
        name: group["weight_decay"] for group in parameter_groups(net, weight_decay=0.1) for name, _ in group["params"]
    }
    assert [groups[f"{name}.weight_orig"] for name in SIZES] == [0.1, 0.1, 0.1]


def with_nan() -> nn.Module:
    net = tiny_net()
    net.middle.weight.data[3, 1] = math.nan
    return net


@pytest.mark.parametrize(
    ("build", "keep", "options", "message"),
    [
        pytest.param(tiny_net, 0, {}, r"keep must be in \[1, 426\], .* got 0", id="nothing kept"),
        pytest.param(tiny_net, 427, {}, r"keep must be in \[1, 426\], .* got 427", id="too many kept"),
        pytest.param(
            tiny_net,
            9,
            {"method": "flow"},
            "method must be one of magnitude, random, snip, grasp, got 'flow'",
            id="method",
        ),
        pytest.param(tiny_net, 9, {"method": "snip"}, "method='snip' needs a batch", id="snip without data"),
        pytest.param(tiny_net, 5, {"method": "random"}, "keeps 6 weights of head alone, more than keep=5", id="random"),
        pytest.param(lambda: nn.BatchNorm2d(3), 1, {}, "BatchNorm2d has no linear layers or two-d", id="no layer"),
        pytest.param(with_nan, 1, {}, "the scores of middle hold NaN or Inf", id="NaN in weights"),
        pytest.param(with_nan, 1, {"method": "snip", "batch": batch()}, "the scores of .* hold NaN", id="NaN loss"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(build, keep, options, message):
    net = build()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune_(net, keep, **{"method": "magnitude", **options})
    assert all(torch.equal(value, before[name]) or value.isnan().any() for name, value in net.state_dict().items())
