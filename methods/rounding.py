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
