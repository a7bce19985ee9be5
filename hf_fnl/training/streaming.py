"""Streams: iterable data sets of ``datasets`` whose shards the processes share, and that go on where a run stopped."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_torchdata_stateful_dataloader_available
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.utils.processes import raise_on_all

logger = logging.getLogger(__name__)

EXTRA = "pip install 'hf_fnl[streaming]'"


def is_stream(dataset: object) -> bool:
    """Whether a data set is an iterable one of ``datasets``."""
    import datasets  # which importing this package does not wait for

    return isinstance(dataset, datasets.IterableDataset)


def stream_loader(dataset: Any, collate: Any, args: TrainingArguments) -> DataLoader:
    """Return the batches of this process, without end; all processes call this together.

    Each process reads shards of its own, where there are as many, or passes over the examples of the others. It begins
    again when it has read them all, so that none waits for another. torchdata's loader knows where it is; where that is
    not installed, a run that is resumed reads up to there.

    Args:
        dataset: The stream of all processes.
        collate: Makes a batch of examples.
        args: Batch size, processes and workers.

    Raises:
        ValueError: If there is no example for a process.
    """
    from datasets.distributed import split_dataset_by_node

    rank, world = args.process_index, args.world_size
    has_shards = dataset.num_shards >= world
    own = dataset.shard(world, rank) if has_shards else split_dataset_by_node(dataset, rank, world)
    raise_on_all(lambda: _check_not_empty(own, rank))
    options: dict[str, Any] = {"num_workers": min(args.dataloader_num_workers, own.num_shards)}
    if options["num_workers"]:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
        options["multiprocessing_context"] = args.dataloader_multiprocessing_context
    make: type[DataLoader] = DataLoader
    if is_torchdata_stateful_dataloader_available():
        from torchdata.stateful_dataloader import StatefulDataLoader

        make = StatefulDataLoader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it, torch 2.13 warns
        return make(
            own.repeat(None),
            batch_size=args.train_batch_size,
            collate_fn=collate,
            pin_memory=args.dataloader_pin_memory,
            # Of its own, or a loader would draw from torch's generator, and a resumed run's dropout would differ.
            generator=torch.Generator(),
            **options,
        )


def _check_not_empty(own: Any, rank: int) -> None:
    if next(iter(own), None) is None:
        raise ValueError(f"there is no example in the stream for process {rank}: give more data")


class StreamPosition(TrainerCallback):
    """Writes into each checkpoint where the streams of the processes stood, and lets them go on from there."""

    def __init__(self) -> None:
        self._found: dict[str, Any] | None = None

    def take(self, checkpoint: str | Path, args: TrainingArguments) -> None:
        """Read where this process stood, before the Trainer looks at how many batches it is to skip.

        Where that is not known, or the processes or workers are others, the Trainer passes over as many batches as were
        trained on; with ``ignore_data_skip`` the stream begins at its beginning.
        """
        path = _file(checkpoint, args)
        if args.ignore_data_skip or not path.is_file():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        if not is_torchdata_stateful_dataloader_available():
            logger.warning("without torchdata the stream is read up to where %s stood: %s", checkpoint, EXTRA)
        elif found["readers"] != _readers(args):
            logger.warning(
                "%s was written by %s and this run has %s: its stream is read up to this step, so that some documents "
                "may be read twice and others not",
                checkpoint,
                found["readers"],
                _readers(args),
            )
        else:
            self._found, args.ignore_data_skip = found["state"], True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the loader to where it stood."""
        if self._found is not None:
            kwargs["train_dataloader"].load_state_dict(self._found)
            self._found, args.ignore_data_skip = None, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count epochs over the whole run; a Trainer counts them from where a stream was resumed."""
        if is_stream(getattr(kwargs["train_dataloader"], "dataset", None)):
            state.epoch = state.global_step / state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write where this process stands."""
        loader = kwargs["train_dataloader"]
        if is_stream(getattr(loader, "dataset", None)) and hasattr(loader, "state_dict"):
            found = {"readers": _readers(args), "state": loader.state_dict()}
            path = _file(Path(args.output_dir) / f"checkpoint-{state.global_step}", args)
            # All have written before the next callback lists the files of the checkpoint.
            raise_on_all(lambda: path.parent.is_dir() and path.write_text(json.dumps(found), encoding="utf-8"))


def _file(checkpoint: str | Path, args: TrainingArguments) -> Path:
    return Path(checkpoint) / f"stream-{args.process_index}.json"


def _readers(args: TrainingArguments) -> str:
    return f"{args.world_size} processes with {args.dataloader_num_workers} workers"
