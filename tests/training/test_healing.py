"""Healing: the loss is the distance from the dense model, it falls from any start, and a run goes on where it was."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    PreTrainedModel,
)

from hf_fnl import FactorizationConfig, FactorizedBertModel, factorize_
from hf_fnl.training import DistillationTrainer, FLAMBeTrainingArguments, heal_
from hf_fnl.training.healing import distillation_loss

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def batches(count: int, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(40, (4, 9), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[:2, 5:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()


def cut(model: PreTrainedModel) -> PreTrainedModel:
    if isinstance(model, BertModel):
        return FactorizedBertModel.from_dense(model, ffn_rank=5, ov_rank=4)
    small = llama()
    small.load_state_dict(model.state_dict())
    factorize_(small, FactorizationConfig(rank=5, include=["model.layers.*"]))
    return small


def test_the_loss_is_the_divergence_at_positions_that_count() -> None:
    logits, wanted = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    p, q = wanted.softmax(-1), logits.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert_close(distillation_loss({"logits": logits}, {"logits": wanted}), each.mean())
    expected = (each[0, 0] + each[0, 1] + each[1, 0]) / 3
    assert_close(distillation_loss({"logits": logits}, {"logits": wanted}, mask), expected)
    states = {"last_hidden_state": 2 * wanted}
    assert_close(distillation_loss(states, {"last_hidden_state": wanted}, mask), torch.tensor(1.0))
    assert_close(distillation_loss({"logits": logits[:, 0]}, {"logits": wanted[:, 0]}, mask), each[:, 0].mean())
    with pytest.raises(ValueError, match=r"there are \(2, 2\) for an attention_mask \(2, 3\)"):
        distillation_loss({"logits": logits[:, :2]}, {"logits": wanted[:, :2]}, mask)


def test_the_loss_of_images_is_over_classes_and_channels_and_of_other_than_classes_a_square() -> None:
    found, wanted = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    p, q = wanted.softmax(1), found.softmax(1)
    assert_close(distillation_loss({"logits": found}, {"logits": wanted}), (p * (p / q).log()).sum(1).mean())
    relative = ((found - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    assert_close(distillation_loss({"last_hidden_state": found}, {"last_hidden_state": wanted}), relative)
    found, wanted, mask = torch.randn(4, 1), torch.randn(4, 1), torch.ones(4, 9)
    square = (found - wanted).square().mean()  # softmax makes ones of them
    assert_close(distillation_loss({"logits": found}, {"logits": wanted}, mask), square)
    several = {"logits": torch.cat([found, wanted], 1)}, {"logits": torch.cat([wanted, wanted], 1)}
    assert_close(distillation_loss(*several, mask, "multi_label_classification"), square / 2)


def test_a_model_of_one_number_is_healed() -> None:
    torch.manual_seed(0)
    dense = BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.3, num_labels=1)).eval()
    small = copy.deepcopy(dense)
    factorize_(small, FactorizationConfig(rank=3))
    data = batches(12, padded=True)
    before = (small(**data[0]).logits - dense(**data[0]).logits).square().mean().item()
    healed = heal_(small, dense, data, steps=60, learning_rate=2e-3)
    assert healed["held_out_after"] < 0.9 * healed["held_out_before"]
    assert (small(**data[0]).logits - dense(**data[0]).logits).square().mean().item() < before


@pytest.mark.parametrize("length", [9, 6])
def test_padding_of_a_source_hides_nothing_of_the_decoder(length: int) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    dense = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, init_std=0.3, **sizes)).eval()
    small = copy.deepcopy(dense)
    factorize_(small, FactorizationConfig(rank=3))
    data = [{**b, "decoder_input_ids": torch.randint(3, 40, (4, length))} for b in batches(2, padded=True)]
    with torch.no_grad():
        p, q = (model(**data[0]).logits.softmax(-1) for model in (dense, small))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    found = heal_(small, dense, data, steps=1, disable_tqdm=True)["held_out_before"]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [llama, bert])
def test_the_held_out_loss_falls(build: Any, padded: bool) -> None:
    dense = build()
    small, before = cut(dense), {name: value.clone() for name, value in dense.state_dict().items()}
    data = batches(40, padded)
    found = heal_(small, dense, data, steps=120, learning_rate=3e-3, disable_tqdm=True)
    assert found["held_out_after"] < 0.6 * found["held_out_before"]
    with torch.no_grad():
        small.eval()
        losses = [distillation_loss(small(**b), dense(**b), b["attention_mask"]).item() for b in data[::10]]
    assert sum(losses) / len(losses) == pytest.approx(found["held_out_after"], rel=1e-4)
    assert_close(dict(dense.state_dict()), before, rtol=0, atol=0)
    assert getattr(small.config, "use_cache", True)  # which a Trainer turns off


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    dense, options = (
        llama(),
        {"learning_rate": 3e-3, "save_steps": 4, "disable_tqdm": True, "lr_scheduler_type": "constant"},
    )
    healed = []
    for stops in (None, 8):
        small, folder = cut(dense), tmp_path / str(stops)
        if stops is not None:
            heal_(small, dense, batches(6), steps=stops, output_dir=folder, **options)
            small = cut(dense)
        heal_(small, dense, batches(6), steps=12, output_dir=folder, **options)
        healed.append(dict(small.state_dict()))
    assert_close(healed[0], healed[1])


def test_a_rate_that_spoils_the_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps have a low rate of their own, and nothing is printed."""
    dense = llama()
    with pytest.warns(UserWarning, match=r"farther from the dense one on what is held out: .* lower learning_rate"):
        heal_(cut(dense), dense, batches(6), steps=3, learning_rate=30.0, disable_tqdm=True)
    found = heal_(cut(dense), dense, batches(6), steps=3, disable_tqdm=True)
    assert found["held_out_after"] < found["held_out_before"]
    assert capsys.readouterr().out == ""


def test_what_cannot_be_healed(tmp_path: Path) -> None:
    dense = llama()
    with pytest.raises(ValueError, match="two batches or more, one of which is held out; got 1"):
        heal_(cut(dense), dense, batches(1))
    with pytest.raises(ValueError, match="dense is the cut model itself"):
        heal_(dense, dense, batches(2))
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    two_sides = [BartForConditionalGeneration(BartConfig(vocab_size=40, **sizes)) for _ in range(2)]
    with pytest.raises(ValueError, match="an encoder-decoder needs decoder_input_ids: labels are not looked at"):
        heal_(*two_sides, [{**batch, "labels": batch["input_ids"]} for batch in batches(2)], steps=1)
    options = {"optim": "adamw_torch", "frobenius_decay": ["linear"], "frobenius_mode": "penalty"}
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path), report_to=[], **options)
    with pytest.raises(ValueError, match="frobenius_mode cannot be penalty where a teacher gives the loss"):
        DistillationTrainer(cut(dense), args, teacher=dense, train_dataset=batches(2))
    wider = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 41}))
    for other, shape in ((wider, r"\(4, 9, 41\)"), (llama().model, "None")):
        with pytest.raises(
            ValueError, match=rf"same outputs, and logits of the model are {shape}, of the teacher \(4,"
        ):
            heal_(other, dense, batches(2), steps=1)
    answering = [LlamaForQuestionAnswering(LlamaConfig(**SIZES)) for _ in range(2)]
    with pytest.raises(ValueError, match="gives logits or last_hidden_state, and this one start_logits, end_logits"):
        heal_(*answering, batches(2), steps=1)
    with pytest.raises(ValueError, match="a teacher gives the loss: leave compute_loss_func and label_smoothing"):
        heal_(cut(dense), dense, batches(2), label_smoothing_factor=0.1)
