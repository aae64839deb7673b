"""The last layer fitted to the inputs that the quantized network before it gives.

What those inputs x^ have lost or gained follows in part from what they are, so a linear layer can
make up for it. In place of W x + b: the W^, b^ of least sum of s |W x + b - W^ x^ - b^|^2 over the
calibration rows, s being the sampler's sensitivity to an error of eps at the row's timestep.
"""

from dataclasses import replace

import torch
import torch.nn as nn

from methods.balancing import tokens_of


@torch.no_grad()
def fitted(layer: nn.Linear, data, given, importance, damp: float = 0.01):
    """The fitted layer, and its LayerData.

    `data` and `given` are the LayerData of the layer on inputs in full precision, and on those of
    the quantized network; `importance` (N,) is s of every row of calib.pt. `damp`, as in GPTQ, is
    added to the diagonal of the inputs' covariance, as a share of its mean.
    """
    W, b = layer.weight.double(), layer.bias.double()
    x_mean, q_mean, lost, covariance = moments(data, given, importance)
    covariance.diagonal().add_(damp * covariance.diagonal().mean().clamp(min=1e-30))
    W_fit = W + torch.linalg.solve(covariance, (W @ lost).T).T
    b_fit = b + W @ x_mean - W_fit @ q_mean
    found = nn.utils.skip_init(nn.Linear, *reversed(W.shape), device=W.device)
    found.weight.copy_(W_fit)
    found.bias.copy_(b_fit)
    chunks = [chunk._replace(out=found(chunk.x.to(W.device)).cpu()) for chunk in given.chunks]
    return found, replace(given, chunks=chunks, bias=found.bias.detach())


def moments(data, given, importance):
    """Of inputs x and x^, weighted: their means, Cov(x - x^, x^) and Cov(x^, x^), in float64."""
    weights = importance.double().repeat_interleave(tokens_of(data, len(importance)))
    weights = (weights / weights.sum()).split([len(chunk.x) for chunk in data.chunks])
    x_mean = q_mean = lost = covariance = 0
    for s, chunk, quantized in zip(weights, data, given, strict=True):
        x, q, s = chunk.x.double(), quantized.x.double(), s.to(chunk.x.device)
        x_mean, q_mean = x_mean + s @ x, q_mean + s @ q
        weighted = s[:, None] * q
        lost, covariance = lost + (x - q).T @ weighted, covariance + q.T @ weighted
    lost = lost - torch.outer(x_mean - q_mean, q_mean)
    return x_mean, q_mean, lost, covariance - torch.outer(q_mean, q_mean)
