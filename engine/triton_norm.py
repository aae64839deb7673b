"""What stands before qkv and fc1, as one Triton kernel: the residual, LayerNorm, adaLN's shift and
scale, and the quantization of the layer's inputs. A row is read once and stays in registers, in two
parts, since a part's size is a power of two.
"""

import torch
import triton
import triton.language as tl

from engine.triton_kernels import clip_round, low_byte, split

EPS = tl.constexpr(1e-6)  # of models_dit's LayerNorms
WARPS = 1  # of 1, 2, 4 and 8 the fastest on an H200


@triton.jit
def take(x, at, inside):
    """x[at] in float32; 1 where not `inside`, if that is given."""
    part = tl.load(x + at) if inside is None else tl.load(x + at, inside, other=1.0)
    return part.to(tl.float32)


@triton.jit
def residual(summed, x, h, gate, at, columns, inside):
    """A part of x + gate h, which it stores, or of x."""
    value = take(x, at, inside)
    if h is not None:
        value = tl.fma(take(gate, columns, inside), take(h, at, inside), value)
        tl.store(summed + at, value, inside)
    return value


@triton.jit
def to_codes(codes, value, shift, scale, smooth, inverse, zero, half, at, columns, inside):
    """Stores the codes of a part of LayerNorm's output; their sum."""
    value = tl.fma(value, 1.0 + take(scale, columns, inside), take(shift, columns, inside))
    if smooth is not None:
        value = value / take(smooth, columns, inside)
    rounded, moved = clip_round(tl.fma(value, inverse, zero), half)
    tl.store(codes + at, low_byte(moved), inside)
    return tl.sum(rounded if inside is None else tl.where(inside, rounded, 0.0))


@triton.jit
def norm_kernel(
    codes, row_sum, summed, x, h, gate, of_gate, shift, of_shift, scale, of_scale, group, tokens,
    act_scale, zero_point, by_group, smooth, half,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A row of codes (R, D), their sum, and with h the row of summed = x + gate h."""
    row = tl.program_id(0).to(tl.int64)
    sample, c1, c2 = row // tokens, tl.arange(0, HEAD), HEAD + tl.arange(0, max(TAIL, 1))
    inside = c2 < WIDTH if HEAD + TAIL != WIDTH else None
    a1, a2 = row * WIDTH + c1, row * WIDTH + c2
    gate = gate + sample * of_gate if h is not None else None
    shift, scale = shift + sample * of_shift, scale + sample * of_scale
    of_row = by_group * tl.load(group + sample) if group is not None else 0
    inverse = 1.0 / tl.load(act_scale + of_row)
    zero = tl.load(zero_point + of_row).to(tl.float32)
    if TAIL == 0:
        v1 = residual(summed, x, h, gate, a1, c1, None)
        v1 -= tl.sum(v1) / WIDTH
        v1 *= tl.rsqrt(tl.sum(v1 * v1) / WIDTH + EPS)
        sums = to_codes(codes, v1, shift, scale, smooth, inverse, zero, half, a1, c1, None)
    else:
        v1 = residual(summed, x, h, gate, a1, c1, None)
        v2 = residual(summed, x, h, gate, a2, c2, inside)
        v2 = v2 if inside is None else tl.where(inside, v2, 0.0)
        mean = (tl.sum(v1) + tl.sum(v2)) / WIDTH
        v1, v2 = v1 - mean, v2 - mean
        v2 = v2 if inside is None else tl.where(inside, v2, 0.0)
        by = tl.rsqrt((tl.sum(v1 * v1) + tl.sum(v2 * v2)) / WIDTH + EPS)
        v1, v2 = v1 * by, v2 * by
        sums = to_codes(codes, v1, shift, scale, smooth, inverse, zero, half, a1, c1, None)
        sums += to_codes(codes, v2, shift, scale, smooth, inverse, zero, half, a2, c2, inside)
    tl.store(row_sum + row, sums.to(tl.int32))


def norm_codes(x, h, gate, shift, scale, group, grid, smooth, half):
    """`cuda_products.norm_codes`."""
    num_rows, width = x[..., 0].numel(), x.shape[-1]
    x, h = x.contiguous(), None if h is None else h.contiguous()
    summed = x.new_empty(0 if h is None else x.shape, dtype=torch.float32)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    row_sum = x.new_empty(x.shape[:-1], dtype=torch.int32)
    act_scale, zero_point = grid
    norm_kernel[num_rows,](
        codes, row_sum, summed, x, h, gate, 0 if h is None else gate.stride(0),
        shift, shift.stride(0), scale, scale.stride(0), group,
        num_rows // len(x), act_scale, zero_point, int(act_scale.ndim > 0), smooth, half,
        width, *split(width), num_warps=WARPS,
    )  # fmt: skip
    return summed, codes, row_sum
