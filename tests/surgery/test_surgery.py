"""What surgery selects, what it refuses, and that it leaves a model alone when it fails."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_model, save_model
from surgery_cases import ALL_KINDS, ARCHITECTURES, TiedToy
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from hf_fnl.layers import Factorized, FactorizedEmbedding, FactorizedLinear
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery import factorize_, merge_, restore_
from hf_fnl.surgery.config import FactorizationConfig

EXACT = {"rtol": 0, "atol": 0}
BERT, GPT2, T5 = ARCHITECTURES["bert"], ARCHITECTURES["gpt2"], ARCHITECTURES["t5"]


class Named(nn.Linear):
    """A subclass, which is taken only when it is asked for."""


class Net(nn.Module):
    """A net whose inputs have a name, and data for it that do not span all directions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 35), nn.Tanh(), nn.Linear(35, 23))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    @staticmethod
    def data() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(400, 4) @ torch.randn(4, 20) + 1}


def mixed() -> nn.Sequential:
    """One layer of everything, good and bad."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Linear(5, 7),
        Named(5, 7),
        Conv1D(7, 5),
        nn.Embedding(11, 7),
        nn.Embedding(11, 7, max_norm=1.0),
        FactorizedLinear(5, 7, 2),
        nn.LayerNorm(7),
    )


def factorized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Factorized)]


def state(model: nn.Module) -> dict[str, object]:
    """Everything that surgery may change."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "parameters": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "ties": copy.deepcopy(getattr(model, "_tied_weights_keys", None)),
        "all_ties": copy.deepcopy(getattr(model, "all_tied_weights_keys", None)),
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    values, expected = after.pop("values"), before.pop("values")
    assert after == before
    assert_close(values, expected, **EXACT, equal_nan=True)


# Selection


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, ["2", "4"], id="linear"),
        pytest.param({"kinds": ("conv",)}, ["0"], id="conv-without-depthwise"),
        pytest.param({"kinds": ("embedding",)}, ["5"], id="embedding-without-max-norm"),
        pytest.param({"kinds": ALL_KINDS}, ["0", "2", "4", "5"], id="all"),
        pytest.param({"include": ("4", "[12]")}, ["2", "4"], id="include"),
        pytest.param({"exclude": ("4",)}, ["2"], id="exclude"),
        pytest.param({"include": ("[13]",)}, ["3"], id="a-subclass"),
    ],
)
def test_layers_are_chosen_by_kind_name_and_class(options, expected):
    model = mixed()
    done = factorize_(model, FactorizationConfig(rank=2, **options))
    assert [name for name in factorized(model) if name != "7"] == expected
    assert [replacement.name for replacement in done.replacements] == expected


def test_what_is_passed_over_is_told_with_the_reason():
    done = factorize_(mixed(), FactorizationConfig(rank=2, kinds=ALL_KINDS))
    assert list(done.skipped) == ["1", "3", "6"]
    assert "depthwise" in done.skipped["1"]
    assert "max_norm" in done.skipped["6"]
    assert "6: dense, an embedding with max_norm" in str(done)


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        pytest.param({"kinds": ("linear",)}, False, id="linear"),
        pytest.param({"kinds": ("linear",), "include": ("*", "cls.predictions.decoder")}, True, id="named"),
        pytest.param({"kinds": ("embedding",), "exclude": ("*token_type*",)}, True, id="embedding"),
        pytest.param({"kinds": ("linear", "embedding"), "exclude": ("*token_type*",)}, True, id="both"),
        pytest.param({"kinds": ("linear", "embedding"), "exclude": ("cls.predictions.*",)}, False, id="excluded"),
    ],
)
def test_the_output_embedding_counts_as_an_embedding(options, heads):
    model = BERT.build()
    factorize_(model, FactorizationConfig(rank_scale=0.3, **options))
    assert isinstance(model.get_output_embeddings(), FactorizedLinear) == heads
    assert isinstance(model.get_input_embeddings(), FactorizedEmbedding) == heads


@pytest.mark.parametrize(("kinds", "factorized"), [(("linear",), False), (("linear", "embedding"), True)])
def test_so_does_an_untied_one(kinds, factorized):
    model = ARCHITECTURES["llama"].build()
    factorize_(model, FactorizationConfig(rank_scale=0.3, kinds=kinds))
    assert isinstance(model.lm_head, FactorizedLinear) == factorized


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        pytest.param(
            mixed, {"include": ("8",)}, "no layer of Sequential matches kinds=linear, include=8", id="nothing"
        ),
        pytest.param(
            mixed,
            {"include": ("x",)},
            r"It has conv \(Conv2d\): 0, 1; linear \(Linear\): 2; linear \(Named\): 3; linear \(Conv1D\): 4; "
            r"embedding \(Embedding\): 5, 6; factorized already: 7",
            id="what-there-is",
        ),
        pytest.param(mixed, {"kinds": ("conv",), "include": ("1",)}, "^1 cannot be .* depthwise", id="depthwise"),
        pytest.param(mixed, {"kinds": ("embedding",), "include": ("6",)}, "^6 cannot be .* max_norm", id="max-norm"),
        pytest.param(mixed, {"rank": 6}, r"rank .*2.* must be in \[1, 5\], got 6", id="rank"),
        pytest.param(
            BERT.build,
            {"kinds": ("embedding",), "include": ("bert.*word*",), "exclude": ("cls.*",)},
            "its weight is also that of cls.predictions.decoder, which is excluded",
            id="half-a-tie",
        ),
        pytest.param(
            lambda: nn.Linear(5, 7), {}, "it is the model itself; use the from_dense of its factorized class", id="root"
        ),
        pytest.param(
            lambda: nn.Sequential(FactorizedLinear(5, 7, 2)), {}, "It has factorized already: 0", id="factorized"
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_and_changes_nothing(model, options, message):
    model = model() if model is not nn.LayerNorm else model(3)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        factorize_(model, FactorizationConfig(**{"rank": 2, **options} if "rank" not in options else options))
    assert_untouched(model, before)


@pytest.mark.parametrize(("bad", "calibrated"), [(torch.nan, False), (torch.inf, True)], ids=["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_changes(bad, calibrated):
    model = BERT.build()
    name = "bert.encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight[2, 3] = bad
    before = state(model)
    calibration = {"input_ids": torch.randint(53, (4, 9))} if calibrated else None
    with pytest.raises(ValueError, match=f"the weight of {name} holds NaN or Inf"):
        factorize_(model, FactorizationConfig(rank=2), calibration=calibration)
    assert_untouched(model, before)


@pytest.mark.parametrize("calibration", [None, Net.data()], ids=["plain", "calibrated"])
def test_an_error_while_layers_are_cut_changes_nothing(monkeypatch, calibration):
    model = Net()
    before, original, calls = state(model), FactorizedLinear.from_dense.__func__, iter(range(2))

    def failing(cls, *args, **kwargs):
        if next(calls, None) is None:
            raise RuntimeError("out of memory")
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(FactorizedLinear, "from_dense", classmethod(failing))
    with pytest.raises(RuntimeError, match="out of memory"):
        factorize_(model, FactorizationConfig(rank=2), calibration=calibration)
    assert_untouched(model, before)


# Ranks


def test_a_share_of_energy_is_kept_and_what_would_not_shrink_stays_dense():
    low_rank = nn.Linear(40, 30)
    with torch.no_grad():
        low_rank.weight.copy_(torch.randn(30, 3) @ torch.randn(3, 40))
    model = nn.Sequential(low_rank, nn.Linear(30, 20))
    done = factorize_(model, FactorizationConfig(energy=0.999))
    assert model[0].rank == 3
    assert done.replacements[0].energy == pytest.approx(1, abs=1e-5)
    assert type(model[1]) is nn.Linear
    assert done.skipped == {"1": "its factors would hold as many parameters"}


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"budget": 0.5}], ids=["energy", "budget"])
def test_on_meta_ranks_cannot_depend_on_spectra(rule):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(300, 400))
    with pytest.raises(ValueError, match="0 is on the meta device"):
        factorize_(model, FactorizationConfig(**rule))
    factorize_(model, FactorizationConfig(ratio=0.5))
    assert model[0].U.is_meta


# Initialization and calibration


def test_calibration_lowers_the_error_of_the_outputs_and_the_biases_stay_the_same_parameters():
    dense, data = Net(), Net.data()
    errors = []
    for calibration in (None, data):
        model = copy.deepcopy(dense)
        biases = [layer.bias for layer in model.layers[::2]]
        factorize_(model, FactorizationConfig(rank=4), calibration=calibration)
        assert all(layer.bias is bias for layer, bias in zip(model.layers[::2], biases, strict=True))
        assert all(module.training for module in model.modules())
        errors.append((model(**data) - dense(**data)).square().mean().item())
    assert errors[1] < 0.3 * errors[0]


def test_calibration_chooses_ranks_in_its_metric_and_needs_the_spectral_init():
    model, data = Net(), Net.data()
    config = FactorizationConfig(energy=0.9)
    with pytest.raises(ValueError, match="leaves every matrix dense"):
        factorize_(model, config)
    done = factorize_(copy.deepcopy(model), config, calibration=data)
    assert done.replacements[0].rank <= 4  # the data span four directions
    with pytest.raises(ValueError, match="needs init='spectral', got 'default'"):
        factorize_(model, FactorizationConfig(rank=2, init="default"), calibration=data)


# Ties and modules with several names


def test_a_plain_model_keeps_its_ties_and_its_aliases():
    model = TiedToy()
    ids = torch.randint(11, (2, 3))
    expected = model(ids)
    done = factorize_(model, FactorizationConfig(rank_scale=1.0, kinds=ALL_KINDS))
    assert [(r.name, r.tied) for r in done.replacements] == [
        ("embedding", ("head",)),
        ("layers.0", ()),
        ("layers.1", ()),
    ]
    assert model.again is model.layers[0]
    assert (model.head.U is model.embedding.U, model.head.V is model.embedding.V) == (True, True)
    assert_close(model(ids), expected)
    assert merge_(model) == ["embedding", "layers.0", "layers.1", "head"]
    assert model.again is model.layers[0]
    assert model.head.weight is model.embedding.weight
    assert_close(model(ids), expected)


def test_a_weight_with_an_unknown_holder_stays():
    model = TiedToy()
    model.scores = model.embedding.weight
    done = factorize_(model, FactorizationConfig(rank=2, kinds=ALL_KINDS))
    assert "its weight is also scores" in done.skipped["embedding"]


def test_a_bias_that_is_tied_stays_tied():
    model = BERT.build()
    factorize_(model, FactorizationConfig(rank_scale=0.3, kinds=ALL_KINDS))
    head = model.cls.predictions
    assert head.decoder.bias is head.bias
    merge_(model)
    assert head.decoder.bias is head.bias


# Twice, and back


def test_surgery_twice_records_both_and_merging_removes_the_record():
    model = BERT.build()
    factorize_(model, FactorizationConfig(rank=3, include=("*.intermediate.dense",)))
    factorize_(model, FactorizationConfig(rank=5, include=("*.output.dense",)))
    layers = model.config.quantization_config["layers"]
    assert {name: entry["rank"] for name, entry in layers.items()} == {
        name: model.get_submodule(name).rank for name in factorized(model)
    }
    assert {entry["rank"] for entry in layers.values()} == {3, 5}
    assert json.loads(json.dumps(layers)) == layers
    merge_(model)
    assert "quantization_config" not in model.config.to_dict()
    with pytest.raises(ValueError, match="BertForPreTraining holds no factorized layer"):
        merge_(model)


def test_device_dtype_mode_and_what_is_trained_are_kept():
    model = BERT.build(torch.bfloat16).train()
    model.bert.encoder.layer[0].eval().requires_grad_(False)
    before = {n: (m.training, m.bias.requires_grad) for n, m in model.named_modules() if type(m) is nn.Linear}
    factorize_(model, FactorizationConfig(rank_scale=0.3))
    for name in factorized(model):
        layer = model.get_submodule(name)
        assert (layer.training, layer.U.requires_grad) == before[name]
        assert (layer.U.dtype, layer.weight.dtype) == (torch.bfloat16, torch.bfloat16)


def test_the_model_compiles_without_graph_breaks_before_and_after():
    model, batch = T5.build(), T5.batch()  # which looks at the dtype of weights
    model.config.use_cache = False
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**batch)
    done = factorize_(compiled, FactorizationConfig(rank_scale=0.3, kinds=ALL_KINDS))
    assert not any("_orig_mod" in replacement.name for replacement in done.replacements)
    with torch.no_grad():
        assert_close(compiled(**batch)[0], model(**batch)[0])
        merge_(compiled)
        assert_close(compiled(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "gptq", "gguf"])
def test_a_model_of_another_quantization_is_left_alone(method):
    model = BERT.build()
    before = str(model)
    for config in ({"quant_method": method}, QuantizationConfigMixin(quant_method=QuantizationMethod(method))):
        model.config.quantization_config = config
        with pytest.raises(ValueError, match=f"BertForPreTraining is quantized with {method}: factorize it before"):
            factorize_(model, FactorizationConfig(rank=2))
        assert str(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(lambda: FactorizedLinear(5, 7, 2), "use its to_dense", id="a-layer"),
        pytest.param(lambda: nn.Linear(5, 7), "holds no factorized layer", id="dense"),
    ],
)
def test_nothing_to_merge(model, message):
    with pytest.raises(ValueError, match=message):
        merge_(model())


def test_a_model_of_ours_has_its_own_way_back():
    from hf_fnl import FactorizedBertConfig, FactorizedBertModel

    model = FactorizedBertModel(FactorizedBertConfig(**BERT.config, ffn_rank=3))
    with pytest.raises(ValueError, match=r"merge\(\) returns the stock model"):
        merge_(model)


# Restoring without Transformers


def test_a_plain_model_is_restored_from_the_record_and_a_file(tmp_path):
    model, ids = TiedToy(), torch.randint(11, (2, 3))
    record = json.loads(json.dumps(factorize_(model, FactorizationConfig(rank=3, kinds=ALL_KINDS)).to_dict()))
    save_model(model, tmp_path / "model.safetensors")
    other = TiedToy()
    with torch.device("meta"):
        shapes = TiedToy()
    for each in (other, shapes):
        restore_(each, record)
        assert each.head.U is each.embedding.U
    load_model(other, tmp_path / "model.safetensors")
    shapes.load_state_dict(model.state_dict(), assign=True)
    for each in (other, shapes):
        assert_close(dict(each.state_dict()), dict(model.state_dict()), **EXACT)
        assert_close(each(ids), model(ids))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param({"layers.0": {"rank": 9}}, r"record of layers.0 .* rank must be in \[1, 5\], got 9", id="rank"),
        pytest.param({"layers.0": {"rank": "two"}}, "record of layers.0 .* does not fit", id="no-number"),
        pytest.param({"layers.0": {}}, "record of layers.0 .* does not fit", id="no-rank"),
        pytest.param({"layers": {"rank": 2}}, "record of layers .* the model has a ModuleList", id="no-layer"),
    ],
)
def test_a_record_that_does_not_fit_is_an_error_and_changes_nothing(layers, message):
    model = TiedToy()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        restore_(model, {"layers": layers})
    assert_untouched(model, before)


def test_an_unreachable_ratio_counts_what_is_in_other_layers():
    model = nn.Sequential(nn.Conv2d(40, 60, 2, bias=False), nn.Flatten(), nn.Linear(60, 20, bias=False))
    with pytest.raises(
        ValueError, match=r"0.3 cannot be met: 9,600 of 10,800 .* need 80 of the other 1,200; .* 0.8963$"
    ):
        factorize_(model, FactorizationConfig(ratio=0.3))


def test_a_tied_weight_counts_once_in_a_ratio_of_the_model():
    model = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 400, bias=False), nn.Linear(400, 90))
    model[1].weight = model[0].weight
    before = sum(p.numel() for p in model.parameters())
    factorize_(model, FactorizationConfig(ratio=0.5))
    assert before == 400 * 400 + 400 * 90 + 90
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.5 * before, rel=0.02)
    assert parameter_count(model)["ratio"] == sum(p.numel() for p in model.parameters()) / before


def named_layers() -> nn.Module:
    return nn.ModuleDict({"attn": nn.Linear(20, 20), "mlp": nn.ModuleDict({"up": nn.Linear(20, 30)})})


@pytest.mark.parametrize(("given", "meant"), [("atn", "attn"), ("*.mpl.*", "mlp")])
def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion(given, meant):
    for include in ([given], [given, "mlp.up"]):
        with pytest.raises(ValueError, match=rf"include={re.escape(given)} matches nothing .*did you mean {meant}"):
            factorize_(named_layers(), FactorizationConfig(rank=2, include=include))


def test_a_misspelt_pattern_to_exclude_is_a_warning_and_one_for_other_models_is_none():
    with pytest.warns(UserWarning, match="exclude=atn matches nothing in ModuleDict; did you mean attn"):
        factorize_(named_layers(), FactorizationConfig(rank=2, exclude=["atn"]))
    factorize_(named_layers(), FactorizationConfig(rank=2, exclude=["lm_head"]))
