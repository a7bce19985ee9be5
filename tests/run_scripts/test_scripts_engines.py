"""The scripts under FSDP2 and ZeRO-3, as launchers start them, give the losses, weights and texts of one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import tiny_gpt2
from launching import accelerate_launch, launches
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import hf_fnl
from hf_fnl import find_products
from hf_fnl.optim import parameter_groups
from hf_fnl.scripts import pretrain_bert, train_clm, train_translation, train_vision
from hf_fnl.tasks.beam_search import translate
from hf_fnl.tasks.tokenization import load_tokenizer

pytestmark = launches

ROOT = Path(__file__).parents[2]
QUIET = "--use_cpu --report_to none --disable_tqdm true --logging_steps 1"
SIZE = "--vocab_size 300 --max_documents 12 --ov_rank 5 --ffn_rank 7 --embedding_rank 11 --weight_decay 0.1 --dropout 0"
RUNS = {
    "pretrain_bert": f"""{SIZE} --hidden_size 24 --num_hidden_layers 2 --num_attention_heads 3 --intermediate_size 40
        --max_position_embeddings 32 --max_seq_length 24 --max_steps 3 --learning_rate 0.01
        --save_steps 1 --max_grad_norm 0 --validation_dataset embedded --max_validation_documents 2""",
    "train_clm": f"""{SIZE} --n_embd 24 --n_layer 2 --n_head 3 --n_positions 32 --max_steps 3 --learning_rate 0.01
        --save_strategy no --frobenius_decay ov --validation_dataset embedded --validation_split train
        --max_validation_documents 2 --eval_strategy steps --eval_steps 2""",
    "train_translation": """--hidden_size 24 --num_attention_heads 3 --encoder_layers 1 --decoder_layers 1
        --intermediate_size 40 --vocab_size 300 --rank_scale 0.5 --max_train_pairs 40 --max_validation_pairs 10
        --max_test_pairs 3 --max_steps 4 --max_tokens 128 --num_beams 2 --save_steps 2
        --learning_rate 0.03 --warmup_steps 1""",
    "train_vision": """--model resnet20 --width 4 --rank_scale 0.3 --decay frobenius --max_steps 3
        --per_device_eval_batch_size 100 --eval_strategy no --save_strategy no""",
}
LAUNCHES = {"fsdp2": ("train_translation", "train_vision"), "zero3": ("pretrain_bert", "train_clm")}
ENGINES = {"fsdp2": "DistributedType.FSDP", "zero3": "DistributedType.DEEPSPEED"}
ALIKE_IN_ONE_PROCESS = {"pretrain_bert": pretrain_bert, "train_clm": train_clm}
MEASURES = ("train_loss", "eval_mlm_loss", "eval_nats_per_token")


def flags(script: str, folder: Path, batch_size: int) -> list[str]:
    batch = f"--per_device_train_batch_size {batch_size} --per_device_eval_batch_size 8 --output_dir {folder / script}"
    start = f"--init_from {folder.parent / 'start'}" if script == "pretrain_bert" else ""
    strategy = "--save_strategy steps" if "--save_strategy" not in RUNS[script] else ""
    return f"{batch} {strategy} {start} {QUIET} {RUNS[script]}".split()


def run_under(engine: str, folder: Path) -> None:
    """Run all scripts in two processes, by the configuration of an engine."""
    (folder / "runs.json").write_text(json.dumps({script: flags(script, folder, 4) for script in LAUNCHES[engine]}))
    config = ["--config_file", str(ROOT / "run_scripts" / "launch" / f"{engine}.yaml"), "--num_processes", "2"]
    config += ["--mixed_precision", "no"] if engine == "fsdp2" else []
    accelerate_launch(*config, str(ROOT / "tests/support/workers/script_runs.py"), str(folder / "runs.json"))
    for script in LAUNCHES[engine]:  # accelerate takes another engine without a word where it cannot have one
        found = [path.read_text() for path in sorted((folder / script).glob("engine-*.json"))]
        assert found == [json.dumps((ENGINES[engine], 2))] * 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("scripts")
    start = RUNS["pretrain_bert"].replace("--max_steps 3", "--max_steps 1")
    pretrain_bert.main(f"{start} {QUIET} --output_dir {root / 'start'}".split())
    for engine in LAUNCHES:
        (root / engine).mkdir()
        run_under(engine, root / engine)
    for script, module in ALIKE_IN_ONE_PROCESS.items():
        module.main(flags(script, root / "one", 8))
    return root


def losses(folder: Path) -> dict[str, float]:
    """What a run says of its training and its last evaluation."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return {measure: metrics[measure] for measure in MEASURES if measure in metrics}


@pytest.mark.parametrize(("script", "count"), [("pretrain_bert", 2), ("train_clm", 2)])
def test_a_script_under_zero3_is_what_it_is_in_one_process(root, script, count):
    here, one = root / "zero3" / script, root / "one" / script
    assert losses(here) == pytest.approx(losses(one), rel=1e-5)  # sums of some hundred losses in float32
    assert len(losses(here)) == count
    weights, expected = (load_file(folder / "model.safetensors") for folder in (here, one))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # AdamW moves a weight whose gradient is hardly more than rounding by a share of the learning rate, 0.01.
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=5e-5)


def test_checkpoints_of_a_model_that_went_on_have_its_names(root):
    """By which they are put back; Transformers would give old names to a model that was loaded under ZeRO-3."""
    checkpoint = root / "zero3" / "pretrain_bert" / "checkpoint-1"
    model = hf_fnl.load(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() <= model.state_dict().keys()


def test_translations_are_those_of_the_saved_model_in_one_process(root):
    folder = root / "fsdp2" / "train_translation"
    sources = list(train_translation.DataOptions(max_test_pairs=3).load("test")["source"])
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    found = translate(model, load_tokenizer(folder), sources, num_beams=2)
    assert (folder / "translations.txt").read_text() == "".join(f"{text}\n" for text in found)


def test_a_vision_model_is_whole(root):
    folder = root / "fsdp2" / "train_vision"
    model = hf_fnl.load(folder)
    assert losses(folder)["train_loss"] > 0
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


def test_a_model_that_zero3_made_has_the_products_and_groups_of_a_whole_one():
    """Its parameters are empty when the optimizer is built."""
    whole, emptied = tiny_gpt2(), tiny_gpt2()
    for parameter in emptied.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    products = find_products(whole, ["ov", "qk"])
    assert find_products(emptied, ["ov", "qk"]) == products
    for factor_decay in ("weight", "crs"):
        options = {"weight_decay": 0.1, "products": products, "factor_decay": factor_decay}
        groups = [parameter_groups(model, **options) for model in (whole, emptied)]
        names = [[([n for n, _ in each["params"]], each["weight_decay"]) for each in found] for found in groups]
        assert names[0] == names[1]


@pytest.mark.parametrize("option", ["overcomplete", "pruning"])
@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_vision_options_that_change_a_held_model_are_refused(option, engine):
    session = object.__new__(train_vision.Session)
    session.options = SimpleNamespace(**{"overcomplete": None, "pruning": None, option: "chosen"})
    enabled = {"is_fsdp_enabled": engine == "fsdp", "is_deepspeed_enabled": engine == "deepspeed"}
    with pytest.raises(ValueError, match=f"{option}=chosen changes weights .* train with DDP"):
        session._check_engine(SimpleNamespace(**enabled))
    session._check_engine(SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False))
