"""benchmarks/sampling.py runs, measures a model that is one, and no step of it waits for a GPU;
benchmarks/calibration.py counts, measures, and agrees with the plain way."""

import argparse
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, load_script, needs_fake_cuda, parsed, refused, run_in_process, run_script
from torch.profiler import ProfilerActivity, profile

from common.quant_file import load_quant
from quant_ops import QuantLinear, QuantMatMul

sys.path.insert(0, str(ROOT / "benchmarks"))
import layer_table  # noqa: E402
import openvino_dit  # noqa: E402
import random_run  # noqa: E402
import sampling  # noqa: E402
import step_parts  # noqa: E402

CONFIG = dict(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5)
SMALL = "--model DiT-Demo/4 --depth 1 --rows 10 --rounds 1".split()


def run(script, *flags):
    return run_in_process(f"benchmarks/{script}", *flags)


def quantized(device="cpu"):
    """A tiny lively DiT, its W8A8 twin, labels (4,), and eps of both, (4, C, H, W)."""
    model, y = random_run.lively(CONFIG, device), torch.arange(4, device=device)
    batch = torch.randn(4, 4, 8, 8, device=device), torch.full_like(y, 500), y
    twin = sampling.quantize(model, CONFIG, batch)
    return twin, y, model(*batch), twin(*batch)


def test_quantized_model_is_near_full_precision_and_not_equal():
    """8 bits with min-max scales: an error of 0.1 to 10 %, and all 14 layers are swapped."""
    twin, _, wanted, found = quantized()
    assert 1e-3 < ((found - wanted).norm() / wanted.norm()).item() < 0.1
    swapped = [m for m in twin.modules() if isinstance(m, QuantLinear | QuantMatMul)]
    assert len(swapped) == 1 + 6 * 2 + 1 and twin.group_table.unique().tolist() == [*range(10)]


def test_table_has_a_row_for_each_contender():
    """The demo in a second: hardware first, then ratios, full precision's own being 1."""
    flags = "--models demo --batch-size 1 --rounds 1 --no-compile".split()
    result = run("sampling", *flags)
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout.splitlines()[0]
    assert re.search(r"\| ours, full precision \| [\d.]+ \| 1.00 \|", result.stdout)
    assert re.search(r"\| W8A8 \| [\d.]+ \| [\d.]+ \|", result.stdout)


def test_ratios_are_over_full_precision(monkeypatch, capsys):
    """Half the time is 0.50; medians of the rounds."""
    script = load_script("benchmarks/sampling")
    times = {script.FULL: iter([9.0, 2.0, 4.0, 3.0]), "W8A8": iter([9.0, 1.0, 2.0, 1.5])}
    monkeypatch.setattr(script, "contenders", lambda name, args: {label: label for label in times})
    monkeypatch.setattr(script, "seconds", lambda label, args: next(times[label]))
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--models", "demo", "--rounds", "3"])
    script.main(script.parse_args())
    assert "| W8A8 | 1500.00 | 0.50 |" in capsys.readouterr().out


SCRIPTS = [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))
           if "__main__" in path.read_text()]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_starts_by_hand_from_anywhere(name, tmp_path):
    """In a process of its own, with nothing on its path but its folder."""
    result = run_script(f"benchmarks/{name}", "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr


def test_layers_alone_have_a_row_for_each_way(monkeypatch):
    """DiT-XL/2's layers, here small: full precision's ratio is 1; folded is asked of fc2 alone."""
    script, small = load_script("benchmarks/engine_layers"), dict(hidden_size=32, num_heads=4)
    monkeypatch.setattr(script, "CONFIG", CONFIG | small | dict(input_size=32, depth=1))
    result = run(
        "engine_layers", *"--rows 256 --bits 6/6 --rounds 1 --steps 1 --no-compile".split()
    )
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"\| fp32 \| [\d.]+ \| 1.00 \|", result.stdout)) == 5
    ways = re.findall(r"\| (\S+) \| --engine (\S+) \| [\d.]+ \|", result.stdout)
    assert [name for name, way in ways if way == "int8-folded"] == ["mlp.fc2", "mlp"]
    assert len(ways) == 5 + 2


def test_parts_of_a_step_are_all_of_it(monkeypatch, capsys):
    """A row for each model; its parts add up to the last column; full precision's are 1 in all."""
    at_once = "compile", lambda self, **how: None  # which takes a minute
    monkeypatch.setattr(torch.nn.Module, *at_once)
    monkeypatch.setitem(sampling.DiT_models, "DiT-XL/2", CONFIG | dict(hidden_size=64))
    flags = "--engines float int8 --rounds 1 --blocks 1".split()
    step_parts.main(parsed(monkeypatch, ["benchmarks/step_parts.py", *flags]))
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if "(0." in line]
    found = [[float(cell.split()[0]) for cell in row] for row in rows]
    assert len(found) == 3 and found[0][-1] == 1
    for *parts, whole in found:
        assert min(parts) > 0 and abs(sum(parts) - whole) < 0.003


def test_floors_count_products_and_what_lies_between():
    """Of a DiT one block deep: 2 K I O operations of each product, by hand; its passes' bytes."""
    D, S, N, H = 32, 16, 4, 4  # width, tokens, samples, heads
    model = random_run.lively(CONFIG | dict(depth=1), "cpu")
    batch = torch.randn(N, 4, 8, 8), torch.zeros(N).long(), torch.arange(N)
    blocks, ends = 12 * D * D, 4 * 4 * D + D * 4 * 8  # weights of tokens' layers
    conditioning = 6 * D * D + 2 * D * D + 256 * D + D * D
    linear, attention = step_parts.operations(model, batch)
    assert linear == 2 * N * (S * (blocks + ends) + conditioning)
    assert attention == 2 * 2 * N * S * S * D
    floats = S * N * (4 * D + 2 * D + 5 * D + 5 * D + D + 4 * 8)  # qkv, proj, fc1, fc2, the last
    assert step_parts.bytes_between(model, batch) == 4 * floats
    twin = sampling.quantize(model, CONFIG | dict(depth=1), batch)
    products = 4 * N * S * D + 2 * N * H * S * S  # q, k, v, the result; scores, softmax
    assert step_parts.bytes_between(twin, batch) == 4 * (floats + products)


def test_engine_error_s_columns_are_those_of_the_report(tiny_run):
    """Fake quantization's SNR is 03's, to rounding; the engines' are near."""
    result = run("engine_error", "--run", tiny_run, "--models", "w6a6")
    assert result.returncode == 0, result.stderr
    found = [float(x) for x in result.stdout.splitlines()[-1].split("|")[2:-1]]
    report = load_quant(tiny_run / "quant_w6a6.pt")["report"]
    assert len(found) == 4 and abs(found[0] - report["snr_weighted"]) < 0.02
    assert max(found) - min(found) < 3


def test_checkout_that_is_none_is_refused_in_one_line():
    """--official NOWHERE: status 2 and the reason."""
    refused(run("sampling", "--models", "demo", "--official", "nowhere"), "--official nowhere")


def test_openvino_s_twins_are_the_network():
    """fp32 is equal but for rounding, 8 bits are near; both have the batch's shape."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    model, y = random_run.lively(CONFIG, "cpu"), torch.arange(4)
    batch = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 700, 999]), y
    wanted = model(*batch)
    twins = openvino_dit.twins(model, batch)
    errors = [((twin(*batch) - wanted).norm() / wanted.norm()).item() for twin in twins.values()]
    assert errors[0] < 1e-5 and 1e-3 < errors[1] < 0.2


@pytest.mark.parametrize("missing", ["openvino", "nncf"])
def test_openvino_that_is_missing_is_told_in_one_line(missing, monkeypatch):
    """Before any model is made."""
    monkeypatch.setitem(sys.modules, missing, None)
    refused(run("sampling", "--models", "demo", "--openvino"), missing)


def test_openvino_is_for_fp32():
    """OpenVINO's bf16 is another thing than autocast's."""
    refused(run("sampling", "--models", "demo", "--openvino", "--dtype", "bf16"), "fp32")


@pytest.fixture
def w8a8_run(tiny_run, tmp_path):
    """A copy of the finished run with a W8A8 model too, R = 1."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    flags = "--wbits 8 --abits 8 --rounds 1".split()
    made = run_in_process("03_quantize", "--run", folder, *flags)
    assert made.returncode == 0, made.stderr
    return folder


def test_the_plain_way_chooses_03_s_scales(w8a8_run):
    """Every layer's, but for ties; and it says so if they are others."""
    result = run("plain_way", "--run", w8a8_run, "--batch-size", 5)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"([\d.]+)% are the plain way's", result.stdout)[1]) > 99
    quant = torch.load(w8a8_run / "quant_w8a8.pt", weights_only=True)
    for layer in quant["layers"].values():
        if layer["type"] == "linear":
            layer["weight"]["scale"] *= 1.01
    torch.save(quant, w8a8_run / "quant_w8a8.pt")
    result = run("plain_way", "--run", w8a8_run)
    assert float(re.search(r"([\d.]+)% are the plain way's", result.stdout)[1]) < 50


def test_layer_table_has_a_row_for_each_kind(tiny_run, capsys):
    """Products are counted by hand for fc2 of both blocks: 300 candidates, 12 rows of 16 tokens,
    128 inputs, 32 outputs. No more losses are computed than there are."""
    args = argparse.Namespace(
        rounds=1, memory_limit=0.02, compile=False, device=torch.device("cpu")
    )
    table = layer_table.layer_table(tiny_run, (1e9, 1e9, 1e9), args)
    layer_table.print_table(table)
    kinds = re.findall(r"^\| ([\w.]+) \| [\d.e-]+ \|", capsys.readouterr().out, re.M)
    assert len(kinds) == 9 and kinds[-1] == "all"
    work, *_, possible, computed = table["mlp.fc2"].tolist()
    assert work == 2 * 300 * 2 * 12 * 16 * 128 * 32
    assert 0 < computed < possible


def test_calibration_counts_no_products_of_other_methods():
    """Their candidates are others: one line says what to give."""
    refused(run("calibration", "--method", "plus"), "--no-layers")


def test_calibration_counts_the_paper_s_products():
    """fc2 of DiT-XL/2: 900 candidates x 320 rows x 28 blocks x 2 x 256 x 1152 x 4608."""
    result = run("calibration", "--model", "DiT-XL/2", "--paper")
    work = 900 * 320 * 28 * 2 * 256 * 1152 * 4608 / 1e15
    assert f"| mlp.fc2 | 900 | {work:.3g} |" in result.stdout


@pytest.mark.slow
def test_calibration_times_both_phases_and_the_plain_way(tmp_path):
    """A block of the demo's shape; the scripts as processes. Nothing is left in --folder."""
    result = run("calibration", *SMALL, "--reference", "--folder", tmp_path)
    assert result.returncode == 0, result.stderr
    for name in ("02_grad_cache", "03_quantize"):
        assert re.search(rf"{name}: [\d.]+ s, peak host memory \d+ MiB", result.stdout)
    assert "| mlp.fc2 |" in result.stdout
    assert float(re.search(r"([\d.]+)% are the plain way's", result.stdout)[1]) > 99
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("flags, cases", [(["--method", "plus"], 1), (["--scaling"], 5)])
def test_calibration_times_other_methods_and_sizes(flags, cases):
    """methods/tqdit_plus.py in 03's place; or rows, depth and width doubled, each beside a base."""
    result = run("calibration", *SMALL, "--no-layers", *flags)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^grads/: \d+ MiB", result.stdout, re.M)) == cases
    assert ("methods/tqdit_plus: " in result.stdout) == ("plus" in flags)
    ratios = re.findall(r"^\| (rows|depth|width) \| [\d.]+ \|", result.stdout, re.M)
    assert len(ratios) == (3 if cases > 1 else 0)


@pytest.mark.slow
@needs_fake_cuda
def test_calibration_tells_what_memory_a_gpu_would_need():
    """--fake-cuda: the peaks of 02 and 03, the demo's first block in chunks of a MiB."""
    flags = [*SMALL, "--groups", "5", "--memory-limit", "1", "--fake-cuda"]
    result = run("calibration", *flags)
    assert result.returncode == 0, result.stderr
    peaks = [int(peak) for peak in re.findall(r"peak GPU memory (\d+) MiB", result.stdout)]
    assert len(peaks) == 2 and 1 <= min(peaks) and max(peaks) < 20


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
