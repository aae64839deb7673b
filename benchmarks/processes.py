"""Commands as processes of their own, timed; what they ran on; the repository root on the path."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Used(NamedTuple):
    """What a process took; `cpu_seconds` are those that it had a core."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_mib: float  # of host memory


def timed(command, out, **environment):
    """Run a command of Python, which prints into the file `out`; returns what it `Used`."""
    read, write = os.pipe()
    waiter = [sys.executable, ROOT / "benchmarks" / "wait_for.py", str(write)]
    with open(read, "rb") as told:
        subprocess.run(
            [*waiter, *map(str, command)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=[write],
        )
        os.close(write)
        return Used(**json.loads(told.read()))


def hardware(device):
    """The GPU, or the CPU and how many of its cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}"


def instruction_sets():
    """Those of this CPU that decide how fast products are, by torch's names."""
    wanted = "avx2", "avx512_f", "avx512_vnni", "avx_vnni", "amx_int8"
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return ", ".join(name for name in wanted if found.get(name)) or "none of " + ", ".join(wanted)


def machine(device):
    """What a figure of this process was made by: the GPU, or the CPU with its instruction sets and
    torch's threads; torch."""
    on_cpu = f" ({instruction_sets()}), {torch.get_num_threads()} threads"
    return f"{hardware(device)}{on_cpu * (device.type == 'cpu')}, torch {torch.__version__}"
