"""What a candidate of Phase 3 costs, as one Triton kernel: the product of its codes, the error, its
square weighted by the gradient, and the sum over rows. No result is written, only (O,) sums of
each tile of rows: passes over memory are what such a search is slow by.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.triton_kernels import values, vector

TILE, TWO_SUMS = (128, 128, 128, 8, 3), (64, 128, 128, 8, 3)  # without spilled registers


@triton.jit
def loss_kernel(
    out, codes, codes2, weight, z, grad, num_rows, num_inputs, width, by_row,
    scale, zero_point, row_sum, scale2, row_sum2, w_scale, w_zero, w_sum,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and outputs: out[tile of rows, outputs]. `codes2` are MRQ's of R2."""
    tiles = tl.cdiv(width, BLOCK_O)
    part = tl.program_id(0) // tiles
    row, column = part * BLOCK_R, (tl.program_id(0) % tiles) * BLOCK_O
    n = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    n2 = tl.zeros((BLOCK_R, BLOCK_O), tl.int32)
    for first in range(0, num_inputs, BLOCK_I):  # beyond their ends all codes are 0
        v = weight.load([column, first]).T
        n = tl.dot(codes.load([row, first]), v, n, out_dtype=tl.int32)
        if codes2 is not None:
            n2 = tl.dot(codes2.load([row, first]), v, n2, out_dtype=tl.int32)
    rows, columns = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_O)
    at = tl.minimum(rows, num_rows - 1).to(tl.int64) * by_row
    ends = rows, num_rows, w_sum, w_zero, columns, width
    x = values(n, scale, zero_point, at, row_sum, *ends)
    if codes2 is not None:
        x += values(n2, scale2, None, at, row_sum2, *ends)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    where = rows.to(tl.int64)[:, None] * width + columns[None, :]
    delta = tl.load(z + where, inside, other=0.0) - x * vector(w_scale, columns, width)[None, :]
    delta *= tl.load(grad + where, inside, other=0.0)
    tl.store(out + part * width + columns, tl.sum(delta * delta, axis=0), columns < width)


def column_loss(terms, weight, z, grad):
    """Eq. (16) by output channel, (O,): as `hessian_loss(int_error(terms, weight, z), grad, dim=0)`
    of int_products.py, whose `Codes` these are; 16 must divide I."""
    R, O, I, warps, stages = TILE if len(terms) == 1 else TWO_SUMS  # noqa: E741
    first, second = terms if len(terms) == 2 else (terms[0], None)
    (num_rows, num_inputs), width = first.codes.shape, len(weight.codes)
    w_sum = weight.row_sum - num_inputs * weight.zero_point
    of_columns = [x.flatten().expand(width) for x in (weight.scale, weight.zero_point, w_sum)]
    out = z.new_empty(triton.cdiv(num_rows, R), width)
    with torch.cuda.device_of(z):
        loss_kernel[len(out) * triton.cdiv(width, O),](
            out, TensorDescriptor.from_tensor(first.codes, [R, I]),
            second and TensorDescriptor.from_tensor(second.codes, [R, I]),
            TensorDescriptor.from_tensor(weight.codes, [O, I]), z, grad,
            num_rows, num_inputs, width, int(first.scale.ndim > 0),
            first.scale, first.zero_point, first.row_sum,
            second and second.scale, second and second.row_sum,
            *(x.contiguous() for x in of_columns), R, O, I, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(dim=0)
