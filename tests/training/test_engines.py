"""FLAMBeTrainer under every engine gives the losses, gradient norms and weights of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import MODELS, RUNS, STEPS, engine_trainer, largest_difference, train_and_measure
from launching import launch
from torch import nn
from torch.distributed.tensor import Shard
from training_cases import tiny_examples, tiny_model, tiny_trainer

from hf_fnl import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE
from hf_fnl.training.engines import check_engine, check_optimizer

WORKER = Path(__file__).parents[1] / "support" / "workers" / "engine_runs.py"
LIMIT = 1e-5  # of a weight after five steps in fp32: below 2e-6 with AVX-512, 2.7e-6 with AVX2


def under(engine: str, *names: str) -> list[tuple[str, str]]:
    return [(engine, name) for name in names]


FAMILIES = {
    "torch": [
        *under("ddp", "everything", "evaluated", "adamw coupled"),
        *under("fsdp2", "everything", "evaluated", "stock-bert", "gpt2", "marian", "bf16"),
        *under("fsdp2", "adamw coupled", "adamw decoupled"),
    ],
    "deepspeed": [
        *under("zero0", "clipped"),
        *under("zero1", "everything"),
        *under("zero2", "split groups", "adamw coupled"),
        *under("zero3", "everything", "evaluated", "bf16"),
        *under("zero2-offload", "everything"),
    ],
    "four processes": under("hsdp", "clipped"),
}
EXPECTED_TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "hsdp": "FSDP"}


def run_all(folder: Path, runs: list[tuple[str, str]], processes: int) -> None:
    _, output = launch(WORKER, str(folder), *map("/".join, runs), processes=processes, timeout=600)
    missing = [run for run in runs if not (folder / "/".join(run) / "facts.json").exists()]
    assert not missing, f"{missing}\n{output}"


def run_alone(folder: Path, name: str) -> dict[str, Any]:
    """What one process without any engine makes of a run."""
    trainer = engine_trainer(folder / "one" / name, "one", name, 1)
    facts = train_and_measure(trainer, name)
    weights = {key: parameter.detach().clone() for key, parameter in trainer.model.named_parameters()}
    return {**facts, "weights": weights}


def error_of(name: str, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference; in bfloat16, which rounds gradients, in relation to how far all weights went."""
    if name != "bf16":
        return largest_difference(weights, expected)
    start = {key: parameter.detach() for key, parameter in MODELS[RUNS[name].model]().named_parameters()}
    squares = [sum((w[key].float() - v).square().sum() for key, v in expected.items()) for w in (weights, start)]
    return (squares[0] / squares[1]).sqrt().item()


def figures(folder: Path) -> list[dict[str, Any]]:
    """The figures of all products at all logged steps."""
    return [json.loads(line)["products"] for line in (folder / DIAGNOSTICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_gives_what_one_process_gives(tmp_path, family):
    if family == "deepspeed":
        pytest.importorskip("deepspeed")
    runs = FAMILIES[family]
    run_all(tmp_path, runs, processes=4 if family == "four processes" else 2)
    alone = {name: run_alone(tmp_path, name) for name in {name for _, name in runs}}
    errors = {}
    for engine, name in runs:
        folder, one = tmp_path / engine / name, alone[name]
        facts = json.loads((folder / "facts.json").read_text())
        assert facts["distributed_type"] == f"DistributedType.{EXPECTED_TYPES.get(engine, 'DEEPSPEED')}", engine
        assert facts["optimizer"] == ("AdamW" if name.startswith("adamw") else "FLAMBe"), (engine, name)
        if "FSDP" in facts["distributed_type"]:  # layers are units, and so gathered one at a time
            assert any("Layer" in unit or "Block" in unit for unit in facts["units"]), facts["units"]
        tolerance = 2e-2 if name == "bf16" else 1e-5  # sums of some hundred losses, or of squared gradients
        assert facts["losses"] == pytest.approx(one["losses"], rel=tolerance), (engine, name)
        assert len(facts["losses"]) == STEPS
        if engine != "zero0":  # which does not tell
            assert facts["norms"] == pytest.approx(one["norms"], rel=2 * tolerance), (engine, name)
        for measure in {"before", "after", "predicted"} & facts.keys():
            assert facts[measure] == pytest.approx(one[measure], rel=1e-6), (engine, name, measure)
        if "after" in facts:
            for here, there in zip(figures(folder), figures(tmp_path / "one" / name), strict=True):
                assert here.keys() == there.keys()
                assert all(here[p] == pytest.approx(there[p], rel=1e-4, abs=1e-5) for p in here), engine
        error = error_of(name, torch.load(folder / "weights.pt"), one["weights"])
        # Adam divides gradients that are rounding alone, as those of key biases, by their own size.
        if error > (0.25 if name == "bf16" else 5e-6 if name.startswith("adamw") else LIMIT):
            errors[engine, name] = error
    assert not errors, errors


def arguments(tmp_path: Path, **options: Any) -> FLAMBeTrainingArguments:
    return FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def accelerator_with(fsdp_version: int | None = None, deepspeed: dict[str, Any] | None = None) -> Any:
    """What ``check_engine`` looks at of an ``Accelerator``."""
    state = SimpleNamespace()
    if fsdp_version is not None:
        state.fsdp_plugin = SimpleNamespace(fsdp_version=fsdp_version)
    if deepspeed is not None:
        stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
        state.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=deepspeed), zero_stage=stage)
    return SimpleNamespace(state=state, distributed_type=SimpleNamespace(value="MULTI_CPU"), is_main_process=True)


PENALTY = {"optim": "sgd", "frobenius_mode": "penalty", "frobenius_decay": ["ov"]}
NVME = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ({"fsdp_version": 1}, {}, r"FSDP version 1 .* fsdp_version: 2 in the accelerate config"),
        ({"fsdp_version": 2}, PENALTY, "frobenius_mode=penalty .* set frobenius_mode to decoupled or coupled"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, PENALTY, "frobenius_mode=penalty"),
        (
            {"deepspeed": {"optimizer": {"type": "AdamW"}}},
            {},
            r'"optimizer" section \(AdamW\).*in the place of optim=fl',
        ),
        ({"deepspeed": NVME}, {}, "zero_optimization.offload_param of the DeepSpeed config puts parameters on NVMe"),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, {}, "tensor_parallel.autotp_size=2"),
        ({"deepspeed": {"zero_allow_untested_optimizer": False}}, {}, "zero_allow_untested_optimizer .* must be true"),
        (
            {"deepspeed": OFFLOAD | {"zero_force_ds_cpu_optimizer": True}},
            {},
            "zero_force_ds_cpu_optimizer of the DeepSpeed config must be false",
        ),
        ({"deepspeed": {}}, {"bf16": True}, "set zero_optimization.stage to 1"),
        ({"fsdp_version": 2}, {"optim": "adafactor"}, "optim=adafactor needs whole matrices"),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {"optim": "adafactor"}, "needs whole matrices"),
    ],
    ids=[
        "FSDP1",
        "penalty FSDP2",
        "penalty ZeRO-3",
        "optimizer",
        "NVMe",
        "AutoTP",
        "untested",
        "CPUAdam",
        "ZeRO-0 bf16",
        "adafactor FSDP2",
        "adafactor ZeRO-1",
    ],
)
def test_what_an_engine_cannot_do_is_refused(tmp_path, engine, options, message):
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator_with(**engine), tiny_model(), arguments(tmp_path, **options))


def test_fsdp_that_accelerate_dropped_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for and accelerate runs MULTI_CPU instead"):
        check_engine(accelerator_with(), tiny_model(), arguments(tmp_path))


def test_tensor_parallelism_along_other_dimensions_is_refused(tmp_path):
    model = nn.Linear(5, 7)
    model.weight.placements = (Shard(1),)
    with pytest.raises(ValueError, match="weight is divided along another dimension than its first"):
        check_engine(accelerator_with(), model, arguments(tmp_path))


def test_a_deepspeed_config_gets_what_it_lacks(tmp_path):
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    args = arguments(tmp_path, max_grad_norm=0.3, per_device_train_batch_size=5, gradient_accumulation_steps=3)
    check_engine(accelerator_with(deepspeed=config), tiny_model(), args)
    assert {key: value for key, value in config.items() if key != "zero_optimization"} == {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.3,
    }


def test_another_optimizer_than_the_one_built_is_refused():
    parameters = [nn.Parameter(torch.ones(3))]
    built, other = torch.optim.SGD(parameters), torch.optim.AdamW(parameters)
    check_optimizer(SimpleNamespace(optimizer=SimpleNamespace(optimizer=built)), built)
    with pytest.raises(RuntimeError, match='the engine runs AdamW in the place of SGD; remove "optimizer"'):
        check_optimizer(SimpleNamespace(optimizer=other), built)


def test_the_training_set_is_told_every_epoch(tmp_path):
    class Examples(torch.utils.data.Dataset):
        def __init__(self):
            self.examples, self.told = tiny_examples(16), []

        def __len__(self):
            return len(self.examples)

        def __getitem__(self, index):
            return self.examples[index]

        def set_epoch(self, epoch):
            self.told.append(epoch)

    trainer = tiny_trainer(tmp_path, max_steps=5)  # of 8 examples each
    trainer.train_dataset = Examples()
    trainer.train()
    assert sorted(set(trainer.train_dataset.told)) == [0, 1, 2]
