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


def run_of(largest: int, highest: int) -> int:
    """How many sums of two products fit in 16 bits, if no weight's |code| is above `largest` and no
    input's above `highest`; 0 if not even one does."""
    return LARGEST // max(2 * largest * highest, 1)


def longest_run(weight: Tensor, highest: int) -> int:
    """The same of these int8 codes (O, I), which are seldom large next to each other: a power of 2.
    `highest` is 2 or more.

    A sum is never above that of its weights above zero times `highest`, nor below that of the
    others. Those of a run are added up, then those of two runs, as long as the largest fits.
    """
    signs = weight.clamp(min=0).short(), weight.clamp(max=0).short().neg()
    runs = []
    for one_sign in signs:
        sums, run = one_sign[:, ::2] + one_sign[:, 1::2], 0
        sums = sums.unflatten(1, (-1, STEP // 2))  # in 16 bits: twice LARGEST / 2 fits
        while int(sums.max()) * highest <= LARGEST:
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
    of the codes; ValueError if it is 0: their products would saturate."""
    if run < 1:
        raise ValueError("codes too large for sums in 16 bits")
    *rows, inputs = codes.shape
    codes, out = codes.contiguous(), torch.empty(*rows, len(w_scale))
    scale = scale * w_scale
    bias = torch.zeros_like(scale) if bias is None else bias.contiguous()
    at = [tensor.data_ptr() for tensor in (codes, weight, scale, bias, out)]
    sizes = out.numel() // len(w_scale), len(w_scale), inputs
    library().product(*at, *sizes, int(zero_point), run, torch.get_num_threads())
    return out


@cache
def library() -> ctypes.CDLL:
    """avx2.c, compiled. Raises OSError or subprocess.CalledProcessError."""
    names = os.environ.get("CC"), "cc", "gcc", "clang"
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "avx2.so")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(made))  # stays when its file is gone
    pointer, number = ctypes.c_void_p, ctypes.c_long
    loaded.product.argtypes = [*[pointer] * 5, *[number] * 3, ctypes.c_int32, number, ctypes.c_int]
    loaded.product.restype = None
    return loaded


@cache
def why_not() -> str:
    """Why this product is not to be taken here; "" if it is."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "this CPU has no AVX2"
    try:
        library()
    except FileNotFoundError:
        return "no C compiler"
    except (OSError, subprocess.CalledProcessError):
        return f"{SOURCE.name} does not compile here"
    return "" if _is_exact() else f"{SOURCE.name} is wrong here"


def _is_exact() -> bool:
    """Whether the largest sums that fit are right, of many and of few bits."""
    one = torch.ones(16)
    for highest, weight_code in (255, 64), (255, -64), (15, 8), (15, -8):
        codes = torch.full((5, 600), highest, dtype=torch.uint8)
        weight = torch.full((16, 600), weight_code, dtype=torch.int8)
        run = run_of(abs(weight_code), highest)
        out = u8s8(codes, one[0], torch.tensor(1), pack(weight), run, one, None)
        if bool((out != 600 * (highest - 1) * weight_code).any()):
            return False
    return True
