"""Phases of pretraining: what may be written, the arguments that follow, and what does not fit."""

from __future__ import annotations

import re

import pretrain_bert
import pytest

from hf_fnl.tasks.pretraining_phases import Phase, describe_phase, plan_phases
from hf_fnl.training import FLAMBeTrainingArguments
from hf_fnl.training.command_line import parse_arguments

NVIDIA = ["128:7038:6e-3:0.2843:65536", "512:1563:4e-3:0.128:32768"]


def arguments(folder, processes: int = 1, **options) -> FLAMBeTrainingArguments:
    args = FLAMBeTrainingArguments(str(folder), use_cpu=True, report_to=[], **options)
    if processes > 1:

        class Several(type(args)):
            world_size = processes

        args.__class__ = Several
    return args


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("128", (128, None, None, None, None)),
        ("512:1563:4e-3:0", (512, 1563, 4e-3, 0, None)),
        ("512:1563:4e-3:0.128:32768", (512, 1563, 4e-3, 0.128, 32768)),
        ("512::::64", (512, None, None, None, 64)),
        ("512:9::0.1", (512, 9, None, 0.1, None)),
    ],
)
def test_fields_of_a_phase_may_be_left_out(text, fields):
    phase = Phase.parse(text)
    assert (phase.length, phase.steps, phase.learning_rate, phase.warmup, phase.batch) == fields


@pytest.mark.parametrize("phases", ["[16:3, '24:20:1e-3:0.5:64']", "16:3", "\n- 16:3\n- 24:20:1e-3:0.5:64"])
def test_phases_of_a_file_are_what_is_written_there(tmp_path, phases):
    """To YAML 1.1 the bare word 16:3 is the number 963."""
    (tmp_path / "config.yaml").write_text(f"output_dir: run\nuse_cpu: true\nphases: {phases}\n")
    kinds = (pretrain_bert.ModelOptions, pretrain_bert.DataOptions, pretrain_bert.TextTrainingArguments)
    _, data, args = parse_arguments([str(tmp_path / "config.yaml")], *kinds)
    assert [own.max_steps for _, own in plan_phases(data.phases, args)[:1]] == [3]


@pytest.mark.parametrize("text", ["", ":7", "16:three", "16:3:fast", "16:3:1e-3:2:64:5", "16:2.5", "16:3:1e-3:2:6.5"])
def test_what_is_no_phase_is_refused(text):
    message = f"phases: expected length[:steps[:learning_rate[:warmup[:batch]]]], got {text!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Phase.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "length must be above 0"),
        ("16:-3", "steps must be above 0"),
        ("16:0", "steps must be above 0"),
        ("16:3:0", "learning_rate must be above 0"),
        ("16:3:nan", "learning_rate must be above 0"),
        ("16:3:inf", "learning_rate must be above 0"),
        ("16:3:1e-3:-1", "warmup must be at least 0"),
        ("16:30:1e-3:2.5", "warmup must be a number of steps or a share below 1"),
        ("16:3:1e-3:1:0", "batch must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=f"phases: {message}, got '{text}'"):
        Phase.parse(text)


@pytest.mark.parametrize(
    ("processes", "per_device", "accumulations"), [(8, 64, [128, 64]), (1, 32, [2048, 1024]), (1536, 1, None)]
)
def test_nvidias_recipe_on_so_many_processes(tmp_path, processes, per_device, accumulations):
    options = {"lr_scheduler_type": "polynomial", "lr_power": 0.5, "per_device_train_batch_size": per_device}
    args = arguments(tmp_path, processes, **options)
    if accumulations is None:
        with pytest.raises(ValueError, match=f"{NVIDIA[0]} must be a multiple of 1536, .* 1536 devices take at once"):
            plan_phases(NVIDIA, args)
        return
    (first, one), (second, two) = plan_phases(NVIDIA, args)
    assert [own.gradient_accumulation_steps for own in (one, two)] == accumulations
    assert [own.max_steps for own in (one, two)] == [7038, 1563]
    assert [own.learning_rate for own in (one, two)] == [6e-3, 4e-3]
    assert [own.get_warmup_steps(own.max_steps) for own in (one, two)] == [2001, 201]
    assert [own.output_dir for own in (one, two)] == [str(tmp_path / f"phase-{number}") for number in (1, 2)]
    assert (
        f"phase-1: 7,038 updates of 65,536 sequences of 128 tokens ({processes} device{'s' * (processes > 1)} x"
        in describe_phase(one, first)
    )
    assert f"x {accumulations[1]:,} accumulated), rate 0.004, warm-up 0.128" in describe_phase(two, second)
    assert (args.max_steps, args.gradient_accumulation_steps, args.warmup_steps) == (-1, 1, 0)  # left as they were


@pytest.mark.parametrize(
    ("phases", "options", "message"),
    [
        (["16:20:1e-3:20"], {}, "16:20:1e-3:20 has 20 steps, and its warmup is 20"),
        (["16:9", "24:4"], {"warmup_steps": 5}, "24:4 has 4 steps, and warmup_steps, .* is 5"),
        (["16"], {"warmup_steps": 5, "max_steps": 5}, "16 has 5 steps, and warmup_steps, .* is 5"),
        (["16:9:1e-3:1:12"], {}, "16:9:1e-3:1:12 must be a multiple of 8, .* per_device_train_batch_size=8"),
        (["16::::4"], {}, "the batch of 16::::4 must be a multiple of 8"),
        (["16::::16"], {"gradient_accumulation_steps": 2}, "leave out gradient_accumulation_steps, got 2"),
        ([], {}, "expected length.* at least once"),
    ],
)
def test_phases_that_do_not_fit_are_refused(tmp_path, phases, options, message):
    with pytest.raises(ValueError, match=f"phases: .*{message}"):
        plan_phases(phases, arguments(tmp_path, **options))


def test_each_phase_is_trained_with_its_own_warm_up_and_batch(tmp_path, capsys):
    flags = f"""
        --vocab_size 300 --max_documents 12 --hidden_size 24 --num_hidden_layers 1 --num_attention_heads 3
        --max_position_embeddings 32 --use_cpu --report_to none --disable_tqdm true --logging_steps 1 --save_strategy no
        --phases 16:4:0.008:0.5:8 24:3:0.004:1:4 --lr_scheduler_type polynomial --lr_power 0.5
        --per_device_train_batch_size 2 --output_dir {tmp_path}
    """
    metrics = pretrain_bert.main(flags.split())
    rates, seen = {}, {}
    for number in (1, 2):
        state = (tmp_path / f"phase-{number}" / "trainer_state.json").read_text()
        rates[number] = [float(rate) for rate in re.findall(r'"learning_rate": ([\d.e-]+)', state)]
        seen[number] = (
            metrics[f"phase-{number}"]["train_runtime"] * metrics[f"phase-{number}"]["train_samples_per_second"]
        )
    assert rates[1] == pytest.approx([0.008 / 2, *[0.008 * (1 - n / 4) ** 0.5 for n in (2, 3, 4)]])
    assert rates[2] == pytest.approx([0.004 * (1 - n / 3) ** 0.5 for n in (1, 2, 3)])
    assert [round(count) for count in seen.values()] == [32, 12]
    assert (
        "phase-2: 3 updates of 4 sequences of 24 tokens (1 device x 2 sequences x 2 accumulated)"
        in capsys.readouterr().out
    )
