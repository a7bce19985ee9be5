"""A process killed under torchrun costs some steps and nothing else; one process goes on with what two have begun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pretrain_bert
import pytest
from transformers import trainer

from benchmarks.fault_worker import Recorder
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.tokenization import train_wordpiece

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("elastic")

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "workers" / "fault_elastic.py"
STEPS, SAVE_STEPS, LOST_AT = 11, 3, 6
FLAGS = f"""
    --max_documents 12 --hidden_size 24 --num_hidden_layers 1 --num_attention_heads 3 --intermediate_size 40
    --max_position_embeddings 16 --qk_rank 5 --ov_rank 6 --ffn_rank 7 --dropout 0 --phases 16 --max_steps {STEPS}
    --learning_rate 0.01 --logging_steps 1 --save_steps {SAVE_STEPS} --resume_from_checkpoint true
    --use_cpu --report_to none --disable_tqdm true
""".split()

LAUNCH = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
    "--max-restarts=3",
    "--monitor-interval=0.1",
]


def flags(folder: Path, tokenizer: Path, batch_size: int, *more: str) -> list[str]:
    places = ["--output_dir", str(folder), "--tokenizer", str(tokenizer)]
    return [*FLAGS, *places, "--per_device_train_batch_size", str(batch_size), *more]


def curve(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "phase-1" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def events(folder: Path, name: str) -> list[int]:
    lines = [json.loads(line) for line in (folder / "events-0.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(embedded_documents()[:12], vocab_size=300, lowercase=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    pretrain_bert.main(flags(folder, tokenizer, 8, "--save_strategy", "no"))
    return curve(folder)


@pytest.fixture(scope="module")
def elastic(tokenizer, tmp_path_factory):
    """The folder of a run by two processes, the first of which was killed once."""
    folder = tmp_path_factory.mktemp("elastic")
    command = [sys.executable, *LAUNCH, str(WORKER), *flags(folder, tokenizer, 4, "--async_save", "true")]
    # As in run_scripts/launch/elastic.sh.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **store, "OMP_NUM_THREADS": "1", "FAULTS_FOLDER": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(elastic):
    begins, steps = events(elastic, "begin"), events(elastic, "step")
    # The checkpoint of the step at which it was killed was on its way: it may be there whole, or not at all.
    assert begins[0] == 0
    assert begins[1:] in ([LOST_AT - SAVE_STEPS], [LOST_AT])
    assert len(steps) - STEPS == LOST_AT - begins[1]


def test_a_run_that_lost_a_process_has_the_curve_of_an_undisturbed_one(elastic, undisturbed):
    assert curve(elastic) == pytest.approx(undisturbed, rel=1e-4)


def test_one_process_goes_on_with_what_two_have_begun(elastic, undisturbed, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Recorder])
    monkeypatch.setenv("FAULTS_FOLDER", str(tmp_path))
    begun = shutil.copytree(elastic, tmp_path / "begun")
    shutil.rmtree(begun / "phase-1" / f"checkpoint-{STEPS}")
    (begun / "phase-1" / "trainer_state.json").unlink()
    pretrain_bert.main(flags(begun, tokenizer, 8, "--async_save", "true"))
    assert events(tmp_path, "begin") == [STEPS // SAVE_STEPS * SAVE_STEPS]
    assert curve(begun) == pytest.approx(undisturbed, rel=1e-4)
