"""Data run through a model, handlers answer for its modules, and the model is as before."""

import copy
import math
import warnings
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from bert_cases import BACKBONE, CROSS_DECODER, FULL
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AlbertConfig, AlbertModel

from hf_fnl.layers import FactorizedLinear
from hf_fnl.layers.linear import Span
from hf_fnl.math.truncation import Moments
from hf_fnl.surgery import factorize_
from hf_fnl.surgery.calibration import Handler, visit_modules
from hf_fnl.surgery.calibration_data import CalibrationData
from hf_fnl.surgery.config import FactorizationConfig
from hf_fnl.surgery.measure import HeadMomentsRequest, Request
from hf_fnl.surgery.padding import unpadded

EXACT = {"rtol": 0, "atol": 0}


class Net(nn.Module):
    """Runs ``last`` before ``first``, ``twice`` two times, and ``never`` not at all; has dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last, self.never = (nn.Linear(5, 5) for _ in range(4))
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.twice(self.dropout(self.first(input=self.twice(self.last(x)))))


def keep(name: str, moments: Any) -> None:
    return None


def visit(model: nn.Module, batches: Any, requests: Mapping[str, Request], handle: Handler) -> None:
    visit_modules(model, requests, handle, CalibrationData(model, batches))


def seen_in(model: nn.Module, batch: Any, *names: str, requests: Mapping[str, Request] | None = None) -> dict[str, Any]:
    """What is measured at modules that stay in place."""
    seen: dict[str, Any] = {}
    visit(model, batch, dict.fromkeys(names, "inputs") | dict(requests or {}), seen.__setitem__)
    return seen


# The pass


def test_modules_are_handled_in_the_order_of_execution_each_once() -> None:
    visits: list[str] = []
    model = Net()
    requests: dict[str, Request] = dict.fromkeys(["first", "twice", "last"])
    visit(model, {"x": torch.randn(7, 5)}, requests, lambda name, moments: visits.append(name))
    assert visits == ["last", "twice", "first"]


def test_a_layer_sees_what_replaced_layers_give_it() -> None:
    model = Net().eval()
    x = torch.randn(7, 5)
    replaced = {name: nn.Linear(5, 5) for name in ("last", "twice")}
    seen: dict[str, Any] = {}

    def handle(name: str, moments: Any) -> nn.Module | None:
        seen[name] = moments
        return replaced.get(name)

    visit(model, {"x": x}, {"last": None, "twice": None, "first": "inputs"}, handle)
    expected = Moments.of(replaced["twice"](replaced["last"](x)))
    assert_close(seen["first"].mean, expected.mean)
    assert_close(seen["first"].covariance, expected.covariance)


def test_what_answers_at_the_first_call_answers_at_the_next() -> None:
    model, x = Net().eval(), torch.randn(7, 5)
    model.after = nn.Linear(5, 5)
    model.register_forward_hook(lambda module, args, result: module.after(result))
    replaced, seen = nn.Linear(5, 5), []
    visit(model, {"x": x}, {"twice": None, "after": "inputs"}, lambda name, moments: seen.append(moments) or replaced)
    expected = replaced(model.first(replaced(model.last(x)))).detach()
    assert_close(seen[1].mean, Moments.of(expected).mean)


def test_nothing_is_recorded_for_gradients() -> None:
    def handle(name: str, moments: Any) -> None:
        assert not torch.is_grad_enabled()
        assert not moments.mean.requires_grad

    visit(Net(), {"x": torch.randn(7, 5)}, {"first": "inputs"}, handle)


# Modules that a pass calls several times


def test_all_calls_of_a_module_are_pooled_in_front_of_what_comes_later() -> None:
    """``twice`` is seen as it is at both calls, ``first`` behind its replacement."""
    model, x = Net().eval(), torch.randn(7, 5)
    last, twice = nn.Linear(5, 5), nn.Linear(5, 5)
    seen: dict[str, Any] = {}

    def handle(name: str, moments: Any) -> nn.Module | None:
        seen[name] = moments
        return {"last": last, "twice": twice}.get(name)

    visit(model, {"x": x}, dict.fromkeys(["first", "twice", "last"], "inputs"), handle)
    calls = [last(x), model.first(model.twice(last(x)))]
    for name, expected in {"twice": torch.cat(calls), "first": twice(last(x)), "last": x}.items():
        assert seen[name].count == len(expected)
        assert_close(seen[name].mean, Moments.of(expected).mean)
        assert_close(seen[name].covariance, Moments.of(expected).covariance)


class Towers(nn.Module):
    """One layer under two names, and for two inputs of different size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 3)
        self.other = self.one

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(y)


def test_calls_under_other_names_and_of_other_sizes_count() -> None:
    x, y = torch.randn(7, 5), torch.randn(2, 11, 5) + 1
    moments = seen_in(Towers(), {"x": x, "y": y}, "one")["one"]
    expected = Moments.of(torch.cat([x, y.flatten(0, 1)]))
    assert moments.count == 29
    assert_close(moments.second, expected.second)
    assert_close(moments.mean, expected.mean)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_layer_that_albert_shares_is_cut_for_all_depths(layers: int) -> None:
    """At full rank less one, the loss in front of all depths is that of the singular value left out."""
    config = AlbertConfig(
        vocab_size=13, hidden_size=12, embedding_size=5, num_attention_heads=3, intermediate_size=7,
        num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = AlbertModel(config, add_pooling_layer=False).double().eval()
    name = "encoder.albert_layer_groups.0.albert_layers.0.ffn"
    given: list[Tensor] = []
    with model.get_submodule(name).register_forward_pre_hook(lambda module, args: given.append(args[0].flatten(0, 1))):
        batch = {"input_ids": torch.randint(13, (4, 6))}
        model(**batch)
    assert len(given) == layers
    moments = seen_in(model, batch, name)[name]
    assert_close(moments.second, torch.cat(given).mT @ torch.cat(given) / len(torch.cat(given)))
    layer = model.get_submodule(name)
    cut = FactorizedLinear.from_dense(layer, 3, moments=moments)
    factorize_(model, FactorizationConfig(rank=3, include=["*ffn"]), calibration=batch)
    assert_close(model.get_submodule(name).to_dense().weight, cut.to_dense().weight)


class Loop(nn.Module):
    """Two layers, which may be one or share a weight, of two inputs in different directions."""

    def __init__(self, ties: str, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, bias), nn.Linear(8, 8, bias)
        if ties == "module":
            self.last = self.first
        elif ties == "weight":
            self.last.weight = self.first.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.last(y)


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("ties", ["module", "weight"])
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.99}], ids=["rank", "energy"])
def test_a_shared_weight_is_cut_as_is_best_for_all_that_it_sees(ties: str, bias: bool, rule: dict[str, Any]) -> None:
    model, x, y = Loop(ties, bias).double(), torch.zeros(50, 8).double(), torch.zeros(50, 8).double()
    x[:, :3].normal_()
    y[:, 3:6].normal_(std=10)
    before = copy.deepcopy(model)
    factorize_(model, FactorizationConfig(**rule), calibration={"x": x, "y": y})
    z = torch.cat([x, y])
    lost = torch.cat(model(x, y)) - torch.cat(before(x, y))
    share = lost.square().sum() / (z @ before.first.weight.mT).square().sum()
    energies = torch.linalg.svdvals(z @ before.first.weight.mT).square()
    optimum = energies[model.first.rank :].sum() / energies.sum()
    if ties == "module" and bias:
        assert share < optimum * (1 + 1e-3)  # its bias takes a part over
    else:
        assert_close(share, optimum, rtol=1e-3, atol=1e-6)
    if ties == "weight":
        assert model.first.U is model.last.U


def test_fewer_tokens_than_an_input_is_wide_determine_what_they_can() -> None:
    """Their outputs stay as they are at a rank of as many."""
    model, x = nn.Sequential(nn.Linear(11, 7)).double(), torch.randn(3, 11).double()
    expected = model(x)
    factorize_(model, FactorizationConfig(rank=3), calibration={"input": x})
    assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


FEW = "few calibration data reach 0, 1, as 9 vectors of 11 numbers in front of 0"


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.5}], ids=["rank", "energy"])
@pytest.mark.parametrize(("tokens", "masked"), [(9, 0), (12, 3), (11, 0), (20, 3)])
def test_fewer_tokens_than_an_input_is_wide_are_a_warning(
    tokens: int, masked: int, rule: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    class Masked(nn.Sequential):
        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(inputs_embeds)

    warnings.simplefilter("always")
    model, mask = Masked(nn.Linear(11, 11), nn.Linear(11, 11), nn.Linear(11, 5)), torch.ones(1, tokens)
    mask[:, :masked] = 0
    config = FactorizationConfig(**rule, include=["0", "1"])
    factorize_(model, config, calibration={"inputs_embeds": torch.randn(1, tokens, 11), "attention_mask": mask})
    told = {str(warning.message)[: len(FEW)] for warning in recwarn if str(warning.message).startswith("few")}
    assert told == ({FEW} if tokens - masked < 11 else set())


# The model stays as it is


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a visit might leave behind in a module."""
    return {
        name: {key: dict(value) if isinstance(value, Mapping) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def half_trained() -> Net:
    model = Net().train()
    model.first.eval()
    model.never.eval()
    original = model.last.forward
    model.last.forward = lambda x: original(x) + 1  # as accelerate's hooks do
    return model


def test_modes_forwards_and_weights_are_as_before() -> None:
    model = half_trained()
    before, weights = state_of(model), {name: p.clone() for name, p in model.named_parameters()}
    requests: dict[str, Request] = dict.fromkeys(["first", "last", "twice"], "inputs")
    visit(model, {"x": torch.randn(7, 5)}, requests, lambda name, moments: nn.Linear(5, 5) if name == "twice" else None)
    assert state_of(model) == before
    assert_close(dict(model.named_parameters()), weights, **EXACT)


def test_an_exception_in_a_handler_leaves_nothing_behind() -> None:
    model = half_trained()
    before = state_of(model)

    def fail(name: str, moments: Any) -> None:
        if name == "twice":
            raise RuntimeError("from the handler")

    with pytest.raises(RuntimeError, match="from the handler"):
        visit(model, {"x": torch.randn(7, 5)}, dict.fromkeys(["last", "twice", "first"]), fail)
    assert state_of(model) == before


def test_an_exception_in_an_attention_leaves_no_hooks() -> None:
    model = BACKBONE.build_stock()
    before = state_of(model)

    attention = model.encoder.layer[0].attention
    heads = HeadMomentsRequest(3, 3, Span(attention.self.query), Span(attention.self.key), attention.output.dense)
    attention.output.dense.weight.data = attention.output.dense.weight.data[:, :1]  # its forward fails
    with pytest.raises(RuntimeError, match="shapes"):
        visit(model, BACKBONE.batch(), {"encoder.layer.0.attention": heads}, keep)
    assert state_of(model) == before


def test_dropout_is_off() -> None:
    model = Net().train()
    seen: dict[str, Tensor] = {}
    x = torch.randn(7, 5)
    with model.dropout.register_forward_hook(lambda module, args, result: seen.update(x=args[0], y=result)):
        visit(model, {"x": x}, {"first": None}, keep)
    assert torch.equal(seen["x"], seen["y"])
    assert model.dropout.training


# What cannot be visited


@pytest.mark.parametrize(
    ("batch", "names", "error", "message"),
    [
        pytest.param(
            {"x": torch.ones(2, 5)}, ["first", "never"], ValueError, "data never reach never;", id="unreached"
        ),
        pytest.param({"x": torch.ones(2, 5)}, ["fourth"], AttributeError, "fourth", id="unknown"),
        pytest.param([], ["first"], ValueError, "no calibration batches", id="no-batch"),
        pytest.param(
            [{"x": torch.ones(2, 5)}, {}],
            ["first"],
            ValueError,
            "keys: x in the first, none in number 1",
            id="other-keys",
        ),
        pytest.param({"x": torch.full((2, 5), torch.nan)}, ["first"], ValueError, "^x in the .* holds NaN", id="nan"),
        pytest.param(
            [{"x": torch.ones(2, 5)}, {"x": -torch.full((1, 5), torch.inf)}],
            ["first"],
            ValueError,
            "x in calibration batch 1 holds NaN or Inf",
            id="inf-in-the-second",
        ),
        pytest.param({"x": [[1.0] * 5]}, ["first"], TypeError, "x in .* must be a tensor, got list", id="list"),
        pytest.param([[torch.ones(2, 5)]], ["first"], TypeError, "must be a mapping from the names", id="no-mapping"),
    ],
)
def test_what_cannot_be_visited(batch: Any, names: list[str], error: type[Exception], message: str) -> None:
    model = half_trained()
    before = state_of(model)
    with pytest.raises(error, match=message):
        visit(model, batch, dict.fromkeys(names, "inputs"), keep)
    assert state_of(model) == before


def test_vectors_that_a_layer_makes_infinite_are_said_to_be_its() -> None:
    model = Net()
    nn.init.constant_(model.last.weight, torch.inf)
    with pytest.raises(ValueError, match="what reaches twice cannot be used: calibration vectors hold NaN or Inf"):
        visit(model, {"x": torch.ones(2, 5)}, {"twice": "inputs"}, keep)


class Router(nn.Module):
    """Sends each token to the expert that its first entry names; the experts that none is sent to see nothing."""

    def __init__(self, calls_all: bool) -> None:
        super().__init__()
        self.calls_all = calls_all
        self.experts = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = x[..., 0].long() == number
            if self.calls_all or chosen.any():
                y[chosen] = expert(x[chosen])
        return y


@pytest.mark.parametrize("calls_all", [False, True], ids=["not-called", "called-with-nothing"])
def test_experts_that_see_no_token_are_named(calls_all: bool) -> None:
    model, x = Router(calls_all), torch.randn(2, 4, 5)
    x[..., 0] = torch.tensor([0, 2, 2, 0])
    with pytest.raises(ValueError, match=r"never reach experts\.1; no token was routed there, .*give more data"):
        seen_in(model, {"x": x}, "experts.0", "experts.1", "experts.2")
    assert {name: moments.count for name, moments in seen_in(model, {"x": x}, "experts.0", "experts.2").items()} == {
        "experts.0": 4,
        "experts.2": 4,
    }


# Masks


TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MASKED = {
    "bert": T.BertConfig(**TEXT),
    "llama-grouped": T.LlamaConfig(**{**TEXT, "num_key_value_heads": 2}),
    "opt-flattened": T.OPTConfig(**TEXT, ffn_dim=8, word_embed_proj_dim=16),
    "xlnet-transposed": T.XLNetConfig(vocab_size=40, d_model=12, n_layer=2, n_head=3, d_inner=7),
    "mixtral-routed": T.MixtralConfig(**TEXT, num_local_experts=3),
    "deberta-sets-padding-to-zero": T.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "xlm-sets-padding-to-zero": T.XLMConfig(vocab_size=40, emb_dim=12, n_layers=2, n_heads=3),
    "mamba-without-attention": T.MambaConfig(vocab_size=40, hidden_size=12, num_hidden_layers=2, pad_token_id=0),
    "longformer-pads-further": T.LongformerConfig(**TEXT, attention_window=4, sep_token_id=2),
    "bloom": T.BloomConfig(vocab_size=40, hidden_size=12, n_layer=1, n_head=3),
}


def stock(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # XLNet and XLM have their reasons
        return T.AutoModel.from_config(MASKED[name]).eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and a mask, as many sequences as positions, so that no shape tells how they lie."""
    ids, mask = torch.randint(3, 40, (5, 5)), torch.ones(5, 5, dtype=torch.long)
    for row, length in enumerate((5, 1, 2, 4, 3)):
        mask[row, length:] = 0
    return ids, mask.flip(1) if side == "left" else mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_changes_nothing_and_counts_nowhere(name: str, side: str) -> None:
    if side != "right" and name in ("xlm-sets-padding-to-zero", "longformer-pads-further"):
        pytest.skip(
            "XLM takes padding at the end only, and Longformer counts positions by what is not the padding token"
        )
    model = stock(name)
    ids, mask = padded(side)
    called: dict[str, int] = {}
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    for key, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, args, key=key: called.update({key: args[0].shape[:-1].numel()}))
    model(input_ids=ids, attention_mask=mask)
    batches = [{"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask} for pad in (0, 7)]
    first, second = (seen_in(model, batch, *called) for batch in batches)
    for key, moments in first.items():
        if called[key] == 25:  # not a pooler, or the distances of a relative attention
            assert moments.count == mask.sum(), key
        assert moments.count == second[key].count
        assert_close(moments.second, second[key].second, rtol=1e-4, atol=1e-6)


def test_an_encoders_mask_is_that_of_cross_attention() -> None:
    batch = CROSS_DECODER.batch()
    model = CROSS_DECODER.build_stock()
    name = "bert.encoder.layer.0.crossattention"
    inner = model.get_submodule(name).self
    heads = HeadMomentsRequest(3, 3, Span(inner.query), Span(inner.key), model.get_submodule(name).output.dense)
    seen = seen_in(model, batch, requests={name: heads})[name]
    keys = inner.key(batch["encoder_hidden_states"])
    valid = keys[batch["encoder_attention_mask"].bool()].detach()
    expected = Moments.of(valid.unflatten(-1, (3, -1)).transpose(0, 1))
    assert_close(seen.key.mean, expected.mean, rtol=1e-5, atol=1e-5)
    assert_close(seen.key.covariance, expected.covariance, rtol=1e-5, atol=1e-5)
    assert seen.query.count == seen.context.count == batch["attention_mask"].sum()


@pytest.mark.parametrize("has_mask", [False, True], ids=["no-decoder-mask", "decoder-mask"])
def test_the_masks_of_an_encoder_and_a_decoder_of_one_length(has_mask: bool) -> None:
    model = T.AutoModel.from_config(
        T.T5Config(vocab_size=40, d_model=12, d_kv=4, d_ff=7, num_layers=1, num_heads=3, decoder_start_token_id=0)
    )
    ids, mask = padded("right")
    other = mask.flip(0)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)}
    batch |= {"decoder_attention_mask": other} if has_mask else {}
    names = "encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wi"
    crossing = "decoder.block.0.layer.1.EncDecAttention.k"
    seen = seen_in(model, batch, *names, crossing)
    assert seen[names[0]].count == seen[crossing].count == mask.sum()
    assert seen[names[1]].count == (other.sum() if has_mask else 25)


def test_vectors_that_a_model_is_given_are_cut_as_ids_are() -> None:
    model = stock("bert")
    ids, mask = padded("left")
    vectors = model.embeddings.word_embeddings(ids).detach()
    name = "encoder.layer.1.intermediate.dense"
    by_ids = seen_in(model, {"input_ids": ids, "attention_mask": mask}, name)[name]
    batch = {"inputs_embeds": vectors.masked_fill(mask.unsqueeze(-1) == 0, 9.0), "attention_mask": mask}
    by_vectors = seen_in(model, batch, name)[name]
    assert by_vectors.count == by_ids.count == mask.sum()
    assert_close(by_vectors.second, by_ids.second)


def test_torchs_encoder_runs_all_its_layers() -> None:
    """Its fast path would call none of them."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(12, 3, 7, batch_first=True), 2, enable_nested_tensor=False
            )

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=attention_mask == 0)

    _, mask = padded("right")
    name = "encoder.layers.1.linear1"
    seen = seen_in(Encoder(), {"x": torch.randn(5, 5, 12), "attention_mask": mask}, name)[name]
    assert seen.count == mask.sum()


def test_what_belongs_to_no_sequence_stays_as_it_is() -> None:
    ids, mask = padded("left")
    batch = {"input_ids": ids, "attention_mask": mask, "temperature": torch.tensor(2.0), "table": torch.ones(3, 5)}
    parts = list(unpadded(nn.Identity(), batch))
    assert sum(part["input_ids"].numel() for part in parts) == mask.sum()
    for part in parts:
        assert part["attention_mask"].all()
        assert part["temperature"] is batch["temperature"]
        assert part["table"] is batch["table"]


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 1), (3, 3)], ids=["for-all", "each", "axes-for-all", "axes-of-each"])
def test_position_ids_are_cut_as_tokens_are(shape: tuple[int, ...]) -> None:
    ids, mask = torch.arange(21).view(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[0, :2] = mask[1, 5:] = 0
    positions = torch.arange(7) + 10 * torch.arange(len(torch.empty(shape).flatten())).view(*shape, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    places = [(0, slice(2, 7)), (1, slice(0, 5)), (2, slice(0, 7))]
    for (row, kept), part in zip(places, unpadded(nn.Module(), batch), strict=True):
        assert part["input_ids"].tolist() == [ids[row, kept].tolist()]
        of_row = positions if shape[-1] == 1 else positions[..., row : row + 1, :]
        assert_close(part["position_ids"], of_row[..., kept], **EXACT)


def test_a_mask_that_tells_no_padding_is_cut_as_tokens_are() -> None:
    attends_to_all, mask = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    batch = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": mask, "global_attention_mask": attends_to_all}
    parts = [part["global_attention_mask"].tolist() for part in unpadded(nn.Module(), batch)]
    assert parts == [[[1, 0, 0]], [[1, 0, 0, 0]]]


class ReadsWeights(nn.Module):
    """Computes with the weight of one layer, calls another, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.both(self.called(x @ self.read.weight.mT)) + x @ self.both.weight


def test_a_layer_whose_weight_is_read_in_the_place_of_a_call_stays_dense() -> None:
    batch = {"x": torch.randn(40, 6)}
    done = factorize_(ReadsWeights(), FactorizationConfig(rank=2), calibration=batch)
    assert done.skipped == {"read": "the model reads its weight and does not call it"}
    for include in (["read"], ["*", "read"]):
        with pytest.raises(ValueError, match="read cannot be calibrated: the model reads its weight and does not call"):
            factorize_(ReadsWeights(), FactorizationConfig(rank=2, include=include), calibration=batch)


def test_a_mask_of_patches_that_hides_nothing_is_passed_on() -> None:
    pixels = torch.randn(2, 1, 3, 8, 8)
    batch = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 1, 8, 8)}
    assert list(unpadded(nn.Identity(), batch)) == [batch]
    batch["pixel_attention_mask"][0, :, 4:] = 0
    with pytest.raises(ValueError, match=r"pixel_attention_mask of shape .* tells of no input"):
        list(unpadded(nn.Identity(), batch))


def test_only_masked_positions_are_no_data() -> None:
    batch = {"x": torch.randn(2, 3, 5), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="attention_mask leaves no position"):
        seen_in(Net(), batch, "first")


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        pytest.param(
            "bert", {"attention_mask": torch.ones(5, 1, 5, 5).tril()}, r"shape \(5, 1, 5, 5\) tells", id="of-pairs"
        ),
        pytest.param("bert", {"attention_mask": torch.zeros(5, 6)}, r"of its shape .*input_ids \(5, 5\)", id="longer"),
        pytest.param(
            "bert", {"attention_mask": 1 - torch.eye(5).roll(1, 0)}, "hides positions between others", id="holes"
        ),
        pytest.param(
            "bert",
            {"attention_mask": torch.ones(5, 5).tril(), "pixel_values": torch.ones(8, 3)},
            r"pixel_values of shape \(8, 3\) does not tell which patches",
            id="patches",
        ),
    ],
)
def test_masks_that_tell_no_padding_are_refused(model: str, batch: dict[str, Tensor], message: str) -> None:
    stock_model = stock(model)
    with pytest.raises(ValueError, match=message):
        list(unpadded(stock_model, {"input_ids": padded("right")[0], **batch}))


# Several batches


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The batch in two, each only as long as its own longest sequence."""
    order = batch["attention_mask"].flatten(1).sum(1).argsort()
    parts = []
    for rows in order.split([1, len(order) - 1]):
        length = int(batch["attention_mask"][rows].sum(-1).max())
        parts.append({name: value[rows][..., :length] for name, value in batch.items()})
    return parts


def test_several_batches_are_one() -> None:
    head, batch = BACKBONE, BACKBONE.batch()
    batch = {name: value * batch["attention_mask"] for name, value in batch.items()}
    parts = halves(batch)
    assert len({part["input_ids"].shape[-1] for part in parts}) == 2
    name = next(name for name, _ in head.build_stock().named_modules() if name.endswith("1.intermediate.dense"))
    whole, joined = (seen_in(head.build_stock(), data, name)[name] for data in (batch, parts))
    assert_close(joined.second, whole.second, rtol=1e-4, atol=1e-5)
    assert_close(joined.mean, whole.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "meant"), [("attention_masks", "attention_mask"), ("atention_mask", "attention_mask"), ("lengths", None)]
)
def test_an_input_that_the_model_would_ignore_is_refused(name: str, meant: str | None) -> None:
    ids = torch.randint(3, 40, (2, 20))
    told = f"takes no {name}, and would ignore it: leave it out of the calibration"
    told += f"; did you mean {meant}" if meant else "$"
    for model in (stock("bert"), stock("llama-grouped"), BACKBONE.build(FULL)):
        with pytest.raises(ValueError, match=told):
            factorize_(model, FactorizationConfig(rank=2), calibration={"input_ids": ids, name: torch.ones(2, 20)})


def test_inputs_that_a_part_of_the_model_takes_are_passed_on() -> None:
    config = T.BertConfig(**TEXT)
    decoder = T.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = T.EncoderDecoderModel(T.EncoderDecoderConfig.from_encoder_decoder_configs(config, decoder))
    ids, zeros = torch.randint(3, 40, (2, 20)), torch.zeros(2, 20, dtype=torch.long)
    data = {"input_ids": ids, "token_type_ids": zeros, "decoder_input_ids": ids, "decoder_token_type_ids": zeros}
    factorize_(model, FactorizationConfig(rank=2), calibration=data)


# Memory


def test_one_layers_moments_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Moments] = weakref.WeakSet()
    most, made = 0, 0
    of = Moments.of

    def counting(samples: Tensor) -> Moments:
        nonlocal most, made
        moments = of(samples)
        alive.add(moments)
        most, made = max(most, len(alive)), made + 1
        return moments

    monkeypatch.setattr(Moments, "of", counting)
    batch = {name: value for name, value in BACKBONE.batch().items() if name != "attention_mask"}
    BACKBONE.ours.from_dense(BACKBONE.build_stock(), qk_rank=3, ov_rank=3, ffn_rank=5, calibration=batch)
    assert made == 2 * (3 + 2)
    assert most == 3
    assert not alive


def test_ranks_are_chosen_by_a_part_of_many_batches_and_cuts_made_by_all() -> None:
    """A part from all over the data, with 16 vectors for each direction in front of the widest layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    batches = [{"input": torch.randn(2 if i else 8, 5) + i} for i in range(200)]
    requests: dict[str, Request] = {"0": "inputs", "2": "inputs"}
    seen: list[dict[str, Moments]] = [{}, {}]
    for found, changes in zip(seen, (False, True), strict=True):
        visit_modules(model, requests, found.__setitem__, CalibrationData(model, batches), changes=changes)
    kept = math.ceil(200 * 16 * 9 / (8 + 2 * 199))
    part = torch.cat([batches[i * 200 // kept]["input"] for i in range(kept)])
    assert {name: moments.count for name, moments in seen[0].items()} == {"0": len(part), "2": len(part)}
    assert 16 * 9 <= len(part) < 18 * 9
    assert_close(seen[0]["0"].mean, part.mean(0).double(), rtol=1e-6, atol=1e-6)
    assert seen[1]["2"].count == 8 + 2 * 199
