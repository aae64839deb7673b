"""methods/: SmoothQuant, GPTQ, and each switch of tqdit_plus.py."""

import shutil

import numpy as np
import torch
from conftest import layer_of, linear_data, load_script, run_in_process, same_leaves

import quant_ops as q
from common.artifacts import load_artifact
from common.fast_search import FastSearch
from common.quant_file import unpack_weight
from methods.balancing import smoothquant_factors
from methods.rounding import gptq

PLUS = load_script("methods/tqdit_plus")
PLAIN = dict(
    wbits=4, abits=5, metric="hessian", rounds=1, edge_bits=None, cond_bits=None, tgq_inputs=False,
    smoothquant=False, rounding="nearest", rows=None, tag="plus",
)  # fmt: skip


def test_smoothquant_evens_out_what_it_promises():
    """Strength 1: all input channels alike; 0: all columns alike; the product never changes."""
    x, weight = torch.randn(50, 4) * torch.tensor([1.0, 5, 20, 0.1]), torch.randn(3, 4)
    for strength in (0.0, 0.5, 1.0):
        s = smoothquant_factors(x.abs().amax(0), weight, strength)
        torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-4, atol=1e-4)
        even = (x / s).abs().amax(0) if strength else (weight * s).abs().amax(0)
        assert strength == 0.5 or torch.allclose(even, torch.ones(4))


def gptq_case(inputs=32, rows=400, bits=3):
    """Correlated inputs, a weight (6, I), its grid, and the weight rounded to nearest."""
    torch.manual_seed(0)
    x = torch.randn(rows, 8) @ torch.randn(8, inputs) + 0.1 * torch.randn(rows, inputs)
    weight = torch.randn(6, inputs)
    grid = *q.qparams_from_range(weight.amin(1, True), weight.amax(1, True), bits), bits
    return x, weight, grid, q.fake_quant(weight, *grid)


def test_gptq_stays_on_the_grid_and_lowers_the_output_error():
    """Same grid as nearest rounding, Eq. (5); far less error where inputs are correlated."""
    x, weight, grid, nearest = gptq_case()
    rounded = gptq(weight, *grid, x.T @ x)
    torch.testing.assert_close(q.fake_quant(rounded, *grid), rounded, rtol=0, atol=1e-5)
    assert (x @ (rounded - weight).T).norm() < 0.5 * (x @ (nearest - weight).T).norm()


def test_gptq_of_uncorrelated_inputs_is_nearest_rounding():
    """A diagonal Gram matrix leaves nothing to make up for; so does one that is zero."""
    _, weight, grid, nearest = gptq_case()
    for gram in (torch.diag(torch.rand(32) + 0.1), torch.zeros(32, 32)):
        torch.testing.assert_close(gptq(weight, *grid, gram), nearest, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# tqdit_plus.py, one switch at a time


def quantized(**changes):
    """A layer (12, 16) whose inputs are correlated, of three groups, and have two outlier channels;
    what becomes of it."""
    torch.manual_seed(4)
    layer = torch.nn.Linear(16, 12).requires_grad_(False)
    x = torch.randn(150, 4) @ torch.randn(4, 16) + 0.2 * torch.randn(150, 16)
    x, group = x * torch.tensor([30.0, 8.0, *[1.0] * 14]), torch.arange(150) // 50
    x = x * torch.tensor([0.1, 1.0, 5.0])[group][:, None]
    data = linear_data(torch.randn(150, 12), x @ layer.weight.T, x, group, rows=60)
    cfg = PLUS.Settings(**PLAIN | changes)
    found = PLUS.quantize_linear(layer_of(layer), data, cfg, FastSearch)
    return layer, data, found["state"], found["cost"]


def test_tgq_inputs_fits_every_group_to_its_own_rows():
    """Each time group's scale is the one that its rows alone choose, with the same weights."""
    layer, data, state, _ = quantized(tgq_inputs=True)
    scale, weight = state["act"]["scale"], unpack_weight(state["weight"])
    for i in range(3):
        rows = data.of_group(i)
        _, candidates = q.uniform_candidates(*rows.range("x"), PLAIN["abits"])
        losses = [
            sum((c.grad * (c.out - Q(c.x) @ weight.T)).square().sum() for c in rows)
            for Q in candidates
        ]
        assert scale[i] == candidates[torch.stack(losses).argmin()].scale
    assert scale[2] > 10 * scale[0] and quantized()[2]["act"]["scale"].ndim == 0


def test_smoothquant_calms_outlier_channels_and_keeps_the_product():
    """Inputs are divided by what the weight's columns are multiplied by; the error falls."""
    layer, _, plain, before = quantized(abits=4, wbits=8)
    _, _, state, after = quantized(abits=4, wbits=8, smoothquant=True)
    assert "smooth" not in plain and state["smooth"].shape == (16,)
    assert after < before / 2
    weight = unpack_weight(state["weight"]) / state["smooth"]
    torch.testing.assert_close(weight, layer.weight, rtol=0, atol=0.05)


def test_smoothquant_keeps_the_cheapest_strength(monkeypatch):
    """Of all strengths, none among them, the state with the least cost is kept."""
    kept, costs = quantized(smoothquant=True)[-1], []
    for strength in PLUS.STRENGTHS:
        monkeypatch.setattr(PLUS, "STRENGTHS", [strength])
        costs.append(quantized(smoothquant=True)[-1])
    assert kept == min(costs) < max(costs)


def test_gptq_lowers_the_layer_s_cost():
    """Errors of a column made up for by the others: less weighted output error, same scales."""
    _, _, nearest, before = quantized(wbits=3, abits=8)
    _, _, rounded, after = quantized(wbits=3, abits=8, rounding="gptq")
    assert torch.equal(nearest["weight"]["scale"], rounded["weight"]["scale"])
    assert after < 0.7 * before


def quant_file(tiny_run, folder, flags):
    """The layers of the tiny run's quant file of tqdit_plus.py with these flags."""
    folder.mkdir(exist_ok=True)
    for name in ("calib.pt", "grads"):
        (folder / name).symlink_to(tiny_run / name)
    command = f"--run {folder} --wbits 4 --abits 5 --rows 6 {flags}"
    log = run_in_process("methods/tqdit_plus", *command.split())
    assert log.returncode == 0, log.stderr
    assert "--tag plus" in log.stdout.splitlines()[-1]
    file = load_artifact(folder / "quant_w4a5_plus.pt", "quant", "tqdit_plus.py")
    assert file["method"] == "tqdit_plus"
    return file["layers"]


def test_edge_and_cond_bits_reach_their_layers_only(tiny_run, tmp_path):
    """--edge-bits the first and last layer, --cond-bits the weights of adaLN and embedders."""
    layers = quant_file(tiny_run, tmp_path, "--edge-bits 8 --cond-bits 7")
    bits = {name: s["weight"]["bits"] for name, s in layers.items() if "weight" in s}
    assert bits.pop("x_embedder.proj") == bits.pop("final_layer.linear") == 8
    for name in bits:
        assert bits[name] == (7 if "adaLN" in name or "t_embedder" in name else 4), name
    assert layers["final_layer.linear"]["act"]["bits"] == 8
    assert layers["blocks.0.adaLN_modulation.1"]["act"]["type"] == "none"
    assert layers["x_embedder.proj"]["act"]["type"] == "none"
    assert layers["blocks.0.mlp.fc2"]["act"]["scale1"].shape == (3,)
    assert layers["blocks.0.attn.av"]["a"]["scale1"].shape == (3,)
    assert layers["blocks.0.attn.qk"]["a"]["bits"] == 5


def test_all_switches_off_is_the_paper_s_method(tiny_run, tmp_path):
    """Without its five ideas tqdit_plus.py writes 03's layers, bit for bit, at R = 1."""
    off = "--edge-bits none --cond-bits none --no-tgq-inputs --no-smoothquant --rounding nearest"
    found = quant_file(tiny_run, tmp_path, off)
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --rows 6 --rounds 1"
    assert run_in_process("03_quantize", *flags.split()).returncode == 0
    expected = load_artifact(tmp_path / "quant_w4a5.pt", "quant", "03_quantize.py")["layers"]
    assert same_leaves(found, expected)


def test_04_samples_its_file_alone(tiny_run, tmp_path):
    """quant_w4a5_plus.pt and --tag plus are enough for images near full precision's."""
    quant_file(tiny_run, tmp_path / "run", "")
    shutil.move(tmp_path / "run" / "quant_w4a5_plus.pt", tmp_path)
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --tag plus --num-images 6"
    log = run_in_process("04_sample", *flags.split())
    assert log.returncode == 0, log.stderr
    files = tmp_path / "samples_w4a5_plus.npz", tiny_run / "samples_fp.npz"
    images, twins = (np.load(file)["arr_0"].astype(float) for file in files)
    assert 0 < np.abs(images - twins).mean() < 0.5 * np.abs(images - twins[::-1]).mean()
