"""What runs on int8 codes on CUDA, as operators that `torch.compile` knows: products with scales
and bias (`int8_cuda.py` has the formula), attention, LayerNorm with codes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, library

FEWEST_ROWS = 17  # that `_int_mm` takes on CUDA


@library.custom_op("tqdit::triton_linear", mutates_args=())
def triton_linear(
    codes: Tensor,  # (..., I) int8
    group: Tensor | None,  # (N,), of the first axis
    grid: Sequence[Tensor | None],  # of the inputs: scale, scale2, zero_point, () or (G,)
    row_sums: Sequence[Tensor],  # of the codes, of each region its own; with a correction
    weight: Sequence[Tensor | None],  # v (O, I); w_scale, bias, w_sum, correction, (O,)
    onto: Sequence[Tensor],  # 1 / scale, lowest and highest of out in its steps, (O,), or nothing
    then: Sequence[Tensor | None],  # the next layer's grid and `smooth`, or nothing
    half: int,  # 2^(k-1) of the next layer's codes
    dtype: torch.dtype,
    hopper: bool,  # whether to take triton_hopper.py, where it can
) -> Tensor:
    """out (..., O); or what it is quantized to, in steps; or GELU of it as the next layer's inputs,
    in int8 their codes, else values."""
    if hopper and grid[1] is None and dtype.itemsize <= 2:
        from engine.triton_hopper import linear
    else:
        from engine.triton_kernels import linear

    with torch.cuda.device_of(codes):
        return linear(codes, group, grid, row_sums, weight, onto, then, half, dtype)


@triton_linear.register_fake
def _(codes, group, grid, row_sums, weight, onto, then, half, dtype, hopper):
    return codes.new_empty(*codes.shape[:-1], len(weight[0]), dtype=dtype)


@library.custom_op("tqdit::codes_and_sums", mutates_args=())
def codes_and_sums(
    codes: Tensor,  # as `triton_linear`'s, on a uniform grid
    group: Tensor | None,
    grid: Sequence[Tensor | None],
    row_sums: Sequence[Tensor],
    weight: Sequence[Tensor | None],
    then: Sequence[Tensor | None],  # the next layer's uniform grid and `smooth`
    half: int,
) -> tuple[Tensor, Tensor]:
    """`triton_linear` with `then`: the next layer's codes (..., O) in int8, and their sums (...) in
    int32. By triton_hopper.py, where the sums cost little."""
    from engine.triton_hopper import linear

    sums = codes.new_zeros(codes.shape[:-1], dtype=torch.int32)
    with torch.cuda.device_of(codes):
        out = linear(codes, group, grid, row_sums, weight, [], then, half, torch.int8, sums)
    return out, sums


@codes_and_sums.register_fake
def _(codes, group, grid, row_sums, weight, then, half):
    sums = codes.new_empty(codes.shape[:-1], dtype=torch.int32)
    return codes.new_empty(*codes.shape[:-1], len(weight[0])), sums


@library.custom_op("tqdit::norm_codes", mutates_args=())
def norm_codes(
    x: Tensor,  # (N, S, D)
    h: Tensor | None,  # (N, S, D), what is added to x,
    gate: Tensor | None,  # (N, D), times this
    shift: Tensor,  # (N, D), as scale: adaLN's
    scale: Tensor,
    group: Tensor | None,  # (N,)
    grid: Sequence[Tensor],  # of the next layer's inputs: scale, zero_point, () or (G,)
    smooth: Tensor | None,  # (D,), what they are divided by
    half: int,  # 2^(k-1) of their codes
) -> tuple[Tensor, Tensor, Tensor]:
    """x + gate h, if there is an h; of its LayerNorm, modulated, the codes (N, S, D) in int8; and
    their sums (N, S) in int32."""
    from engine.triton_norm import norm_codes as kernel

    with torch.cuda.device_of(x):
        return kernel(x, h, gate, shift, scale, group, grid, smooth, half)


@norm_codes.register_fake
def _(x, h, gate, shift, scale, group, grid, smooth, half):
    codes, sums = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1])
    summed = x.new_empty(0 if h is None else x.shape, dtype=torch.float32)
    return summed, codes, sums.to(torch.int32)


@library.custom_op("tqdit::attention", mutates_args=())
def attention(
    qkv: Tensor,  # (N, S, 3 D), whole numbers: steps of q, k and v
    group: Tensor | None,  # (N,)
    heads: int,
    scales: Sequence[Tensor],  # the steps of q, k and v, ()
    softmax: Tensor,  # s_1 of MRQ, () or (G,): powers of two
    levels: float,  # 2^(k-1) of softmax
    then: Sequence[Tensor | None],  # proj's grid, its scale and zero point, and `smooth`
    half: int,  # 2^(k-1) of proj's codes
    with_sums: bool,
    hopper: bool,  # whether to take triton_hopper_attention.py, where it can
) -> tuple[Tensor, Tensor]:
    """The codes (N, S, D) of proj's inputs in int8, and their sums (N, S) in int32, if wanted."""
    from engine.triton_attention import attention as kernel

    if hopper:
        from engine import triton_hopper_attention as on_hopper

        if on_hopper.takes(qkv, heads):
            kernel = on_hopper.attention
    with torch.cuda.device_of(qkv):
        return kernel(qkv, group, heads, scales, softmax, levels, then, half, with_sums)


@attention.register_fake
def _(qkv, group, heads, scales, softmax, levels, then, half, with_sums, hopper):
    N, S, D = qkv.shape
    sums = qkv.new_empty(N, S, dtype=torch.int32)
    return qkv.new_empty(N, S, D // 3, dtype=torch.int8), sums


def int_mm(codes: Tensor, v: Tensor) -> Tensor:
    """Sums (..., O) in int32, of codes (..., I) and v (O, I)."""
    rows = codes.flatten(0, -2)
    padded = F.pad(rows, (0, 0, 0, max(0, FEWEST_ROWS - len(rows))))
    return torch._int_mm(padded, v.T)[: len(rows)].view(*codes.shape[:-1], len(v))


def torch_linear(codes, grid, row_sums, weight, dtype):
    """`triton_linear` without `onto` and `then`, by torch; the grid is given as that of every row,
    shaped to go with the codes."""
    (*scales, zero_point), (v, w_scale, bias, w_sum, correction) = grid, weight
    out = 0
    for i, (term, scale) in enumerate(zip(regions(codes, grid), scales, strict=False)):
        n = int_mm(term, v)
        if correction is not None:
            n = n - row_sums[i][..., None] * correction
        if zero_point is not None:
            n = n - zero_point * w_sum
        out = out + n.float() * scale
    return (out * w_scale + bias).to(dtype)


def regions(codes, grid):
    """The codes as a sum: of R1's and R2's after GELU, else of one term."""
    return [codes] if grid[1] is None else [codes.clamp(max=0), codes.clamp(min=0)]
