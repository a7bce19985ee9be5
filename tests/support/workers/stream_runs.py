"""Worker of two processes that stream: a run undisturbed, one that stops and goes on, and a file that one lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from stream_cases import TRAINED, Recorder, stream
from training_cases import losses, tiny_model

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.tasks.documents import DocumentOptions


def run(folder: Path, name: str, shards: int, max_steps: int = 6, resume: bool = False) -> dict:
    """Train, and tell what was trained on and what came out."""
    recorder = Recorder()
    args = FLAMBeTrainingArguments(output_dir=str(folder / name), max_steps=max_steps, **TRAINED)
    model = tiny_model(dropout=0.1)
    trainer = FLAMBeTrainer(model, args, train_dataset=stream(shards=shards), data_collator=recorder)
    trainer.train(resume_from_checkpoint=resume)
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()]).tolist()
    return {"batches": recorder.batches, "losses": losses(trainer), "weights": weights}


def main(folder: str) -> None:
    path, facts = Path(folder), {}
    for shards in (5, 1):
        facts[f"whole {shards}"] = run(path, f"whole-{shards}", shards)
        run(path, f"parts-{shards}", shards, 3)
        facts[f"resumed {shards}"] = run(path, f"parts-{shards}", shards, 6, True)
    rank = torch.distributed.get_rank()
    try:
        DocumentOptions(dataset=str(path / ("gone.jsonl" if rank == 1 else "here.jsonl"))).training(streaming=True)
    except Exception as error:
        facts["missing"] = f"{type(error).__name__}: {error}"
    (path / f"facts-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
    close_process_group()
