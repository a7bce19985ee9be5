"""Attention products of stock models: against slices multiplied by hand, and against what the attentions compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as T
from attention_cases import CASES, CROSS, HEADS, HIDDEN, LAYERS, TOKENS, VOCABULARY, Case, rotary_attention
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AlbertConfig, AlbertModel, AutoModel, BertConfig, BertModel, DebertaConfig, GPTNeoXConfig
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention import AttentionProjections, Section, find_products, invariance, register_attention
from hf_fnl.layers import FactorizedLinear


@pytest.fixture(params=CASES)
def stock(request) -> Iterator[tuple[Case, nn.Module]]:
    case = CASES[request.param]
    with register_attention(rotary_attention):
        yield case, case.build()


def expected_matrices(case: Case, attention: nn.Module) -> dict[str, Tensor]:
    """``qk`` and ``ov``, ``(heads, d, d)``, one head after the other."""
    Q, K, V, O = case.projections(attention)  # noqa: E741
    r, group = Q.shape[1] // case.heads, case.heads // case.kv_heads
    own = [slice(head * r, (head + 1) * r) for head in range(case.heads)]
    shared = [slice(head // group * r, (head // group + 1) * r) for head in range(case.heads)]
    return {
        "qk": torch.stack([Q[:, h] @ K[:, s].T for h, s in zip(own, shared, strict=True)]),
        "ov": torch.stack([V[:, s] @ O[h] for h, s in zip(own, shared, strict=True)]),
    }


def test_every_attention_has_two_products_that_are_slices_multiplied_by_hand(stock):
    case, model = stock
    products = find_products(model)
    assert {product.name: product.kind for product in products} == {
        f"{name}.{kind}": kind for name in case.names() for kind in ("qk", "ov")
    }
    for product in products:
        expected = expected_matrices(case, model.get_submodule(product.name.rpartition(".")[0]))[product.kind]
        assert_close(product.matrix(model).flatten(0, -3), expected)
        assert_close(product.frobenius_norm(model).flatten(), torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_groups_are_a_dimension_of_their_own(name):
    case = CASES[name]
    model = case.build()
    group = case.heads // case.kv_heads
    with register_attention(rotary_attention):
        shapes = {p.kind: [tuple(factor.shape[:2]) for factor in p.factors(model)] for p in find_products(model)}
    assert shapes == {
        "qk": [(case.kv_heads, group), (case.kv_heads, 1)],
        "ov": [(case.kv_heads, 1), (case.kv_heads, group)],
    }


def test_factors_are_views_of_their_parameters(stock):
    """Ones written to all factors of a layer are ones in all its projections, and nothing else is touched."""
    case, model = stock
    name = case.names()[0]
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with torch.no_grad():
        for product in find_products(model):
            if product.name.rpartition(".")[0] == name:
                for factor in product.factors(model):
                    factor.fill_(1)
        assert all((matrix == 1).all() for matrix in case.projections(model.get_submodule(name)))
        changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
        assert all(key.startswith(name) for key in changed)
        for key, parameter in model.named_parameters():
            parameter.copy_(before[key])


def test_cross_attention_of_gpt2():
    model = CROSS.build()
    products = [p for p in find_products(model) if "crossattention" in p.name]
    assert len(products) == 2 * LAYERS
    for product in products:
        attention = model.get_submodule(product.name.rpartition(".")[0])
        assert_close(product.matrix(model), expected_matrices(CROSS, attention)[product.kind])


class GPT2LikeAttention(nn.Module):
    """Attention in GPT-2's layout whose queries and keys have another width than its values."""

    num_heads = HEADS

    def __init__(self, qk: int, ov: int, is_cross: bool) -> None:
        super().__init__()
        self.widths = [qk] * (2 - is_cross) + [ov]
        self.c_attn, self.c_proj = Conv1D(sum(self.widths), HIDDEN), Conv1D(HIDDEN, ov)
        if is_cross:
            self.q_attn = Conv1D(qk, HIDDEN)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        if hasattr(self, "q_attn"):
            parts = self.q_attn(hidden_states), *self.c_attn(encoder_hidden_states).split(self.widths, -1)
        else:
            parts = self.c_attn(hidden_states).split(self.widths, -1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        context = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c_proj(context.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(("qk", "ov", "is_cross"), [(6, 15, False), (12, 9, True)], ids=["self", "cross"])
def test_heads_of_gpt2_may_have_two_widths(qk, ov, is_cross):
    attention = GPT2LikeAttention(qk, ov, is_cross)
    inputs = list(attention.c_attn.weight.split([qk] * (2 - is_cross) + [ov], dim=1))
    if is_cross:
        inputs.insert(0, attention.q_attn.weight)
    query, key, value = (weight.unflatten(1, (HEADS, -1)).transpose(0, 1) for weight in inputs)
    expected = {"qk": query @ key.mT, "ov": value @ attention.c_proj.weight.unflatten(0, (HEADS, -1))}
    assert_close({product.kind: product.matrix(attention) for product in find_products(attention)}, expected)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 7, "vdim": 5}], ids=["one-size", "three-sizes"])
def test_torchs_attention(sizes):
    attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True, **sizes)
    qk, ov = (product.matrix(attention) for product in find_products(attention, ["qk", "ov"]))
    x, k, v = (torch.randn(1, 4, size) for size in (HIDDEN, sizes.get("kdim", HIDDEN), sizes.get("vdim", HIDDEN)))
    output, weights = attention(x, k, v, average_attn_weights=False)  # the biases of a fresh one are zero
    assert_close(weights[0], torch.softmax(x @ qk @ k.mT / 5**0.5, -1))
    assert_close(output[0], (weights[0] @ v @ ov).sum(0))


def factorize(model: nn.Module, *names: str) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        dense = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, FactorizedLinear.from_dense(dense, 3))


@pytest.mark.parametrize(
    ("names", "left"),
    [
        pytest.param(("self.query", "self.key", "self.value", "output.dense"), [], id="all"),
        pytest.param(("output.dense",), ["qk"], id="output"),
        pytest.param(("self.query",), ["ov"], id="query"),
    ],
)
def test_factorized_projections_are_products_of_their_own(names, left):
    model = BertModel(CASES["bert"].config())
    attention = model.encoder.layer[0].attention
    factorize(attention, *names)
    assert [p.name for p in find_products(attention)] == sorted(
        [*names, *left], key=["qk", "ov", "self.query", "self.key", "self.value", "output.dense"].index
    )


@pytest.mark.parametrize(
    ("names", "left"), [(("c_attn",), []), (("c_proj",), ["qk"])], ids=["fused-inputs", "fused-output"]
)
def test_factorized_projections_of_gpt2(names, left):
    attention = CASES["gpt2"].build().h[0].attn
    factorize(attention, *names)
    assert [p.name for p in find_products(attention)] == [*left, *names]


def test_a_feed_forward_as_wide_as_the_heads_is_no_output_of_an_attention():
    config = AlbertConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, embedding_size=7, intermediate_size=7)
    attention = AlbertModel(config).encoder.albert_layer_groups[0].albert_layers[0].attention
    layer = nn.ModuleDict({"attention": attention, "output": nn.ModuleDict({"dense": nn.Linear(15, 15)})})
    assert [p.name for p in find_products(layer)] == ["attention.qk", "attention.ov"]


MARIAN = T.MarianConfig(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, eos_token_id=2,
    decoder_start_token_id=0,
)  # fmt: skip
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4, **TOKENS,
}  # fmt: skip


class HeadAttention(nn.Module):
    """Attention by the book, with a step of its own between the heads and the output."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda heads: heads, gain: bool = False) -> None:
        super().__init__()
        self.num_heads, self.between = 4, between
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(16)) if gain else 1.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(hidden_states).unflatten(-1, (4, 4)).transpose(-2, -3) for layer in projections)
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(self.between(heads).transpose(-2, -3).flatten(-2) * self.gain)


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        pytest.param(lambda: HeadAttention(), "ov qk", id="plain"),
        pytest.param(lambda: HeadAttention(lambda heads: heads - heads.mean(-2, keepdim=True)), "ov qk", id="centered"),
        pytest.param(lambda: HeadAttention(lambda heads: heads.roll(1, -3)), "qk", id="heads-exchanged"),
        pytest.param(lambda: HeadAttention(torch.relu), "qk", id="relu"),
        pytest.param(lambda: HeadAttention(lambda x: nn.functional.normalize(x, dim=-1)), "qk", id="normalized"),
        pytest.param(lambda: HeadAttention(gain=True), "qk", id="gain-that-starts-at-one"),
        pytest.param(lambda: T.LlamaModel(T.LlamaConfig(**SMALL, attention_bias=True)), "ov", id="llama-rotates"),
        pytest.param(lambda: T.MarianModel(MARIAN), "ov qk", id="marian"),
        pytest.param(lambda: T.DebertaV2Model(T.DebertaV2Config(**SMALL, relative_attention=True,
                     pos_att_type=["p2c", "c2p"])), "ov", id="deberta-v2-queries-have-positions-of-their-own"),
        pytest.param(lambda: T.Qwen3Model(T.Qwen3Config(**SMALL)), "ov", id="qwen3-normalizes-queries-and-keys"),
        pytest.param(lambda: T.Olmo2Model(T.Olmo2Config(**SMALL)), "ov", id="olmo2-normalizes-them-over-all-heads"),
        pytest.param(lambda: T.DiffLlamaModel(T.DiffLlamaConfig(**SMALL)), "", id="diffllama-pairs-heads"),
        pytest.param(lambda: T.BitNetModel(T.BitNetConfig(**SMALL)), "", id="bitnet-normalizes-before-the-output"),
        pytest.param(lambda: T.AfmoeModel(T.AfmoeConfig(**SMALL, num_dense_layers=1)), "", id="afmoe-gates"),
    ],
)  # fmt: skip
def test_products_are_found_where_the_attention_computes_by_them(build, kinds):
    model = nn.Sequential(build())
    attentions = {name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")}
    found = {kind: [] for kind in ("ov", "qk")}
    for kind in found:
        if kind in kinds.split():
            found[kind] = find_products(model, [kind])
        else:
            with pytest.raises(ValueError, match=f"attentions that do not compute by {kind} products"):
                find_products(model, [kind])
    for kind in kinds.split():
        owners = {product.name.removesuffix(f".{kind}") for product in found[kind]}
        assert owners <= attentions
        assert len(owners) == len([name for name in attentions if not name.endswith(".self")])


def test_one_kind_of_an_attention_may_be_left_out_with_a_warning():
    model = nn.Sequential(T.Qwen3Model(T.Qwen3Config(**SMALL)))
    message = r"that do not compute by qk products, which are left out: Qwen3Attention \(0\.layers\.0\.self_attn\)"
    with pytest.warns(UserWarning, match=message):
        assert [product.kind for product in find_products(model)] == ["ov"]


class Unfamiliar(HeadAttention):
    """The same, called in a way that nobody can guess."""

    def forward(self, hidden_states: Tensor, rotations: dict[str, Tensor]) -> Tensor:
        return super().forward(hidden_states * rotations["cos"])


def test_an_attention_that_cannot_be_run_is_left_out_until_it_is_registered():
    model = nn.Sequential(Unfamiliar())
    with pytest.raises(ValueError, match=r"that could not be run to see .*: Unfamiliar \(0\); .* register_attention"):
        find_products(model)

    def known(module: nn.Module) -> AttentionProjections | None:
        if not isinstance(module, Unfamiliar):
            return None
        return AttentionProjections(module.q_proj, module.k_proj, module.v_proj, module.o_proj, module.num_heads)

    with register_attention(known):
        assert [product.name for product in find_products(model)] == ["0.qk", "0.ov"]


def test_looking_for_products_leaves_no_trace():
    """No weight is read, no hook runs, and no random number is drawn."""
    model = T.LlamaModel(T.LlamaConfig(**SMALL, attn_implementation="flex_attention"))
    model.layers[0].self_attn.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    model.train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    assert len(find_products(model, ["ov"])) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert model.layers[0].self_attn.training
    assert model.config._attn_implementation == "flex_attention"
    assert [p.kind for p in find_products(model.half().to("meta"), ["ov"])] == ["ov"]


def test_products_are_found_whatever_is_set_around(monkeypatch):
    monkeypatch.setattr(invariance, "_MEASURED", {})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = T.LlamaModel(T.LlamaConfig(**SMALL))
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode():
            assert len(find_products(model, ["ov"])) == 1
    finally:
        torch.set_default_dtype(before)


def test_layers_of_one_kind_are_run_once(monkeypatch):
    runs = []
    measure = invariance._measure
    monkeypatch.setattr(invariance, "_MEASURED", {})
    monkeypatch.setattr(invariance, "_measure", lambda *args: runs.append(args) or measure(*args))
    assert len(find_products(T.LlamaModel(T.LlamaConfig(**{**SMALL, "num_hidden_layers": 5})), ["ov"])) == 5
    assert len(runs) == 1
    gemma = T.Gemma2Config(**{**SMALL, "num_hidden_layers": 4, "query_pre_attn_scalar": 4})  # local and global ones
    assert len(find_products(T.Gemma2Model(gemma), ["ov"])) == 4
    assert len(runs) == 3


class OwnAttention(nn.Module):
    """A layout that no built-in adapter knows: keys and values in one matrix, one pair for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wkv, self.wo = nn.Linear(HIDDEN, 12), nn.Linear(HIDDEN, 8), nn.Linear(12, HIDDEN)


def own_layout(module: nn.Module) -> AttentionProjections | None:
    if not isinstance(module, OwnAttention):
        return None
    key, value = Section(module.wkv.weight, 0, 4), Section(module.wkv.weight, 4, 4)
    return AttentionProjections(module.wq, key, value, module.wo, num_heads=3)


def interleaved() -> nn.Module:
    config = GPTNeoXConfig(
        hidden_size=12, num_attention_heads=3, num_hidden_layers=LAYERS, intermediate_size=7, vocab_size=VOCABULARY
    )
    return AutoModel.from_config(config)


def split_by_head() -> nn.Module:
    config = DebertaConfig(
        hidden_size=12, num_attention_heads=3, num_hidden_layers=LAYERS, intermediate_size=7, vocab_size=VOCABULARY
    )
    return AutoModel.from_config(config)


class GatedAttention(nn.Module):
    """Queries are twice as wide as the heads, for half of them are gates: like Llama's by its names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 5
        self.q_proj, self.k_proj = nn.Linear(HIDDEN, 30), nn.Linear(HIDDEN, 15)
        self.v_proj, self.o_proj = nn.Linear(HIDDEN, 15), nn.Linear(15, HIDDEN)


@pytest.mark.parametrize(
    ("build", "listed"),
    [
        pytest.param(
            interleaved, r"GPTNeoXAttention \(layers.0.attention\), .*layers.1.attention\)", id="gpt-neox-interleaved"
        ),
        pytest.param(
            split_by_head, r"DebertaAttention \(encoder.layer.0.attention\), .*layer.1.attention\)", id="deberta"
        ),
        pytest.param(lambda: nn.Sequential(GatedAttention()), r"GatedAttention \(0\)", id="sizes-do-not-fit"),
        pytest.param(lambda: nn.Sequential(OwnAttention()), r"OwnAttention \(0\)", id="own"),
    ],
)
def test_unknown_attentions_are_named_where_there_is_no_other(build, listed):
    for kinds in (["ov"], None):
        with pytest.raises(ValueError, match=f"it has: none.*unknown layout.*{listed}; .*register_attention"):
            find_products(build(), kinds)


def test_unknown_attentions_among_others_are_a_warning():
    model = nn.ModuleList([BertModel(CASES["bert"].config()).encoder.layer[0], OwnAttention(), OwnAttention()])
    with pytest.warns(UserWarning, match=r"ModuleList has attentions of unknown layout.*n \(1\), .* \(2\)") as seen:
        products = find_products(model)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert {p.name.rpartition(".")[0] for p in products} == {"0.attention"}


def test_nobody_asks_for_attentions_where_other_kinds_are_wanted():
    model = nn.ModuleList([FactorizedLinear(5, 7, 3), OwnAttention()])
    assert [p.name for p in find_products(model, ["linear"])] == ["0"]


def test_a_registered_adapter_is_asked_until_it_is_removed():
    model = nn.Sequential(OwnAttention())
    handle = register_attention(own_layout)
    try:
        qk, ov = find_products(model)
        queries, pairs, output = model[0].wq.weight, model[0].wkv.weight, model[0].wo.weight
        for head in range(3):
            own = slice(4 * head, 4 * head + 4)
            assert_close(qk.matrix(model)[0, head], queries[own].T @ pairs[:4])
            assert_close(ov.matrix(model)[0, head], pairs[4:].T @ output[:, own].T)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="unknown layout"):
        find_products(model)


def test_layers_that_store_their_weights_the_other_way_round():
    linear = OwnAttention()
    transposed = OwnAttention()
    for name, layer in linear.named_children():
        other = Conv1D(layer.out_features, layer.in_features)
        other.weight = nn.Parameter(layer.weight.detach().T.clone())
        setattr(transposed, name, other)

    def transposed_layout(module: nn.Module) -> AttentionProjections | None:
        if module is not transposed:
            return None
        key, value = (Section(module.wkv.weight, start, 4, dim=1) for start in (0, 4))
        return AttentionProjections(module.wq, key, value, module.wo, num_heads=3)

    with register_attention(own_layout), register_attention(transposed_layout):
        for theirs, ours in zip(find_products(linear), find_products(transposed), strict=True):
            assert torch.equal(theirs.matrix(linear), ours.matrix(transposed))


def test_the_newest_adapter_comes_first_and_built_in_ones_last():
    attention = BertModel(CASES["bert"].config()).encoder.layer[0].attention

    def heads(count: int):
        def adapter(module: nn.Module) -> AttentionProjections | None:
            if module is not attention:
                return None
            layers = (module.self.query, module.self.key, module.self.value, module.output.dense)
            return AttentionProjections(*layers, num_heads=count)

        return adapter

    def found() -> int:
        return len(find_products(attention)[0].matrix(attention))

    assert found() == HEADS
    with register_attention(heads(5)):
        assert found() == 5
        with register_attention(heads(1)):
            assert found() == 1
        assert found() == 5
    assert found() == HEADS


@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        pytest.param((12, 12, 12, 12), 5, id="heads-do-not-divide"),
        pytest.param((12, 12, 12, 12), 0, id="no-heads"),
        pytest.param((12, 8, 8, 12), 3, id="groups-do-not-divide"),
        pytest.param((12, 6, 6, 12), 3, id="half-a-head"),
        pytest.param((12, 4, 12, 12), 3, id="keys-and-values-differ"),
    ],
)
def test_projections_whose_sizes_do_not_fit(sizes, heads):
    query, key, value, output = sizes
    layers = nn.Linear(7, query), nn.Linear(7, key), nn.Linear(7, value), nn.Linear(output, 7)
    message = f"query {query}, key {key}, value {value}, output {output} do not make up {heads} heads"
    with pytest.raises(ValueError, match=message):
        AttentionProjections(*layers, num_heads=heads)


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (5, 3), (2, 0)], ids=["before", "beyond", "empty"])
def test_a_section_that_its_parameter_does_not_have(start, length):
    message = rf"no section of length {length} begins at {start} in dimension 0 of a parameter of shape \(7, 5\)"
    with pytest.raises(ValueError, match=message):
        Section(nn.Linear(5, 7).weight, start, length)


def test_tied_attentions_appear_once():
    layers = BertModel(BertConfig(**{**CASES["bert"].config().to_dict(), "num_hidden_layers": 2})).encoder.layer
    for name in ("self.query", "self.key"):
        layers[1].get_submodule(f"attention.{name}").weight = layers[0].get_submodule(f"attention.{name}").weight
    assert [p.name for p in find_products(layers)] == ["0.attention.qk", "0.attention.ov", "1.attention.ov"]
