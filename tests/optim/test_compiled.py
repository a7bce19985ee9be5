"""The compiled update of LAMB and FLAMBe: it arrives where the eager one does, and a schedule does not compile anew."""

from __future__ import annotations

import copy

import pytest
import torch
from flambe_cases import build, groups_of, set_gradients
from lamb_cases import train
from torch import nn
from torch.testing import assert_close

from hf_fnl.optim import FLAMBe, Lamb

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # when inductor is imported


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"matrix": (5, 7), "vector": (11,), "scalar": ()}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def test_it_is_the_eager_step_to_rounding_and_a_schedule_compiles_once():
    """And each goes on from the other's state; rates and steps are tensors of the compiled function."""
    ours, theirs = parameters(), parameters()
    compiled, eager = Lamb(ours.items(), compiled=True, weight_decay=0.3), Lamb(theirs.items(), weight_decay=0.3)
    for seed in range(4):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            for optimizer, named in ((compiled, ours), (eager, theirs)):
                optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
                train(optimizer, named, range(seed, seed + 1))
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (eager, compiled)]
        compiled.load_state_dict(states[0])
        eager.load_state_dict(states[1])
    assert compiled.state[ours["matrix"]]["step"] == 4


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_flambe_compiled_is_flambe_and_never_waits_for_a_gpu(device):
    module, products = build("factorized", ["linear"], torch.float32)
    there = copy.deepcopy(module).to(device)
    optimizers = [
        FLAMBe(groups_of(model, products), products=products, compiled=compiled)
        for model, compiled in ((module, False), (there, True))
    ]
    for seed in range(3):
        set_gradients(module, seed)
        for mine, theirs in zip(there.parameters(), module.parameters(), strict=True):
            mine.grad = theirs.grad.to(device)
        optimizers[0].step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
        optimizers[1].step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for name, parameter in module.named_parameters():
        assert_close(there.get_parameter(name).cpu(), parameter, rtol=1e-5, atol=1e-5, msg=name)
