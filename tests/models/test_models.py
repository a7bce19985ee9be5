"""Every head of every family computes what the stock model computes, and starts from what it starts from."""

import pytest
import torch
from family import (
    CHECKPOINTING,
    Head,
    Ranks,
    add,
    factorized_layers,
    gradients,
    loss_and_gradients,
    needs_flex_attention,
    run,
)
from model_cases import HEADS, NO_DROPOUT, each_head, each_head_with_ranks, some
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl import find_products
from hf_fnl.layers.linear import dense_weight

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # two layers of float32, whose weights went through a decomposition
EXACT = {"rtol": 0, "atol": 0}
each_head_with_a_loss = some(*(name for name, head in HEADS.items() if head.name != "Model"))


# At full rank


@each_head_with_ranks("full")
def test_full_rank_equals_the_stock_model_of_the_same_seed(head: Head, ranks: Ranks) -> None:
    options = {"output_hidden_states": True, "output_attentions": True}
    ours, stock = head.build(ranks, attention="eager"), head.build_stock(attention="eager")
    expected = run(stock, head.batch(), **options)
    assert_close(run(ours, head.batch(), **options), expected, **CLOSE)
    assert_close(ours(**head.batch(), return_dict=False)[0], stock(**head.batch(), return_dict=False)[0], **CLOSE)


@each_head_with_a_loss
@pytest.mark.filterwarnings("ignore:.*do not compute by qk products")
def test_full_rank_with_dropout_has_the_gradients_of_the_stock_model(head: Head) -> None:
    stock = head.build_stock().train()
    loss, slopes = seeded_loss_and_gradients(stock, head)
    largest = max(slope.abs().max().item() for slope in slopes.values())
    for ranks in head.family.full.values():
        ours = head.build(ranks).train()
        our_loss, our_slopes = seeded_loss_and_gradients(ours, head)
        assert_close(our_loss, loss, **CLOSE)
        turned = {name.rpartition(".")[0] for p in find_products(ours) for name in p.parameter_names}  # with biases
        shared = [name for name in our_slopes if name in slopes and name.rpartition(".")[0] not in turned]
        assert shared
        for name in shared:
            assert_close(our_slopes[name], slopes[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def seeded_loss_and_gradients(model: PreTrainedModel, head: Head) -> tuple[Tensor, dict[str, Tensor]]:
    batch = head.batch()
    torch.manual_seed(2)  # of dropout
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


@each_head
def test_no_rank_at_all_is_the_stock_model(head: Head) -> None:
    ours, stock = head.build({}), head.build_stock()
    assert_close(dict(ours.named_parameters()), dict(stock.named_parameters()), **EXACT)


@pytest.mark.slow  # compiles a kernel
@needs_flex_attention
@pytest.mark.filterwarnings("ignore")  # of torch.compile and of the block mask, none of them ours
def test_flex_attention_equals_sdpa_at_unequal_ranks() -> None:
    head, fields = HEADS["bert-backbone"], {"qk_rank": 4, "ov_rank": 2, "hidden_size": 24}  # it takes no odd widths
    ours, expected = (run(head.build(fields, attention=kernel), head.batch()) for kernel in ("flex_attention", "sdpa"))
    assert_close(ours, expected, **CLOSE)


@some(
    *("bert-pretraining", "bert-masked-lm", "bert-decoder", "gpt2-lm", "gpt2-cross-lm", "llama-lm"),
    *("marian-translation", "marian-pre-norm", "marian-decoder"),
)
def test_unequal_parts_of_a_batch_with_its_totals_add_up(head: Head) -> None:
    model, batch = head.build(head.family.low["all"], **NO_DROPOUT[head.family.name]).train(), head.batch()
    is_shifted = head.name in ("LMHeadModel", "ForCausalLM") and head.family.name != "Marian"
    labels = batch["labels"][:, 1:] if is_shifted else batch["labels"]
    totals = {"num_items_in_batch": (labels != -100).sum()}
    if "next_sentence_label" in batch:
        totals["num_sequences_in_batch"] = len(labels)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, None))]
    whole = loss_and_gradients(model, batch)
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert_close(add([loss_and_gradients(model, part, **totals) for part in parts]), whole, **close)
    assert_close(loss_and_gradients(model, batch, **totals), whole, **close)


def test_the_trainer_is_told_of_which_heads_parts_add_up() -> None:
    told = {head.ours.__name__ for head in HEADS.values() if getattr(head.ours, "accepts_loss_kwargs", False)}
    names = ("BertForPreTraining", "BertForMaskedLM", "BertLMHeadModel", "GPT2LMHeadModel", "MarianMTModel")
    assert told == {f"Factorized{name}" for name in (*names, "MarianForCausalLM")}


# What a model starts from

_CUT = {"qk_rank": ("qk", 4), "ov_rank": ("ov", 4), "ffn_rank": ("linear", 4), "embedding_rank": ("embedding", 1)}


@pytest.mark.parametrize(
    ("name", "option", "kind", "count"),
    [
        *(("bert-cross-decoder", option, *cut) for option, cut in _CUT.items()),
        *(("gpt2-cross-lm", option, *cut) for option, cut in _CUT.items()),
        ("gpt2-cross-lm", "qkv_rank", "linear", 6),
        ("marian-translation", "qk_rank", "qk", 8),
        ("marian-pre-norm", "ov_rank", "ov", 8),
        ("marian-pre-norm", "ffn_rank", "linear", 10),
        ("marian-translation", "embedding_rank", "embedding", 1),
    ],
)
def test_only_the_named_product_is_cut_and_to_its_best_approximation(
    name: str, option: str, kind: str, count: int
) -> None:
    rank = {"qk_rank": 5, "ov_rank": 2}.get(option, 11)
    no_padding = {"pad_token_id": None}  # its row is zeroed after the table was cut
    ours, stock = HEADS[name].build({option: rank}, **no_padding), HEADS[name].build_stock(**no_padding)
    cut = find_products(ours, [kind])
    assert len(cut) == count
    for product in cut:
        U, S, Vt = torch.linalg.svd(dense_matrix(stock, product.name))
        assert_close(product.matrix(ours), (U[..., :rank] * S[..., None, :rank]) @ Vt[..., :rank, :], **CLOSE)
        assert product.factors(ours)[0].shape[-1] == rank

    for product in find_products(ours, {"qk": ["ov"], "ov": ["qk"]}.get(kind, [kind])):
        if product not in cut:
            assert_close(product.matrix(ours), dense_matrix(stock, product.name), **EXACT)
    touched = {name for product in cut for name in product.parameter_names}
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if name not in touched and parameter.shape == theirs[name].shape:
            assert_close(parameter, theirs[name], **EXACT, msg=name)


def dense_matrix(stock: PreTrainedModel, name: str) -> Tensor:
    """The matrix in a stock model that a product of ours stands for."""
    heads = {product.name: product for product in find_products(stock, ["qk", "ov"])}
    if name in heads:
        return heads[name].matrix(stock).detach()
    layer = stock.get_submodule(name)
    return (layer.weight if isinstance(layer, torch.nn.Embedding) else dense_weight(layer)).detach()


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("bert-masked-lm", "all"), ("gpt2-lm", "all"), ("gpt2-lm", "qkv")],
    ids=["bert", "gpt2", "gpt2-qkv"],
)
def test_spectral_ones_starts_from_the_directions_alone(name: str, ranks: str) -> None:
    low = HEADS[name].family.low[ranks]
    spectral, ones = (HEADS[name].build(low, factor_init=how) for how in ("spectral", "spectral_ones"))
    for product in find_products(ones):
        for factor, scaled in zip(product.factors(ones), product.factors(spectral), strict=True):
            norms = torch.linalg.vector_norm(scaled, dim=-2, keepdim=True)
            lengths = torch.linalg.vector_norm(factor, dim=-2, keepdim=True)
            assert_close(factor / lengths, scaled / norms, **CLOSE)
            if (product.kind, name) != ("embedding", "bert-masked-lm"):  # its padding row is zero
                assert_close(factor.mT @ factor, torch.eye(factor.shape[-1]).expand_as(factor.mT @ factor), **CLOSE)


# Names, ties, graphs


@each_head_with_ranks("low")
def test_names_are_those_of_the_stock_model(head: Head, ranks: Ranks) -> None:
    ours, stock = head.build(ranks), head.build_stock()
    expected = {name for name, _ in stock.named_parameters()}  # tied ones appear once
    for name in factorized_layers(ours):
        if f"{name}.weight" in expected:
            expected = expected - {f"{name}.weight"} | {f"{name}.U", f"{name}.V"}
    assert {name for name, _ in ours.named_parameters()} == expected


@some("bert-pretraining", "bert-masked-lm", "bert-decoder", "gpt2-lm", "gpt2-double")
def test_the_output_matrix_is_tied_to_the_embedding(head: Head) -> None:
    ranks = head.family.low["all"]
    model = head.build(ranks)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert output.U is embedding.U
    assert output.V is embedding.V
    untied = head.build(ranks, tie_word_embeddings=False)
    assert untied.get_output_embeddings().U is not untied.get_input_embeddings().U
    assert torch.isfinite(untied.get_output_embeddings().composed()).all()


@some("bert-cross-decoder", "gpt2-cross-lm", "llama-lm", "marian-pre-norm", "marian-decoder")
def test_gradient_checkpointing_changes_nothing(head: Head) -> None:
    for ranks in head.family.low.values():
        model = head.build(ranks, use_cache=False).train()  # keys in a cache lie in memory in another way
        results = []
        for checkpointing in (False, True):
            if checkpointing:
                getattr(model, f"{CHECKPOINTING}_enable")()
            loss, slopes = seeded_loss_and_gradients(model, head)
            results.append((loss, slopes))
        assert_close(*results, rtol=1e-5, atol=1e-7)  # gradients of a tied table are added up in another order


@some("llama-lm")  # others are in test_compile.py
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
def test_a_training_step_compiles_to_one_graph(head: Head) -> None:
    torch.compiler.reset()
    model = head.build(head.family.low["all"]).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # needs no compiler; a break would be an error
    assert_close(*(seeded_loss_and_gradients(each, head)[0] for each in (compiled, model)), **EXACT)
