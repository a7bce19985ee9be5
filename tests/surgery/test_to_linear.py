"""Factorized layers become pairs of plain ones: same outputs, checkpoints, the way back, adapters, quantization."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from surgery_cases import ARCHITECTURES, Architecture
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fnl import FactorizedLlamaConfig, FactorizedLlamaForCausalLM, load, to_linear_
from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear, HeadProjection, LinearPair
from hf_fnl.surgery import factorize_, merge_
from hf_fnl.surgery.config import FactorizationConfig

EXACT = {"rtol": 0, "atol": 0}
LLAMA = ARCHITECTURES["llama"]
LOW = FactorizationConfig(rank=4)
UP = "model.layers.1.mlp.up_proj"


def linear(case: Architecture = LLAMA, config: FactorizationConfig = LOW, **fields) -> PreTrainedModel:
    model = case.build(**fields)
    factorize_(model, config)
    return to_linear_(model)


def outputs(model: nn.Module, case: Architecture = LLAMA) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.batch())[0]


# The pair


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("deep", [False, True], ids=["flat", "deep"])
def test_a_pair_computes_what_the_factors_do(deep: bool, bias: bool) -> None:
    layer = FactorizedLinear(5, 7, 3, bias, deep=deep, dtype=torch.float64)
    if deep:
        nn.init.normal_(layer.M)
    pair, x = LinearPair.from_factorized(layer), torch.randn(4, 5, dtype=torch.float64)
    assert_close(pair(x), layer(x), rtol=1e-12, atol=1e-12)
    assert [type(half) for half in pair] == [nn.Linear, nn.Linear]
    assert (pair.in_features, pair.rank, pair.out_features, pair[0].bias) == (5, 3, 7, None)
    assert pair.bias is layer.bias
    assert_close(pair.weight.clone(), layer.dense_weight())
    assert_close(pair.to_dense()(x), layer(x))
    with pytest.raises(RuntimeError, match=r"weight of a LinearPair, which holds only its factors"):
        pair.weight = nn.Parameter(torch.zeros(7, 5))


@pytest.mark.parametrize(("frozen", "trained"), [("U", [True, False]), ("V", [False, True])])
def test_halves_of_a_pair_are_trained_as_their_factors_are(frozen: str, trained: list[bool]) -> None:
    layer = FactorizedLinear(5, 7, 3)
    getattr(layer, frozen).requires_grad_(False)
    assert [half.weight.requires_grad for half in LinearPair.from_factorized(layer)] == trained


def test_what_shares_factors_stays_and_narrow_heads_are_plain_already() -> None:
    model = LLAMA.build(tie_word_embeddings=True)
    factorize_(model, FactorizationConfig(rank=3, kinds=("linear", "embedding", "ov")))
    before = outputs(model)
    to_linear_(model)
    assert isinstance(model.model.embed_tokens, FactorizedEmbedding)
    assert isinstance(model.lm_head, FactorizedLinear)
    assert model.lm_head.U is model.model.embed_tokens.U
    assert isinstance(model.model.layers[0].self_attn.v_proj, HeadProjection)
    assert isinstance(model.model.layers[0].mlp.up_proj, LinearPair)
    assert_close(outputs(model), before)


def test_what_cannot_be_done_is_an_error_that_changes_nothing() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no factorized linear layer with factors of its own"):
        to_linear_(LLAMA.build())
    model = LLAMA.build()
    factorize_(model, LOW)
    model.model.layers[1].mlp.up_proj.U.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=rf"{UP} cannot become linear layers: its weight has hooks for its gradient"):
        to_linear_(model)
    assert not any(isinstance(module, LinearPair) for module in model.modules())
    model = linear()
    with pytest.raises(ValueError, match="one of the two layers of a product: merge_ the model first"):
        factorize_(model, FactorizationConfig(rank=2, include=(f"{UP}.0",)))
    model.get_submodule(UP)[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=rf"{UP} cannot be merged: of one of its two layers it has forward hooks"):
        merge_(model)


# Checkpoints


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit"])  # whose layers have other names in its files
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    model = linear(case)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "hf_fnl"
    assert all(entry == {"rank": 4, "linear": True} for entry in record["layers"].values())
    for loaded in (load(tmp_path), case.model_class.from_pretrained(tmp_path)):
        assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
        assert_close(outputs(loaded, case), outputs(model, case), **EXACT)
    merge_(loaded)
    assert_close(outputs(loaded, case), outputs(model, case), rtol=1e-4, atol=1e-4)


def test_pairs_factors_and_dense_layers_stand_in_one_checkpoint(tmp_path: Path) -> None:
    model = LLAMA.build()
    factorize_(model, FactorizationConfig(rank=4, exclude=("model.layers.0.*",)))
    to_linear_(model.model.layers[1].mlp)
    model.save_pretrained(tmp_path / "all")
    model.model.save_pretrained(tmp_path / "backbone")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    kinds = {type(loaded.get_submodule(f"model.layers.{n}.{end}")) for n in (0, 1) for end in ("mlp.up_proj",)}
    assert kinds == {nn.Linear, LinearPair}
    assert isinstance(loaded.model.layers[1].self_attn.q_proj, FactorizedLinear)
    assert_close(outputs(loaded), outputs(model), **EXACT)
    backbone = transformers.AutoModel.from_pretrained(tmp_path / "backbone")
    assert_close(outputs(backbone), outputs(model.model), **EXACT)
    dense = LLAMA.model_class(copy.deepcopy(model.config))  # with the record of another model
    dense.save_pretrained(tmp_path / "dense")
    assert type(load(tmp_path / "dense").get_submodule(UP)) is nn.Linear


def test_without_its_record_a_pair_is_refused(tmp_path: Path) -> None:
    linear().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"checkpoint holds model\.layers\.0\.\S+\.1\.weight where the model"):
        load(tmp_path)


def test_a_model_of_ours_comes_back_and_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FactorizedLlamaForCausalLM(FactorizedLlamaConfig(**LLAMA.config, ffn_rank=3)).eval()
    expected = outputs(model)
    to_linear_(model).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LinearPair)
    assert_close(outputs(loaded), expected)
    assert_close(outputs(loaded.merge()), expected)


# Adapters

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (linear, ["up_proj.0", "up_proj.1", "q_proj.1"]),
        (linear, "all-linear"),
        (lambda: (m := LLAMA.build(), factorize_(m, FactorizationConfig(rank=4, include=("*mlp*",))))[0], ["q_proj"]),
    ],
    ids=["halves", "all", "beside-factors"],
)
def test_lora_trains_and_is_saved_loaded_and_merged(build, targets, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    before = outputs(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # the first step moves one factor only
        optimizer.zero_grad()
        adapted.train()(**LLAMA.batch(), labels=LLAMA.batch()["input_ids"]).loss.backward()
        optimizer.step()
    expected = outputs(adapted.eval())
    assert (expected - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_close(outputs(again), expected, **EXACT)
    merged = again.merge_and_unload()
    assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(outputs(load(tmp_path / "merged")), outputs(merged), **EXACT)


def test_an_adapter_inside_a_pair_is_named_and_around_one_refuses_its_merge() -> None:
    model = peft.get_peft_model(linear(), peft.LoraConfig(r=2, target_modules=["up_proj.0"]))
    with pytest.raises(ValueError, match=r"one of its two layers is a Linear: merge an adapter first"):
        merge_(model)
    adapted = peft.get_peft_model(LLAMA.build(), peft.LoraConfig(r=2, target_modules=["up_proj"])).eval()
    factorize_(adapted, FactorizationConfig(rank=4, include=("*base_layer",)))
    expected = outputs(adapted)
    to_linear_(adapted)
    assert_close(outputs(adapted), expected)
    with pytest.raises(RuntimeError, match=r"weight of a LinearPair"):
        adapted.merge_and_unload()
    merge_(adapted)
    assert_close(outputs(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


# Quantization

READ = """
import sys, torch, transformers, hf_fnl
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize(
    ("kind", "heads"),
    [("Int8WeightOnlyConfig", True), ("Int8DynamicActivationInt8WeightConfig", False)],
    ids=["weights-heads", "activations"],
)
def test_torchao_quantizes_it_and_a_fresh_process_reads_it(kind: str, heads: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = LLAMA.build()
    if heads:
        factorize_(model, FactorizationConfig(rank=3, kinds=("ov",)))
    factorize_(model, LOW)
    to_linear_(model).save_pretrained(tmp_path / "linear")
    config = transformers.TorchAoConfig(getattr(quantization, kind)())
    int8 = load(tmp_path / "linear", quantization_config=config)
    assert type(int8.get_submodule(UP)[0].weight).__name__ == "Int8Tensor"
    expected = outputs(int8)
    error = (expected - outputs(model)).norm() / outputs(model).norm()
    assert 0 < error < 0.1
    int8.save_pretrained(tmp_path / "int8")
    saved = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert saved["layers"][UP] == {"rank": 4, "linear": True}
    assert saved["quantization"]["quant_method"] == "torchao"
    torch.save(LLAMA.batch(), tmp_path / "batch")
    read = [sys.executable, "-W", "ignore", "-c", READ, *(tmp_path / name for name in ("int8", "batch", "logits"))]
    subprocess.run(read, check=True, capture_output=True)
    assert_close(torch.load(tmp_path / "logits"), expected, **EXACT)
    with pytest.raises(ValueError, match="quantization_config: the model is quantized already, with torchao"):
        load(tmp_path / "int8", quantization_config=config)
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized with torchao: factorize it before"):
        factorize_(load(tmp_path / "int8"), LOW)
    with pytest.raises(ValueError, match=r"cannot be merged: .*its weight is a Int8Tensor"):
        merge_(load(tmp_path / "int8"))


def test_torchs_dynamic_int8_takes_the_layers() -> None:
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("this torch has given it up for torchao")
    model = linear()
    with pytest.warns((DeprecationWarning, UserWarning)):
        int8 = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(int8.get_submodule(UP)[0]).__module__.startswith("torch.ao.nn.quantized.dynamic")
    error = (outputs(int8) - outputs(model)).norm() / outputs(model).norm()
    assert 0 < error < 0.2


class Halves(transformers.quantizers.HfQuantizer):
    """A quantization method that halves its bytes, and gives back what it can."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        return True

    is_trainable = True

    def _dequantize(self, model, dtype=None):
        return model.to(dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model.to(torch.bfloat16)


class HalvesConfig(transformers.utils.quantization_config.QuantizationConfigMixin):
    """Its configuration."""

    def __init__(self, quant_method: str = "halves") -> None:
        self.quant_method = quant_method


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> HalvesConfig:
    """A method of another package, which is registered as ours is."""
    from transformers.quantizers import auto

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "halves", Halves)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "halves", HalvesConfig)
    return HalvesConfig()


def test_any_method_quantizes_a_factorized_model_and_the_record_carries_both(halves, tmp_path: Path) -> None:
    model = LLAMA.build()
    factorize_(model, LOW)
    model.save_pretrained(tmp_path / "small")
    quantized = load(tmp_path / "small", quantization_config=halves)
    assert quantized.dtype == torch.bfloat16
    assert quantized.is_quantized
    assert isinstance(quantized.hf_quantizer, Halves)
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert isinstance(loaded.hf_quantizer, Halves)
    assert loaded.hf_quantizer.pre_quantized
    assert_close(dict(loaded.state_dict()), dict(quantized.state_dict()), **EXACT)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "quantized/config.json").read_text()
    with pytest.raises(ValueError, match=r"quantized with halves: .* or call its dequantize\(\) first"):
        factorize_(loaded, LOW)
    loaded.dequantize(torch.float32)
    record = loaded.config.quantization_config
    assert "quantization" not in record
    assert record["layers"] == model.config.quantization_config["layers"]
    merge_(loaded)
    factorize_(loaded, LOW)


def test_a_stock_model_is_quantized_by_load_too(halves, tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=halves)
    assert type(loaded.hf_quantizer) is Halves
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantized with halves"):
        factorize_(loaded, LOW)
    loaded.dequantize(torch.float32)
    factorize_(loaded, LOW)
    assert isinstance(loaded.get_submodule(UP), FactorizedLinear)
