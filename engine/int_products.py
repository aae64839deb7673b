"""Products of quantized matrices on their integer codes: inputs (R, I) by weights (O, I).

A uniform quantizer's values are s * (q - z), so a product of two such matrices is one product of
int8 codes, plus sums of rows and columns times the zero points, all exact in int32.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from quant_ops import GeluQuantizer, UniformQuantizer, gelu_region, hessian_loss, quantize

MAX_INPUTS = 2**15  # I: |every sum below| <= 2^16 I must stay below 2^31


class Codes(NamedTuple):
    """The values scale * (codes - zero_point), held as int8 codes (R, I). `scale` and `zero_point`
    are (), or a column for one of each row; zero_point is None where it is 0 in all of them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    row_sum: Tensor  # (R, 1) int32, of the codes


def in_int8(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Codes:
    """Codes -128..127, given as floats. Float sums of so few are exact: they stay below 2^24."""
    row_sum = codes.sum(dim=1, keepdim=True).int()
    return Codes(codes.to(torch.int8), scale, zero_point, row_sum)


def signed_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Codes:
    """Eq. (5) in int8: codes and zero point are both shifted by 2^(k-1)."""
    half = 2 ** (bits - 1)
    codes = quantize(x, scale, zero_point, bits).sub_(half)
    return in_int8(codes, scale, (zero_point - half).int())


def weight_codes(Q_W: UniformQuantizer, weight: Tensor) -> Codes:
    """A weight (O, I) as codes."""
    return signed_codes(weight, Q_W.scale, Q_W.zero_point, Q_W.bits)


def input_codes(Q_X: UniformQuantizer | GeluQuantizer, x: Tensor, group: Tensor) -> list[Codes]:
    """Inputs (R, I) of these time groups (R,) as a sum of codes: one term, or after GELU two (MRQ):
    below zero with s_1 and above it with s_2, each 0 in the other's region."""
    if isinstance(Q_X, UniformQuantizer):
        return [signed_codes(x, *Q_X.params_for(x, group), Q_X.bits)]
    return [term for region in (1, 2) for term in region_codes(Q_X, x, group, region)]


def region_codes(Q_X: GeluQuantizer, x: Tensor, group: Tensor, region: int) -> list[Codes]:
    """The one term of region 1 or 2 alone."""
    scale = Q_X.params_for(x, group)[region - 1]
    return [in_int8(gelu_region(x, scale, region, Q_X.bits), scale, None)]


def int_error(terms: list[Codes], weight: Codes, z: Tensor) -> Tensor:
    """z (R, O) less the product of the inputs, a sum of `terms`, and the weight's transpose.

    # sum (a - z_a) (b - z_b) = sum a b - z_b sum a - z_a (sum b - I z_b)
    On CUDA `_int_mm` needs R > 16 and I, O that 8 divides.
    """
    zero_b = weight.zero_point.view(1, -1)
    sum_b = weight.row_sum.view(1, -1) - weight.codes.shape[1] * zero_b  # (1, O)
    for a in terms:
        product = torch._int_mm(a.codes, weight.codes.T)
        product.addcmul_(a.row_sum, zero_b, value=-1)
        if a.zero_point is not None:
            product.addcmul_(a.zero_point, sum_b, value=-1)
        z = torch.addcmul(z, product, a.scale * weight.scale.view(1, -1), value=-1)
    return z


@cache
def column_loss(device: torch.device) -> Callable | None:
    """`engine.triton_loss.column_loss` where Triton is at hand and right; else None, and on a GPU
    one printed line says why."""
    if device.type != "cuda":
        return None
    try:
        from engine.triton_loss import column_loss

        if torch.cuda.get_device_capability(device) < (8, 0):
            reason = "a GPU older than Triton's product of codes"
        elif is_right(column_loss, device):
            return column_loss
        else:
            reason = "Triton's kernel is wrong here"
    except ImportError:
        reason = "Triton is missing, or too old"
    except Exception as error:  # whatever a compiler may raise: there is another way
        reason = f"Triton failed, {type(error).__name__}"
    tqdm.write(f"candidates are multiplied by torch._int_mm ({reason})")
    return None


def is_right(column_loss: Callable, device: torch.device) -> bool:
    """Whether it gives Eq. (16) of `int_error`, for inputs of one term and of two, large codes."""
    x, one = torch.linspace(-128, 127, 40 * 64, device=device).view(40, 64), torch.tensor(1.0)
    uniform, gelu = UniformQuantizer(8, one, 128 * one), GeluQuantizer(8, one, one)
    weight = weight_codes(uniform.to(device), x[:32])
    z, grad = 1e4 * x[:, :32].contiguous(), x[:, 32:].contiguous()
    for Q_X in uniform, gelu.to(device):
        terms = input_codes(Q_X, x, None)
        expected = hessian_loss(int_error(terms, weight, z), grad, dim=0)
        if not torch.allclose(column_loss(terms, weight, z, grad), expected, rtol=1e-4):
            return False
    return True


def has_int_unit(device: torch.device) -> bool:
    """Whether int8 products run on a unit of their own: on GPUs since Turing, and on a CPU with
    AVX-512 VNNI. Other CPUs take plain loops (github.com/pytorch/pytorch/pull/136942); an older
    torch cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    vnni = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni", False)
    return vnni and int_mm_is_exact()


@cache
def int_mm_is_exact() -> bool:
    """Whether a CPU's `_int_mm` holds the largest sums: told to do without VNNI (by
    ONEDNN_MAX_CPU_ISA), oneDNN's saturates."""
    codes, found = torch.full((32, 64), 127, dtype=torch.int8), []
    for value in (127, -128):
        weight = torch.full((16, 64), value, dtype=torch.int8)
        found.append(bool((torch._int_mm(codes, weight.T) == 64 * 127 * value).all()))
    return all(found)


def takes_shapes(rows: int, weight: Tensor, device: torch.device) -> bool:
    """Whether `int_error` can take inputs of so many rows and this weight (O, I), and is exact."""
    if weight.shape[1] >= MAX_INPUTS:
        return False
    return device.type != "cuda" or rows > 16 and not any(n % 8 for n in weight.shape)
