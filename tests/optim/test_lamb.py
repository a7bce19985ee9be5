"""LAMB against a slow oracle of NVIDIA's rule, and the equalities that every optimizer of torch keeps."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from reference.lamb import ReferenceLamb
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing import assert_close

from hf_fnl.optim import Lamb, lamb

SHAPES = {"matrix": (5, 7), "vector": (11,), "cube": (2, 3, 13), "scalar": (), "wide": (3, 17), "empty": (0, 5)}


@pytest.fixture(params=["together", "alone"])
def way(request, monkeypatch) -> None:
    """Both ways through the tensors: small ones together, and one after the other, their norms by rows."""
    if request.param == "alone":
        monkeypatch.setattr(lamb, "_SMALL", 0)
        monkeypatch.setattr(lamb, "_ROW", 4)


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_gradients(named, seed)
        optimizer.step()


def assert_same(named: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> None:
    assert_close(named, other, rtol=0, atol=0)


def gradients(named: dict[str, nn.Parameter]) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in named.items()}


def groups_of(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Groups with options of their own, as named parameters."""
    names = list(named)
    return [
        {"params": [(name, named[name]) for name in part], "lr": lr, "weight_decay": weight_decay}
        for part, lr, weight_decay in ((names[:1], 0.1, 0.3), (names[1:4], 0.01, 0.0), (names[4:], 0.02, 0.2))
    ]


@pytest.mark.parametrize(
    ("betas", "eps"), [pytest.param((0.9, 0.999), 1e-6, id="default"), pytest.param((0.5, 0.7), 0.1, id="other")]
)
@pytest.mark.usefixtures("way")
def test_equals_the_oracle(betas, eps):
    named = parameters()
    oracle = ReferenceLamb(groups_of(named), betas=betas, eps=eps)
    optimizer = Lamb(groups_of(named), betas=betas, eps=eps)
    for seed in range(5):
        set_gradients(named, seed)
        oracle.step(gradients(named))
        optimizer.step()
        for name, parameter in named.items():
            assert_close(parameter.detach(), oracle.parameters[name], rtol=1e-13, atol=1e-13)


def test_without_decay_it_is_adam():
    ours, theirs = parameters(), parameters()
    train(Lamb(ours.values(), lr=0.1, weight_decay=0.0), ours, range(4))
    train(torch.optim.Adam(theirs.values(), lr=0.1, eps=1e-6), theirs, range(4))
    for name, parameter in ours.items():
        assert_close(parameter, theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("gradient", [0.0, 2.0], ids=["zero-update", "zero-parameter"])
def test_a_norm_of_zero_means_a_ratio_of_one(gradient):
    parameter = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    parameter.grad = torch.full_like(parameter, gradient)
    Lamb([parameter], lr=0.1, weight_decay=0.5).step()
    assert_close(parameter.detach(), torch.full_like(parameter, -0.1 * gradient / (gradient + 1e-6)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_millions_of_numbers_are_right_to_rounding(dtype):
    """torch's own sums of so many squares are off by 3e-5 and 6e-5 on a CPU."""
    tensors = [torch.randn(shape).mul(0.02).to(dtype) for shape in ((3_000_017,), (1031, 2053), (2, 5))]
    exact = torch.stack([tensor.double().square().sum().sqrt() for tensor in tensors])
    found = lamb.norms(tensors)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=5e-6, atol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("expanded", [False, True], ids=["transposed", "expanded"])
def test_order_in_memory_does_not_matter(expanded):
    start, gradient = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    strided = torch.randn(1, 1).double().expand(5, 7) if expanded else gradient.mT.contiguous().mT
    expected, parameter = nn.Parameter(start.clone()), nn.Parameter(start.mT.contiguous().mT)
    for p, grad in ((expected, strided.clone(memory_format=torch.contiguous_format)), (parameter, strided)):
        p.grad = grad
        Lamb([p], lr=0.1, weight_decay=0.1).step()
    assert not parameter.is_contiguous()
    assert_close(parameter, expected, rtol=1e-13, atol=1e-13)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_load_step_equals_step(dtype):
    named = parameters(dtype)
    optimizer = Lamb(groups_of(named))
    train(optimizer, named, range(2))
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
    fresh = Lamb([{**group, "lr": 9.0} for group in groups_of(resumed)])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, named, range(2, 5))
    train(fresh, resumed, range(2, 5))
    assert_same(resumed, named)


def test_state_is_tensors_in_the_shape_of_their_parameters():
    named = parameters(torch.bfloat16)
    optimizer = Lamb(named.values())
    train(optimizer, named, range(3))
    for parameter in named.values():
        state = optimizer.state[parameter]
        assert {key: (value.shape, value.dtype) for key, value in state.items()} == {
            "step": ((), torch.float32),
            "exp_avg": (parameter.shape, parameter.dtype),
            "exp_avg_sq": (parameter.shape, parameter.dtype),
        }
        assert state["step"] == 3


def test_a_copy_goes_on_as_the_original():
    named = parameters()
    optimizer = Lamb(named.values(), lr=0.1)
    train(optimizer, named, range(2))
    again = copy.deepcopy(optimizer)
    copied = dict(zip(named, again.param_groups[0]["params"], strict=True))
    train(optimizer, named, range(2, 4))
    train(again, copied, range(2, 4))
    assert_same(copied, named)


def test_parameters_without_gradient_stay_and_have_no_state():
    named = parameters()
    optimizer = Lamb(named.values())
    set_gradients(named, 0)
    named["matrix"].grad = None
    before = named["matrix"].detach().clone()
    optimizer.step()
    assert torch.equal(named["matrix"], before)
    assert named["matrix"] not in optimizer.state


def test_closure_is_run_with_gradients_before_the_step():
    ours, theirs = parameters(), parameters()

    def closure() -> Tensor:
        loss = sum(parameter.square().sum() for parameter in ours.values())
        loss.backward()
        return loss

    loss = Lamb(ours.values(), lr=0.1).step(closure)
    for parameter in theirs.values():
        parameter.grad = 2 * parameter.detach()
    Lamb(theirs.values(), lr=0.1).step()
    assert loss == sum(parameter.square().sum() for parameter in parameters().values())
    assert_same(ours, theirs)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_lower_precision_stays_close(dtype, tolerance):
    rounded = {name: nn.Parameter(parameter.detach().double()) for name, parameter in parameters(dtype).items()}
    oracle = ReferenceLamb(groups_of(rounded))
    named = parameters(dtype)
    optimizer = Lamb(groups_of(named))
    for seed in range(3):
        set_gradients(named, seed)
        oracle.step({name: parameter.grad.double() for name, parameter in named.items()})
        optimizer.step()
    for name, parameter in named.items():
        assert parameter.dtype == dtype
        assert_close(parameter.detach().double(), oracle.parameters[name], rtol=tolerance, atol=tolerance)


def test_distributed_tensors_are_updated_as_plain_ones(mesh):
    """As under FSDP2; the state is distributed like its parameter."""
    plain = parameters()
    named = {name: nn.Parameter(distribute_tensor(p.detach().clone(), mesh)) for name, p in plain.items()}
    expected, optimizer = Lamb(groups_of(plain)), Lamb(groups_of(named))
    for seed in range(3):
        set_gradients(plain, seed)
        for name, parameter in named.items():
            parameter.grad = distribute_tensor(plain[name].grad, mesh)
        expected.step()
        optimizer.step()
    for name, parameter in named.items():
        assert_close(parameter.full_tensor(), plain[name], rtol=1e-13, atol=1e-13)
        assert isinstance(optimizer.state[parameter]["exp_avg"], DTensor)


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, embedding = nn.Parameter(torch.randn(5)), nn.Embedding(7, 3, sparse=True)
    dense.grad, before = torch.ones(5), dense.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"Lamb takes dense gradients only.*\(7, 3\).*sparse=False"):
        Lamb([{"params": [dense]}, {"params": embedding.parameters()}]).step()
    assert torch.equal(dense, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"lr": "1e-3"}, "lr must be a finite number, got '1e-3'"),
        ({"eps": float("inf")}, "eps must be a finite number, got inf"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lamb(parameters().values(), **options)
    with pytest.raises(ValueError, match=message):
        Lamb([{"params": parameters().values(), **options}])
