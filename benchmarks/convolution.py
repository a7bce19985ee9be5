"""Single low-rank convolutions, forward and backward: as a chain or multiplied out, and which way the layer chooses.

python -m benchmarks.convolution [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import interleave, parse, write
from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.config import CONV_SCHEMES, TENSOR_SCHEMES

SIZES = ((64, 32), (256, 8), (512, 4))  # channels, height and width: the dense operations are equal
RATIOS = (0.1, 0.5, 0.9, 2.0)  # share of the dense parameters, up to full rank
BATCH = {"cpu": 32, "cuda": 128}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
DENSE = "dense"
WAYS = {"chain": False, "composed": True}  # values of the layer's `compose`
WARMUP = 1
TOLERANCE = 1e-4  # of the largest output

Steps = dict[str, Callable[[], Tensor]]


def low_rank(dense: nn.Conv2d, scheme: str, ratio: float) -> nn.Module:
    """The layer of the highest rank that holds at most this share of the parameters of a dense one."""
    shapes = copy.deepcopy(dense).to("meta")
    ranks = range(1, factorized(shapes, scheme, rank_scale=1.0).rank + 1)
    kept = ratio * dense.weight.numel()
    rank = bisect_right(ranks, kept, key=lambda rank: _parameters(factorized(shapes, scheme, rank=rank)))
    return factorized(dense, scheme, rank=rank)


def factorized(dense: nn.Conv2d, scheme: str, **rule: Any) -> Any:
    """The low-rank layer in the place of a dense one, freshly drawn."""
    model = nn.Sequential(copy.deepcopy(dense))
    factorize_(model, FactorizationConfig(kinds=("conv",), conv_scheme=scheme, init="default", **rule))
    return model[0]


def _parameters(layer: nn.Module) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def computing(layer: nn.Module, compose: bool) -> nn.Module:
    """A copy that computes its output in the given way, and does not choose."""
    other: Any = copy.deepcopy(layer)
    other.compose = compose
    return other


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    """Forward, and backward to the parameters and the input; returns the output."""

    def run() -> Tensor:
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output.backward(gradient)
        return output.detach()

    return run


@torch.no_grad()
def flops(layer: nn.Module, x: Tensor) -> int:
    """Floating-point operations of the convolutions and matrix products in a forward pass."""
    with FlopCounterMode(display=False) as counter:
        layer(x)
    return counter.get_total_flops()


def check(steps: Steps) -> None:
    """Raise a ``RuntimeError`` unless the chains compute what the kernels do that were multiplied out."""
    for name in {name.rpartition(", ")[0] for name in steps if name != DENSE}:
        chained, composed = (steps[f"{name}, {way}"]() for way in WAYS)
        error = ((chained - composed).abs().max() / composed.abs().max()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{name}: the chain is {error:.1e} from the kernel multiplied out; nothing was timed")


def measure(channels: int, side: int, layout: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of a layer: what both ways gain on the dense one, and what the chosen way loses to the better one."""
    torch.manual_seed(0)
    placement: Any = {"device": device, "memory_format": LAYOUTS[layout]}
    dense = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(**placement)
    x = torch.randn(BATCH[device], channels, side, side).to(**placement).requires_grad_()
    gradient = torch.randn(x.shape).to(**placement)
    layers = {
        (scheme, ratio): low_rank(dense, scheme, ratio)
        for scheme in (*CONV_SCHEMES, *TENSOR_SCHEMES)
        for ratio in RATIOS
    }
    steps = {DENSE: step(dense, x, gradient)} | {
        f"{scheme} {ratio}, {way}": step(computing(layer, compose), x, gradient)
        for (scheme, ratio), layer in layers.items()
        for way, compose in WAYS.items()
    }
    check(steps)
    seconds = interleave(dict(steps), rounds, WARMUP)

    def row(scheme: str, ratio: float, layer: Any) -> dict[str, Any]:
        cases = {way: f"{scheme} {ratio}, {way}" for way in WAYS}
        chosen = flops(layer, x)
        choice = next(way for way, compose in WAYS.items() if flops(computing(layer, compose), x) == chosen)
        best = min(cases, key=lambda way: median(seconds[cases[way]]))
        return {
            "layer": f"{channels} -> {channels}, {side} x {side}",
            "layout": layout,
            "scheme": scheme,
            "rank": layer.rank,
            "ratio": _parameters(layer) / dense.weight.numel(),
            "fewer_flops": flops(dense, x) / chosen,
            **{f"{way}_speedup": ratio_of(seconds, DENSE, case) for way, case in cases.items()},
            "choice": choice,
            "choice_over_best": ratio_of(seconds, cases[choice], cases[best]),
        }

    return [row(scheme, ratio, layer) for (scheme, ratio), layer in layers.items()]


def ratio_of(seconds: dict[str, list[float]], case: str, other: str) -> float:
    """Median over the rounds of the time of one case over that of another."""
    return median(a / b for a, b in zip(seconds[case], seconds[other], strict=True))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, check, measure, write; returns the rows."""
    args = parse("convolution", __doc__, "the smallest images alone, three rounds", argv)
    sizes, rounds = (SIZES[-1:], 3) if args.quick else (SIZES, 5)
    rows = [
        row
        for channels, side in sizes
        for layout in LAYOUTS
        for row in measure(channels, side, layout, rounds, args.device)
    ]
    write("convolution", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
