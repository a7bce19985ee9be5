"""Models made or loaded by two processes are those of one, in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from init_cases import CASES
from launching import launch
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from hf_fnl.models.draws import Draws, matrix_cost
from hf_fnl.models.sharded_init import initialize_
from hf_fnl.training.building import build

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("sharded init")

WORKER = Path(__file__).parent / "workers" / "init_runs.py"
LAYOUTS = ("zero3", "ddp", "fsdp2", "fsdp2-parts-sent")
MADE = [f"{layout} {case}" for layout in LAYOUTS for case in CASES] + [
    f"zero3-from-config {case}" for case in CASES if case != "surgery"
]
STOCK = {
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(vocab_size=53, d_model=24, d_kv=8, d_ff=44, num_layers=2, num_heads=3),
    ),
    "vit": (
        ViTForImageClassification,
        lambda: ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=44, image_size=32
        ),
    ),
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes wrote."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    _, output = launch(WORKER, str(folder))
    files = [folder / f"facts-{rank}.json" for rank in range(2)]
    assert all(file.is_file() for file in files), output
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("run", MADE)
def test_two_processes_make_the_model_of_one_bit_by_bit(facts, run):
    kept = [fact[run]["difference"] for fact in facts if not fact[run]["meta"]]
    assert kept == ([0.0] if "parts-sent" in run else [0.0, 0.0])


@pytest.mark.parametrize("run", MADE)
def test_the_random_stream_goes_on_as_in_one_process(facts, run):
    assert [fact[run]["stream"] for fact in facts] == [True, True]


@pytest.mark.parametrize("run", MADE)
def test_what_is_frozen_stays_so(facts, run):
    assert [fact[run]["trained"] for fact in facts] == [True, True]


@pytest.mark.parametrize("run", MADE)
def test_processes_share_the_decompositions(facts, run):
    ours, theirs = (fact[run]["decompositions"] for fact in facts)
    # A head takes two of those that are counted, a matrix one.
    assert abs(ours - theirs) <= 3
    assert min(ours, theirs) > 0


@pytest.mark.parametrize("case", CASES)
def test_zero3_divides_every_parameter(facts, case):
    assert [fact[f"zero3 {case}"]["partitioned"] for fact in facts] == [True, True]


@pytest.mark.parametrize("case", CASES)
def test_only_the_first_process_keeps_what_accelerate_sends(facts, case):
    assert [fact[f"fsdp2-parts-sent {case}"]["meta"] for fact in facts] == [False, True]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("case", ["bert", "gpt2", "surgery"])
def test_the_engine_takes_the_model_over(facts, case, engine):
    prepared = [fact[f"prepared {case}"] for fact in facts]
    assert [fact[f"{engine}-weights"] for fact in prepared] == [0.0, 0.0]
    assert max(fact[engine] for fact in prepared) < 2e-6
    assert all(fact["fsdp2-divided"] for fact in prepared)


def test_a_process_holds_its_part_and_a_few_layers(facts):
    for fact in facts:
        memory = fact["memory"]
        # The model has 24 layers. A layer's dense matrices are larger than its factors.
        assert memory["peak"] - memory["model"] / 2 < 5 * memory["layer"]


@pytest.mark.parametrize("case", CASES)
def test_loading_divides_what_was_saved_and_decomposes_nothing(facts, case):
    for fact in facts:
        loaded = fact[f"loaded {case}"]
        assert (loaded["difference"], loaded["partitioned"], loaded["decompositions"]) == (0.0, True, 0)
    assert facts[0][f"loaded {case}"]["parts-sent"] == 0.0


@pytest.mark.parametrize(
    ("attempt", "part"),
    [
        ("from_dense", "from_dense needs whole parameters, but those of this FactorizedBertForMaskedLM are divided"),
        ("factorize_", "factorize_ needs whole parameters"),
        ("merge", "merge needs whole parameters"),
        ("ranks", "intermediate.dense.U has shape (32, 8) in the checkpoint and (32, 7) in the model"),
        ("form", "intermediate.dense.V where the model holds"),
    ],
)
def test_what_cannot_be_done_is_said_by_every_process(facts, attempt, part):
    for fact in facts:
        assert part in fact["errors"][attempt]


def test_a_process_that_fails_stops_the_others(facts):
    said = [fact["errors"]["one-fails"] for fact in facts]
    assert said == [
        "RuntimeError: another process could not decompose what it drew; its own error says why",
        "ValueError: cannot decompose",
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_process_builds_what_the_class_makes(case):
    expected, state = case.alone()
    torch.manual_seed(0)
    model = build(case.model_class, case.config(), factorize=case.factorize)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_model_on_the_meta_device_gets_its_weights(case):
    expected, _ = case.alone()
    with torch.device("meta"):
        model = case.model_class(case.config())
    if case.factorize is not None:
        case.factorize(model)
    torch.manual_seed(0)
    initialize_(model)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in expected.named_parameters()}


@pytest.mark.parametrize(("model_class", "config"), STOCK.values(), ids=STOCK)
def test_stock_models_are_drawn_in_any_order(model_class, config):
    torch.manual_seed(0)
    expected, state = dict(model_class(config()).named_parameters()), torch.get_rng_state()
    torch.manual_seed(0)
    draws = Draws(lambda: model_class(config()))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [draws.draw(group) for group in reversed(draws.groups)]
    torch.testing.assert_close({n: v for values in drawn for n, v in values.items()}, expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_surgery_that_draws_its_factors_is_refused():
    case = CASES["surgery"]
    with torch.device("meta"):
        model = case.model_class(case.config())
    case.factorize(model)
    model.bert.encoder.layer[1].output.dense.init = "default"
    with pytest.raises(ValueError, match=r"encoder.layer.1.output.dense .*init='default'"):
        initialize_(model)


def test_a_parameter_without_a_source_is_named():
    case = CASES["bert"]
    with torch.device("meta"):
        model = case.model_class(case.config())
    model.extra = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(ValueError, match="extra is not among what a FactorizedBertForMaskedLM"):
        initialize_(model)


def test_the_cost_of_a_matrix_is_that_of_its_transpose():
    assert matrix_cost(5, 7) == matrix_cost(7, 5) < matrix_cost(6, 7)
