"""What the loss feels of outputs: against autograd row by row, and what follows for cuts and ranks."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fnl import FactorizationConfig, FactorizedBertForMaskedLM, RankRule, factorize_
from hf_fnl.surgery.sensitivity import sensitivities

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
    found = sensitivities(model, data, {name: [model.get_submodule(name)] for name in names})
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
    found = sensitivities(model, data, {name: [model.get_submodule(name)]})
    assert seen == [0, 6]
    assert_close(found, sensitivities(model, [data[0], data[6]], {name: [model.get_submodule(name)]}))
    late, seen[:] = nn.Identity(), []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, y: late(y) if seen[-1] == 1 else y)
    assert set(sensitivities(model, data, {name: [model.get_submodule(name)], "late": [late]})) == {name, "late"}
    assert seen == [0, 6, 1]


class Slopes(nn.Module):
    """A layer of which the loss of each row feels the outputs by known numbers."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.layer, self.slopes = nn.Linear(3, 3, dtype=slopes.dtype), slopes

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.layer(x) * self.slopes).sum(-1).float().mean())


def test_small_gradients_of_many_rows_count_in_half_precision() -> None:
    """Those of the mean, and squares, would be zero in float16."""
    slopes = torch.tensor([3e-3, 1e-3, 1e-4], dtype=torch.float16)
    model, count = Slopes(slopes), 2**14
    data = {"x": torch.ones(count, 3, dtype=torch.float16), "labels": torch.ones(count)}
    found = sensitivities(model, [data], {"layer": [model.layer]})
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
    found = sensitivities(model, [data], {name: [layer] for name, layer in model.named_children()})
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
    ignored = [
        {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)} for batch in batches(3)
    ]
    with pytest.raises(ValueError, match="LlamaForCausalLM returned a loss of nan"):
        factorize_(llama(), FactorizationConfig(rank=2), calibration=ignored)


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
def test_what_the_loss_feels_is_kept(options: dict[str, Any], share: float | None) -> None:
    model = Branches(share)
    x = torch.randn(500, 20)
    with torch.no_grad():
        exact = model(x).y
    labels = exact + 0.1 * torch.randn(500, 20)
    lost: list[float] = []
    for felt in (True, False):
        small = copy.deepcopy(model)
        data = {"x": x, "labels": labels} if felt else {"x": x}
        done = factorize_(small, FactorizationConfig(**options), calibration=data)
        with torch.no_grad():
            lost.append(float((small(x).y - exact).square().mean()))
        if felt and "budget" in options:
            ranks = {each.name: each.rank for each in done.replacements}
            assert "strong" not in ranks or ranks["strong"] > ranks["weak"]
    assert lost[0] < 0.5 * lost[1]


@torch.no_grad()
def test_heads_and_layers_share_a_budget_by_what_the_loss_feels() -> None:
    """In a model whose loss feels few of the coordinates, on tokens that it drew itself."""
    model = llama()
    model.lm_head.weight[:, 5:] *= 0.05
    ids = torch.randint(VOCAB, (40, 7), generator=torch.Generator().manual_seed(0))
    exact = model(input_ids=ids).logits.log_softmax(-1)
    torch.manual_seed(0)
    drawn = exact.exp().flatten(0, 1).multinomial(1).view_as(ids)
    data = {"input_ids": ids, "labels": torch.cat([ids[:, :1], drawn[:, :-1]], 1)}
    config = FactorizationConfig(kinds=("ov", "linear"), include=["model.layers.*"], budget=0.75)
    lost: list[float] = []
    for felt in (True, False):
        small = copy.deepcopy(model)
        factorize_(small, config, calibration=data if felt else {"input_ids": ids})
        found = small(input_ids=ids).logits.log_softmax(-1)
        lost.append(float(nn.functional.kl_div(found, exact, reduction="batchmean", log_target=True)))
    assert lost[0] < 0.8 * lost[1]


def test_classes_of_ours_choose_by_the_loss_too() -> None:
    from bert_cases import MASKED_LM

    stock, batch = MASKED_LM.build_stock(), MASKED_LM.batch()
    data = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}]
    options = {"rule": RankRule(budget=0.8), "kinds": ["ffn"]}
    plain = [{name: value for name, value in data[0].items() if name != "labels"}]
    ours, theirs = (FactorizedBertForMaskedLM.from_dense(stock, **options, calibration=each) for each in (data, plain))
    assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=False))
