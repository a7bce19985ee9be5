"""Optimizers and decay over parameters that lie in arbitrary pieces on several processes, against whole ones.

The processes are threads, which meet at a barrier, so that any world is cheap and cuts can fall anywhere. What real
engines do is tested in ``test_sharded_engines``.
"""

from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flambe_cases import CASES, build, groups_of, set_gradients
from reference.flambe import ReferenceFLAMBe
from reference.lamb import ReferenceLamb
from reference.products import decay_gradients
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from hf_fnl.attention import find_products
from hf_fnl.layers import FactorizedLinear, TensorizedConv2d
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups, sharding
from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.optim.sharding import Fragment, Shards, shards_of

Cuts = dict[str, list[int]]


class World:
    """Threads in the place of processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._slots: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait(timeout=60)
        values = list(self._slots)
        self._barrier.wait(timeout=60)
        return values

    def run(self, work: Callable[[int], None]) -> None:
        """Run ``work`` for every rank at once; the first error of one is raised here."""
        errors: list[Exception] = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except Exception as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class ThreadCollectives:
    """:class:`hf_fnl.optim.sharding.Collectives` among threads."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.sent: Counter[str] = Counter()

    def sum_(self, message: Tensor, purpose: str) -> Tensor:
        self.sent[purpose] += message.numel() * message.element_size()
        return message.copy_(torch.stack(self.world.exchange(self.rank, message.clone())).sum(0))

    @property
    def size(self) -> int:
        return self.world.size

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int], purpose: str) -> list[Tensor]:
        self.sent[purpose] += sum(message.numel() * message.element_size() for message in outgoing)
        received = [messages[self.rank] for messages in self.world.exchange(self.rank, outgoing)]
        assert [message.numel() for message in received] == list(incoming)
        return received

    def gather(self, value: Any) -> list[Any]:
        return self.world.exchange(self.rank, value)


class CutShards(Shards):
    """Parameters of which each rank holds the elements between two of the cuts; those without cuts are held by all."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World, rank: int, cuts: Cuts) -> None:
        super().__init__(optimizer)
        self.cuts, self.rank = cuts, rank
        self._talk = ThreadCollectives(world, rank)
        self.parts: list[set[str]] | None = None  # of the names that are stepped one after the other, as ZeRO does

    layout = "cut"
    steps_in_parts = property(lambda self: self.parts is not None)
    collectives = property(lambda self: self._talk)

    def fragments(self) -> dict[str, Fragment]:
        groups = self._optimizer().param_groups
        return {
            name: self._fragment(name, parameter)
            for group in groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def due(self) -> list[tuple[dict[str, Any], list[Fragment]]]:
        fragments = self.fragments()
        wanted = fragments.keys() if self.parts is None else self.parts[0]
        groups = self._optimizer().param_groups
        return [(group, [fragments[name] for name in group["param_names"] if name in wanted]) for group in groups]

    def _fragment(self, name: str, parameter: Tensor) -> Fragment:
        if name not in self.cuts:
            return Fragment(
                name, tuple(parameter.shape), 0, parameter.numel(), parameter.detach(), parameter, None, None
            )
        start, stop = self.cuts[name][self.rank : self.rank + 2]
        local = parameter.detach().view(-1).narrow(0, start, stop - start)
        return Fragment(name, tuple(parameter.shape), start, stop, local, parameter, start, self._talk.world)


def random_cuts(model: nn.Module, world_size: int, draw: random.Random, share_of_whole: float = 0.1) -> Cuts:
    """Cuts anywhere, also at one place several times, which leaves a rank without any element."""
    return {
        name: [0, *sorted(draw.choices(range(p.numel() + 1), k=world_size - 1)), p.numel()]
        for name, p in model.named_parameters()
        if draw.random() >= share_of_whole
    }


class Ranks:
    """A model on every rank of a world; each rank's optimizer moves only what the rank holds."""

    def __init__(self, model: nn.Module, world_size: int, cuts: Cuts, build_optimizer: Callable) -> None:
        self.world, self.cuts, self.model = World(world_size), cuts, model
        self.models = [copy.deepcopy(model) for _ in range(world_size)]
        self.optimizers = [build_optimizer(replica) for replica in self.models]
        self.shards = [CutShards(optimizer, self.world, rank, cuts) for rank, optimizer in enumerate(self.optimizers)]
        for optimizer, shards in zip(self.optimizers, self.shards, strict=True):
            sharding._SHARDS[optimizer] = shards

    def step(self, seed: int, parts: list[set[str]] | None = None) -> dict[str, Tensor | None]:
        """One step of all ranks, in which ``parts`` of the names move one after the other; returns the gradients."""

        def work(rank: int) -> None:
            set_gradients(self.models[rank], seed)
            for number in range(len(parts or [None])):
                self.shards[rank].parts = parts and parts[number:]
                self.optimizers[rank].step()

        gradients = set_gradients(self.model, seed)
        self.world.run(work)
        self._assemble()
        return gradients

    @torch.no_grad()
    def _assemble(self) -> None:
        for name, parameter in self.model.named_parameters():
            held = [dict(replica.named_parameters())[name].view(-1) for replica in self.models]
            if name in self.cuts:
                ends = zip(held, self.cuts[name], self.cuts[name][1:], strict=False)
                parameter.copy_(torch.cat([flat[start:stop] for flat, start, stop in ends]).view_as(parameter))
                continue
            for flat in held:
                assert torch.equal(flat, held[0]), name
            parameter.copy_(held[0].view_as(parameter))


def assert_equal_to(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_flambe_at_random_cuts_equals_the_oracle(model, kinds, world_size):
    module, products = build(model, kinds)
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    draw = random.Random(world_size)
    ranks = Ranks(
        module,
        world_size,
        random_cuts(module, world_size, draw),
        lambda replica: FLAMBe(groups_of(replica, products), products=products),
    )
    for seed in range(3):
        oracle.step(ranks.step(seed))
        assert_equal_to(module, oracle.parameters)


@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_flambe_that_is_stepped_in_parts_equals_the_oracle(model, kinds):
    """As under ZeRO: the factors of a product move in different calls, in any order."""
    module, products = build(model, kinds)
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    draw = random.Random(5)
    ranks = Ranks(
        module,
        3,
        random_cuts(module, 3, draw),
        lambda replica: FLAMBe(groups_of(replica, products), products=products),
    )
    names = [name for name, _ in module.named_parameters()]
    for seed in range(3):
        draw.shuffle(names)
        first, second = sorted(draw.choices(range(len(names)), k=2))
        parts = [set(names[:first]), set(names[first:second]), set(names[second:])]
        oracle.step(ranks.step(seed, parts))
        assert_equal_to(module, oracle.parameters)


@pytest.mark.parametrize("way", ["together", "in-pieces"])
def test_lamb_at_random_cuts_equals_the_oracle(way, monkeypatch):
    if way == "in-pieces":
        monkeypatch.setattr("hf_fnl.optim.lamb._SMALL", 2)
        monkeypatch.setattr("hf_fnl.optim.lamb._PIECE", 3)
    module, products = build("factorized", ["linear"])
    oracle = ReferenceLamb(groups_of(module, products))
    cuts = random_cuts(module, 3, random.Random(1))
    ranks = Ranks(module, 3, cuts, lambda replica: Lamb(groups_of(replica, products)))
    for seed in range(3):
        oracle.step(ranks.step(seed))
        assert_equal_to(module, oracle.parameters)


def convolutions() -> nn.Module:
    """Cores of tensors, and products of three factors."""
    layers = [TensorizedConv2d(5, 7, (2, 3), 4, scheme=scheme, init="default") for scheme in ("tt", "tucker")]
    return nn.ModuleList([*layers, FactorizedLinear(7, 5, 3, deep=True)]).double()


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("case", ["tensors", "gpt2", "llama"])
def test_frobenius_decay_at_random_cuts_equals_the_oracle(case, mode):
    torch.manual_seed(0)
    module = convolutions() if case == "tensors" else build(case, ["ov"])[0]
    products = find_products(module) if case == "tensors" else find_products(module, ["ov"])

    def build_optimizer(replica: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(replica, weight_decay=0.0, products=products, frobenius_decay=0.0)
        optimizer = torch.optim.SGD(groups, lr=0.1)
        FrobeniusDecay(optimizer, products, 0.3, mode=mode)
        return optimizer

    # SGD itself moves whole parameters: outside of a rank's range that is harmless, for nobody looks there.
    ranks = Ranks(module, 4, random_cuts(module, 4, random.Random(2), share_of_whole=0), build_optimizer)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    decay = decay_gradients(products, before)
    gradients = ranks.step(0)
    expected = {name: p - 0.1 * (gradients[name] + 0.3 * decay.get(name, 0)) for name, p in before.items()}
    assert_equal_to(module, expected)


def sent_in_a_step(hidden: int, intermediate: int, world_size: int) -> Counter[str]:
    """Bytes that one rank sends in a step of FLAMBe over an attention and two factorized matrices."""
    config = BertConfig(
        vocab_size=13,
        hidden_size=hidden,
        num_attention_heads=hidden // 4,
        num_hidden_layers=1,
        intermediate_size=intermediate,
        max_position_embeddings=11,
    )
    layer = BertModel(config).encoder.layer[0]
    layer.intermediate.dense = FactorizedLinear(hidden, intermediate, 4)
    layer.output.dense = FactorizedLinear(intermediate, hidden, 4)
    products = find_products(layer, ["ov", "linear"])
    rows = {name: -(-p.shape[0] // world_size) * p[0].numel() for name, p in layer.named_parameters()}
    cuts = {
        name: [min(rank * rows[name], p.numel()) for rank in range(world_size)] + [p.numel()]
        for name, p in layer.named_parameters()
    }
    ranks = Ranks(layer, world_size, cuts, lambda replica: FLAMBe(replica.named_parameters(), products=products))
    ranks.step(0)
    return ranks.shards[0].collectives.sent


def test_what_the_decay_sends_does_not_grow_with_the_matrices():
    """Shards of whole rows and heads, as FSDP2 makes them: Gram matrices of the ranks are all that is sent."""
    small, wide = sent_in_a_step(16, 24, 2), sent_in_a_step(16, 24 * 8, 2)
    assert small["grams"] == wide["grams"] == 4 * (2 * 4 * 4 * 4 + 4 * 4 * 4)  # value and output heads, four factors
    assert small["cuts"] == wide["cuts"] == 0
    assert small["norms"] == wide["norms"]
    assert sent_in_a_step(16 * 4, 24, 2)["grams"] == 4 * (2 * 16 * 4 * 4 + 4 * 4 * 4)  # more heads, of the same rank


def test_cut_heads_are_exchanged_and_nothing_else():
    """Of 4 heads of 4 rows each that 3 ranks divide at rows 6 and 12, the one from row 4 on is cut in the middle."""
    assert sent_in_a_step(16, 24, 3)["cuts"] == 4 * (2 * 16)


def test_a_copy_has_shards_of_its_own():
    module, products = build("factorized", ["linear"])
    optimizer = FLAMBe(groups_of(module, products), products=products)
    duplicate = copy.deepcopy(optimizer)
    assert shards_of(duplicate) is not shards_of(optimizer)
    owners = [fragment.owner for fragment in shards_of(duplicate).fragments().values()]
    assert all(owner is p for owner, p in zip(owners, duplicate.param_groups[0]["params"], strict=False))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
def test_parts_of_state_are_views_of_it(whole):
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
    optimizer = torch.optim.SGD([("p", parameter)], lr=0.1)
    shards = shards_of(optimizer) if whole else CutShards(optimizer, World(2), 1, {"p": [0, 5, 12]})
    fragment = shards.fragments()["p"]
    fragment.part(parameter.data).fill_(-1)
    expected = [-1.0] * 12 if whole else [0.0, 1, 2, 3, 4] + [-1.0] * 7
    assert parameter.flatten().tolist() == expected
    assert fragment.data.data_ptr() == fragment.local.data_ptr()
