r"""Cutting trained weights to a rank, with their biases, and in the metric of what flows through them.

The best approximation ``X`` of ``W`` in the metric of the layer's inputs minimizes the mean of ``||W x - X x||^2``,
that is ``||(W - X) C^{1/2}||_F`` with ``C`` the second moment of ``x``. It is ``P P^T W`` with ``P`` the leading left
singular vectors of ``W C^{1/2}``. Where there is a bias, it takes over what is lost of the mean of ``W x``, and ``C``
is the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_fnl.math.spectral import check_rank, check_split_method, spectral_init, truncated_svd

# Share of the mean variance that is added to every direction: data seldom span all of them.
_RIDGE = 1e-5
_OUTPUT_RIDGE = 1e-2  # share of the mean sensitivity that is added to every coordinate
_NOT_FELT = 1e-100  # sensitivity of a layer that no loss feels: all coordinates alike, and next to no energy
_BLOCK = 2048  # vectors whose products are summed in float32, or their own dtype if that is wider


@dataclass(frozen=True)
class Moments:
    """Mean ``(..., n)`` and covariance ``(..., n, n)`` of ``count`` vectors, in float64.

    Args:
        mean: The mean.
        covariance: The covariance.
        count: How many vectors.
        sensitivity: How much a loss feels each coordinate ``(m,)`` of what a layer makes of the vectors: the mean
            square of its gradient; ``None`` where all count alike.
    """

    mean: Tensor
    covariance: Tensor
    count: int = 1
    sensitivity: Tensor | None = None

    @classmethod
    def of(cls, samples: Tensor) -> Moments:
        """Moments of samples ``(..., count, n)``.

        Raises:
            ValueError: If there is no sample, or one is not finite.
        """
        if samples.shape[-2] == 0:
            raise ValueError("no calibration vectors: is every position of the batch masked?")
        if not samples.isfinite().all():
            raise ValueError("calibration vectors hold NaN or Inf")
        samples, count = samples.detach(), samples.shape[-2]
        mean = samples.mean(-2, keepdim=True, dtype=torch.float64)
        covariance = mean.new_zeros(*samples.shape[:-2], samples.shape[-1], samples.shape[-1])
        for block in samples.split(_BLOCK, dim=-2):
            # Centered before they are squared: a covariance is often far smaller than the mean's square.
            centered = (block - mean).to(torch.promote_types(block.dtype, torch.float32))
            covariance += centered.mT @ centered
        return cls(mean.squeeze(-2), covariance / count, count)

    def about_zero(self) -> Moments:
        """The second moment as that of vectors without a mean."""
        return replace(self, mean=torch.zeros_like(self.mean), covariance=self.second)

    def joined(self, other: Moments) -> Moments:
        """Moments of the vectors of both."""
        share = other.count / (self.count + other.count)
        shift = other.mean - self.mean
        covariance = self.covariance.lerp(other.covariance, share)
        covariance.addcmul_(shift.unsqueeze(-1), shift.unsqueeze(-2), value=share * (1 - share))
        return Moments(self.mean + share * shift, covariance, self.count + other.count)

    @property
    def second(self) -> Tensor:
        """``E[x x^T]``, the covariance and what the mean adds to it."""
        return self.covariance + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


def metric_root(moment: Tensor) -> Tensor:
    """A root ``L`` of a positive semidefinite ``moment = L L^T``, slightly ridged, shape ``(..., n, n)``."""
    ridge = _RIDGE * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    ridge = ridge.clamp(min=torch.finfo(moment.dtype).tiny)[..., None, None]
    root, failed = torch.linalg.cholesky_ex(moment + ridge * torch.eye(moment.shape[-1]).to(moment))
    if failed.any():  # rounding of a direction that dominates all others outweighs the ridge
        eigenvalues, directions = torch.linalg.eigh(moment)
        root = directions * (eigenvalues.clamp(min=0) + ridge.squeeze(-1)).sqrt().unsqueeze(-2)
    return root


@torch.no_grad()
def truncate_linear(
    weight: Tensor, bias: Tensor | None, rank: int, moments: Moments
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""The rank-``rank`` layer whose outputs are nearest to those of ``y = W x + b`` in mean square.

    Where the sensitivity ``d`` of a loss is known, ``E[sum_i d_i (y_i - z_i)^2]`` is the least, twice the loss that is
    expected to be lost if its curvature is that of gradients (the Fisher information), diagonal in the outputs.

    Args:
        weight: Shape ``(m, n)``.
        bias: Shape ``(m,)``, or ``None``.
        rank: Rank of the result, ``1 <= rank <= min(m, n)``.
        moments: Of the inputs ``x (n,)``.

    Returns:
        ``U (m, rank)``, ``V (n, rank)`` and the new bias: balanced factors with orthogonal columns, as
        :func:`~hf_fnl.math.spectral.spectral_init` makes them.

    Raises:
        ValueError: If ``rank`` is out of range or the weight is not finite.
    """
    scale = _output_scale(moments)
    scaled = weight.double() if scale is None else weight.double() * scale
    P, _, _ = truncated_svd(scaled @ _input_root(moments, bias), rank)
    right = P.mT @ scaled
    if scale is not None:  # D^{-1/2} P P^T D^{1/2} W, with orthogonal columns on the left again
        P, R = torch.linalg.qr(P / scale)
        right = R @ right
    # In spectral form, from the SVD of the small factor.
    left, V = spectral_init(right, rank)
    U = P @ left
    if bias is not None:
        bias = (bias + weight.double() @ moments.mean - U @ (V.mT @ moments.mean)).to(bias.dtype)
    return U.to(weight.dtype), V.to(weight.dtype), bias


@torch.no_grad()
def linear_energies(weight: Tensor, bias: Tensor | None = None, moments: Moments | None = None) -> Tensor:
    """Squared singular values of ``W``, or of ``D^{1/2} W C^{1/2}`` where ``moments`` are given; descending, float64.

    Raises:
        ValueError: If the weight is not finite.
    """
    matrix = weight.double()
    if not matrix.isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or Inf")
    if moments is not None:
        scale = _output_scale(moments)
        matrix = (matrix if scale is None else matrix * scale) @ _input_root(moments, bias)
    gram = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)


def _output_scale(moments: Moments | HeadMoments | None) -> Tensor | None:
    """``d^{1/2}`` as a column, ridged so that no coordinate is free; ``None`` where all count alike."""
    if moments is None or moments.sensitivity is None:
        return None
    sensitivity = moments.sensitivity.double()
    return (sensitivity + _OUTPUT_RIDGE * sensitivity.mean()).clamp(min=_NOT_FELT).sqrt().unsqueeze(-1)


def _input_root(moments: Moments, bias: Tensor | None) -> Tensor:
    return metric_root(moments.second if bias is None else moments.covariance)


@dataclass(frozen=True)
class HeadMoments:
    """Moments of what flows through the heads of an attention, each ``(heads, r)`` and ``(heads, r, r)``, or ``None``.

    Args:
        query: Of the queries, biases included; of all that share a key.
        key: Of the keys, biases included.
        context: Of the attention-weighted sums of values, which the output projection sees; of all that share a value.
        sensitivity: How much a loss feels each coordinate ``(d,)`` of the attention's output, as in :class:`Moments`.
        query_gradient: Second moment of a loss's gradient at the queries, ``(heads, r, r)``, summed over all that share
            a key.
    """

    query: Moments | None = None
    key: Moments | None = None
    context: Moments | None = None
    sensitivity: Tensor | None = None
    query_gradient: Tensor | None = None

    def joined(self, other: HeadMoments) -> HeadMoments:
        """Moments of the vectors of both."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("query", "key", "context"))
        return HeadMoments(*(None if ours is None else ours.joined(theirs) for ours, theirs in pairs))


@dataclass(frozen=True)
class HeadWeights:
    """One side of the per-head products of an attention.

    Args:
        weight: Per-head factors, ``(heads, d, r)``.
        bias: Per-head biases ``(heads, r)`` of a projection to heads; ``(d,)`` of the one back; ``None`` without.
    """

    weight: Tensor
    bias: Tensor | None

    def mapped(self, by: Tensor) -> HeadWeights:
        """Both multiplied by ``(heads, r, rank)`` from the right, in their dtypes."""
        weight = (self.weight.double() @ by).to(self.weight.dtype)
        if self.bias is None or self.bias.ndim == 1:
            return HeadWeights(weight, self.bias)
        return HeadWeights(weight, (self.bias.double().unsqueeze(-2) @ by).squeeze(-2).to(self.bias.dtype))


@torch.no_grad()
def truncate_qk(
    query: HeadWeights, key: HeadWeights, rank: int, moments: HeadMoments | None = None, method: str = "spectral"
) -> tuple[HeadWeights, HeadWeights]:
    r"""Cut every head's scores ``(x Q + b_q)(y K + b_k)^T`` to a rank.

    ``(x Q + b_q) b_k^T`` is the same for all keys ``y``, so the softmax does not see it, and the new key bias is zero.
    What is cut is the product of ``[Q; b_q]`` and ``K``: to its best approximation in the Frobenius norm, or, with
    ``moments``, to the one that is nearest in mean square for independent queries and centered keys of these moments.
    Where the gradient ``g`` of a loss at the queries is known, it stands for the keys: queries ``q`` become ``q M``, by
    which the loss changes by ``q (M - I) g^T`` to first order, and the mean square of that is the least.
    Queries that share a key are cut together, as ``[Q_1; b_1; Q_2; b_2; ..]``.

    Args:
        query: ``Q`` and ``b_q``.
        key: ``K`` and ``b_k``; where it has fewer heads, each serves as many queries that follow one another.
        rank: Rank per head, at most the width of a head.
        moments: What flows through the heads of the keys, and through the queries that share one.
        method: ``"spectral"``, or ``"spectral_ones"``, which sets the singular values of what is cut to ones.

    Returns:
        The new query and key projections, in the dtypes given.

    Raises:
        ValueError: If ``rank`` is out of range or a weight is not finite.
    """
    left = _stacked(_augmented(query), len(key.weight))
    to_query, to_key = _head_maps(left, key.weight, rank, _qk_roots(query, key, moments), method, moments)
    return query.mapped(_for_each_head(to_query, query)), HeadWeights(key.mapped(to_key).weight, _zeros(key.bias, rank))


@torch.no_grad()
def truncate_ov(
    value: HeadWeights, output: HeadWeights, rank: int, moments: HeadMoments | None = None, method: str = "spectral"
) -> tuple[HeadWeights, HeadWeights]:
    r"""Cut every head's ``V_h O_h^T`` to a rank.

    Of the value bias ``b_v`` the heads keep what they hold; attention weights sum to one, so the rest of ``b_v O_h^T``
    moves into the output bias. Where they do not, as with attention sinks, that is exact at full rank.
    Where there is no output bias, ``[V; b_v] O_h^T`` is cut and the values keep theirs. With ``moments`` the result is
    nearest in mean square for the contexts that a head sees, weighed by the sensitivity of a loss as in
    :func:`truncate_linear` where it is known, and the output bias takes over what their mean loses.
    Outputs that share a value are cut together, as ``[O_1; O_2; ..]``.

    Args:
        value: ``V`` and ``b_v``.
        output: ``O`` and ``b_o``, which has the shape ``(d,)``; as many heads as the values have, or a multiple.
        rank: As in :func:`truncate_qk`.
        moments: What flows through the heads, in one for all that share a value.
        method: As in :func:`truncate_qk`.

    Returns:
        The new value and output projections, in the dtypes given.
    """
    moves_bias = output.bias is not None
    left = value.weight if moves_bias else _augmented(value)
    right = _stacked(output.weight, len(value.weight))
    to_value, to_output = _head_maps(left, right, rank, _ov_roots(value, output, moments), method, moments)
    cut_output = output.mapped(_for_each_head(to_output, output))
    if output.bias is None:
        return value.mapped(to_value), cut_output
    mean = value.bias if moments is None or moments.context is None else moments.context.mean
    if mean is None:
        return value.mapped(to_value), cut_output
    mean = mean.double().unsqueeze(-2)
    lost = (mean - mean @ to_value @ to_output.mT).mT  # of each head's mean context, as the output projection sees it
    lost = (output.weight.double() @ _for_each_head(lost, output)).sum(0).squeeze(-1)
    return value.mapped(to_value), HeadWeights(cut_output.weight, (output.bias + lost).to(output.bias.dtype))


@torch.no_grad()
def qk_energies(query: HeadWeights, key: HeadWeights, moments: HeadMoments | None = None) -> Tensor:
    """Squared singular values of what :func:`truncate_qk` cuts, summed over the heads rank by rank, float64."""
    return _energies(_qk_roots(query, key, moments))


@torch.no_grad()
def ov_energies(value: HeadWeights, output: HeadWeights, moments: HeadMoments | None = None) -> Tensor:
    """Squared singular values of what :func:`truncate_ov` cuts, summed over the heads rank by rank, float64."""
    return _energies(_ov_roots(value, output, moments))


def _energies(roots: tuple[Tensor, Tensor]) -> Tensor:
    return torch.linalg.svdvals(roots[0].mT @ roots[1]).square().sum(0)


def _qk_roots(query: HeadWeights, key: HeadWeights, moments: HeadMoments | None) -> tuple[Tensor, Tensor]:
    if moments is None:
        return _weight_root(_stacked(_augmented(query), len(key.weight))), _weight_root(key.weight)
    assert moments.query is not None
    assert moments.key is not None
    felt = moments.key.covariance if moments.query_gradient is None else moments.query_gradient
    return metric_root(moments.query.second), metric_root(felt)


def _ov_roots(value: HeadWeights, output: HeadWeights, moments: HeadMoments | None) -> tuple[Tensor, Tensor]:
    scale = _output_scale(moments)
    outputs = output.weight if scale is None else output.weight.double() * scale
    right = _weight_root(_stacked(outputs, len(value.weight)))
    if moments is None:
        return _weight_root(_augmented(value) if output.bias is None else value.weight), right
    context = moments.context
    assert context is not None
    return metric_root(context.second if output.bias is None else context.covariance), right


def _stacked(factor: Tensor, num_heads: int) -> Tensor:
    """``(heads, d, r)`` to ``(num_heads, heads / num_heads * d, r)``: below one another those that share a head."""
    return factor.unflatten(0, (num_heads, -1)).flatten(1, 2)


def _for_each_head(shared: Tensor, projection: HeadWeights) -> Tensor:
    """Repeat what heads share for each head of a projection."""
    return shared.repeat_interleave(len(projection.weight) // len(shared), 0)


def _augmented(projection: HeadWeights) -> Tensor:
    """``[Q; b_q] (heads, d + 1, r)``, or ``Q`` where there is no bias."""
    if projection.bias is None:
        return projection.weight
    return torch.cat([projection.weight, projection.bias.unsqueeze(-2)], -2)


def _head_maps(
    left: Tensor,
    right: Tensor,
    rank: int,
    roots: tuple[Tensor, Tensor],
    method: str,
    moments: HeadMoments | None,
) -> tuple[Tensor, Tensor]:
    """Maps ``(heads, r, rank)`` that turn both factors into balanced ones with orthogonal columns."""
    check_split_method(method)
    check_rank(rank, min(*left.shape[-2:], right.shape[-2]))
    maps = _best_maps(*roots, rank)
    if moments is not None:  # roots of the factors themselves have balanced them
        left_map, right_map = maps
        roots = _weight_root(left.double() @ left_map), _weight_root(right.double() @ right_map)
        left_balance, right_balance = _best_maps(*roots, rank)
        maps = left_map @ left_balance, right_map @ right_balance
    if method == "spectral":
        return maps
    # Columns of both are orthogonal and as long as the roots of the singular values, which become ones.
    left_map, right_map = (
        by / length.where(length > 0, 1)
        for factor, by in zip((left, right), maps, strict=True)
        for length in [torch.linalg.vector_norm(factor.double() @ by, dim=-2, keepdim=True)]
    )
    return left_map, right_map


def _best_maps(left_root: Tensor, right_root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""``T_l`` and ``T_r`` such that ``l T_l T_r^T r^T`` is nearest to ``l r^T``.

    The roots are of the metrics of ``l`` and ``r``: ``E[l^T l] = L_l L_l^T``. With the SVD ``P S Q^T`` of
    ``L_l^T L_r``, ``T_l = L_r Q S^{-1/2}`` and ``T_r = L_l P S^{-1/2}``.
    """
    P, S, Qt = torch.linalg.svd(left_root.mT @ right_root)
    S = S[..., :rank]
    null = torch.finfo(S.dtype).eps * S[..., :1] * left_root.shape[-1]
    scale = torch.where(null < S, S.rsqrt(), 0).unsqueeze(-2)
    return right_root @ Qt.mT[..., :rank] * scale, left_root @ P[..., :rank] * scale


def _weight_root(factor: Tensor) -> Tensor:
    """``L (heads, r, r)`` with ``factor^T factor = L L^T``."""
    if not factor.isfinite().all():
        raise ValueError("the projections of an attention to be cut hold NaN or Inf")
    return torch.linalg.qr(factor.double(), mode="r").R.mT


def _zeros(bias: Tensor | None, rank: int) -> Tensor | None:
    return None if bias is None else bias.new_zeros(bias.shape[0], rank)
