"""Linear layers that multiply the codes of a quant file themselves, on a CPU.

Weights stay packed as int8, inputs become uint8 codes, with the static scale of their time group or
with one that each token finds at run time, and this CPU's u8 x s8 product sums in int32. Where the
CPU lacks VNNI that product adds pairs in 16 bits and saturates: a self-test finds out, and a layer
whose codes could reach that far is left in floating point. Nothing that could come out wrong is
multiplied on integers.

    x_hat = s_x (q_x - z_x), w_hat = s_w (q_w - z_w), so with v = q_w - u for any u
    z = s_x s_w [ sum (q_x - z_x) v  -  (z_w - u) sum (q_x - z_x) ] + bias
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, library

from engine.cpu_products import pack, pair_limit, u8s8
from engine.int_products import MAX_INPUTS
from engine.token_quantizer import TokenQuantizer
from quant_ops import GeluQuantizer, UniformQuantizer, gelu_region, qparams_from_range, quantize

# ------------------------------------------------------------------------------------------------
# The product


def int8_product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor | None,
    weight: Tensor,
    run: int,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`u8s8` with a scale and zero point for each time group, (G,), given the rows' groups (R,)."""
    of_weight = weight, run, w_scale, bias
    if group is None or scale.ndim == 0:
        return u8s8(codes, scale, zero_point, *of_weight)
    first = int(group[0])
    if bool((group == first).all()):  # as in sampling
        return u8s8(codes, scale[first], zero_point[first], *of_weight)
    out = codes.new_empty(*codes.shape[:-1], len(w_scale), dtype=torch.float32)
    for i in group.unique().tolist():
        rows = group == i
        out[rows] = u8s8(codes[rows], scale[i], zero_point[i], *of_weight)
    return out


# For the compiler, whose lowering of oneDNN's op wants constants. Called without it, an op of one's
# own would only import the compiler: 70 MiB.
int8_op = library.custom_op("tqdit::int8_product", int8_product, mutates_args=())


@int8_op.register_fake
def _(codes, scale, zero_point, group, weight, run, w_scale, bias):
    return codes.new_empty(*codes.shape[:-1], len(w_scale), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------
# The layer

AT_ONCE = 2**20  # numbers of a weight that are floating point at a time


def signed_weight(codes: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """v = q_w - u as int8 (O, I), and z_w - u (O,): with u = z_w, so that nothing is left to
    correct, if those fit, else with u in the middle of the codes."""
    v = codes.to(torch.int16) - zero_point.to(torch.int16)
    if v.abs().max() <= 127:
        return v.to(torch.int8), None
    middle = 2 ** (bits - 1)
    correction = (zero_point.float() - middle).flatten().expand(len(codes))
    return (codes.to(torch.int16) - middle).to(torch.int8), correction


def highest_code(act: nn.Module) -> int:
    """Of this quantizer's inputs as a product takes them: MRQ's two regions are one each."""
    return 2 ** (act.bits - 1) if isinstance(act, GeluQuantizer) else 2**act.bits - 1


def why_not(v: Tensor, act: nn.Module) -> str:
    """Why this layer is not multiplied on this CPU's integers; "" if it is."""
    if not isinstance(act, UniformQuantizer | GeluQuantizer | TokenQuantizer):
        return "inputs in full precision"
    if v.shape[1] >= MAX_INPUTS:
        return "too many inputs"
    if 2 * int(v.to(torch.int16).abs().max()) * highest_code(act) > pair_limit():
        return "this CPU's product of codes would saturate" if pair_limit() else "no such product"
    return ""


def folded(act: GeluQuantizer, bits: int = 8) -> UniformQuantizer:
    """The range of MRQ's two regions as one grid of so many bits, so that the layer is one product,
    on other codes than the paper's."""
    half = 2 ** (act.bits - 1)
    ends = -half * act.scale1, (half - 1) * act.scale2
    return UniformQuantizer(bits, *qparams_from_range(*ends, bits))


class Int8Linear(nn.Module):
    """`QuantLinear` on codes: the same codes, the same product but for rounding in float32."""

    def __init__(self, v, correction, w_scale, bias, act, smooth=None):
        """v (O, I) int8 and `correction` of `signed_weight`; w_scale () or (O, 1); bias (O,);
        `act` a UniformQuantizer, GeluQuantizer or TokenQuantizer; smooth (I,): what inputs are
        divided by."""
        super().__init__()
        w_scale = w_scale.flatten().expand(len(v)).contiguous()
        if isinstance(act, TokenQuantizer):  # sums of the rows of the weight
            sums = v.sum(dim=1) - v.shape[1] * (0 if correction is None else correction)
            self.register_buffer("w_sum", sums * w_scale)
        weight, self.run = pack(v, highest_code(act))
        self.register_buffer("weight", weight)
        self.register_buffer("w_scale", w_scale)
        self.register_buffer("correction", None if correction is None else correction * w_scale)
        self.register_buffer("bias", bias)
        self.register_buffer("smooth", smooth)
        self.act = act

    def forward(self, x, group=None):
        x = x.float() if self.smooth is None else x.float() / self.smooth
        if isinstance(self.act, TokenQuantizer):
            return self.of_tokens(x)
        if isinstance(self.act, UniformQuantizer):
            codes = quantize(x, *self.act.params_for(x, group), self.act.bits)
            return self.product(codes, self.act.scale, self.act.zero_point, group, self.bias)
        bits, scales = self.act.bits, self.act.params_for(x, group)
        low, high = gelu_region(x, scales[0], 1, bits), gelu_region(x, scales[1], 2, bits)
        half = 2 ** (bits - 1)  # R1's codes are -half..0
        middle, zero = (torch.full_like(self.act.scale1, v) for v in (half, 0))
        out = self.product(low + half, self.act.scale1, middle, group, self.bias)
        return out + self.product(high, self.act.scale2, zero, group, None)

    def of_tokens(self, x):
        """With a scale and zero point for each token: the product has the middle of the codes for
        its zero point, the rest follows from the weight's sums."""
        scale, zero_point = self.act.params_for(x)
        codes = quantize(x, scale, zero_point, self.act.bits)
        one, middle = (self.w_scale.new_full((), v) for v in (1, 2 ** (self.act.bits - 1)))
        out = self.product(codes, one, middle, None, None)
        return (out - (zero_point - middle) * self.w_sum) * scale + self.bias

    def product(self, codes, scale, zero_point, group, bias):
        """Of codes (..., I), whole numbers 0..255 in floats."""
        weight, w_scale = self.weight, self.w_scale
        q = codes.to(torch.uint8)
        multiply = int8_op if torch.compiler.is_compiling() else int8_product
        out = multiply(q, scale, zero_point.int(), group, weight, self.run, w_scale, bias)
        if self.correction is None:
            return out
        if group is not None and scale.ndim:
            shape = -1, *[1] * (codes.ndim - 1)
            scale, zero_point = scale[group].view(shape), zero_point[group].view(shape)
        row_sum = scale * (codes - zero_point).sum(dim=-1, keepdim=True)
        return torch.addcmul(out, row_sum, self.correction, value=-1)


class Gelu(nn.Module):
    """GELU in its tanh form, x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is
    x sigmoid(2 u): compiled code is faster at that. Eager torch has one function."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x))


class PackedLinear(nn.Module):
    """`QuantLinear`, whose product is in floating point, with a weight that stays int8 in memory:
    each call makes some of its rows floating point again, then the next."""

    def __init__(self, v, correction, w_scale, bias, act, smooth=None):
        """As `Int8Linear`, `act` being any quantizer."""
        super().__init__()
        self.register_buffer("weight", v)
        self.register_buffer("correction", correction)
        self.register_buffer("w_scale", w_scale.flatten().expand(len(v)).contiguous())
        self.register_buffer("bias", bias)
        self.register_buffer("smooth", smooth)
        self.act = act

    def forward(self, x, group=None):
        x = self.act(x if self.smooth is None else x / self.smooth, group)
        count = max(1, AT_ONCE // self.weight.shape[1])
        rows = [slice(at, at + count) for at in range(0, len(self.weight), count)]
        return torch.cat([F.linear(x, self.floats(part), self.bias[part]) for part in rows], dim=-1)

    def floats(self, part):
        """These rows of the weight, in float32."""
        weight = self.weight[part].float()
        if self.correction is not None:
            weight -= self.correction[part, None]
        return weight.mul_(self.w_scale[part, None])
