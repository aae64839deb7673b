"""Rounding a weight with regard to the layer's inputs."""

import math

import torch
from torch import Tensor

from quant_ops import UniformQuantizer, fake_quant, qparams_from_range, scale_grid

BLOCK = 128  # columns of `gptq` whose errors reach those beyond in one product


def gram(data, Q_X):
    """Sum of x x^T over the quantized inputs x, weighted by the mean squared gradient, (I, I)."""
    total = 0
    for chunk in data:
        x = Q_X(chunk.x, chunk.group)
        total = total + ((x * chunk.grad.square().mean(dim=1, keepdim=True)).T @ x).double()
    return total


def rounded_to(Q_W: UniformQuantizer, weight: Tensor, view=None, gram: Tensor | None = None):
    """A weight (O, I) on the grid of its quantizer, whose scales are for this view of it if given:
    to nearest, or with a Gram matrix by `gptq`."""
    view = view or weight.shape
    if gram is None:
        return Q_W(weight.view(view)).view(weight.shape)
    grid = (x.expand(view).reshape(weight.shape) for x in (Q_W.scale, Q_W.zero_point))
    return gptq(weight, *grid, Q_W.bits, gram)


def gptq(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, gram: Tensor, damp: float = 0.01
) -> Tensor:
    """The weight (O, I) rounded column by column, each column's error made up for by the columns
    still to come (GPTQ, arXiv 2210.17323, Alg. 1, in the order of falling input energy).

    `scale` and `zero_point` are (), (O, 1) or (O, I); `gram` (I, I) is the weighted sum of x x^T
    over the layer's inputs x, and `damp` is added to its diagonal, as a share of the mean. Returns
    grid values.
    """
    order = gram.diagonal().argsort(descending=True)
    gram = gram[order[:, None], order].double()
    upper = inverse_factor(gram, damp)
    left, rounded = weight[:, order].double(), torch.empty_like(weight)
    scale, zero_point = (x.expand_as(weight)[:, order] for x in (scale, zero_point))
    for start in range(0, len(order), BLOCK):
        block = slice(start, start + BLOCK)
        grid = scale[:, block], zero_point[:, block], bits
        rounded[:, order[block]] = rounded_block(left, block, *grid, upper)
    return rounded


def rounded_block(left: Tensor, block: slice, scale, zero_point, bits: int, upper: Tensor):
    """These columns of `left` (O, I), float64, rounded one after the other, their grids (O, B) or
    (O, 1); what each leaves is taken off the columns after it, `left` changed. Grid values (O, B).
    """
    own, beyond = left[:, block].clone(), slice(block.stop, None)
    errors, rounded = torch.empty_like(own), torch.empty_like(own, dtype=torch.float32)
    scale, zero_point = scale.expand_as(own), zero_point.expand_as(own)
    for j, row in enumerate(upper[block, block]):
        here = slice(j, j + 1)
        grid = scale[:, here], zero_point[:, here], bits
        rounded[:, here] = fake_quant(own[:, here].float(), *grid)
        errors[:, here] = (own[:, here] - rounded[:, here]) / row[j]
        own[:, j + 1 :] -= errors[:, here] * row[j + 1 :]
    left[:, beyond] -= errors @ upper[block, beyond]
    return rounded


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = H^-1; H is `gram`, in float64 and changed by this, over
    the mean of its diagonal, to which `damp` is added."""
    gram /= gram.diagonal().mean().clamp(min=1e-30)
    gram.diagonal().add_(damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def gptq_groups(weight: Tensor, group_size: int, bits: int, gram: Tensor, damp: float = 0.01):
    """The weight (O, I) rounded as by `gptq`, in groups of so many neighbouring columns, which are
    in their own order: the min-max grid of each group is that of its columns as the errors of all
    before it have left them. Columns without input are 0.

    Returns grid values (O, I), and the quantizer with scales (O, I / g, 1).
    """
    left, rounded, grids = weight.double(), torch.empty_like(weight), []
    left[:, gram.diagonal() == 0] = 0
    upper = inverse_factor(gram.to(torch.float64, copy=True), damp)
    for start in range(0, weight.shape[1], group_size):
        group = slice(start, start + group_size)
        grids.append(qparams_from_range(*left[:, group].float().aminmax(dim=1, keepdim=True), bits))
        rounded[:, group] = rounded_block(left, group, *grids[-1], bits, upper)
    scale, zero_point = (torch.stack(values, dim=1) for values in zip(*grids, strict=True))
    return rounded, UniformQuantizer(bits, scale, zero_point)


def divisor(count: int, size: int) -> int:
    """The group size for so many channels: of their divisors the one nearest to `size`, as a ratio;
    of two the smaller."""
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / size)))


def group_grid(weight: Tensor, group_size: int, bits: int, importance: Tensor) -> UniformQuantizer:
    """A scale for each group of so many neighbouring columns of a weight (O, I), (O, I / g, 1): of
    shrunk min-max grids the one of least squared error, columns weighted by `importance` (I,).

    With the diagonal of the Gram matrix this is the output's error if columns err on their own.
    """
    parts = weight.unflatten(1, (-1, group_size))
    importance = importance.to(weight).view(1, -1, group_size)
    scale, zero_point = qparams_from_range(*parts.aminmax(dim=2, keepdim=True), bits)
    grid = scale_grid(20, 0.5, 1.05).to(scale)
    errors = torch.stack([
        (importance * (fake_quant(parts, a * scale, zero_point, bits) - parts).square_()).sum(2)
        for a in grid
    ])  # fmt: skip
    return UniformQuantizer(bits, grid[errors.argmin(dim=0)][..., None] * scale, zero_point)


def rescaled(Q_W: UniformQuantizer, weight: Tensor, view, gram: Tensor) -> UniformQuantizer:
    """The quantizer with all scales of an output channel times one factor: that of 17 with which
    `gptq` leaves the least e H e^T, e being the error of the channel's weights, H `gram` (I, I).

    Scales of least error without GPTQ are not its best: what columns pass on widens the others.
    """
    factors, errors = scale_grid(17, 0.8, 1.2).to(weight), []
    for factor in factors:
        scaled = UniformQuantizer(Q_W.bits, factor * Q_W.scale, Q_W.zero_point)
        error = (rounded_to(scaled, weight, view, gram) - weight).double()
        errors.append(((error @ gram) * error).sum(dim=1))
    best = factors[torch.stack(errors).argmin(dim=0)].view(-1, *[1] * (Q_W.scale.ndim - 1))
    return UniformQuantizer(Q_W.bits, best * Q_W.scale, Q_W.zero_point)


def low_rank_part(error: Tensor, gram: Tensor, rank: int, damp: float = 0.01) -> dict:
    """dict(left (O, r), right (r, I)): the product of this rank that comes nearest to a weight's
    rounding error (O, I) as the outputs see it, over inputs of this Gram matrix (QERA, arXiv
    2410.06040, Theorem 2; SVDQuant, arXiv 2411.05007, splits the weight itself instead).

    tr(E H E^T) = |E C|^2 with H = C C^T, so it is the largest part of the SVD of E C, over C.
    """
    gram = gram.to(torch.float64, copy=True)
    gram /= gram.diagonal().mean().clamp(min=1e-30)
    gram.diagonal().add_(damp)
    C = torch.linalg.cholesky(gram)
    U, S, Vh = torch.linalg.svd(error.double() @ C, full_matrices=False)
    right = torch.linalg.solve_triangular(C, Vh[:rank], upper=False, left=False)
    return dict(left=(U[:, :rank] * S[:rank]).to(error), right=right.to(error))


# ------------------------------------------------------------------------------------------------
# AdaRound (arXiv 2004.10568)

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid, Eq. (23)


def alpha_at(h: Tensor) -> Tensor:
    """Eq. (23) solved for alpha."""
    return -((ZETA - GAMMA) / (h - GAMMA) - 1).log()


class AdaRound(torch.nn.Module):
    """A weight (O, I) whose elements learn whether they are rounded down or up, on a fixed grid."""

    def __init__(self, weight: Tensor, Q_W):
        super().__init__()
        self.Q_W, x = Q_W, weight / Q_W.scale
        self.register_buffer("floor", x.floor())
        self.alpha = torch.nn.Parameter(alpha_at(x - self.floor))  # h is the fraction: as it was

    def h(self) -> Tensor:
        """How far up each element is rounded, 0..1."""
        return (self.alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)  # Eq. (23)

    def on_grid(self, up: Tensor) -> Tensor:
        """The weight, its elements rounded up this far."""
        scale, zero_point = self.Q_W.scale, self.Q_W.zero_point
        codes = (self.floor + up + zero_point).clamp(0, 2**self.Q_W.bits - 1)  # Eq. (22)
        return scale * (codes - zero_point)

    def forward(self) -> Tensor:
        """The weight while it is learned."""
        return self.on_grid(self.h())

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight in the end, every element rounded down or up."""
        return self.on_grid((self.alpha >= 0).to(self.floor))

    @torch.no_grad()
    def go_on_from(self, rounded: Tensor) -> None:
        """Begin half way from the weight as it was to how it was rounded (O, I): so it stays
        unless it learns otherwise, and is free to."""
        up = (rounded / self.Q_W.scale - self.floor).round().clamp(0, 1)
        self.alpha.copy_(alpha_at((self.h() + up) / 2))

    def regularizer(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta, which draws h to 0 or 1.  # Eq. (24)"""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()
