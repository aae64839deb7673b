"""Whether Triton's kernels are right on a device: they are tried where the result is known, in a
process of its own, before `--engine int8` takes them.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from engine.cuda_products import attention, norm_codes
from engine.int8_blocks import Int8Mlp
from engine.int8_cuda import Int8LinearCUDA
from quant_ops import GeluQuantizer, UniformQuantizer

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds, compiling counted: a kernel may never end


class Kernels(NamedTuple):
    """What the trial found: why Triton's kernels are not taken, "" if they are; and why the product
    and the attention for Hopper are not, None where they were not tried."""

    no_triton: str
    no_hopper: str | None
    no_attention: str | None


@cache
def kernels_of(device: torch.device) -> Kernels:
    """The kernels to take there. The trial is a process of its own: after a fault in a kernel
    nothing runs on CUDA any more."""
    command = [sys.executable, "-m", "engine.cuda_trial", str(device)]
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT).stdout
    except subprocess.TimeoutExpired as late:
        text = late.stdout or b""
    return read(text.decode(errors="replace"))


def read(text):
    """What `main` said, as Kernels."""
    said = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return Kernels(said.get("triton", "Triton failed"), said.get("hopper"), said.get("attention"))


def main(device):
    """Says what `kernels_of` reads, each line as soon as it is known."""
    why_not = trial(device)
    print("triton:", why_not, flush=True)
    if not why_not and on_hopper(device):
        for name, ask in ("hopper", product_trial), ("attention", attention_trial):
            print(f"{name}: a kernel for Hopper failed", flush=True)  # it may not come further
            print(f"{name}:", ask(device), flush=True)


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


def on_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def product_trial(device):
    """Why the product for Hopper should not be taken: what it gives is known, or is Triton's."""
    return _of_hopper("product", device, _exact_product, _same_product)


def attention_trial(device):
    """The same of the attention for Hopper."""
    return _of_hopper("attention", device, _exact_attention, _same_attention)


def _of_hopper(kernel, device, is_exact, is_same):
    try:
        right = is_exact(device, hopper=True) and is_same(device)
        return "" if right else f"the {kernel} for Hopper is wrong here"
    except Exception as error:  # as above
        return f"the {kernel} for Hopper failed, {type(error).__name__}"


def _exact(device):
    """Whether Triton's kernels give what is known beforehand."""
    return _exact_product(device) and _exact_norm(device) and _exact_attention(device)


def _exact_product(device, hopper=False):
    one, x = torch.ones(()), torch.full((40, 64), 127.0, device=device)
    uniform, gelu = UniformQuantizer(8, one, 0 * one), GeluQuantizer(8, one, one)

    def layer(inputs, act):
        v = torch.full((32, inputs), 127, dtype=torch.int8)
        args = v, None, one, torch.zeros(32), act
        return Int8LinearCUDA(*args, triton=True, hopper=hopper).to(device)

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
    return bool((in_steps == 9).all())


def _same_product(device):
    """What Triton's product gives, of more tiles than there are multiprocessors, the last ones not
    full, in groups: fc1's result in bf16, and fc2's codes."""
    draw = torch.Generator().manual_seed(0)
    x, group = torch.randn(9, 1000, 1040, generator=draw).to(device), torch.arange(9) % 3
    v, w = (torch.randint(-128, 128, size, generator=draw) for size in ((1168, 1040), (64, 1168)))
    act = UniformQuantizer(8, 0.01 * torch.arange(1.0, 4), torch.tensor([128.0, 120, 131]))
    group, found = group.to(device), []
    for hopper in False, True:
        fc1, fc2 = (
            Int8LinearCUDA(
                codes.to(torch.int8), torch.arange(len(codes)) % 21 - 10, torch.tensor(1e-3),
                torch.zeros(len(codes)), act, triton=True, hopper=hopper,
            ).to(device)
            for codes in (v, w)
        )  # fmt: skip
        codes = fc1.inputs(x, group)
        with torch.autocast(device.type, torch.bfloat16):
            out, inputs = fc1.product(codes, fc1.grid(), group), fc1.before_gelu(codes, group, fc2)
        sums = fc2.row_sums(inputs[0], fc2.grid(), inputs[1])
        found.append([out, inputs[0], *sums])
    return all(map(torch.equal, *found))


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


def _exact_attention(device, hopper=False):
    """Where all keys are the same, the result is the mean of v: 31 steps of 8, in all 72 columns of
    each of two heads. Of one tile of keys, and of two; by Hopper's kernel of both sizes it takes.
    """
    one, zero = (torch.full((), n, device=device) for n in (1.0, 0.0))
    eighth, scale1 = (torch.full((), 2.0**-n, device=device) for n in (3, 12))
    scales, then = [0.001 * one, 0.001 * one, eighth], [one, zero.int(), one.expand(144).clone()]
    for tokens in (128, 256) if hopper else (64, 128):
        qkv = torch.full((2, tokens, 3 * 144), 248.0, device=device)
        qkv = qkv.bfloat16() if device.type == "cuda" else qkv
        codes, sums = attention(qkv, None, 2, scales, scale1, 128.0, then, 128, True, hopper)
        if bool((codes != 31).any() or (sums != 31 * 144).any()):
            return False
    return True


def _same_attention(device):
    """What Triton's attention gives but for ties, of more heads than run at a time, whose columns
    come in two parts and in one; in groups, where R1 reaches R2 and where not."""
    draw, group = torch.Generator().manual_seed(0), torch.arange(20, device=device) % 2
    one, scale1 = torch.ones((), device=device), torch.tensor([2.0**-10, 2.0**-17], device=device)
    for tokens, width in (256, 72), (128, 64):
        size = 20, tokens, 3 * 16 * width
        qkv = torch.randint(-128, 128, size, generator=draw).bfloat16().to(device)
        smooth = torch.rand(16 * width, generator=draw) + 0.5
        then = torch.tensor([0.2, 0.3]), torch.tensor([-3, 5]).int(), smooth
        how = scale1, 128.0, [x.to(device) for x in then], 128, True
        scales = [0.006 * one, 0.005 * one, one]
        triton, hopper = (attention(qkv, group, 16, scales, *how, by) for by in (False, True))
        if not torch.equal(hopper[1].long(), hopper[0].sum(dim=-1)):
            return False
        if bool((hopper[0] != triton[0]).float().mean() > 1e-3):
            return False
    return True


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
