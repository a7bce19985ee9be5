"""Worker of initialization in many processes: makes and loads models in every layout and writes what came of it."""

from __future__ import annotations

import copy
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from init_cases import CASES, Case

from hf_fnl import FactorizationConfig, FactorizedBertConfig, FactorizedBertForMaskedLM, factorize_, spectral
from hf_fnl.models.checkpoint import load
from hf_fnl.models.sharded_init import initialize_
from hf_fnl.training.building import build
from hf_fnl.training.engines import ties_in_one_unit
from hf_fnl.utils.processes import leave

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
Facts = dict[str, Any]


@contextmanager
def zero3() -> Iterator[None]:
    """As while training arguments with a ZeRO-3 configuration exist."""
    alive = HfDeepSpeedConfig(copy.deepcopy(ZERO3))
    yield
    unset_hf_deepspeed_config()
    del alive


@contextmanager
def sending_parts() -> Iterator[None]:
    """As under FSDP2 with fsdp_cpu_ram_efficient_loading."""
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}):
        yield


@contextmanager
def counted_decompositions(facts: Facts) -> Iterator[None]:
    """Counts the matrices and attentions that this process decomposes."""
    facts["decompositions"] = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            facts["decompositions"] += 1
            return function(*args)

        return call

    with (
        mock.patch.object(spectral, "_wide_svd", counted(spectral._wide_svd)),
        mock.patch.object(spectral, "_head_maps", counted(spectral._head_maps)),
    ):
        yield


class Memory(TorchDispatchMode):
    """Bytes of tensors that operations made and that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, in any layout."""
    if hasattr(parameter, "ds_tensor"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


def difference(model: nn.Module, reference: nn.Module) -> float:
    """The largest difference between the parameters and buffers of two models; of names, infinity."""
    ours = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    theirs = dict(reference.named_parameters(remove_duplicate=False)) | dict(reference.named_buffers())
    if list(ours) != list(theirs) or [n for n, _ in model.named_parameters()] != [
        n for n, _ in reference.named_parameters()
    ]:
        return float("inf")
    return max(float((whole(ours[name]) - theirs[name].detach()).abs().max()) for name in ours)


def made(case: Case, make: Callable[[], nn.Module]) -> tuple[nn.Module, Facts]:
    """A model made by all processes, and how it compares with that of one."""
    facts: Facts = {}
    reference, state = case.alone()
    torch.manual_seed(0)
    with counted_decompositions(facts):
        model = make()
    facts |= {
        "stream": torch.equal(torch.get_rng_state(), state),
        "trained": [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in reference.parameters()],
    }
    parameters = list(model.parameters())
    facts["meta"] = all(p.is_meta for p in parameters)
    facts["partitioned"] = all(hasattr(p, "ds_tensor") for p in parameters)
    facts["difference"] = None if facts["meta"] else difference(model, reference)
    return model, facts


def with_zero3(case: Case) -> Facts:
    with zero3():
        return made(case, lambda: build(case.model_class, case.config(), factorize=case.factorize))[1]


def with_zero3_from_config(case: Case) -> Facts:
    with zero3():
        return made(case, lambda: case.model_class._from_config(case.config()))[1]


def with_ddp(case: Case) -> Facts:
    return made(case, lambda: build(case.model_class, case.config(), factorize=case.factorize))[1]


def with_parts_sent(case: Case) -> Facts:
    with sending_parts():
        return made(case, lambda: build(case.model_class, case.config(), factorize=case.factorize))[1]


def with_fsdp2(case: Case) -> Facts:
    def make() -> nn.Module:
        with torch.device("meta"):
            model = case.model_class(case.config())
        if case.factorize is not None:
            case.factorize(model)
        for layer in model.get_submodule(case.layers):
            fully_shard(layer)
        fully_shard(model)
        initialize_(model.to_empty(device="cpu"))
        return model

    return made(case, make)[1]


LAYOUTS = {
    "zero3": with_zero3,
    "zero3-from-config": with_zero3_from_config,
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "fsdp2-parts-sent": with_parts_sent,
}


def loaded(case: Case, folder: Path) -> Facts:
    """A checkpoint of a model loaded under ZeRO-3, and as under FSDP2 where accelerate sends the parts."""
    reference, _ = case.alone()
    if dist.get_rank() == 0:
        reference.save_pretrained(folder)
    dist.barrier()
    facts: Facts = {}
    with counted_decompositions(facts):
        with zero3():
            model = load(folder)
            facts["partitioned"] = all(hasattr(p, "ds_tensor") for p in model.parameters())
        facts["difference"] = difference(model, reference)
        with sending_parts():
            model = load(folder)
        facts["meta"] = all(p.is_meta for p in model.parameters())
        facts["parts-sent"] = None if any(p.is_meta for p in model.parameters()) else difference(model, reference)
    return facts


def prepared(case: Case) -> Facts:
    """Parameters and loss of models that were built for an engine, once that engine has them."""
    reference, _ = case.alone()
    batch = {name: torch.arange(1, 23).reshape(2, 11) for name in ("input_ids", "labels")}
    expected = reference.eval()(**batch).loss.item()
    torch.manual_seed(0)
    with zero3():
        model = build(case.model_class, case.config(), factorize=case.factorize)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters()), config=copy.deepcopy(ZERO3)
    )
    engine.eval()
    facts: Facts = {
        "zero3": abs(engine(**batch).loss.item() - expected),
        "zero3-weights": difference(model, reference),
    }
    torch.manual_seed(0)
    with sending_parts():
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=True)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = build(case.model_class, case.config(), factorize=case.factorize)
        with ties_in_one_unit(model, plugin):
            model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    divided = all(hasattr(p, "full_tensor") for p in model.parameters())
    loss = model.eval()(**batch).loss.item()
    return facts | {
        "fsdp2": abs(loss - expected),
        "fsdp2-weights": difference(model, reference),
        "fsdp2-divided": divided,
    }


def errors(folder: Path) -> Facts:
    """What is said where parameters are divided but have to be whole, or something fails in one process."""
    case = CASES["bert"]
    dense = FactorizedBertConfig(**{**case.config().to_dict(), **dict.fromkeys(("qk_rank", "ov_rank"))})
    with zero3():
        model = build(FactorizedBertForMaskedLM, dense)
        attempts = {
            "from_dense": lambda: FactorizedBertForMaskedLM.from_dense(model, qk_rank=5),
            "factorize_": lambda: factorize_(model, FactorizationConfig(rank=3)),
            "merge": model.merge,
            "ranks": lambda: FactorizedBertForMaskedLM.from_pretrained(folder / "bert", ffn_rank=7),
            "form": lambda: FactorizedBertForMaskedLM.from_pretrained(folder / "bert", ffn_rank=None),
        }
        found = {name: message(attempt) for name, attempt in attempts.items()}
    failing = mock.Mock(side_effect=ValueError("cannot decompose"))
    with mock.patch.object(spectral, "_wide_svd", failing if dist.get_rank() == 1 else spectral._wide_svd):
        found["one-fails"] = message(lambda: build(case.model_class, case.config()))
    return found


def message(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def peak_memory() -> Facts:
    """Bytes held while a deeper model is made under ZeRO-3, beside those of the model and of its largest group."""
    config = FactorizedBertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=24,
        num_attention_heads=3,
        intermediate_size=192,
        qk_rank=5,
        ov_rank=11,
        ffn_rank=16,
    )
    layer = 4 * sum(p.numel() for p in FactorizedBertForMaskedLM(config).bert.encoder.layer[0].parameters())
    with zero3(), Memory() as memory:
        model = build(FactorizedBertForMaskedLM, config)
    total = 4 * sum(p.ds_numel for p in model.parameters())
    return {"peak": memory.peak, "model": total, "layer": layer, "dense": 4 * 48 * 192}


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    facts: Facts = {
        f"{layout} {name}": run(case)
        for name, case in CASES.items()
        for layout, run in LAYOUTS.items()
        if not (layout == "zero3-from-config" and case.factorize)
    }
    facts |= {f"loaded {name}": loaded(case, folder / name) for name, case in CASES.items()}
    facts |= {"errors": errors(folder), "memory": peak_memory()}
    facts |= {f"prepared {name}": prepared(CASES[name]) for name in ("bert", "gpt2", "surgery")}
    (folder / f"facts-{dist.get_rank()}.json").write_text(json.dumps(facts))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
