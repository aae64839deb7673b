"""Blocks of a quant file on CUDA whose parts do several things in one Triton kernel: an MLP, an
attention, and all blocks one after the other.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn

from engine.cuda_products import attention, norm_codes
from engine.int8_cuda import Int8LinearCUDA
from engine.token_quantizer import TokenQuantizer
from quant_ops import GeluQuantizer, QuantMatMul, SoftmaxQuantizer, UniformQuantizer

ROOT = Path(__file__).resolve().parent.parent


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
        inputs = self.fc1.before_gelu(codes, group, self.fc2, sums)
        return self.fc2.product(inputs, self.fc2.grid(), group)


MAX_WIDTH = 96  # of a head: more does not fit every GPU's shared memory


class Int8Attention(nn.Module):
    """`models_dit.Attention` with all between the products of qkv and proj in one kernel."""

    def __init__(self, attn):
        super().__init__()
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
        return attention(steps, group, self.num_heads, scales, *softmax, *then, with_sums)


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


def fuse(model):
    """Replaces parts of the model by such as do several things in one kernel; how many attentions
    are among them, and whether all blocks are."""
    for block in model.blocks:
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        if fuses_uniform(fc1) and fuses(fc2):
            block.mlp = Int8Mlp(fc1, fc2)
        if Int8Attention.takes(block.attn):
            block.attn = Int8Attention(block.attn)
    attentions = [block for block in model.blocks if isinstance(block.attn, Int8Attention)]
    mlps = [block for block in model.blocks if isinstance(block.mlp, Int8Mlp)]
    whole = len(attentions) == len(mlps) == len(model.blocks)
    if whole:
        model.blocks = nn.ModuleList([Int8Blocks(model.blocks)])
    return len(attentions), whole


# ------------------------------------------------------------------------------------------------
# The trial


@cache
def why_no_triton(device: torch.device) -> str:
    """Why Triton's kernels are not taken there; "" if they are. The trial is a process of its own:
    after a fault in a kernel nothing runs on CUDA any more."""
    command = [sys.executable, "-m", "engine.int8_blocks", str(device)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    return lines[-1] if found.returncode == 0 and lines else "Triton failed"


def trial(device):
    """Why Triton's kernels should not be taken: they are tried where the result is known."""
    try:
        import engine.triton_kernels  # noqa: F401
    except ImportError:
        return "Triton is missing, or too old"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (8, 9):
        return "Triton's product of codes is for GPUs of compute capability 8 and 9"
    try:
        return "" if _exact(device) else "Triton's product is wrong here"
    except Exception as error:  # whatever a compiler may raise: there is another way
        return f"Triton failed, {type(error).__name__}"


def _exact(device):
    """Whether Triton's kernels give what is known beforehand."""
    one, x = torch.ones(()), torch.full((40, 64), 127.0, device=device)
    uniform, gelu = UniformQuantizer(8, one, 0 * one), GeluQuantizer(8, one, one)

    def layer(inputs, act):
        v = torch.full((32, inputs), 127, dtype=torch.int8)
        return Int8LinearCUDA(v, None, one, torch.zeros(32), act, triton=True).to(device)

    for act, highest in (uniform, 255), (gelu, 127):
        if bool((layer(64, act)(x) != 64 * 127 * 127).any()):  # the largest codes
            return False
        mlp = Int8Mlp(layer(64, uniform), layer(32, act))  # GELU's outputs are clipped
        for half in False, True:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                found = mlp(x).float() / (32 * 127 * highest)
            if bool(((found - 1).abs() > 2**-7).any()):
                return False
    codes, ends = layer(64, uniform).inputs(x, None), (2.0**-16, -9.0, 9.0)  # 15.75 steps, clipped
    onto = [torch.full((32,), end, device=device) for end in ends]
    in_steps = layer(64, uniform).in_steps(codes, None, onto)
    return bool((in_steps == 9).all()) and _exact_norm(device) and _exact_attention(device)


def _exact_norm(device):
    """-1 and 1 are their own LayerNorm; times 127 they are codes."""
    x = torch.tensor([-1.0, 1.0], device=device).repeat(2, 3, 40)
    shift, scale = torch.zeros(2, 80, device=device), torch.full((2, 80), 126.0, device=device)
    grid = [torch.ones((), device=device), torch.zeros((), dtype=torch.int32, device=device)]
    then = shift, scale, None, grid, torch.ones(80, device=device), 128
    summed, codes, sums = norm_codes(x - 1, torch.ones_like(x), scale / 126, *then)
    alone = norm_codes(x, None, None, *then)[1]
    right = torch.equal(summed, x), torch.equal(codes.float(), 127 * x), torch.equal(alone, codes)
    return all(right) and not sums.any()


def _exact_attention(device):
    """Where all keys are the same, the result is the mean of v: 31 steps of 8, in all 24 columns of
    each of two heads."""
    qkv = torch.full((2, 64, 3 * 48), 248.0, device=device)
    one, zero = (torch.full((), n, device=device) for n in (1.0, 0.0))
    eighth, scale1 = (torch.full((), 2.0**-n, device=device) for n in (3, 12))
    qkv = qkv.bfloat16() if device.type == "cuda" else qkv
    scales, then = [0.001 * one, 0.001 * one, eighth], [one, zero.int(), one.expand(48).clone()]
    codes, sums = attention(qkv, None, 2, scales, scale1, 128.0, then, 128, True)
    return bool((codes == 31).all() and (sums == 31 * 48).all())


if __name__ == "__main__":
    print(trial(torch.device(sys.argv[1])))
