"""Training steps and inference of low-rank convolutional networks, against dense ones and TensorLy-Torch's layers.

All low-rank networks keep 10 % of the parameters of the dense one; the limit is by operations. They run in
channels-last, and are compared with the dense network in that layout, the faster of its two. A training step ends with
that of SGD with momentum.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness.limits import count_flops
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Comparison, Goal, Row
from hf_fnl import FactorizationConfig, factorize_, merge_
from hf_fnl.surgery.config import CONV_SCHEMES, TENSOR_SCHEMES
from hf_fnl.vision.models import inner_convolutions, vision_model

DENSE, CLASSES, RATIO = "dense", 10, 0.1
IMPLEMENTATIONS = ("factorized", "reconstructed")  # of TensorLy-Torch
SCHEMES = (*CONV_SCHEMES, *TENSOR_SCHEMES)
PRECISIONS = {"float32": False, "bfloat16": True}  # with autocast or without
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
REFERENCE = f"{DENSE}, channels last"
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


def names(options: Options) -> tuple[str, ...]:
    """The networks."""
    full = ("resnet32x2", "vgg19", "wrn28-10") if options.on_gpu else ("resnet32x2", "vgg19")
    return options.pick(full=full, quick=("resnet32x2",), tiny=("resnet20",))


def dense_model(name: str) -> PreTrainedModel:
    """The network that the others are made from."""
    torch.manual_seed(0)
    return vision_model(name, num_labels=CLASSES)


def variants(name: str, schemes: tuple[str, ...] = SCHEMES) -> dict[str, PreTrainedModel]:
    """The dense network, and ours of all schemes."""
    dense = dense_model(name)
    return {DENSE: dense, **{scheme: low_rank(dense, scheme) for scheme in schemes}}


def peers(models: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    """Networks with TensorLy-Torch's layers.

    Raises:
        ImportError: If it is not installed.
    """
    from benchmarks.peers.tensorly_torch import with_tensorly_torch

    return {
        f"tltorch {scheme}, {implementation}": with_tensorly_torch(models[scheme], implementation)
        for scheme in TENSOR_SCHEMES
        if scheme in models
        for implementation in IMPLEMENTATIONS
    }


def low_rank(dense: PreTrainedModel, scheme: str, ratio: float = RATIO) -> PreTrainedModel:
    """A copy that keeps this share of the parameters."""
    model = copy.deepcopy(dense)
    config = FactorizationConfig(
        kinds=("conv",), include=inner_convolutions(model), ratio=ratio, conv_scheme=scheme, init="default"
    )
    factorize_(model, config)
    return model


@torch.no_grad()
def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless every network of ours computes what the dense one does that it merges to."""
    images = torch.randn(2, 3, 32, 32)
    for name in names(options):
        for scheme, model in variants(name, _schemes(options)).items():
            if scheme == DENSE:
                continue
            merged = copy.deepcopy(model)
            merge_(merged)
            actual, expected = (each.eval()(pixel_values=images).logits for each in (model, merged))
            error = ((actual - expected).abs().max() / expected.abs().max()).item()
            if not error < TOLERANCE:
                raise RuntimeError(f"{name} {scheme}: {error:.1e} from the merged network; nothing was timed")


def _schemes(options: Options) -> tuple[str, ...]:
    return options.pick(full=SCHEMES, quick=SCHEMES, tiny=("spatial",))


def networks(models: dict[str, PreTrainedModel], precision: str, options: Options) -> dict[str, Network]:
    """Every variant in channels-last, the dense one in both layouts, on a batch that is the same for all."""
    batch, device = options.pick(full=128 if options.on_gpu else 32, quick=8, tiny=2), options.device
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
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
        if variant == DENSE or memory_format is torch.channels_last
    }


def peak_memory(network: Network) -> int:
    """Bytes at the peak of a training step that is not the first: parameters, momenta, gradients, activations."""
    network.train()
    network.optimizer.zero_grad()
    momenta = [state["momentum_buffer"] for state in network.optimizer.state.values()]
    return peak_bytes(network.train, [*network.model.parameters(), *momenta])


def measure(options: Options) -> Iterator[Row]:
    """Rows of every network and precision: training with its peak memory, then inference."""
    precisions = options.pick(full=tuple(PRECISIONS), quick=("float32",), tiny=("float32",))
    for name in names(options):
        models = variants(name, _schemes(options))
        try:
            models |= peers(models)
        except ImportError as reason:
            yield {"workload": f"{name}, training", "case": "tltorch", "not_measured": str(reason)}
        for precision in precisions:
            yield from measure_network(f"{name}, {precision}", networks(models, precision, options), options)


def measure_network(name: str, cases: dict[str, Network], options: Options) -> Iterator[Row]:
    """Rows of a network in a precision."""
    rounds = options.pick(full=7, quick=3, tiny=2)
    flops = {case: count_flops(network.train) for case, network in cases.items()}
    peak = {case: peak_memory(network) for case, network in cases.items()}
    ours = [case for case, network in cases.items() if network.variant.partition(",")[0] in SCHEMES]
    limits = {case: flops[REFERENCE] / flops[case] for case in ours}
    training = Comparison(
        f"{name}, training",
        {case: network.train for case, network in cases.items()},
        REFERENCE,
        limits,
        {case: Goal(REFERENCE, faster=SPEEDUP_GOAL) for case in ours},
        {
            case: {
                "parameters": sum(parameter.numel() for parameter in network.model.parameters()),
                "peak_megabytes": peak[case] / 2**20,
                "memory_ratio": peak[case] / peak[REFERENCE],
            }
            for case, network in cases.items()
        },
    )
    yield from training.measure(options.device, rounds=rounds)
    inference = {case: network.infer for case, network in cases.items()}
    yield from Comparison(f"{name}, inference", inference, REFERENCE, limits).measure(options.device, rounds=rounds)


THEME = Theme("vision", check, measure)
