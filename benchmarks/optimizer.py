"""One optimizer step on the tensors of BERT-base: LAMB and FLAMBe against torch's AdamW and the public LAMBs.

python -m benchmarks.optimizer [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from importlib import metadata
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining

from benchmarks.common import interleave, parse, write
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.products import Product, find_products
from tests.reference.flambe import ReferenceFLAMBe
from tests.reference.lamb import ReferenceLamb

ADAMW, LAMB, FLAMBE = "torch AdamW (fused)", "hf_fnl Lamb", "hf_fnl FLAMBe (ov)"
# Against which optimizer, and by how much at most: Sec. 8 of the design.
GOALS = {"cpu": {LAMB: (ADAMW, 1.8), FLAMBE: (LAMB, 1.15)}, "cuda": {LAMB: (ADAMW, 1.6), FLAMBE: (LAMB, 1.05)}}
# Where other packages keep theirs, and what it takes to compare like with like: no clipping inside of the step.
PUBLIC_LAMBS: dict[str, tuple[str, dict[str, Any]]] = {
    "pytorch_optimizer": ("pytorch_optimizer", {}),
    "timm": ("timm.optim", {"max_grad_norm": None}),
}
TOLERANCE = 1e-4  # of the way that a tensor goes in two steps, in float32

Groups = list[dict[str, Any]]


def workload(quick: bool, device: str) -> tuple[nn.Module, list[Product]]:
    """A BERT with random gradients, and the products that FLAMBe decays."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "vocab_size": 5000} if quick else {}
    model = BertForPreTraining(BertConfig(**sizes)).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model, find_products(model, ["ov"])


def groups_of(model: nn.Module, products: Sequence[Product], lr: float) -> Groups:
    """Decay on matrices, none on vectors."""
    return [{**group, "lr": lr} for group in parameter_groups(model, weight_decay=0.01, products=products)]


def check(quick: bool, device: str) -> None:
    """Raise a ``RuntimeError`` if one of our optimizers does not arrive where its oracle does, in float64."""
    for name in (LAMB, FLAMBE):
        model, products = workload(quick, device)
        start = copy.deepcopy(model).double()
        gradients = {path: p.grad.double() for path, p in model.named_parameters() if p.grad is not None}
        groups, exact_groups = groups_of(model, products, lr=1e-2), groups_of(start, products, lr=1e-2)
        optimizer = Lamb(groups) if name == LAMB else FLAMBe(groups, products=products)
        oracle = ReferenceLamb(exact_groups) if name == LAMB else ReferenceFLAMBe(exact_groups, products)
        for _ in range(2):
            optimizer.step()
            oracle.step(gradients)
        for path, parameter in model.named_parameters():
            target = oracle.parameters[path]
            error = (parameter - target).norm() / (target - start.get_parameter(path)).norm()
            if not error < TOLERANCE:
                raise RuntimeError(f"{name} is {error:.1e} of its way beside its oracle at {path}; nothing was timed")


def optimizers(
    model: nn.Module, products: Sequence[Product]
) -> tuple[dict[str, torch.optim.Optimizer], dict[str, str]]:
    """All that can be timed, on the same parameters; and why others cannot, by name."""

    def groups() -> Groups:
        # With a rate this small, many steps along one gradient leave the tensors what they are.
        return groups_of(model, products, lr=1e-7)

    found: dict[str, torch.optim.Optimizer] = {
        ADAMW: torch.optim.AdamW(groups(), fused=True),
        "torch AdamW (foreach)": torch.optim.AdamW(groups(), foreach=True),
        LAMB: Lamb(groups()),
        FLAMBE: FLAMBe(groups(), products=products),
    }
    missing = {}
    for package, (module, options) in PUBLIC_LAMBS.items():
        try:
            found[f"{package} {metadata.version(package)} Lamb"] = importlib.import_module(module).Lamb(
                groups(), **options
            )
        except ImportError as error:
            missing[f"{package} Lamb"] = str(error)
    return found, missing


def measure(quick: bool, device: str, rounds: int) -> list[dict[str, Any]]:
    """Time a step of every optimizer, in turns."""
    model, products = workload(quick, device)
    found, missing = optimizers(model, products)
    seconds = interleave({name: optimizer.step for name, optimizer in found.items()}, rounds, warmup=2)
    rows = [row(name, seconds, GOALS[device]) for name in found]
    return rows + [{"optimizer": name, "not_measured": reason} for name, reason in missing.items()]


def row(name: str, seconds: dict[str, list[float]], goals: dict[str, tuple[str, float]]) -> dict[str, Any]:
    """Median and quartiles of a step in milliseconds, and medians of its ratios within the rounds."""
    lower, middle, upper = (1e3 * quartile for quartile in quantiles(seconds[name], n=4))
    versus, goal = goals.get(name, (None, None))
    return {
        "optimizer": name,
        "step_ms": middle,
        "quartiles_ms": f"{lower:.1f}-{upper:.1f}",
        "over_adamw": ratio(seconds[name], seconds[ADAMW]),
        "over_lamb": ratio(seconds[name], seconds[LAMB]),
        "goal": None if goal is None else f"at most {goal} of {versus}",
    }


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds."""
    return median(a / b for a, b in zip(seconds, reference, strict=True))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, check, measure, write; returns the rows."""
    args = parse("optimizer", __doc__, "two layers and a small vocabulary, fewer rounds", argv)
    check(args.quick, args.device)
    rows = measure(args.quick, args.device, rounds=5 if args.quick else 25)
    write("optimizer", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
