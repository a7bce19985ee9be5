"""PEFT's adapters on every dense layer of every family, whatever was cut."""

import bert_cases
import gpt2_cases
import marian_cases
import peft
import pytest
import torch
from family import Head, Ranks
from packaging.version import Version
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),  # is for Conv1D, and a head is none
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),  # PEFT's name for a cache
]

# PEFT merges into a weight as it is given, and the heads of one attention are given in one width: that of the wider.
NO_LAYERS = {"qk_rank": 5, "ov_rank": 5}
CASES: dict[str, tuple[Head, Ranks]] = {
    f"{head_name}-{ranks_name}": (head, {**ranks, **(NO_LAYERS if "ov_rank" in ranks else {})})
    for head_name, head, levels in (
        ("bert-cross-decoder", bert_cases.CROSS_DECODER, {"all": bert_cases.LOW}),
        ("gpt2-lm", gpt2_cases.LM, {"only-ov": {"ov_rank": 3}}),
        ("gpt2-cross-lm", gpt2_cases.CROSS_LM, {"all": gpt2_cases.LOW, "qkv": gpt2_cases.LOW_QKV}),
        ("marian-pre-norm", marian_cases.PRE_NORM, {"all": marian_cases.LOW}),
    )
    for ranks_name, ranks in levels.items()
}
each_case = pytest.mark.parametrize(("head", "ranks"), CASES.values(), ids=CASES)


def targets(model: PreTrainedModel, tied: bool = True) -> list[str]:
    """Every dense layer; the output matrix where it is not tied, or also then."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return [name for name, module in layers.items() if tied or module.weight is not embedding]


def config(kind: str, model: PreTrainedModel, *, tied: bool) -> LoraConfig | IA3Config:
    options = {"target_modules": targets(model, tied)}
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    if kind == "ia3":
        return IA3Config(feedforward_modules=[], init_ia3_weights=False, **options)
    return LoraConfig(r=2, use_dora=kind == "dora", init_lora_weights=False, **options)


@each_case
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_every_adapter_trains_and_merges(head: Head, ranks: Ranks, kind: str) -> None:
    batch = head.batch()
    adapted = get_peft_model(head.build(ranks), config(kind, head.build(ranks), tied=True))
    adapted.train()(**batch).loss.backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
    # Merged into a matrix that is tied, an adapter would change the embedding, too.
    adapted = get_peft_model(head.build(ranks), config(kind, head.build(ranks), tied=False)).eval()
    with torch.no_grad():
        before = adapted(**batch).loss
        assert_close(adapted.merge_and_unload()(**batch).loss, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [bert_cases.MASKED_LM, marian_cases.MT], ids=["bert", "marian"])
def test_an_adapter_around_heads_of_two_widths_trains_and_is_not_merged(head: Head) -> None:
    ranks = {"qk_rank": 5, "ov_rank": 2}
    adapted = get_peft_model(head.build(ranks), config("lora", head.build(ranks), tied=False)).train()
    adapted(**head.batch()).loss.backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
    with pytest.raises(RuntimeError, match="must match"):
        adapted.merge_and_unload()


@each_case
@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"Transformers takes adapters of PEFT {MIN_PEFT_VERSION}",
)
def test_add_adapter_of_transformers_starts_as_the_model(head: Head, ranks: Ranks) -> None:
    model, batch = head.build(ranks), head.batch()
    with torch.no_grad():
        before = model(**batch).loss
        of_gpt2 = any(isinstance(module, Conv1D) for module in model.modules())
        model.add_adapter(LoraConfig(target_modules=targets(model), r=2, fan_in_fan_out=of_gpt2))
        assert_close(model(**batch).loss, before)


@pytest.mark.parametrize(
    ("head", "task"),
    [(gpt2_cases.LM, "CAUSAL_LM"), (marian_cases.MT, "SEQ_2_SEQ_LM"), (bert_cases.SEQUENCE, "SEQ_CLS")],
    ids=["gpt2", "marian", "bert"],
)
@pytest.mark.parametrize("config", [PromptTuningConfig], ids=["prompt"])
def test_virtual_tokens_train_in_front_of_a_factorized_embedding(head: Head, task: str, config: type) -> None:
    for ranks in (head.family.low["all"], {}):
        model = head.build(ranks)
        adapted = get_peft_model(model, config(task_type=task, num_virtual_tokens=2)).train()
        adapted(**head.batch()).loss.backward()
        assert [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("ranks", "width"), [({"qk_rank": 5, "ov_rank": 5}, 5), ({"ffn_rank": 8}, 7)], ids=["heads", "ffn"]
)
def test_prefixes_of_keys_and_values_are_as_wide_as_the_heads(ranks: Ranks, width: int) -> None:
    model = gpt2_cases.LM.build(ranks)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2, "token_dim": width * model.config.n_head}
    adapted = get_peft_model(model, PrefixTuningConfig(**options)).train()
    adapted(**gpt2_cases.LM.batch()).loss.backward()
    assert [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []
