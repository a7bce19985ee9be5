"""Forwards take what the stock ones take, by name and by position."""

import inspect

import bert_cases
import gpt2_cases
import marian_cases
import pytest
import torch
from family import Head
from model_cases import each_head
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import find_labels

DECODERS = {"bert": bert_cases.DECODER, "gpt2": gpt2_cases.LM, "marian": marian_cases.DECODER}
each_decoder = pytest.mark.parametrize("head", DECODERS.values(), ids=DECODERS)


@each_head
def test_the_signature_is_that_of_the_stock_forward_and_more_by_keyword(head: Head) -> None:
    theirs, ours = (inspect.signature(each.forward).parameters.values() for each in (head.stock, head.ours))
    positional = [p for p in ours if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.kind, p.default) for p in positional] == [(p.name, p.kind, p.default) for p in theirs]
    assert find_labels(head.ours) == find_labels(head.stock)  # those that the Trainer waits for


@each_head
def test_arguments_may_be_given_by_position(head: Head) -> None:
    model, batch = head.build(head.family.low["all"]), head.batch()
    names = list(inspect.signature(model.forward).parameters)
    count = len(batch)
    if "labels" in batch:  # comes late
        count = names.index("labels") + 1
    by_position = [batch.get(name) for name in names[:count]]
    others = {name: value for name, value in batch.items() if name not in names[:count]}
    assert_close(model(*by_position, **others)[0], model(**batch)[0], rtol=0, atol=0)
    with pytest.raises(TypeError):
        model(*[None] * 40)


@each_decoder
def test_what_the_attention_kernel_names_is_handed_to_it(head: Head) -> None:
    given = []

    def warm(module, query, key, value, attention_mask, temperature=1.0, **kwargs):
        given.append(temperature)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("warm", warm)
    AttentionMaskInterface.register("warm", sdpa_mask)
    try:
        model, words = head.build(head.family.low["all"], attention="warm"), head.batch()["input_ids"]
        model(words, temperature=2.0)
        assert given == [2.0] * model.config.num_hidden_layers
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping["warm"]


def test_labels_that_are_shifted_already_are_used() -> None:
    head = gpt2_cases.LM
    words, model = head.batch()["input_ids"], head.build(head.family.low["all"], **gpt2_cases.NO_DROPOUT)
    shifted = torch.nn.functional.pad(words, (0, 1), value=-100)[:, 1:]  # strided, as a part of longer ones
    for training in (False, True):
        model.train(training)
        expected = model(words, labels=words).loss
        assert_close(model(words, labels=words.flip(0), shift_labels=shifted).loss, expected)
        assert_close(model(words, shift_labels=shifted).loss, expected)
        ignoring = model(words, labels=words, ignore_index=int(words[0, 1])).loss
        masked = model(words, labels=words.masked_fill(words == words[0, 1], -100)).loss
        assert_close(ignoring, masked)
