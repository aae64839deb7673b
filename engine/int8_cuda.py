"""Linear layers that multiply the codes of a quant file themselves, on CUDA.

Weights stay int8 on the device, inputs become int8 codes, with the static scale of their time group
or with one that each token finds at run time, and sums are exact in int32: by a kernel in Triton
(triton_kernels.py, on Hopper triton_hopper.py), or without Triton by `torch._int_mm` and what
`torch.compile` makes of the rest. So is quantizing the inputs, but for what a block does in one
kernel (int8_blocks.py).

    a = q_x - 2^(k-1), z = z_x - 2^(k-1); v = q_w - u, c = z_w - u, V = sum (q_w - z_w)
    n = sum (q_x - z_x) (q_w - z_w) = sum a v  -  c sum a  -  z V            in int32
    out = s_x n s_w + bias                                                   in float32
After GELU (MRQ) an input's code is a = q_1 + q_2, of which one is 0: codes below zero are of R1,
those above of R2. With n_1 of min(a, 0), n_2 of max(a, 0): out = (s_1 n_1 + s_2 n_2) s_w + bias.
Two such products take longer than one of bf16: with `--dtype bf16` that layer multiplies values in
bf16, as fake quantization does there.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from engine.cuda_products import (
    codes_and_sums,
    norm_codes,
    regions,
    torch_linear,
    triton_linear,
)
from engine.int_products import MAX_INPUTS, has_int_unit
from engine.token_quantizer import TokenQuantizer
from quant_ops import GeluQuantizer, UniformQuantizer, gelu_region, quantize


def why_not(v: Tensor, act: nn.Module, device: torch.device) -> str:
    """Why this layer is not multiplied on the device's integers; "" if it is."""
    if not isinstance(act, UniformQuantizer | GeluQuantizer | TokenQuantizer):
        return "inputs in full precision"
    if not has_int_unit(device):
        return "this GPU has no product of codes"
    if v.shape[1] >= MAX_INPUTS:
        return "too many inputs"
    return "sizes that 8 does not divide" if any(n % 8 for n in v.shape) else ""


class Int8LinearCUDA(nn.Module):
    """`QuantLinear` on codes: the same codes, the same product but for rounding in float32."""

    def __init__(self, v, correction, w_scale, bias, act, smooth=None, triton=False, hopper=False):
        """As `int8_linear.Int8Linear`; `triton` says whose product, if it takes these sizes, and
        `hopper` whether with the kernel for such GPUs."""
        super().__init__()
        self.act, self.half, self.hopper = act, 2 ** (act.bits - 1), hopper
        self.triton = triton and not any(n % 16 for n in v.shape)
        w_sum = v.sum(dim=1, dtype=torch.int32)
        if correction is not None:
            correction = correction.int()
            w_sum = w_sum - v.shape[1] * correction
        zero_point = None
        if isinstance(act, UniformQuantizer):
            zero_point = (act.zero_point - self.half).int()
        buffers = dict(weight=v, w_scale=w_scale.flatten().expand(len(v)).contiguous(), bias=bias)
        buffers |= dict(w_sum=w_sum, correction=correction, zero_point=zero_point, smooth=smooth)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x, group=None):
        """x (N, ..., I) -> (N, ..., O)."""
        if isinstance(self.act, TokenQuantizer):
            return self.product(*self.of_tokens(x))
        return self.product(self.inputs(x, group), self.grid(), group)

    def product(self, inputs, grid, group, sums=None):
        """out of inputs on this grid. `sums` are those of the codes of each row, if known."""
        if inputs.dtype != torch.int8:
            return F.linear(inputs, self.floats(inputs.dtype), self.bias.to(inputs.dtype))
        sums, dtype = self.row_sums(inputs, grid, sums), out_dtype(inputs.device.type)
        if self.triton:
            return self.by_triton(inputs, group, grid, sums, [], [], 0, dtype)
        if group is not None and grid[0].ndim:
            of_tokens = len(group) == inputs[..., 0].numel()
            shape = (*inputs.shape[:-1], 1) if of_tokens else (-1, *[1] * (inputs.ndim - 1))
            grid = [None if table is None else table[group].view(shape) for table in grid]
        return torch_linear(inputs, grid, sums, self.of_weight(), dtype)

    def by_triton(self, codes, group, grid, sums, *how):
        return triton_linear(codes, group, grid, sums, self.of_weight(), *how, self.hopper)

    def of_weight(self):
        return [self.weight, self.w_scale, self.bias, self.w_sum, self.correction]

    def row_sums(self, codes, grid, known=None):
        """What the product needs: sums of the codes of each row, one for each region."""
        if self.correction is None:
            return []
        return known or [a.sum(dim=-1, dtype=torch.int32) for a in regions(codes, grid)]

    def before_gelu(self, codes, group, fc2, sums=None):
        """Of a uniform grid's codes what fc2 multiplies: GELU's output, quantized; and the sums of
        its codes, if they come at little cost."""
        sums, then = self.row_sums(codes, self.grid(), sums), [*fc2.grid(), fc2.smooth]
        dtype = fc2.input_dtype(codes.device.type)
        if self.hopper and isinstance(fc2.act, UniformQuantizer) and fc2.correction is not None:
            weight = self.of_weight()
            out, sums = codes_and_sums(codes, group, self.grid(), sums, weight, then, fc2.half)
            return out, [sums]
        out = self.by_triton(codes, group, self.grid(), sums, [], then, fc2.half, dtype)
        return out, None

    def in_steps(self, codes, group, onto, sums=None):
        """Of a uniform grid's codes what out is quantized to, in whole steps."""
        dtype = torch.bfloat16 if codes.is_cuda else torch.float32
        sums = self.row_sums(codes, self.grid(), sums)
        return self.by_triton(codes, group, self.grid(), sums, onto, [], 0, dtype)

    def input_dtype(self, device_type):
        """Of what is multiplied: int8 codes, or where that is faster bf16 values."""
        values = isinstance(self.act, GeluQuantizer) and out_dtype(device_type) == torch.bfloat16
        return torch.bfloat16 if values else torch.int8

    def floats(self, dtype):
        """The weight's values."""
        shift = 0 if self.correction is None else self.correction[:, None]
        return ((self.weight - shift) * self.w_scale[:, None]).to(dtype)

    def grid(self):
        """Scales of the inputs' codes, two after GELU, and their zero point."""
        if isinstance(self.act, UniformQuantizer):
            return [self.act.scale, None, self.zero_point]
        return [self.act.scale1, self.act.scale2, None]

    def of_norm(self, x, h, gate, shift, scale, group):
        """`norm_codes` for this layer, whose quantizer is uniform."""
        grid = [self.act.scale, self.zero_point]
        return norm_codes(x, h, gate, shift, scale, group, grid, self.smooth, self.half)

    def smoothed(self, x):
        return x.float() if self.smooth is None else x.float() / self.smooth

    def of_tokens(self, x):
        """Inputs as int8 codes, the grid of each token, and of each token which grid is its own."""
        x = self.smoothed(x)
        scale, zero_point = self.act.params_for(x)
        codes = quantize(x, scale, zero_point, self.act.bits).sub_(self.half).to(torch.int8)
        zero_point = (zero_point - self.half).int().flatten()
        grid = [scale.flatten(), None, zero_point]
        return codes, grid, torch.arange(len(zero_point), device=x.device)

    def inputs(self, x, group):
        """x as what is multiplied."""
        x, dtype = self.smoothed(x), self.input_dtype(x.device.type)
        if dtype != torch.int8:
            return self.act(x, group).to(dtype)
        params = self.act.params_for(x, group)
        if isinstance(self.act, UniformQuantizer):
            return quantize(x, *params, self.act.bits).sub_(self.half).to(torch.int8)
        low, high = (gelu_region(x, params[i], i + 1, self.act.bits) for i in (0, 1))
        return low.add_(high).to(torch.int8)


def out_dtype(device_type):
    """What a product yields: autocast's type, or float32."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32
