"""The product of `int8_cuda.py` as one Triton kernel: int8 codes, sums in int32, then scales and
bias; for qkv also the quantization of q, k and v, for fc1 GELU and that of fc2's inputs.

Tiles are read and written through tensor descriptors (on Hopper by the copy engine), for which all
sizes but the number of rows must be multiples of 16. Triton comes with torch for CUDA, nowhere
else: whoever needs this module imports it in a function.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 128, 128, 128, 4, 3  # rows, outputs, inputs; warps, stages: the fastest on an H200
TWO_SUMS = 64, 128, 128, 4, 4  # after GELU: twice the sums, which must stay in registers
MAGIC = tl.constexpr(1.5 * 2.0**23)  # so large that float32 has no fraction there

# ------------------------------------------------------------------------------------------------
# Parts


@triton.jit
def clip_round(x, half):
    """torch.round (half to even) of x clipped to codes, -half..half - 1; and plus MAGIC, which has
    the code in its lowest byte."""
    moved = tl.minimum(tl.maximum(x, -half), half - 1) + MAGIC
    return moved - MAGIC, moved


@triton.jit
def low_byte(moved):
    return moved.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def gelu(x):
    """The tanh form, x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). A root's inverse
    is one instruction, a division eight."""
    power = x * tl.fma(x * x, -0.10294324, -2.3022082)  # -2 log2(e) u
    inverse = tl.rsqrt(1.0 + tl.exp2(power))
    return (x * inverse) * inverse


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
def on_grid(x, scale, scale2, zero_point, at, half, dtype: tl.constexpr):
    """x as codes of the next layer's inputs, -half..half - 1, or in a floating `dtype`, for inputs
    after GELU alone, as the values of these codes. Scales divide by way of their inverse."""
    s = tl.load(scale + at)[:, None]
    if scale2 is None:
        zero = tl.load(zero_point + at).to(tl.float32)[:, None]
        rounded, moved = clip_round(tl.fma(x, 1.0 / s, zero), half)
    else:
        s2 = tl.load(scale2 + at)[:, None]
        rounded, moved = clip_round(x * tl.where(x < 0, 1.0 / s, 1.0 / s2), half)
        rounded *= tl.where(x < 0, s, s2)
    return low_byte(moved) if dtype == tl.int8 else rounded.to(dtype)


@triton.jit
def ends(
    x, w_scale, bias, columns, width, inverse, lowest, highest,
    then_scale, then_scale2, then_zero_point, at, smooth, half, dtype: tl.constexpr,
):  # fmt: skip
    """What becomes of s_x n: out; or with `inverse` out rounded to steps, `lowest` to `highest` of
    them; or with `then` GELU of it, on the next layer's grid."""
    by, to = vector(w_scale, columns, width)[None, :], vector(bias, columns, width)[None, :]
    if inverse is not None:
        x = tl.fma(x, by, to) * vector(inverse, columns, width)[None, :]
        low, high = vector(lowest, columns, width), vector(highest, columns, width)
        x = (tl.minimum(tl.maximum(x, low[None, :]), high[None, :]) + MAGIC) - MAGIC
    elif then_scale is None:
        x = x * by + to
    else:
        x = gelu(tl.fma(x, by, to))
        if smooth is not None:
            x = x * (1.0 / vector(smooth, columns, width))[None, :]
        x = on_grid(x, then_scale, then_scale2, then_zero_point, at, half, dtype)
    return x.to(dtype)


def split(width):
    """A row as two parts whose sizes are powers of two, 16 at least; the second may be 0."""
    head = max(16, 1 << (width.bit_length() - 1))
    return head, max(16, triton.next_power_of_2(width - head)) if width > head else 0


# ------------------------------------------------------------------------------------------------
# The kernel


@triton.jit
def linear_kernel(
    out, codes, weight, group, tokens, num_rows, num_inputs, width,
    scale, scale2, zero_point, by_group, row_sum, row_sum2,
    w_scale, bias, w_sum, correction, inverse, lowest, highest,
    then_scale, then_scale2, then_zero_point, then_by_group, smooth, half,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A tile of out (R, O), of codes (R, I) and weight (O, I). What a layer lacks is None."""
    tiles = tl.cdiv(width, BLOCK_O)  # neighbours share rows; the weight stays in cache
    row, column = (tl.program_id(0) // tiles) * BLOCK_R, (tl.program_id(0) % tiles) * BLOCK_O
    n = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    n2 = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    for first in range(0, num_inputs, BLOCK_I):  # beyond their ends a and v are 0
        a, v = codes.load([row, first]), weight.load([column, first]).T
        if scale2 is None:
            n = tl.dot(a, v, n, out_dtype=tl.int32)
        else:  # MRQ: codes below zero are of R1, those above of R2
            n = tl.dot(tl.where(a < 0, a, 0).to(tl.int8), v, n, out_dtype=tl.int32)
            n2 = tl.dot(tl.where(a > 0, a, 0).to(tl.int8), v, n2, out_dtype=tl.int32)
    rows, columns = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_O)
    at = tl.zeros((BLOCK_R,), tl.int64)
    if group is not None:
        at = tl.load(group + rows // tokens, mask=rows < num_rows, other=0)
    here, there = at * by_group, at * then_by_group
    sums = rows, num_rows, w_sum, correction, columns, width
    x = values(n, scale, zero_point, here, row_sum, *sums)
    if scale2 is not None:
        x += values(n2, scale2, None, here, row_sum2, *sums)
    x = ends(
        x, w_scale, bias, columns, width, inverse, lowest, highest,
        then_scale, then_scale2, then_zero_point, there, smooth, half, out.dtype,
    )  # fmt: skip
    out.store([row, column], x)


def linear(codes, group, grid, row_sums, weight, onto, then, half, dtype):
    """`cuda_products.triton_linear`: its arguments, taken apart."""
    (scale, scale2, zero_point), (v, *of_columns) = grid, weight
    then_scale, then_scale2, then_zero_point, smooth = then or [None] * 4
    row_sum, row_sum2 = [*(x.contiguous() for x in row_sums), None, None][:2]
    out = codes.new_empty(*codes.shape[:-1], len(v), dtype=dtype)
    num_rows, (width, num_inputs) = codes[..., 0].numel(), v.shape
    tokens = 1 if group is None else num_rows // len(group)
    R, O, I, warps, stages = TILE if scale2 is None else TWO_SUMS  # noqa: E741

    def tiles_of(matrix, *sides):
        return TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), list(sides))

    linear_kernel[triton.cdiv(num_rows, R) * triton.cdiv(width, O),](
        tiles_of(out, R, O), tiles_of(codes.contiguous(), R, I), tiles_of(v, O, I),
        group, tokens, num_rows, num_inputs, width,
        scale, scale2, zero_point, int(scale.ndim > 0), row_sum, row_sum2, *of_columns,
        *(onto or [None] * 3),
        then_scale, then_scale2, then_zero_point, int(bool(then) and then_scale.ndim > 0),
        smooth, half, R, O, I, num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,  # each rounding as torch does it
    )  # fmt: skip
    return out
