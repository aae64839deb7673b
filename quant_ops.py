"""The quantizers of TQ-DiT (arXiv 2502.04056), their objective, and the search for their scales.

Imports torch alone. Everything runs where its arguments lie. README.md lists D1, D2, ...

    paper          here                 shape and meaning
    s              scale                step size: () per tensor, (O, 1) per output channel,
                                        (G,) per time group
    z              zero_point           an integer held in a float tensor, shaped like s
    k              bits                 bit width, 2..8
    s_1, s_2       scale1, scale2       step sizes of the two regions of MRQ, Sec. III-C
    Delta_W, ...   Q_W, Q_X, Q_A, Q_B   quantization parameters, held by the quantizer they make
    G_i            group                time group of each row, 0..G-1, Eq. (9)
    eps^(l)        out                  output of layer l less its bias, in full precision
    dL/d eps^(l)   grad                 gradient of Eq. (11) there; G^(l) is its square

    Eq. (5)   qparams_from_range, quantize, fake_quant    Eq. (9)         time_group
    Eq. (6)   dequantize: the grid                        Eq. (13)-(16)   hessian_loss
    Eq. (8), (12), (17)   search                          Sec. III-C      mrq_softmax, mrq_gelu
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------
# Uniform quantization


def qparams_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the range [low, high], which is widened to hold 0 (so 0 is exact).
    # Eq. (5): s = (max - min) / (2^k - 1), z = -round(min / s)
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))  # all zero, or nearly so
    return scale, -torch.round(low / scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes 0..2^k - 1, as floats.  # Eq. (5): clip(round(x / s) + z, 0, 2^k - 1)"""
    return (x / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values of the grid of Eq. (6).  # Deviation D1: s * (q - z), as printed s * q - z"""
    return scale * (codes - zero_point)


def fake_quant(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x rounded to its grid, Eq. (5): |error| <= s / 2 inside the range; 0 stays 0."""
    return quantize(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)


# ------------------------------------------------------------------------------------------------
# Multi-region quantization (MRQ), Sec. III-C


def softmax_regions(x: Tensor, scale1: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Level in R1, level in R2, and which elements lie in R2. The regions are disjoint.

    R1 holds the levels 0..2^(k-1) - 1 of s_1, R2 holds 1..2^(k-1) of s_2 = 1 / 2^(k-1). R2 begins
    half a step past R1's last level, no lower than s_2 / 2; up to there R1 clips (Deviation D8).
    """
    levels, scale2 = 2 ** (bits - 1), 2.0 ** (1 - bits)
    border = torch.clamp((levels - 0.5) * scale1, min=scale2 / 2)
    low = (x / scale1).round_().clamp_(max=levels - 1)
    high = (x / scale2).round_().clamp_(1, levels)
    return low, high, x >= border


def mrq_softmax(x: Tensor, scale1: Tensor, bits: int) -> Tensor:
    """x in [0, 1] on the two-region grid of softmax outputs; 0.0 and 1.0 stay exact."""
    low, high, upper = softmax_regions(x, scale1, bits)
    return torch.where(upper, high.mul_(2.0 ** (1 - bits)), low.mul_(scale1))


def gelu_region(x: Tensor, scale: Tensor, region: int, bits: int) -> Tensor:
    """Level in R1, -2^(k-1)..0, or in R2, 0..2^(k-1) - 1 (D8, D9); 0 in the other."""
    low, high = (-(2 ** (bits - 1)), 0) if region == 1 else (0, 2 ** (bits - 1) - 1)
    return (x / scale).round_().clamp_(low, high)


def mrq_gelu(x: Tensor, scale1: Tensor, scale2: Tensor, bits: int) -> Tensor:
    """x on the two-region grid of GELU outputs: s_1 below zero, s_2 above; 0 stays 0."""
    low, high = gelu_region(x, scale1, 1, bits), gelu_region(x, scale2, 2, bits)
    return low.mul_(scale1).add_(high.mul_(scale2))


# ------------------------------------------------------------------------------------------------
# Time groups


def time_group(t, num_timesteps: int, num_groups: int):
    """Group 0..G-1 of sampling index t in 0..T-1: a tensor, an array or a number of them.

    # Eq. (9): t in G_i iff (i-1) T / G <= t <= i T / G - 1; Deviation D4 when G does not divide T
    """
    return t * num_groups // num_timesteps


# ------------------------------------------------------------------------------------------------
# Quantizers: Delta in buffers, one type for each kind of range


class Quantizer(nn.Module):
    """A bit width k, and Delta as buffers: () each; with time groups (G,), of a weight (O, 1)."""

    names: tuple[str, ...]
    on_grid: Callable  # (x, *Delta, bits) -> x on the grid

    def __init__(self, bits: int, *values: Tensor):
        super().__init__()
        self.bits = bits
        for name, value in zip(self.names, values, strict=True):
            self.register_buffer(name, value)

    def params_for(self, x, group):
        """Delta for x: as it is, or given the time groups of its rows, (N,), that of every row."""
        values = [getattr(self, name) for name in self.names]
        if group is None or values[0].ndim == 0:
            return values
        return [value[group].view(-1, *[1] * (x.ndim - 1)) for value in values]

    def forward(self, x, group=None):
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would misplace codes
        return self.on_grid(x, *self.params_for(x, group), self.bits)


class UniformQuantizer(Quantizer):
    """Eq. (5); a weight's has Delta of its own for each output channel (D5)."""

    names, on_grid = ("scale", "zero_point"), staticmethod(fake_quant)


class SoftmaxQuantizer(Quantizer):
    """MRQ of softmax outputs."""

    names, on_grid = ("scale1",), staticmethod(mrq_softmax)


class GeluQuantizer(Quantizer):
    """MRQ of GELU outputs."""

    names, on_grid = ("scale1", "scale2"), staticmethod(mrq_gelu)


class FullPrecision(nn.Module):
    """No quantization: an input that the released variant of Algorithm 1 leaves alone (D6)."""

    def forward(self, x, group=None):
        return x


def join_groups(quantizers: list[Quantizer]) -> Quantizer:
    """The quantizer whose Delta for time group i is that of quantizers[i]."""
    first = quantizers[0]
    values = [torch.stack([getattr(Q, name) for Q in quantizers]) for name in first.names]
    return type(first)(first.bits, *values)


# ------------------------------------------------------------------------------------------------
# Candidates, Alg. 1 lines 16 and 24


class Candidates:
    """What a search tries, `make(value)` for each of `values`; of indices (O, 1), one a channel."""

    def __init__(self, make: Callable[[Tensor], Quantizer], values: Tensor):
        self.make, self.values = make, values

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return (self.make(value) for value in self.values)

    def __getitem__(self, index):
        return self.make(self.values[index])


def scale_grid(count: int = 100, low: float = 0.01, high: float = 1.2) -> Tensor:
    """(count,) factors alpha of the min-max scale, both ends included (Deviation D7)."""
    return torch.linspace(low, high, count)


def softmax_grid(bits: int, count: int = 20) -> Tensor:
    """(count,) candidates of s_1 = 2^-i / 2^(k-1), i = 0, 1, ... (Deviation D8)."""
    return 2.0 ** -torch.arange(count) / 2 ** (bits - 1)


def uniform_candidates(low: Tensor, high: Tensor, bits: int) -> tuple[Quantizer, Candidates]:
    """The min-max quantizer of Eq. (5), and candidates with alpha times its scale (D7, D15)."""
    s, z = qparams_from_range(low, high, bits)
    candidates = Candidates(lambda a: UniformQuantizer(bits, a * s, z), scale_grid().to(s))
    return UniformQuantizer(bits, s, z), candidates


def softmax_candidates(bits: int, device: torch.device) -> Candidates:
    """MRQ after softmax: a quantizer for each s_1 of `softmax_grid`."""
    return Candidates(lambda s_1: SoftmaxQuantizer(bits, s_1), softmax_grid(bits).to(device))


def gelu_candidates(low: Tensor, high: Tensor, bits: int) -> tuple[Quantizer, list[Callable]]:
    """MRQ after GELU: the min-max quantizer, and [f_1, f_2], where f_j(Q) are the candidates that
    take alpha times the min-max s_j and the other scale of Q (D9)."""
    s_1 = -low.clamp(max=-1e-6) / 2 ** (bits - 1)
    s_2 = high.clamp(min=1e-6) / (2 ** (bits - 1) - 1)
    grid = scale_grid().to(s_1)

    def of_s_1(Q):
        return Candidates(lambda a: GeluQuantizer(bits, a * s_1, Q.scale2), grid)

    def of_s_2(Q):
        return Candidates(lambda a: GeluQuantizer(bits, Q.scale1, a * s_2), grid)

    return GeluQuantizer(bits, s_1, s_2), [of_s_1, of_s_2]


# ------------------------------------------------------------------------------------------------
# Hessian-guided optimization (HO): the objective, as a function of one quantizer


def hessian_loss(delta: Tensor, grad: Tensor, dim=None) -> Tensor:
    """Output error weighted by the diagonal Fisher information, summed over `dim` (default all).

    # Eq. (13)-(16): delta^T G delta, G = diag(grad^2) for the Hessian, less the terms that the
    # paper drops; grad = 1 makes it the plain squared error
    """
    return (delta * grad).square_().sum(dim)


class WeightLoss(NamedTuple):
    """Eq. (16) of a linear layer, out = X W^T, as a function of Delta_W, Delta_X being fixed. A
    chunk has a row for each token: x (R, I), out and grad (R, O), group (R,)."""

    weight: Tensor  # (O, I)
    Q_X: Quantizer | FullPrecision

    def prepare(self, chunk):
        """What all candidates share: X quantized."""
        return self.Q_X(chunk.x, chunk.group)

    def __call__(self, chunk, X_hat, Q_W):
        delta = torch.addmm(chunk.out, X_hat, Q_W(self.weight).T, alpha=-1)  # out - X_hat W_hat^T
        loss = hessian_loss(delta, chunk.grad, dim=0)  # (O,)
        return loss[:, None] if Q_W.scale.ndim else loss.sum()  # one for each scale


class InputLoss(NamedTuple):
    """The same as a function of Delta_X, Delta_W being fixed."""

    weight: Tensor  # (O, I)
    Q_W: Quantizer

    def prepare(self, chunk):
        return self.Q_W(self.weight).T

    def __call__(self, chunk, W_hat_T, Q_X):
        X_hat = Q_X(chunk.x, chunk.group)
        return hessian_loss(torch.addmm(chunk.out, X_hat, W_hat_T, alpha=-1), chunk.grad)


class LossOfA(NamedTuple):
    """Eq. (16) of a product of activations, out = A B, as a function of Delta_A; Eq. (17) where all
    rows are of one time group. A chunk has a row for each calibration tuple: a (N, H, S, K),
    b (N, H, K, S'), out and grad (N, H, S, S'), group (N,)."""

    Q_B: Quantizer

    def prepare(self, chunk):
        return self.Q_B(chunk.b)

    def __call__(self, chunk, B_hat, Q_A):
        delta = (Q_A(chunk.a, chunk.group) @ B_hat).sub_(chunk.out)
        return hessian_loss(delta, chunk.grad, dim=(1, 2, 3)).sum()


class LossOfB(NamedTuple):
    """The same as a function of Delta_B."""

    Q_A: Quantizer

    def prepare(self, chunk):
        return self.Q_A(chunk.a, chunk.group)

    def __call__(self, chunk, A_hat, Q_B):
        return hessian_loss((A_hat @ Q_B(chunk.b)).sub_(chunk.out), chunk.grad)


def search(candidates: Candidates, data, loss) -> Quantizer:
    """The quantizer of least loss over all chunks of `data`: every candidate on every chunk, then
    the argmin, for each channel its own. Of equals the first; NaN never wins against a number.

    # Eq. (8), (12), (17): argmin over Delta of E[delta^T G delta]; `loss` is one of the above
    """
    total = 0
    for chunk in data:
        shared = loss.prepare(chunk)
        total = total + torch.stack([loss(chunk, shared, Q) for Q in candidates]).double()
    return candidates[total.nan_to_num(torch.inf, torch.inf).argmin(dim=0)]


NO_GRADIENT = 1e-6  # of a layer's largest |grad|: a time group that gets no more gets none


def without_gradient(row_max: Tensor, channel_max: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """In which time groups (G,) and output channels (O,) a layer gets no gradient, bool: there
    Eq. (16) is the plain squared error, times the mean of G^(l) over the rest (D2). Given are the
    largest |grad| of its rows (R,), of these groups (R,), and of its channels (O,)."""
    by_group = torch.stack([row_max[group == i].max() for i in range(int(group.max()) + 1)])
    return by_group <= NO_GRADIENT * row_max.max(), channel_max == 0


# ------------------------------------------------------------------------------------------------
# Quantized layers, put in the place of a layer by swapping child modules


class QuantLinear(nn.Module):
    """A linear layer with a weight (O, I) on its grid already, on inputs that `act` quantizes."""

    def __init__(self, weight, bias, act):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.act = act

    def forward(self, x, group=None):
        return F.linear(self.act(x, group), self.weight, self.bias)


class QuantConv2d(QuantLinear):
    """The patch embedding: a convolution whose stride is its kernel size; weight (O, C, p, p)."""

    def forward(self, x, group=None):
        return F.conv2d(self.act(x), self.weight, self.bias, stride=self.weight.shape[2:])


class QuantMatMul(nn.Module):
    """A product of two activations, each with its quantizer; softmax uses the time group."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, a, b, group=None):
        return self.a(a, group) @ self.b(b, group)
