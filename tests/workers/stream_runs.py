"""Worker of two processes that stream: a run undisturbed, one that stops and goes on, and files that one lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_fnl.utils.processes import leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from stream_cases import EVALUATED, TRAINED, Recorder, RecordExamples, pad
from training_cases import losses, tiny_model

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.tasks.documents import DocumentOptions
from hf_fnl.training.stream_loader import StreamLoader

SIZES = [7, 1, 4, 5, 3]


def run(folder: Path, name: str, max_steps: int = 6, resume: bool = False) -> dict:
    """Train, and tell what was trained on and what came out."""
    recorder = Recorder()
    args = FLAMBeTrainingArguments(output_dir=str(folder / name), max_steps=max_steps, **TRAINED)
    model = tiny_model(dropout=0.1)
    trainer = FLAMBeTrainer(model, args, train_dataset=RecordExamples(SIZES), data_collator=recorder)
    trainer.train(resume_from_checkpoint=resume)
    epochs = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).tolist()
    return {"records": recorder.records, "losses": losses(trainer), "epochs": epochs, "weights": weights}


def evaluate(folder: Path, sizes: list[int]) -> dict:
    """Evaluate on a stream; tell which records the metrics are of."""
    ids: list = []

    def keep(prediction) -> dict:
        ids.extend((prediction.label_ids[:, :3] - 5).tolist())
        return {}

    args = FLAMBeTrainingArguments(output_dir=str(folder), per_device_eval_batch_size=2, **TRAINED)
    args.label_names, args.remove_unused_columns = ["input_ids"], False
    trainer = FLAMBeTrainer(
        tiny_model(), args, eval_dataset=RecordExamples(sizes), data_collator=pad, compute_metrics=keep
    )
    trainer.evaluate()
    return {"ids": ids}


def failure(action) -> str:
    """The error that ``action`` ends with."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


class Missing(RecordExamples):
    """A stream whose file one process lacks."""

    def files(self):
        return {self.path: Path(self.path).stat().st_size}


def main(folder: str) -> None:
    path = Path(folder)
    facts = {"whole": run(path, "whole"), "stopped": run(path, "parts", 3), "resumed": run(path, "parts", 6, True)}
    facts["evaluated"] = {str(sizes): evaluate(path, sizes) for sizes in EVALUATED}
    rank = torch.distributed.get_rank()
    source = path / ("gone.jsonl" if rank == 1 else "here.jsonl")
    missing = Missing(SIZES)
    missing.path = str(source)
    facts["at the start"] = failure(lambda: DocumentOptions(dataset=str(source)).training(streaming=True))
    facts["of the loader"] = failure(lambda: StreamLoader(missing, None, batch_size=1, rank=rank, world=2))
    (path / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
