"""Single layers, forward and backward and at inference: against dense ones and TensorLy-Torch's of the same parameters.

The limit of a layer is how many times fewer operations it takes than the dense one. A convolution is computed as a
chain of small ones or multiplied out; ``chosen`` leaves that to the layer, and is to be no slower than the better way.
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.limits import count_flops
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Goal, Row
from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.surgery.config import CONV_SCHEMES, TENSOR_SCHEMES

DENSE, OURS, CHOSEN = "dense", "hf_fnl", "chosen"
PEERS = {f"tltorch, {implementation}": implementation for implementation in ("reconstructed", "factorized")}
WAYS = {"chain": False, "composed": True, CHOSEN: None}  # values of a convolution's `compose`
SCHEMES = (*CONV_SCHEMES, *TENSOR_SCHEMES)
RATIOS = (0.1, 0.5, 0.9, 2.0)  # share of the dense parameters, up to full rank
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
PEER_GOAL = 2.0
CHOICE_GOAL = 1.1
TOLERANCE = 1e-4  # of the largest output


@dataclass(frozen=True)
class Shape:
    """A linear layer and the rows that it maps."""

    in_features: int
    out_features: int
    rank: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.in_features} -> {self.out_features}, rank {self.rank}, {self.tokens} tokens"


def shapes(options: Options) -> list[Shape]:
    """The matrices of BERT-base, at training, and at a high rank."""
    width = options.pick(full=768, quick=768, tiny=24)
    tokens = options.pick(full=8192 if options.on_gpu else 1024, quick=256, tiny=8)
    sizes = [(width, 4 * width, width // 4), (4 * width, width, width // 4), (width, width, width // 12)]
    return [Shape(*size, tokens) for size in sizes]


def linear(shape: Shape, device: str) -> FactorizedLinear:
    """A layer of this shape; the spectral start would only cost time here."""
    return FactorizedLinear(shape.in_features, shape.out_features, shape.rank, init="default", device=device)


def training_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Case:
    """Forward, and backward to the parameters and to the input if that is no index."""

    def run() -> Tensor:
        layer.zero_grad()
        x.grad = None
        output: Tensor = layer(x)
        output.backward(gradient)
        return output.detach()

    return run


def inference(layer: nn.Module, x: Tensor) -> Case:
    """Forward without gradients."""
    layer = copy.deepcopy(layer).eval()
    return torch.no_grad()(lambda: layer(x))


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless all ways compute what the dense layers do that they merge to."""
    torch.manual_seed(0)
    for shape in shapes(options):
        layer = linear(shape, options.device)
        _agree(str(shape), layer, layer.to_dense(), torch.randn(7, shape.in_features, device=options.device))
    for channels, side in _images(options):
        x = torch.randn(2, channels, side, side, device=options.device)
        for scheme in SCHEMES:
            layer = low_rank(_convolution(channels, options.device), scheme, 0.5)
            for layer.compose in WAYS.values():
                _agree(f"{scheme} {channels}", layer, layer.to_dense(), x)


@torch.no_grad()
def _agree(name: str, layer: nn.Module, dense: nn.Module, x: Tensor) -> None:
    found, expected = layer(x), dense(x)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise RuntimeError(f"{name} is {error:.1e} from the layer that it merges to; nothing was timed")


def measure(options: Options) -> Iterator[Row]:
    """Rows of linear layers, embeddings and convolutions."""
    torch.manual_seed(0)
    rounds = options.pick(full=15, quick=7, tiny=2)
    for shape in shapes(options):
        yield from measure_linear(shape, options.device, rounds)
    yield from measure_embedding(options, rounds)
    layouts = options.pick(full=tuple(LAYOUTS), quick=("channels last",), tiny=("contiguous",))
    for (channels, side), layout in itertools.product(_images(options), layouts):
        yield from measure_convolution(channels, side, layout, options)


def measure_linear(shape: Shape, device: str, rounds: int) -> Iterator[Row]:
    """Rows of a linear layer in training and at inference, peers included."""
    ours = linear(shape, device)
    layers: dict[str, nn.Module] = {DENSE: ours.to_dense(), OURS: ours}
    for name, implementation in PEERS.items():
        try:
            from benchmarks.peers.tensorly_torch import tensorly_torch_linear

            layers[name] = tensorly_torch_linear(ours, implementation)
        except (ImportError, RuntimeError) as reason:
            yield {"workload": f"linear {shape}", "case": name, "not_measured": str(reason)}
    present = [name for name in PEERS if name in layers]
    fewer = shape.in_features * shape.out_features / (shape.rank * (shape.in_features + shape.out_features))
    x = torch.randn(shape.tokens, shape.in_features, device=device, requires_grad=True)
    gradient = torch.randn(shape.tokens, shape.out_features, device=device)
    steps = {name: training_step(layer, x, gradient) for name, layer in layers.items()}
    goals = {OURS: Goal(present[0], faster=PEER_GOAL)} if present else {}
    facts = {name: {"parameters": sum(p.numel() for p in layer.parameters())} for name, layer in layers.items()}
    comparison = Comparison(f"linear {shape}, training", steps, DENSE, limits={OURS: fewer}, goals=goals, facts=facts)
    yield from comparison.measure(device, rounds=rounds)
    for tokens in (1, shape.tokens):
        cases = {name: inference(layer, x.detach()[:tokens]) for name, layer in layers.items()}
        workload = f"linear {shape}, inference of {tokens}"
        yield from Comparison(workload, cases, DENSE, limits={OURS: fewer}).measure(device, rounds=rounds)


def measure_embedding(options: Options, rounds: int) -> Iterable[Row]:
    """Rows of BERT's word embedding; the dense gradient of the table is most of the dense step."""
    vocabulary, width = options.pick(full=(30522, 768), quick=(5000, 768), tiny=(101, 24))
    ours = FactorizedEmbedding(vocabulary, width, width // 6, init="default", device=options.device)
    ids = torch.randint(vocabulary, (options.pick(full=1024, quick=256, tiny=8),), device=options.device)
    gradient = torch.randn(len(ids), width, device=options.device)
    layers = {DENSE: ours.to_dense(), OURS: ours}
    steps = {name: training_step(layer, ids, gradient) for name, layer in layers.items()}
    workload = f"embedding {vocabulary} x {width}, rank {width // 6}, training"
    return Comparison(workload, steps, DENSE).measure(options.device, rounds=rounds)


# Convolutions


def _images(options: Options) -> tuple[tuple[int, int], ...]:
    """Channels with the height and width at which the dense operations are equal."""
    return options.pick(full=((64, 32), (256, 8), (512, 4)), quick=((32, 16),), tiny=((8, 4),))


def _convolution(channels: int, device: str) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device)


def low_rank(dense: nn.Conv2d, scheme: str, ratio: float) -> Any:
    """The layer of the highest rank that holds at most this share of the parameters of a dense one."""
    on_meta = copy.deepcopy(dense).to("meta")
    ranks = range(1, factorized(on_meta, scheme, rank_scale=1.0).rank + 1)
    kept = ratio * dense.weight.numel()
    rank = bisect_right(ranks, kept, key=lambda rank: _parameters(factorized(on_meta, scheme, rank=rank)))
    return factorized(dense, scheme, rank=max(1, rank))


def factorized(dense: nn.Conv2d, scheme: str, **rule: Any) -> Any:
    """The low-rank layer in the place of a dense one, freshly drawn."""
    model = nn.Sequential(copy.deepcopy(dense))
    factorize_(model, FactorizationConfig(kinds=("conv",), conv_scheme=scheme, init="default", **rule))
    return model[0]


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def measure_convolution(channels: int, side: int, layout: str, options: Options) -> Iterator[Row]:
    """Rows of every scheme and ratio: both ways, and the way that the layer chooses."""
    rounds = options.pick(full=7, quick=5, tiny=2)
    placement: Any = {"device": options.device, "memory_format": LAYOUTS[layout]}
    dense = _convolution(channels, options.device).to(**placement)
    batch = options.pick(full=128 if options.on_gpu else 32, quick=8, tiny=2)
    x = torch.randn(batch, channels, side, side).to(**placement).requires_grad_()
    gradient = torch.randn(x.shape).to(**placement)
    for scheme, ratio in itertools.product(SCHEMES, options.pick(full=RATIOS, quick=RATIOS, tiny=(0.5,))):
        layer = low_rank(dense, scheme, ratio)
        layers = {DENSE: dense, **{way: _computing(layer, compose) for way, compose in WAYS.items()}}
        steps = {name: training_step(each, x, gradient) for name, each in layers.items()}
        flops = {name: count_flops(step) for name, step in steps.items()}
        workload = f"conv {channels} -> {channels}, {side} x {side}, {layout}, {scheme}, rank {layer.rank}"
        comparison = Comparison(
            workload,
            steps,
            DENSE,
            limits={way: flops[DENSE] / flops[way] for way in WAYS},
            facts={CHOSEN: {"ratio": _parameters(layer) / _parameters(dense)}},
        )
        yield from _with_choice(comparison.measure(options.device, rounds=rounds))


def _with_choice(rows: list[Row]) -> list[Row]:
    """Say of the chosen way how much slower it is than the better one."""
    speed = {row["case"]: row["speedup"] for row in rows}
    best = max(speed["chain"], speed["composed"])
    for row in rows:
        if row["case"] == CHOSEN:
            row |= {
                "goal": f"at most {CHOICE_GOAL:g} times the better way",
                "reached": best / speed[CHOSEN] <= CHOICE_GOAL,
            }
    return rows


def _computing(layer: Any, compose: bool | None) -> nn.Module:
    other = copy.deepcopy(layer)
    other.compose = compose
    return other  # type: ignore[no-any-return]


# How the cost grows


THEME = Theme("layers", check, measure)
