"""The compiled update of FLAMBe, which is LAMB's where nothing is decayed as a product."""

from __future__ import annotations

import copy

import pytest
import torch
from flambe_cases import set_gradients
from torch import nn
from torch.testing import assert_close

from hf_fnl import FactorizedLinear, find_products
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # when inductor is imported
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_eager_step_to_rounding_and_a_schedule_compiles_once(device):
    """And each goes on from the other's state, and it never waits for a GPU: rates and steps are tensors."""
    model = nn.Sequential(FactorizedLinear(7, 5, 3), nn.Linear(5, 2))
    there, products = copy.deepcopy(model).to(device), find_products(model, ["linear"])
    eager, compiled = (
        FLAMBe(parameter_groups(m, weight_decay=0.3, products=products), products=products, compiled=m is there)
        for m in (model, there)
    )
    for seed in range(3):
        set_gradients(model, seed)
        for mine, theirs in zip(there.parameters(), model.parameters(), strict=True):
            mine.grad = theirs.grad.to(device)
        for group in (*eager.param_groups, *compiled.param_groups):
            group["lr"] = 0.1 / (seed + 1)
        eager.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            compiled.step()
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        for name, parameter in model.named_parameters():
            assert_close(there.get_parameter(name).cpu(), parameter, rtol=1e-5, atol=1e-5, msg=name)
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in (eager, compiled)]
        compiled.load_state_dict(states[0])
        eager.load_state_dict(states[1])
    assert {float(state["step"]) for state in compiled.state.values()} == {3}


def test_groups_beyond_what_torch_compiles_are_updated_without_it():
    compiled, eager = (nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 2)) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    torch.compiler.reset()
    for model in (compiled, eager):
        set_gradients(model, 0)
        groups = [{"params": list(layer.parameters()), "weight_decay": 0.1} for layer in model]
        with torch._dynamo.config.patch(recompile_limit=1):
            Lamb(groups, compiled=model is compiled).step()
    for mine, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_close(mine, expected)
