"""Clipping ranges of uniform quantizers, as Q-Diffusion, PTQD and PTQ4DiT choose them.

Candidates for `quant_ops.search`, and the loss that it takes of them: the error of the values
themselves, where TQ-DiT's is that of the layer's output.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quant_ops import Candidates, Quantizer, UniformQuantizer, qparams_from_range, search

PERCENTILES = 0.999, 0.9999, 0.99999
SHRINKS = 80  # ranges 1, 0.99, .., 0.21 times the min-max one
MOST = 2**24 - 1  # values that torch.quantile takes


class ValueLoss(NamedTuple):
    """Sum of |v - v_hat|^p of a chunk's x, a or b, or with no name of the chunk itself; one for
    each row where the quantizer has a scale for each."""

    power: float
    name: str = ""

    def prepare(self, chunk):
        return getattr(chunk, self.name) if self.name else chunk

    def __call__(self, chunk, values, Q):
        error = (Q(values) - values).abs_().pow_(self.power)
        return error.sum(dim=1, keepdim=True) if Q.scale.ndim else error.sum()


def shrunk_ranges(low: Tensor, high: Tensor, bits: int) -> Candidates:
    """The range low..high times 1, 0.99, .. (BRECQ, Q-Diffusion, PTQD)."""

    def make(share):
        return UniformQuantizer(bits, *qparams_from_range(share * low, share * high, bits))

    return Candidates(make, 1 - 0.01 * torch.arange(SHRINKS).to(low))


def percentile_ranges(lows: Tensor, highs: Tensor, bits: int) -> Candidates:
    """Ranges that leave out a share of the values at each end, (3, ...) (PTQ4DiT)."""

    def make(index):
        if index.ndim == 0:
            return UniformQuantizer(bits, *qparams_from_range(lows[index], highs[index], bits))
        ends = (x.gather(0, index[None])[0] for x in (lows, highs))
        return UniformQuantizer(bits, *qparams_from_range(*ends, bits))

    return Candidates(make, torch.arange(len(lows), device=lows.device))


def some_of(parts: list[Tensor], most: int) -> Tensor:
    """Every n-th value of all parts (..., K), at most so many, flat. n and K have no divisor in
    common, so every column of the last axis counts."""
    values, n = torch.cat([part.flatten() for part in parts]), 1
    while n * most < len(values) or math.gcd(n, parts[0].shape[-1]) > 1:
        n += 1
    return values[::n]


def quantiles(values: Tensor, dim=None) -> tuple[Tensor, Tensor]:
    """The values at 1 - p and at p, for each of PERCENTILES, (3, ...)."""
    p = torch.tensor(PERCENTILES).to(values)
    take = partial(torch.quantile, dim=dim, keepdim=dim is not None)
    return take(values, 1 - p), take(values, p)


def weight_by_shrinking(weight: Tensor, bits: int) -> Quantizer:
    """A quantizer with a scale for each output channel of a weight (O, I): least |error|^2.4."""
    ends = weight.aminmax(dim=1, keepdim=True)
    return search(shrunk_ranges(*ends, bits), [weight], ValueLoss(2.4))


def values_by_shrinking(data, name: str, bits: int) -> Quantizer:
    """A quantizer with one scale for x, a or b of a layer: least |error|^2.4."""
    return search(shrunk_ranges(*data.range(name), bits), data, ValueLoss(2.4, name))


def weight_by_percentile(weight: Tensor, bits: int) -> Quantizer:
    """As `weight_by_shrinking`, of the ranges of PERCENTILES, by least squares."""
    return search(percentile_ranges(*quantiles(weight, 1), bits), [weight], ValueLoss(2))


def values_by_percentile(data, name: str, bits: int) -> Quantizer:
    """As `values_by_shrinking`, of the ranges of PERCENTILES, by least squares. Of more than 2^24
    values every so many-th counts for the percentiles."""
    values = [getattr(chunk, name).cpu() for chunk in data]
    lows, highs = quantiles(some_of(values, MOST))
    candidates = percentile_ranges(lows.to(data.device), highs.to(data.device), bits)
    return search(candidates, data, ValueLoss(2, name))
