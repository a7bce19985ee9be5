"""Optimizers and decay over parameters that lie in arbitrary pieces on several processes, against whole ones.

The processes are threads, which meet at a barrier, so that any world is cheap and cuts can fall anywhere. What real
engines do is tested in ``test_sharded_engines``.
"""

from __future__ import annotations

import copy
import random
import threading
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
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.optim.sharding import Shard, Shards

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


class ThreadProcesses:
    """:class:`hf_fnl.optim.sharding.Processes` among threads."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.sent: list[int] = []  # bytes of each message

    def sum_(self, message: Tensor) -> Tensor:
        self.sent.append(message.numel() * message.element_size())
        return message.copy_(torch.stack(self.world.exchange(self.rank, message.clone())).sum(0))

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> list[Tensor]:
        self.sent.append(sum(message.numel() * message.element_size() for message in outgoing))
        received = [messages[self.rank] for messages in self.world.exchange(self.rank, outgoing)]
        assert [message.numel() for message in received] == list(incoming)
        return received


class CutSharding:
    """Parameters of which each rank holds the elements between two of the cuts; those without cuts are held by all."""

    def __init__(self, processes: ThreadProcesses, cuts: Cuts) -> None:
        self.processes, self.cuts = processes, cuts
        self.parts: list[set[str]] | None = None  # of the names that are stepped one after the other, as ZeRO does

    def find(self, groups: list[dict[str, Any]]) -> Shards:
        held = [
            (group, [self._shard(*pair) for pair in zip(group["param_names"], group["params"], strict=True)])
            for group in groups
        ]
        by_name = {shard.name: shard for _, shards in held for shard in shards}
        wanted = by_name.keys() if self.parts is None else self.parts[0]
        due = [(group, [shard for shard in shards if shard.name in wanted]) for group, shards in held]
        return Shards(by_name, due, self.processes, self.parts is not None)

    def _shard(self, name: str, parameter: Tensor) -> Shard:
        if name not in self.cuts:
            return Shard(name, tuple(parameter.shape), (0, parameter.numel()), 0, parameter)
        cuts, rank = self.cuts[name], self.processes.rank
        return Shard(name, tuple(parameter.shape), cuts, rank, parameter, cuts[rank], self.processes.world)


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
        self.shardings = [CutSharding(ThreadProcesses(self.world, rank), cuts) for rank in range(world_size)]
        self.optimizers = [build_optimizer(*pair) for pair in zip(self.models, self.shardings, strict=True)]

    def step(self, seed: int, parts: list[set[str]] | None = None) -> dict[str, Tensor | None]:
        """One step of all ranks, in which ``parts`` of the names move one after the other; returns the gradients."""

        def work(rank: int) -> None:
            set_gradients(self.models[rank], seed)
            for number in range(len(parts or [None])):
                self.shardings[rank].parts = parts and parts[number:]
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


def sharded(optimizer: Any, sharding: CutSharding) -> Any:
    optimizer._sharding = sharding
    return optimizer


@pytest.mark.parametrize(("world_size", "in_parts"), [(4, False), (3, True)])
@pytest.mark.parametrize(("model", "kinds"), CASES)
def test_flambe_at_random_cuts_equals_the_oracle(model, kinds, world_size, in_parts):
    """In parts, as under ZeRO, the factors of a product move in different calls, in any order."""
    module, products = build(model, kinds)
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    draw, cuts = random.Random(world_size), random_cuts(module, world_size, random.Random(world_size))
    ranks = Ranks(
        module,
        world_size,
        cuts,
        lambda m, sharding: sharded(FLAMBe(groups_of(m, products), products=products), sharding),
    )
    names = [name for name, _ in module.named_parameters()]
    for seed in range(3):
        draw.shuffle(names)
        first, second = sorted(draw.choices(range(len(names)), k=2))
        parts = [set(names[:first]), set(names[first:second]), set(names[second:])]
        oracle.step(ranks.step(seed, parts if in_parts else None))
        assert_equal_to(module, oracle.parameters)


def test_lamb_at_random_cuts_equals_the_oracle():
    module, products = build("factorized", ["linear"])
    oracle = ReferenceLamb(groups_of(module, products))
    cuts = random_cuts(module, 3, random.Random(1))
    ranks = Ranks(module, 3, cuts, lambda m, sharding: sharded(Lamb(groups_of(m, products)), sharding))
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
    module = convolutions() if case == "tensors" else build(case, ["ov"])[0]
    products = find_products(module) if case == "tensors" else find_products(module, ["ov"])

    def build_optimizer(replica: nn.Module, sharding: CutSharding) -> torch.optim.Optimizer:
        groups = parameter_groups(replica, weight_decay=0.0, products=products, frobenius_decay=0.0)
        optimizer = torch.optim.SGD(groups, lr=0.1)
        sharded(FrobeniusDecay(optimizer, products, 0.3, mode=mode), sharding)
        return optimizer

    # SGD itself moves whole parameters: outside of a rank's range that is harmless, for nobody looks there.
    ranks = Ranks(module, 4, random_cuts(module, 4, random.Random(2), share_of_whole=0), build_optimizer)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    decay = decay_gradients(products, before)
    gradients = ranks.step(0)
    expected = {name: p - 0.1 * (gradients[name] + 0.3 * decay.get(name, 0)) for name, p in before.items()}
    assert_equal_to(module, expected)


def sent_in_a_step(hidden: int, intermediate: int, world_size: int) -> list[int]:
    """Bytes of each message of one rank in a step of FLAMBe over an attention and two factorized matrices."""
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
    ranks = Ranks(
        layer, world_size, cuts, lambda m, sharding: sharded(FLAMBe(m.named_parameters(), products=products), sharding)
    )
    ranks.step(0)
    return ranks.shardings[0].processes.sent


def test_what_the_decay_sends_does_not_grow_with_the_matrices():
    """Shards of full rows and heads, as FSDP2 makes them: only Gram matrices of the ranks, and norms, are sent."""
    small, wide, more_heads = (sent_in_a_step(*sizes) for sizes in ((16, 24, 2), (16, 24 * 8, 2), (16 * 4, 24, 2)))
    norms = small[-1]
    # Of value and output heads, and of four factors:
    assert small == wide == [4 * (2 * 4 * 4 * 4 + 4 * 4 * 4), norms]
    assert more_heads == [4 * (2 * 16 * 4 * 4 + 4 * 4 * 4), norms]


def test_cut_heads_are_exchanged_and_nothing_else():
    """Of 4 heads of 4 rows each that 3 ranks divide at rows 6 and 12, the one from row 4 on is cut in the middle."""
    assert sent_in_a_step(16, 24, 3)[0] == 4 * (2 * 16)


def test_a_copy_finds_its_own_parameters():
    """As ZeRO would mark them."""
    module, products = build("factorized", ["linear"])
    duplicate = copy.deepcopy(FLAMBe(groups_of(module, products), products=products))
    known = [origin.reference() for origins in duplicate._sharding._origins.values() for origin in origins]
    assert all(p is q for p, q in zip(known, (p for g in duplicate.param_groups for p in g["params"]), strict=True))


@pytest.mark.parametrize("is_cut", [True, False])
def test_the_range_of_a_state_is_a_view_of_it(is_cut):
    parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
    place = ((0, 5, 12), 1, parameter, 5) if is_cut else ((0, 12), 0, parameter)
    Shard("p", (3, 4), *place).of(parameter.data).fill_(-1)
    assert parameter.flatten().tolist() == ([0.0, 1, 2, 3, 4] + [-1.0] * 7 if is_cut else [-1.0] * 12)
