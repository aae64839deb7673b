"""The scripts' way through CUDA, on a simulated device (fake_cuda/): the CPU's scales and images,
memory given back, and no waiting within a sampling step."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    FAKE_CUDA,
    FLAGS,
    ROOT,
    STATIC,
    flat,
    needs_fake_cuda,
    run_in_process,
    run_script,
)  # fmt: skip

from common.artifacts import load_artifact
from common.checkpoints import load_calib

pytestmark = [pytest.mark.slow, needs_fake_cuda]
MEMORY = "--memory-limit", "0.3"  # MiB: three rows to a chunk
OWN = {"03_quantize": ("--rounds", "1", *MEMORY), "04_sample": ("--batch-size", "2")}


def flags_of(name, run, *more):
    """The command line of the tiny run, in one round; of the flags given twice the last counts."""
    return ["--run", run, *FLAGS[name].split(), *OWN.get(name, ()), *more]


def on_fake_cuda(name, *flags):
    """A script on the simulated device; returns what it printed."""
    result = run_script(name, *flags, "--device", "cuda", launcher=[FAKE_CUDA])
    assert result.returncode == 0, result.stderr
    return result.stdout


def counts(printed):
    """Reads by the host, copies from pageable memory, bytes left, bytes at the peak."""
    return list(map(int, re.findall(r"\d+", re.search("simulated CUDA device: .*", printed)[0])))


@pytest.fixture(scope="module")
def simulated(tiny_run, tmp_path_factory):
    """A folder with what 02 and 03 made there, and what they printed."""
    run = tmp_path_factory.mktemp("fake_cuda")
    shutil.copy(tiny_run / "calib.pt", run / "calib.pt")
    names = "02_grad_cache", "03_quantize"
    return run, [on_fake_cuda(name, *flags_of(name, run)) for name in names]


@pytest.fixture(scope="module")
def on_cpu(tiny_run, tmp_path_factory):
    """A folder with what 03 and 04 make on the CPU."""
    run = tmp_path_factory.mktemp("on_cpu")
    for name in ("calib.pt", "grads"):
        (run / name).symlink_to(tiny_run / name)
    for name in ("03_quantize", "04_sample"):
        assert run_in_process(name, *flags_of(name, run)).returncode == 0
    return run


def scales(run, name):
    """All scales of a quant file, by layer and part."""
    layers = load_artifact(run / f"quant_{name}.pt", "quant", "03_quantize.py")["layers"]
    return {path: x for path, x in flat(layers).items() if re.search(r"\.scale[12]?\.$", path)}


def assert_same_scales(cpu, cuda, rtol):
    assert cpu.keys() == cuda.keys() and len(cpu) > 10
    for path, value in cpu.items():
        torch.testing.assert_close(value, cuda[path], rtol=rtol, atol=0, msg=path)


def test_calibration_rows_equal_the_cpu_s(tiny_run, tiny_ckpt, tmp_path):
    """01: the same trajectories, timesteps and labels, x_t but for the order of sums."""
    on_fake_cuda("01_collect_calib", *flags_of("01_collect_calib", tmp_path, "--ckpt", tiny_ckpt))
    cpu, cuda = (load_calib(run)["calibration"] for run in (tiny_run, tmp_path))
    for key, value in cpu.items():
        torch.testing.assert_close(value, cuda[key], rtol=1e-4, atol=1e-5, msg=key)


def test_gradients_equal_the_cpu_s(tiny_run, simulated):
    """02 in other batches: equal but for the order of sums."""
    for name in ("embed", "block_00", "final"):
        files = [
            load_artifact(run / "grads" / f"{name}.pt", "grads", "02_grad_cache.py")["unit_grads"]
            for run in (tiny_run, simulated[0])
        ]
        for a, b in zip(*files, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_scales_equal_the_cpu_s(on_cpu, simulated):
    """03 on int8 codes, chunks arriving on a stream of their own: the same scales."""
    assert_same_scales(scales(on_cpu, "w6a6"), scales(simulated[0], "w6a6"), 1e-5)


def test_memory_is_given_back_and_its_peak_printed(simulated):
    """Nothing stays on the device. With a whole layer's data there 03 would hold 0.95 MiB."""
    for printed in simulated[1]:
        _, _, left, peak = counts(printed)
        assert left == 0 and f"peak GPU memory {peak / 2**20:.0f} MiB" in printed
        assert 0.2 * 2**20 < peak < 0.7 * 2**20


@pytest.mark.parametrize("tag, how", [("plus", ["--rank", "2"]), ("static", STATIC)])
def test_tqdit_plus_chooses_the_cpu_s_scales(on_cpu, simulated, tag, how):
    """Rotation, groups of weights, a branch; or time groups of inputs; SmoothQuant, 8-bit edges,
    GPTQ: scales as on the CPU."""
    name, flags = "methods/tqdit_plus", f"--wbits 6 --abits 6 --rows 6 --tag {tag}".split()
    on_fake_cuda(name, "--run", simulated[0], *flags, *how)
    result = run_in_process(name, "--run", on_cpu, *flags, *how)
    assert result.returncode == 0, result.stderr
    assert_same_scales(*(scales(run, f"w6a6_{tag}") for run in (on_cpu, simulated[0])), 1e-4)


def test_images_equal_the_cpu_s_and_no_step_waits(on_cpu, simulated):
    """04: equal but for rounding to uint8; the host reads once a batch, and no number of steps adds
    to what it reads or copies from pageable memory."""
    name, run = "04_sample", simulated[0]
    printed = on_fake_cuda(name, *flags_of(name, run))
    a, b = (np.load(folder / "samples_w6a6.npz")["arr_0"] for folder in (on_cpu, run))
    assert np.abs(a.astype(int) - b).max() <= 1
    shorter = on_fake_cuda(name, *flags_of(name, run, "--steps", "3", "--force"))
    assert counts(printed)[0] == 3 and counts(printed)[:2] == counts(shorter)[:2]


def test_engine_runs_and_no_step_waits(on_cpu, simulated):
    """04 on codes, by `_int_mm`: images near those of fake quantization, though codes at ties may
    differ, and no number of steps adds to what the host reads."""
    name, run = "04_sample", simulated[0]
    flags = flags_of(name, run, "--engine", "int8", "--force")
    printed = on_fake_cuda(name, *flags)
    assert "engine int8: 9 layers on integer codes by torch._int_mm" in printed
    a, b = (np.load(folder / "samples_w6a6.npz")["arr_0"] for folder in (on_cpu, run))
    assert np.abs(a.astype(int) - b).mean() < 4
    shorter = on_fake_cuda(name, *flags, "--steps", "3")
    assert counts(printed)[:2] == counts(shorter)[:2]


def lines_of(folder, text):
    """Lines that this script prints on the simulated device, its counts last."""
    (folder / "script.py").write_text(text)
    command = [sys.executable, FAKE_CUDA, folder / "script.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


STEP = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_benchmarks import quantized, sampling
steps = sampling.ours(*quantized("cuda:0")[:2])
next(steps)
print(*next(steps)[1].shape)
"""


def test_sampling_benchmark_s_models_run(tmp_path):
    """Random weights made on the device, and their quantized twin, take a sampling step."""
    assert lines_of(tmp_path, STEP)[0] == "4 4 8 8"


SEEN = """
import torch
x = torch.ones(32, 8, device="cuda:0")
for wrong in (
    lambda: x + torch.ones(32, 8),
    lambda: torch._int_mm(x[:16].to(torch.int8), x[:8].to(torch.int8)),
):
    try:
        wrong()
        print("missed")
    except RuntimeError as error:
        print(error)
side, late = torch.cuda.Stream(), torch.zeros(3, device="cuda:0")
with torch.cuda.stream(side):
    late.copy_(torch.ones(3), non_blocking=True)
print("before", late.sum().item())
torch.cuda.current_stream().wait_stream(side)
print("after", late.sum().item())
"""


def test_device_sees_what_a_gpu_would_object_to(tmp_path):
    """Tensors of both devices, rows too few for `_int_mm`, a copy that nobody has waited for."""
    lines = lines_of(tmp_path, SEEN)
    assert "both devices" in lines[0] and "16 x 8 x 8" in lines[1]
    assert lines[2:4] == ["before 0.0", "after 3.0"]
    reads, pageable, _, peak = counts(lines[4])
    assert (reads, pageable) == (2, 1) and peak >= 1024
