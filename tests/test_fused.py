"""The compiled step of LAMB and FLAMBe: what it arrives at, what it takes, and what stands in for it."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import lamb_cases
import pytest
import torch
from flambe_cases import build, groups_of, set_gradients
from lamb_cases import assert_same, train
from reference.flambe import ReferenceFLAMBe
from reference.lamb import ReferenceLamb
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from hf_fnl.attention import find_products
from hf_fnl.optim import FLAMBe, Lamb, fused, lamb
from hf_fnl.optim.sharding import Shards

# The large one has several blocks of squares, the last of them not whole.
SHAPES = {"matrix": (5, 7), "large": (211, 157), "vector": (11,), "scalar": (), "empty": (0, 5)}
COMPILES = pytest.mark.skipif(not fused.is_available(), reason="needs a C++ compiler")


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in SHAPES.items()
    }


def options_of(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    names = list(named)
    return [
        {"params": [(name, named[name]) for name in part], "lr": lr, "weight_decay": weight_decay}
        for part, lr, weight_decay in ((names[:2], 0.1, 0.3), (names[2:3], 0.01, 0.0), (names[3:], 0.02, 0.2))
    ]


@COMPILES
@pytest.mark.parametrize(
    ("betas", "eps"), [pytest.param((0.9, 0.999), 1e-6, id="default"), pytest.param((0.5, 0.7), 0.1, id="other")]
)
def test_equals_the_oracle(betas, eps):
    named = parameters(torch.float64)
    oracle = ReferenceLamb(options_of(named), betas=betas, eps=eps)
    optimizer = Lamb(options_of(named), betas=betas, eps=eps, fused=True)
    for seed in range(5):
        lamb_cases.set_gradients(named, seed)
        oracle.step({name: parameter.grad.double() for name, parameter in named.items()})
        optimizer.step()
        for name, parameter in named.items():
            assert_close(parameter.detach(), oracle.parameters[name], rtol=1e-13, atol=1e-13)


@COMPILES
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-6)], ids=str
)
def test_it_is_the_eager_step_to_rounding(dtype, tolerance):
    """And both go on from the other's state."""
    ours, theirs = parameters(dtype), parameters(dtype)
    compiled, eager = Lamb(options_of(ours), fused=True), Lamb(options_of(theirs), fused=False)
    for seeds in (range(2), range(2, 4)):
        train(compiled, ours, seeds)
        train(eager, theirs, seeds)
        for name, parameter in ours.items():
            assert_close(parameter, theirs[name], rtol=tolerance, atol=tolerance)
            for key, value in compiled.state[parameter].items():
                assert_close(value, eager.state[theirs[name]][key], rtol=tolerance, atol=tolerance)
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (eager, compiled)]
        compiled.load_state_dict(states[0])
        eager.load_state_dict(states[1])


@COMPILES
@pytest.mark.parametrize(
    ("model", "kinds"), [("stock-bert", ["ov", "qk"]), ("gpt2", ["ov"]), ("llama", ["ov"]), ("factorized", ["linear"])]
)
def test_flambe_equals_its_oracle(model, kinds):
    module, products = build(model, kinds)
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    optimizer = FLAMBe(groups_of(module, products), products=products, fused=True)
    for seed in range(3):
        oracle.step(set_gradients(module, seed))
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert_close(parameter.detach(), oracle.parameters[name], rtol=1e-11, atol=1e-11, msg=name)


@COMPILES
@pytest.mark.parametrize("gradient", [0.0, 2.0], ids=["zero-update", "zero-parameter"])
def test_a_norm_of_zero_means_a_ratio_of_one(gradient):
    parameter = nn.Parameter(torch.zeros(5, 7, dtype=torch.float64))
    parameter.grad = torch.full_like(parameter, gradient)
    Lamb([parameter], lr=0.1, weight_decay=0.5, fused=True).step()
    assert_close(parameter.detach(), torch.full_like(parameter, -0.1 * gradient / (gradient + 1e-6)))


@COMPILES
def test_what_is_not_a_number_stays_so():
    for dtype in fused.DTYPES:
        parameter = nn.Parameter(torch.ones(37, dtype=dtype))
        parameter.grad = torch.full_like(parameter, float("nan"))
        Lamb([parameter], fused=True).step()
        assert parameter.isnan().all()


@COMPILES
def test_the_number_of_threads_does_not_matter():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    before = torch.get_num_threads()
    try:
        for named, threads in ((ours, 1), (theirs, 3)):
            torch.set_num_threads(threads)
            train(Lamb(named.values(), fused=True), named, range(2))
    finally:
        torch.set_num_threads(before)
    assert_same(ours, theirs)


@COMPILES
def test_a_schedule_compiles_once(monkeypatch):
    """Rates, steps, betas and new shapes are data of the kernels; a rate may be a tensor."""
    fused.check()
    monkeypatch.setattr(fused.subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    rate = torch.tensor(0.0)
    optimizer, expected = Lamb(ours.values(), lr=rate, fused=True), Lamb(theirs.values(), fused=True)
    for seed in range(3):
        rate.fill_(0.25 * (seed + 1))
        for group in optimizer.param_groups + expected.param_groups:
            group["betas"] = (0.5 + seed / 8, 0.75)
        expected.param_groups[0]["lr"] = 0.25 * (seed + 1)
        train(optimizer, ours, range(seed, seed + 1))
        train(expected, theirs, range(seed, seed + 1))
    assert_same(ours, theirs)


class Alone:
    """What a process says to others, and there are none."""

    rank = 0

    def sum_(self, message: Tensor, purpose: str) -> Tensor:
        assert message.dtype == torch.float32
        return message


@COMPILES
def test_divided_tensors_are_updated_as_whole_ones(monkeypatch):
    """The kernel forms the updates only; they move when the norms of whole tensors are known."""
    whole, divided = parameters(torch.float32), parameters(torch.float32)
    train(Lamb(options_of(whole), fused=True), whole, range(2))
    moved = []
    kernel = fused.update_rows

    def update_rows(rows: Any, group: Any, *, moves: bool) -> Tensor:
        moved.append(moves)
        return kernel(rows, group, moves=moves)

    monkeypatch.setattr(fused, "update_rows", update_rows)
    monkeypatch.setattr(Shards, "collectives", property(lambda self: Alone()))
    train(Lamb(options_of(divided), fused=True), divided, range(2))
    assert moved
    assert not any(moved)
    for name, parameter in divided.items():
        assert_close(parameter, whole[name], rtol=1e-6, atol=1e-6)


@COMPILES
def test_what_the_kernels_do_not_take_moves_beside_them():
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    tensors = {
        "transposed": nn.Parameter(start.mT.contiguous().mT),
        "half": nn.Parameter(start.half()),
        "plain": nn.Parameter(start.clone()),
    }
    for parameter in tensors.values():
        parameter.grad = gradient.to(parameter.dtype)
    assert [fused.takes(p.detach(), p.grad) for p in tensors.values()] == [False, False, True]
    Lamb(tensors.values(), lr=0.1, weight_decay=0.1, fused=True).step()
    assert_close(tensors["transposed"], tensors["plain"], rtol=1e-13, atol=1e-13)
    assert_close(tensors["half"].double(), tensors["plain"], rtol=2e-3, atol=2e-3)


@COMPILES
@pytest.mark.parametrize("compiled", [False, True], ids=["below", "above"])
def test_unless_told_only_large_steps_are_compiled(compiled, monkeypatch):
    named = parameters(torch.float32)
    monkeypatch.setattr(lamb, "_COMPILED", sum(p.numel() for p in named.values()) + (not compiled))
    calls = []
    kernel = fused.update_rows
    monkeypatch.setattr(fused, "update_rows", lambda *args, **options: calls.append(kernel(*args, **options)))
    train(Lamb(named.values()), named, range(1))
    assert bool(calls) == compiled


def test_without_a_compiler_torch_does_it(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = fused._library.__wrapped__()
    assert "no-such-compiler" in reason
    monkeypatch.setattr(fused, "_library", lambda: reason)
    monkeypatch.setattr(lamb, "_COMPILED", 0)
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    train(Lamb(ours.values()), ours, range(2))
    train(Lamb(theirs.values(), fused=False), theirs, range(2))
    assert_same(ours, theirs)
    before = copy.deepcopy(ours)
    with pytest.raises(RuntimeError, match=r"fused=True needs a C\+\+ compiler, use fused=None or False: .*no-such"):
        train(Lamb(ours.values(), fused=True), ours, range(1))
    assert_same(ours, before)


class Calls(TorchDispatchMode):
    """Counts operations; reading a number from a device, which would wait for it, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [2, 5])
def test_decay_takes_as_many_operations_for_many_products_as_for_one(layers):
    """Where calls cost more than arithmetic; and a step reads no number."""

    def counts(products: int) -> Counter[str]:
        config = BertConfig(hidden_size=15, num_attention_heads=3, num_hidden_layers=layers, intermediate_size=7)
        model = BertModel(config).encoder
        found = find_products(model, ["ov"])[:products]
        optimizer = FLAMBe(model.named_parameters(), products=found, fused=False)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Calls() as calls:
            optimizer.step()
        return calls.counts

    one, many = counts(1), counts(layers)
    assert many["bmm"] == one["bmm"] == 4
    assert many["stack"] - one["stack"] == 6  # factors twice, and what they are multiplied by


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_the_kernels_of_a_gpu_do_what_a_cpu_does(dtype, tolerance):
    module, products = build("stock-bert", ["ov"], dtype)
    there = copy.deepcopy(module).cuda()
    optimizers = [
        FLAMBe(groups_of(each, products), products=products, fused=compiled)
        for each, compiled in ((module, False), (there, True))
    ]
    for seed in range(3):
        set_gradients(module, seed)
        for mine, theirs in zip(there.parameters(), module.parameters(), strict=True):
            mine.grad = theirs.grad.cuda()
        for optimizer in optimizers:
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    for name, parameter in module.named_parameters():
        assert_close(there.get_parameter(name).cpu(), parameter, rtol=tolerance, atol=tolerance, msg=name)
