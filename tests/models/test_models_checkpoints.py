"""A checkpoint comes back bit for bit, for every head of every family, and nothing else is touched on the way."""

from pathlib import Path

import pytest
import torch
from family import Head, Ranks, no_decompositions, run_double
from model_cases import HEADS, TYPICAL, each_head, each_head_with_ranks, some
from safetensors import safe_open
from torch.testing import assert_close
from transformers import PreTrainedModel

EXACT = {"rtol": 0, "atol": 0}
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def trained(head: Head, ranks: Ranks, dtype: torch.dtype = torch.float32, **fields: object) -> PreTrainedModel:
    """A model none of whose parameters is what it starts as."""
    model = head.build(ranks, **fields).to(dtype)
    with torch.no_grad():
        for parameter in (*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")):
            if parameter.requires_grad or not isinstance(parameter, torch.nn.Parameter):  # positions are computed
                parameter.normal_()
    return model


def assert_same_state(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert_close(dict(model.state_dict()), dict(other.state_dict()), **EXACT)


@each_head_with_ranks("low")
@pytest.mark.usefixtures("poisoned_memory")
def test_every_head_comes_back_bitwise(head: Head, ranks: Ranks, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if "ffn_rank" in ranks and head.name == "Model" else torch.float32
    model = trained(head, ranks, dtype)
    model.save_pretrained(tmp_path)
    with no_decompositions():
        loaded, info = head.auto_class.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is head.ours
    assert not any(info[problem] for problem in LOADING_PROBLEMS), info
    assert_same_state(loaded, model)
    frozen = [{n for n, p in each.named_parameters() if not p.requires_grad} for each in (loaded, model)]
    assert frozen[0] == frozen[1]
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in head.batch().items()}
    # Llama computes its positions in float32 when it is loaded, and a cast leaves them in bfloat16, stock or ours.
    if dtype == torch.float32 or not any("inv_freq" in name for name, _ in model.named_buffers()):
        assert_close(run_double(loaded, batch), run_double(model, batch))


@some("bert-masked-lm", "gpt2-lm")
def test_an_untied_output_matrix_comes_back_bitwise(head: Head, tmp_path: Path) -> None:
    model = trained(head, head.family.low["all"], tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert not torch.equal(loaded.get_output_embeddings().U, loaded.get_input_embeddings().U)


@some("bert-pretraining", "gpt2-double")
def test_only_safetensors_is_written_and_ties_once(head: Head, tmp_path: Path) -> None:
    model = trained(head, head.family.low["all"])
    model.save_pretrained(tmp_path)
    files = {"config.json", "model.safetensors"} | ({"generation_config.json"} if model.can_generate() else set())
    assert {file.name for file in tmp_path.iterdir()} == files
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == {name for name, _ in model.named_parameters()}


@some("bert-pretraining", "gpt2-lm")
def test_a_checkpoint_in_several_files_comes_back(head: Head, tmp_path: Path) -> None:
    model = trained(head, head.family.low["all"])
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = head.auto_class.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    output, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert output.U is embedding.U
    assert output.V is embedding.V


@each_head
@pytest.mark.usefixtures("poisoned_memory")
def test_construction_leaves_no_memory_uninitialized(head: Head) -> None:
    every = head in [HEADS[name] for name in TYPICAL]
    for method in ("spectral", "spectral_ones", "default", "he") if every else ("spectral",):
        model = head.build(head.family.low["all"], factor_init=method)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert torch.isfinite(tensor).all(), name


@some(
    *(n for n, head in HEADS.items() if head.name != "Model" and "cross" not in n and n[:4] in ("bert", "gpt2")),
    "llama-lm",
)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_head_on_the_checkpoint_of_a_backbone(head: Head, tmp_path: Path) -> None:
    (backbone,) = (other for other in HEADS.values() if other.family is head.family and other.name == "Model")
    saved = trained(backbone, head.family.low["all"])
    saved.save_pretrained(tmp_path)
    with no_decompositions():
        loaded, info = head.auto_class.from_pretrained(tmp_path, **head.config, output_loading_info=True)
    old = saved.state_dict()
    assert not info["mismatched_keys"]
    assert all(key.startswith("pooler") for key in info["unexpected_keys"])
    own = {n for n, _ in loaded.named_parameters() if not n.startswith(f"{loaded.base_model_prefix}.")}
    assert {key for key in info["missing_keys"] if key in dict(loaded.named_parameters())} == own
    for key, value in loaded.base_model.state_dict().items():
        assert torch.equal(value, old[key]), key
    for key, parameter in loaded.named_parameters():
        assert torch.isfinite(parameter).all(), key


@some("bert-masked-lm", "gpt2-lm", "marian-translation")
def test_a_stock_checkpoint_loads_where_nothing_is_factorized(head: Head, tmp_path: Path) -> None:
    stock = head.build_stock()
    stock.save_pretrained(tmp_path)
    config = head.family.config(**head.family.sizes)
    loaded, info = head.ours.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(run_double(loaded, head.batch()), run_double(stock, head.batch()))


@some(*TYPICAL)
def test_construction_on_the_meta_device_decomposes_nothing(head: Head) -> None:
    ranks = head.family.low["all"]
    with no_decompositions():
        with pytest.raises(AssertionError, match="decomposed"):
            head.build(ranks)
        with torch.device("meta"):
            model = head.build(ranks)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in head.build(ranks).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
