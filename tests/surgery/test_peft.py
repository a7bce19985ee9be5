"""PEFT's adapters on factorized models: they train, load, and are merged rightly or not at all."""

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bert_cases import HEADS as BERT_HEADS
from gpt2_cases import HEADS as GPT2_HEADS
from peft import LoraConfig, PeftModel, get_peft_model
from surgery_cases import ARCHITECTURES as CASES
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_fnl import FactorizationConfig, factorize_, load, merge_
from hf_fnl.layers import Factorized, FactorizedLinear

IDS = torch.tensor([[3, 7, 9, 4]])
IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
KINDS = ("linear", "embedding", "conv")


def llama(layers: int = 1) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def gpt2() -> nn.Module:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, **special))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=3))


@dataclass(frozen=True)
class Adapter:
    """A tuner of PEFT whose effect is not zero, and the model that it adapts."""

    config: str
    options: dict[str, Any]
    build: Any = llama
    inputs: torch.Tensor = field(default_factory=lambda: IDS)

    def put_on(self, model: nn.Module) -> PeftModel:
        torch.manual_seed(3)
        adapted = get_peft_model(model, getattr(peft, self.config)(**self.options)).eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # also where PEFT knows no other start than one without effect
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        return adapted

    def factorized(self, **options: Any) -> PeftModel:
        """The adapters around layers that were factorized after."""
        torch.manual_seed(1)
        adapted = self.put_on(self.build().eval())
        factorize_(
            adapted, FactorizationConfig(**{"rank_scale": 0.5, "include": ["*base_layer"], "kinds": KINDS} | options)
        )
        return adapted

    def outputs(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(self.inputs).logits


LLAMA = {"target_modules": ["q_proj", "down_proj"]}
CONV = {"target_modules": r".*layer\.\d\.convolution"}
TRANSPOSED = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
ADAPTERS = {
    "lora": Adapter("LoraConfig", {"r": 2, **LLAMA, "init_lora_weights": False}),
    "lora-bias": Adapter("LoraConfig", {"r": 2, **TRANSPOSED, "lora_bias": True}, gpt2),
    "lora-embedding": Adapter("LoraConfig", {"r": 2, "target_modules": ["embed_tokens"]}),
    "lora-conv2d": Adapter("LoraConfig", {"r": 2, **CONV}, resnet, IMAGES),
    "dora": Adapter("LoraConfig", {"r": 2, **LLAMA, "use_dora": True}),
    "ia3": Adapter("IA3Config", {**LLAMA, "feedforward_modules": ["down_proj"]}),
    "loha-conv2d": Adapter("LoHaConfig", {"r": 2, **CONV}, resnet, IMAGES),
    "oft": Adapter("OFTConfig", {"oft_block_size": 4, **LLAMA}),
}
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
# PEFT warns of its own plans and options; what is ours is asserted.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


# Merged rightly, or not at all


@each_adapter
def test_a_merge_into_factors_is_refused_and_loses_nothing_and_after_merge_it_is_exact(adapter):
    adapted = adapter.factorized()
    outputs = adapter.outputs(adapted)
    for merge, options in (("merge_and_unload", {}), ("merge_and_unload", {"safe_merge": True}), ("merge_adapter", {})):
        with pytest.raises(RuntimeError, match=r"holds only its factors .* hf_fnl.merge_\(model\)"):
            getattr(adapted, merge)(**options)
        assert_close(adapter.outputs(adapted), outputs)
    merge_(adapted)
    assert_close(adapter.outputs(adapted), outputs)
    merged = adapted.merge_and_unload(safe_merge=True)
    assert_close(adapter.outputs(merged), outputs)
    assert not any(isinstance(module, Factorized) for module in merged.modules())


def test_what_was_merged_before_the_refusal_stays_right():
    adapter = ADAPTERS["lora"]
    adapted = adapter.put_on(llama(layers=2).eval())
    factorize_(adapted, FactorizationConfig(rank_scale=0.5, include=["*layers.1*base_layer"]))
    outputs = adapter.outputs(adapted)
    with pytest.raises(RuntimeError, match="holds only its factors"):
        adapted.merge_adapter()
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.merged
    assert_close(adapter.outputs(adapted), outputs)
    adapted.unmerge_adapter()
    assert_close(adapter.outputs(adapted), outputs)


def test_a_layer_with_a_merged_adapter_stays_dense():
    adapted = ADAPTERS["lora"].put_on(llama().eval())
    adapted.merge_adapter()
    message = r"base_layer cannot be factorized: an adapter is merged .* unmerge_adapter\(\)"
    with pytest.raises(ValueError, match=message):
        factorize_(adapted, FactorizationConfig(rank_scale=0.5, include=["*base_layer"]))


WITH_A_HEAD = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "init_lora_weights": False}


@pytest.mark.parametrize("options", [{**LLAMA, "use_dora": True}, WITH_A_HEAD], ids=["dora", "head"])
def test_what_peft_added_stays_as_it_saves_it(options, tmp_path):
    adapter = Adapter("LoraConfig", {"r": 4, **options})
    adapted = adapter.put_on(llama().eval())
    before = dict(adapted.named_parameters())
    done = factorize_(adapted, FactorizationConfig(rank=2, kinds=KINDS, include=["*q_proj*", "*embed*", "*lm_head*"]))
    base = {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"}
    suffix = r"\.(base_layer|original_module)$"
    assert {re.sub(suffix, "", r.name).removeprefix("base_model.model.") for r in done.replacements} == base
    assert "it is an adapter's" in done.skipped.values()
    after = dict(adapted.named_parameters())
    assert all(parameter is after[name] for name, parameter in before.items() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path)
    outputs = adapter.outputs(adapted)
    plain = adapted.unload()
    merge_(plain)  # for PEFT adapts plain layers
    assert_close(adapter.outputs(PeftModel.from_pretrained(plain, tmp_path).eval()), outputs)


def test_a_merged_lora_is_held_in_factors_of_the_sum_of_both_ranks():
    adapter = ADAPTERS["lora"]
    adapted = adapter.factorized(rank_scale=None, rank=5).double()
    outputs = adapter.outputs(adapted)
    merge_(adapted)
    merged = adapted.merge_and_unload()
    factorize_(merged, FactorizationConfig(rank=5 + 2, include=["*q_proj", "*down_proj"]))
    assert_close(adapter.outputs(merged), outputs)


def test_lora_around_a_factorized_layer_trains_and_is_refused_likewise():
    model = llama().eval()
    factorize_(model, FactorizationConfig(rank_scale=0.5, include=["*mlp*"]))
    config = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="FactorizedLinear"):
        get_peft_model(copy.deepcopy(model), config)
    config._register_custom_module({FactorizedLinear: peft.tuners.lora.Linear})
    adapted = get_peft_model(model, config).eval()
    outputs = adapted(IDS).logits.detach()
    with pytest.raises(RuntimeError, match="holds only its factors"):
        adapted.merge_and_unload()
    merge_(adapted)
    assert_close(adapted.merge_and_unload()(IDS).logits, outputs)


# Ties and saved modules


def vocabulary(**options: Any) -> nn.Module:
    from hf_fnl import FactorizedGPT2Config, FactorizedGPT2LMHeadModel

    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return FactorizedGPT2LMHeadModel(FactorizedGPT2Config(**sizes, **special, embedding_rank=16, **options))


def test_a_tied_head_stays_tied(tmp_path):
    memory = [torch.empty(1600) for _ in range(64)]
    del memory[::3]  # places that one of two weights could come to lie in
    adapted = get_peft_model(vocabulary(), LoraConfig(target_modules=["c_attn"], init_lora_weights=False)).eval()
    outputs = adapted(IDS).logits
    merged = adapted.merge_and_unload()
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, outputs)


def test_a_head_that_is_not_tied_is_found_to_be_so():
    model = vocabulary(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True  # what it says and what is
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"]))
    assert not adapted.merge_and_unload().config.tie_word_embeddings


def test_a_saved_factorized_head_trains_and_comes_back(tmp_path):
    model = vocabulary(tie_word_embeddings=False)
    start = copy.deepcopy(model)
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    outputs = adapted.eval()(IDS).logits
    adapted.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(start, tmp_path).eval()(IDS).logits, outputs)


def test_a_saved_head_that_was_tied_is_so_no_longer(tmp_path):
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(vocabulary(), config)
    adapted.train()(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
    outputs = adapted.eval()(IDS).logits
    merged = adapted.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, outputs)


def llama_tied() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    )


TIED = {
    "llama": (llama_tied, {**LLAMA, "modules_to_save": ["lm_head"]}),
    "gpt2": (gpt2, {**TRANSPOSED, "modules_to_save": ["lm_head"]}),
    "bert": (CASES["bert"].build, {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    "t5": (CASES["t5"].build, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "bert-tokens": (CASES["bert"].build, {"target_modules": ["query"], "trainable_token_indices": [3, 4]}),
}


@pytest.mark.parametrize("kinds", [("linear",), KINDS], ids=["linear", "all"])
@pytest.mark.parametrize("adapted_first", [False, True], ids=["factorized-first", "adapted-first"])
@pytest.mark.parametrize(("build", "options"), TIED.values(), ids=TIED)
def test_an_adapter_around_a_side_of_a_tie_is_merged_saved_and_loaded(build, options, adapted_first, kinds, tmp_path):
    if "trainable_token_indices" in options and not adapted_first:
        kinds = ("linear",)  # PEFT reads the table
    adapter = Adapter("LoraConfig", {"r": 2, **options, "init_lora_weights": False}, build)
    targets = tuple(f"*{target}*" for target in options["target_modules"])
    low = FactorizationConfig(rank_scale=0.5, kinds=kinds, exclude=(*targets, "*lora_*"))
    torch.manual_seed(1)
    model = build().eval()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})

    def outputs(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs)[0]

    if adapted_first:
        adapted = adapter.put_on(model)
        factorize_(adapted, low)
    else:
        factorize_(model, low)
        adapted = adapter.put_on(model)
    before = outputs(adapted)
    plain = copy.deepcopy(adapted)
    merge_(plain)
    assert_close(outputs(plain), before, rtol=1e-4, atol=1e-4)
    unloaded = adapted.unload()
    unloaded.save_pretrained(tmp_path)
    assert_close(outputs(load(tmp_path)), outputs(unloaded))


def test_a_table_that_an_adapter_of_tokens_reads_stays_dense():
    adapted = get_peft_model(llama(), LoraConfig(**LLAMA, trainable_token_indices=[3, 4])).eval()
    outputs = adapted(IDS).logits
    done = factorize_(adapted, FactorizationConfig(rank_scale=1.0, kinds=KINDS))
    assert "an adapter reads its weight and does not call it" in done.skipped.values()
    assert_close(adapted(IDS).logits, outputs, rtol=1e-4, atol=1e-4)


# Adapters of our classes, from files

LOW = {"qk_rank": 2, "ov_rank": 2, "ffn_rank": 5, "embedding_rank": 6}  # heads of one width, which adapters share
BASES = {
    "bert-backbone": (BERT_HEADS["backbone"], AutoModel, "value"),
    "gpt2": (GPT2_HEADS["lm"], AutoModelForCausalLM, "c_attn"),
}
each_base = pytest.mark.parametrize(("head", "auto", "target"), BASES.values(), ids=BASES)


def saved(head: Any, target: str, folder: Path) -> torch.Tensor:
    """Save a base and an adapter; returns what both compute."""
    head.build(LOW).save_pretrained(folder / "base")
    model = head.ours.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False)).eval()
    adapted.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return adapted(IDS)[0]


@each_base
def test_an_adapter_is_loaded_in_every_way(head, auto, target, tmp_path):
    outputs = saved(head, target, tmp_path)
    model = head.ours.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter")
    loaded = [
        model,
        head.ours.from_pretrained(tmp_path / "adapter"),
        auto.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(head.ours.from_pretrained(tmp_path / "base"), tmp_path / "adapter"),
    ]
    for each in loaded:
        with torch.no_grad():
            assert_close(each.eval()(IDS)[0], outputs)


@each_base
def test_a_base_of_another_rank_is_refused_also_below_an_adapter(head, auto, target, tmp_path):
    saved(head, target, tmp_path)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_rank": 4}))
    for from_pretrained in (head.ours.from_pretrained, auto.from_pretrained):
        with pytest.raises(RuntimeError, match="mismatch"):
            from_pretrained(tmp_path / "adapter")


@each_base
def test_an_adapter_is_merged_before_the_class_is(head, auto, target):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    adapted = get_peft_model(head.build(LOW), config).eval()
    with torch.no_grad():
        outputs = adapted(IDS)[0]
    with pytest.raises(ValueError, match=rf"has no place for .*{target}.*merge_and_unload"):
        adapted.merge()
    with pytest.raises(ValueError, match=r"merge\(\) returns the stock model"):
        merge_(adapted)
    with torch.no_grad():
        assert_close(adapted.merge_and_unload().merge()(IDS)[0], outputs)


# Prompts


def test_the_name_of_a_factor_gives_its_layer():
    model = GPT2_HEADS["lm"].build({"embedding_rank": 6})
    assert model.get_submodule("transformer.wte.U") is model.transformer.wte
    assert model.get_submodule("transformer.wte") is model.transformer.wte
    for name in ("transformer.wte.W", "transformer.wpe.U", "transformer.wpe.weight"):
        with pytest.raises(AttributeError):
            model.get_submodule(name)
