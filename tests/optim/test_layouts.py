"""Where optimizers look for their parameters, and which layouts they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing import assert_close

from hf_fnl.optim import Lamb


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def as_zero2(module: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    """Lay a group of parameters out as ZeRO-2 does for one process: views of a flat buffer; a copy is optimized."""
    group = optimizer.param_groups[number]
    flat = torch.cat([p.detach().view(-1) for p in group["params"]])
    offset = 0
    for parameter in module.parameters():
        parameter.data = flat.narrow(0, offset, parameter.numel()).view(parameter.shape)
        offset += parameter.numel()
        parameter._hp_mapping, parameter._dp_group = None, dist.group.WORLD
    group["params"] = [nn.Parameter(flat.clone())]


@pytest.mark.usefixtures("mesh")
def test_zero2_is_followed_to_its_flat_weights():
    plain, divided = model(), model()
    expected, optimizer = Lamb(plain.named_parameters()), Lamb(divided.named_parameters())
    as_zero2(divided, optimizer)
    for parameter in plain.parameters():
        parameter.grad = torch.randn_like(parameter)
    (owner,) = optimizer.param_groups[0]["params"]
    owner.grad = torch.cat([p.grad.view(-1) for p in plain.parameters()])
    expected.step()
    optimizer.step()
    shards = optimizer._sharding.find(optimizer.param_groups).by_name
    assert shards.keys() == dict(plain.named_parameters()).keys()
    for name, shard in shards.items():
        assert_close(shard.of(owner.detach()).view(shard.shape), plain.get_parameter(name).detach())


@pytest.mark.usefixtures("mesh")
def test_zero2_steps_by_the_rate_that_was_loaded():
    """It shows one group at a time, which is another dict after a state was loaded."""
    module = model()
    names = [[(f"{i}.{name}", p) for name, p in layer.named_parameters()] for i, layer in enumerate(module)]
    optimizer = Lamb([{"params": each, "lr": 0.1} for each in names])
    for number, layer in enumerate(module):
        as_zero2(layer, optimizer, number)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "param_groups": [{**group, "lr": 0.0} for group in state["param_groups"]]})
    groups = optimizer.param_groups
    for group in groups:
        (owner,) = group["params"]
        owner.grad, before = torch.ones_like(owner), owner.detach().clone()
        optimizer.param_groups = [group]
        optimizer.step()
        assert torch.equal(owner, before)


@pytest.mark.usefixtures("mesh")
def test_weights_that_are_not_those_of_the_model_are_noticed():
    module = model()
    optimizer = Lamb(module.named_parameters())
    as_zero2(module, optimizer)
    optimizer.param_groups[0]["params"][0].data[3] += 1
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(59 + 7)
    with pytest.raises(
        RuntimeError, match=r"optimized for 0\.weight are not those of the model: .*than ZeRO-1 and 2 is"
    ):
        optimizer.step()


@pytest.mark.usefixtures("mesh")
def test_zero_needs_names():
    module = model()
    optimizer = Lamb(module.parameters())
    as_zero2(module, optimizer)
    with pytest.raises(ValueError, match="under ZeRO parameters are found by name and these have none: build the op"):
        optimizer.step()


def test_fsdp_1_is_refused():
    module = model()
    optimizer = Lamb(module.named_parameters())
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().view(-1)) for p in module.parameters()]
    with pytest.raises(ValueError, match=r"0\.weight is flat and 35 long where the model has \(7, 5\).*fsdp_version"):
        optimizer.step()


def test_one_flat_tensor_without_zero_is_refused():
    module = model()
    optimizer = Lamb(module.named_parameters())
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(66))]
    with pytest.raises(ValueError, match=r"steps once with zero gradients already .*ZeRO stage 1, or DDP"):
        optimizer.step()


@pytest.mark.parametrize("placement", [Shard(1), Shard(0), Replicate()], ids=str)
def test_tensors_are_divided_along_their_first_dimension_only(mesh, placement):
    parameter = nn.Parameter(distribute_tensor(torch.randn(5, 3), mesh, [placement]))
    optimizer = Lamb([("p", parameter)])
    if placement == Shard(1):
        with pytest.raises(ValueError, match=r"p is distributed as .*first dimension.*leave tensor parallelism off"):
            optimizer._sharding.find(optimizer.param_groups)
        return
    (shard,) = optimizer._sharding.find(optimizer.param_groups).by_name.values()
    assert (shard.start, shard.stop, shard.group is None) == (0, 15, placement == Replicate())
