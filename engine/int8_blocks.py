"""Blocks of a quant file on CUDA whose parts do several things in one Triton kernel: an MLP, an
attention, and all blocks one after the other.
"""

import torch
import torch.nn as nn

from engine.cuda_products import attention
from engine.int8_cuda import Int8LinearCUDA
from engine.token_quantizer import TokenQuantizer
from quant_ops import QuantMatMul, SoftmaxQuantizer, UniformQuantizer


def fuses(layer: nn.Module) -> bool:
    """Whether Triton's kernel multiplies this layer's codes, of scales that are known beforehand: a
    token's needs all of GELU's outputs."""
    on_codes = isinstance(layer, Int8LinearCUDA) and layer.triton
    return on_codes and not isinstance(layer.act, TokenQuantizer)


def fuses_uniform(layer):
    return fuses(layer) and isinstance(layer.act, UniformQuantizer)


class Int8Mlp(nn.Module):
    """`models_dit.Mlp` with GELU, and the quantization of fc2's inputs, at the end of fc1."""

    def __init__(self, fc1, fc2):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x, group=None):
        return self.of_codes(self.fc1.inputs(x, group), None, group)

    def of_codes(self, codes, sums, group):
        """Of fc1's codes, and their sums if known."""
        inputs, sums = self.fc1.before_gelu(codes, group, self.fc2, sums)
        return self.fc2.product(inputs, self.fc2.grid(), group, sums)


MAX_WIDTH = 96  # of a head: more does not fit every GPU's shared memory


class Int8Attention(nn.Module):
    """`models_dit.Attention` with all between the products of qkv and proj in one kernel."""

    def __init__(self, attn, hopper=False):
        """`hopper`: whether with the kernel for such GPUs, where it takes these heads."""
        super().__init__()
        self.hopper = hopper
        self.qkv, self.qk, self.av, self.proj = attn.qkv, attn.qk, attn.av, attn.proj
        self.num_heads, D = attn.num_heads, attn.proj.weight.shape[1]
        factor = (D // attn.num_heads) ** -0.5  # of q
        acts = attn.qk.a, attn.qk.b, attn.av.b
        tables = dict(
            inverse=[by / act.scale for act, by in zip(acts, (factor, 1, 1), strict=True)],
            lowest=[-act.zero_point.float() for act in acts],
            highest=[2**act.bits - 1 - act.zero_point.float() for act in acts],
        )
        for name, values in tables.items():  # of qkv's columns
            self.register_buffer(name, torch.stack(values).repeat_interleave(D))

    @staticmethod
    def takes(attn):
        """Whether an attention's layers and their inputs are of the kinds that the kernel knows."""
        qk, av, layers = attn.qk, attn.av, (attn.qkv, attn.proj)
        if not all(map(fuses_uniform, layers)):
            return False
        if not all(isinstance(x, QuantMatMul) for x in (qk, av)):
            return False
        width = len(attn.proj.bias) / attn.num_heads
        if not isinstance(av.a, SoftmaxQuantizer) or width > MAX_WIDTH:
            return False
        s_1, acts = av.a.scale1, (qk.a, qk.b, av.b)
        of_powers = bool(((s_1.frexp().mantissa == 0.5) & (s_1 <= 1)).all())
        return of_powers and all(isinstance(x, UniformQuantizer) and not x.scale.ndim for x in acts)

    def forward(self, x, group=None):
        return self.of_codes(self.qkv.inputs(x, group), None, group)

    def of_codes(self, codes, sums, group):
        """Of qkv's codes, and their sums if known."""
        codes, sums = self.proj_codes(codes, sums, group)
        return self.proj.product(codes, self.proj.grid(), group, [sums])

    def proj_codes(self, codes, sums, group):
        """Of qkv's codes those of proj's inputs, and their sums."""
        proj, qk, av = self.proj, self.qk, self.av
        steps = self.qkv.in_steps(codes, group, [self.inverse, self.lowest, self.highest], sums)
        scales = [qk.a.scale, qk.b.scale, av.b.scale]
        softmax = av.a.scale1, 2.0 ** (av.a.bits - 1)
        then = [proj.act.scale, proj.zero_point, proj.smooth], proj.half
        with_sums = proj.correction is not None
        how = *softmax, *then, with_sums, self.hopper
        return attention(steps, group, self.num_heads, scales, *how)


class Int8Blocks(nn.Module):
    """The blocks of a model, as `models_dit.DiTBlock`, with all that stands before qkv and fc1 in
    one kernel each: the residual of the block before too."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, c, group=None):
        x, h, gate = x.contiguous(), None, None  # of the embedder it is not
        for block in self.blocks:
            x, h, gate = self.through(block, x, h, gate, c, group)
        return x + gate[:, None] * h

    def through(self, block, x, h, gate, c, group):
        """A block's residuals: what is to be added is kept for the next kernel."""
        modulation = block.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # each (N, D)
        summed, codes, sums = block.attn.qkv.of_norm(x, h, gate, shift_msa, scale_msa, group)
        x = x if h is None else summed
        h = block.attn.of_codes(codes, [sums], group)
        x, codes, sums = block.mlp.fc1.of_norm(x, h, gate_msa, shift_mlp, scale_mlp, group)
        return x, block.mlp.of_codes(codes, [sums], group), gate_mlp


def fuse(model, hopper=False):
    """Replaces parts of the model by such as do several things in one kernel; how many attentions
    are among them, and whether all blocks are. `hopper` is that of `Int8Attention`."""
    for block in model.blocks:
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        if fuses_uniform(fc1) and fuses(fc2):
            block.mlp = Int8Mlp(fc1, fc2)
        if Int8Attention.takes(block.attn):
            block.attn = Int8Attention(block.attn, hopper)
    attentions = [block for block in model.blocks if isinstance(block.attn, Int8Attention)]
    mlps = [block for block in model.blocks if isinstance(block.mlp, Int8Mlp)]
    whole = len(attentions) == len(mlps) == len(model.blocks)
    if whole:
        model.blocks = nn.ModuleList([Int8Blocks(model.blocks)])
    return len(attentions), whole
