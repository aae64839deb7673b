"""benchmarks/sampling.py runs, measures a model that is one, and no step of it waits for a GPU;
benchmarks/calibration.py counts, measures, and agrees with the plain way."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_stand_in
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(ROOT / "benchmarks"))
import sampling  # noqa: E402

CONFIG = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)


def run(*flags, script="sampling"):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def quantized(device="cpu"):
    """A tiny lively DiT, its W8A8 twin, labels (4,), and eps of both, (4, C, H, W)."""
    model, y = sampling.lively(CONFIG, device), torch.arange(4, device=device)
    batch = torch.randn(4, 4, 8, 8, device=device), torch.full_like(y, 500), y
    twin = sampling.quantize(model, CONFIG, batch)
    return twin, y, model(*batch), twin(*batch)


def test_quantized_model_is_near_full_precision_and_not_equal():
    """8 bits with min-max steps: an error of 0.1 to 10 %, and all 14 layers are swapped."""
    twin, _, wanted, found = quantized()
    assert 1e-3 < ((found - wanted).norm() / wanted.norm()).item() < 0.1
    swapped = [m for m in twin.modules() if type(m) in sampling.q.LAYERS.values()]
    assert len(swapped) == 1 + 6 * 2 + 1 and twin.group_table.unique().tolist() == [*range(10)]


def test_table_has_a_row_for_each_contender():
    """The demo in a second: hardware first, then ratios, full precision's own being 1."""
    result = run("--models", "demo", "--batch-size", "1", "--rounds", "1", "--no-compile")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout.splitlines()[0]
    assert re.search(r"\| ours, full precision \| [\d.]+ \| 1.00 \|", result.stdout)
    assert re.search(r"\| W8A8 \| [\d.]+ \| [\d.]+ \|", result.stdout)


def test_checkout_that_is_none_is_refused_in_one_line():
    """--official NOWHERE: status 2 and the reason."""
    result = run("--models", "demo", "--official", "nowhere")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "--official nowhere" in result.stderr


def test_calibration_has_a_row_for_each_kind_and_chooses_the_plain_way_s_steps():
    """A block of the demo's shape: eight kinds of layers, the scripts, the same steps."""
    flags = "--model DiT-Demo/4 --depth 1 --rows 10 --rounds 1 --reference".split()
    result = run(*flags, script="calibration")
    assert result.returncode == 0, result.stderr
    kinds = re.findall(r"^\| ([\w.]+) \| [\d.e-]+ \|", result.stdout, re.M)
    assert len(kinds) == 9 and kinds[-1] == "all" and "mlp.fc2" in kinds
    assert "02_grad_cache:" in result.stdout and "03_quantize:" in result.stdout
    assert float(re.search(r"chooses ([\d.]+)% of the same", result.stdout)[1]) > 99


@needs_stand_in
def test_calibration_tells_what_memory_a_gpu_would_need():
    """--stand-in: the peaks of 02 and 03, the demo's first block in chunks of a MiB."""
    flags = "--model DiT-Demo/4 --depth 1 --rows 10 --groups 5 --rounds 1 --memory-limit 1".split()
    result = run(*flags, "--stand-in", script="calibration")
    assert result.returncode == 0, result.stderr
    peaks = [int(peak) for peak in re.findall(r"peak GPU memory (\d+) MiB", result.stdout)]
    assert len(peaks) == 2 and 1 <= min(peaks) and max(peaks) < 20


def test_calibration_of_the_best_preset_counts_no_products():
    """Its candidates are others: one line says what to give."""
    result = run("--preset", "best", script="calibration")
    assert result.returncode == 2 and "--no-layers" in result.stderr


def test_calibration_counts_the_paper_s_products():
    """fc2 of DiT-XL/2: 900 candidates x 320 rows x 28 blocks x 2 x 256 x 1152 x 4608."""
    result = run("--model", "DiT-XL/2", "--paper", script="calibration")
    work = 900 * 320 * 28 * 2 * 256 * 1152 * 4608 / 1e15
    assert f"| mlp.fc2 | 900 | {work:.3g} |" in result.stdout


@torch.no_grad()
def test_no_step_reads_a_value_back():
    """A sampling step of the quantized model has no operation that hands a number to Python."""
    steps = sampling.ours(*quantized()[:2])
    next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        next(steps)
    names = {event.key for event in record.key_averages()}
    assert "aten::addmm" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_no_step_waits_for_the_gpu():
    """CUDA itself raises if a step synchronizes, the copy of its noise included."""
    steps = sampling.ours(*quantized("cuda")[:2])
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
