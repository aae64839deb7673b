"""Quantizers and layers beyond the paper, which quant files of other methods hold.

Each says with `names` what a quant file keeps of it, as those of quant_ops.py do: tensors, or
plain values.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from quant_ops import Quantizer, QuantLinear, fake_quant, qparams_from_range


class DynamicQuantizer(nn.Module):
    """Eq. (5) with min-max scales taken from the inputs as they come, one for each `per`: a
    "sample" (all its tokens and channels), a "token", or a "column" where an operand of a product
    has tokens there; with a group size, one for each group of so many neighbouring channels of it.
    Zero is in every range."""

    names = ("per", "group_size")

    def __init__(self, bits: int, per: str, group_size: int | None = None):
        super().__init__()
        self.bits, self.per, self.group_size = bits, per, group_size

    def forward(self, x, group=None):
        """x (N, ..., I), of samples, or (R, I), of tokens, on its grids."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        parts = x.unflatten(-1, (-1, self.group_size or x.shape[-1]))  # (..., I / g, g)
        within = dict(sample=[*range(1, x.ndim - 1), -1], token=[-1], column=[-3])[self.per]
        low, high = parts.amin(within, keepdim=True), parts.amax(within, keepdim=True)
        return fake_quant(parts, *qparams_from_range(low, high, self.bits), self.bits).flatten(-2)


def log2_quant(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x in [0, scale] on the grid scale 2^-q, q in 0..2^k - 1; what is below the least level is
    that level."""
    exponent = -torch.log2((x / scale).clamp(min=2.0**-126))
    return scale * torch.exp2(-exponent.round_().clamp_(0, 2**bits - 1))


def uniform_or_log2(x: Tensor, scale: Tensor, log2: Tensor, bits: int) -> Tensor:
    """Softmax outputs on a uniform grid from 0, or where `log2` says so on a logarithmic one."""
    uniform = (x / scale).round_().clamp_(0, 2**bits - 1).mul_(scale)
    return torch.where(log2, log2_quant(x, scale, bits), uniform)


class AdaptiveQuantizer(Quantizer):
    """Softmax outputs: a uniform or a logarithmic grid, as each time group prefers."""

    names, on_grid = ("scale", "log2"), staticmethod(uniform_or_log2)


def hadamard_matrix(size: int) -> Tensor:
    """(size, size), orthogonal and symmetric, of entries of one magnitude (Sylvester); `size` is a
    power of two."""
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H / size**0.5


def rotate(x: Tensor, H: Tensor) -> Tensor:
    """x (..., I), each block of neighbouring channels times H: outlier channels are spread over
    their block (QuaRot, arXiv 2404.00456). A product x W^T stays as it is if W is rotated too."""
    return (x.to(H.dtype).unflatten(-1, (-1, len(H))) @ H).flatten(-2)


def of_rows(table: Tensor, group: Tensor, x: Tensor) -> Tensor:
    """Vectors (G, I), one for each time group, as those of the rows of x (N, ..., I)."""
    return table[group].view(len(x), *[1] * (x.ndim - 2), -1)


class ScaledInput(nn.Module):
    """Inputs less a shift, (I,) or one for each time group (G, I), over factors (I,), which the
    weight was multiplied by; then rotated as the weight was, by a Hadamard matrix of this size;
    then quantized."""

    def __init__(self, act, factors=None, shift=None, hadamard=None):
        super().__init__()
        self.register_buffer("factors", factors)
        self.register_buffer("shift", shift)
        self.register_buffer("H", None if hadamard is None else hadamard_matrix(hadamard))
        self.act = act

    def forward(self, x, group=None):
        if self.shift is not None:
            x = x - (of_rows(self.shift, group, x) if self.shift.ndim > 1 else self.shift)
        x = x if self.factors is None else x / self.factors
        return self.act(x if self.H is None else rotate(x, self.H), group)


class GroupBiasLinear(QuantLinear):
    """A quantized linear layer with a bias for each time group, (G, O)."""

    def forward(self, x, group=None):
        return F.linear(self.act(x, group), self.weight) + of_rows(self.bias, group, x)


class RegroupedLinear(GroupBiasLinear):
    """The same with groups of this layer's own: `regroup` (T,) says which, for each timestep."""

    def __init__(self, weight, bias, act, regroup):
        super().__init__(weight, bias, act)
        self.register_buffer("regroup", regroup)

    def forward(self, x, group=None):
        return super().forward(x, self.regroup[group])
