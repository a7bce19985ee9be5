"""A training by a few processes that can be struck: forked, so that a start costs a second and no imports."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback

from benchmarks.ports import free_port
from hf_fnl import FactorizedBertConfig, FactorizedBertForMaskedLM, FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.command_line import run_script
from hf_fnl.training.runs import checkpoint_to_resume

STEPS, FILES = 12, 24
# What accelerate calls the engines; where it cannot have one it takes another without a word.
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
_FORK = multiprocessing.get_context("fork")
_ZERO2: dict[str, Any] = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
_FSDP2: dict[str, Any] = {
    "version": 2,
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "state_dict_type": "SHARDED_STATE_DICT",
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": _FSDP2},
    "zero2": {"deepspeed": _ZERO2},
}


@dataclass(frozen=True)
class Job:
    """One start of a training.

    Args:
        log: Folder where its processes write what they do; a new one for every start.
        run: Its ``output_dir``, beside which ``data`` lies.
        engine: One of ``ENGINES``.
        seed: Decides upon its curve.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints that stay.
        resume: What ``resume_from_checkpoint`` is.
    """

    log: Path
    run: Path
    engine: str
    seed: int
    save_steps: int
    save_total_limit: int | None
    resume: str | None = "true"


class Sentences(Dataset[dict[str, Tensor]]):
    """Examples that lie in a file each, which is opened when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return FILES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.tensor(json.loads((self._folder / f"{index:02}.json").read_text()))
        return {"input_ids": tokens, "labels": tokens}


class Recorder(TrainerCallback):
    """Writes a line for the beginning of a training and for every loss, at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _write(self, **event: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write from which step the training goes on."""
        self._write(begin=state.global_step, engine=AcceleratorState().distributed_type.value)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the loss of a step."""
        if "loss" in (logs or {}):
            self._write(step=state.global_step, loss=logs["loss"])


def write_data(folder: Path) -> None:
    """Write the examples."""
    generator = torch.Generator().manual_seed(1)
    folder.mkdir(parents=True)
    for index in range(FILES):
        tokens = torch.randint(60, (12,), generator=generator).tolist()
        (folder / f"{index:02}.json").write_text(json.dumps(tokens))


def start(job: Job, count: int = 2) -> list[BaseProcess]:
    """Fork the processes of a job."""
    job.log.mkdir(parents=True)
    (job.log / "job.json").write_text(json.dumps(asdict(job), default=str))
    port = free_port()
    processes = [_FORK.Process(target=_run, args=(job, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes


def wait(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for processes to end; those that do not within that time are killed, and their code is ``None``."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _run(job: Job, rank: int, count: int, port: int) -> None:
    log = os.open(job.log / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if job.engine == "fsdp2":
        import tests.support.workers.cpu_fsdp  # noqa: F401
    sys.argv = ["training"]

    def main(arguments: list[str]) -> None:
        try:
            _train(job, rank)
        except Exception as error:
            traceback.print_exc()
            (job.log / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise

    run_script(main)


def _train(job: Job, rank: int) -> None:
    torch.manual_seed(job.seed)
    config = FactorizedBertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, qk_rank=5, ov_rank=6, ffn_rank=7,
    )  # fmt: skip
    args = FLAMBeTrainingArguments(
        str(job.run), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=0.01, logging_steps=1,
        save_steps=job.save_steps, save_total_limit=job.save_total_limit, seed=job.seed, use_cpu=True, report_to="none",
        disable_tqdm=True, resume_from_checkpoint=job.resume, **_OPTIONS[job.engine],
    )  # fmt: skip
    data = Sentences(job.run.parent / "data")
    recorder = Recorder(job.log / f"events-{rank}.jsonl")
    trainer = FLAMBeTrainer(FactorizedBertForMaskedLM(config), args, train_dataset=data, callbacks=[recorder])
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    trainer.save_model()
