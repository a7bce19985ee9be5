"""One optimizer step on the tensors of BERT-base: LAMB and FLAMBe beside torch's AdamW and the public LAMBs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForPreTraining

from benchmarks.harness.limits import copy_rate, count_flops, matrix_rate
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Goal, Row
from hf_fnl.attention import Product, find_products
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from tests.support.reference.flambe import ReferenceFLAMBe
from tests.support.reference.lamb import ReferenceLamb

ADAMW, LAMB, FLAMBE = "torch AdamW (fused)", "hf_fnl Lamb", "hf_fnl FLAMBe"
COMPILED = ", compiled"
# Sec. 8 of the design.
GOALS = {
    "cpu": {LAMB: Goal(ADAMW, slower=2.0), FLAMBE: Goal(LAMB, slower=1.3)},
    "cuda": {LAMB + COMPILED: Goal(ADAMW, slower=1.6), FLAMBE + COMPILED: Goal(LAMB + COMPILED, slower=1.05)},
}
# Where other packages keep theirs, what it takes to compare like with like (no clipping inside of the step), and
# whether it is for GPUs only.
PUBLIC_LAMBS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "pytorch_optimizer": ("pytorch_optimizer", "Lamb", {}, False),
    "timm": ("benchmarks.peers.timm_lamb", "Lamb", {"max_grad_norm": None}, False),
    "deepspeed": ("deepspeed.ops.lamb", "FusedLamb", {}, True),
    "apex": ("apex.optimizers", "FusedLAMB", {"max_grad_norm": 0.0}, True),
}
# Bytes an element, in float32. AdamW reads parameter, gradient and moments and writes all but the gradient; LAMB knows
# its rate only when it has seen a whole tensor: it writes the update, and reads that and the parameter once more.
ADAMW_BYTES, LAMB_BYTES = 28, 40
TOLERANCE = 1e-4  # of the way that a tensor goes in two steps, in float32

Model = tuple[nn.Module, list[Product]]
Groups = list[dict[str, Any]]


def bert(options: Options) -> Model:
    """A BERT with random gradients, and the products that FLAMBe decays."""
    tiny = {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 52, "vocab_size": 101}
    sizes: dict[str, int] = options.pick(
        full={}, quick={"num_hidden_layers": 2, "vocab_size": 5000}, tiny={"num_hidden_layers": 1, **tiny}
    )
    return _with_gradients(BertForPreTraining(BertConfig(**sizes)), ["ov"], options)


def _with_gradients(model: nn.Module, kinds: Sequence[str], options: Options) -> Model:
    torch.manual_seed(0)
    model.to(options.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model, find_products(model, kinds)


def groups_of(model: nn.Module, products: Sequence[Product], lr: float = 1e-7) -> Groups:
    """Decay on matrices, none on vectors. At the default rate many steps leave the tensors what they are."""
    return [{**group, "lr": lr} for group in parameter_groups(model, weight_decay=0.01, products=products)]


def ours(options: Options, model: nn.Module, products: Sequence[Product], lr: float = 1e-7) -> dict[str, Optimizer]:
    """Our optimizers; on a GPU also compiled."""
    found: dict[str, Optimizer] = {}
    for ending, compiled in {"": False, **({COMPILED: True} if options.on_gpu else {})}.items():
        found[LAMB + ending] = Lamb(groups_of(model, products, lr), compiled=compiled)
        found[FLAMBE + ending] = FLAMBe(groups_of(model, products, lr), products=products, compiled=compiled)
    return found


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` if one of our optimizers does not arrive where its oracle does, in float64."""
    for name in ours(options, *bert(options)):
        model, products = bert(options)
        start = copy.deepcopy(model).double()
        gradients = {path: p.grad.double() for path, p in model.named_parameters() if p.grad is not None}
        exact = groups_of(start, products, lr=1e-2)
        oracle = ReferenceFLAMBe(exact, products) if name.startswith(FLAMBE) else ReferenceLamb(exact)
        optimizer = ours(options, model, products, lr=1e-2)[name]
        for _ in range(2):
            optimizer.step()
            oracle.step(gradients)
        for path, parameter in model.named_parameters():
            target = oracle.parameters[path]
            error = (parameter - target).norm() / (target - start.get_parameter(path)).norm()
            if not error < TOLERANCE:
                raise RuntimeError(f"{name} is {error:.1e} of its way beside its oracle at {path}; nothing was timed")


def peers(options: Options, groups: Callable[[], Groups]) -> tuple[dict[str, Optimizer], dict[str, str]]:
    """The optimizers of others; and why those are missing that are."""
    found: dict[str, Optimizer] = {"torch AdamW (foreach)": torch.optim.AdamW(groups(), foreach=True)}
    missing = {}
    for package, (module, name, extra, gpu_only) in PUBLIC_LAMBS.items():
        if gpu_only and not options.on_gpu:
            missing[f"{package} {name}"] = "it is for GPUs only"
            continue
        try:
            optimizer = getattr(importlib.import_module(module), name)(groups(), **extra)
            optimizer.step()
            found[f"{package} {metadata.version(package)} {name}"] = optimizer
        except Exception as error:  # whatever a package that was built for something else may raise
            missing[f"{package} {name}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def measure(options: Options) -> Iterator[Row]:
    """A step of every optimizer, in turns."""
    model, products = bert(options)
    adamw = torch.optim.AdamW(groups_of(model, products), fused=True)
    mine = ours(options, model, products)
    others, missing = peers(options, lambda: groups_of(model, products))
    numel = sum(parameter.numel() for parameter in model.parameters())
    workload = f"step over {numel / 1e6:.3g} million parameters, {len(products)} ov products"
    flops = count_flops(mine[FLAMBE].step)
    limits = {name: _limit(options, numel, flops if name.startswith(FLAMBE) else 0) for name in mine}
    cases: dict[str, Case] = {name: each.step for name, each in {ADAMW: adamw, **mine, **others}.items()}
    facts = {name: {"decay_gflop": flops / 1e9} for name in mine if name.startswith(FLAMBE)}
    rounds = options.pick(full=25, quick=9, tiny=3)
    goals = {case: goal for case, goal in GOALS[options.device].items() if {case, goal.against} <= cases.keys()}
    comparison = Comparison(workload, cases, ADAMW, limits, goals, facts)
    yield from comparison.measure(options.device, rounds=rounds)
    for name, reason in missing.items():
        yield {"workload": workload, "case": name, "not_measured": reason}


def least_seconds(options: Options, numel: int, flops: int = 0) -> float:
    """What a step of LAMB takes at least, by its bytes and by the operations of its decay."""
    return LAMB_BYTES * numel / copy_rate(options.device) + flops / matrix_rate(options.device)


def _limit(options: Options, numel: int, flops: int) -> float:
    """How many times as fast as AdamW it can be, if both reach their limits."""
    return ADAMW_BYTES * numel / copy_rate(options.device) / least_seconds(options, numel, flops)


THEME = Theme("optimizer", check, measure)
