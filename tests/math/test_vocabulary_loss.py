"""The chunked loss against the cross-entropy of all logits, and what it holds in memory meanwhile."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_fnl.math.vocabulary_loss import vocabulary_loss

BATCH, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11


def problem(dtype=torch.float64, ignored=(0, 4, 20), shape=(BATCH, LENGTH)):
    """Hidden states, weight, bias and labels, of which some are ignored; the first three want gradients."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((*shape, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    labels = torch.randint(VOCAB, shape, generator=generator)
    labels.view(-1)[list(ignored)] = -100
    return *(tensor.requires_grad_() for tensor in tensors), labels


def reference(hidden_states, weight, labels, *, bias=None, num_items_in_batch=None, **options):
    logits = F.linear(hidden_states, weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels.flatten(), **options)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", **options) / num_items_in_batch


def with_gradients(function, tensors, labels, *, has_bias=True, **options):
    hidden_states, weight, bias = tensors
    for tensor in tensors:
        tensor.grad = None
    loss = function(hidden_states, weight, labels, bias=bias if has_bias else None, **options)
    (3 * loss).backward()
    return [loss.detach(), *(tensor.grad for tensor in tensors[: 2 + has_bias])]


def close(left, right, **tolerance):
    for ours, theirs in zip(left, right, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    ("chunk_size", "options"),
    [
        (1, {"shape": (13,), "ignored": (1,)}),
        (4, {"has_bias": False}),
        (20, {}),
        (21, {}),
        (7, {"num_items_in_batch": 37}),
        (512, {"num_items_in_batch": torch.tensor(37)}),
        (4, {"ignore_index": 2, "shape": (2, 3, 5), "ignored": ()}),
        (4, {"shape": (0, LENGTH), "ignored": ()}),
        (4, {"ignored": range(BATCH * LENGTH)}),
    ],
    ids=["one axis", "no bias", "one short", "exact", "items", "items in a tensor", "three axes", "empty", "ignored"],
)
def test_loss_and_gradients_are_those_of_all_logits_together(chunk_size, options):
    layout = {name: options[name] for name in ("shape", "ignored") if name in options}
    options = {name: value for name, value in options.items() if name not in layout}
    *tensors, labels = problem(**layout)
    ours = with_gradients(vocabulary_loss, tensors, labels, chunk_size=chunk_size, **options)
    stock = with_gradients(reference, tensors, labels, **options)
    # Without labels torch's mean is not a number.
    close(ours, stock if stock[0].isfinite() else [torch.zeros_like(tensor) for tensor in stock])


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_under_autocast_as_a_linear_layer_and_cross_entropy(has_bias):
    *tensors, labels = problem(torch.float32)
    exact = with_gradients(reference, tensors, labels, has_bias=has_bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = with_gradients(vocabulary_loss, tensors, labels, has_bias=has_bias, chunk_size=4)
        stock = with_gradients(reference, tensors, labels, has_bias=has_bias)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * len(ours)
    torch.testing.assert_close(ours[0], stock[0])
    close(ours, stock, rtol=0, atol=0.03)
    close(ours, exact, rtol=0, atol=0.03)


def test_a_model_in_bfloat16_gets_its_gradients_in_bfloat16():
    *tensors, labels = problem(torch.bfloat16)
    ours = with_gradients(vocabulary_loss, tensors, labels, chunk_size=1)
    stock = with_gradients(reference, tensors, labels)
    assert [tensor.dtype for tensor in ours] == [torch.float32] + [torch.bfloat16] * 3
    close(ours, stock, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("frozen", range(3), ids=["hidden_states", "weight", "bias"])
def test_a_frozen_tensor_gets_no_gradient_and_the_others_theirs(frozen):
    *tensors, labels = problem()
    tensors[frozen].requires_grad_(False)
    ours = with_gradients(vocabulary_loss, tensors, labels)
    assert ours[1 + frozen] is None
    close(
        [x for x in ours if x is not None],
        [x for x in with_gradients(reference, tensors, labels) if x is not None],
    )


def test_the_backward_pass_can_be_repeated():
    hidden_states, weight, _, labels = problem()
    loss = vocabulary_loss(hidden_states, weight, labels)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_penalty_on_the_gradient_has_the_gradient_of_the_plain_loss():
    *tensors, labels = problem()
    results = []
    for function in (vocabulary_loss, reference):
        loss = function(*tensors[:2], labels, bias=tensors[2])
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        results.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), tensors))
    close(*results)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))])
        return made


@pytest.mark.parametrize(("function", "rows"), [(vocabulary_loss, 13), (reference, 213)], ids=["chunked", "whole"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_no_more_logits_than_those_of_a_chunk_are_ever_in_memory(function, rows, is_training):
    *tensors, labels = problem(shape=(213,))
    chunk = {"chunk_size": 13} if function is vocabulary_loss else {}
    with LargestTensor() as largest, torch.set_grad_enabled(is_training):
        loss = function(*tensors[:2], labels, bias=tensors[2], **chunk)
        if is_training:
            loss.backward()
    # The gradient of the hidden states, or else the labels, are larger than the logits of a chunk here.
    assert largest.numel == max(rows * VOCAB, 213 * WIDTH if is_training else 213)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(BATCH, WIDTH)}, ValueError, r"got shapes \(3, 5\), \(11, 5\) and \(3, 7\)"),
        ({"weight": torch.zeros(VOCAB, 4)}, ValueError, r"weight \(vocab_size, n\) .* \(11, 4\)"),
        ({"labels": torch.full((BATCH, LENGTH), VOCAB)}, IndexError, "out of bounds"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
    ids=["positions", "width", "label", "chunk_size"],
)
def test_bad_input_is_refused(change, error, message):
    hidden_states, weight, _, labels = problem(torch.float32)
    inputs = {"hidden_states": hidden_states, "weight": weight, "labels": labels, **change}
    with pytest.raises(error, match=message):
        vocabulary_loss(**inputs)
