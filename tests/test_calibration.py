"""Data run through a model once, visitors answer for its modules, and the model is as before."""

import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bert_cases import BACKBONE, CROSS_DECODER, FULL, HEADS, NO_DROPOUT
from family import Head, run
from torch import Tensor, nn
from torch.testing import assert_close

from hf_fnl.calibration import Call, join_batches, visit
from hf_fnl.layers.span import Span
from hf_fnl.truncation import Moments

EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Net(nn.Module):
    """Runs ``last`` before ``first``, ``twice`` two times, and ``never`` not at all; has dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last, self.never = (nn.Linear(5, 5) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.twice(self.dropout(self.first(input=self.twice(self.last(x)))))


def keep(call: Call) -> nn.Module:
    return call.module


def looking(seen: dict[str, Tensor], *names: str) -> dict[str, Callable[[Call], nn.Module]]:
    """Visitors that note what their modules are given and leave them in place."""

    def visitor(name: str) -> Callable[[Call], nn.Module]:
        def look(call: Call) -> nn.Module:
            seen[name] = call.samples(call.args[0] if call.args else call.kwargs["input"]).clone()
            return call.module

        return look

    return {name: visitor(name) for name in names}


# The pass


def test_modules_are_visited_in_the_order_of_execution_each_once() -> None:
    visits: list[nn.Module] = []
    model = Net()

    def visitor(call: Call) -> nn.Module:
        visits.append(call.module)
        return call.module

    found = visit(model, {"x": torch.randn(7, 5)}, dict.fromkeys(["first", "twice", "last"], visitor))
    assert list(found) == ["last", "twice", "first"]
    assert visits == [model.last, model.twice, model.first]
    assert list(found.values()) == visits


def test_a_layer_sees_what_replaced_layers_give_it() -> None:
    model = Net().eval()
    x = torch.randn(7, 5)
    doubled = {name: nn.Linear(5, 5) for name in ("last", "twice")}
    seen: dict[str, Tensor] = {}
    visit(
        model,
        {"x": x},
        {name: lambda call, layer=layer: layer for name, layer in doubled.items()} | looking(seen, "first"),
    )
    assert_close(seen["first"], doubled["twice"](doubled["last"](x)).detach())


def test_what_answers_at_the_first_call_answers_at_the_next() -> None:
    model, x = Net().eval(), torch.randn(7, 5)
    replaced = nn.Linear(5, 5)
    outputs = []
    with model.register_forward_hook(lambda module, args, result: outputs.append(result)):
        visit(model, {"x": x}, {"twice": lambda call: replaced})
    assert_close(outputs[0], replaced(model.first(replaced(model.last(x)))).detach())


def test_nothing_is_recorded_for_gradients() -> None:
    def visitor(call: Call) -> nn.Module:
        assert not torch.is_grad_enabled()
        assert not call.args[0].requires_grad
        return call.module

    visit(Net(), {"x": torch.randn(7, 5)}, {"twice": visitor})


# The model stays as it is


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a visit might leave behind in a module."""
    return {
        name: {key: dict(value) if isinstance(value, Mapping) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def half_trained() -> Net:
    model = Net().train()
    model.first.eval()
    model.never.eval()
    original = model.last.forward
    model.last.forward = lambda x: original(x) + 1  # as accelerate's hooks do
    return model


def test_modes_forwards_and_weights_are_as_before() -> None:
    model = half_trained()
    before, weights = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    seen: dict[str, Tensor] = {}
    visitors = looking(seen, "first", "last") | {"twice": lambda call: nn.Linear(5, 5)}
    visit(model, {"x": torch.randn(7, 5)}, visitors)
    assert state_of(model) == before
    assert_close(dict(model.named_parameters()), weights, **EXACT)


def test_an_exception_in_a_visitor_leaves_nothing_behind() -> None:
    model = half_trained()
    before = state_of(model)

    def fail(call: Call) -> nn.Module:
        raise RuntimeError("from the visitor")

    with pytest.raises(RuntimeError, match="from the visitor"):
        visit(model, {"x": torch.randn(7, 5)}, {"last": keep, "twice": fail, "first": keep})
    assert state_of(model) == before


def test_an_exception_in_an_attention_leaves_no_hooks() -> None:
    model = BACKBONE.build_stock()
    before = state_of(model)

    def fail(call: Call) -> nn.Module:
        attention = call.module
        attention.output.dense.weight.data = attention.output.dense.weight.data[:, :1]  # its forward fails
        call.head_moments(Span(attention.self.query), Span(attention.self.key), attention.output.dense, 3)
        return call.module

    with pytest.raises(RuntimeError, match="shapes"):
        visit(model, BACKBONE.batch(), {"encoder.layer.0.attention": fail})
    assert state_of(model) == before


def test_dropout_is_off() -> None:
    model = Net().train()
    seen: dict[str, Tensor] = {}
    x = torch.randn(7, 5)
    with model.dropout.register_forward_hook(lambda module, args, result: seen.update(x=args[0], y=result)):
        visit(model, {"x": x}, {"first": keep})
    assert torch.equal(seen["x"], seen["y"])
    assert model.dropout.training


# What cannot be visited


@pytest.mark.parametrize(
    ("batch", "names", "error", "message"),
    [
        pytest.param(
            {"x": torch.ones(2, 5)}, ["first", "never"], ValueError, "data never reach never;", id="unreached"
        ),
        pytest.param({"x": torch.ones(2, 5)}, ["fourth"], AttributeError, "fourth", id="unknown"),
        pytest.param([], ["first"], ValueError, "no calibration batches", id="no-batch"),
        pytest.param([{"x": torch.ones(2, 5)}, {}], ["first"], ValueError, "different keys: x; $", id="other-keys"),
    ],
)
def test_what_cannot_be_visited(batch: Any, names: list[str], error: type[Exception], message: str) -> None:
    model = half_trained()
    before = state_of(model)
    with pytest.raises(error, match=message):
        visit(model, batch, dict.fromkeys(names, keep))
    assert state_of(model) == before


def test_only_masked_positions_are_no_data() -> None:
    model = Net()

    def visitor(call: Call) -> nn.Module:
        call.input_moments()
        return call.module

    batch = {"x": torch.randn(2, 3, 5), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="is every position of the batch masked"):
        visit(model, batch, {"first": visitor})


# Masks


@pytest.mark.parametrize(
    ("x", "masks", "kept"),
    [
        pytest.param((2, 3, 5), [], 6, id="no-mask"),
        pytest.param((2, 3, 5), [[[1, 1, 0], [1, 0, 0]]], 3, id="mask"),
        pytest.param((2, 4, 5), [[[1, 1, 0], [1, 0, 0]]], 8, id="mask-of-another-length"),
        pytest.param((2, 3), [[[1, 1, 0], [1, 0, 0]]], 2, id="no-positions"),
        pytest.param((2, 3, 4, 5), [[[1, 1, 0], [1, 0, 0]]], 24, id="heads-are-no-positions"),
        pytest.param((2, 3, 5), [[[1, 1, 0], [1, 0, 0]], [[1, 0, 1], [1, 1, 1]]], 2, id="two-masks-of-one-shape"),
        pytest.param((2, 3, 5), [[[1], [0]], [[1, 1, 0], [1, 0, 0]]], 3, id="the-mask-of-its-shape"),
    ],
)
def test_masked_positions_are_left_out(x: tuple[int, ...], masks: list[Any], kept: int) -> None:
    call = Call(nn.Identity(), (), {}, tuple(torch.tensor(mask).bool() for mask in masks), lambda: None)
    values = torch.randn(x)
    samples = call.samples(values)
    assert samples.shape == (kept, x[-1])
    if not masks:
        assert torch.equal(samples, values.reshape(-1, 5))
    if kept == 3:
        assert torch.equal(samples, torch.stack([values[0, 0], values[0, 1], values[1, 0]]))


def inputs_of(name: str, model: nn.Module, batch: Any) -> Tensor:
    seen: dict[str, Tensor] = {}
    visit(model, batch, looking(seen, name))
    return seen[name]


def test_padding_does_not_show() -> None:
    model, batch = BACKBONE.build_stock(), BACKBONE.batch()
    name = "encoder.layer.1.output.dense"
    before = inputs_of(name, model, batch)
    assert len(before) == batch["attention_mask"].sum()
    batch["input_ids"][batch["attention_mask"] == 0] = 5
    assert_close(inputs_of(name, model, batch), before)


def test_choices_are_sequences_of_their_own() -> None:
    head = HEADS["multiple-choice"]
    batch = head.batch()
    seen = inputs_of("bert.encoder.layer.0.intermediate.dense", head.build_stock(), batch)
    assert len(seen) == batch["attention_mask"].sum() < batch["attention_mask"].numel()


def test_an_encoders_mask_is_that_of_cross_attention() -> None:
    batch = CROSS_DECODER.batch()
    model = CROSS_DECODER.build_stock()
    seen: dict[str, Any] = {}

    def visitor(call: Call) -> nn.Module:
        inner = call.module.self
        seen["moments"] = call.head_moments(Span(inner.query), Span(inner.key), call.module.output.dense, 3)
        return call.module

    visit(model, batch, {"bert.encoder.layer.0.crossattention": visitor})
    keys = model.bert.encoder.layer[0].crossattention.self.key(batch["encoder_hidden_states"])
    valid = keys[batch["encoder_attention_mask"].bool()].detach()
    expected = Moments.of(valid.unflatten(-1, (3, -1)).transpose(0, 1))
    assert_close(seen["moments"].key.mean, expected.mean, rtol=1e-5, atol=1e-5)
    assert_close(seen["moments"].key.covariance, expected.covariance, rtol=1e-5, atol=1e-5)


# Several batches


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch in two, each only as long as its own longest sequence."""
    order = batch["attention_mask"].flatten(1).sum(1).argsort()
    parts = []
    for rows in order.split([1, len(order) - 1]):
        length = int(batch["attention_mask"][rows].sum(-1).max())
        parts.append({name: value[rows][..., :length] for name, value in batch.items()})
    return parts


@pytest.mark.parametrize("head", [BACKBONE, HEADS["multiple-choice"]], ids=["backbone", "multiple-choice"])
def test_several_batches_are_one(head: Head) -> None:
    batch = {name: value for name, value in head.batch().items() if name != "labels"}
    batch = {name: value * batch["attention_mask"] for name, value in batch.items()}
    parts = halves(batch)
    assert len({part["input_ids"].shape[-1] for part in parts}) == 2
    name = next(name for name, _ in head.build_stock().named_modules() if name.endswith("1.intermediate.dense"))
    whole, joined = (inputs_of(name, head.build_stock(), data) for data in (batch, parts))
    assert_close(Moments.of(joined).second, Moments.of(whole).second)
    assert_close(Moments.of(joined).mean, Moments.of(whole).mean)


def test_batches_are_padded_at_the_end() -> None:
    short = {"input_ids": torch.ones(1, 2, dtype=torch.long), "attention_mask": torch.ones(1, 2)}
    long = {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.ones(2, 3)}
    joined = join_batches([short, long])
    assert joined["input_ids"].tolist() == [[1, 1, 0], [7, 7, 7], [7, 7, 7]]
    assert joined["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert joined["input_ids"].dtype == torch.long
    assert join_batches(short) is short


def test_hidden_states_are_padded_with_their_mask() -> None:
    parts = [
        {"encoder_hidden_states": torch.ones(1, length, 5), "encoder_attention_mask": torch.ones(1, length)}
        for length in (4, 2)
    ]
    joined = join_batches(parts)
    assert joined["encoder_hidden_states"].shape == (2, 4, 5)
    assert joined["encoder_attention_mask"].sum(1).tolist() == [4, 2]


def test_lengths_that_differ_need_a_mask() -> None:
    parts = [{"input_ids": torch.ones(1, length, dtype=torch.long)} for length in (2, 3)]
    with pytest.raises(ValueError, match="differ in the length of input_ids: give an attention_mask"):
        join_batches(parts)
    assert join_batches([parts[0], parts[0]])["input_ids"].shape == (2, 2)


# Memory


def test_one_layers_moments_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Moments] = weakref.WeakSet()
    most, made = 0, 0
    of = Moments.of

    def counting(samples: Tensor) -> Moments:
        nonlocal most, made
        moments = of(samples)
        alive.add(moments)
        most, made = max(most, len(alive)), made + 1
        return moments

    monkeypatch.setattr(Moments, "of", counting)
    BACKBONE.ours.from_dense(BACKBONE.build_stock(), qk_rank=3, ov_rank=3, ffn_rank=5, calibration=BACKBONE.batch())
    assert made == 2 * (3 + 2)
    assert most == 3
    assert not alive


def test_the_same_model_answers_as_before_the_visit() -> None:
    stock, batch = BACKBONE.build_stock(**NO_DROPOUT), BACKBONE.batch()
    before = run(stock, batch)
    BACKBONE.ours.from_dense(stock, **FULL, calibration=batch)
    assert_close(run(stock, batch), before, **EXACT)
