"""Rounding a weight with regard to the layer's inputs, on a grid that is already chosen."""

import torch
from torch import Tensor

from quant_ops import fake_quant


def gptq(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, gram: Tensor, damp: float = 0.01
) -> Tensor:
    """The weight (O, I) rounded column by column, each column's error made up for by the columns
    still to come (GPTQ, arXiv 2210.17323, Alg. 1, in the order of falling input energy).

    `scale` and `zero_point` are () or (O, 1); `gram` (I, I) is the weighted sum of x x^T over the
    layer's inputs x, and `damp` is added to its diagonal, as a share of the mean. Returns grid
    values.
    """
    order = gram.diagonal().argsort(descending=True)
    upper = gram[order[:, None], order].double()
    del gram  # frees as much memory as each of the following matrices takes
    upper /= upper.diagonal().mean().clamp(min=1e-30)
    upper.diagonal().add_(damp)
    upper = torch.cholesky_inverse(torch.linalg.cholesky(upper))
    upper = torch.linalg.cholesky(upper, upper=True)
    left, rounded = weight[:, order].double(), torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        rounded[:, column] = fake_quant(left[:, j : j + 1].float(), scale, zero_point, bits)[:, 0]
        error = (left[:, j] - rounded[:, column]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return rounded


# ------------------------------------------------------------------------------------------------
# AdaRound (arXiv 2004.10568)

ZETA, GAMMA = 1.1, -0.1  # ends of the stretched sigmoid, Eq. (23)


class AdaRound(torch.nn.Module):
    """A weight (O, I) whose elements learn whether they are rounded down or up, on a fixed grid."""

    def __init__(self, weight: Tensor, Q_W):
        super().__init__()
        self.Q_W, x = Q_W, weight / Q_W.scale
        self.register_buffer("floor", x.floor())
        share = (ZETA - GAMMA) / (x - self.floor - GAMMA) - 1
        self.alpha = torch.nn.Parameter(-share.log())  # so that h is the fraction: as it was

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

    def regularizer(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta, which draws h to 0 or 1.  # Eq. (24)"""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()
