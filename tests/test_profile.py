"""Profiles of training steps: phases that add up, trainings that stay as they are, figures worked out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from launching import launch
from torch.utils.flop_counter import FlopCounterMode
from training_cases import SIZES, losses, tiny_examples, tiny_model, tiny_trainer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hf_fnl.cli import app
from hf_fnl.optim.product_decay import ProductDecay
from hf_fnl.planning.examples import random_examples
from hf_fnl.planning.flops import step_flops, structure_of
from hf_fnl.training.profiling import PHASES, Clock, Profile
from hf_fnl.training.profiling.profile import Settings

WORKER = Path(__file__).parent / "workers" / "profiled.py"
BERT = BertConfig(**SIZES)
IMAGES = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 5}
MODELS = {
    "pretraining": lambda: BertForPreTraining(BERT),
    "masked": lambda: BertForMaskedLM(BERT),
    "texts": lambda: BertForSequenceClassification(BERT),
    "causal": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=1, n_head=3, bos_token_id=1, eos_token_id=2)
    ),
    "translation": lambda: MarianMTModel(
        MarianConfig(
            vocab_size=61, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
            decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=16,
            pad_token_id=60, decoder_start_token_id=60, forced_eos_token_id=0,
        )
    ),
    "images": lambda: ViTForImageClassification(ViTConfig(**IMAGES, image_size=12, patch_size=4)),
}  # fmt: skip


def batch_of(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def clock_that_ticks() -> Clock:
    """A second passes at every look."""
    ticks = itertools.count()
    return Clock(torch.device("cpu"), now=lambda: next(ticks), elapsed=lambda first, second: second - first)


def test_every_moment_belongs_to_the_innermost_phase():
    clock = clock_that_ticks()
    clock.start()  # 0
    with clock.phase("forward"), clock.phase("decay"):  # 1, 2 .. 3, 4
        pass
    with clock.phase("backward"):  # 5 .. 7
        clock.since(clock.mark(), "communication")  # 6
    clock.end_step()  # 8
    with clock.phase("evaluation", whole=True), clock.phase("forward"):  # 9 .. 10
        pass
    clock.end_step()  # 11
    with clock.phase("forward"):
        pass
    first, second = clock.stop()
    assert first == {"rest": 3, "forward": 2, "decay": 1, "backward": 1, "communication": 1}
    assert second == {"rest": 2, "evaluation": 1}
    with clock.phase("forward"):
        assert not clock.runs


TRAININGS = {
    "flambe": {},
    "penalty": {
        "optim": "adamw_torch", "frobenius_decay": ["ov"], "frobenius_mode": "penalty", "gradient_accumulation_steps": 2
    },
    "decoupled": {"optim": "sgd", "frobenius_decay": ["ov", "embedding"]},
}  # fmt: skip


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_a_profiled_training_is_the_same_training(tmp_path, options, capsys):
    before = vars(ProductDecay)["take"], vars(ProductDecay)["term"]
    plain = tiny_trainer(tmp_path, **options)
    plain.train()
    profiled = tiny_trainer(tmp_path, profile_steps=3, profile_after=2, **options)
    profiled.train()
    assert losses(profiled) == losses(plain)
    assert (vars(ProductDecay)["take"], vars(ProductDecay)["term"]) == before
    assert "get_batch_samples" not in vars(profiled)
    check_record(json.loads((tmp_path / "profile.json").read_text()), profiled)
    assert "where the time goes" in capsys.readouterr().out


def check_record(found: dict, trainer) -> None:
    assert found["steps"] == 3
    assert sum(found["phases"].values()) == pytest.approx(found["seconds_per_step"])
    assert set(found["phases"]) == set(PHASES) - {"evaluation and saving"}
    assert all(found["phases"][name] > 0 for name in ("data", "forward", "backward", "decay", "optimizer", "rest"))
    assert found["phases"]["communication"] == 0
    tokens = 8 * 13 * trainer.args.gradient_accumulation_steps
    assert found["tokens_per_second"] == pytest.approx(tokens / found["seconds_per_step"])
    counted = step_flops(structure_of(tiny_model()), batch_of(tiny_examples(8)))
    times = trainer.args.gradient_accumulation_steps
    assert found["flops_per_step"] == pytest.approx(
        {"forward": times * counted.forward, "backward": times * counted.backward}, rel=0.1
    )
    flops = sum(found["flops_per_step"].values())
    assert found["flop_utilisation"] == pytest.approx(flops / found["seconds_per_step"] / found["matrix_rate"])
    assert found["note"] == ""


class _Breaks(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise RuntimeError("no more")


def test_what_breaks_a_training_leaves_no_clock_behind(tmp_path):
    trainer = tiny_trainer(tmp_path, profile_steps=9, profile_after=1)
    trainer.add_callback(_Breaks())
    before = ProductDecay.take
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert ProductDecay.take is before
    assert not (tmp_path / "profile.json").exists()


def test_a_short_training_is_profiled_as_far_as_it_goes_and_traced(tmp_path):
    trace = tmp_path / "traces" / "steps.json"
    trainer = tiny_trainer(tmp_path, profile_steps=2, profile_after=0, max_steps=3, profile_trace=str(trace))
    trainer.train()
    assert len(trainer.profiler.profile.steps) == 2
    assert json.loads(trace.read_text())["traceEvents"]
    trainer = tiny_trainer(tmp_path, profile_steps=9, profile_after=1, max_steps=3)
    trainer.train()
    assert len(trainer.profiler.profile.steps) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"profile_steps": -1}, "profile_steps must not be negative, got -1", id="negative"),
        pytest.param({"profile_steps": 2, "profile_after": 6}, "profile_after=6 is not below max_steps=6", id="after"),
        pytest.param({"profile_trace": "trace.json"}, "needs profile_steps", id="trace"),
    ],
)
def test_a_profile_of_nothing_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **options)


@pytest.mark.parametrize("kind", MODELS)
def test_made_up_examples_suit_the_model_and_operations_are_those_of_real_tensors(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    model.set_attn_implementation("eager")
    examples = random_examples(model, 3, 13)
    again = random_examples(model, 3, 13)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(examples, again, strict=True) for key in a)
    batch = batch_of(examples)
    structure = structure_of(model)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = step_flops(structure, batch)
    assert (counted.forward, counted.backward) == (forward.get_total_flops(), backward.get_total_flops())
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_activations_that_are_computed_again_are_not_counted():
    model, batch = MODELS["masked"](), batch_of(random_examples(MODELS["masked"](), 3, 13))
    plain = step_flops(structure_of(model), batch)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    assert step_flops(structure_of(model), batch) == plain


def test_examples_for_a_model_without_a_loss_or_with_fewer_positions_are_refused():
    with pytest.raises(ValueError, match="a BertModel computes no loss"):
        random_examples(BertModel(BERT), 1, 13)
    with pytest.raises(ValueError, match="sequence_length must be at most 16"):
        random_examples(BertForMaskedLM(BERT), 1, 17)


def profile_of(step: dict[str, float], **figures) -> Profile:
    settings = {key: figures.pop(key) for key in list(figures) if key in Settings.__dataclass_fields__}
    return Profile(
        settings=Settings(**{"dtype": "float32", "device": "cuda:0", **settings}), steps=[step], items=8, **figures
    )


@pytest.mark.parametrize(
    ("profile", "hints"),
    [
        pytest.param(profile_of({"forward": 4, "backward": 5, "data": 0.9}), [], id="nothing"),
        pytest.param(
            profile_of({"forward": 7, "data": 3}),
            ["data takes 30%: raise dataloader_num_workers, which is 0"],
            id="data",
        ),
        pytest.param(
            profile_of({"forward": 7, "data": 3}, workers=4),
            ["data takes 30%: prepare the data before the training, or raise dataloader_num_workers, which is 4"],
            id="data-with-workers",
        ),
        pytest.param(profile_of({"forward": 1}, padding=0.4), ["40% of the tokens are padding: pack"], id="padding"),
        pytest.param(profile_of({"forward": 3, "decay": 1}), ["decay takes 25%: lower ranks"], id="decay"),
        pytest.param(
            profile_of({"forward": 3, "decay": 1}, penalty=True),
            ["decay takes 25%: frobenius_mode=decoupled"],
            id="penalty",
        ),
        pytest.param(
            profile_of({"forward": 1, "optimizer": 1, "communication": 1, "rest": 1}),
            ["the optimizer takes 25%", "communication takes 25%", "25% is neither"],
            id="several",
        ),
        pytest.param(
            profile_of({"forward": 1}, flops={"forward": 8.0}, rate=100.0),
            ["FLOP utilisation is 8%: a larger batch, bf16, torch_compile"],
            id="use",
        ),
        pytest.param(
            profile_of({"forward": 1}, flops={"forward": 8.0}, rate=100.0, dtype="bfloat16", compiled=True),
            ["FLOP utilisation is 8%: a larger batch; ranks"],
            id="use-of-what-is-fast",
        ),
    ],
)
def test_hints_follow_from_the_figures(profile, hints):
    assert len(profile.advice()) == len(hints)
    assert all(found.startswith(hint) for found, hint in zip(profile.advice(), hints, strict=True))


def cli(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["profile", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.output


def test_the_command_profiles_a_configuration_at_ranks(tmp_path):
    config = tmp_path / "model"
    BertForPreTraining(BERT).save_pretrained(config)
    flags = "--batch 3 --length 11 --steps 2 --warmup 1 --ffn_rank 7 --frobenius-decay ov,linear --bf16"
    shown = cli(config, *flags.split(), "--json", tmp_path / "out" / "profile.json")
    assert all(phase in shown for phase in PHASES if phase != "evaluation and saving")
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["ranks"]["ffn_rank"] == 7
    assert found["steps"] == 2
    assert found["tokens_per_second"] == pytest.approx(33 / found["seconds_per_step"])
    assert found["phases"]["decay"] > 0
    assert found["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        pytest.param(("nothing-here",), "there is no folder nothing-here, and the Hub", 1, id="model"),
        pytest.param(("bert-base", "--device", "tpu"), "device must be cpu or cuda, got 'tpu'", 2, id="device"),
        pytest.param(("bert-base", "--ffn_rank", "769"), "--ffn-rank must be in [1, 768], got 769", 1, id="rank"),
        pytest.param(("bert-base", "--frobenius-mode", "loose"), "got 'loose'", 2, id="mode"),
        pytest.param(("bert-base", "--optim", "adamv"), "adamv", 2, id="optimizer"),
    ],
)
def test_bad_input_is_refused_with_a_reason(arguments, message, code):
    assert message in cli(*arguments, code=code)


def test_two_processes_see_what_they_wait_for(tmp_path):
    """Under DDP and FSDP2; the losses are those of a training without a profile."""
    codes, output = launch(WORKER, str(tmp_path))
    assert codes == [0, 0], output
    for engine in ("ddp", "fsdp2"):
        found = json.loads((tmp_path / engine / "profile.json").read_text())
        assert found["settings"]["processes"] == 2
        assert sum(found["phases"].values()) == pytest.approx(found["seconds_per_step"])
        assert 0 < found["phases"]["communication"] < found["seconds_per_step"]
        assert found["note"] == ""
        first, second = json.loads((tmp_path / f"{engine}.json").read_text())
        assert first == second
