"""Write small models and a training checkpoint as version 0.1 does, for tests that later versions read them.

It runs at commit fea37fb only, whose code it has to import::

    git worktree add --detach ../v01 fea37fb
    PYTHONPATH=../v01 python tests/models/fixtures_0_1/write.py

Each folder holds what ``save_pretrained`` wrote and ``expected.safetensors``: inputs, and the outputs for them, as
``inputs.NAME`` and ``outputs.NAME``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from toy import toy
from transformers import PreTrainedModel

import hf_fnl
from hf_fnl import FactorizationConfig, RankRule, factorize_, inner_convolutions, merge_

HERE = Path(__file__).parent
VOCAB, HIDDEN, HEADS, BATCH, LENGTH, LABELS = 31, 8, 2, 2, 5, 3

BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 13,
    "max_position_embeddings": 9,
    "initializer_range": 0.3,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": 2,
    "n_head": HEADS,
    "n_inner": 13,
    "n_positions": 9,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MARIAN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 13,
    "decoder_ffn_dim": 11,
    "max_position_embeddings": 9,
    "init_std": 0.3,
    "scale_embedding": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 13,
    "max_position_embeddings": 9,
    "initializer_range": 0.3,
}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 3,
    "num_layers": 1,
    "num_heads": HEADS,
    "d_ff": 13,
    "decoder_start_token_id": 0,
}
LOW = {"qk_rank": 3, "ov_rank": 2, "ffn_rank": 5, "embedding_rank": 6}
LISTS = {"qk_rank": [3, None], "ov_rank": [None, 2], "ffn_rank": [4, 7]}


# Inputs


def ids(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape or (BATCH, LENGTH))


def tokens() -> dict[str, Tensor]:
    """Return two sentences, the end of the first of which is padding."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, 3:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def words() -> dict[str, Tensor]:
    labels = ids()
    labels[0, 2:] = -100
    return {**tokens(), "labels": labels}


def memory() -> dict[str, Tensor]:
    """Return the states of an encoder, the last of which is padding in the second sentence."""
    mask = torch.ones(BATCH, 4, dtype=torch.long)
    mask[1, 3:] = 0
    return {"encoder_hidden_states": torch.randn(BATCH, 4, HIDDEN), "encoder_attention_mask": mask}


def images(size: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": torch.randint(LABELS, (BATCH,))}


# Models


def build(name: str, sizes: dict[str, Any], dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """Return a model in evaluation mode whose biases, norms and statistics are not what they start as."""
    model_class = getattr(hf_fnl, name, None) or getattr(transformers, name)
    model = model_class._from_config(model_class.config_class(**{**sizes, **fields}), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                module.num_batches_tracked.fill_(3)
    return model


def cut(model: nn.Module, *, include: Any = ("*",), **options: Any) -> Any:
    """Return a model after surgery."""
    factorize_(model, FactorizationConfig(include=include, **options))
    return model


def cut_inner(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Return an image classifier after surgery on all of its convolutions but the first."""
    return cut(model, kinds=("conv",), include=inner_convolutions(model), **options)


def write(name: str, model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> PreTrainedModel:
    """Save a model with inputs and its outputs for them, and return it."""
    model.save_pretrained(HERE / name, **options)
    inputs = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    with torch.no_grad():
        outputs = {key: value for key, value in model(**inputs).items() if isinstance(value, Tensor)}
    write_expected(name, inputs, outputs)
    return model


def write_expected(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    tensors = {f"inputs.{key}": value for key, value in inputs.items()}
    tensors |= {f"outputs.{key}": value.contiguous().clone() for key, value in outputs.items()}
    save_file(tensors, HERE / name / "expected.safetensors")


def write_bert() -> None:
    spans = {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([1, 4])}
    pretraining = {**words(), "next_sentence_label": torch.tensor([0, 1])}
    write("bert-backbone", build("FactorizedBertModel", BERT, **LOW), tokens())
    write("bert-pretraining", build("FactorizedBertForPreTraining", BERT, **LOW, num_hidden_layers=2), pretraining)
    untied = build("FactorizedBertForPreTraining", BERT, **LOW, tie_word_embeddings=False)
    write("bert-pretraining-untied", untied, pretraining)
    write("bert-masked-lm", build("FactorizedBertForMaskedLM", BERT, **LISTS, num_hidden_layers=2), words())
    started = {"linear": "spectral", "ov": "spectral_ones"}
    mapped = build("FactorizedBertForMaskedLM", BERT, **LOW, tie_word_embeddings=False, factor_init=started)
    write("bert-masked-lm-untied", mapped, words())
    answering = build("FactorizedBertForQuestionAnswering", BERT, torch.float64, **LOW, factor_init="spectral_ones")
    write("bert-question-answering-float64", answering, {**tokens(), **spans})
    decoder = {"is_decoder": True, "add_cross_attention": True}
    write("bert-decoder", build("FactorizedBertLMHeadModel", BERT, **LOW, **decoder), {**words(), **memory()})


def write_gpt2() -> None:
    write("gpt2-lm", build("FactorizedGPT2LMHeadModel", GPT2, **LOW), words())
    write("gpt2-lm-qkv", build("FactorizedGPT2LMHeadModel", GPT2, qkv_rank=[5, 3], ffn_rank=4), words())
    crossing = build("FactorizedGPT2LMHeadModel", GPT2, **LISTS, add_cross_attention=True, factor_init="default")
    write("gpt2-lm-cross", crossing, {**words(), **memory()})
    head = build("FactorizedGPT2ForSequenceClassification", GPT2, torch.bfloat16, ov_rank=3, num_labels=LABELS)
    write("gpt2-sequence-bfloat16", head, {**tokens(), "labels": torch.tensor([2, 0])})


def write_marian() -> None:
    pair = words()
    write("marian-mt", build("FactorizedMarianMTModel", MARIAN, **LOW), pair)
    separate = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB - 2}
    few = {**pair, "labels": pair["labels"].clamp(max=VOCAB - 3)}
    write("marian-mt-separate", build("FactorizedMarianMTModel", MARIAN, **LOW, **separate), few)
    write("marian-mt-untied", build("FactorizedMarianMTModel", MARIAN, **LOW, tie_word_embeddings=False), pair)
    lists = {"qk_rank": [3, None, 2], "ov_rank": [2, 3, None], "ffn_rank": [4, 7, None], "embedding_rank": 6}
    write("marian-mt-pre-norm", build("FactorizedMarianMTModel", MARIAN, **lists, normalize_before=True), pair)
    alone = {**MARIAN, "encoder_layers": MARIAN["decoder_layers"]}
    write("marian-decoder", build("FactorizedMarianForCausalLM", alone, **LOW), {**words(), **memory()})


def write_vision() -> None:
    small = {"width": 2, "image_size": 8, "num_labels": LABELS}
    resnet, conv = {**small, "depth": 8}, {"shortcut": "conv"}
    write("cifar-resnet", build("CifarResNetForImageClassification", resnet), images())
    spatial = cut_inner(build("CifarResNetForImageClassification", resnet), rank_scale=0.5)
    write("cifar-resnet-spatial", spatial, images())
    tucker = build("CifarResNetForImageClassification", resnet, **conv)
    write("cifar-resnet-tucker", cut_inner(tucker, conv_scheme="tucker", rank=2, init="default"), images())
    vgg = build("VGGForImageClassification", {**small, "width": 1, "depth": 11, "image_size": 16})
    write("vgg-channel", cut_inner(vgg, conv_scheme="channel", rank=1, init="spectral_ones"), images(16))
    wide = {**small, "depth": 10, "width": 1, "widen_factor": 2}
    trains = cut_inner(build("WideResNetForImageClassification", wide), conv_scheme="tt", rank_scale=0.5)
    write("wide-resnet-tt", trains, images())
    overcomplete = {"overcomplete": True, "init": "default"}
    wider = cut_inner(build("CifarResNetForImageClassification", resnet), rank_scale=1.5, **overcomplete)
    write("cifar-resnet-overcomplete", wider, images())
    deep = cut_inner(build("WideResNetForImageClassification", wide), rank_scale=1, deep=True, **overcomplete)
    write("wide-resnet-overcomplete-deep", deep, images())


def write_surgery() -> None:
    both = {"kinds": ("linear", "embedding")}
    write("surgery-bert", cut(build("BertForMaskedLM", BERT), rank_scale=0.5, **both, init="default"), words())
    write("surgery-gpt2-deep", cut(build("GPT2LMHeadModel", GPT2), include=("*.mlp.*",), rank=4, deep=True), words())
    llama = cut(build("LlamaForCausalLM", LLAMA), include=("*.mlp.*", "*_proj"), rank=3)
    write("surgery-llama", llama, inputs := words(), max_shard_size="4KB")
    write("surgery-llama-backbone", llama.model, tokens())
    merge_(llama)
    write("surgery-llama-merged", llama, inputs)
    t5 = cut(build("T5ForConditionalGeneration", T5), rank_scale=0.4, **both, init="spectral_ones")
    write("surgery-t5", t5, words())
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "bottleneck"}
    resnet = build("ResNetForImageClassification", sizes, num_labels=LABELS)
    write("surgery-resnet", cut(resnet, kinds=("conv", "linear"), rank_scale=0.3, deep=True), images(16))


def write_from_dense() -> None:
    bert = hf_fnl.FactorizedBertForMaskedLM.from_dense(build("BertForMaskedLM", BERT), **LOW)
    write("bert-from-dense", bert, inputs := words())
    write("bert-merged", bert.merge(), inputs)
    rule, kinds = RankRule(energy=0.7), ("qk", "ov", "ffn", "embedding")
    gpt2 = build("GPT2LMHeadModel", GPT2)
    gpt2 = hf_fnl.FactorizedGPT2LMHeadModel.from_dense(gpt2, rule=rule, kinds=kinds, calibration=tokens())
    write("gpt2-from-dense", gpt2, words())
    marian = hf_fnl.FactorizedMarianMTModel.from_dense(build("MarianMTModel", MARIAN), **LOW)
    write("marian-from-dense", marian, words())


def write_toy() -> None:
    """Save a model of plain torch beside the record of what was done to it."""
    folder = HERE / "surgery-toy"
    folder.mkdir()
    model = toy().eval()
    config = FactorizationConfig(kinds=("linear", "embedding"), rank=4)
    folder.joinpath("record.json").write_text(json.dumps(factorize_(model, config).to_dict(), indent=2) + "\n")
    save_model(model, str(folder / "model.safetensors"))
    inputs = torch.randint(11, (BATCH, LENGTH))
    with torch.no_grad():
        write_expected(folder.name, {"input": inputs}, {"scores": model(inputs)})


def write_checkpoint() -> None:
    """Train one step of two and keep its checkpoint."""
    torch.manual_seed(0)
    sizes = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hf_fnl.FactorizedBertForMaskedLM(hf_fnl.FactorizedBertConfig(**sizes, qk_rank=3, ov_rank=2))
    examples = [{"input_ids": row, "labels": row} for row in ids(4, LENGTH)]
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
    options |= {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that the checkpoint holds no path of this machine
        args = hf_fnl.FLAMBeTrainingArguments(output_dir="run", **options)
        hf_fnl.FLAMBeTrainer(model, args, train_dataset=examples).train()
        os.chdir(before)
        shutil.copytree(Path(folder, "run", "checkpoint-1"), HERE / "checkpoint-1")


def main() -> None:
    """Write every folder anew."""
    if hf_fnl.__version__ != "0.1.0":
        sys.exit(f"write.py imports hf_fnl 0.1.0 of commit fea37fb, got {hf_fnl.__version__} in {hf_fnl.__path__[0]}")
    for folder in HERE.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    for number, part in enumerate(PARTS):
        torch.manual_seed(number)
        part()


PARTS = (
    write_bert,
    write_gpt2,
    write_marian,
    write_vision,
    write_surgery,
    write_from_dense,
    write_toy,
    write_checkpoint,
)

if __name__ == "__main__":
    main()
