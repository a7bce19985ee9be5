"""What the loss feels of outputs: against autograd row by row, and what follows for cuts and ranks."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvModel,
)

from hf_fnl import FactorizationConfig, FactorizedBertForMaskedLM, RankRule, factorize_
from hf_fnl.surgery.calibration_data import CalibrationData
from hf_fnl.surgery.sensitivity import Probe, sensitivities

VOCAB = 41


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes, **options)).eval()


def batches(*rows: int, labels: bool = True) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCAB, (count, 7), generator=generator) for count in rows]
    return [{"input_ids": each, **({"labels": each} if labels else {})} for each in ids]


def test_sensitivities_are_mean_squares_of_gradients() -> None:
    """Of the sum of the losses of a batch, at every position of an output, whatever makes that require a gradient."""
    model, data = llama().double(), batches(3, 2)
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    model.get_submodule(names[0]).weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = sensitivities(model, data, {name: Probe([model.get_submodule(name)]) for name in names})
    for name in names:
        gradients = []
        for batch in data:
            outputs: list[Tensor] = []
            hook = model.get_submodule(name).register_forward_hook(lambda m, args, y, seen=outputs: seen.append(y))
            loss = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2)
            loss = nn.functional.cross_entropy(loss, batch["labels"][:, 1:], reduction="sum")
            hook.remove()
            (gradient,) = torch.autograd.grad(loss, outputs)
            gradients.append(gradient.flatten(0, 1))
        # The model's own loss is a mean of six of seven labels, and all seven are counted.
        expected = (torch.cat(gradients) * 7 / 6).square().mean(0)
        assert_close(found[name], expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_few_of_many_batches_are_run_from_all_over_the_data(monkeypatch) -> None:
    """As many as hold enough labels, and on until every layer was reached."""
    monkeypatch.setattr("hf_fnl.surgery.sensitivity.ENOUGH", 20)
    model, data = llama(), batches(*[2] * 9)  # of 14 labels each
    seen: list[int] = []
    number = {id(batch["labels"]): i for i, batch in enumerate(data)}
    model.register_forward_pre_hook(lambda m, args, given: seen.append(number[id(given["labels"])]), with_kwargs=True)
    name = "model.layers.0.mlp.down_proj"
    probe = Probe([model.get_submodule(name)])
    found = sensitivities(model, data, {name: probe})
    assert seen == [0, 6]
    assert_close(found, sensitivities(model, [data[0], data[6]], {name: probe}))
    late, seen[:] = nn.Identity(), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, y: late(y) if seen[-1] == 1 else y)
    assert set(sensitivities(model, data, {name: probe, "late": Probe([late])})) == {name, "late"}
    assert seen == [0, 6, 1]


class Slopes(nn.Module):
    """A layer of which the loss of each row feels the outputs by known numbers."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.layer, self.slopes = nn.Linear(3, 3, dtype=slopes.dtype), slopes

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.layer(x) * self.slopes).sum(-1).float().mean())


def test_rows_of_which_no_label_is_predicted_count_nothing() -> None:
    """Answers that were cut off, and single tokens, whose mean loss is NaN, as padding leaves them by themselves."""
    model, (data,) = llama(), batches(3)
    probes = {"model.layers.0.mlp.down_proj": Probe([model.model.layers[0].mlp.down_proj])}
    ignored = {**data, "labels": torch.full_like(data["labels"], -100)}
    alone = {name: value[:, :1] for name, value in data.items()}
    expected = sensitivities(model, [data], probes)
    assert_close(sensitivities(model, [ignored, data, alone], probes), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="labels, and none that is predicted: are all of them ignored"):
        sensitivities(model, [ignored, alone], probes)


def test_small_gradients_of_many_rows_count_in_half_precision() -> None:
    """Those of the mean, and squares, would be zero in float16."""
    slopes = torch.tensor([3e-3, 1e-3, 1e-4], dtype=torch.float16)
    model, count = Slopes(slopes), 2**14
    data = {"x": torch.ones(count, 3, dtype=torch.float16), "labels": torch.ones(count)}
    found = sensitivities(model, [data], {"layer": Probe([model.layer])})
    assert_close(found["layer"], slopes.double().square(), rtol=1e-3, atol=0)


class Pooled(nn.Module):
    """A layer of tokens, whose outputs are written into, and one of their mean; the loss is of one label a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pooled = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        y = self.tokens(x).mul_(2)
        return SimpleNamespace(loss=self.pooled(y.mean(1)).square().sum(-1).mean(), y=y)


def test_a_layer_counts_by_all_that_it_gives_for_a_label() -> None:
    model, data = Pooled(), {"x": torch.randn(5, 7, 3, dtype=torch.float64), "labels": torch.ones(5)}
    found = sensitivities(model, [data], {name: Probe([layer]) for name, layer in model.named_children()})
    result = model(**data)
    (gradient,) = torch.autograd.grad(5 * result.loss, result.y)
    assert_close(found["tokens"], (2 * gradient).square().sum((0, 1)) / 5)
    assert_close(found["pooled"], (2 * model.pooled(result.y.mean(1))).square().sum(0) / 5)


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layer(x)


def test_labels_without_a_finite_loss_are_refused() -> None:
    data = {"x": torch.randn(7, 5), "labels": torch.ones(7)}
    with pytest.raises(ValueError, match="hold labels, for which Silent returned no loss"):
        factorize_(Silent(), FactorizationConfig(rank=2), calibration=data)
    broken = llama()
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="LlamaForCausalLM returned a loss of nan"):
        factorize_(broken, FactorizationConfig(rank=2, exclude=["lm_head"]), calibration=batches(3))


def returning(returned: Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model.forward = lambda x: returned(nn.Sequential.forward(model, x))
    return model


def test_without_labels_something_has_to_be_returned() -> None:
    with pytest.raises(ValueError, match="there is no tensor in it"):
        factorize_(
            returning(lambda y: SimpleNamespace()), FactorizationConfig(rank=2), calibration={"x": torch.ones(7, 5)}
        )


def test_without_gradients_all_outputs_count_alike(monkeypatch) -> None:
    cut, x = [returning(Tensor.detach), returning(Tensor.detach)], torch.randn(70, 5)
    with pytest.warns(UserWarning, match="forward pass run without gradients") as seen:
        factorize_(cut[0], FactorizationConfig(budget=0.9), calibration={"x": x})
    assert sum("no gradients flow" in str(each.message) for each in seen) == 1  # ranks and cut share what was found
    monkeypatch.setattr(CalibrationData, "sensitivities", lambda self, probes: {})
    factorize_(cut[1], FactorizationConfig(budget=0.9), calibration={"x": x})
    assert_close(cut[0](x), cut[1](x), rtol=0, atol=0)


class Branches(nn.Module):
    """Two layers alike, of which the loss hardly feels the second, or not at all, and of the first some outputs."""

    def __init__(self, share: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.share = share
        self.strong, self.weak = nn.Linear(20, 20), nn.Linear(20, 20)
        self.factors = torch.tensor([3.0] * 5 + [0.1] * 15)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        y, weak = self.factors * self.strong(x), self.weak(x)
        y = y if self.share is None else y + self.share * weak
        return SimpleNamespace(loss=None if labels is None else (y - labels).square().mean(), y=y)


@pytest.mark.parametrize("share", [0.01, 0.0, None])
@pytest.mark.parametrize("options", [{"rank": 6}, {"budget": 0.6}], ids=str)
def test_what_the_loss_feels_is_kept(options: dict[str, Any], share: float | None, monkeypatch) -> None:
    """Of labels, and without them of what the model returns; against a cut that looks at inputs only."""
    model = Branches(share)
    x = torch.randn(500, 20)
    with torch.no_grad():
        exact = model(x).y
    labels = exact + 0.1 * torch.randn(500, 20)
    lost: list[float] = []
    for data in ({"x": x, "labels": labels}, {"x": x}, None):
        small = copy.deepcopy(model)
        if data is None:
            monkeypatch.setattr(CalibrationData, "sensitivities", lambda self, probes: {})
        done = factorize_(small, FactorizationConfig(**options), calibration={"x": x} if data is None else data)
        with torch.no_grad():
            lost.append(float((small(x).y - exact).square().mean()))
        if data is not None and "budget" in options:
            ranks = {each.name: each.rank for each in done.replacements}
            assert "strong" not in ranks or ranks["strong"] > ranks["weak"]
    assert max(lost[:2]) < 0.5 * lost[2]


@torch.no_grad()
@pytest.mark.parametrize("kinds", [("ov", "linear"), ("qk", "ov", "linear")], ids=str)
def test_heads_and_layers_share_a_budget_by_what_the_loss_feels(kinds: tuple[str, ...], monkeypatch) -> None:
    """In a model whose loss feels few of the coordinates, with labels that it drew itself, and without any."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_inner": 23, "n_layer": 2, "n_head": 2, "n_positions": 7, "tie_word_embeddings": False}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval()
    model = gpt2 if "qk" in kinds else llama()
    model.lm_head.weight[:, 5:] *= 0.05
    ids = torch.randint(VOCAB, (40, 7), generator=torch.Generator().manual_seed(0))
    exact = model(input_ids=ids).logits.log_softmax(-1)
    drawn = exact.exp().flatten(0, 1).multinomial(1).view_as(ids)
    unlabeled = {"input_ids": ids}
    labeled = {**unlabeled, "labels": torch.cat([ids[:, :1], drawn[:, :-1]], 1)}
    config = FactorizationConfig(kinds=kinds, exclude=["lm_head"], budget=0.75)
    lost: list[float] = []
    for data in (labeled, unlabeled, None):
        small = copy.deepcopy(model)
        if data is None:
            monkeypatch.setattr(CalibrationData, "sensitivities", lambda self, probes: {})
        factorize_(small, config, calibration=unlabeled if data is None else data)
        found = small(input_ids=ids).logits.log_softmax(-1)
        lost.append(float(nn.functional.kl_div(found, exact, reduction="batchmean", log_target=True)))
    assert max(lost[:2]) < 0.8 * lost[2]


def same_rows(count: int, **more: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[3, 7, 9, 4]])
    return {name: x.expand(count, *x.shape[1:]) for name, x in {"input_ids": ids, **more}.items()}


def jacobian_at(model: nn.Module, name: str, batch: dict[str, Tensor], returned: Callable[[Any], Tensor]) -> Tensor:
    """Derivative of what a model returns for one row by the output of a layer, ``(outputs, positions, m)``."""
    layer = model.get_submodule(name)
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, y: outputs.append(y))
    given = returned(model(**batch)).flatten()
    hook.remove()
    return torch.stack([torch.autograd.grad(x, outputs, retain_graph=True)[0][0] for x in given])


def test_without_labels_they_are_the_fisher_information_of_the_logits() -> None:
    """Of a language model, ``J^T (diag(p) - p p^T) J``; the mean over many draws for one row."""
    model, name = llama().double(), "model.layers.0.mlp.down_proj"
    found = sensitivities(model, [same_rows(4096)], {name: Probe([model.get_submodule(name)])})[name]
    J = jacobian_at(model, name, same_rows(1), lambda outputs: outputs.logits).unflatten(0, (4, VOCAB))
    p = model(**same_rows(1)).logits[0].softmax(-1)
    centered = J - torch.einsum("tv,tvsm->tsm", p, J).unsqueeze(1)
    expected = torch.einsum("tv,tvsm->m", p, centered.square()) / 4  # per position of a label
    assert_close(found, expected.detach(), rtol=0.1, atol=0)


def test_without_labels_all_outputs_of_an_encoder_count() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 10, "intermediate_size": 13, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=VOCAB, initializer_range=0.3, **sizes)).eval().double()
    names = ["encoder.layer.0.output.dense", "pooler.dense"]
    probes = {name: Probe([model.get_submodule(name)]) for name in names}
    found = sensitivities(model, [same_rows(4096)], probes)
    J = jacobian_at(model, names[0], same_rows(1), lambda y: torch.cat([y.last_hidden_state.flatten(), y[1].flatten()]))
    of_pooler = 1 - model(**same_rows(1)).pooler_output.square()  # the derivative of tanh
    expected = {names[0]: J.square().sum((0, 1)) / 4, names[1]: of_pooler[0].square() / 4}
    assert_close(found, {name: x.detach() for name, x in expected.items()}, rtol=0.1, atol=0)


def test_a_cache_is_no_output() -> None:
    """RWKV returns its state as plain tensors unless it is told not to."""
    sizes = {"hidden_size": 10, "num_hidden_layers": 2, "context_length": 8, "rescale_every": 0}
    model, name = RwkvModel(RwkvConfig(vocab_size=VOCAB, **sizes)).eval(), "blocks.1.attention.key"
    found = []
    for model.config.use_cache in (True, False):
        found.append(sensitivities(model, [same_rows(8)], {name: Probe([model.get_submodule(name)])})[name])
    assert_close(found[0], found[1], rtol=0, atol=0)


def test_classes_of_ours_choose_by_the_loss_too() -> None:
    from bert_cases import MASKED_LM

    stock, batch = MASKED_LM.build_stock(), MASKED_LM.batch()
    data = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}]
    options = {"rule": RankRule(budget=0.8), "kinds": ["ffn"]}
    plain = [{name: value for name, value in data[0].items() if name != "labels"}]
    ours, theirs = (FactorizedBertForMaskedLM.from_dense(stock, **options, calibration=each) for each in (data, plain))
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=False))
