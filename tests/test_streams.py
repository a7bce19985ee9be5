"""Streams: whoever reads them, and however often the readers change, no record is used twice or never."""

from __future__ import annotations

import random
from itertools import product

import pytest
from stream_cases import Processes, Records, flat, stack

from hf_fnl.training import stream_loader
from hf_fnl.training.stream_loader import StreamLoader
from hf_fnl.training.streaming import Reader

FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*worker processes:UserWarning")
SIZES = {
    "even": [5] * 8,
    "odd": [7, 1, 4, 13, 2, 3, 11],
    "some empty": [0, 6, 0, 1, 9, 0, 4, 2, 0, 5, 3],
    "one": [17],
}


def everything(sizes, epoch: int = 0) -> list[tuple[int, int, int]]:
    return [(shard, epoch, index) for shard, size in enumerate(sizes) for index in range(size)]


def records(placed) -> list[tuple[int, int, int]]:
    return [tuple(each.example["record"].tolist()) for each in placed]


# Readers


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_pass_has_every_record_once_whoever_shares_it_out(sizes):
    for world, workers in product((1, 2, 3, 5), (1, 2, 3)):
        readers = [
            Reader(Records(sizes), rank=rank, world=world, worker=worker, workers=workers, only_epoch=4)
            for rank, worker in product(range(world), range(workers))
        ]
        assert sorted(record for reader in readers for record in records(reader)) == everything(sizes, epoch=4)


def test_processes_have_shards_before_workers_have():
    counts = [len(Reader(Records([1] * 3), rank=rank, world=3, worker=0, workers=4).shards) for rank in range(3)]
    assert counts == [1, 1, 1]


def test_the_order_of_shards_is_drawn_from_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return [shard for shard, _, _ in records(Reader(Records([1] * 20, seed), only_epoch=epoch))]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed, epoch in product(range(3), range(3))}) == 9


def test_a_reader_of_empty_shards_says_so():
    with pytest.raises(ValueError, match=r"no example in the shards \[1, 3\] of 4: lower stream_shards"):
        next(iter(Reader(Records([2, 0, 2, 0]), rank=1, world=2)))


# Processes that stop and go on


@pytest.mark.parametrize("seed", range(25))
def test_readers_may_change_at_every_stop(seed):
    chosen = random.Random(seed)
    sizes = [chosen.choice([1, 2, 5, 9, 14]) for _ in range(chosen.randint(5, 12))]
    seen, state = [], None
    while not {*everything(sizes)} <= {*seen}:
        processes = Processes(Records(sizes), world=chosen.randint(1, 5), state=state)
        seen += flat(processes.draw(chosen.randint(1, 4)))
        state = processes.state()
    assert len(seen) == len({*seen})
    for shard, size in enumerate(sizes):
        in_order = [(epoch, index) for number, epoch, index in seen if number == shard]
        assert in_order == sorted(in_order)
        assert in_order == [divmod(number, size) for number in range(len(in_order))]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [SIZES["odd"], [2, 3, 1]], ids=["odd", "small"])
def test_the_same_processes_go_on_with_the_same_batches(world, sizes):
    whole = Processes(Records(sizes), world).draw(15)
    for stop in range(15):
        broken_off = Processes(Records(sizes), world)
        broken_off.draw(stop)
        resumed = Processes(Records(sizes), world, state=broken_off.state())
        assert resumed.draw(15 - stop) == [batches[stop:] for batches in whole]
        assert all(loader.batches == 15 for loader in resumed.loaders)


@FORKS
@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_the_same_workers_go_on_with_the_same_batches_in_their_turn(stop):
    whole = Processes(Records(SIZES["odd"]), 1, workers=3).draw(9)
    broken_off = Processes(Records(SIZES["odd"]), 1, workers=3)
    broken_off.draw(stop)
    resumed = Processes(Records(SIZES["odd"]), 1, workers=3, state=broken_off.state())
    assert resumed.draw(9 - stop) == [batches[stop:] for batches in whole]


@FORKS
def test_what_workers_read_ahead_is_not_lost_when_their_number_changes():
    sizes, seen, state = SIZES["odd"], [], None
    for workers in (3, 0, 2, 1, 2, 0):
        processes = Processes(Records(sizes), 1, workers=workers, state=state)
        seen += flat(processes.draw(3))
        state = processes.state()
    assert {*everything(sizes)} <= {*seen}
    assert len(seen) == len({*seen})


def test_more_workers_than_shards_are_not_started(caplog):
    loader = StreamLoader(Records([2] * 5), stack, batch_size=2, world=2, num_workers=4)
    assert loader.num_workers == 2
    assert "2 data loader workers instead of 4" in caplog.text


# What bad input gets


def test_fewer_shards_than_processes_are_refused():
    with pytest.raises(ValueError, match="2 shards is too little for 3 processes: set stream_shards to 3 or more"):
        StreamLoader(Records([4, 4]), stack, batch_size=2, world=3)


def test_the_state_of_another_stream_is_refused():
    state = Processes(Records([4] * 3, seed=1)).state()
    with pytest.raises(ValueError, match="another stream: num_shards=3 there and 4 here, seed=1 there and 2 here"):
        Processes(Records([4] * 4, seed=2), state=state)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"a": 3, "b": 5}, "data file b: 4 bytes in process 0, 5 bytes in process 1"),
        ({"a": 3}, "data file b: 4 bytes in process 0, not there in process 1"),
        ({"a": 3, "b": 4, "c": 1}, "data file c: not there in process 0, 1 bytes in process 1"),
    ],
    ids=["other size", "fewer", "more"],
)
def test_processes_that_see_other_files_are_refused(monkeypatch, there, message):
    stream = Records([4] * 3)
    stream.files = lambda: {"a": 3, "b": 4}
    monkeypatch.setattr(stream_loader, "gather", lambda item: [item, (item[0], there)])
    with pytest.raises(ValueError, match=message):
        StreamLoader(stream, stack, batch_size=2)
