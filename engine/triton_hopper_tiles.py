"""Tiles of q, k and v in shared memory, and their products, for `triton_hopper_attention.py`: in
Gluon, the lower level of Triton.

A head's columns come in two parts, for sides of tiles are powers of two; the second part may be
missing. `of` and `of2` describe them in global memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from engine.triton_hopper import async_load


@gluon.jit
def buffer(of, of2, COUNT: gl.constexpr):
    """Shared memory for tiles of a head, whose columns come in two parts, and a barrier for each,
    which tells when it is full."""
    tiles = gl.allocate_shared_memory(of.dtype, [COUNT] + of.block_shape, of.layout)
    tails = tiles
    if of2 is not None:
        tails = gl.allocate_shared_memory(of.dtype, [COUNT] + of2.block_shape, of2.layout)
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
    return tiles, tails, full


@gluon.jit
def fetch(buffer, slot, of, of2, head, row):
    """Has a head's columns, from this row on, brought into a slot."""
    tiles, tails, full = buffer[0].index(slot), buffer[1].index(slot), buffer[2].index(slot)
    HEAD: gl.constexpr = of.block_shape[2]
    TAIL: gl.constexpr = 0 if of2 is None else of2.block_shape[2]
    mbarrier.expect(full, of.block_shape[1] * (HEAD + TAIL) * 2)
    async_load(of, [head, row, 0], full, tiles)
    if TAIL > 0:
        async_load(of2, [head, row, HEAD], full, tails)


@gluon.jit
def matrix(tiles, slot):
    """One of these, of a single head, in two dimensions."""
    return tiles.index(slot).reshape([tiles.shape[2], tiles.shape[3]])


@gluon.jit
def scores(q, slot, k, SPLIT: gl.constexpr):
    """A tile's q times k, in steps of both, (M, S)."""
    M: gl.constexpr = q[0].shape[2]
    S: gl.constexpr = k[0].shape[2]
    s = gl.zeros([M, S], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S, 16]))
    keys = matrix(k[0], 0).permute((1, 0))
    s = hopper.warpgroup_mma(matrix(q[0], slot), keys, s, use_acc=False, is_async=True)
    if SPLIT:
        s = hopper.warpgroup_mma(
            matrix(q[1], slot), matrix(k[1], 0).permute((1, 0)), s, is_async=True
        )
    return hopper.warpgroup_mma_wait(0, (s,))


@gluon.jit
def weighted(p, v):
    """p (M, S) times some columns of v (S, O). The product may still run."""
    M: gl.constexpr = p.shape[0]
    O: gl.constexpr = v.shape[3]  # noqa: E741
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, O, 16])
    p = gl.convert_layout(p, gl.DotOperandLayout(0, layout, 2))
    x = gl.zeros([M, O], gl.float32, layout)
    return hopper.warpgroup_mma(p, matrix(v, 0), x, use_acc=False, is_async=True)
