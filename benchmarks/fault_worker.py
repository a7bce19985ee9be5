"""A training by a few processes that can be watched and struck: forked, so that a run costs a second and no imports."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from benchmarks.ports import free_port

ROOT = Path(__file__).parents[1]
# What accelerate calls the engines; where it cannot have one it takes another without a word.
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
_FORK = multiprocessing.get_context("fork")
ZERO2: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2},
}
FSDP2: dict[str, Any] = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}


@dataclass(frozen=True)
class Job:
    """One start of a script.

    Args:
        folder: Where its processes write what they do; a new one for every start.
        flags: Command line of ``run_scripts/pretrain_bert.py``.
        engine: One of ``ENGINES``.
        hosts: The working folder of every process.
    """

    folder: Path
    flags: Sequence[str]
    engine: str
    hosts: Sequence[Path]


class Recorder(TrainerCallback):
    """Writes a line for the beginning of a training, every loss and every checkpoint, at once."""

    def __init__(self) -> None:
        self._path = Path(os.environ["FAULTS_FOLDER"]) / f"events-{os.environ.get('RANK', 0)}.jsonl"

    def _write(self, **event: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def on_train_begin(self, args, state, control, **kwargs):
        """Write from which step the training goes on."""
        self._write(begin=state.global_step, engine=AcceleratorState().distributed_type.value)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write the loss of a step."""
        if "loss" in (logs or {}):
            self._write(step=state.global_step, loss=logs["loss"])

    def on_save(self, args, state, control, **kwargs):
        """Write that a checkpoint was asked for, and no error came back."""
        self._write(saved=state.global_step)


def import_engines() -> None:
    """Import beforehand what the scripts and the engines need."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    _import_script("pretrain_bert")


def _import_script(name: str) -> Any:
    if (scripts := str(ROOT / "run_scripts")) not in sys.path:
        sys.path.insert(0, scripts)
    return __import__(name)


def start(job: Job) -> list[BaseProcess]:
    """Fork the processes of a job."""
    job.folder.mkdir(parents=True)
    port = free_port()
    processes = [_FORK.Process(target=_run, args=(job, rank, port)) for rank in range(len(job.hosts))]
    for process in processes:
        process.start()
    return processes


def call(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own, so that this one stays free of threads and can be forked."""
    process = _FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} failed with exit code {process.exitcode}")


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


def _run(job: Job, rank: int, port: int) -> None:
    log = os.open(job.folder / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(job.hosts), "LOCAL_WORLD_SIZE": len(job.hosts)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FAULTS_FOLDER": job.folder}
    os.environ.update({name: str(value) for name, value in {**places, **address}.items()})
    os.chdir(job.hosts[rank])
    torch.set_num_threads(1)
    transformers_trainer.DEFAULT_CALLBACKS.append(Recorder)
    if job.engine == "fsdp2":
        import tests.workers.cpu_fsdp  # noqa: F401
    try:
        _import_script("pretrain_bert").main([*job.flags, *_engine_flags(job)])
    except Exception as error:
        traceback.print_exc()
        (job.folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _engine_flags(job: Job) -> list[str]:
    config = job.folder / f"engine-{os.environ['RANK']}.json"
    config.write_text(json.dumps(ZERO2 if job.engine == "zero2" else FSDP2))
    flags = {"ddp": [], "fsdp2": ["--fsdp", "--fsdp_config", str(config)], "zero2": ["--deepspeed", str(config)]}
    return flags[job.engine]
