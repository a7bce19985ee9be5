"""Frobenius decay of the products in a factorized GPT-2, whose factors share parameters, against autograd."""

import pytest
import torch
from family import Head, Ranks
from gpt2_cases import CROSS_LM, LM, LOW, LOW_QKV
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from hf_fnl import FrobeniusDecay, Product, find_products, parameter_groups
from hf_fnl.layers import Factorized
from hf_fnl.layers.heads import HeadConv1D

WEIGHT_DECAY = 0.3
EXACT = {"rtol": 1e-11, "atol": 1e-11}
CASES = {
    "one-rank-in-each-layer": (LM, {"qk_rank": [3, None], "ov_rank": [None, 6]}),
    "cross-attention": (CROSS_LM, LOW),
    "cross-attention-of-one-product": (CROSS_LM, LOW_QKV),
}
each_case = pytest.mark.parametrize(("head", "ranks"), CASES.values(), ids=CASES)


def penalty_by_hand(model: nn.Module) -> Tensor:
    """Half of the sum of all ``||W||_F^2``, from products cut out of the layers and multiplied."""
    products = {module.U: module.U @ module.V.mT for module in model.modules() if isinstance(module, Factorized)}
    matrices = list(products.values())  # tied ones count once
    for attention in model.modules():
        if isinstance(attention, GPT2Attention) and isinstance(attention.c_attn, HeadConv1D):
            fused, output = attention.c_attn.weight, attention.c_proj.weight
            ov = len(output)
            qk = (fused.shape[1] - ov) // (1 if attention.is_cross_attention else 2)
            queries = [attention.q_attn.weight] if attention.is_cross_attention else []
            query, key, value = (*queries, *fused.split([qk] * (2 - len(queries)) + [ov], dim=1))
            for Q_h, K_h in zip(query.chunk(3, dim=1), key.chunk(3, dim=1), strict=True):
                matrices.append(Q_h @ K_h.mT)
            for V_h, O_h in zip(value.chunk(3, dim=1), output.chunk(3, dim=0), strict=True):
                matrices.append(V_h @ O_h)
    return sum(matrix.square().sum() for matrix in matrices) / 2


def build(head: Head, ranks: Ranks) -> tuple[nn.Module, list[Product]]:
    """A model in float64, with gradients, and its products."""
    model = head.build(ranks).double()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, [p for p in find_products(model) if not is_dense(p, model)]


def is_dense(product: Product, model: nn.Module) -> bool:
    """Whether it is a product of heads in an attention that is as in the stock model."""
    owner = model.get_submodule(product.name.rpartition(".")[0])
    return product.kind in ("qk", "ov") and not isinstance(owner.c_attn, HeadConv1D)


@each_case
def test_decay_is_the_gradient_of_the_penalty(head: Head, ranks: Ranks) -> None:
    model, products = build(head, ranks)
    names = list(dict.fromkeys(name for product in products for name in product.parameter_names))
    factors = [model.get_parameter(name) for name in names]
    slopes = torch.autograd.grad(penalty_by_hand(model), factors)
    expected = [p.grad + WEIGHT_DECAY * slope for p, slope in zip(factors, slopes, strict=True)]
    groups = parameter_groups(model, weight_decay=0.1, products=products, frobenius_decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    decay = FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="penalty")
    assert_close(decay.penalty(), WEIGHT_DECAY * penalty_by_hand(model), **EXACT)
    decay.remove()
    FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="coupled")
    optimizer.step()
    for name, parameter, value in zip(names, factors, expected, strict=True):
        assert_close(parameter.grad, value, **EXACT, msg=name)
