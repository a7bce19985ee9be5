"""FLAMBeTrainer under every engine gives what one process gives, and goes on from its checkpoints or says why not."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import MODELS, RUNS, STEPS, Job, do, largest_difference
from launching import launch, launches
from torch import nn
from torch.distributed.tensor import Shard
from training_cases import tiny_examples, tiny_model, tiny_trainer

from hf_fnl import FactorizedBertForPreTraining, FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE
from hf_fnl.training.checkpoints import checkpoints
from hf_fnl.training.engines import check_engine, check_optimizer
from hf_fnl.training.manifest import MANIFEST_FILE, fault

pytestmark = launches
pytest.importorskip("deepspeed", reason="deepspeed is not installed")
WORKER = Path(__file__).parents[1] / "support" / "workers" / "engine_runs.py"
LIMIT = 1e-5  # of a weight after five steps in fp32: below 2e-6 with AVX-512, 2.7e-6 with AVX2


TWO = [
    *(Job(engine) for engine in ("ddp", "fsdp2", "fsdp2-shards", "zero2", "zero2-offload", "zero3")),
    Job("ddp", "adamw coupled"),
    *(Job("fsdp2", run) for run in ("stock-bert", "gpt2", "marian", "bf16", "adamw coupled", "adamw decoupled")),
    Job("zero0", "clipped"),
    Job("zero2", "split groups"),
    Job("zero2", "adamw coupled"),
    Job("zero3", "bf16"),
    *(Job(engine, source=engine) for engine in ("ddp", "fsdp2", "zero3")),
    Job("zero1", source="zero2"),
]
FOUR = [Job("hsdp", source="fsdp2-shards")]
# What an engine cannot go on from, by the number of its processes.
REFUSED = {
    2: {
        Job("fsdp2-shards", source="fsdp2"): "which needs fsdp_state_dict_type=FULL_STATE_DICT in",
        Job("ddp", source="fsdp2-shards"): "which is of FSDP where this run is of one process or DDP",
        Job("zero2", source="ddp"): "which is of one process or DDP where this run is of DeepSpeed",
        Job("zero3", source="zero2"): "which is of another stage of ZeRO than 3",
    },
    4: {Job("zero2", source="zero2"): "which is of 2 processes, and this run has 4"},
    1: {Job("one", source="zero3"): "which is of DeepSpeed where this run is of one process or DDP"},
}
ONE = [Job("one", run) for run in sorted({job.run for job in TWO})] + [Job("one", source="ddp")]
EXPECTED_TYPES = {"one": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP", "fsdp2-shards": "FSDP", "hsdp": "FSDP"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder in which all jobs were done."""
    root = tmp_path_factory.mktemp("jobs")
    for processes, jobs in {2: TWO, 4: FOUR, 1: ONE}.items():
        jobs = [*jobs, *REFUSED[processes]]
        if processes == 1:
            for job in jobs:
                do(job, root)
            continue
        (root / "plan.json").write_text(json.dumps([astuple(job) for job in jobs]))
        codes, output = launch(WORKER, str(root), str(root / "plan.json"), processes=processes, timeout=600)
        assert not any(codes), output
    return root


def facts_of(job: Job, root: Path) -> dict[str, Any]:
    for path in job.folder(root).glob("error-*.txt"):
        pytest.fail(path.read_text()[-3000:])
    return json.loads((job.folder(root) / "facts.json").read_text())


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


@pytest.mark.parametrize("job", [*TWO, *FOUR, ONE[-1]], ids=str)
def test_every_engine_gives_what_one_process_gives(root, job):
    """Also where it goes on from a checkpoint, and torch.distributed.checkpoint divides one anew."""
    facts, one = facts_of(job, root), facts_of(Job("one", job.run), root)
    assert facts["distributed_type"] == f"DistributedType.{EXPECTED_TYPES.get(job.engine, 'DEEPSPEED')}"
    assert facts["optimizer"] == ("AdamW" if job.run.startswith("adamw") else "FLAMBe")
    if "FSDP" in facts["distributed_type"]:  # layers are units, and so gathered one at a time
        assert any("Layer" in unit or "Block" in unit for unit in facts["units"]), facts["units"]
    tolerance = 2e-2 if job.run == "bf16" else 1e-5  # sums of some hundred losses, or of squared gradients
    assert facts["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert len(facts["losses"]) == STEPS
    if job.engine != "zero0":  # which does not tell
        assert facts["norms"] == pytest.approx(one["norms"], rel=2 * tolerance)
    for measure in {"before", "after", "predicted"} & facts.keys():
        assert facts[measure] == pytest.approx(one[measure], rel=1e-6), measure
    if "after" in facts:
        pairs = zip(*(figures(each.folder(root)) for each in (job, Job("one", job.run))), strict=True)
        for here, there in pairs:
            assert here.keys() == there.keys()
            assert all(here[p] == pytest.approx(there[p], rel=1e-4, abs=1e-5) for p in here)
    weights, expected = (torch.load(each.folder(root) / "weights.pt") for each in (job, Job("one", job.run)))
    # Adam divides gradients that are rounding alone, as those of key biases, by their own size.
    limit = 0.25 if job.run == "bf16" else 5e-6 if job.run.startswith("adamw") else LIMIT
    assert error_of(job.run, weights, expected) <= limit


@pytest.mark.parametrize(
    ("processes", "job"), [(processes, job) for processes, jobs in REFUSED.items() for job in jobs], ids=str
)
def test_what_an_engine_cannot_go_on_from_is_refused_by_all_processes(root, processes, job):
    errors = [path.read_text() for path in job.folder(root).glob("error-*.txt")]
    assert len(errors) == processes
    assert all(REFUSED[processes][job] in error for error in errors)


@pytest.mark.parametrize("job", [job for job in (*TWO, *FOUR, *ONE) if RUNS[job.run].everything], ids=str)
def test_checkpoints_are_complete_and_the_final_model_is_a_models_folder(root, job):
    facts_of(job, root)
    for checkpoint in checkpoints(job.folder(root)):
        assert fault(checkpoint) is None
        listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        assert there == {*listed, MANIFEST_FILE}
    loaded = FactorizedBertForPreTraining.from_pretrained(job.folder(root) / "final")
    weights = torch.load(job.folder(root) / "weights.pt")
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[key]), key


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
CLIPS = {"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}
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
        ({"deepspeed": CLIPS}, PENALTY | {"frobenius_mode": "coupled"}, "ZeRO stage 3 clips .to 1.0. before that"),
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
        "coupled ZeRO-3",
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
