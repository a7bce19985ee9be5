"""The gradient of a table that is embedding and output matrix, against what autograd adds up by itself."""

import weakref

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fnl.models.tied_rows import tied_inputs

VOCAB, WIDTH = 11, 5
IDS = torch.tensor([[3, 0, 7], [7, 10, 3]])  # repeated ones, the padding, the last


def tied(padding_idx=0):
    torch.manual_seed(0)
    embedding, output = nn.Embedding(VOCAB, WIDTH, padding_idx).double(), nn.Linear(WIDTH, VOCAB, bias=False)
    output.weight = embedding.weight
    return embedding, output


def loss_of(embeds, table):
    return F.linear(embeds.tanh(), table).square().mean()


def both(embedding, output):
    """The loss with one gradient for both uses, and the plain one."""
    ids, embeds, table = tied_inputs(embedding, output, IDS)
    assert ids is None
    return loss_of(embeds, table), loss_of(embedding(IDS), output.weight)


@pytest.mark.parametrize("padding_idx", [None, 0, 7])
def test_gradients_are_those_of_autograd(padding_idx):
    embedding, output = tied(padding_idx)
    losses = both(embedding, output)
    assert_close(*losses)
    assert_close(*(torch.autograd.grad(loss, output.weight) for loss in losses))


def test_only_one_of_both_uses_has_a_gradient():
    embedding, output = tied()
    _, embeds, table = tied_inputs(embedding, output, IDS)
    uses = (embeds.sin().sum(), embedding(IDS).sin().sum()), (table.sin().sum(), output.weight.sin().sum())
    for ours, plain in uses:
        found = torch.autograd.grad(ours, output.weight, retain_graph=True)
        assert_close(found, torch.autograd.grad(plain, output.weight))


def test_the_backward_pass_can_be_repeated_and_differentiated():
    embedding, output = tied()
    ours, plain = both(embedding, output)
    first, second = (torch.autograd.grad(ours, output.weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    curved = [torch.autograd.grad(loss, output.weight, create_graph=True)[0].square().sum() for loss in (ours, plain)]
    assert_close(*(torch.autograd.grad(value, output.weight) for value in curved))


class TablesMade(TorchDispatchMode):
    """Counts storages of the size of a table that operations make; holds none, or autograd would copy it."""

    def __init__(self, table):
        super().__init__()
        self.count, self.seen = 0, weakref.WeakSet([table.untyped_storage()])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.numel() == VOCAB * WIDTH:
            storage = made.untyped_storage()
            self.count += storage not in self.seen
            self.seen.add(storage)
        return made


def test_one_tensor_of_the_tables_size_is_made():
    embedding, output = tied()
    counts = []
    for loss in both(embedding, output):
        output.weight.grad = None
        with TablesMade(output.weight) as made:
            loss.backward()
        counts.append(made.count)
    assert counts == [1, 3]


def untied(embedding, output):
    output.weight = nn.Parameter(embedding.weight.detach().clone())


CHANGES = {
    "untied": untied,
    "frozen": lambda embedding, output: embedding.weight.requires_grad_(False),
    "hook": lambda embedding, output: embedding.register_forward_hook(lambda *_: None),
    "backward hook": lambda embedding, output: embedding.register_full_backward_hook(lambda *_: None),
    "forward of the instance": lambda embedding, output: setattr(embedding, "forward", embedding.forward),
    "gradient scaled by frequency": lambda embedding, output: setattr(embedding, "scale_grad_by_freq", True),
    "pre-hook": lambda embedding, output: embedding.register_forward_pre_hook(lambda *_: None),
    "hook of the output": lambda embedding, output: output.register_forward_hook(lambda *_: None),
    "hook with keywords": lambda embedding, output: embedding.register_forward_hook(lambda *_: None, with_kwargs=True),
    "max_norm": lambda embedding, output: setattr(embedding, "max_norm", 1.0),
    "parametrized": lambda embedding, output: nn.utils.parametrize.register_parametrization(
        embedding, "weight", nn.Identity()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_modules_that_do_more_than_torchs_own_are_called(change):
    embedding, output = tied()
    change(embedding, output)
    assert tied_inputs(embedding, output, IDS) == (IDS, None, None)


def test_without_gradients_nothing_changes():
    with torch.no_grad():
        assert tied_inputs(*tied(), IDS) == (IDS, None, None)
