"""Truncation of biased layers and heads, against the singular values of the matrices that are never formed."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import FactorizedLinear
from hf_fnl.math.truncation import (
    HeadMoments,
    HeadWeights,
    Moments,
    linear_energies,
    metric_root,
    ov_energies,
    qk_energies,
    truncate_linear,
    truncate_ov,
    truncate_qk,
)

DOUBLE = torch.float64
HEADS, HIDDEN, WIDTH, LENGTH = 3, 11, 5, 13
RANKS = [1, 3, 5]
# The ridge adds 1e-5 of the mean variance to every direction, and the optimum moves by about as much.
RIDGED = {"rtol": 1e-3, "atol": 1e-9}
each_rank = pytest.mark.parametrize("rank", RANKS, ids="rank-{}".format)


def projection_to_heads(*, bias: bool = True, dtype: torch.dtype = DOUBLE) -> HeadWeights:
    weight = torch.randn(HEADS, HIDDEN, WIDTH, dtype=dtype)
    return HeadWeights(weight, torch.randn(HEADS, WIDTH, dtype=dtype) if bias else None)


def projection_back(*, bias: bool = True, dtype: torch.dtype = DOUBLE) -> HeadWeights:
    weight = torch.randn(HEADS, HIDDEN, WIDTH, dtype=dtype)
    return HeadWeights(weight, torch.randn(HIDDEN, dtype=dtype) if bias else None)


def project(x: Tensor, to_heads: HeadWeights) -> Tensor:
    """``(length, hidden)`` to ``(heads, length, width)``."""
    out = x @ to_heads.weight
    return out if to_heads.bias is None else out + to_heads.bias.unsqueeze(-2)


def attend(x: Tensor, query: HeadWeights, key: HeadWeights, value: HeadWeights, output: HeadWeights) -> Tensor:
    """A whole attention, with the softmax scale of its dense heads."""
    weights = (project(x, query) @ project(x, key).mT * WIDTH**-0.5).softmax(-1)
    out = (weights @ project(x, value) @ output.weight.mT).sum(0)
    return out if output.bias is None else out + output.bias


def augmented(query: HeadWeights) -> Tensor:
    return query.weight if query.bias is None else torch.cat([query.weight, query.bias.unsqueeze(-2)], -2)


def tail(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix).S[..., rank:].square().sum(-1)


def skewed(count: int, size: int, *, decay: float = 0.6) -> Tensor:
    """Samples whose variance falls off direction by direction, around a mean of their own."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE)).Q
    spread = decay ** torch.arange(size, dtype=DOUBLE)
    return torch.randn(count, size, dtype=DOUBLE) * spread @ basis + torch.randn(size, dtype=DOUBLE)


# Moments


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_moments_are_those_of_the_samples(dtype: torch.dtype) -> None:
    samples = torch.randn(2, 17, 5).to(dtype)
    moments = Moments.of(samples)
    exact = samples.double()
    torch.testing.assert_close(moments.mean, exact.mean(-2))
    torch.testing.assert_close(moments.second, exact.mT @ exact / 17)
    for number in range(2):
        torch.testing.assert_close(moments.covariance[number], exact[number].T.cov(correction=0))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_outputs_count_by_what_the_loss_feels_of_them(bias: bool) -> None:
    """As where rows are scaled before an ordinary cut, and scaled back; no other product of the rank comes nearer."""
    weight, d = torch.randn(7, 11, dtype=DOUBLE), torch.tensor([1e4, 1, 1e-2, 3, 5, 20, 0.5], dtype=DOUBLE)
    offset = torch.randn(7, dtype=DOUBLE) if bias else None
    samples = torch.randn(200, 11, dtype=DOUBLE) * torch.arange(1, 12) + 2
    moments = dataclasses.replace(Moments.of(samples), sensitivity=d)
    U, V, new = truncate_linear(weight, offset, 3, moments)
    scale = (d + 1e-2 * d.mean()).sqrt().unsqueeze(-1)
    left, right, shifted = truncate_linear(
        scale * weight, None if offset is None else scale[:, 0] * offset, 3, Moments.of(samples)
    )
    torch.testing.assert_close(U @ V.mT, left @ right.mT / scale, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(new, shifted / scale[:, 0], rtol=1e-6, atol=1e-6)
    columns = U.mT @ U
    torch.testing.assert_close(columns, columns.diagonal().diag(), rtol=0, atol=1e-8)
    energies = linear_energies(weight, offset, moments)
    root = metric_root(moments.covariance if bias else moments.second)
    lost = (scale * (weight - U @ V.mT) @ root).square().sum()
    torch.testing.assert_close(lost, energies[3:].sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_outputs_of_heads_count_by_what_the_loss_feels_of_them(bias: bool) -> None:
    """What is lost of each head's output, formed, is what the energies say; without the weights more is lost."""
    value = HeadWeights(torch.randn(2, 11, 4, dtype=DOUBLE), None)
    output = HeadWeights(torch.randn(4, 7, 4, dtype=DOUBLE), torch.randn(7, dtype=DOUBLE) if bias else None)
    d = torch.tensor([1e4, 1, 1e-2, 3, 5, 20, 0.5], dtype=DOUBLE)
    context = Moments.of(torch.stack([skewed(200, 4) for _ in range(2)]))
    moments = HeadMoments(context=context, sensitivity=d)
    root, scale = metric_root(context.covariance if bias else context.second), (d + 1e-2 * d.mean()).sqrt()

    def lost(moments: HeadMoments) -> Tensor:
        cut_value, cut_output = truncate_ov(value, output, 2, moments)
        to_value = torch.linalg.lstsq(value.weight, cut_value.weight).solution
        formed = to_value.repeat_interleave(2, 0) @ cut_output.weight.mT  # what a context gives, by head
        return (root.repeat_interleave(2, 0).mT @ (output.weight.mT - formed) * scale).square().sum()

    torch.testing.assert_close(lost(moments), ov_energies(value, output, moments)[2:].sum())
    assert lost(HeadMoments(context=context)) > 1.1 * lost(moments)


def test_scores_count_by_what_the_loss_feels_of_queries() -> None:
    """The mean over pairs of a query and a gradient, to first order; more is lost by looking at keys."""
    query, key = (HeadWeights(torch.randn(heads, 11, 4, dtype=DOUBLE), None) for heads in (4, 2))
    queries, keys, gradients = (torch.stack([skewed(200, 4) for _ in range(2)]) for _ in range(3))
    felt = gradients.mT @ gradients / 200
    moments = HeadMoments(query=Moments.of(queries), key=Moments.of(keys), query_gradient=felt)

    def lost(moments: HeadMoments) -> Tensor:
        cut_query, cut_key = truncate_qk(query, key, 2, moments)
        to_query = torch.linalg.lstsq(query.weight, cut_query.weight).solution[::2]  # two queries share a key
        to_key = torch.linalg.lstsq(key.weight, cut_key.weight).solution
        changes = (queries @ to_query @ to_key.mT - queries) @ gradients.mT
        return changes.square().mean((-2, -1)).sum()

    expected = float(qk_energies(query, key, moments)[2:].sum())
    assert float(lost(moments)) == pytest.approx(expected, rel=1e-3)
    assert lost(HeadMoments(query=moments.query, key=moments.key)) > 1.1 * lost(moments)


def test_a_small_variance_around_a_large_mean_is_not_lost() -> None:
    """As in the few coordinates of trained transformers that are large and almost constant."""
    samples = torch.randn(200, 7) * 0.01 + 300
    covariance = Moments.of(samples).covariance
    torch.testing.assert_close(covariance, samples.double().T.cov(correction=0), rtol=1e-5, atol=0)
    metric_root(covariance)


def test_a_dominating_direction_leaves_a_root() -> None:
    samples = torch.randn(100, 1) * torch.randn(600) * 1e4 + torch.randn(100, 600) * 1e-4
    moment = Moments.of(samples).second
    root = metric_root(moment)
    torch.testing.assert_close(root @ root.mT, moment, rtol=0, atol=float(1e-4 * moment.diagonal().mean()))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        pytest.param(torch.zeros(0, 5), "no calibration vectors: is every position .* masked", id="none"),
        pytest.param(torch.full((3, 5), torch.nan), "calibration vectors hold NaN or Inf", id="nan"),
        pytest.param(torch.full((3, 5), -torch.inf), "calibration vectors hold NaN or Inf", id="inf"),
    ],
)
def test_samples_without_moments(samples: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Moments.of(samples)


# Linear layers


def conv1d() -> Conv1D:
    layer = Conv1D(9, 7)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 9),
    "without-bias": lambda: nn.Linear(7, 9, bias=False),
    "wide": lambda: nn.Linear(12, 5),
    "conv1d": conv1d,
}


def mean_square(a: Tensor, b: Tensor) -> float:
    return (a - b).square().sum(-1).mean().item()


@pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)
@pytest.mark.parametrize("count", [400, 4, 1], ids="{}-samples".format)
@each_rank
def test_a_linear_layer_loses_what_its_energies_say(make: Callable[[], nn.Module], count: int, rank: int) -> None:
    dense = make().double()
    bias = dense.bias is not None
    weight = dense.weight.mT if isinstance(dense, Conv1D) else dense.weight
    x = skewed(count, weight.shape[1])
    moments = Moments.of(x)
    calibrated = FactorizedLinear.from_dense(dense, rank, moments=moments)
    plain = FactorizedLinear.from_dense(dense, rank)
    lost = mean_square(calibrated(x), dense(x))
    energies = linear_energies(weight, dense.bias, moments)
    outputs = (x - x.mean(0) if bias else x) @ weight.mT
    best = (tail(outputs, rank) / count).item()
    assert lost <= mean_square(plain(x), dense(x)) * (1 + 1e-6) + 1e-12
    close = {"rel": 1e-3, "abs": 1e-4 * float(energies.sum()) + 1e-20}
    assert lost == pytest.approx(best, **close)
    assert float(energies[rank:].sum()) == pytest.approx(best, **close)
    if bias:
        torch.testing.assert_close(calibrated(x).mean(0), dense(x).mean(0))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "without-bias"])
def test_full_rank_is_exact_for_any_inputs(bias: bool) -> None:
    dense = nn.Linear(7, 9, bias=bias).double()
    layer = FactorizedLinear.from_dense(dense, 7, moments=Moments.of(skewed(20, 7)))
    x = torch.randn(30, 7, dtype=DOUBLE)
    torch.testing.assert_close(layer(x), dense(x))


def test_inputs_of_the_same_size_everywhere_change_nothing() -> None:
    weight = torch.randn(9, 7, dtype=DOUBLE)
    isotropic = Moments(torch.zeros(7, dtype=DOUBLE), torch.eye(7, dtype=DOUBLE) * 5)
    U, V, _ = truncate_linear(weight, None, 3, isotropic)
    P, S, Qt = torch.linalg.svd(weight)
    torch.testing.assert_close(U @ V.mT, P[:, :3] * S[:3] @ Qt[:3])
    torch.testing.assert_close(linear_energies(weight), S.square())
    torch.testing.assert_close(linear_energies(weight.mT), S.square())
    torch.testing.assert_close(linear_energies(weight, None, isotropic), 5 * S.square(), rtol=1e-4, atol=0)


def test_calibrated_factors_are_balanced_with_orthogonal_columns() -> None:
    U, V, _ = truncate_linear(torch.randn(9, 7, dtype=DOUBLE), None, 3, Moments.of(skewed(50, 7)))
    gram = U.mT @ U
    torch.testing.assert_close(V.mT @ V, gram)
    torch.testing.assert_close(gram, gram.diagonal().diag())
    assert U.is_contiguous()


def test_directions_without_data_are_cut_first() -> None:
    weight = torch.eye(5, dtype=DOUBLE) * torch.tensor([9.0, 8.0, 3.0, 2.0, 1.0])
    x = torch.randn(50, 5, dtype=DOUBLE)
    x[:, :2] = 0
    U, V, _ = truncate_linear(weight, None, 3, Moments.of(x))
    torch.testing.assert_close(
        (U @ V.mT).diagonal(), weight.diagonal() * torch.tensor([0, 0, 1, 1, 1]), atol=1e-3, rtol=0
    )


def test_constant_inputs_are_left_to_the_bias() -> None:
    dense = nn.Linear(7, 9).double()
    x = torch.randn(7, dtype=DOUBLE).expand(10, 7)
    layer = FactorizedLinear.from_dense(dense, 2, moments=Moments.of(x))
    assert torch.isfinite(layer.U).all()
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_keeps_its_dtype(dtype: torch.dtype) -> None:
    dense = nn.Linear(7, 9).to(dtype)
    x = skewed(300, 7)
    layer = FactorizedLinear.from_dense(dense, 3, moments=Moments.of(x))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    exact = FactorizedLinear.from_dense(dense.double(), 3, moments=Moments.of(x))
    torch.testing.assert_close(layer.double()(x), exact(x), rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_is_left_in_the_graph() -> None:
    weight, bias = nn.Parameter(torch.randn(9, 7)), nn.Parameter(torch.randn(9))
    moments = Moments.of(torch.randn(20, 7, requires_grad=True))
    assert not moments.mean.requires_grad
    assert not any(tensor.requires_grad for tensor in truncate_linear(weight, bias, 3, moments))
    sides = [HeadWeights(nn.Parameter(torch.randn(2, 7, 3)), nn.Parameter(torch.randn(2, 3))) for _ in range(3)]
    back = HeadWeights(nn.Parameter(torch.randn(2, 7, 3)), nn.Parameter(torch.randn(7)))
    for side in (*truncate_qk(sides[0], sides[1], 2), *truncate_ov(sides[2], back, 2)):
        assert not side.weight.requires_grad
        assert not side.bias.requires_grad
    assert not linear_energies(weight).requires_grad
    assert not qk_energies(sides[0], sides[1]).requires_grad


# Heads, in the Frobenius norm


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@each_rank
def test_scores_are_the_best_approximation_of_the_augmented_product(biases: tuple[bool, bool], rank: int) -> None:
    query, key = (projection_to_heads(bias=bias) for bias in biases)
    cut_query, cut_key = truncate_qk(query, key, rank)
    error = (augmented(query) @ key.weight.mT - augmented(cut_query) @ cut_key.weight.mT).square().sum((-2, -1))
    best = tail(augmented(query) @ key.weight.mT, rank)
    torch.testing.assert_close(error, best)
    torch.testing.assert_close(qk_energies(query, key)[rank:].sum(), best.sum())
    assert cut_query.weight.shape == cut_key.weight.shape == (HEADS, HIDDEN, rank)
    assert (cut_key.bias is None) == (key.bias is None)
    assert key.bias is None or not cut_key.bias.any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "without-bias"])
@each_rank
def test_outputs_are_the_best_approximation_of_the_product(bias: bool, rank: int) -> None:
    value, output = projection_to_heads(bias=bias), projection_back()
    cut_value, cut_output = truncate_ov(value, output, rank)
    product = value.weight @ output.weight.mT
    error = (product - cut_value.weight @ cut_output.weight.mT).square().sum((-2, -1))
    torch.testing.assert_close(error, tail(product, rank))
    torch.testing.assert_close(ov_energies(value, output)[rank:].sum(), tail(product, rank).sum())
    moved = torch.einsum("hdr,hr->d", output.weight, value.bias) if bias else 0
    kept = torch.einsum("hdr,hr->d", cut_output.weight, cut_value.bias) if bias else 0
    torch.testing.assert_close(cut_output.bias + kept, output.bias + moved)
    assert bias or cut_value.bias is None
    if rank == value.weight.shape[-1]:  # nothing moves: beside a sink, weights do not sum to one
        torch.testing.assert_close(cut_output.bias, output.bias)


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, False)], ids=str)
def test_full_rank_attention_is_exact(biases: tuple[bool, bool, bool], calibrated: bool) -> None:
    query, key = projection_to_heads(bias=biases[0]), projection_to_heads(bias=biases[0])
    value, output = projection_to_heads(bias=biases[1]), projection_back(bias=biases[2])
    x = torch.randn(LENGTH, HIDDEN, dtype=DOUBLE)
    moments = head_moments(x, query, key, value) if calibrated else None
    cut = (*truncate_qk(query, key, WIDTH, moments), *truncate_ov(value, output, WIDTH, moments))
    for y in (x, torch.randn(LENGTH, HIDDEN, dtype=DOUBLE)):
        torch.testing.assert_close(attend(y, *cut), attend(y, query, key, value, output))


def test_scores_keep_all_but_a_constant_for_each_query() -> None:
    query, key = projection_to_heads(), projection_to_heads()
    x = torch.randn(LENGTH, HIDDEN, dtype=DOUBLE)
    cut_query, cut_key = truncate_qk(query, key, WIDTH)
    lost = project(x, query) @ project(x, key).mT - project(x, cut_query) @ project(x, cut_key).mT
    assert lost.abs().max() > 0.1
    torch.testing.assert_close(lost, lost[..., :1].expand_as(lost))


@each_rank
def test_heads_come_balanced_with_orthogonal_columns(rank: int) -> None:
    query, key = projection_to_heads(), projection_to_heads()
    x = torch.randn(LENGTH, HIDDEN, dtype=DOUBLE)
    for moments in (None, head_moments(x, query, key, key)):
        cut_query, cut_key = truncate_qk(query, key, rank, moments)
        left, right = (factor.mT @ factor for factor in (augmented(cut_query), cut_key.weight))
        torch.testing.assert_close(left, right)
        torch.testing.assert_close(left, torch.diag_embed(left.diagonal(dim1=-2, dim2=-1)))


# Heads, in the metric of data


def head_moments(x: Tensor, query: HeadWeights, key: HeadWeights, value: HeadWeights) -> HeadMoments:
    weights = (project(x, query) @ project(x, key).mT * WIDTH**-0.5).softmax(-1)
    parts = (project(x, query), project(x, key), weights @ project(x, value))
    return HeadMoments(*(Moments.of(part) for part in parts))


@each_rank
def test_calibrated_scores_are_the_nearest_there_are(rank: int) -> None:
    """For all pairs of a query and a centered key, which is what the softmax sees."""
    query, key = projection_to_heads(), projection_to_heads()
    x = skewed(200, HIDDEN)
    moments = head_moments(x, query, key, key)

    def seen(query: HeadWeights, key: HeadWeights) -> Tensor:
        scores = project(x, query) @ project(x, key).mT
        return scores - scores.mean(-1, keepdim=True)

    def lost(pair: tuple[HeadWeights, HeadWeights]) -> Tensor:
        return (seen(*pair) - seen(query, key)).square().sum((-2, -1)) / len(x) ** 2

    best = tail(seen(query, key), rank) / len(x) ** 2
    calibrated = lost(truncate_qk(query, key, rank, moments))
    torch.testing.assert_close(calibrated, best, **RIDGED)
    assert (calibrated <= lost(truncate_qk(query, key, rank)) + 1e-9).all()
    energies = qk_energies(query, key, moments)
    assert float(energies[rank:].sum()) == pytest.approx(float(best.sum()), rel=1e-3, abs=1e-4 * float(energies.sum()))


@pytest.mark.parametrize("biases", [(True, True), (False, True), (False, False)], ids=str)
@each_rank
def test_calibrated_outputs_are_the_nearest_there_are(biases: tuple[bool, bool], rank: int) -> None:
    query, key = projection_to_heads(), projection_to_heads()
    value, output = projection_to_heads(bias=biases[0]), projection_back(bias=biases[1])
    x = skewed(200, HIDDEN)
    weights = (project(x, query) @ project(x, key).mT * WIDTH**-0.5).softmax(-1)
    moments = head_moments(x, query, key, value)

    def centered(outputs: Tensor) -> Tensor:
        return outputs - outputs.mean(-2, keepdim=True) if biases[1] else outputs

    def heads(value: HeadWeights, output: HeadWeights) -> Tensor:
        return centered(weights @ project(x, value) @ output.weight.mT)

    def lost(pair: tuple[HeadWeights, HeadWeights]) -> Tensor:
        return (heads(*pair) - heads(value, output)).square().sum((-2, -1)) / len(x)

    best = tail(heads(value, output), rank) / len(x)
    calibrated = truncate_ov(value, output, rank, moments)
    torch.testing.assert_close(lost(calibrated), best, **RIDGED)
    assert (lost(calibrated) <= lost(truncate_ov(value, output, rank)) + 1e-9).all()
    energies = ov_energies(value, output, moments)
    assert float(energies[rank:].sum()) == pytest.approx(float(best.sum()), rel=1e-3, abs=1e-4 * float(energies.sum()))
    if biases[1]:  # takes over the mean of what is lost
        before, after = (attend(x, query, key, *pair) for pair in ((value, output), calibrated))
        torch.testing.assert_close(after.mean(0), before.mean(0))


# Heads and data that lack directions


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@each_rank
def test_heads_of_low_rank_and_zero_heads_are_finite_and_exact(rank: int, calibrated: bool) -> None:
    projections = [projection_to_heads(), projection_to_heads(), projection_to_heads(), projection_back()]
    for projection in projections:
        projection.weight[0] = 0
        projection.weight[1, :, 1:] = 0  # of rank one
        projection.weight[2, :, rank:] = 0
    for projection in projections[:3]:
        projection.bias[0] = 0
        projection.bias[1, 1:] = 0
        projection.bias[2, rank:] = 0
    x = torch.randn(LENGTH, HIDDEN, dtype=DOUBLE)
    moments = head_moments(x, *projections[:3]) if calibrated else None
    cut = (*truncate_qk(*projections[:2], rank, moments), *truncate_ov(*projections[2:], rank, moments))
    assert all(torch.isfinite(side.weight).all() for side in cut)
    torch.testing.assert_close(attend(x, *cut), attend(x, *projections))


def test_fewer_positions_than_the_width_of_a_head() -> None:
    projections = [projection_to_heads(), projection_to_heads(), projection_to_heads(), projection_back()]
    x = torch.randn(3, HIDDEN, dtype=DOUBLE)
    moments = head_moments(x, *projections[:3])
    cut = (*truncate_qk(*projections[:2], 3, moments), *truncate_ov(*projections[2:], 3, moments))
    torch.testing.assert_close(attend(x, *cut), attend(x, *projections), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_keep_their_dtype(dtype: torch.dtype) -> None:
    projections = [projection_to_heads(dtype=dtype) for _ in range(3)] + [projection_back(dtype=dtype)]
    exact = [HeadWeights(p.weight.double(), p.bias.double()) for p in projections]
    cut = (*truncate_qk(*projections[:2], 3), *truncate_ov(*projections[2:], 3))
    expected = (*truncate_qk(*exact[:2], 3), *truncate_ov(*exact[2:], 3))
    for side, wanted in zip(cut, expected, strict=True):
        assert side.weight.dtype == side.bias.dtype == dtype
        torch.testing.assert_close(side.weight, wanted.weight.to(dtype))
        torch.testing.assert_close(side.bias, wanted.bias.to(dtype))


def test_values_keep_their_bias_where_the_output_has_none() -> None:
    x, (query, key, value) = torch.randn(LENGTH, HIDDEN, dtype=DOUBLE), (projection_to_heads() for _ in range(3))
    output = projection_back(bias=False)
    full = truncate_ov(value, output, WIDTH)
    torch.testing.assert_close(attend(x, query, key, *full), attend(x, query, key, value, output))
    cut, narrow = truncate_ov(value, output, 2)
    best = tail(augmented(value) @ output.weight.mT, 2)
    lost = augmented(value) @ output.weight.mT - augmented(cut) @ narrow.weight.mT
    torch.testing.assert_close(lost.square().sum((-2, -1)), best)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("rank", [1, 3])
def test_heads_that_share_a_key_or_a_value_are_cut_together(bias: bool, rank: int) -> None:
    """As one stacked matrix, and every head of a group gets the same columns."""
    group = 2
    query, output = (
        HeadWeights(torch.randn(HEADS * group, HIDDEN, WIDTH, dtype=DOUBLE), extra)
        for extra in (
            torch.randn(HEADS * group, WIDTH, dtype=DOUBLE) if bias else None,
            torch.randn(HIDDEN, dtype=DOUBLE) if bias else None,
        )
    )
    key, value = projection_to_heads(bias=bias), projection_to_heads(bias=bias)
    for left, right, cut in (
        (augmented(query), key.weight, truncate_qk(query, key, rank)),
        (output.weight, value.weight, truncate_ov(value, output, rank)[::-1]),
    ):
        cut_left = augmented(cut[0]) if left.shape[1] > HIDDEN else cut[0].weight
        shared = right.repeat_interleave(group, 0), cut[1].weight.repeat_interleave(group, 0)
        lost = left @ shared[0].mT - cut_left @ shared[1].mT
        best = tail((left.unflatten(0, (HEADS, group)).flatten(1, 2)) @ right.mT, rank)
        torch.testing.assert_close(lost.square().sum((-2, -1)).unflatten(0, (HEADS, group)).sum(1), best)


# What is refused


def poisoned(projection: HeadWeights) -> HeadWeights:
    projection.weight[1, 2, 3] = torch.nan
    return projection


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        pytest.param(lambda a, b: truncate_qk(a, a, 0), r"rank must be in \[1, 5\], got 0", id="rank-0"),
        pytest.param(lambda a, b: truncate_qk(a, a, 6), r"rank must be in \[1, 5\], got 6", id="qk-rank"),
        pytest.param(lambda a, b: truncate_ov(a, b, 6), r"rank must be in \[1, 5\], got 6", id="ov-rank"),
        pytest.param(lambda a, b: truncate_qk(poisoned(a), a, 3), "attention .* NaN or Inf", id="qk-nan"),
        pytest.param(lambda a, b: truncate_ov(a, poisoned(b), 3), "attention .* NaN or Inf", id="ov-nan"),
        pytest.param(lambda a, b: qk_energies(a, poisoned(a)), "attention .* NaN or Inf", id="energies-nan"),
    ],
)
def test_heads_that_cannot_be_cut(cut: Callable[[HeadWeights, HeadWeights], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(projection_to_heads(), projection_back())


@pytest.mark.parametrize(
    ("weight", "rank", "message"),
    [
        pytest.param(torch.ones(9, 7), 8, r"rank must be in \[1, 7\], got 8", id="rank"),
        pytest.param(torch.full((9, 7), torch.nan), 3, "NaN or Inf", id="nan"),
    ],
)
def test_linear_layers_that_cannot_be_cut(weight: Tensor, rank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_linear(weight, None, rank, Moments.of(torch.randn(20, 7)))
    if weight.isnan().any():
        with pytest.raises(ValueError, match=r"shape \(9, 7\) holds NaN or Inf"):
            linear_energies(weight)
