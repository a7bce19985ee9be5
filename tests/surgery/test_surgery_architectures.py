"""Surgery on architectures of Transformers and a convolutional net: what goes in comes out, smaller or not."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from surgery_cases import ALL_KINDS, ARCHITECTURES, Architecture
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import hf_fnl.models.surgery_loading  # noqa: F401  # registers the record with Transformers
from hf_fnl.layers import Factorized, FactorizedConv2d
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.surgery import Factorization, factorize_, merge_
from hf_fnl.surgery.config import FactorizationConfig

each_architecture = pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=ARCHITECTURES)
EVERYTHING = FactorizationConfig(rank_scale=1.0, kinds=ALL_KINDS)
LOW = FactorizationConfig(rank_scale=0.4, kinds=ALL_KINDS)


def outputs(model: nn.Module, case: Architecture) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.batch())[0]


def dense_matrix(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Conv2d):
        return kernel_matrix(layer.weight, "spatial")
    return layer.weight.mT if isinstance(layer, Conv1D) else layer.weight


@each_architecture
def test_full_rank_computes_the_same_and_merges_to_the_stock_model(case: Architecture, tmp_path: Path) -> None:
    model = case.build()
    dense, expected = copy.deepcopy(model), outputs(model, case)
    done = factorize_(model, EVERYTHING)
    # OPT's table of positions is looked up at an offset.
    assert list(done.skipped) == (["model.decoder.embed_positions"] if case.model == "OPTForCausalLM" else [])
    assert not any(type(m) in (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d) for m in model.modules())
    assert_close(outputs(model, case), expected, rtol=1e-4, atol=2e-5)
    merged = merge_(model)
    assert len(merged) == sum(1 + len(replacement.tied) for replacement in done.replacements)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    assert_close(dict(model.state_dict()), dict(dense.state_dict()), rtol=1e-4, atol=1e-5)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert model.all_tied_weights_keys == dense.all_tied_weights_keys
    model.save_pretrained(tmp_path)
    stock, info = case.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(outputs(stock, case), outputs(model, case), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module", params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def low(request: pytest.FixtureRequest) -> tuple[Architecture, nn.Module, nn.Module, Factorization]:
    """A case, its dense model, the same at low ranks, and what was done."""
    case = request.param
    dense = case.build()
    model = copy.deepcopy(dense)
    return case, dense, model, factorize_(model, LOW)


def test_every_product_of_low_rank_is_the_best_and_counted_once(low) -> None:
    _, dense, model, done = low
    assert model.num_parameters() == dense.num_parameters() - done.parameters_before + done.parameters_after
    for replacement in done.replacements:
        W = dense_matrix(dense.get_submodule(replacement.name)).detach()
        layer = model.get_submodule(replacement.name)
        assert (layer.rank, layer.shape, tuple(W.shape)) == (replacement.rank, replacement.shape, replacement.shape)
        energies = torch.linalg.svdvals(W).square()
        lost = (W - layer.composed()).square().sum() / energies.sum()
        assert lost.item() == pytest.approx((energies[layer.rank :].sum() / energies.sum()).item(), abs=1e-5)
        assert replacement.energy == pytest.approx(1 - lost.item(), abs=1e-5)


def test_ties_hold_before_and_after_merging(low) -> None:
    case, _, factorized, _ = low
    model, embedding = copy.deepcopy(factorized), None
    for name in case.tied:
        embedding = model.get_input_embeddings()
        assert model.get_submodule(name).U is embedding.U
        assert model.get_submodule(name).V is embedding.V
    model.tie_weights()
    merge_(model)
    for name in case.tied:
        assert model.get_submodule(name).weight is model.get_input_embeddings().weight
    assert_close(outputs(model, case), outputs(factorized, case), rtol=1e-4, atol=2e-5)


def test_a_checkpoint_comes_back_bitwise(low, tmp_path: Path) -> None:
    case = low[0]
    for dtype in (torch.float32, torch.bfloat16):
        model = case.build(dtype)  # not cast, which would round rotary frequencies, too
        factorize_(model, LOW)
        folder = tmp_path / str(dtype)  # what is loaded may lie in the memory of the file
        model.save_pretrained(folder)
        loaded, info = case.model_class.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
        batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.batch().items()}
        with torch.no_grad():
            # How a kernel is multiplied out may depend on where in memory its factors lie.
            exact = not any(isinstance(module, FactorizedConv2d) for module in model.modules())
            tolerance = {"rtol": 0, "atol": 0} if exact else {}
            assert_close(loaded(**batch)[0], model(**batch)[0], **tolerance)
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert loaded.all_tied_weights_keys == model.all_tied_weights_keys


def test_backbone_and_head_read_each_others_checkpoints(low, tmp_path: Path) -> None:
    case, _, model, _ = low
    model.save_pretrained(tmp_path / "head")
    backbone = getattr(transformers, case.backbone).from_pretrained(tmp_path / "head")
    ours = {n: p for n, p in model.base_model.named_parameters() if n in dict(backbone.named_parameters())}
    assert any(n.endswith(".U") for n in ours)
    assert_close(ours, {n: backbone.get_parameter(n) for n in ours}, rtol=0, atol=0)
    backbone.save_pretrained(tmp_path / "backbone")
    head, info = case.model_class.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert not info["mismatched_keys"]
    assert_close(ours, {n: head.base_model.get_parameter(n) for n in ours}, rtol=0, atol=0)
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    for name in case.tied:
        assert head.get_submodule(name).U is head.get_input_embeddings().U


def test_a_training_step_reaches_every_factor(low) -> None:
    case, _, factorized, _ = low
    model = copy.deepcopy(factorized).train()
    results = [result for result in model(**case.batch()).values() if isinstance(result, torch.Tensor)]
    torch.stack([result.square().mean() for result in results]).sum().backward()
    factors = [factor for layer in model.modules() if isinstance(layer, Factorized) for factor in layer.factors()]
    assert all(factor.grad.any() for factor in factors)


def test_on_the_meta_device_only_shapes_change(low) -> None:
    case, dense, model, _ = low
    with torch.device("meta"):
        shapes_only = case.model_class(dense.config)
    factorize_(shapes_only, LOW)
    assert all(parameter.is_meta for parameter in shapes_only.parameters())
    assert {n: p.shape for n, p in shapes_only.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@each_architecture
def test_calibration_reaches_every_linear_layer_and_is_exact_at_full_rank(case: Architecture) -> None:
    model = case.build()
    expected = outputs(model, case)
    done = factorize_(model, FactorizationConfig(rank_scale=1.0), calibration=case.batch())
    assert {replacement.kind for replacement in done.replacements} == {"linear"}
    assert_close(outputs(model, case), expected, rtol=1e-3, atol=1e-4)
