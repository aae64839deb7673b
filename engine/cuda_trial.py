"""Whether Triton's kernels are right on a device: they are tried where the result is known, in a
process of its own, before `--engine int8` takes them.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from engine.cuda_products import attention, norm_codes
from engine.int8_blocks import Int8Mlp
from engine.int8_cuda import Int8LinearCUDA
from quant_ops import GeluQuantizer, UniformQuantizer

ROOT = Path(__file__).resolve().parent.parent


@cache
def why_no_triton(device: torch.device) -> str:
    """Why Triton's kernels are not taken there; "" if they are. The trial is a process of its own:
    after a fault in a kernel nothing runs on CUDA any more."""
    command = [sys.executable, "-m", "engine.cuda_trial", str(device)]
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
    """Where all keys are the same, the result is the mean of v: 31 steps of 8, in all 72 columns of
    each of two heads. Of one tile of keys, and of two."""
    one, zero = (torch.full((), n, device=device) for n in (1.0, 0.0))
    eighth, scale1 = (torch.full((), 2.0**-n, device=device) for n in (3, 12))
    scales, then = [0.001 * one, 0.001 * one, eighth], [one, zero.int(), one.expand(144).clone()]
    for tokens in 64, 128:
        qkv = torch.full((2, tokens, 3 * 144), 248.0, device=device)
        qkv = qkv.bfloat16() if device.type == "cuda" else qkv
        codes, sums = attention(qkv, None, 2, scales, scale1, 128.0, then, 128, True)
        if bool((codes != 31).any() or (sums != 31 * 144).any()):
            return False
    return True


if __name__ == "__main__":
    print(trial(torch.device(sys.argv[1])))
