"""The engines that share a training among processes: what they cannot do or would do otherwise is said at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import strtobool

from hf_fnl.training.arguments import FLAMBeTrainingArguments

logger = logging.getLogger(__name__)

_OFFLOADS = ("offload_optimizer", "offload_param")
# Beginnings of the names of Transformers' optimizers that look at a matrix as one.
_BY_MATRIX = ("adafactor", "apollo", "galore", "lomo", "adalomo")


def check_engine(accelerator: Accelerator, model: nn.Module, args: FLAMBeTrainingArguments) -> None:
    """Refuse, before anything is trained, what an engine would do other than ``args`` say.

    The configuration of DeepSpeed gets what it lacks: permission to run an optimizer that is not its own, also where
    the state of optimizers is offloaded, and the batch sizes and the clipping of ``args``.

    Args:
        accelerator: That of the Trainer.
        model: Unwrapped.
        args: How it is trained.

    Raises:
        ValueError: If the engine cannot do what is asked for, or its configuration contradicts ``args``.
    """
    fsdp, deepspeed = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed"))
    if accelerator.is_main_process:
        _warn_of_restarts()
    _check_fsdp(fsdp, accelerator, args)
    if deepspeed is not None:
        _complete_deepspeed(deepspeed.hf_ds_config.config, args)
    if args.frobenius_mode == "penalty" and args.frobenius_decay and is_sharded(accelerator):
        raise ValueError(
            "frobenius_mode=penalty needs whole factors in every process, and FSDP and ZeRO stage 3 hold parts; set "
            "frobenius_mode to decoupled or coupled, or take DDP or ZeRO stage 0 to 2"
        )
    if args.frobenius_mode == "coupled" and args.frobenius_decay and deepspeed is not None:
        _check_coupled(deepspeed)
    divided = fsdp is not None or (deepspeed is not None and deepspeed.zero_stage > 0)
    optim = str(getattr(args.optim, "value", args.optim))
    if divided and optim.startswith(_BY_MATRIX):
        raise ValueError(
            f"optim={optim} needs whole matrices, and FSDP and ZeRO hand over parts: set optim to flambe, lamb or "
            "an optimizer that treats each weight for itself, such as adamw_torch; or take DDP"
        )
    for name, parameter in model.named_parameters():
        if any(placement.is_shard() and placement.dim != 0 for placement in getattr(parameter, "placements", ())):
            raise ValueError(
                f"{name} is divided along another dimension than its first, by tensor parallelism; "
                "train with FSDP2 or DeepSpeed instead"
            )


def _check_coupled(deepspeed: Any) -> None:
    """Stage 3 clips what it holds in parts before any decay could be added to it."""
    clipping = deepspeed.hf_ds_config.config.get("gradient_clipping", 0)
    if deepspeed.zero_stage == 3 and clipping:
        raise ValueError(
            f"frobenius_mode=coupled adds decay to the gradient, which ZeRO stage 3 clips (to {clipping}) before that: "
            "set max_grad_norm=0 or frobenius_mode=decoupled, or take FSDP or ZeRO stage 0 to 2"
        )


def _warn_of_restarts() -> None:
    """The agent of torch 2.13 keeps one store over all restarts, in which workers find the addresses of dead ones."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts > 0 and shares:
        logger.warning(
            "torchrun may restart workers %d times, and restarted ones can wait for dead ones for ever: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where it is launched, as run_scripts/launch/elastic.sh does",
            restarts,
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether processes hold parts of parameters between steps: under FSDP and ZeRO stage 3."""
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    return fsdp is not None or (deepspeed is not None and deepspeed.zero_stage == 3)


def _check_fsdp(plugin: Any, accelerator: Accelerator, args: FLAMBeTrainingArguments) -> None:
    version = (args.fsdp_plugin_args or {}).get("fsdp_version", getattr(plugin, "fsdp_version", 2))
    if version != 2:
        raise ValueError(
            f"FSDP version {version} flattens many parameters into one, without products: choose version 2, by "
            "fsdp_version: 2 in the accelerate config, or fsdp_config={'version': 2}"
        )
    wanted = args.fsdp_plugin_args is not None or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if wanted and plugin is None and getattr(accelerator.state, "deepspeed_plugin", None) is None:
        raise ValueError(
            f"FSDP was asked for and accelerate runs {accelerator.distributed_type.value} instead: it has FSDP for "
            "several processes on accelerators only; leave --fsdp out, or use_fsdp in the accelerate config"
        )


def _complete_deepspeed(config: dict[str, Any], args: FLAMBeTrainingArguments) -> None:
    """Check a configuration of DeepSpeed and fill in what would otherwise get a default that ``args`` contradict."""
    if "optimizer" in config:
        raise ValueError(
            f'the DeepSpeed config has an "optimizer" section ({config["optimizer"].get("type")}), which would run '
            f"in the place of optim={args.optim}: remove that section"
        )
    zero = config.get("zero_optimization", {})
    devices = {name: (zero.get(name) or {}).get("device", "none") for name in _OFFLOADS}
    if on_disk := [name for name, device in devices.items() if device == "nvme"]:
        raise ValueError(
            f"zero_optimization.{on_disk[0]} of the DeepSpeed config puts parameters on NVMe, where their products "
            'cannot be decayed: set its device to "cpu" or "none"'
        )
    if (size := config.get("tensor_parallel", {}).get("autotp_size", 1)) > 1:
        raise ValueError(f"tensor_parallel.autotp_size={size} of the DeepSpeed config divides products: remove it")
    needed = {"zero_allow_untested_optimizer": True}
    if any(device == "cpu" for device in devices.values()):
        needed["zero_force_ds_cpu_optimizer"] = False
    for option, value in needed.items():
        if config.setdefault(option, value) != value:
            raise ValueError(
                f"{option} of the DeepSpeed config must be {str(value).lower()} for optim={args.optim}: remove it"
            )
    if zero.get("stage") == 3:  # or a Trainer saves no weights that from_pretrained reads
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    if "train_batch_size" not in config:
        config.setdefault("train_micro_batch_size_per_gpu", args.per_device_train_batch_size)
    config.setdefault("gradient_accumulation_steps", args.gradient_accumulation_steps)
    config.setdefault("gradient_clipping", args.max_grad_norm)
    if zero.get("stage", 0) == 0 and (args.bf16 or args.fp16):
        raise ValueError(
            "DeepSpeed without ZeRO steps once with zero gradients when it starts in half precision, which moves the "
            "weights: set zero_optimization.stage to 1 in the DeepSpeed config, or train with DDP"
        )


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(running: Any, built: Optimizer) -> None:
    """Fail with a ``RuntimeError`` unless the optimizer that an engine runs, wrapped or not, is the built one."""
    if innermost(running) is not built:
        raise RuntimeError(
            f"the engine runs {type(innermost(running)).__name__} in the place of {type(built).__name__}; remove "
            '"optimizer" and "zero_force_ds_cpu_optimizer" from the DeepSpeed config, and optimizer settings from the '
            "accelerate config"
        )


def set_state_dict_type(plugin: Any, kind: Any) -> None:
    """Have accelerate's FSDP plugin save and load in full or in shards, whatever it did before."""
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(kind)


@contextmanager
def full_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
    """Give parameters of a model by name, for reading, in full also where they are sharded.

    All processes must ask for the same ones, a few at a time: they are in memory until the end of the block.
    """
    parameters: dict[str, Any] = {name: model.get_parameter(name) for name in names}
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        from deepspeed import zero

        with torch.no_grad(), zero.GatheredParameters(list(parameters.values())):
            yield parameters
        return
    yield {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}
