"""Evaluate networks on the straight line between a dense baseline and low-rank runs (Kamalakara et al. 2022, Sec. 4.3).

hf-fnl interpolate --baseline runs/dense --low_rank runs/low runs/dense_first --batch_norm_images 2000
hf-fnl interpolate --baseline runs/gpt2-dense --low_rank runs/gpt2 --eval_dataset valid.txt
hf-fnl report runs/low runs/dense_first --out line.html   # draws what the first command wrote
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.surgery_loading import load
from hf_fnl.scripts.train_clm import DataOptions, block_sizes, held_out_blocks
from hf_fnl.surgery import merge_
from hf_fnl.tasks.metrics.accuracy import image_sums
from hf_fnl.tasks.metrics.tokens import causal_sums, perplexity
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training.command_line import check_at_least, named, parse_arguments, progress
from hf_fnl.utils.files import write_json
from hf_fnl.utils.run_files import CONFIG_FILE, read_json
from hf_fnl.vision.image_batches import ImageOptions, load_image_sets, single_batch
from hf_fnl.vision.interpolation import INTERPOLATION_FILE, loss_along_line
from hf_fnl.vision.transforms import BatchTransform

Evaluate = Callable[[nn.Module], dict[str, float]]
Options = TypeVar("Options")


@dataclass
class LineOptions:
    """The two ends of each line, and on what to evaluate. Data are those of the baseline's run unless given."""

    baseline: str = field(metadata={"help": "Folder of a dense run: an image classifier or a causal language model."})
    low_rank: list[str] = field(
        metadata={"help": "Folders of low-rank runs of the same network; each gets its own line."}
    )
    steps: int = field(default=11, metadata={"help": "Points of a line, both ends among them."})
    dataset: str | None = field(default=None, metadata={"help": "Training images, for their mean and deviation."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Images or text to evaluate on."})
    eval_limit: int | None = field(default=None, metadata={"help": "Images or documents to evaluate on at most."})
    batch_size: int | None = field(default=None, metadata={"help": "Default: 256 images, 8 blocks of text."})
    batch_norm_images: int = field(
        default=0,
        metadata={
            "help": "Estimate BatchNorm's statistics anew at every point, from so many training images (recommended: "
            "2000). 0: interpolate them like the weights."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave an accelerator alone."})

    def __post_init__(self) -> None:
        if self.batch_norm_images < 0:
            raise ValueError(f"batch_norm_images must not be negative, got {self.batch_norm_images}")
        check_at_least(1, self, "eval_limit", "batch_size")
        check_at_least(2, self, "steps")

    def recorded(self, options: type[Options], **given: Any) -> Options:
        """The options of the baseline's run, with those that are given in their place."""
        settings = read_json(Path(self.baseline) / CONFIG_FILE)
        if not settings:
            raise FileNotFoundError(f"baseline {self.baseline} holds no {CONFIG_FILE}: name the folder of a run")
        names = {each.name for each in dataclasses.fields(options)}  # type: ignore[arg-type]
        changed = {name: value for name, value in given.items() if value is not None}
        return options(**{name: value for name, value in (settings | changed).items() if name in names})


def multiplied_out(model: PreTrainedModel) -> PreTrainedModel:
    """The plain network that a model computes."""
    if isinstance(model, FactorizedPreTrainedModel):
        return model.merge()
    if any(isinstance(module, Factorized) for module in model.modules()):
        merge_(model)
    return model


def read_network(option: str, folder: str) -> PreTrainedModel:
    """The plain network that the model of a run computes."""
    with named(option, folder):
        return multiplied_out(load(folder))


def image_evaluation(options: LineOptions, device: torch.device) -> tuple[Evaluate, list[Tensor] | None]:
    """Loss and accuracy of a classifier, and the images for its BatchNorm, if they are wanted."""
    data = options.recorded(
        ImageOptions, dataset=options.dataset, eval_dataset=options.eval_dataset, max_eval_images=options.eval_limit
    )
    training, evaluation = load_image_sets(data)
    transform = BatchTransform(*training.statistics()).to(device)

    def batches(images: Any) -> Iterator[dict[str, Tensor]]:
        for batch in DataLoader(images, batch_size=options.batch_size or 256, collate_fn=single_batch):
            pixels = transform(batch["pixel_values"].to(device), training=False)
            yield {"pixel_values": pixels, "labels": batch["labels"].to(device)}

    def evaluate(model: nn.Module) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches(evaluation):
            outputs = model(batch["pixel_values"])
            sums += image_sums(outputs.logits, batch["labels"])[:, :2].double().sum(0).cpu()
        loss, accuracy = (sums / len(evaluation)).tolist()
        return {"loss": loss, "accuracy": accuracy}

    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[: options.batch_norm_images]
    return evaluate, [batch["pixel_values"] for batch in batches(Subset(training, chosen.tolist()))] or None


def text_evaluation(options: LineOptions, model: PreTrainedModel) -> Evaluate:
    """Loss and perplexity of a causal language model, per token of the whole text."""
    data = options.recorded(
        DataOptions, validation_dataset=options.eval_dataset, max_validation_documents=options.eval_limit
    )
    _, block_size = block_sizes(data, model.config.max_position_embeddings, is_fresh=False)
    if (blocks := held_out_blocks(data, load_tokenizer(options.baseline), block_size)) is None:
        raise ValueError(f"baseline {options.baseline} was trained without validation_dataset: set eval_dataset")

    def evaluate(model: nn.Module) -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in DataLoader(blocks, batch_size=options.batch_size or 8):
            ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))
            sums += causal_sums(model(input_ids=ids).logits, labels).sum(0)[:2].cpu()
        loss = float(sums[0] / sums[1])
        return {"loss": loss, "perplexity": perplexity(loss)}

    return evaluate


def evaluation(
    options: LineOptions, baseline: PreTrainedModel, device: torch.device
) -> tuple[Evaluate, list[Tensor] | None]:
    """How networks like the baseline are evaluated, and the images for their BatchNorm."""
    if baseline.main_input_name == "pixel_values":
        return image_evaluation(options, device)
    if not baseline.can_generate() or baseline.config.is_encoder_decoder:
        raise ValueError(
            "lines are drawn between image classifiers or causal language models; "
            f"baseline {options.baseline} is a {type(baseline).__name__}"
        )
    if options.batch_norm_images:
        raise ValueError(f"a {type(baseline).__name__} has no BatchNorm: leave out batch_norm_images")
    return text_evaluation(options, baseline), None


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Parse, build, run; returns the points of each line."""
    (options,) = parse_arguments(argv, LineOptions, description=__doc__)
    device = PartialState(cpu=options.use_cpu).device
    for option, folder in (("baseline", options.baseline), *(("low_rank", folder) for folder in options.low_rank)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--{option} {folder}: there is no such folder")
    baseline = read_network("baseline", options.baseline).to(device)
    evaluate, batches = evaluation(options, baseline, device)
    arguments = sys.argv[1:] if argv is None else argv
    lines = {}
    for number, run in enumerate(options.low_rank, start=1):
        network = read_network("low_rank", run).to(device)
        with progress(f"line {number} of {len(options.low_rank)}", options.steps) as bar:

            def counted(model: nn.Module, bar: Any = bar) -> dict[str, float]:
                figures = evaluate(model)
                bar.update()
                return figures

            lines[run] = loss_along_line(baseline, network, counted, steps=options.steps, batches=batches)
        record = {
            "points": lines[run],
            "baseline": options.baseline,
            "batch_norm_images": options.batch_norm_images,
            "command": shlex.join(["hf-fnl", "interpolate", *arguments]),
        }
        print(f"wrote {write_json(Path(run) / INTERPOLATION_FILE, record)}")
    print(f"next: hf-fnl report {shlex.join(options.low_rank)} --out line.html")
    return lines
