"""What the engines are tested with: their options, and the models and runs that all of them are to give alike."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from training_cases import losses, tiny_examples, tiny_model, tiny_trainer

from hf_fnl import (
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    FactorizedMarianConfig,
    FactorizedMarianMTModel,
    FLAMBeTrainer,
)
from hf_fnl.training.engines import innermost
from hf_fnl.utils.processes import process

STEPS, SAVED = 5, 3
BATCH = 24  # in as many parts as there are processes and parts of a step
# The tiny matrices are far below DeepSpeed's usual limit, under which ZeRO-3 leaves parameters whole.
_ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
_OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


def _zero(stage: int, **options: Any) -> dict[str, Any]:
    zero = {**(_ZERO3 if stage == 3 else {"stage": stage}), **options}
    batch = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    return {"deepspeed": {**batch, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": zero}}


# Training arguments by engine; "one" is a single process, which all others are compared with, and "launched" whatever
# the launcher chose.
ENGINES: dict[str, dict[str, Any]] = {
    "one": {},
    "launched": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "fsdp2-shards": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    "hsdp": {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}},
    **{f"zero{stage}": _zero(stage) for stage in range(4)},
    **{f"zero{stage}-offload": _zero(stage, **_OFFLOAD) for stage in (2, 3)},
}


def tiny_gpt2() -> FactorizedGPT2LMHeadModel:
    """A GPT-2 with factorized heads and a factorized embedding that is tied to the output."""
    torch.manual_seed(0)
    config = FactorizedGPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3, n_inner=40, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, qk_rank=5, ov_rank=6, ffn_rank=7, embedding_rank=11,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return FactorizedGPT2LMHeadModel(config)


def tiny_marian() -> FactorizedMarianMTModel:
    """A Marian with factorized heads and one factorized embedding for both sides and the output."""
    torch.manual_seed(0)
    config = FactorizedMarianConfig(
        vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=16, init_std=0.2,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, qk_rank=5, ov_rank=6, ffn_rank=7,
        embedding_rank=11, pad_token_id=0, decoder_start_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return FactorizedMarianMTModel(config)


MODELS = {
    "bert": tiny_model,
    "stock-bert": lambda: tiny_model(stock=True),
    "gpt2": tiny_gpt2,
    "marian": tiny_marian,
}


@dataclass(frozen=True)
class Run:
    """A training that every engine is to do alike.

    Args:
        model: A name in ``MODELS``.
        accumulation: Parts that a batch is split into, one after another.
        options: Training arguments.
        everything: Whether it evaluates and predicts before and after, saves a checkpoint at step ``SAVED``, and its
            model at the end.
    """

    model: str = "bert"
    accumulation: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    everything: bool = False


_ADAMW = {"optim": "adamw_torch", "learning_rate": 5e-3}

RUNS = {
    "clipped": Run(options={"max_grad_norm": 0.3}),
    "everything": Run(
        accumulation=2,
        options={
            "max_grad_norm": 0.3,
            "frobenius_decay": ["ov", "qk", "linear"],
            "lr_scheduler_type": "linear",
            "diagnostics_steps": 2,
            "save_strategy": "steps",
            "save_steps": SAVED,
        },
        everything=True,
    ),
    "split groups": Run(options={"frobenius_decay": ["linear", "ov"], "frobenius_coefficient": 0.3}),
    "adamw coupled": Run(
        options=_ADAMW | {"frobenius_mode": "coupled", "frobenius_decay": ["ov", "linear"], "max_grad_norm": 0.3},
    ),
    "adamw decoupled": Run(options=_ADAMW | {"frobenius_decay": ["ov", "linear"]}),
    "bf16": Run(options={"bf16": True, "learning_rate": 4e-3}),
    "stock-bert": Run("stock-bert", options={"learning_rate": 1e-2}),
    "gpt2": Run("gpt2", accumulation=2),
    "marian": Run("marian", accumulation=2),
}


@dataclass(frozen=True)
class Job:
    """A run under an engine, which may go on from a checkpoint that the same run left under another."""

    engine: str
    run: str = "everything"
    source: str | None = None

    def folder(self, root: Path) -> Path:
        """Where it writes."""
        return root / self.engine / (f"from {self.source}" if self.source else self.run)

    def __str__(self) -> str:
        return f"{self.engine} {self.run}" if self.source is None else f"{self.source} to {self.engine}"


def engine_trainer(job: Job, root: Path, world_size: int) -> FLAMBeTrainer:
    """The trainer of a job."""
    run = RUNS[job.run]
    assert BATCH % (world_size * run.accumulation) == 0
    options = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": BATCH // world_size // run.accumulation,
        "per_device_eval_batch_size": 12 // world_size,
        "gradient_accumulation_steps": run.accumulation,
        **ENGINES[job.engine],
        **run.options,
    }
    if job.engine == "hsdp":
        options["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=world_size // 2)
    trainer = tiny_trainer(job.folder(root), MODELS[run.model](), **options)
    trainer.train_dataset = trainer.eval_dataset = examples_of(run.model)
    return trainer


def do(job: Job, root: Path, world_size: int = 1) -> None:
    """Do a job in this process, and write its facts and weights, or what went wrong."""
    forget_engine(job.engine)
    job.folder(root).mkdir(parents=True, exist_ok=True)
    try:
        _do(job, root, world_size)
    except Exception:
        (job.folder(root) / f"error-{process()[0]}.txt").write_text(traceback.format_exc())


def _do(job: Job, root: Path, world_size: int) -> None:
    trainer, folder, facts = engine_trainer(job, root, world_size), job.folder(root), {}
    everything = RUNS[job.run].everything and job.source is None
    if everything and not job.engine.startswith("zero"):  # DeepSpeed evaluates before a training in stage 3 only
        facts["before"] = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=job.source and str(root / job.source / job.run / f"checkpoint-{SAVED}"))
    if everything:
        facts["after"] = trainer.evaluate()["eval_loss"]
        outputs = trainer.predict(trainer.eval_dataset).predictions
        facts["predicted"] = sum(float(abs(output).sum()) for output in outputs)
    if RUNS[job.run].everything:
        trainer.save_model(str(folder / "final"))
    weights = {key: full(value) for key, value in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "weights.pt")
        facts["losses"] = losses(trainer)
        facts["norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        facts["distributed_type"] = str(trainer.accelerator.distributed_type)
        facts["units"] = [type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        facts["optimizer"] = type(innermost(trainer.optimizer)).__name__
        (folder / "facts.json").write_text(json.dumps(facts))


def full(parameter: Tensor) -> Tensor:
    """All of a parameter; every process must ask for it."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach().cpu()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    return parameter.detach().clone()


def forget_engine(engine: str) -> None:
    """Remove what accelerate noted of an earlier engine in the environment, unless a launcher chose this one."""
    if engine != "launched":
        for variable in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[variable]


def examples_of(model: str) -> list[dict[str, Tensor]]:
    """Examples in the form that a model takes."""
    examples = tiny_examples()
    if model == "stock-bert":  # it averages over its own part of a batch, so all are to hold equally many labels
        for example in examples:
            example["labels"] = torch.where(torch.arange(13) % 4 == 1, example["input_ids"], -100)
    keys = ("input_ids", "labels") if model in ("gpt2", "marian") else ("input_ids", "labels", "next_sentence_label")
    return [{key: example[key] for key in keys} for example in examples]


def largest_difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all weights but biases of keys: the norm of the difference, over that of the weight where it exceeds 1.

    The true gradient of a key's bias is zero, and Adam's normalization blows up its rounding; so it does for a single
    element whose gradient happens to be next to nothing. GPT-2 keeps those biases in ``c_attn.bias``.
    """
    assert weights.keys() == expected.keys()
    names = [name for name in expected if not name.endswith(("key.bias", "k_proj.bias", "c_attn.bias"))]
    return max(((weights[name] - expected[name]).norm() / expected[name].norm().clamp(min=1)).item() for name in names)
