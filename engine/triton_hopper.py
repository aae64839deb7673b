"""The product of `triton_kernels.py` on Hopper, where sums are of one term and results of 8 or 16
bits: in Gluon, the lower level of Triton, which says what each warp does.

Two groups of four warps take turns at the tensor cores: while one multiplies, the other scales,
rounds and stores what it has. Another warp loads tiles of codes and weight for both, into a ring of
slots in shared memory. A program stays on its multiprocessor, for tile after tile of out.
"""

import torch
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.triton_kernels import ends, vector

if hasattr(tma, "async_load"):  # from Triton 3.8 on
    async_load, async_store = tma.async_load, tma.async_store
else:
    async_load, async_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
TILE, SLOTS = (128, 128, 128), 4  # rows, outputs, inputs; of the ring: 32 KiB each
REGISTERS, OF_LOADING, MEAN = 240, 24, 168  # of a thread that multiplies, that loads; over all


@gluon.jit
def load(ring, codes, weight, num_rows, num_inputs, width):
    """Fills slots, as soon as they are empty, with codes (R, I) and weight (O, I)."""
    a_slots, v_slots, full, empty = ring
    R: gl.constexpr = codes.block_shape[0]
    O: gl.constexpr = weight.block_shape[0]  # noqa: E741
    I: gl.constexpr = weight.block_shape[1]  # noqa: E741
    SLOTS: gl.constexpr = a_slots.shape[0]
    across, step = gl.cdiv(width, O), 0
    for tile in range(gl.program_id(0), across * gl.cdiv(num_rows, R), gl.num_programs(0)):
        row, column = (tile // across) * R, (tile % across) * O
        for first in range(0, num_inputs, I):
            slot = step % SLOTS
            mbarrier.wait(empty.index(slot), ((step // SLOTS) & 1) ^ 1)
            mbarrier.expect(full.index(slot), (R + O) * I)
            async_load(codes, [row, first], full.index(slot), a_slots.index(slot))
            async_load(weight, [column, first], full.index(slot), v_slots.index(slot))
            step += 1


@gluon.jit
def corrections(zero_point, at, row_sum, rows, num_rows, w_sum, correction, columns, width):
    """What the exact sums over (q_x - z_x) (q_w - z_w) have beside those over a v, (R, O)."""
    n = (0 * rows)[:, None] - (0 * columns)[None, :]
    if correction is not None:
        sums = vector(row_sum, rows, num_rows)
        n -= sums[:, None] * vector(correction, columns, width)[None, :]
    if zero_point is not None:
        n -= gl.load(zero_point + at)[:, None] * vector(w_sum, columns, width)[None, :]
    return n


@gluon.jit
def products(n, ring, step, steps):
    """n plus the sums over a tile's `steps` slots, of which the first is number `step`; the number
    of the slot after them. The last product may still run."""
    a_slots, v_slots, full, empty = ring
    SLOTS: gl.constexpr = a_slots.shape[0]
    for i in range(steps):
        slot = step % SLOTS
        mbarrier.wait(full.index(slot), (step // SLOTS) & 1)
        v = v_slots.index(slot).permute((1, 0))
        n = hopper.warpgroup_mma(a_slots.index(slot), v, n, is_async=True)
        n = hopper.warpgroup_mma_wait(1, (n,))  # the one before is done with its slot
        mbarrier.arrive(empty.index((step + SLOTS - 1) % SLOTS), pred=i > 0)
        step += 1
    return n, step


@gluon.jit
def add_sums(to, codes, rows, num_rows, columns, width, is_last):
    """Adds the sums of a tile's rows to those of other tiles. The last one may not be full."""
    codes = codes.to(gl.int32)
    if is_last:
        codes = gl.where((columns < width)[None, :], codes, 0)
    gl.atomic_add(to + rows, gl.sum(codes, axis=1), rows < num_rows, sem="relaxed")


@gluon.jit
def multiply(which: gl.constexpr, ring, turn, staged, out, sizes, of_inputs, of_columns, then):
    """Every second tile of this program's, from tile `which` on."""
    R: gl.constexpr = staged.shape[0]
    O: gl.constexpr = staged.shape[1]  # noqa: E741
    SLOTS: gl.constexpr = ring[0].shape[0]
    I: gl.constexpr = ring[0].shape[2]  # noqa: E741
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, O, 32])
    tokens, num_rows, num_inputs, width = sizes
    group, scale, zero_point, by_group, row_sum = of_inputs
    w_scale, bias, w_sum, correction, inverse, lowest, highest = of_columns
    then_scale, then_scale2, then_zero_point, then_by_group, smooth, half, then_sum = then
    across, steps, programs = gl.cdiv(width, O), gl.cdiv(num_inputs, I), gl.num_programs(0)
    step, phase = which * steps, 1 - which
    first = gl.program_id(0) + which * programs
    for tile in range(first, across * gl.cdiv(num_rows, R), 2 * programs):
        row, column = (tile // across) * R, (tile % across) * O
        rows = row + gl.arange(0, R, gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, O, gl.SliceLayout(0, layout))
        at = 0 * rows
        if group is not None:
            at = gl.load(group + rows // tokens, mask=rows < num_rows, other=0).to(gl.int32)
        here, there = at * by_group, at * then_by_group
        n = corrections(
            zero_point, here, row_sum, rows, num_rows, w_sum, correction, columns, width
        )
        # A slot's barrier tells one filling from the next, not from the one after that: whose turn
        # it is must be known.
        mbarrier.wait(turn.index(which), phase)
        n, step = products(n, ring, step, steps)
        mbarrier.arrive(turn.index(1 - which))
        n = hopper.warpgroup_mma_wait(0, (n,))
        mbarrier.arrive(ring[3].index((step - 1) % SLOTS))
        step, phase = step + steps, phase ^ 1  # the other's tile lies between
        x = ends(
            n.to(gl.float32) * gl.load(scale + here)[:, None], w_scale, bias, columns, width,
            inverse, lowest, highest, then_scale, then_scale2, then_zero_point, there, smooth, half,
            out.dtype,
        )  # fmt: skip
        if then_sum is not None:
            add_sums(then_sum, x, rows, num_rows, columns, width, column + O >= width)
        tma.store_wait(0)  # the tile before has left shared memory
        staged.store(x)
        hopper.fence_async_shared()
        async_store(out, [row, column], staged)
    tma.store_wait(0)


@gluon.jit
def linear_kernel(
    out, codes, weight, group, tokens, num_rows, num_inputs, width,
    scale, zero_point, by_group, row_sum, w_scale, bias, w_sum, correction,
    inverse, lowest, highest, then_scale, then_scale2, then_zero_point, then_by_group, smooth, half,
    then_sum, SLOTS: gl.constexpr, REGISTERS: gl.constexpr, OF_LOADING: gl.constexpr,
):  # fmt: skip
    """Tiles of out (R, O), of codes (R, I) and weight (O, I), as `triton_kernels.linear_kernel`."""
    a_slots = gl.allocate_shared_memory(gl.int8, [SLOTS] + codes.block_shape, codes.layout)
    v_slots = gl.allocate_shared_memory(gl.int8, [SLOTS] + weight.block_shape, weight.layout)
    staged = gl.allocate_shared_memory(out.dtype, [2] + out.block_shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    hopper.fence_async_shared()  # the copy engine sees them
    ring = a_slots, v_slots, full, empty
    sizes = tokens, num_rows, num_inputs, width
    of_inputs = group, scale, zero_point, by_group, row_sum
    of_columns = w_scale, bias, w_sum, correction, inverse, lowest, highest
    then = then_scale, then_scale2, then_zero_point, then_by_group, smooth, half, then_sum
    gl.warp_specialize(
        [
            (multiply, (0, ring, turn, staged.index(0), out, sizes, of_inputs, of_columns, then)),
            (multiply, (1, ring, turn, staged.index(1), out, sizes, of_inputs, of_columns, then)),
            (load, (ring, codes, weight, num_rows, num_inputs, width)),
        ],
        [4, 1],  # warps of the second and third; the first has those of the kernel
        [REGISTERS, OF_LOADING],
    )


def layout_of(columns, bits):
    """In shared memory, of a tile of so many columns."""
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 2)


def tiles_of(matrix, rows, columns):
    """A matrix as its tiles of so many rows and columns."""
    layout, flat = layout_of(columns, 8 * matrix.itemsize), matrix.reshape(-1, matrix.shape[-1])
    return TensorDescriptor.from_tensor(flat, [rows, columns], layout)


def linear(codes, group, grid, row_sums, weight, onto, then, half, dtype, then_sum=None):
    """`triton_kernels.linear`, for one term and a dtype of 8 or 16 bits. To `then_sum` are added
    the sums of the next layer's codes, in each row."""
    (scale, _, zero_point), (v, *of_columns) = grid, weight
    then_scale, then_scale2, then_zero_point, smooth = then or [None] * 4
    out = codes.new_empty(*codes.shape[:-1], len(v), dtype=dtype)
    num_rows, (width, num_inputs) = codes[..., 0].numel(), v.shape
    tokens = 1 if group is None else num_rows // len(group)
    R, O, I = TILE  # noqa: E741
    units = torch.cuda.get_device_properties(codes.device).multi_processor_count
    linear_kernel[min(units, cdiv(num_rows, R) * cdiv(width, O)),](
        tiles_of(out, R, O), tiles_of(codes.contiguous(), R, I), tiles_of(v, O, I),
        group, tokens, num_rows, num_inputs, width,
        scale, zero_point, int(scale.ndim > 0), row_sums[0].contiguous() if row_sums else None,
        *of_columns, *(onto or [None] * 3),
        then_scale, then_scale2, then_zero_point, int(bool(then) and then_scale.ndim > 0),
        smooth, half, then_sum, SLOTS, REGISTERS, OF_LOADING,
        num_warps=4, maxnreg=MEAN, enable_fp_fusion=False,
    )  # fmt: skip
    return out
