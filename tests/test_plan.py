"""What a run costs: formulas against figures worked out by hand, plans against what real models and processes do."""

from __future__ import annotations

import json
import math

import pytest
import torch
from traffic_cases import BATCH, LENGTH, planned, traffic_examples, traffic_model
from transformers import BertConfig, BertForPreTraining
from typer.testing import CliRunner

from benchmarks.themes.sharded import MARGIN, count
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining, FactorizedGPT2Config, FactorizedGPT2LMHeadModel
from hf_fnl.cli import app
from hf_fnl.planning import (
    ENGINES,
    GIB,
    Message,
    Setup,
    facts_of,
    memory_of,
    meta_model,
    plan,
    plan_of,
    smallest_engine,
)
from hf_fnl.planning.facts import counted

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("plan")

# With dropout, the CPU's attention keeps all of its weights, and its masks are numbers of the width of what they mask.
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SMALL = {
    "vocab_size": 307,
    "hidden_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 112,
    "max_position_embeddings": 32,
    **NO_DROPOUT,
}
CASES = ("ddp/1/fp32/flambe", "fsdp2/2/bf16/flambe", "zero1/2/fp32/flambe", "zero2/2/bf16/lamb", "zero3/2/bf16/flambe")


def bert(device: str = "meta", **sizes):
    with torch.device(device):
        return FactorizedBertForPreTraining(FactorizedBertConfig(**{**SMALL, **sizes}))


def gpt2(device: str = "meta"):
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 307, "n_positions": 32, "n_embd": 60, "n_layer": 3, "n_head": 3, "ffn_rank": 26}
    config = FactorizedGPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        return FactorizedGPT2LMHeadModel(config)


def stock(device: str = "meta"):
    with torch.device(device):
        return BertForPreTraining(BertConfig(**SMALL))


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        pytest.param("all_reduce", 2 * 700 * 6 / 7, id="all-reduce"),
        pytest.param("all_gather", 700 * 6 / 7, id="all-gather"),
        pytest.param("reduce_scatter", 700 * 6 / 7, id="reduce-scatter"),
    ],
)
def test_a_ring(collective, sent):
    assert Message("any", collective, 700, 7).sent == pytest.approx(sent)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        pytest.param("bert-base", 110_106_428, id="bert-base"),
        pytest.param("bert-large", 336_226_108, id="bert-large"),
        pytest.param("gpt2", 124_439_808, id="gpt2"),
        pytest.param("gpt2-xl", 1_557_611_200, id="gpt2-xl"),
    ],
)
def test_presets_have_the_sizes_of_the_published_models_and_no_values(name, parameters):
    model = meta_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(tensor.is_meta for tensor in model.parameters())


def test_a_folder_or_a_configuration_is_a_model_too(tmp_path):
    stock("cpu").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert type(meta_model(str(tmp_path))) is BertForPreTraining
    factorized = meta_model(str(tmp_path / "config.json"), ffn_rank=26)
    assert type(factorized) is FactorizedBertForPreTraining
    assert factorized.config.ffn_rank == 26


@pytest.mark.parametrize("build", [bert, gpt2, stock], ids=["bert", "gpt2", "stock-bert"])
def test_activations_are_those_that_a_real_model_keeps(build):
    torch.manual_seed(0)
    model = build("cpu").train()
    rows = traffic_examples(LENGTH)[:BATCH]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    if build is not gpt2:
        batch["next_sentence_label"] = torch.stack([row["next_sentence_label"] for row in rows])
    with counted(model) as kept:
        model(**batch)
    setup = Setup(
        dtype="fp32", batch_size=BATCH, sequence_length=LENGTH, labelled_share=2 / LENGTH, frobenius_decay=("ov",)
    )
    facts = facts_of(build(), setup)
    assert facts.activations == pytest.approx(kept.total, rel=0.02)
    assert facts.layer_activations == pytest.approx(tuple(kept.layers), rel=0.02)


def test_a_dense_layer_keeps_what_is_counted_by_hand():
    """8 hidden states (input, q, k, v, heads, two sums, a LayerNorm), 2 feed-forward ones, masks, sums; all in fp32."""
    batch, length, hidden, inner, heads = 8, 32, 60, 112, 3
    facts = facts_of(bert(hidden_dropout_prob=0.1), Setup(dtype="fp32", batch_size=batch, sequence_length=length))
    tokens = batch * length
    states = 4 * tokens * (8 * hidden + 2 * inner)
    masks, norms, softmax = 2 * tokens * hidden, 2 * 2 * 4 * tokens, 4 * batch * heads * length
    assert facts.layer_activations[1] == pytest.approx(states + masks + norms + softmax, rel=1e-3)


def test_operations_of_a_dense_layer_are_two_for_each_parameter_and_token():
    setup = Setup(dtype="fp32", batch_size=8, sequence_length=32)
    one, two = (facts_of(bert(num_hidden_layers=n), setup).forward_flops for n in (1, 2))
    matrices, attention = 4 * 60 * 60 + 2 * 60 * 112, 2 * 32 * 60
    assert two - one == 2 * 8 * 32 * (matrices + attention)


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    setup = Setup(dtype="fp32", checkpointing=True)
    facts = facts_of(meta_model("bert-base"), setup)
    rest = facts.activations - sum(facts.layer_activations)
    hidden_states = 12 * 4 * 8 * 128 * 768
    assert memory_of(facts, setup).activations == rest + hidden_states + facts.layer_activations[0]


def test_one_gpu_in_fp32_holds_sixteen_bytes_a_parameter_and_sends_nothing():
    found = plan(bert, Setup(dtype="fp32", sequence_length=32))
    held, parameters = found.memory, found.facts.parameters
    assert held.parameters + held.gradients + held.optimizer == 16 * parameters
    assert found.messages == ()


def test_zero_divides_twelve_bytes_a_parameter():
    found = plan(bert, Setup(engine="zero1", gpus=7, sequence_length=32))
    assert found.memory.optimizer == pytest.approx(12 * found.facts.parameters / 7, rel=1e-3)
    assert found.memory.parameters == found.memory.gradients == 2 * found.facts.parameters


def test_hsdp_on_one_machine_is_fsdp2():
    first, second = (plan(bert, Setup(engine=engine, gpus=8, sequence_length=32)) for engine in ("hsdp", "fsdp2"))
    assert first.messages == second.messages
    assert first.memory == second.memory


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "ddp"])
def test_grams_do_not_grow_with_the_hidden_or_intermediate_size(engine):
    sizes = ({}, {"hidden_size": 120}, {"intermediate_size": 336})
    grams = []
    for more in sizes:
        setup = Setup(engine=engine, gpus=4, gpus_per_node=2, sequence_length=32, frobenius_decay=("ov", "linear"))
        found = plan(lambda more=more: bert(ov_rank=11, ffn_rank=26, **more), setup)
        grams.append(next(message.payload for message in found.messages if message.purpose == "Grams"))
    assert grams == [4 * 3 * (2 * 3 * 11**2 + 4 * 26**2)] * 3


def test_the_number_of_gpus_may_change_without_looking_at_the_model_again():
    setup = Setup(engine="fsdp2", gpus=8, sequence_length=32)
    facts = facts_of(bert(), Setup(engine="fsdp2", gpus=3, sequence_length=32))
    assert plan_of(facts, setup).as_dict() == plan(bert, setup).as_dict()


def test_the_smallest_engine_is_the_first_that_fits():
    setup = Setup(gpus=8, sequence_length=32)
    peaks = {}
    for engine in ENGINES:
        other = Setup(engine=engine, gpus=8, sequence_length=32)
        peaks[engine] = memory_of(facts_of(bert(), other), other).total
    limit = peaks["zero2"] / 0.9 + 1
    expected = next(engine for engine in ENGINES if peaks[engine] <= 0.9 * limit)
    assert smallest_engine(bert, setup, limit) == expected
    assert expected != "ddp"
    assert smallest_engine(bert, setup, 0.1) is None


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    return count(tmp_path_factory.mktemp("traffic"), CASES, timeout=200)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_hand_over_what_the_plan_says(traffic, case):
    given = traffic[case]["given"]
    payloads: dict[str, float] = dict.fromkeys(given, 0.0)
    for message in planned(case).messages:
        payloads[message.collective] += message.payload
    assert payloads == pytest.approx(given, abs=MARGIN)
    engine = case.split("/")[0]
    kind = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(engine, "DEEPSPEED")
    assert traffic[case]["distributed_type"] == f"DistributedType.{kind}"


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("flambe") and not case.startswith("ddp")])
def test_the_optimizer_itself_counts_what_the_plan_says(traffic, case):
    sent = traffic[case]["optimizer"]
    plans = {message.purpose: message.payload for message in planned(case).messages}
    assert sent["grams"] == plans["Grams"]
    assert sent.get("cuts", 0) == plans.get("cut heads and rows", 0)


def cli(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.output


def test_the_command_prints_the_same_plan_as_json():
    flags = ("--gpus", "8", "--engine", "zero2", "--batch_size", "4", "--sequence-length", "64", "--ffn_rank", "192")
    printed = json.loads(cli("bert-base", *flags, "--memory", "16", "--json"))
    setup = Setup(engine="zero2", gpus=8, batch_size=4, sequence_length=64)
    found = plan(lambda: meta_model("bert-base", ffn_rank=192), setup, limit=16 * GIB)
    assert printed == {**printed, **json.loads(json.dumps(found.as_dict()))}
    assert printed["smallest_engine"] == "ddp"


def test_the_command_prints_tables():
    shown = cli("gpt2", "--nodes", "2", "--gpus_per_node", "4", "--engine", "hsdp", "--memory", "80")
    for part in (
        "hsdp on 8 GPUs",
        "at the peak",
        "gradients of replicas",
        "all_reduce of 2",
        "decay",
        "fits into 80 GiB",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        pytest.param(("nothing-here",), "there is no folder nothing-here, and the Hub", 1, id="model"),
        pytest.param(("bert-base", "--engine", "fsdp1"), "engine must be one of ddp, zero1", 2, id="engine"),
        pytest.param(("bert-base", "--sequence_length", "513"), "sequence_length must be at most 512", 1, id="length"),
        pytest.param(("bert-base", "--ffn_rank", "769"), "--ffn-rank must be in [1, 768], got 769", 1, id="rank"),
        pytest.param(("marian", "--engine", "hsdp", "--gpus", "12"), "hsdp needs whole machines", 2, id="hsdp"),
        pytest.param(("gpt2", "--offload"), "offload needs another engine", 2, id="offload"),
        pytest.param(("gpt2", "--frobenius-decay", "conv"), "has no product of kind conv", 1, id="products"),
    ],
)
def test_bad_input_is_refused_with_a_reason(arguments, message, code):
    assert message in cli(*arguments, code=code)


def test_memory_is_the_larger_of_the_backward_pass_and_the_step():
    held = plan(bert, Setup(sequence_length=32)).memory
    resident = held.parameters + held.gradients + held.optimizer
    assert held.total == resident + max(held.activations + held.buffers, held.workspace)
    assert math.isclose(held.workspace, held.parameters)


def test_a_traffic_model_has_heads_that_two_processes_cannot_share():
    assert traffic_model("meta").config.num_attention_heads % 2
