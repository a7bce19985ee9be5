"""A trained stock model of any family, truncated: equal at full rank, the best approximation below it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Head, Ranks, attentions, factorized_layers, random_vectors_, ranks_of, run, run_double
from model_cases import HEADS, TYPICAL, each_head_with_ranks, some
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, PreTrainedModel

from hf_fnl import RankRule
from hf_fnl.layers import FactorizedLinear, HeadProjection
from hf_fnl.layers.heads import trim_heads
from hf_fnl.layers.linear import dense_weight
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery.heads import Attention

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
EXACT = {"rtol": 0, "atol": 0}
HEADS_OF, WIDTH = 3, 7  # in all families here
LMS = ("bert-masked-lm", "gpt2-lm")
calibrated_or_not = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])


def stock_of(head: Head, **fields: Any) -> PreTrainedModel:
    model = head.build_source(**fields)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.normal_()
    return random_vectors_(model)


def truncated(head: Head, stock: PreTrainedModel, ranks: Ranks, calibrated: bool = False) -> PreTrainedModel:
    batch = head.batch()
    if (mask := batch.get("attention_mask")) is not None and mask.ndim > 2:  # of choices, whose padding is not cut
        batch["attention_mask"] = torch.ones_like(mask)
    return head.ours.from_dense(stock, **ranks, calibration=batch if calibrated else None)


def tail(matrix: Tensor, rank: int) -> Tensor:
    """What the best approximation of this rank loses."""
    return torch.linalg.svdvals(matrix.detach().double())[..., rank:].square().sum(-1)


def lost(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.detach().double() - theirs.detach().double()).square().sum((-2, -1))


def matrix_of(layer: nn.Module) -> Tensor:
    return layer.weight if isinstance(layer, nn.Embedding) else dense_weight(layer)


def head_products(attention: Attention) -> dict[str, Tensor]:
    """``[Q; b_q] K^T`` and ``V O^T`` of every head; those that share a key or value below one another."""
    query, key, value, output = (attention.projection(side) for side in range(4))
    Q_h = query.weight if query.bias is None else torch.cat([query.weight, query.bias.unsqueeze(1)], 1)
    stacked = (x.unflatten(0, (attention.num_kv_heads, -1)).flatten(1, 2) for x in (Q_h, output.weight))
    return {"qk": next(stacked) @ key.weight.mT, "ov": next(stacked) @ value.weight.mT}


# At full rank, and below it


@each_head_with_ranks("full")
def test_full_rank_computes_the_same(head: Head, ranks: Ranks) -> None:
    stock, batch, calibrated = stock_of(head), head.batch(), "ffn_rank" in ranks
    model = truncated(head, stock, ranks, calibrated)
    assert type(model) is head.ours
    assert_close(run(model, batch), run(stock, batch), **CLOSE)
    other = head.batch(seed=7)
    assert_close(run(model.merge(), other), run(stock, other), **CLOSE)


@each_head_with_ranks("low")
def test_every_product_is_the_best_approximation(head: Head, ranks: Ranks) -> None:
    stock = stock_of(head)
    model = truncated(head, stock, ranks)
    for name, layer in factorized_layers(model).items():
        theirs = matrix_of(stock.get_submodule(name))
        assert_close(lost(layer.composed(), theirs), tail(theirs, layer.rank), rtol=1e-4, atol=1e-6)
    dense = attentions(stock)
    for name, ours in attentions(model).items():
        cut, whole = head_products(ours), head_products(dense[name])
        for kind, rank in ranks_of(ours).items():
            assert_close(lost(cut[kind], whole[kind]), tail(whole[kind], rank or 99), rtol=1e-4, atol=1e-6)
        check_biases(ours, dense[name])


def check_biases(ours: Attention, theirs: Attention) -> None:
    """A key's bias changes no weight; what is lost of a value's moves into the output's."""
    (_, key, value, output), (_, their_key, their_value, their_output) = ours.spans, theirs.spans
    if key.bias is None:
        return
    ranks, group = ranks_of(ours), ours.num_heads // ours.num_kv_heads
    if ranks["qk"] is None:
        assert torch.equal(key.bias, their_key.bias)
    else:
        assert not key.bias.any()
    if ranks["ov"] is not None:
        sums = [
            out.bias + out.weight @ v.bias.unflatten(0, (ours.num_kv_heads, -1)).repeat_interleave(group, 0).flatten()
            for v, out in ((value, output), (their_value, their_output))
        ]
        assert_close(*sums, rtol=1e-5, atol=1e-5)


# In the metric of data


@pytest.mark.usefixtures("all_outputs_count_alike")
@pytest.mark.parametrize(
    ("name", "ranks", "layer"),
    [
        ("bert-backbone", {"qk_rank": 5, "ov_rank": 2}, "encoder.layer.0.attention"),
        ("gpt2-backbone", {"qk_rank": 5, "ov_rank": 2}, "h.0.attn"),
        ("gpt2-cross-lm", {"qk_rank": 5, "ov_rank": 2}, "transformer.h.0.attn"),
    ],
)
def test_calibrated_heads_are_the_best_for_their_data(name: str, ranks: Ranks, layer: str) -> None:
    head = HEADS[name]
    stock, valid = stock_of(head), head.batch()["attention_mask"].bool()
    for option, rank in ranks.items():
        model = head.ours.from_dense(stock, **{option: rank}, calibration=head.batch())
        (theirs, their_output), (ours, our_output) = (attended(m, layer, head, valid) for m in (stock, model))
        if option == "qk_rank":  # a shift of all keys changes no weight
            exact, cut = (query @ (key - key.mean(1, keepdim=True)).mT for query, key, _ in (theirs, ours))
        else:  # the bias of the output takes over the mean
            exact, cut = (context @ O_h for context, O_h in ((theirs[2], their_output), (ours[2], our_output)))
            exact, cut = (x - x.mean(1, keepdim=True) for x in (exact, cut))
        assert_close(lost(cut, exact), tail(exact, rank), rtol=1e-3, atol=1e-3)


def unpadded(layer: nn.Module, x: Tensor) -> Tensor:
    """What flows through narrow heads, without the zeros that fill them up."""
    if not isinstance(layer, HeadProjection):
        return x
    sides = x.split([count * layer.width for count, _ in layer.heads], -1)
    return torch.cat([trim_heads(side, [head], layer.width) for side, head in zip(sides, layer.heads, strict=True)], -1)


def attended(
    model: PreTrainedModel, layer: str, head: Head, valid: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys and contexts of an attention ``(heads, tokens, width)``, and its output matrices."""
    attention, seen = model.get_submodule(layer), {}
    query, key, _, output = attentions(attention)[""].spans
    hooks = [
        query.layer.register_forward_hook(lambda module, args, x: seen.update(query=query.of(unpadded(module, x)))),
        key.layer.register_forward_hook(lambda module, args, x: seen.update(key=key.of(unpadded(module, x)))),
        output.layer.register_forward_pre_hook(lambda module, args: seen.update(context=unpadded(module, args[0]))),
    ]
    run(model, head.batch())
    for hook in hooks:
        hook.remove()
    states = (seen[name][valid].double().unflatten(-1, (HEADS_OF, -1)).transpose(0, 1) for name in sorted(seen))
    context, keys, queries = states
    weight = output.weight.detach().double().unflatten(1, (HEADS_OF, -1)).transpose(0, 1)
    return (queries, keys, context), weight.mT


@pytest.mark.usefixtures("all_outputs_count_alike")
@pytest.mark.parametrize(
    ("name", "ranks", "layer"),
    [
        ("bert-backbone", {"ffn_rank": 8}, "encoder.layer.0.intermediate.dense"),
        ("gpt2-backbone", {"ffn_rank": 8}, "h.0.mlp.c_fc"),
        ("gpt2-backbone", {"qkv_rank": 11}, "h.0.attn.c_attn"),
    ],
)
def test_a_calibrated_matrix_is_the_best_for_its_data(name: str, ranks: Ranks, layer: str) -> None:
    head = HEADS[name]
    stock, valid = stock_of(head), head.batch()["attention_mask"].bool()
    seen: list[Tensor] = []
    for model in (stock, truncated(head, stock, ranks, calibrated=True)):
        with model.get_submodule(layer).register_forward_hook(lambda module, args, result: seen.append(result)):
            run(model, head.batch())
    exact, cut = (outputs[valid].double() for outputs in seen)
    (rank,) = ranks.values()
    assert_close(lost(cut, exact), tail(exact - exact.mean(0), rank), rtol=1e-3, atol=1e-4)


# What is kept, and what is left alone


@some(*LMS, "marian-translation")
@calibrated_or_not
def test_the_source_is_left_as_it_is(head: Head, calibrated: bool) -> None:
    stock = stock_of(head).train()
    stock.get_submodule(f"{stock.base_model_prefix}.{head.family.one_layer.format(1)}").eval()
    before, modes = copy.deepcopy(stock.state_dict()), [m.training for m in stock.modules()]
    classes = [type(m) for m in stock.modules()]
    for ranks in head.family.low.values():
        model = truncated(head, stock, ranks, calibrated)
        assert_close(stock.state_dict(), before, **EXACT)
        assert [m.training for m in stock.modules()] == modes
        assert [type(m) for m in stock.modules()] == classes
        ours, theirs = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, stock))
        assert not ours & theirs
        model.train()(**head.batch()).loss.backward()
        assert all(p.grad is None for p in stock.parameters())


@some("bert-backbone", "gpt2-backbone")
@calibrated_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(head: Head, dtype: torch.dtype, calibrated: bool) -> None:
    stock = stock_of(head).to(dtype)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.15}
    for low, full in zip(head.family.low.values(), head.family.full.values(), strict=False):
        model = truncated(head, stock, low, calibrated)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.dtype == dtype
        assert_close(run(truncated(head, stock, full, calibrated), head.batch()), run(stock, head.batch()), **close)


@some("bert-decoder", "gpt2-lm")
def test_mode_kernel_and_settings_of_generation_are_kept(head: Head) -> None:
    attention = "eager"
    stock = head.build_stock(attention=attention)
    stock.generation_config.max_new_tokens = 7
    model = head.ours.from_dense(stock, ffn_rank=3)
    assert model.config._attn_implementation == attention
    assert not model.training
    assert head.ours.from_dense(stock.train(), ffn_rank=3).training
    assert model.generation_config.max_new_tokens == model.merge().generation_config.max_new_tokens == 7
    model.generation_config.max_new_tokens = 8
    assert stock.generation_config.max_new_tokens == 7


@some("bert-next-sentence", "gpt2-tokens")
def test_the_names_of_labels_are_kept(head: Head) -> None:
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    stock = head.build_stock(**{**head.config, "num_labels": 2, **labels})
    ours = head.ours.from_dense(stock, ffn_rank=3)
    assert ours.config.id2label == ours.merge().config.id2label == labels["id2label"]


@some(*LMS)
def test_what_is_frozen_stays_frozen(head: Head) -> None:
    stock = stock_of(head)
    layer = f"{stock.base_model_prefix}.{head.family.one_layer.format(0)}"
    stock.get_submodule(layer).requires_grad_(False)
    for ranks in head.family.low.values():
        named = dict(truncated(head, stock, ranks).named_parameters())
        assert {n for n, p in named.items() if not p.requires_grad} == {n for n in named if n.startswith(f"{layer}.")}


# The word embedding and what is tied to it


@some(*LMS, "gpt2-double")
@calibrated_or_not
def test_a_tied_output_matrix_is_the_embedding(head: Head, calibrated: bool) -> None:
    stock = stock_of(head)
    model = truncated(head, stock, {"embedding_rank": 13}, calibrated)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert output.U is embedding.U
    assert output.V is embedding.V
    whole = stock.get_input_embeddings().weight
    assert_close(lost(embedding.composed(), whole), tail(whole, 13), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("all_outputs_count_alike")
@some(*LMS)
@calibrated_or_not
def test_an_untied_output_matrix_is_cut_on_its_own(head: Head, calibrated: bool) -> None:
    stock = stock_of(head, tie_word_embeddings=False)
    model = head.ours.from_dense(stock, embedding_rank=13, calibration=head.batch() if calibrated else None)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert output.U is not embedding.U
    whole, table = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    assert_close(lost(embedding.composed(), table), tail(table, 13), rtol=1e-4, atol=0)
    if not calibrated:
        assert_close(lost(output.composed(), whole), tail(whole, 13), rtol=1e-4, atol=0)
        return
    seen: list[Tensor] = []
    with output.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        run(model, head.batch())
    x = seen[0][head.batch()["attention_mask"].bool()].double()
    outputs = x @ whole.detach().double().mT
    lost_outputs = x @ output.composed().detach().double().mT - outputs
    if output.bias is not None:  # takes over the mean of what is lost
        lost_outputs += (output.bias - stock.get_output_embeddings().bias).detach().double()
        outputs -= outputs.mean(0)
    assert_close(lost_outputs.square().sum(), tail(outputs, 13), rtol=1e-3, atol=1e-3)


# Ranks of every layer

_LISTS = {"qk_rank": [None, 3], "ov_rank": [2, None], "ffn_rank": [None, 5]}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("bert-cross-decoder", _LISTS),
        ("gpt2-cross-lm", _LISTS),
        ("gpt2-lm", {"qkv_rank": [None, 3], "ffn_rank": [5, None]}),
        ("gpt2-cross-lm", {"qkv_rank": [4, None]}),
    ],
)
@calibrated_or_not
def test_every_layer_may_have_its_own_ranks(name: str, ranks: Ranks, calibrated: bool, tmp_path: Path) -> None:
    head = HEADS[name]
    model = truncated(head, stock_of(head), ranks, calibrated)
    found: dict[str, list[int | None]] = {option: [] for option in ranks}
    for number in range(2):
        layer = model.base_model.get_submodule(head.family.one_layer.format(number))
        attention = ranks_of(next(iter(attentions(layer).values()), None))
        fused = {m.rank for n, m in factorized_layers(layer).items() if n.endswith("_attn")}
        others = {m.rank for n, m in factorized_layers(layer).items() if not n.endswith("_attn")}
        for option, value in {
            "qk_rank": attention["qk"],
            "ov_rank": attention["ov"],
            "qkv_rank": fused.pop() if fused else None,
            "ffn_rank": others.pop() if others else None,
        }.items():
            found.setdefault(option, []).append(value)
    assert {option: found[option] for option in ranks} == ranks
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded, info = head.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {option: getattr(loaded.config, option) for option in ranks} == ranks
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert_close(run_double(loaded, head.batch()), run_double(model, head.batch()))
    assert_close(run(loaded.merge(), head.batch()), run(model, head.batch()), **CLOSE)


_KINDS = ("qk", "ov", "ffn", "embedding")
_RULES = ("rank", "rank_scale", "ratio", "energy", "budget")
_KINDS_OF = {"bert-cross-decoder": _KINDS, "gpt2-cross-lm": ("qkv", "ffn"), "marian-separate": _KINDS}


@pytest.mark.parametrize(
    ("name", "kinds", "rule"),
    [
        *((name, kinds, rule) for name, kinds in _KINDS_OF.items() for rule in ("rank", "energy")),
        *(("gpt2-cross-lm", _KINDS, rule) for rule in _RULES),
        *(("marian-pre-norm", _KINDS, rule) for rule in ("rank_scale", "budget")),
    ],
)
def test_every_rule_chooses_every_kind(name: str, kinds: tuple[str, ...], rule: str) -> None:
    calibrated = rule in ("rank_scale", "budget")
    head, value = HEADS[name], {"rank": 3, "rank_scale": 0.6}.get(rule, 0.57)
    model = truncated(head, stock_of(head), {"rule": RankRule(**{rule: value}), "kinds": kinds}, calibrated)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    chosen = [getattr(model.config, f"{kind}_rank") for kind in kinds]
    assert any(chosen)
    if rule == "rank":
        assert chosen == [3] * len(kinds)
    if rule == "rank_scale":
        assert chosen == [4 if kind in ("qk", "ov") else 13 for kind in kinds]


@pytest.mark.parametrize(
    ("name", "width", "inner", "kinds"),
    [
        ("bert-backbone", "hidden_size", "intermediate_size", ("qk", "ov", "ffn")),
        ("gpt2-backbone", "n_embd", "n_inner", ("qk", "ov", "ffn")),
        ("gpt2-backbone", "n_embd", "n_inner", ("qkv", "ffn")),
    ],
)
@pytest.mark.parametrize("rule", ["ratio", "budget", "layer_ratio"])
def test_a_share_of_the_parameters_is_met(name: str, width: str, inner: str, kinds: tuple[str, ...], rule: str) -> None:
    head, calibrated = HEADS[name], rule == "budget"
    stock = stock_of(head, **{width: 48, inner: 130})
    model = truncated(head, stock, {"rule": RankRule(**{rule: 0.5}), "kinds": kinds}, calibrated)
    if rule == "layer_ratio":
        assert 0.98 * 0.5 <= matrices(model, kinds) / matrices(stock, kinds) <= 0.5
    else:
        before, after = (sum(p.numel() for p in each.parameters()) for each in (stock, model))
        assert 0.98 * 0.5 <= after / before <= 0.5
        assert parameter_count(model)["dense_equivalent"] == before
        assert parameter_count(model)["ratio"] == after / before


def matrices(model: PreTrainedModel, kinds: tuple[str, ...]) -> int:
    """Parameters of the matrices in all layers, without those that a rule for ``qkv`` leaves dense."""
    (layers,) = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = {name: p.numel() for name, p in layers.named_parameters() if p.ndim > 1}
    return sum(n for name, n in found.items() if "qkv" not in kinds or not name.endswith("attn.c_proj.weight"))


# In place, and from a model of ours


@some(*TYPICAL, *LMS, "marian-pre-norm")
def test_in_place_is_the_same_and_merges(head: Head) -> None:
    stock = stock_of(head)
    for ranks, calibrated in zip(head.family.low.values(), (True, False), strict=False):
        model, expected = head.build({}), truncated(head, stock, ranks, calibrated)
        model.load_state_dict(stock.state_dict(), strict=False)  # a stock BERT lists a tied bias twice
        model.factorize_(**ranks, calibration=head.batch() if calibrated else None)
        assert type(model) is head.ours
        for field in (*model.config.rank_options(), "factor_init"):
            assert getattr(model.config, field) == getattr(expected.config, field)
        assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), **EXACT)
        assert_close(run_double(model, head.batch()), run_double(expected, head.batch()))
        assert_close(run(model.merge(), head.batch()), run(model, head.batch()), **CLOSE)


@some(*LMS)
def test_what_was_factorized_in_place_saves_and_trains(head: Head, tmp_path: Path) -> None:
    model = head.build({}).train()
    model.factorize_(**head.family.low["all"])
    assert model.training
    assert all(m.training for m in model.modules())
    assert model.get_output_embeddings().U is model.get_input_embeddings().U
    model(**head.batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert isinstance(loaded.get_output_embeddings(), FactorizedLinear)


@some(*LMS)
def test_a_folder_is_as_good_as_a_model_and_a_dense_one_of_ours_as_a_stock_one(head: Head, tmp_path: Path) -> None:
    stock, low = stock_of(head), head.family.low["all"]
    expected = run(truncated(head, stock, low), head.batch())
    stock.save_pretrained(tmp_path / "stock")
    dense = head.ours.from_pretrained(tmp_path / "stock", config=head.family.config(**head.family.sizes))
    for source in (tmp_path / "stock", str(tmp_path / "stock"), dense):
        assert_close(run(truncated(head, source, low), head.batch()), expected, **CLOSE)
    dense.save_pretrained(tmp_path / "dense")
    assert type(head.auto_class.from_pretrained(tmp_path / "dense")) is head.ours


@some(*LMS)
def test_a_factorized_model_is_not_factorized_again(head: Head) -> None:
    for ranks in head.family.low.values():
        model = head.build({})
        model.factorize_(**ranks)
        before = model.state_dict()
        with pytest.raises(ValueError, match=f"factorized already, with .*{max(ranks)}.*; merge"):
            model.factorize_(ffn_rank=3)
        assert_close(model.state_dict(), before, **EXACT)


@some(*LMS)
def test_what_cannot_be_done_leaves_the_model_as_it_was(head: Head) -> None:
    model = head.build({})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=r"ffn_rank must be in \[1, 21\], got 22"):
        model.factorize_(ffn_rank=22)
    assert_close(model.state_dict(), before, **EXACT)
    assert model.config.ffn_rank is None
