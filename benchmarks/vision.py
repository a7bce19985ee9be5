"""Training steps and inference of low-rank convolutional networks, against dense ones and TensorLy-Torch's layers.

All low-rank networks keep 10 % of the parameters of the dense one. Speed is measured against the dense network in the
layout in which that is faster, and in the same precision. A training step ends with that of SGD with momentum.

python -m benchmarks.vision [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.common import interleave, parse, write
from benchmarks.memory import peak_bytes
from benchmarks.tensorly_torch import IMPLEMENTATIONS, with_tensorly_torch
from hf_fnl import FactorizationConfig, factorize_, merge_
from hf_fnl.config import CONV_SCHEMES, TENSOR_SCHEMES
from hf_fnl.models.vision import inner_convolutions, vision_model
from hf_fnl.surgery import share_of_layers

NETWORKS = {"cpu": ("resnet32x2", "vgg19"), "cuda": ("resnet32x2", "vgg19", "wrn28-10")}
BATCH = {"cpu": 32, "cuda": 128}
DENSE, CLASSES, RATIO = "dense", 10, 0.1
SCHEMES = (*CONV_SCHEMES, *TENSOR_SCHEMES)
PRECISIONS = {"float32": False, "bfloat16": True}  # with autocast or without
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
WARMUP = 1
SPEEDUP_GOAL = 2.0  # Khodak et al. 2021, Sec. 4: almost half the time
TOLERANCE = 1e-3  # of the largest logit, through 32 layers of float32 without running statistics


@dataclass
class Network:
    """A network in a layout and a precision, with its batch and its optimizer."""

    variant: str
    layout: str
    precision: str
    model: PreTrainedModel
    images: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # With a rate this small, many steps on one batch leave the network what it is.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=PRECISIONS[self.precision])

    def train(self) -> None:
        """One step: forward, backward, update."""
        self.model.train()
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.model(pixel_values=self.images, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """The logits of the batch."""
        self.model.eval()
        with self._autocast():
            return self.model(pixel_values=self.images).logits


def variants(name: str) -> dict[str, PreTrainedModel]:
    """The dense network, ours of all schemes, and those with TensorLy-Torch's layers."""
    torch.manual_seed(0)
    models = {DENSE: vision_model(name, num_labels=CLASSES)}
    for scheme in SCHEMES:
        models[scheme] = low_rank(models[DENSE], scheme)
    for scheme in TENSOR_SCHEMES:
        for implementation in IMPLEMENTATIONS:
            models[f"tltorch {scheme}, {implementation}"] = with_tensorly_torch(models[scheme], implementation)
    return models


def low_rank(dense: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """A copy that keeps ``RATIO`` of the parameters."""
    model = copy.deepcopy(dense)
    config = FactorizationConfig(
        kinds=("conv",), include=inner_convolutions(model), ratio=RATIO, conv_scheme=scheme, init="default"
    )
    factorize_(model, share_of_layers(model, config))
    return model


@torch.no_grad()
def check_merged(models: dict[str, PreTrainedModel]) -> None:
    """Raise a ``RuntimeError`` unless every network of ours computes what the dense one does that it merges to."""
    images = torch.randn(2, 3, 32, 32)
    for scheme in SCHEMES:
        merged = copy.deepcopy(models[scheme])
        merge_(merged)
        actual, expected = (model.eval()(pixel_values=images).logits for model in (models[scheme], merged))
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"{scheme}: {error:.1e} from the merged network; nothing was timed")


def networks(models: dict[str, PreTrainedModel], precision: str, device: str) -> dict[str, Network]:
    """Every variant in every layout, on a batch that is the same for all."""
    images = torch.randn(BATCH[device], 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (BATCH[device],), device=device)
    return {
        f"{variant}, {layout}": Network(
            variant,
            layout,
            precision,
            copy.deepcopy(model).to(device, memory_format=memory_format),
            images.to(memory_format=memory_format),
            labels,
        )
        for variant, model in models.items()
        for layout, memory_format in LAYOUTS.items()
    }


def count_flops(network: Network) -> int:
    """Floating-point operations of the convolutions and matrix products in a training step."""
    with FlopCounterMode(display=False) as counter:
        network.train()
    return counter.get_total_flops()


def saved_memory(network: Network) -> int:
    """Bytes that are kept for the backward pass, besides the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.train()
    return sum(kept.values())


def peak_memory(network: Network) -> int:
    """Bytes at the peak of a training step that is not the first: parameters, momenta, gradients, activations."""
    network.optimizer.zero_grad()
    momenta = [state["momentum_buffer"] for state in network.optimizer.state.values()]
    return peak_bytes(network.train, [*network.model.parameters(), *momenta])


def measure(
    name: str, models: dict[str, PreTrainedModel], precision: str, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Rows of a network in a precision: operations, memory, and seconds side by side."""
    cases = networks(models, precision, device)
    flops = {case: count_flops(network) for case, network in cases.items()}
    saved = {case: saved_memory(network) for case, network in cases.items()}
    peak = {case: peak_memory(network) for case, network in cases.items()}
    training = interleave({case: network.train for case, network in cases.items()}, rounds, WARMUP)
    inference = interleave({case: network.infer for case, network in cases.items()}, rounds, WARMUP)
    least = min(peak[case] for case, network in cases.items() if network.variant == DENSE)
    return [
        {
            "network": name,
            "precision": precision,
            "variant": network.variant,
            "layout": network.layout,
            "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
            "fewer_flops": flops[f"{DENSE}, {network.layout}"] / flops[case],
            "training_seconds": median(training[case]),
            "training_speedup": speedup(training, case),
            "training_goal": SPEEDUP_GOAL if network.variant in SCHEMES else None,
            "inference_seconds": median(inference[case]),
            "inference_speedup": speedup(inference, case),
            "saved_megabytes": saved[case] / 2**20,
            "peak_megabytes": peak[case] / 2**20,
            "memory_ratio": peak[case] / least,
        }
        for case, network in cases.items()
    ]


def speedup(seconds: dict[str, list[float]], case: str) -> float:
    """Median over the rounds of how often a case fits into the time of the faster dense one."""
    dense = min((seconds[f"{DENSE}, {layout}"] for layout in LAYOUTS), key=median)
    return median(theirs / ours for theirs, ours in zip(dense, seconds[case], strict=True))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, check, measure, write; returns the rows."""
    args = parse("vision", __doc__, "resnet32x2 in float32, three rounds", argv)
    names, precisions, rounds = NETWORKS[args.device], list(PRECISIONS), 7
    if args.quick:
        names, precisions, rounds = names[:1], precisions[:1], 3
    rows = []
    for name in names:
        models = variants(name)
        check_merged(models)
        for precision in precisions:
            rows += measure(name, models, precision, rounds, args.device)
    write("vision", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
