"""What a configuration says about surgery: for each model by itself, whatever wraps, shares, copies or changes it."""

import copy
import io
from pathlib import Path

import pytest
import torch
import transformers
from surgery_cases import ARCHITECTURES
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.models.loading import CheckpointMismatchError
from hf_fnl.models.surgery_loading import load
from hf_fnl.surgery import factorize_, merge_, update_records_
from hf_fnl.surgery.config import FactorizationConfig

EXACT = {"rtol": 0, "atol": 0}
LLAMA, T5 = ARCHITECTURES["llama"], ARCHITECTURES["t5"]
LOW = FactorizationConfig(rank=4)
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 50, **SIZES}
VISION = {**SIZES, "image_size": 12, "patch_size": 4}


def assert_comes_back(model: PreTrainedModel, folder: Path) -> None:
    """Stock ``from_pretrained`` and ``load`` give the model that was saved, with the same layers."""
    model.save_pretrained(folder)
    for loaded in (type(model).from_pretrained(folder), load(folder, type(model))):
        assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)


def factorized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Factorized)]


def record(model: PreTrainedModel) -> list[str]:
    return list(model.config.to_dict().get("quantization_config", {"layers": ()})["layers"])


# What surgery is done through


def layer_by_layer(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        factorize_(layer, LOW)


WAYS = {
    "model": lambda model: factorize_(model, LOW),
    "data-parallel": lambda model: factorize_(nn.DataParallel(model), LOW),
    "compiled": lambda model: factorize_(torch.compile(model, backend="eager"), LOW),
    "inside-a-module": lambda model: factorize_(nn.ModuleDict({"a": model, "b": nn.Linear(9, 9)}), LOW),
    "layer-by-layer": layer_by_layer,
    "backbone": lambda model: factorize_(model.model, LOW),
    "one-list": lambda model: factorize_(model.model.layers, LOW),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_whatever_surgery_is_done_through_the_model_comes_back(way, tmp_path):
    model = LLAMA.build()
    way(model)
    assert record(model) == factorized(model)
    assert_comes_back(model, tmp_path / "model")
    assert_comes_back(model.model, tmp_path / "backbone")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
def test_a_peft_model_leaves_a_base_that_comes_back(tmp_path):
    peft = pytest.importorskip("peft")
    model = LLAMA.build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]))
    factorize_(adapted, FactorizationConfig(rank=4, include=("*base_layer", "*mlp*")))
    base = adapted.unload()
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"} < {*record(base)}
    assert_comes_back(base, tmp_path)


# Who shares what


def test_a_teacher_with_the_same_configuration_stays_dense(tmp_path):
    teacher = LLAMA.build()
    config = teacher.config
    before = config.to_dict()
    pupil = LlamaForCausalLM(config)
    factorize_(pupil, LOW)
    assert teacher.config is config
    assert config.to_dict() == before
    assert_comes_back(teacher, tmp_path / "teacher")
    assert_comes_back(pupil, tmp_path / "pupil")


def test_two_pupils_with_one_configuration_are_told_apart(tmp_path):
    config = LLAMA.build().config
    pair = nn.ModuleDict({"a": LlamaForCausalLM(config), "b": LlamaForCausalLM(config)})
    factorize_(pair, FactorizationConfig(rank=4, include=("a.*",)))
    factorize_(pair, FactorizationConfig(rank=6, include=("b.*mlp*",)))
    for name, model in pair.items():
        assert_comes_back(model, tmp_path / name)


def test_models_that_share_layers_come_back(tmp_path):
    teacher = LLAMA.build()
    pupil = LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA.config, "num_hidden_layers": 1}))
    pupil.model.layers = nn.ModuleList([teacher.model.layers[0]])
    factorize_(pupil, LOW)
    assert_comes_back(pupil, tmp_path / "pupil")
    assert_comes_back(teacher, tmp_path / "teacher")


def test_a_model_that_was_never_made_is_no_obstacle():
    unfinished = LlamaForCausalLM.__new__(LlamaForCausalLM)
    model = LLAMA.build()
    factorize_(model.model.layers[0], LOW)
    assert record(model) == factorized(model)
    del unfinished


def test_inside_a_model_the_configuration_is_shared_as_before():
    model = LLAMA.build()
    factorize_(model, LOW)
    holders = [module for module in model.modules() if hasattr(module, "config")]
    assert len(holders) > 3
    assert all(module.config is model.config for module in holders)
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize(("make", "stored"), [(LlamaForCausalLM, False), (AutoModelForCausalLM.from_config, True)])
def test_a_dense_model_with_the_configuration_of_a_factorized_one_comes_back(make, stored, tmp_path):
    model = LLAMA.build()
    factorize_(model, LOW)
    model.save_pretrained(tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model") if stored else model.config
    dense = make(config)
    assert not factorized(dense)
    assert_comes_back(dense, tmp_path / "dense")
    assert_comes_back(model, tmp_path / "model")


def test_factors_that_are_tied_to_a_layer_outside_are_refused_with_the_way_out(tmp_path):
    model = LLAMA.build(tie_word_embeddings=True)
    embeddings = FactorizationConfig(rank=4, kinds=("embedding",))
    with pytest.raises(ValueError, match=r"also lm_head.weight, outside of what is factorized: pass the model that"):
        factorize_(model.model, embeddings)
    factorize_(model, embeddings)
    assert_comes_back(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"embed_tokens cannot be merged: its factor is also lm_head.U, outside of what"
    ):
        merge_(model.model)
    assert_comes_back(model, tmp_path)


# Models inside of models


def encoder_and_decoder() -> PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 20}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=50, d_model=16, **sizes, **heads)
    )


def two_towers() -> PreTrainedModel:
    text = {**TEXT, "max_position_embeddings": 20}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def text_and_images() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config)


NESTED = {
    "t5": (T5.build, "encoder", "decoder"),
    "bart": (encoder_and_decoder, "model.encoder", "model.decoder"),
    "clip": (two_towers, "text_model", "vision_model"),
    "llava": (text_and_images, "model.language_model", "model.vision_tower"),
}


@pytest.mark.parametrize(("build", "first", "second"), NESTED.values(), ids=NESTED)
def test_each_model_inside_of_another_comes_back_by_itself(build, first, second, tmp_path):
    model = build()
    factorize_(model, FactorizationConfig(rank=4, include=(f"{first}.*",)))
    assert_comes_back(model.get_submodule(second), tmp_path / "dense")
    factorize_(model.get_submodule(second), FactorizationConfig(rank=6))  # by itself
    assert_comes_back(model, tmp_path / "model")
    for name in (first, second):
        assert_comes_back(model.get_submodule(name), tmp_path / name)


def test_a_part_is_loaded_from_the_folder_of_the_model(tmp_path):
    towers = two_towers()
    factorize_(towers, LOW)
    towers.save_pretrained(tmp_path / "clip")
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "clip")
    assert len(factorized(text)) == len(factorized(towers.text_model))
    projected = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "clip", projection_dim=8)
    assert_close(dict(projected.state_dict()), {n: towers.state_dict()[n] for n in projected.state_dict()}, **EXACT)
    t5 = T5.build()
    factorize_(t5, LOW)
    t5.save_pretrained(tmp_path / "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5").encoder
    assert_close(dict(encoder.state_dict()), dict(t5.encoder.state_dict()), **EXACT)


def test_a_model_composed_afterwards_comes_back_once_its_record_is_updated(tmp_path):
    bert = transformers.BertConfig(**TEXT)
    encoder = transformers.BertModel(bert)
    factorize_(encoder, LOW)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True))
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(CheckpointMismatchError, match=r"put together .* hf_fnl.surgery.update_records_\(\[model\]\)"):
        load(tmp_path / "before")
    update_records_([model])
    assert_comes_back(model, tmp_path)


def test_a_layer_that_is_put_in_by_hand_comes_back_once_the_record_is_updated(tmp_path):
    model = LLAMA.build()
    model.model.layers[1].mlp.up_proj = FactorizedLinear.from_dense(model.model.layers[1].mlp.up_proj, 4)
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(CheckpointMismatchError, match="does not say what is factorized"):
        load(tmp_path / "before")
    update_records_([model])
    assert_comes_back(model, tmp_path)


# Changes after surgery


def test_merging_a_part_leaves_the_record_of_the_rest(tmp_path):
    model = LLAMA.build()
    factorize_(model, LOW)
    merge_(model.model.layers[0])
    assert record(model) == factorized(model)
    assert all(name.startswith("model.layers.1.") for name in record(model))
    assert_comes_back(model, tmp_path / "part")
    merge_(model.model)
    assert not hasattr(model.config, "quantization_config")
    assert_comes_back(model, tmp_path / "dense")


def test_a_model_that_other_code_changed_comes_back(tmp_path):
    model = LLAMA.build()
    factorize_(model, LOW)
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.to_dense()
    assert_comes_back(model, tmp_path / "one")
    for name in factorized(model):
        model.set_submodule(name, model.get_submodule(name).to_dense())
    assert_comes_back(model, tmp_path / "dense")
    assert not hasattr(load(tmp_path / "dense").config, "quantization_config")


def test_a_copy_of_the_model_has_a_record_of_its_own(tmp_path):
    model = LLAMA.build()
    factorize_(model, LOW)
    twin, backbone = copy.deepcopy(model), copy.deepcopy(model.model)
    merge_(twin.model.layers[0])
    assert record(twin) == factorized(twin) != factorized(model) == record(model)
    for number, each in enumerate((model, twin, backbone)):
        assert_comes_back(each, tmp_path / str(number))


def test_a_pickled_model_comes_back_and_goes_on(tmp_path):
    model, file = LLAMA.build(), io.BytesIO()
    factorize_(model, LOW)
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_comes_back(again, tmp_path / "again")
    merge_(again.model.layers[0])
    assert_comes_back(again, tmp_path / "merged")


# The configuration as others read it


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
def test_the_configuration_of_a_model_can_be_passed_to_from_pretrained(copied, tmp_path):
    model = LLAMA.build()
    factorize_(model, LOW)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config) if copied else model.config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert record(model) == factorized(model)


def test_a_nested_model_of_another_quantization_is_refused():
    model = text_and_images()
    model.model.vision_tower.config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(ValueError, match="CLIPVisionModel is quantized with torchao"):
        factorize_(model, LOW)
