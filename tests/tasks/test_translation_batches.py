"""Encoding sentence pairs, and batches of like numbers of tokens."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from translation_cases import PAIRS, tiny_tokenizer

from hf_fnl.tasks.length_batches import LengthBatchSampler, batch_bounds, lengths_of
from hf_fnl.tasks.translation import encode_pairs

PAIR_SET = datasets.Dataset.from_list([{"source": source, "target": target} for source, target in PAIRS])


def lengths(count: int = 97, longest: int = 31) -> np.ndarray:
    return np.random.default_rng(0).integers(1, longest + 1, (count, 2))


def costs(sampler: LengthBatchSampler) -> list[int]:
    return [len(batch) * int(sampler.lengths[batch].max()) for batch in sampler]


def test_encoding_ends_both_sides_and_keeps_the_order():
    tokenizer = tiny_tokenizer()
    encoded = encode_pairs(PAIR_SET, tokenizer, longest=128)
    for side, name in ((0, "input_ids"), (1, "labels")):
        assert tokenizer.batch_decode(encoded[:][name]) == [f"{pair[side]}</s>" for pair in PAIRS]
    found = [[len(row["input_ids"]), len(row["labels"])] for row in encoded]
    assert lengths_of(encoded).tolist() == found
    assert lengths_of(encoded.select([2, 0])).tolist() == [found[2], found[0]]


def test_cutting_keeps_the_end_token():
    tokenizer = tiny_tokenizer()
    encoded = encode_pairs(PAIR_SET, tokenizer, longest=5, max_length=5)
    assert lengths_of(encoded).max() == 5
    assert all(row[name][-1] == tokenizer.eos_token_id for row in encoded for name in ("input_ids", "labels"))


def test_long_pairs_are_named_or_left_out_with_a_count(caplog):
    tokenizer = tiny_tokenizer()
    whole = encode_pairs(PAIR_SET, tokenizer, longest=128)
    longest = sorted(lengths_of(whole).max(axis=1))[1]
    message = (
        rf"1 of 3 pairs have more than {longest} tokens on a side, first pair 2: source 'Wie geht es dir \?'... has "
        rf"{lengths_of(whole)[1, 0]}; raise max_tokens"
    )
    with pytest.raises(ValueError, match=message):
        encode_pairs(PAIR_SET, tokenizer, longest=longest)
    with caplog.at_level(logging.WARNING):
        kept = encode_pairs(PAIR_SET, tokenizer, longest=longest, drop_long=True)
    assert kept.to_list() == [whole[0], whole[2]]
    assert f"left out 1 of 3 pairs with more than {longest} tokens" in caplog.text
    with pytest.raises(ValueError, match="all 3 pairs have more than 1 tokens on a side; raise max_tokens"):
        encode_pairs(PAIR_SET, tokenizer, longest=1, drop_long=True)


@pytest.mark.parametrize(
    ("sentences", "max_tokens", "bounds"),
    [
        ([1, 1, 1], 3, [0, 3]),
        ([2, 3, 3, 7], 7, [0, 2, 3, 4]),
        ([1, 4, 5], 10, [0, 2, 3]),
        ([5], 5, [0, 1]),
        ([1, 2, 9, 9], 7, [0, 2, 3, 4]),
    ],
    ids=["one", "several", "longest counts", "exact", "too long"],
)
def test_cuts(sentences, max_tokens, bounds):
    assert batch_bounds(np.array(sentences), max_tokens).tolist() == bounds


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("max_tokens", [31, 64, 500], ids=str)
def test_every_epoch_has_every_pair_once_in_batches_under_the_limit(max_tokens, epoch):
    sampler = LengthBatchSampler(lengths(), max_tokens=max_tokens)
    first = list(sampler)
    sampler.set_epoch(epoch)
    assert max(costs(sampler)) <= max_tokens
    assert sorted(row for batch in sampler for row in batch) == list(range(97))
    assert len(list(sampler)) == len(sampler) == len(first)
    assert (list(sampler) == first) == (epoch == 0)


def test_batches_are_nearly_full_and_of_like_length():
    sampler = LengthBatchSampler(lengths(5003), max_tokens=640)
    assert np.median(costs(sampler)) > 0.95 * 640
    spans = [np.ptp(sampler.lengths[batch].max(axis=1)) for batch in sampler]
    assert max(spans) <= 5
    assert np.median(spans) <= 1


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_get_the_same_number_of_batches_and_all_pairs_between_them(processes):
    sampler = LengthBatchSampler(lengths(), max_tokens=64, num_processes=processes)
    shares = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(sampler) // processes}
    assert {row for share in shares for batch in share for row in batch} == set(range(97))
    twice = len([row for share in shares for batch in share for row in batch]) - 97
    assert twice <= (processes - 1) * 64
