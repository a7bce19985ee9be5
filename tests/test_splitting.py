"""Weights drawn for layers of equal shape and split together, as on a GPU, are what each gives alone."""

import pytest
import torch
from init_cases import CASES

from hf_fnl import FactorizedLinear
from hf_fnl.math.spectral import spectral_init, spectral_init_heads, spectral_init_stack
from hf_fnl.models import splitting

SHAPES = {"wide": (5, 7, 3), "tall": (7, 5, 3), "full-rank": (5, 7, 5), "several-blocks": (203, 211, 60)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def stacking_on_the_cpu(monkeypatch):
    """What is done on a GPU, done here; yields the sizes of the stacks."""
    sizes = []

    def noted(weights, *args):
        sizes.append(len(weights))
        return spectral_init_stack(weights, *args)

    monkeypatch.setattr(splitting, "STACKING_DEVICES", ("cpu",))
    monkeypatch.setattr(splitting, "spectral_init_stack", noted)
    return sizes


def products(model) -> dict[str, torch.Tensor]:
    """The products of factors and all other parameters, which signs of singular vectors do not change."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear)}
    factors = {f"{name}.{factor}" for name in layers for factor in "UV"}
    others = {name: value.detach() for name, value in model.named_parameters() if name not in factors}
    return others | {name: layer.composed().detach() for name, layer in layers.items()}


@pytest.mark.parametrize("method", ["spectral", "spectral_ones"])
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES.values(), ids=SHAPES.keys())
def test_a_stack_is_split_as_its_matrices_are(m, n, rank, method):
    weights = list(torch.randn(3, m, n))
    U, V = spectral_init_stack(weights, rank, method)
    assert (U.shape, V.shape) == ((3, m, rank), (3, n, rank))
    assert U.is_contiguous()
    assert V.is_contiguous()
    for weight, left, right in zip(weights, U, V, strict=True):
        alone = spectral_init(weight, rank, method)
        torch.testing.assert_close(left @ right.mT, alone[0] @ alone[1].mT, rtol=1e-4, atol=1e-4)


def test_a_default_device_changes_nothing():
    left, right = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    with torch.device("meta"):  # as in a model that is made on another device, where heads are cut with the CPU's help
        heads, (U, V) = spectral_init_heads(left, right, 2), spectral_init_stack([left[0]], 2)
    for inside, outside in zip(heads, spectral_init_heads(left, right, 2), strict=True):
        assert torch.equal(inside, outside)
    assert torch.equal(U @ V.mT, torch.stack([U[0] @ V[0].mT]))


def test_an_ill_conditioned_matrix_takes_the_stack_to_float64():
    weights = list(torch.randn(2, 5, 7, dtype=torch.float64).float())
    weights[1][4] = weights[1][3] + 1e-5 * weights[1][4]
    U, V = spectral_init_stack(weights, 5)
    torch.testing.assert_close(U @ V.mT, torch.stack(weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("singular", ["zero", "infinite-squares"])
def test_a_stack_that_no_gram_matrix_splits_is_split_by_a_full_svd(singular):
    weights = list(torch.randn(2, 5, 7, dtype=torch.float64))
    weights[1] = torch.zeros_like(weights[1]) if singular == "zero" else weights[1] * 1e200
    U, V = spectral_init_stack(weights, 5)
    torch.testing.assert_close(U @ V.mT, torch.stack(weights))


@pytest.mark.parametrize(
    ("value", "rank", "message"),
    [
        pytest.param(1.0, 6, r"rank must be in \[1, 5\], got 6", id="rank-above"),
        pytest.param(torch.nan, 3, r"shape \(5, 7\) .* NaN or Inf", id="nan"),
    ],
)
def test_errors_of_a_stack(value, rank, message):
    weights = [torch.ones(5, 7), torch.full((5, 7), value)]
    with pytest.raises(ValueError, match=message):
        spectral_init_stack(weights, rank)


@pytest.mark.parametrize("case", [name for name in CASES if name != "surgery"])
def test_a_model_split_together_is_the_model_split_layer_by_layer(case, request):
    made = []
    for fixture in (None, "stacking_on_the_cpu"):
        sizes = request.getfixturevalue(fixture) if fixture else []
        made.append(CASES[case].alone())
    (alone, stream), (together, stream_after) = made
    assert torch.equal(stream, stream_after)
    assert max(sizes) > 1
    torch.testing.assert_close(products(together), products(alone), rtol=1e-5, atol=1e-6)


def test_a_stack_ends_where_it_takes_too_much_memory(stacking_on_the_cpu, monkeypatch):
    layers = [FactorizedLinear(7, 5, 3, device="cpu") for _ in range(5)]
    monkeypatch.setattr(splitting, "PENDING_BYTES", 2 * 4 * 5 * 7)
    before = [layer.composed().detach() for layer in layers]
    with splitting.splitting_together():
        assert all(splitting.split_later(layer, torch.nn.init.normal_) for layer in layers)
    assert stacking_on_the_cpu == [2, 2, 1]
    assert all(not torch.equal(layer.composed(), old) for layer, old in zip(layers, before, strict=True))
