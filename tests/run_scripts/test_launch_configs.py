"""The launch configurations: read by the classes that read them in earnest, and run where they can run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from launching import launch, launches

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "run_scripts" / "launch"
YAMLS = sorted(FOLDER.glob("*.yaml"))
JSONS = sorted(FOLDER.glob("*.json"))
SCRIPTS = sorted(FOLDER.glob("*.sh"))

# Engine, processes and machines that each is to ask for.
EXPECTED = {
    "one_process": ("NO", 1, 1),
    "two_cpu_processes": ("MULTI_GPU", 2, 1),
    "one_gpu": ("NO", 1, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "fsdp2": ("FSDP", 8, 1),
    "hsdp": ("FSDP", 16, 2),
    "multi_node": ("MULTI_GPU", 16, 2),
    **{f"zero{stage}{more}": ("DEEPSPEED", 8, 1) for stage in (1, 2, 3) for more in ("", "_offload")},
}


def stem(path: Path) -> str:
    return path.stem


def call(path: Path) -> list[str]:
    """The arguments of the command in the first line, with values for what stands for one."""
    line = path.read_text().splitlines()[0]
    assert line.startswith("# accelerate launch "), line
    values = {"K": "1", "ADDRESS": "10.0.0.1"}
    return [values.get(word, word) for word in line.removeprefix("# accelerate launch ").split()]


def test_every_configuration_is_known_here():
    assert {path.stem for path in YAMLS} == EXPECTED.keys()


@pytest.mark.parametrize("path", YAMLS, ids=stem)
def test_accelerate_reads_what_the_name_says(path):
    config = load_config_from_file(str(path))
    engine, processes, machines = EXPECTED[path.stem]
    assert config.distributed_type == DistributedType[engine]
    assert (config.num_processes, config.num_machines) == (processes, machines)


@pytest.mark.parametrize("path", YAMLS, ids=stem)
def test_the_first_line_calls_it(path):
    arguments = launch_command_parser().parse_args(call(path))
    assert ROOT / arguments.config_file == path
    assert (ROOT / arguments.training_script).is_file()
    if EXPECTED[path.stem][2] > 1:
        assert (arguments.machine_rank, arguments.main_process_ip) == (1, "10.0.0.1")


@pytest.mark.parametrize("path", [path for path in YAMLS if path.stem in ("fsdp2", "hsdp")], ids=stem)
def test_fsdp_is_version_2_and_reshards(path):
    config = yaml.safe_load(path.read_text())
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is True
    sizes = config.get("parallelism_config", {})
    if path.stem == "hsdp":
        assert config["num_processes"] == (
            sizes["parallelism_config_dp_replicate_size"] * sizes["parallelism_config_dp_shard_size"]
        )


@pytest.mark.parametrize("path", [path for path in YAMLS if path.stem.startswith("zero")], ids=stem)
def test_deepspeed_configurations_point_to_their_json_and_leave_the_rest_to_it(path):
    config = yaml.safe_load(path.read_text())
    section = config["deepspeed_config"]
    assert ROOT / section["deepspeed_config_file"] == path.with_suffix(".json")
    assert section["zero3_init_flag"] == path.stem.startswith("zero3")
    assert "mixed_precision" not in config  # accelerate refuses it beside a file


@pytest.mark.parametrize("path", JSONS, ids=stem)
def test_deepspeed_reads_the_stage_and_the_offload_of_the_name(path):
    config = json.loads(path.read_text())
    zero = config["zero_optimization"]
    device = zero.get("offload_optimizer", {}).get("device", "none")
    assert (zero["stage"], device) == (int(path.stem[4]), "cpu" if path.stem.endswith("_offload") else "none")
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert not {"optimizer", "scheduler"} & config.keys()
    batch = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {config[name] for name in batch} == {"auto"}


@launches
def test_deepspeed_itself_accepts_every_json(tmp_path):
    """In a process of its own: importing DeepSpeed changes logging and warns."""
    (tmp_path / "read.py").write_text("""
import json, sys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
for path in sys.argv[1:]:
    zero = json.load(open(path))["zero_optimization"]
    known = {key: 1000 if value == "auto" else value for key, value in zero.items()}
    print("stage", int(DeepSpeedZeroConfig(**known).stage))
""")
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    codes, output = launch(tmp_path / "read.py", *JSONS, processes=1)
    assert codes == [0], output
    assert re.findall(r"^stage (\d)$", output, re.MULTILINE) == [path.stem[4] for path in JSONS]


@pytest.mark.parametrize("path", SCRIPTS, ids=stem)
def test_shell_scripts_are_bash_and_resume(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert f"run_scripts/launch/{path.name} run_scripts/" in text.splitlines()[1]
    assert "--resume_from_checkpoint true" in text
    assert os.access(path, os.X_OK)
