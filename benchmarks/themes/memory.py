"""Bytes at the peak of training steps: factorized against dense at every rank, and activation checkpointing.

The step is forward, backward and update with AdamW (SGD with momentum for images), not the first one: weights, moments,
gradients and activations. With fewer parameters than the dense model it is to need less memory, at every rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Comparison, Row
from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.vision.models import inner_convolutions, vision_model

RANK_SCALES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)  # of the full rank
CHECKPOINTING: dict[str, dict[str, Any] | None] = {
    "nothing computed again": None,
    "all computed again": {"use_reentrant": False},
}
NOTHING = next(iter(CHECKPOINTING))
DENSE = "dense"

Batch = dict[str, torch.Tensor]


def bert(options: Options) -> tuple[PreTrainedModel, Batch]:
    """A few layers of BERT's width."""
    sizes = _sizes(options)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["width"],
    )
    return _seeded(BertForMaskedLM, config), _text(options)


def gpt2(options: Options) -> tuple[PreTrainedModel, Batch]:
    """A few layers of GPT-2's width."""
    sizes = _sizes(options)
    config = GPT2Config(
        vocab_size=1000,
        n_embd=sizes["width"],
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _seeded(GPT2LMHeadModel, config), _text(options)


def images(name: str, options: Options) -> tuple[PreTrainedModel, Batch]:
    """A convolutional network with images."""
    torch.manual_seed(0)
    model = vision_model(name, num_labels=10, width=options.pick(full=None, quick=None, tiny=4))
    count = options.pick(full=32, quick=8, tiny=2)
    return model, {"pixel_values": torch.randn(count, 3, 32, 32), "labels": torch.randint(10, (count,))}


def workloads(
    options: Options,
) -> dict[str, tuple[Callable[[Options], tuple[PreTrainedModel, Batch]], tuple[str, ...]]]:
    """Models by name, with the schemes of their factors."""
    resnet = options.pick(full="resnet32x2", quick="resnet20", tiny="resnet20")
    schemes = options.pick(full=("spatial", "channel", "tt", "tucker"), quick=("spatial", "channel"), tiny=("spatial",))
    found: dict[str, Any] = {"BERT": (bert, ("linear",)), "GPT-2": (gpt2, ("linear",))}
    found[resnet] = partial(images, resnet), schemes
    if options.size == "full":
        found["vgg19"] = partial(images, "vgg19"), schemes[:1]
    return found


def _sizes(options: Options) -> dict[str, int]:
    full = {"width": 768, "heads": 12, "layers": 12 if options.on_gpu else 2, "batch": 8, "length": 128}
    return options.pick(
        full=full,
        quick={"width": 256, "heads": 4, "layers": 2, "batch": 4, "length": 64},
        tiny={"width": 24, "heads": 2, "layers": 1, "batch": 2, "length": 8},
    )


def _seeded(model_class: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config)
    return model


def _text(options: Options) -> Batch:
    sizes = _sizes(options)
    ids = torch.randint(1, 1000, (sizes["batch"], sizes["length"]))
    return {"input_ids": ids, "labels": ids}


def factorized(dense: PreTrainedModel, scheme: str, rank_scale: float) -> PreTrainedModel:
    """A copy whose linear layers, or inner convolutions, have this share of their full ranks."""
    model = copy.deepcopy(dense)
    rule: dict[str, Any] = {"rank_scale": rank_scale, "init": "default"}
    if scheme == "linear":
        config = FactorizationConfig(kinds=("linear",), **rule)
    else:
        layers = inner_convolutions(model)
        config = FactorizationConfig(kinds=("conv",), include=layers, conv_scheme=scheme, **rule)
    factorize_(model, config)
    return model


class Step:
    """A training step of a model that lies on a device.

    Args:
        model: Trained as it is.
        batch: The same in every step.
        device: Where.
    """

    def __init__(self, model: nn.Module, batch: Batch, device: str) -> None:
        layout = torch.channels_last if "pixel_values" in batch else torch.preserve_format
        self.model = model.to(device).to(memory_format=layout).train()
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        parameters = self.model.parameters()
        text = "input_ids" in batch
        self.optimizer = torch.optim.AdamW(parameters, 1e-6) if text else torch.optim.SGD(parameters, 1e-6, 0.9)

    def __call__(self) -> torch.Tensor:
        """Forward, backward and update."""
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def peak(self) -> int:
        """Bytes at the peak of a step that is not the first."""
        self()
        self.optimizer.zero_grad()
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        present = [*self.model.parameters(), *self.model.buffers(), *filter(torch.is_tensor, moments)]
        return peak_bytes(self, [tensor for tensor in present if tensor.numel()])


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless checkpointing leaves loss and gradients what they are, with dropout."""
    for name, build in {"BERT": bert, "GPT-2": gpt2}.items():
        dense, batch = build(dataclasses.replace(options, size="tiny"))
        model = factorized(dense, "linear", 0.25)
        found = []
        for way in CHECKPOINTING.values():
            step = Step(_with_checkpointing(model, way), batch, options.device)
            torch.manual_seed(1)
            step.model.zero_grad()
            step.model(**step.batch).loss.backward()
            found.append([parameter.grad for parameter in step.model.parameters()])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=0, msg=f"{name}: checkpointing changes gradients")


def _with_checkpointing(model: PreTrainedModel, options: dict[str, Any] | None) -> PreTrainedModel:
    model = copy.deepcopy(model)
    if options is not None:
        # Its name before Transformers 5.2x, and now.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    return model


def measure(options: Options) -> Iterator[Row]:
    """Rows of every model over ranks, then of checkpointing."""
    for name, (build, schemes) in workloads(options).items():
        dense, batch = build(options)
        reference = Step(copy.deepcopy(dense), batch, options.device).peak()
        yield _row(name, DENSE, dense, reference, None)
        for scheme in schemes:
            for scale in options.pick(full=RANK_SCALES, quick=RANK_SCALES, tiny=(0.1, 0.5)):
                model = factorized(dense, scheme, scale)
                peak = Step(model, batch, options.device).peak()
                yield _row(name, f"{scheme}, rank {scale:g} of the full one", model, peak, (dense, reference))
    for name, build in {"BERT": bert, "GPT-2": gpt2}.items():
        yield from measure_checkpointing(name, build, options)


def _row(name: str, case: str, model: nn.Module, peak: int, dense: tuple[nn.Module, int] | None) -> Row:
    row: Row = {"workload": f"{name}, peak", "case": case, "parameters": _count(model), "megabytes": peak / 2**20}
    if dense is None:
        return row
    fewer = _count(model) < _count(dense[0])
    goal = {"goal": f"less than {DENSE}", "reached": peak < dense[1]} if fewer else {}
    return row | {"memory_ratio": peak / dense[1], "parameter_ratio": _count(model) / _count(dense[0]), **goal}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure_checkpointing(
    name: str, build: Callable[[Options], tuple[PreTrainedModel, Batch]], options: Options
) -> Any:
    """Rows of the ways to compute again: their time, and their bytes at the peak."""
    dense, batch = build(options)
    model = factorized(dense, "linear", 0.25)
    steps = {key: Step(_with_checkpointing(model, way), batch, options.device) for key, way in CHECKPOINTING.items()}
    facts = {key: {"megabytes": step.peak() / 2**20} for key, step in steps.items()}
    for key in facts:
        facts[key]["memory_ratio"] = facts[key]["megabytes"] / facts[NOTHING]["megabytes"]
    comparison = Comparison(f"{name}, checkpointing, a quarter of the full rank", dict(steps), NOTHING, {}, {}, facts)
    return comparison.measure(options.device, rounds=options.pick(full=9, quick=5, tiny=2))


THEME = Theme("memory", check, measure)
