"""One optimizer step on the tensors of BERT-base: LAMB and FLAMBe against torch's AdamW and the public LAMBs.

python -m benchmarks.optimizer [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from benchmarks.common import interleave, write
from tests.reference.flambe import ReferenceFLAMBe
from tests.reference.lamb import ReferenceLamb
from torch import nn
from transformers import BertConfig, BertForPreTraining

from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.products import Product, find_products

ADAMW, LAMB, FLAMBE = "torch AdamW (fused)", "hf_fnl Lamb", "hf_fnl FLAMBe (ov)"
# Against which optimizer, and by how much at most: Sec. 8 of the design.
GOALS = {"cpu": {LAMB: (ADAMW, 1.8), FLAMBE: (LAMB, 1.15)}, "cuda": {LAMB: (ADAMW, 1.6), FLAMBE: (LAMB, 1.05)}}
LR = 1e-6  # many steps along one gradient leave the tensors what they are
TOLERANCE = 1e-4  # of an update, in float32

Groups = list[dict[str, Any]]


def workload(quick: bool, device: str) -> tuple[nn.Module, list[Product]]:
    """A BERT with random gradients, and the products that FLAMBe decays."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 5000} if quick else {}
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(**sizes)).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model, find_products(model, ["ov"])


def named_groups(model: nn.Module, products: Sequence[Product]) -> Groups:
    """Decay on matrices, none on vectors."""
    return [{"lr": LR, **group} for group in parameter_groups(model, weight_decay=0.01, products=products)]


def check(quick: bool, device: str) -> None:
    """Raise a ``RuntimeError`` unless two steps of our optimizers arrive where their oracles do."""
    for name in (LAMB, FLAMBE):
        model, products = workload(quick, device)
        groups = named_groups(model, products)
        start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if name == LAMB:
            oracle, optimizer = ReferenceLamb(groups), Lamb(groups)
        else:
            oracle, optimizer = ReferenceFLAMBe(groups, products), FLAMBe(groups, products=products)


