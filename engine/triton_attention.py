"""Both attention products as one Triton kernel, softmax and its MRQ between them; what goes in are
the whole numbers that q, k and v are quantized to, what comes out are the codes of proj's inputs.
No score is ever written.

Softmax can be quantized only when its sum is known, so scores are made twice. Whole numbers up to
255, and softmax on MRQ's grid, whose steps are powers of two, are exact in bfloat16: nothing rounds
but sums in float32.
"""

import torch
import triton
import triton.language as tl

from engine.triton_kernels import MAGIC, clip_round, low_byte, split

TILE = 128, 64, 8, 3  # queries, keys; warps, stages: the fastest of nine on an H200
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(x, rows, columns, by_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """x[rows, columns], with `MASKED` 0 beyond ROWS and WIDTH."""
    at = x + rows[:, None] * by_row + columns[None, :]
    if MASKED:
        part = tl.load(at, (rows < ROWS)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    else:
        part = tl.load(at)
    return part


@triton.jit
def scores(q1, q2, k1, k2, keys, ROWS: tl.constexpr, UNEVEN: tl.constexpr):
    """Of these keys, in steps of q times k; -inf beyond the last."""
    s = tl.dot(q1, k1.T)
    if q2 is not None:
        s = tl.dot(q2, k2.T, s)
    return tl.where(keys[None, :] < ROWS, s, float("-inf")) if UNEVEN else s


@triton.jit
def mrq(p, scale1, levels):
    """`quant_ops.mrq_softmax`, with 2^(k-1) levels in each region. Next to MAGIC times a power of
    two float32 has just its multiples."""
    upper = p >= tl.maximum((levels - 0.5) * scale1, 0.5 / levels)
    p = tl.where(upper, tl.maximum(p, 1.0 / levels), tl.minimum(p, (levels - 1.0) * scale1))
    by = tl.where(upper, MAGIC / levels, MAGIC * scale1)
    return (p + by) - by


@triton.jit
def store_codes(
    out, row_sum, x, rows, columns, by_row, ROWS: tl.constexpr, WIDTH: tl.constexpr, scale,
    zero_point, smooth, half,
):  # fmt: skip
    """x as proj's codes; the sums of their rows are added up over heads."""
    inside = (rows < ROWS)[:, None] & (columns < WIDTH)[None, :]
    if smooth is not None:
        x = x * (1.0 / tl.load(smooth + columns, columns < WIDTH, other=1.0))[None, :]
    rounded, moved = clip_round(tl.fma(x, 1.0 / scale, zero_point), half)
    tl.store(out + rows[:, None] * by_row + columns[None, :], low_byte(moved), inside)
    if row_sum is not None:
        sums = tl.sum(tl.where(inside, rounded, 0.0), axis=1).to(tl.int32)
        tl.atomic_add(row_sum + rows, sums, rows < ROWS)


@triton.jit
def attention_kernel(
    out, row_sum, qkv, group, q_scale, k_scale, v_scale, scale1, by_group, levels,
    then_scale, then_zero_point, then_by_group, smooth, half,
    S: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """M queries of a head of a sample of S tokens. Its WIDTH columns are HEAD and TAIL, the last
    ones 0."""
    D: tl.constexpr = HEADS * WIDTH
    UNEVEN: tl.constexpr = S % N > 0
    OF_Q: tl.constexpr = (WIDTH < HEAD) | (S % M > 0)  # whether tiles reach beyond ends
    OF_KV: tl.constexpr = (WIDTH < HEAD) | UNEVEN
    tiles: tl.constexpr = (S + M - 1) // M
    first_query, head = (tl.program_id(0) % tiles) * M, tl.program_id(0) // tiles
    sample, column = head // HEADS, (head % HEADS) * WIDTH
    of_group = tl.load(group + sample) if group is not None else 0
    factor = tl.load(q_scale) * tl.load(k_scale) * LOG2E
    first = sample.to(tl.int64) * S
    q = qkv + first * (3 * D) + column
    k, v, rows = q + D, q + 2 * D, first_query + tl.arange(0, M)
    columns, columns2 = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    q1 = tile(q, rows, columns, 3 * D, S, WIDTH, OF_Q)
    q2 = tile(q, rows, columns2, 3 * D, S, WIDTH, True) if TAIL > 0 else None
    highest, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    for key in range(0, S, N):
        keys = key + tl.arange(0, N)
        k1 = tile(k, keys, columns, 3 * D, S, WIDTH, OF_KV)
        k2 = tile(k, keys, columns2, 3 * D, S, WIDTH, True) if TAIL > 0 else None
        s = scores(q1, q2, k1, k2, keys, S, UNEVEN)
        new = tl.maximum(highest, tl.max(s, axis=1) * factor)
        part = tl.sum(tl.exp2(tl.fma(s, factor, -new[:, None])), axis=1)
        total, highest = tl.fma(total, tl.exp2(highest - new), part), new
    shift, of_softmax = -(highest + tl.log2(total)), tl.load(scale1 + of_group * by_group)
    x, x2 = tl.zeros((M, HEAD), tl.float32), tl.zeros((M, TAIL if TAIL > 0 else 16), tl.float32)
    for key in range(0, S, N):
        keys = key + tl.arange(0, N)
        k1 = tile(k, keys, columns, 3 * D, S, WIDTH, OF_KV)
        k2 = tile(k, keys, columns2, 3 * D, S, WIDTH, True) if TAIL > 0 else None
        s = scores(q1, q2, k1, k2, keys, S, UNEVEN)
        p = mrq(tl.exp2(tl.fma(s, factor, shift[:, None])), of_softmax, levels).to(q1.dtype)
        x = tl.dot(p, tile(v, keys, columns, 3 * D, S, WIDTH, OF_KV), x)
        if TAIL > 0:
            x2 = tl.dot(p, tile(v, keys, columns2, 3 * D, S, WIDTH, True), x2)
    at, of_v = of_group * then_by_group, tl.load(v_scale)
    scale, zero = tl.load(then_scale + at), tl.load(then_zero_point + at).to(tl.float32)
    out += first * D + column
    row_sum = row_sum + first if row_sum is not None else None
    smooth = smooth + column if smooth is not None else None
    store_codes(out, row_sum, x * of_v, rows, columns, D, S, WIDTH, scale, zero, smooth, half)
    if TAIL > 0:
        x2 *= of_v
        store_codes(out, row_sum, x2, rows, columns2, D, S, WIDTH, scale, zero, smooth, half)


def parts_of(tokens, width):
    """A head's columns as the kernel takes them, `split`; where all keys are one tile, in one part:
    of two that are uneven ptxas 12.8, which comes with Triton 3.6, makes machine code that takes
    the address of v's second part from a register that nothing has written. ptxas 12.9 does not."""
    if tokens > TILE[1]:
        return split(width)
    return max(16, triton.next_power_of_2(width)), 0


def attention(qkv, group, heads, scales, softmax, levels, then, half, with_sums):
    """`cuda_products.attention`."""
    samples, tokens, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = qkv.new_empty(samples, tokens, D, dtype=torch.int8)
    sums = qkv.new_zeros(samples, tokens, dtype=torch.int32)
    M, N, warps, stages = TILE
    scale, zero_point, smooth = then
    attention_kernel[triton.cdiv(tokens, M) * samples * heads,](
        out, sums if with_sums else None, qkv.contiguous(), group,
        *scales, softmax, int(softmax.ndim > 0), levels,
        scale, zero_point, int(scale.ndim > 0), smooth, half,
        tokens, heads, D // heads, *parts_of(tokens, D // heads), M, N,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, sums
