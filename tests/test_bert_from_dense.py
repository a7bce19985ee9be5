"""A trained stock BERT, truncated: equal at full rank, the best approximation below it, better still with data."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import (
    BACKBONE,
    CROSS_DECODER,
    DECODER,
    FULL,
    HEADS,
    LOW,
    MASKED_LM,
    NO_DROPOUT,
    SEQUENCE,
    SIZES,
    tokens,
)
from family import Head, run
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoConfig, BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.models.bert.modeling_bert import BertAttention

from hf_fnl import FactorizedBertForMaskedLM, FactorizedBertModel, RankRule
from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.models.bert import FactorizedBertAttention

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
EXACT = {"rtol": 0, "atol": 0}
HEADS_OF, WIDTH = SIZES["num_attention_heads"], SIZES["hidden_size"] // SIZES["num_attention_heads"]
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
calibrated_or_not = pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])


def stock_of(head: Head, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A stock model whose biases and norms are not what they start as, so that losing one shows."""
    model = head.build_stock(**fields)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


def tail(matrix: Tensor, rank: int) -> Tensor:
    """What the best approximation of this rank loses."""
    return torch.linalg.svdvals(matrix.detach().double())[..., rank:].square().sum(-1)


def lost(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.detach().double() - theirs.detach().double()).square().sum((-2, -1))


def to_heads(projection: torch.nn.Linear, *, bias: bool) -> Tensor:
    """``Q``, or ``[Q; b_q]``, of every head."""
    weight = projection.weight.unflatten(0, (HEADS_OF, -1)).mT
    return torch.cat([weight, projection.bias.unflatten(0, (HEADS_OF, 1, -1))], 1) if bias else weight


def head_products(attention: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """``[Q; b_q] K^T`` and ``V O^T`` of every head."""
    inner = attention.self
    O_h = attention.output.dense.weight.unflatten(1, (HEADS_OF, -1)).transpose(0, 1)
    return (
        to_heads(inner.query, bias=True) @ to_heads(inner.key, bias=False).mT,
        to_heads(inner.value, bias=False) @ O_h.mT,
    )


# At full rank, and below it


@each_head
@calibrated_or_not
@pytest.mark.parametrize("ranks", [FULL, {"ffn_rank": 21}, {"qk_rank": [7, None]}], ids=["all", "ffn", "one-layer"])
def test_full_rank_computes_the_same(head: Head, ranks: dict[str, Any], calibrated: bool) -> None:
    stock, batch = stock_of(head), head.batch()
    model = head.ours.from_dense(stock, **ranks, calibration=batch if calibrated else None)
    assert type(model) is head.ours
    assert_close(run(model, batch), run(stock, batch), **CLOSE)
    torch.manual_seed(7)
    other = head.inputs()
    assert_close(run(model.merge(), other), run(stock, other), **CLOSE)


@each_head
def test_every_product_is_the_best_approximation(head: Head) -> None:
    stock = stock_of(head)
    model = head.ours.from_dense(stock, **LOW)
    seen = set()
    for name, ours in model.named_modules():
        theirs = stock.get_submodule(name)
        if isinstance(ours, FactorizedBertAttention):
            for cut, whole, rank in zip(head_products(ours), head_products(theirs), (5, 2), strict=True):
                assert_close(lost(cut, whole), tail(whole, rank), rtol=1e-4, atol=1e-6)
                assert (tail(whole, rank) > 0.1).all()
            assert not ours.self.key.bias.any()
            assert not ours.self.value.bias.any()
        elif isinstance(ours, FactorizedLinear | FactorizedEmbedding):
            assert_close(lost(ours.composed(), theirs.weight), tail(theirs.weight, ours.rank), rtol=1e-4, atol=1e-6)
        else:
            continue
        seen.add(name.rpartition("layer.")[2])
    assert {"0.attention", "1.attention", "0.intermediate.dense", "1.output.dense"} <= seen
    assert ("0.crossattention" in seen) == (head is CROSS_DECODER)


@each_head
@calibrated_or_not
def test_the_merged_model_computes_what_the_truncated_one_does(head: Head, calibrated: bool) -> None:
    batch = head.batch()
    model = head.ours.from_dense(stock_of(head), **LOW, calibration=batch if calibrated else None)
    assert_close(run(model.merge(), batch), run(model, batch), **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_kernel_of_attention_is_the_sources(attention: str) -> None:
    stock = stock_of(BACKBONE, attention=attention)
    assert FactorizedBertModel.from_dense(stock, **LOW).config._attn_implementation == attention


# What is kept, and what is left alone


@calibrated_or_not
def test_the_source_is_left_as_it_is(calibrated: bool) -> None:
    stock = stock_of(MASKED_LM).train()
    stock.bert.pooler = None
    stock.bert.encoder.layer[1].eval()
    before, modes = copy.deepcopy(stock.state_dict()), [m.training for m in stock.modules()]
    model = FactorizedBertForMaskedLM.from_dense(stock, **LOW, calibration=MASKED_LM.batch() if calibrated else None)
    assert_close(stock.state_dict(), before, **EXACT)
    assert [m.training for m in stock.modules()] == modes
    assert type(stock.bert.encoder.layer[0].attention) is BertAttention
    ours, theirs = ({p.untyped_storage().data_ptr() for p in m.parameters()} for m in (model, stock))
    assert not ours & theirs
    model.train()
    model(**MASKED_LM.batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in stock.parameters())


@calibrated_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept(dtype: torch.dtype, calibrated: bool) -> None:
    stock, batch = stock_of(BACKBONE, dtype), BACKBONE.batch()
    model = FactorizedBertModel.from_dense(stock, **LOW, calibration=batch if calibrated else None)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.dtype == dtype
    whole = stock.encoder.layer[0].output.dense.weight
    if not calibrated:
        cut = model.encoder.layer[0].output.dense.composed()
        assert_close(lost(cut, whole), tail(whole, 8), rtol=1e-6 if dtype == torch.float64 else 1e-2, atol=0)
    full = FactorizedBertModel.from_dense(stock, **FULL, calibration=batch if calibrated else None)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    assert_close(run(full, batch), run(stock, batch), **close)


def test_mode_labels_and_generation_are_kept() -> None:
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    stock = HEADS["next-sentence"].build_stock(**labels).train()
    model = HEADS["next-sentence"].ours.from_dense(stock, ffn_rank=3)
    assert model.training
    assert model.config.id2label == labels["id2label"]
    decoder = DECODER.build_stock()
    decoder.generation_config.max_new_tokens = 7
    model = DECODER.ours.from_dense(decoder, ffn_rank=3)
    assert not model.training
    assert model.generation_config.max_new_tokens == 7
    model.generation_config.max_new_tokens = 8
    assert decoder.generation_config.max_new_tokens == 7


def test_what_is_frozen_stays_frozen() -> None:
    stock = stock_of(MASKED_LM)
    stock.bert.embeddings.requires_grad_(False)
    stock.bert.encoder.layer[0].requires_grad_(False)
    model = FactorizedBertForMaskedLM.from_dense(stock, **LOW)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("bert.embeddings", "bert.encoder.layer.0"))
    }


# The word embedding and what is tied to it


@calibrated_or_not
def test_a_tied_decoder_is_the_embedding(calibrated: bool) -> None:
    stock, batch = stock_of(MASKED_LM), MASKED_LM.batch()
    model = FactorizedBertForMaskedLM.from_dense(stock, embedding_rank=13, calibration=batch if calibrated else None)
    embedding, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert decoder.U is embedding.U
    assert decoder.V is embedding.V
    whole = stock.get_input_embeddings().weight
    assert_close(lost(embedding.composed(), whole), tail(whole, 13), rtol=1e-4, atol=0)
    assert torch.equal(model.cls.predictions.bias, stock.cls.predictions.bias)


@calibrated_or_not
def test_an_untied_decoder_is_cut_on_its_own(calibrated: bool) -> None:
    stock, batch = stock_of(MASKED_LM, tie_word_embeddings=False), MASKED_LM.batch()
    seen: list[Tensor] = []
    model = FactorizedBertForMaskedLM.from_dense(stock, embedding_rank=13, calibration=batch if calibrated else None)
    embedding, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert decoder.U is not embedding.U
    whole, table = stock.get_output_embeddings().weight, stock.get_input_embeddings().weight
    assert_close(lost(embedding.composed(), table), tail(table, 13), rtol=1e-4, atol=0)
    assert torch.equal(model.cls.predictions.bias, stock.cls.predictions.bias)
    if not calibrated:
        assert_close(lost(decoder.composed(), whole), tail(whole, 13), rtol=1e-4, atol=0)
        return
    with decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        run(model, batch)
    x = seen[0][batch["attention_mask"].bool()].double()
    outputs = x @ whole.detach().double().mT
    error = (x @ decoder.composed().detach().double().mT - outputs).square().sum()
    assert_close(error, tail(outputs, 13), rtol=1e-3, atol=1e-3)


# Ranks of every layer


@calibrated_or_not
@pytest.mark.parametrize("head", [MASKED_LM, CROSS_DECODER], ids=["masked-lm", "cross-decoder"])
def test_every_layer_may_have_its_own_ranks(head: Head, calibrated: bool, tmp_path: Path) -> None:
    batch = head.batch()
    ranks = {"qk_rank": [None, 3], "ov_rank": [2, None], "ffn_rank": [None, 5]}
    model = head.ours.from_dense(stock_of(head), **ranks, calibration=batch if calibrated else None)
    layers = model.bert.encoder.layer
    assert [layer.attention.self.query.out_features // HEADS_OF for layer in layers] == [7, 3]
    assert [layer.attention.self.value.out_features // HEADS_OF for layer in layers] == [2, 7]
    assert [getattr(layer.output.dense, "rank", None) for layer in layers] == [None, 5]
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded, info = head.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert {name: getattr(loaded.config, name) for name in ranks} == ranks
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert_close(run(loaded, batch), run(model, batch), **EXACT)
    assert_close(run(loaded.merge(), batch), run(model, batch), **CLOSE)


@pytest.mark.parametrize("rule", ["rank", "rank_scale", "ratio", "energy", "budget"])
@calibrated_or_not
@pytest.mark.parametrize("head", [MASKED_LM, CROSS_DECODER], ids=["masked-lm", "cross-decoder"])
def test_every_rule_chooses_every_kind(head: Head, rule: str, calibrated: bool) -> None:
    batch = head.batch()
    value = 3 if rule == "rank" else 0.6
    model = head.ours.from_dense(
        stock_of(head),
        rule=RankRule(**{rule: value}),
        kinds=("qk", "ov", "ffn", "embedding"),
        calibration=batch if calibrated else None,
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    chosen = [getattr(model.config, f"{kind}_rank") for kind in ("qk", "ov", "ffn", "embedding")]
    assert any(chosen)
    if rule == "rank":
        assert chosen == [3, 3, 3, 3]
    if rule == "rank_scale":
        assert chosen == [4, 4, 13, 13]


def matrices(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.base_model.encoder.parameters() if p.ndim > 1)


@calibrated_or_not
@pytest.mark.parametrize("rule", ["ratio", "budget"])
@pytest.mark.parametrize("head", [BACKBONE, CROSS_DECODER], ids=["backbone", "cross-decoder"])
def test_a_share_of_the_parameters_is_met(head: Head, rule: str, calibrated: bool) -> None:
    fields = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 130}
    stock = stock_of(head, **fields)
    batch = {name: value for name, value in head.batch().items() if value.ndim < 3}
    if head is CROSS_DECODER:
        batch["encoder_hidden_states"] = torch.randn(*batch["encoder_attention_mask"].shape, 48)
    model = head.ours.from_dense(stock, rule=RankRule(**{rule: 0.5}), calibration=batch if calibrated else None)
    assert 0.98 * 0.5 <= matrices(model) / matrices(stock) <= 0.5


def test_energy_is_kept_in_every_product() -> None:
    stock = stock_of(BACKBONE)
    with torch.no_grad():  # large and nearly of rank one
        stock.encoder.layer[0].output.dense.weight[:, :1] *= 100
    model = FactorizedBertModel.from_dense(stock, rule=RankRule(energy=0.8), kinds=["ffn", "ov"])
    assert model.config.qk_rank is None
    for ours, theirs in zip(model.encoder.layer, stock.encoder.layer, strict=True):
        # Both matrices of a layer share a rank, and their shares count equally; so do the heads, by their energies.
        pairs = [
            (getattr(ours, name).dense.weight, getattr(theirs, name).dense.weight)
            for name in ("intermediate", "output")
        ]
        shares = [1 - lost(a, b) / b.detach().square().sum() for a, b in pairs]
        assert sum(shares) / 2 >= 0.8 - 1e-6
        (_, cut), (_, whole) = head_products(ours.attention), head_products(theirs.attention)
        assert 1 - lost(cut, whole).sum() / whole.detach().square().sum() >= 0.8 - 1e-6


def test_a_budget_spends_where_spectra_are_flat() -> None:
    stock = stock_of(BACKBONE)
    with torch.no_grad():
        for block in (stock.encoder.layer[0].intermediate, stock.encoder.layer[0].output):
            P, S, Qt = torch.linalg.svd(block.dense.weight, full_matrices=False)
            block.dense.weight.copy_(P * S * 0.5 ** torch.arange(len(S)) @ Qt)
    model = FactorizedBertModel.from_dense(stock, rule=RankRule(budget=0.6), kinds=["ffn"])
    steep, flat = model.config.ffn_rank
    assert flat is None or steep < flat


# In the metric of data


def rule_id(rule: RankRule) -> str:
    return " ".join(f"{name}={value}" for name, value in vars(rule).items() if value not in (None, 1))


def chains(count: int, seed: int) -> Tensor:
    """Sentences of a language in which every word has one successor."""
    vocab = SIZES["vocab_size"]
    successor = torch.randint(1, vocab, (vocab,), generator=torch.Generator().manual_seed(0))
    words = [torch.randint(1, vocab, (count,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(10):
        words.append(successor[words[-1]])
    return torch.stack(words, 1)


def masked(ids: Tensor) -> dict[str, Tensor]:
    """Every fifth word is to be predicted."""
    hidden = torch.arange(ids.numel()).view_as(ids) % 5 == 0
    return {"input_ids": ids.masked_fill(hidden, 0), "labels": ids.masked_fill(~hidden, -100)}


@pytest.fixture(scope="module")
def trained() -> Iterator[BertForMaskedLM]:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**{**SIZES, **NO_DROPOUT, "initializer_range": 0.3}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        optimizer.zero_grad()
        model(**masked(chains(64, seed=step))).loss.backward()
        optimizer.step()
    model.eval().zero_grad()
    return model


@pytest.mark.parametrize(
    "rule", [RankRule(ratio=0.7), RankRule(ratio=0.5), RankRule(budget=0.7), RankRule(budget=0.5)], ids=rule_id
)
def test_calibration_loses_less_on_data_that_it_has_not_seen(trained: BertForMaskedLM, rule: RankRule) -> None:
    calibration = {"input_ids": masked(chains(200, seed=1000))["input_ids"]}
    held_out = masked(chains(500, seed=1001))
    plain = FactorizedBertForMaskedLM.from_dense(trained, rule=rule)
    calibrated = FactorizedBertForMaskedLM.from_dense(trained, rule=rule, calibration=calibration)
    losses = [float(run(model, held_out)["loss"]) for model in (trained, calibrated, plain)]
    assert losses[0] < 1.0
    assert losses[0] < losses[1] < losses[2]


def test_several_batches_are_one() -> None:
    stock = stock_of(BACKBONE)
    torch.manual_seed(3)
    ids = torch.randint(1, 53, (4, 9))
    mask = torch.ones_like(ids)
    mask[2:, 5:] = 0
    whole = {"input_ids": ids, "attention_mask": mask}
    parts = [{name: value[:2] for name, value in whole.items()}, {name: value[2:, :5] for name, value in whole.items()}]
    one, several = (FactorizedBertModel.from_dense(stock, **LOW, calibration=data) for data in (whole, parts))
    assert_close(run(several, whole), run(one, whole), rtol=1e-3, atol=1e-3)


# From a folder


def test_a_folder_is_as_good_as_a_model(tmp_path: Path) -> None:
    stock = stock_of(MASKED_LM)
    stock.save_pretrained(tmp_path)
    ours = FactorizedBertForMaskedLM.from_dense(stock, **LOW)
    for source in (tmp_path, str(tmp_path)):
        model = FactorizedBertForMaskedLM.from_dense(source, **LOW)
        assert_close(run(model, MASKED_LM.batch()), run(ours, MASKED_LM.batch()), **CLOSE)


def test_folders_that_hold_no_stock_model(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        FactorizedBertModel.from_dense(str(tmp_path / "nothing-here"), **LOW)
    MASKED_LM.build({"ffn_rank": 8}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.V where the model holds .*\.weight"):
        FactorizedBertForMaskedLM.from_dense(tmp_path, **LOW)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    MASKED_LM.build_stock().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="truncated or corrupt") as error:
        FactorizedBertForMaskedLM.from_dense(tmp_path, **LOW)
    assert str(file) in str(error.value)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "give ranks or a rule, one of them; got neither", id="nothing"),
        pytest.param({"qk_rank": 3, "rule": RankRule(ratio=0.5)}, "one of them; got qk_rank", id="both"),
        pytest.param({"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8", id="qk-rank"),
        pytest.param({"ffn_rank": [3, 22]}, r"ffn_rank must be in \[1, 21\], got 22", id="rank-in-a-list"),
        pytest.param({"ov_rank": [3]}, "ov_rank needs a number or one for each of 2 layers, got 1", id="short-list"),
        pytest.param({"rule": RankRule(rank=8)}, r"rank of qk in layer 0 must be in \[1, 7\], got 8", id="rule-rank"),
        pytest.param({"rule": RankRule(ratio=0.01)}, r"a ratio of 0\.01 cannot be met", id="ratio"),
        pytest.param({"rule": RankRule(energy=1.0)}, "leaves every matrix dense", id="all-dense"),
        pytest.param(
            {"rule": RankRule(rank=3), "kinds": ["qk", "mlp"]}, "any of qk, ov, ffn, embedding, got mlp", id="kind"
        ),
        pytest.param({"rule": RankRule(rank=3), "kinds": []}, "any of qk, ov, ffn, embedding, got none", id="no-kind"),
        pytest.param({"ffn_rank": 3, "calibration": []}, "there are no calibration batches", id="no-data"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        FactorizedBertModel.from_dense(BACKBONE.build_stock(), **options)
    assert isinstance(error.value, ValueError) or type(error.value).__name__.startswith("StrictDataclass")


def test_only_the_stock_class_is_truncated() -> None:
    with pytest.raises(TypeError, match="FactorizedBertModel is made from a BertModel, got a "):
        FactorizedBertModel.from_dense(SEQUENCE.build_stock(), **LOW)


def test_a_factorized_model_is_not_truncated_again() -> None:
    with pytest.raises(ValueError, match="factorized already, with qk_rank, ov_rank, ffn_rank, embedding_rank; merge"):
        FactorizedBertModel.from_dense(BACKBONE.build(LOW), **LOW)


def test_unknown_ranks_are_refused() -> None:
    with pytest.raises(TypeError, match="FactorizedBertModel has the ranks .*, got qkv_rank"):
        FactorizedBertModel.from_dense(BACKBONE.build_stock(), qkv_rank=3)


@pytest.mark.parametrize(
    "name",
    ["embeddings.word_embeddings", "encoder.layer.1.output.dense", "encoder.layer.1.attention.self.key"],
)
@pytest.mark.parametrize(
    "options", [LOW, {"rule": RankRule(budget=0.6), "kinds": ["qk", "ffn", "embedding"]}], ids=["ranks", "rule"]
)
@calibrated_or_not
def test_weights_that_are_not_finite(name: str, options: dict[str, Any], calibrated: bool) -> None:
    stock = BACKBONE.build_stock()
    stock.get_submodule(name).weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        FactorizedBertModel.from_dense(stock, **options, calibration=tokens() if calibrated else None)
