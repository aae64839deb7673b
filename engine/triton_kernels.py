"""The product of `int8_cuda.py` as one Triton kernel: int8 codes, sums in int32, then scales and
bias; for fc1 also GELU and the quantization of fc2's inputs.

Triton comes with torch for CUDA, nowhere else: whoever needs this module imports it in a function.
"""

import os

import torch
import triton
import triton.language as tl

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # in tests, where nothing can be timed
TILES = [(128, 128, 128, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 128, 128, 4, 4)]
CONFIGS = [
    triton.Config(dict(BLOCK_R=r, BLOCK_O=o, BLOCK_I=i), num_warps=warps, num_stages=stages)
    for r, o, i, warps, stages in ([(64, 64, 64, 4, 2)] if ON_CPU else TILES)
]
MAGIC = tl.constexpr(1.5 * 2.0**23)  # so large that float32 has no fraction there

# ------------------------------------------------------------------------------------------------
# Parts


@triton.jit
def clip_round(x, low, high):
    """torch.round (half to even) of x clipped to low..high, whole numbers."""
    return (tl.minimum(tl.maximum(x, low), high) + MAGIC) - MAGIC


@triton.jit
def gelu(x):
    """The tanh form, x / 2 (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + a x^3)."""
    power = -1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(tl.minimum(power, 80.0)))  # below x = -7 it is 0 anyway


@triton.jit
def vector(table, index, count):
    """table[index]; what lies beyond its end is never stored."""
    return tl.load(table + index, mask=index < count, other=1)


@triton.jit
def values(n, scale, zero_point, at, row_sum, rows, num_rows, w_sum, correction, columns, width):
    """s_x n, with n made the exact sum over the inputs of (q_x - z_x) (q_w - z_w)."""
    if correction is not None:
        sums = vector(row_sum, rows, num_rows)
        n -= sums[:, None] * vector(correction, columns, width)[None, :]
    if zero_point is not None:
        n -= tl.load(zero_point + at)[:, None] * vector(w_sum, columns, width)[None, :]
    return n.to(tl.float32) * tl.load(scale + at)[:, None]


@triton.jit
def codes_of(x, scale, scale2, zero_point, at, half, smooth, columns, width):
    """x as codes of the next layer's inputs, -half..half - 1."""
    if smooth is not None:
        x = tl.div_rn(x, vector(smooth, columns, width)[None, :])
    level = tl.div_rn(x, tl.load(scale + at)[:, None])
    if scale2 is None:
        zero = tl.load(zero_point + at).to(tl.float32)[:, None]
        codes = clip_round(level, -half - zero, half - 1 - zero) + zero
    else:
        level2 = tl.div_rn(x, tl.load(scale2 + at)[:, None])
        codes = clip_round(level, -half, 0.0) + clip_round(level2, 0.0, half - 1)
    return codes


# ------------------------------------------------------------------------------------------------
# The kernel


def fitting(configs, args, **_):
    """Tiles whose sums stay in registers: after GELU there are two of each."""
    return [tile for tile in configs if args["regions"] * tile.kwargs["BLOCK_O"] <= 256]


SHAPE = ["num_inputs", "width", "regions"]  # what the best tile depends on


@triton.autotune(CONFIGS, SHAPE, prune_configs_by=dict(early_config_prune=fitting))
@triton.jit
def linear_kernel(
    out, codes, group, tokens, num_rows, num_inputs, width, regions,
    scale, scale2, zero_point, by_group, row_sum, row_sum2,
    weight, w_scale, bias, w_sum, correction,
    then_scale, then_scale2, then_zero_point, then_by_group, smooth, half,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A tile of out (R, O), of codes (R, I) and weight (O, I). What a layer lacks is None."""
    tiles = tl.cdiv(width, BLOCK_O)  # neighbours share rows; the weight stays in cache
    rows = (tl.program_id(0) // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (tl.program_id(0) % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    row, column = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    n = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    n2 = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    for first in range(0, num_inputs, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        inside = (row < num_rows) & (i < num_inputs)[None, :]
        a = tl.load(codes + row * num_inputs + i[None, :], mask=inside, other=0)
        inside = (column < width) & (i < num_inputs)[:, None]
        v = tl.load(weight + column * num_inputs + i[:, None], mask=inside, other=0)
        if scale2 is None:
            n = tl.dot(a, v, n, out_dtype=tl.int32)
        else:  # MRQ: codes below zero are of R1, those above of R2
            n = tl.dot(tl.where(a < 0, a, 0).to(tl.int8), v, n, out_dtype=tl.int32)
            n2 = tl.dot(tl.where(a > 0, a, 0).to(tl.int8), v, n2, out_dtype=tl.int32)
    at = tl.zeros((BLOCK_R,), tl.int64)
    if group is not None:
        at = tl.load(group + rows // tokens, mask=rows < num_rows, other=0)
    here, there = at * by_group, at * then_by_group
    ends = rows, num_rows, w_sum, correction, columns, width
    x = values(n, scale, zero_point, here, row_sum, *ends)
    if scale2 is not None:
        x += values(n2, scale2, None, here, row_sum2, *ends)
    x = x * vector(w_scale, columns, width)[None, :] + vector(bias, columns, width)[None, :]
    if then_scale is not None:
        then = then_scale, then_scale2, then_zero_point, there, half, smooth, columns, width
        x = codes_of(gelu(x), *then)
    inside = (row < num_rows) & (column < width)
    tl.store(out + row * width + column, x.to(out.dtype.element_ty), mask=inside)


def linear(codes, group, grid, row_sums, weight, then, half, dtype):
    """`int8_cuda.triton_linear`: its arguments, taken apart."""
    (scale, scale2, zero_point), (v, *of_columns) = grid, weight
    then_scale, then_scale2, then_zero_point, smooth = then or [None] * 4
    row_sum, row_sum2 = [*row_sums, None, None][:2]
    out = codes.new_empty(*codes.shape[:-1], len(v), dtype=torch.int8 if then else dtype)
    num_rows, (width, num_inputs) = codes[..., 0].numel(), v.shape
    tokens = 1 if group is None else num_rows // len(group)

    def programs(tile):
        return (triton.cdiv(num_rows, tile["BLOCK_R"]) * triton.cdiv(width, tile["BLOCK_O"]),)

    linear_kernel[programs](
        out, codes.contiguous(), group, tokens, num_rows, num_inputs, width,
        1 if scale2 is None else 2, scale, scale2, zero_point, int(scale.ndim > 0), row_sum,
        row_sum2, v, *of_columns, then_scale, then_scale2, then_zero_point,
        int(bool(then) and then_scale.ndim > 0), smooth, half,
        enable_fp_fusion=False,  # each rounding as torch does it
    )  # fmt: skip
    return out
