"""Products of uint8 by int8 codes on a CPU, and how far they can be trusted.

oneDNN's accumulates in int32 where the CPU has VNNI. Other CPUs add pairs of products in 16 bits
first, which saturates beyond SATURATING: `pair_limit` finds out by trying, and nothing that could
reach that far may be multiplied here. CPUs with AVX2 alone take the product of avx2.c, which is
exact as far and, where it may add more than one of those sums in 16 bits (its `run`), faster.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine import avx2
from quant_ops import GeluQuantizer, UniformQuantizer, gelu_region, quantize

EXACT = 2**31 - 1  # the sum of any two products of codes is held
SATURATING = 2**15 - 1  # pairs of products are added in 16 bits
AVX2 = "engine/avx2.c"
LONG = 8  # a run that is almost as fast as the longest
ENOUGH = 256  # inputs of a layer, from which packing its candidates is worth it


def pack(weight: Tensor, highest: int, run_of=avx2.longest_run) -> tuple[Tensor, int]:
    """int8 codes (O, I) in the layout of the product that is the faster for inputs up to `highest`,
    and their run, 0 for oneDNN's. `run_of`: that, or quick_run."""
    if whose() == AVX2 and avx2.takes(weight):
        run = run_of(weight, highest)
        if run > 1:
            return avx2.pack(weight), run
    return torch.ops.onednn.qlinear_prepack(weight, None), 0


def input_bits(weight: Tensor, fewest: int) -> int:
    """The most bits, `fewest` to 8, of inputs that this CPU multiplies fast with int8 codes (O, I):
    by avx2.c as many as leave a LONG run, if any do, else 8."""
    if whose() == AVX2 and avx2.takes(weight):
        for bits in range(8, fewest - 1, -1):
            if avx2.longest_run(weight, 2**bits - 1) >= LONG:
                return bits
    return 8


def u8s8(codes, scale, zero_point, weight, run, w_scale, bias):
    """scale (codes - zero_point) V^T w_scale + bias, of uint8 codes (..., I) and int8 V, packed,
    with its run."""
    if run:
        return avx2.u8s8(codes, scale, zero_point, weight, run, w_scale, bias)
    none = torch.zeros(len(w_scale), dtype=torch.int32)  # a weight's zero point is ignored there
    output = 1.0, 0, torch.float32, "none", [], ""
    product = torch.ops.onednn.qlinear_pointwise
    return product(codes, scale, zero_point, weight, w_scale, none, bias, *output)


@cache
def pair_limit() -> int:
    """The largest sum of two products that this CPU's u8 x s8 product holds, found by trying
    oneDNN's: 0 where there is no such product."""

    def is_exact(weight_code):
        codes = torch.full((32, 64), 255, dtype=torch.uint8)
        weight = torch.full((16, 64), weight_code, dtype=torch.int8)
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
        out = u8s8(codes, torch.tensor(1.0), torch.tensor(0), weight, 0, torch.ones(16), None)
        return bool((out == 64 * 255 * weight_code).all())

    try:
        if is_exact(127) and is_exact(-128):
            return EXACT
        return SATURATING if is_exact(64) and is_exact(-64) else 0
    except (AttributeError, RuntimeError):  # an older torch, another processor
        return 0


@cache
def whose() -> str:
    """Whose product this CPU takes, and why it is oneDNN's where it could be the other."""
    if pair_limit() == EXACT or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return "oneDNN"
    return f"oneDNN ({avx2.why_not()})" if avx2.why_not() else AVX2


def whose_is(run: int) -> str:
    """Whose product multiplies a weight that was packed with this run."""
    return AVX2 if run else "oneDNN" if whose() == AVX2 else whose()


# ------------------------------------------------------------------------------------------------
# Phase 3's products of candidates, on CPUs without VNNI


class Inputs(NamedTuple):
    """The values scale * (codes - zero_point), held as uint8 codes (R, I). `scale` and `zero_point`
    are (), or a column (R, 1) for one of each row."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class Weight(NamedTuple):
    """The values scale * v, held as int8 v = q - z (O, I), packed, with their run; scale and the
    sums of v (O,)."""

    packed: Tensor
    run: int
    scale: Tensor
    row_sum: Tensor


def input_codes(Q_X: UniformQuantizer, x: Tensor, group) -> Inputs:
    """Inputs (R, I) of these time groups (R,) as codes."""
    scale, zero_point = Q_X.params_for(x, group)
    return Inputs(quantize(x, scale, zero_point, Q_X.bits).to(torch.uint8), scale, zero_point)


def region_codes(Q_X: GeluQuantizer, x: Tensor, group, region: int) -> Inputs:
    """One region, 1 or 2, of MRQ after GELU: codes of 0..2^(k-1), below zero with scale -s_1."""
    scale = Q_X.params_for(x, group)[region - 1]
    codes = gelu_region(x, scale, region, Q_X.bits).abs_().to(torch.uint8)
    return Inputs(codes, -scale if region == 1 else scale, torch.zeros_like(scale))


def weight_codes(Q_W: UniformQuantizer, weight: Tensor, highest: int) -> Weight:
    """A weight (O, I) as codes less their zero points, for inputs whose codes reach `highest`."""
    v = quantize(weight, Q_W.scale, Q_W.zero_point, Q_W.bits).sub_(Q_W.zero_point)
    scale = Q_W.scale.flatten().expand(len(weight)).contiguous()
    return Weight(*pack(v.to(torch.int8), highest, avx2.quick_run), scale, v.sum(dim=1))


def error(a: Inputs, weight: Weight, z: Tensor) -> Tensor:
    """z (R, O) less the product of the inputs and the weight's transpose."""
    operand = weight.packed, weight.run
    if a.scale.ndim == 0:
        return z - u8s8(a.codes, a.scale, a.zero_point.int(), *operand, weight.scale, None)
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    product = u8s8(a.codes, one, zero, *operand, torch.ones_like(weight.scale), None)
    product.addcmul_(a.zero_point, weight.row_sum, value=-1)  # sum (q - z) v = sum q v - z sum v
    return torch.addcmul(z, product, a.scale * weight.scale, value=-1)


def pays(weight: Tensor, bits: int, highest: int) -> bool:
    """Whether candidates of a weight (O, I) of so many bits, or of inputs whose codes reach
    `highest`, are faster here, and no product can saturate."""
    enough = weight.shape[1] >= ENOUGH
    return enough and bits < 8 and 2 * (2**bits - 1) * highest <= pair_limit()
