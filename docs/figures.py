"""Draws the figures of the concepts and of the README into ``docs/figures``, from the library's own functions.

python docs/figures.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from hf_fnl import FactorizedLinear, FLAMBe, Lamb, find_products, parameter_groups, spectral_init
from hf_fnl.math.factors import decay_gradients, marchenko_pastur_density, product, singular_values
from hf_fnl.math.spectral import INIT_METHODS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
STYLE = {"svg.hashsalt": "hf_fnl", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
BLUE, ORANGE, GREEN, GRAY = "#3366aa", "#dd7733", "#449944", "#777777"


def picture() -> Any:
    """A dense matrix and its factors by spectral initialization; the two products of a head of an attention."""
    torch.manual_seed(1)
    weight = torch.nn.functional.interpolate(torch.randn(1, 1, 6, 6), (24, 24), mode="bicubic")[0, 0]
    U, V = spectral_init(weight, 4)
    queries, keys, values, outputs = (torch.randn(24, 5) for _ in range(4))
    figure, rows = plt.subplots(2, 1, figsize=(7.2, 3.9), layout="constrained")
    _equation(
        rows[0],
        [(weight, "W  (m x n)"), "≈", (U, "U  (m x r)"), (V.mT, "Vᵀ  (r x n)")],
        "a dense weight: m·n parameters                held as factors: r·(m + n)",
    )
    heads = [(queries, "Q"), (keys.mT, "Kᵀ"), "", (values, "V"), (outputs.mT, "Oᵀ")]
    _equation(rows[1], heads, "what every attention head already is: a query-key and a value-output product of rank r")
    return figure


def _equation(axes: Any, terms: Sequence[tuple[Tensor, str] | str], title: str) -> None:
    """Draw matrices beside each other, in one scale."""
    place = 0.0
    for term in terms:
        if isinstance(term, str):
            axes.text(place + 4, 12, term, ha="center", va="center", fontsize=16)
            place += 8
            continue
        matrix, name = term
        height, width = matrix.shape
        top = 12 - height / 2
        bound = float(matrix.abs().max())
        corners = (place, place + width, top + height, top)
        axes.imshow(matrix.numpy(), cmap="PuOr", vmin=-bound, vmax=bound, extent=corners, interpolation="nearest")
        axes.text(place + width / 2, 26.5, name, ha="center", va="top")
        place += width + 3
    axes.set(xlim=(-2, 72), ylim=(31, -1), xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, color=GRAY)
    axes.axis("off")


def spectral() -> Any:
    """Spectra of a product at initialization, and that of the dense weight."""
    torch.manual_seed(0)
    size, rank, std = 768, 192, 0.02
    draw = functools.partial(torch.nn.init.normal_, std=std)
    dense = torch.linalg.svdvals(torch.randn(size, size) * std)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained", width_ratios=(3, 2))
    left.plot(dense, color=GRAY, linestyle=":", label="dense")
    for method, color in zip(INIT_METHODS, (BLUE, GREEN, "black", ORANGE), strict=True):
        factors = FactorizedLinear(size, size, rank, init=method).fresh_factors(draw)
        left.plot(singular_values(*factors), color=color, label=method)
    left.set(
        xlabel="index",
        ylabel="singular value",
        yscale="log",
        ylim=(1e-3, 10),
        title=f"a ({size}, {size}) weight, rank {rank}",
    )
    left.legend(frameon=False, ncols=2)
    values = torch.linspace(0, float(dense.max()) * 1.05, 400)
    right.hist(dense, bins=40, density=True, color="#ccd6e6")
    right.plot(values[1:], marchenko_pastur_density(values[1:], (size, size), std), color=BLUE)
    right.axvspan(float(dense[rank]), float(dense.max()), color=ORANGE, alpha=0.15, linewidth=0)
    right.set(xlabel="singular value of the dense weight", title="shaded: what rank 192 keeps", yticks=[])
    return figure


def decay() -> Any:
    """What each decay alone does to the singular values of a product."""
    torch.manual_seed(0)
    start = spectral_init(torch.randn(96, 64) @ torch.diag(torch.linspace(1.5, 0.2, 64)) / 8, 32)
    before = singular_values(*start)
    decays: dict[str, tuple[Callable[..., Sequence[Tensor]], str]] = {
        "weight decay": (lambda *factors: factors, ORANGE),
        "Frobenius decay": (decay_gradients, BLUE),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained", width_ratios=(3, 2))
    left.plot(before / before.norm(), color="black", linestyle=":", zorder=3, label="before")
    for name, (gradients, color) in decays.items():
        factors, norms, ranks = start, list[float](), list[float]()
        while not norms or norms[-1] > 0.25:
            values = singular_values(*factors)
            norms.append(float(values.norm() / before.norm()))
            ranks.append(float(values.sum() / values.max()))
            factors = tuple(p - 0.005 * f for p, f in zip(factors, gradients(*factors), strict=True))
        left.plot(values / values.norm(), color=color, label=f"after {name}")
        right.plot(norms, ranks, color=color, label=name)
    left.set(xlabel="index", ylabel=r"$\sigma_i\;/\;\Vert W\Vert_F$", title="singular values, at a quarter of the norm")
    left.legend(frameon=False)
    right.invert_xaxis()
    right.set(xlabel=r"$\Vert W\Vert_F$, of what it was", title="effective rank")
    return figure


def flambe() -> Any:
    """LAMB and FLAMBe fit a factorized layer to noisy outputs of a matrix whose singular values fall off slowly."""
    torch.manual_seed(0)
    m, n, rank, steps = 48, 40, 24, 400
    left, right = (torch.linalg.qr(torch.randn(side, n)).Q for side in (m, n))
    truth = left @ torch.diag(torch.linspace(1, 0.1, n)) @ right.mT
    inputs, new = torch.randn(120, n), torch.randn(2000, n)
    outputs = inputs @ truth.mT + torch.randn(120, m)
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.5), layout="constrained")
    for name, color in (("LAMB", ORANGE), ("FLAMBe", BLUE)):
        torch.manual_seed(1)
        layer = FactorizedLinear(n, m, rank, bias=False)
        products = find_products(layer)
        if name == "LAMB":
            optimizer = Lamb(layer.named_parameters(), lr=0.02, weight_decay=1.0)
        else:
            groups = parameter_groups(layer, weight_decay=1.0, products=products)
            optimizer = FLAMBe(groups, products=products, lr=0.02, weight_decay=1.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        curves: list[tuple[float, float, float]] = []
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(inputs) - outputs).square().mean().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                values = singular_values(*layer.factors())
                error = float((new @ (product(*layer.factors()) - truth).mT).square().mean())
            curves.append((error, float(values.norm()), float(values.sum() / values.max())))
        for ax, curve in zip(axes, zip(*curves, strict=True), strict=True):
            ax.plot(curve, color=color, label=name)
    for ax, title in zip(axes, ("error on new data", r"$\Vert W\Vert_F$", "effective rank"), strict=True):
        ax.set(xlabel="step", title=title)
    axes[0].legend(frameon=False)
    return figure


def calibration() -> Any:
    """Memory at most and time of a calibrated cut over tokens, from ``python -m benchmarks calibration``."""
    rows = json.loads((RESULTS / "calibration-cpu.json").read_text(encoding="utf-8"))["rows"]
    tokens = [row["tokens"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.5), layout="constrained")
    curves = {
        "cut": ("megabytes", "seconds", BLUE),
        "forward pass": ("megabytes_after_forward", "forward_seconds", GRAY),
    }
    for name, (memory, seconds, color) in curves.items():
        left.plot(tokens, [row[memory] for row in rows], "o-", color=color, label=name)
        right.plot(tokens, [row[seconds] for row in rows], "o-", color=color, label=name)
    left.set(xlabel="tokens", title="MiB of the process at most", xscale="log", ylim=(0, None))
    right.set(xlabel="tokens", title="seconds", xscale="log", yscale="log")
    left.legend(frameon=False)
    return figure


FIGURES = {"picture": picture, "spectral": spectral, "decay": decay, "flambe": flambe, "calibration": calibration}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draw all figures; returns their files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw()
            files.append(out / f"{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
            plt.close(figure)
    return files


if __name__ == "__main__":
    print("\n".join(map(str, main())))
