"""The product of uint8 by int8 codes of avx2.c, on CPUs with AVX2.

The machine's C compiler makes it when it is first asked for, in a second, for this process alone.
Where there is no compiler, no AVX2, or the result is wrong, `why_not` says so, and oneDNN's product
is taken.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SOURCE = Path(__file__).with_name("avx2.c")
FLAGS = "-O3", "-mavx2", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"
LARGEST = 2**15 - 1  # of a sum in 16 bits
CHANNELS, STEP = 16, 4  # of a panel, as in avx2.c


def takes(weight: Tensor) -> bool:
    """Whether a weight (O, I) can be in panels."""
    return len(weight) % CHANNELS == 0 and weight.shape[1] % STEP == 0


def pack(weight: Tensor) -> Tensor:
    """int8 codes (O, I) in panels (O / 16, I / 4, 16, 4)."""
    panels = weight.unflatten(0, (-1, CHANNELS)).unflatten(2, (-1, STEP))
    return panels.transpose(1, 2).contiguous()


def quick_run(weight: Tensor, highest: int) -> int:
    """How many sums of two products fit in 16 bits, whatever the order of these int8 codes (O, I),
    if no input's code is above `highest`; 0 if not even one does."""
    largest = int(weight.short().abs().max())
    return LARGEST // max(2 * largest * highest, 1)


def longest_run(weight: Tensor, highest: int) -> int:
    """The same in their order, in which they are seldom large next to each other: a power of 2.

    A sum is never above that of its weights above zero times `highest`, nor below that of the
    others. Those of a run are added up, then those of two runs, as long as the largest fits.
    """
    signs = weight.clamp(min=0).short(), weight.clamp(max=0).short().neg()
    runs = []
    for one_sign in signs:
        sums, run = one_sign[:, ::2] + one_sign[:, 1::2], 0
        sums = sums.unflatten(1, (-1, STEP // 2))
        while int(sums.max()) * max(highest, 2) <= LARGEST:  # so twice as much is an int16
            run = max(1, 2 * run)
            if sums.shape[1] == 1:
                break
            sums = F.pad(sums, (0, 0, 0, sums.shape[1] % 2))
            sums = sums[:, ::2] + sums[:, 1::2]
        runs.append(run)
    return min(runs)


def u8s8(codes, scale, zero_point, weight, run, w_scale, bias):
    """scale (codes - zero_point) V^T w_scale + bias, float32 (..., O), of uint8 codes (..., I) and
    int8 V, packed; scale () and zero_point () int32, w_scale (O,), bias (O,) or None. `run` is that
    of the codes. ValueError if it is 0, for products would saturate, or if sizes do not fit."""
    channels, inputs = CHANNELS * len(weight), STEP * weight.shape[1]
    if run < 1:
        raise ValueError("codes too large for sums in 16 bits")
    if codes.dtype != torch.uint8 or codes.shape[-1] != inputs or len(w_scale) != channels:
        raise ValueError(f"codes {codes.dtype} {(*codes.shape,)} and a weight {channels, inputs}")
    codes, scale = codes.contiguous(), (scale * w_scale).float()
    bias = torch.zeros_like(scale) if bias is None else bias.float().contiguous()
    out = codes.new_empty(*codes.shape[:-1], channels, dtype=torch.float32)
    at = [tensor.data_ptr() for tensor in (codes, weight, scale, bias, out)]
    sizes = codes.numel() // inputs, channels, inputs
    compiled().product(*at, *sizes, int(zero_point), run, torch.get_num_threads())
    return out


def compiler() -> str | None:
    """The C compiler: $CC, if that is the name of one, or the machine's."""
    names = os.environ.get("CC"), "cc", "gcc", "clang"
    return next((name for name in names if name and shutil.which(name)), None)


@cache
def compiled() -> ctypes.CDLL:
    """avx2.c, compiled. Raises OSError or subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "avx2.so")
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(made))  # stays when its file is gone
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.product.argtypes = [*[pointer] * 5, *[number] * 3, ctypes.c_int32, number, ctypes.c_int]
    loaded.product.restype = None
    return loaded


@cache
def why_not() -> str:
    """Why this product is not to be taken here; "" if it is."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "this CPU has no AVX2"
    if compiler() is None:
        return "no C compiler"
    try:
        return "" if _is_exact() else f"{SOURCE.name} is wrong here"
    except (OSError, subprocess.CalledProcessError):
        return f"{SOURCE.name} does not compile by {compiler()}, or load"


def _is_exact() -> bool:
    """Whether sums are right: of random codes, and the largest, of many bits and of few."""
    one, generator = torch.ones(16), torch.Generator().manual_seed(0)
    codes = torch.randint(16, (5, 600), generator=generator).to(torch.uint8)
    weight = torch.randint(-8, 9, (16, 600), generator=generator).to(torch.int8)
    cases = [(codes, weight)]
    for highest, weight_code in (255, 64), (255, -64), (15, 8), (15, -8):
        cases.append((torch.full_like(codes, highest), torch.full_like(weight, weight_code)))
    for codes, weight in cases:
        run = quick_run(weight, int(codes.max()))
        out = u8s8(codes, one[0], torch.tensor(1), pack(weight), run, one, None)
        if not torch.equal(out, (codes.float() - 1) @ weight.float().T):  # all below 2^24
            return False
    return True
