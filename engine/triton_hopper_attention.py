"""The attention of `triton_attention.py` on Hopper, for heads of 128 or 256 tokens: in Gluon, the
lower level of Triton.

All scores of 64 queries stay in registers, so they are made once, and softmax once. A program has a
head: the copy engine brings its k and v into shared memory, and its queries two tiles ahead. Where
two programs fit on a multiprocessor, one multiplies while the other makes a softmax.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.triton_hopper_tiles import buffer, fetch, scores, weighted
from engine.triton_kernels import MAGIC, clip_round, low_byte, split

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the one from Triton 3.7 on
TOKENS = 128, 256  # scores of a query: more do not fit in registers
QUERIES, SLOTS = 64, 2  # of a tile; tiles in shared memory
LOG2E = gl.constexpr(1.4426950408889634)
UP = gl.constexpr(1.0 + 2.0**-22)  # what lies half-way between two levels goes up


def takes(qkv: torch.Tensor, heads: int) -> bool:
    """Whether the kernel takes these heads: the copy engine's rows are of 16 bytes, and more than
    96 columns are not sure to fit."""
    tokens, width = qkv.shape[1], qkv.shape[2] // (3 * heads)
    return qkv.dtype == torch.bfloat16 and tokens in TOKENS and width in range(8, 97, 8)


@gluon.jit
def quarters(x):
    """(M, S) as (M, 4, S / 4): no long chain of additions, or of comparisons, is left."""
    return x.reshape([x.shape[0], 4, x.shape[1] // 4])


@gluon.jit
def exponentials(s, factor):
    """2^(s factor) over the largest of its row, and the sum of each row."""
    rows: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    highest = gl.convert_layout(gl.max(gl.max(quarters(s), axis=1), axis=1), rows) * factor
    e = gl.exp2(gl.fma(s, factor, -highest[:, None]))
    return e, gl.convert_layout(gl.sum(gl.sum(quarters(e), axis=1), axis=1), rows)


@gluon.jit
def mrq(e, total, scale1, levels):
    """`triton_attention.mrq` of e / total. What R1 does not reach is R2's. Where a gap lies between
    them, what R2 rounds to 0 is R1's end. Half-way between levels R2 rounds up: half of its first
    one is the border."""
    inverse, end = 1.0 / total, (levels - 1.0) * scale1
    by1, by2 = MAGIC * scale1, MAGIC / levels
    lower = gl.fma(e, inverse[:, None], by1) - by1
    upper = gl.fma(e, (inverse * UP)[:, None], by2) - by2
    return gl.where(lower > end, gl.maximum(upper, end), lower)


@gluon.jit
def store_codes(
    out, row_sum, x, first: gl.constexpr, by_row, WIDTH: gl.constexpr, scale, zero_point, smooth,
    half,
):  # fmt: skip
    """x, from column `first` of the head on, as proj's codes; the sums of rows are added up over
    heads. A head has WIDTH columns."""
    R: gl.constexpr = x.shape[0]
    O: gl.constexpr = x.shape[1]  # noqa: E741
    layout: gl.constexpr = x.type.layout
    columns = first + gl.arange(0, O, gl.SliceLayout(0, layout))
    if smooth is not None:
        x = x * (1.0 / gl.load(smooth + columns, columns < WIDTH, other=1.0))[None, :]
    rounded, moved = clip_round(gl.fma(x, 1.0 / scale, zero_point), half)
    if row_sum is not None:
        if first + O > WIDTH:
            rounded = gl.where((columns < WIDTH)[None, :], rounded, 0.0)
        sums, rows = gl.sum(rounded, axis=1), gl.arange(0, R, gl.SliceLayout(1, layout))
        gl.atomic_add(row_sum + rows, sums.to(gl.int32), sem="relaxed")
    codes = low_byte(moved)
    if O > 16:  # a thread gets eight neighbours, in rows that its warp has
        wide: gl.constexpr = gl.BlockedLayout([O // 16, 8], [256 // O, O // 8], [4, 1], [1, 0])
        codes = gl.convert_layout(codes, wide)
    rows = gl.arange(0, R, gl.SliceLayout(1, codes.type.layout))[:, None]
    columns = first + gl.arange(0, O, gl.SliceLayout(0, codes.type.layout))[None, :]
    gl.store(out + rows * by_row + columns, codes, columns < WIDTH)


@gluon.jit
def attention_kernel(
    out, row_sum, of_q, of_q2, of_kv, of_kv2, group, q_scale, k_scale, v_scale, scale1, by_group,
    levels, then_scale, then_zero_point, then_by_group, smooth, half,
    S: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A head of a sample of S tokens. Its WIDTH columns come in two parts, the last ones 0."""
    SPLIT: gl.constexpr = of_q2 is not None
    M: gl.constexpr = of_q.block_shape[1]
    HEAD: gl.constexpr = of_q.block_shape[2]
    D: gl.constexpr = HEADS * WIDTH
    q, k, v = buffer(of_q, of_q2, SLOTS), buffer(of_kv, of_kv2, 1), buffer(of_kv, of_kv2, 1)
    hopper.fence_async_shared()  # the copy engine sees the barriers
    head, sample = gl.program_id(0) % HEADS, gl.program_id(0) // HEADS
    row = sample * S
    fetch(k, 0, of_kv, of_kv2, HEADS + head, row)
    for i in gl.static_range(SLOTS):
        fetch(q, i, of_q, of_q2, head, row + i * M)
    fetch(v, 0, of_kv, of_kv2, 2 * HEADS + head, row)

    of_group = gl.load(group + sample) if group is not None else 0
    factor, of_v = gl.load(q_scale) * gl.load(k_scale) * LOG2E, gl.load(v_scale)
    s_1, at = gl.load(scale1 + of_group * by_group), of_group * then_by_group
    scale, zero = gl.load(then_scale + at), gl.load(then_zero_point + at).to(gl.float32)
    out += row.to(gl.int64) * D + head * WIDTH
    row_sum = row_sum + row if row_sum is not None else None
    smooth = smooth + head * WIDTH if smooth is not None else None
    mbarrier.wait(k[2].index(0), 0)
    for tile in range(S // M):
        slot, ahead = tile % SLOTS, (tile + SLOTS) * M
        mbarrier.wait(q[2].index(slot), (tile // SLOTS) & 1)
        s = scores(q, slot, k, SPLIT)
        if ahead < S:
            barrier()  # all warps are done with the slot
            fetch(q, slot, of_q, of_q2, head, row + ahead)
        e, total = exponentials(s, factor)
        p = mrq(e, total, s_1, levels).to(of_q.dtype)
        mbarrier.wait(v[2].index(0), 0)
        x, to = weighted(p, v[0]), out + tile * M * D
        sums = row_sum + tile * M if row_sum is not None else None
        if SPLIT:
            x, x2 = hopper.warpgroup_mma_wait(0, (x, weighted(p, v[1])))
            store_codes(to, sums, x2 * of_v, HEAD, D, WIDTH, scale, zero, smooth, half)
        else:
            x = hopper.warpgroup_mma_wait(0, (x,))
        store_codes(to, sums, x * of_v, 0, D, WIDTH, scale, zero, smooth, half)


def layout_of(columns):
    """In shared memory, of a tile of so many columns of one head."""
    return gl.NVMMASharedLayout(min(128, 2 * columns), 16, 3)


def attention(qkv, group, heads, scales, softmax, levels, then, half, with_sums):
    """`cuda_products.attention`."""
    samples, tokens, D = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    width, (scale, zero_point, smooth) = D // heads, then
    out = qkv.new_empty(samples, tokens, D, dtype=torch.int8)
    sums = qkv.new_zeros(samples, tokens, dtype=torch.int32)
    of_heads = qkv.contiguous().view(-1, 3 * heads, width).transpose(0, 1)

    def tiles_of(rows):
        def part(columns):
            sides = [1, rows, columns]
            return TensorDescriptor.from_tensor(of_heads, sides, layout_of(columns))

        return [part(columns) if columns else None for columns in split(width)]

    attention_kernel[samples * heads,](
        out, sums if with_sums else None, *tiles_of(QUERIES), *tiles_of(tokens), group,
        *scales, softmax, int(softmax.ndim > 0), levels,
        scale, zero_point, int(scale.ndim > 0), smooth, half,
        tokens, heads, width, SLOTS, num_warps=4, maxnreg=255, enable_fp_fusion=False,
    )  # fmt: skip
    return out, sums
