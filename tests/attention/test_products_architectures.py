"""The products of every architecture of Transformers that can be built small are what its model computes by.

A twentieth of them by default; all, in some minutes, and the counts of what became of them, by
``ALL_ARCHITECTURES=1 ./run_scripts/test.sh tests/attention/test_products_architectures.py -rP``.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import architectures, build, calls
from torch import Tensor, nn

from hf_fnl.attention import Factor, Product, find_products

TOLERANCE = 1e-3  # of what one factor alone changes; some steps of many models are in float32
SECONDS = 30  # for one architecture
SHARDS = 20


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    outputs = model(**inputs).to_tuple()
    return [value for value in outputs if isinstance(value, Tensor) and value.is_floating_point()]


def distance(outputs: list[Tensor], expected: list[Tensor]) -> float:
    pairs = list(zip(outputs, expected, strict=True))
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)


def transform_(model: nn.Module, factor: Factor, by: Tensor, *, has_bias: bool) -> None:
    """Multiply a factor by ``R (*heads, r, r)``, and the bias of its heads."""
    part = factor.view(model.get_parameter(factor.name))
    part.copy_(part @ by)
    bias = dict(model.named_parameters()).get(factor.name.removesuffix("weight") + "bias")
    if has_bias and bias is not None:
        heads = bias if factor.section is None else bias.narrow(0, *factor.section)
        heads = heads.unflatten(0, (*factor.heads, 1, -1))
        heads.copy_(heads @ by)


def changes(model: nn.Module, products: Sequence[Product], inputs: dict[str, Any]) -> tuple[float, float]:
    """How far the outputs move if the first factors of all products change alone, and if all factors do."""
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = outputs_of(model, inputs)
    bases, moved = [], []
    for product in products:
        shape = [min(sizes) for sizes in zip(*(factor.heads for factor in product.places), strict=True)]
        r = product.factors(model)[0].shape[-1]
        Q, scale = torch.linalg.qr(torch.randn(*shape, r, r).double()).Q, torch.rand(*shape, 1, r).double() + 0.5
        bases.append((Q * scale, Q / scale))
    for side in (0, 1):
        for product, basis in zip(products, bases, strict=True):
            transform_(model, product.places[side], basis[side], has_bias=side == 0 or product.kind == "qk")
        moved.append(distance(outputs_of(model, inputs), expected))
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    return moved[0], moved[1]


@torch.no_grad()
def verdict(name: str) -> str:
    """What became of an architecture; a product that its model does not compute by is ``"false"``."""
    try:
        model = build(name)
    except TimeoutError:
        raise
    except Exception:
        return "not buildable"
    found: dict[str, list[Product]] = {}
    complaints = ""
    for kind in ("ov", "qk"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[kind] = find_products(model, [kind])
            except ValueError as error:
                found[kind] = []
                complaints += str(error)
    if not any(found.values()):
        return "refused, with a reason" if "left out" in complaints else "no attention that is known"
    for inputs in calls(model):
        try:
            runs = all(value.isfinite().all() and value.any() for value in outputs_of(model, inputs))
        except TimeoutError:
            raise
        except Exception:
            continue
        if not runs:
            continue
        for kind in ("ov", "qk"):
            if found[kind]:
                alone, both = changes(model, found[kind], inputs)
                if not both < max(TOLERANCE * alone, 1e-9):
                    return f"false: {name} {kind} {alone:.1e} {both:.1e}"
        return "found: " + " and ".join(kind for kind, products in found.items() if products)
    return "found, not run"


all_of_them = pytest.mark.skipif("ALL_ARCHITECTURES" not in os.environ, reason="set ALL_ARCHITECTURES=1 to run it")
shards = [pytest.param(shard, marks=[] if shard == 0 else all_of_them) for shard in range(SHARDS)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", shards)
def test_products_leave_the_outputs_of_their_models(shard: int, record_property: Any) -> None:
    verdicts = {}
    for name in architectures()[shard::SHARDS]:
        try:
            with time_limit():
                verdicts[name] = verdict(name)
        except TimeoutError:
            verdicts[name] = "too slow"
    counts = Counter(verdicts.values())
    record_property("architectures", dict(counts))
    print(dict(counts))
    assert not [text for text in verdicts.values() if text.startswith("false")]
    assert sum(count for text, count in counts.items() if text.startswith("found: ")) > len(verdicts) / 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["roformer", "glm", "glm4"])
def test_rotary_positions_that_can_be_left_out_make_queries_and_keys_no_product(name: str) -> None:
    assert verdict(name) == "found: ov"
