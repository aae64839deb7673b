"""The scripts' way through CUDA, on a device that the CPU plays (stand_in_cuda.py): the CPU's steps
and images, memory given back, and no waiting within a sampling step."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FLAGS, ROOT, STAND_IN, needs_stand_in, run_script

import models_dit as m

pytestmark = needs_stand_in


def play(name, run, *flags):
    """A script on the stand-in; returns what it printed."""
    flags = ["--run", run, "--device", "cuda", *FLAGS[name].split(), *flags]
    result = run_script(name, *flags, launcher=[STAND_IN])
    assert result.returncode == 0, result.stderr
    return result.stdout


def counts(printed):
    """Reads by the host, copies from pageable memory, bytes left, bytes at the peak."""
    return list(map(int, re.findall(r"\d+", re.search("stand-in: .*", printed)[0])))


@pytest.fixture(scope="module")
def played(tiny_run, tmp_path_factory):
    """A folder with what 02 and 03 made there, and what they printed. Three rows to a chunk."""
    run = tmp_path_factory.mktemp("stand_in")
    shutil.copy(tiny_run / "calib.pt", run / "calib.pt")
    printed = [play("02_grad_cache", run), play("03_quantize", run, "--memory-limit", "0.3")]
    return run, printed


def steps(run, name):
    """All step sizes of a quant file, by layer and part."""
    layers, found = m.load_state(run / f"quant_{name}.pt", "")["layers"], {}
    for layer, state in layers.items():
        for part in ("weight", "act", "a", "b"):
            for key in ("step", "step1", "step2"):
                if key in state.get(part, {}):
                    found[layer, part, key] = state[part][key]
    return found


def test_calibration_rows_equal_the_cpu_s(tiny_run, tiny_ckpt, tmp_path):
    """01: the same trajectories, timesteps and labels, x_t but for the order of sums."""
    play("01_collect_calib", tmp_path, "--ckpt", tiny_ckpt)
    cpu, cuda = (m.load_calib(run)["calibration"] for run in (tiny_run, tmp_path))
    for key, value in cpu.items():
        torch.testing.assert_close(value, cuda[key], rtol=1e-4, atol=1e-5, msg=key)


def test_gradients_equal_the_cpu_s(tiny_run, played):
    """02 in other batches: equal but for the order of sums."""
    for name in ("embed", "block_00", "final"):
        files = [m.load_state(run / "grads" / f"{name}.pt", "") for run in (tiny_run, played[0])]
        for a, b in zip(*(file["unit_grads"] for file in files), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_steps_equal_the_cpu_s(tiny_run, played):
    """03 on int8 codes, chunks arriving on a stream of their own: the same steps."""
    cpu, cuda = steps(tiny_run, "w6a6"), steps(played[0], "w6a6")
    assert cpu.keys() == cuda.keys() and len(cpu) > 20
    for key, value in cpu.items():
        torch.testing.assert_close(value, cuda[key], rtol=1e-5, atol=0, msg=str(key))


def test_memory_is_given_back_and_its_peak_printed(played):
    """Nothing stays on the device. With a whole layer's data there 03 would hold 0.95 MiB."""
    for printed in played[1]:
        _, _, left, peak = counts(printed)
        assert left == 0 and f"peak GPU memory {peak / 2**20:.0f} MiB" in printed
        assert 0.2 * 2**20 < peak < 0.7 * 2**20


def test_the_best_preset_runs(tiny_run, played):
    """Balancing, time groups of inputs, 8-bit edges, compensated rounding: steps as on the CPU."""
    run, own = played[0], ["--preset", "best", "--rows", "6", "--memory-limit", "0.3"]
    play("03_quantize", run, *own)
    shutil.copytree(tiny_run, run / "cpu")
    flags = FLAGS["03_quantize"].split()
    result = run_script("03_quantize", "--run", run / "cpu", *flags, *own)
    assert result.returncode == 0, result.stderr
    cpu, cuda = steps(run / "cpu", "w6a6_best"), steps(run, "w6a6_best")
    assert cpu.keys() == cuda.keys()
    for key, value in cpu.items():
        torch.testing.assert_close(value, cuda[key], rtol=1e-4, atol=0, msg=str(key))


def test_images_equal_the_cpu_s_and_no_step_waits(tiny_run, played):
    """04: equal but for rounding to uint8; the host reads once a batch, and no number of steps adds
    to what it reads or copies from pageable memory."""
    printed = play("04_sample", played[0], "--batch-size", "2")
    a, b = (np.load(run / "samples_w6a6.npz")["arr_0"] for run in (tiny_run, played[0]))
    assert np.abs(a.astype(int) - b).max() <= 1
    shorter = play("04_sample", played[0], "--batch-size", "2", "--steps", "3", "--force")
    assert counts(printed)[0] == 3 and counts(printed)[:2] == counts(shorter)[:2]


def on_stand_in(folder, text):
    """Lines that a script prints on the stand-in, its counts last."""
    (folder / "script.py").write_text(text)
    command = [sys.executable, STAND_IN, folder / "script.py"]
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
    assert on_stand_in(tmp_path, STEP)[0] == "4 4 8 8"


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


def test_stand_in_sees_what_a_gpu_would_object_to(tmp_path):
    """Tensors of both devices, rows too few for `_int_mm`, a copy that nobody has waited for."""
    lines = on_stand_in(tmp_path, SEEN)
    assert "both devices" in lines[0] and "16 x 8 x 8" in lines[1]
    assert lines[2:4] == ["before 0.0", "after 3.0"]
    reads, pageable, _, peak = counts(lines[4])
    assert (reads, pageable) == (2, 1) and peak >= 1024
