"""methods/: SmoothQuant, rotation, GPTQ, groups, and each switch of tqdit_plus.py."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    STATIC,
    layer_of,
    linear_data,
    load_script,
    run_in_process,
    run_script,
    same_leaves,
)

import quant_ops as q
from common.artifacts import load_artifact
from common.checkpoints import load_calib
from common.fast_search import FastSearch
from common.layer_data import LayerData, MatMulChunk
from common.layer_schema import Block
from common.quant_file import make_layer, unpack_weight
from common.quantizers import hadamard_matrix, rotate
from common.unit_data import rows_to_search
from methods import plus_linear, rounding
from methods.balancing import Way, smoothquant_factors
from methods.rounding import gptq, gram, group_grid, low_rank_part, rescaled, rounded_to
from models_dit import Diffusion

PLUS = load_script("methods/tqdit_plus")
PLAIN = dict(
    wbits=4, abits=5, metric="hessian", rounds=1, edge_bits=None, cond_bits=None, tgq_inputs=False,
    smoothquant=False, rounding="nearest", input_group=None, dynamic_products=False,
    weight_group=None, hadamard=False, rank=None, fit_last=False,
    tune_epochs=None, rows=None, tag="plus",
)  # fmt: skip


def test_smoothquant_evens_out_what_it_promises():
    """Strength 1: all input channels alike; 0: all columns alike; the product never changes."""
    x, weight = torch.randn(50, 4) * torch.tensor([1.0, 5, 20, 0.1]), torch.randn(3, 4)
    for strength in (0.0, 0.5, 1.0):
        s = smoothquant_factors(x.abs().amax(0), weight, strength)
        torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-4, atol=1e-4)
        even = (x / s).abs().amax(0) if strength else (weight * s).abs().amax(0)
        assert strength == 0.5 or torch.allclose(even, torch.ones(4))


def test_rotation_keeps_the_product_and_spreads_an_outlier():
    """H is orthogonal and symmetric; x H (W H)^T = x W^T; one channel becomes a whole block's."""
    H = hadamard_matrix(8)
    torch.testing.assert_close(H @ H, torch.eye(8))
    assert torch.equal(H, H.T) and torch.allclose(H.abs(), H[0, 0])
    x, weight = torch.randn(20, 24), torch.randn(5, 24)
    x[:, 3] *= 100
    rotated = rotate(x, H)
    torch.testing.assert_close(rotated @ rotate(weight, H).T, x @ weight.T, rtol=1e-4, atol=1e-3)
    assert rotated.abs().amax() < 0.5 * x.abs().amax()
    torch.testing.assert_close(rotated[:, 8:].norm(), x[:, 8:].norm())  # blocks do not mix


@pytest.mark.parametrize("size, fits", [(8, True), (16, False), (6, False), (0, False)])
def test_a_hadamard_matrix_has_to_go_into_the_channels(size, fits):
    """A file with a size that is no power of two, or does not divide the channels, is refused."""
    try:
        Block("24")(size, "hadamard", {})
    except Exception as error:
        assert not fits and "hadamard" in str(error)
    else:
        assert fits


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
    for products in (torch.diag(torch.rand(32) + 0.1), torch.zeros(32, 32)):
        torch.testing.assert_close(gptq(weight, *grid, products), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 32, 100])
def test_gptq_is_the_same_in_blocks_of_any_size(block, monkeypatch):
    """Errors that reach the columns of later blocks in one product are those of Alg. 1, one column
    after the other."""
    x, weight, grid, _ = gptq_case(inputs=40)
    monkeypatch.setattr(rounding, "BLOCK", 40)
    whole = gptq(weight, *grid, x.T @ x)
    monkeypatch.setattr(rounding, "BLOCK", block)
    torch.testing.assert_close(gptq(weight, *grid, x.T @ x), whole, rtol=0, atol=0)


def test_gptq_takes_a_grid_for_each_column():
    """Scales (O, I) that are all alike give what (O, 1) gives; groups keep to theirs."""
    x, weight, (scale, zero_point, bits), _ = gptq_case()
    one = gptq(weight, scale, zero_point, bits, x.T @ x)
    each = (v.expand(6, 32) for v in (scale, zero_point))
    assert torch.equal(gptq(weight, *each, bits, x.T @ x), one)
    Q_W = group_grid(weight, 8, bits, torch.ones(32))
    rounded = rounded_to(Q_W, weight, (6, 4, 8), x.T @ x)
    torch.testing.assert_close(rounded_to(Q_W, rounded, (6, 4, 8)), rounded, rtol=0, atol=1e-5)
    assert (x @ (rounded - weight).T).norm() < (x @ (one - weight).T).norm()


def test_group_grid_has_the_least_weighted_error_of_its_candidates():
    """A scale for each output channel and group of inputs; what counts for more is nearer."""
    _, weight, _, _ = gptq_case()
    counts = torch.ones(32).index_fill(0, torch.tensor([1, 30]), 1000.0)
    found = group_grid(weight, 8, 3, counts)
    assert found.scale.shape == found.zero_point.shape == (6, 4, 1)
    parts = weight.view(6, 4, 8)
    error = (counts.view(4, 8) * (found(parts) - parts) ** 2).sum(2, keepdim=True)
    scale, zero_point = q.qparams_from_range(*parts.aminmax(dim=2, keepdim=True), 3)
    for a in torch.linspace(0.5, 1.05, 20):
        other = q.fake_quant(parts, a * scale, zero_point, 3)
        assert (error <= (counts.view(4, 8) * (other - parts) ** 2).sum(2, keepdim=True)).all()
    plain = group_grid(weight, 8, 3, torch.ones(32))(parts).view(6, 32)
    at = counts > 1
    assert (found(parts).view(6, 32) - weight)[:, at].norm() < (plain - weight)[:, at].norm()


def test_low_rank_part_leaves_the_least_output_error():
    """No product of this rank does better than its, over the layer's inputs: not the SVD's of the
    error itself; and at full rank nothing is left."""
    x, weight, _, nearest = gptq_case()
    error = weight - nearest

    def left(part):
        return (x @ (error - part).T).norm()

    found = low_rank_part(error, x.T @ x, 2, damp=1e-6)
    assert found["left"].shape == (6, 2) and found["right"].shape == (2, 32)
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    of_weight = (U[:, :2] * S[:2]) @ Vh[:2]
    least = torch.linalg.svdvals(x @ error.T)[2:].norm()  # Eckart and Young
    torch.testing.assert_close(left(found["left"] @ found["right"]), least, rtol=1e-3, atol=0)
    assert least < 0.9 * left(of_weight)
    whole = low_rank_part(error, x.T @ x, 6, damp=1e-6)
    torch.testing.assert_close(whole["left"] @ whole["right"], error, rtol=0, atol=1e-4)


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
    for strength in plus_linear.STRENGTHS:
        monkeypatch.setattr(plus_linear, "STRENGTHS", [strength])
        costs.append(quantized(smoothquant=True)[-1])
    assert kept == min(costs) < max(costs)


def test_gptq_lowers_the_layer_s_cost():
    """Errors of a column made up for by the others: less weighted output error, same scales."""
    _, _, nearest, before = quantized(wbits=3, abits=8)
    _, _, rounded, after = quantized(wbits=3, abits=8, rounding="gptq")
    assert torch.equal(nearest["weight"]["scale"], rounded["weight"]["scale"])
    assert after < 0.7 * before


@pytest.mark.parametrize("changes", [{}, dict(weight_group=4)])
def test_scales_of_gptq_s_own_lower_the_layer_s_cost(changes):
    """Each row's scales times one factor, 0.8 to 1.2; chosen for the way that costs least without.
    Grid values as ever: the state makes the weight that the cost is of."""
    _, _, plain, before = quantized(wbits=3, abits=8, rounding="gptq", **changes)
    layer, data, state, after = quantized(wbits=3, abits=8, rounding="gptq-scales", **changes)
    factors = state["weight"]["scale"] / plain["weight"]["scale"]
    rows = factors.flatten(1)[:, :1]
    torch.testing.assert_close(factors.flatten(1), rows.expand_as(factors.flatten(1)))
    assert 0.799 < rows.min() < rows.max() < 1.201 and len(rows.unique()) > 3
    assert after < 0.95 * before
    made = make_layer(state)
    error = [(c.grad * (made(c.x, c.group) - layer(c.x))).square().sum().item() for c in data]
    assert after == pytest.approx(sum(error), rel=1e-3)


def test_rescaled_is_the_best_of_its_factors_for_each_row():
    """By hand: gptq with every factor, the row's error e H e^T; and a zero point stays."""
    x, weight, (scale, zero_point, bits), _ = gptq_case()
    H = (x.T @ x).double()
    found = rescaled(q.UniformQuantizer(bits, scale, zero_point), weight, None, H)
    errors = []
    for factor in q.scale_grid(17, 0.8, 1.2):
        e = (gptq(weight, factor * scale, zero_point, bits, H) - weight).double()
        errors.append(torch.einsum("oi,ij,oj->o", e, H, e))
    best = q.scale_grid(17, 0.8, 1.2)[torch.stack(errors).argmin(dim=0)]
    assert torch.equal(found.scale, best[:, None] * scale) and len(best.unique()) > 1
    assert torch.equal(found.zero_point, zero_point) and found.bits == bits


@pytest.mark.parametrize("changes", [{}, dict(input_group=8), dict(weight_group=8)])
def test_every_way_of_a_layer_is_its_function(changes):
    """At 8 bits a layer made of the state, rotated, smoothed or both, is the layer in full
    precision, and the cost is that of its error; so with a low-rank branch."""
    for strength in (None, 0.5):
        for block in (None, 16):
            layer, data, _, _ = quantized()
            more = dict(wbits=8, abits=8, rounding="gptq", rank=1)
            cfg = PLUS.Settings(**PLAIN | changes | more)
            where = layer_of(layer), data, cfg, FastSearch()
            grids = plus_linear.grids_by(Way(strength, block), *where)
            found, _ = plus_linear.rounded(grids, cfg)
            made, state = make_layer(found["state"]), found["state"]
            assert ("smooth" in state, "hadamard" in state) == (strength is not None, bool(block))
            error = torch.cat([made(c.x) - layer(c.x) for c in data])
            assert error.norm() < 0.03 * torch.cat([c.out for c in data]).norm()
            cost = (error * torch.cat([c.grad for c in data])).square().sum().item()
            assert cost == pytest.approx(found["cost"], rel=1e-3)


def test_hadamard_keeps_the_cheaper_of_both(monkeypatch):
    """Of a layer's ways, rotated or not, smoothed or not, the state with the least cost is kept."""
    ways, costs = [], []
    grids_by, rounded = plus_linear.grids_by, plus_linear.rounded

    def recorded(way, *args):
        ways.append(way)
        return grids_by(way, *args)

    def costed(*args):
        found = rounded(*args)
        costs.append(found[0]["cost"])
        return found

    monkeypatch.setattr(plus_linear, "grids_by", recorded)
    monkeypatch.setattr(plus_linear, "rounded", costed)
    kept = quantized(hadamard=True, smoothquant=True)[-1]
    assert set(ways) == {Way(s, b) for s in plus_linear.STRENGTHS for b in (None, 16)}
    assert kept == min(costs) < max(costs) and len(costs) == len(ways)


def test_dynamic_inputs_have_a_scale_for_each_token_and_group():
    """Nothing is searched: the type and the group are in the file. Less error than static scales;
    for a group that does not divide the inputs, the nearest size that does (as in Q-DiT)."""
    _, _, state, cost = quantized(abits=4, wbits=8, input_group=4)
    assert state["act"] == dict(type="dynamic", bits=4, per="token", group_size=4)
    assert cost < 0.5 * quantized(abits=4, wbits=8, tgq_inputs=True)[-1]
    assert quantized(input_group=5)[2]["act"]["group_size"] == 4


def test_weight_groups_lower_the_layer_s_cost():
    """A scale for each output channel and group of inputs, with either rounding."""
    for how in ("nearest", "gptq"):
        flags = dict(wbits=3, abits=8, rounding=how)
        _, _, whole, before = quantized(**flags)
        _, _, state, after = quantized(**flags, weight_group=4)
        assert state["weight"]["view"] == [12, 4, 4] and "view" not in whole["weight"]
        assert after < 0.95 * before


def test_the_branch_lowers_the_layer_s_cost():
    """By rank; only layers of blocks have it."""
    flags = dict(wbits=3, abits=8, rounding="gptq", input_group=16)
    costs = [quantized(**flags, rank=r)[-1] for r in (None, 2, 6)]
    assert costs[2] < 0.7 * costs[1] < 0.7 * costs[0]


def test_dynamic_products_take_what_a_row_and_a_column_need():
    """One scale for each row of A and column of B of each head: an outlier in one of them leaves
    the error of the others' products alone."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 6)
    cfg, spec = PLUS.Settings(**PLAIN | dict(dynamic_products=True)), layer_of(None)

    def errors(a, b):
        group = torch.zeros(2, dtype=torch.long)
        chunk = MatMulChunk(torch.ones(2, 3, 5, 6), a @ b, a, b, group)
        found = PLUS.quantize_matmul(spec, LayerData([chunk], a.device, 1), cfg, FastSearch)
        error = make_layer(found["state"])(a, b) - a @ b
        assert error.square().sum().item() == pytest.approx(found["cost"], rel=1e-4)
        return error

    plain = errors(a, b)
    assert 0 < plain.norm() < 0.1 * (a @ b).norm()
    a[0, 1, 2], b[0, 1, :, 4] = 100 * a[0, 1, 2], 100 * b[0, 1, :, 4]
    loud, rest = errors(a, b), torch.ones(2, 3, 5, 6, dtype=torch.bool)
    rest[0, 1, 2], rest[0, 1, :, 4] = False, False
    assert torch.equal(loud[rest], plain[rest])
    torch.testing.assert_close(loud[0, 1, 2, 4] / 1e4, plain[0, 1, 2, 4], rtol=0, atol=1e-3)


def quant_file(tiny_run, folder, flags):
    """The layers of the tiny run's quant file of tqdit_plus.py with these flags."""
    folder.mkdir(exist_ok=True)
    for name in ("calib.pt", "grads"):
        (folder / name).symlink_to(tiny_run / name)
    command = f"--run {folder} --wbits 4 --abits 5 --rows 6".split()
    log = run_in_process("methods/tqdit_plus", *command, *flags)
    assert log.returncode == 0, log.stderr
    assert "--tag plus" in log.stdout.splitlines()[-1]
    return quant_layers(folder)


def quant_layers(folder):
    """What quant_file wrote there."""
    file = load_artifact(folder / "quant_w4a5_plus.pt", "quant", "tqdit_plus.py")
    assert file["method"] == "tqdit_plus"
    return file["layers"]


def test_edge_and_cond_bits_reach_their_layers_only(tiny_run, tmp_path):
    """--edge-bits the first and last layer, --cond-bits the weights of adaLN and embedders."""
    layers = quant_file(tiny_run, tmp_path, [*"--edge-bits 8 --cond-bits 7".split(), *STATIC])
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


def test_by_default_scales_are_taken_at_run_time(tiny_run, tmp_path):
    """Inputs of linear layers on tokens, and both operands of products; weights have groups; some
    layer is rotated. What it lacks with --rank is there then."""
    layers = quant_file(tiny_run, tmp_path, [])
    inputs = dict(type="dynamic", bits=5, per="token", group_size=32)
    assert layers["blocks.0.mlp.fc2"]["act"] == inputs
    assert layers["blocks.1.mlp.fc2"]["weight"]["scale"].shape == (32, 4, 1)
    assert layers["final_layer.linear"]["act"] == inputs | dict(bits=8)
    assert layers["blocks.1.attn.av"]["a"] == inputs | dict(group_size=None)
    assert layers["blocks.1.attn.av"]["b"]["per"] == "column"
    assert layers["blocks.0.adaLN_modulation.1"]["act"]["type"] == "none"
    assert {state.get("hadamard") for state in layers.values()} >= {32}
    assert not any("low_rank" in state for state in layers.values())
    with_rank = quant_file(tiny_run, tmp_path / "rank", ["--rank", "3"])
    found = {name for name, state in with_rank.items() if "low_rank" in state}
    kinds = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
    assert found == {f"blocks.{i}.{kind}" for i in range(2) for kind in kinds}


def test_the_last_layer_alone_is_fitted(tiny_run, tmp_path):
    """--no-fit-last leaves its bias as it was, and every other layer as it is with it."""
    fit, plain = (
        quant_file(tiny_run, tmp_path / name, flags)
        for name, flags in (("fit", []), ("plain", ["--no-fit-last"]))
    )
    last = [layers.pop("final_layer.linear") for layers in (fit, plain)]
    assert same_leaves(fit, plain)
    calib = torch.load(tiny_run / "calib.pt", weights_only=True)
    bias = torch.load(calib["settings"]["ckpt"], weights_only=True)["final_layer.linear.bias"]
    assert torch.equal(last[1]["bias"], bias) and not torch.equal(last[0]["bias"], bias)


@pytest.mark.slow
def test_two_processes_fit_the_last_layer_as_one_does(tiny_run, tmp_path):
    """The last unit waits until the other process has done its own."""
    one = quant_file(tiny_run, tmp_path / "run", [])
    (tmp_path / "run" / "quant_w4a5_plus.pt").unlink()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    flags = f"--run {tmp_path / 'run'} --wbits 4 --abits 5 --rows 6".split()
    log = run_script("methods/tqdit_plus", *flags, launcher=launcher)
    assert log.returncode == 0 and log.stdout.count("Next:") == 1, log.stderr
    assert same_leaves(quant_layers(tmp_path / "run"), one)


def test_all_switches_off_is_the_paper_s_method(tiny_run, tmp_path):
    """Without its ideas tqdit_plus.py writes 03's layers, bit for bit, at R = 1."""
    off = "--edge-bits none --cond-bits none --no-tgq-inputs --no-smoothquant --rounding nearest"
    found = quant_file(tiny_run, tmp_path, [*off.split(), *STATIC])
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --rows 6 --rounds 1"
    assert run_in_process("03_quantize", *flags.split()).returncode == 0
    expected = load_artifact(tmp_path / "quant_w4a5.pt", "quant", "03_quantize.py")["layers"]
    assert same_leaves(found, expected)


def test_04_samples_its_file_alone(tiny_run, tmp_path):
    """quant_w4a5_plus.pt and --tag plus are enough for images near full precision's."""
    quant_file(tiny_run, tmp_path / "run", [])
    shutil.move(tmp_path / "run" / "quant_w4a5_plus.pt", tmp_path)
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --tag plus --num-images 6"
    log = run_in_process("04_sample", *flags.split())
    assert log.returncode == 0, log.stderr
    files = tmp_path / "samples_w4a5_plus.npz", tiny_run / "samples_fp.npz"
    images, twins = (np.load(file)["arr_0"].astype(float) for file in files)
    assert 0 < np.abs(images - twins).mean() < 0.5 * np.abs(images - twins[::-1]).mean()


@pytest.mark.parametrize("changes", [{}, dict(weight_group=8, rounding="gptq", input_group=8)])
def test_plain_mse_chooses_otherwise_at_a_higher_weighted_cost(changes):
    """--metric mse: searched and rounded with G^(l) = 1 (D11); the report's cost has G^(l)."""
    flags = dict(wbits=3, abits=8) | changes
    layer, data, state, mse = quantized(metric="mse", **flags)
    made = make_layer(state)
    error = [(c.grad * (made(c.x, c.group) - layer(c.x))).square().sum().item() for c in data]
    assert quantized(**flags)[-1] < mse == pytest.approx(sum(error), rel=1e-3)


def test_each_metric_keeps_the_way_of_least_error_by_itself():
    """Half of the rows have outliers and hardly a gradient: by Eq. (16) inputs are rotated, by
    plain MSE smoothed too."""
    torch.manual_seed(3)
    layer, x = torch.nn.Linear(16, 12).requires_grad_(False), torch.randn(80, 16)
    x[:40] *= 10 ** torch.linspace(-1, 1, 16)
    x[40:] *= 10 ** torch.linspace(0.3, -0.3, 16)
    grad = torch.ones(80, 12)
    grad[:40] = 0.01
    data = linear_data(grad, x @ layer.weight.T, x)
    ways = [Way(*way) for way in itertools.product(plus_linear.STRENGTHS, (None, 16))]
    changes = dict(abits=4, input_group=16, rounding="gptq", smoothquant=True, hadamard=True)
    for metric, best in ("hessian", Way(None, 16)), ("mse", Way(0.5, 16)):
        cfg = PLUS.Settings(**PLAIN | changes | dict(wbits=8, metric=metric))
        errors = {}
        for way in ways:
            grids = plus_linear.grids_by(way, layer_of(layer), data, cfg, FastSearch())
            made = make_layer(plus_linear.rounded(grids, cfg)[0]["state"])
            errors[way] = error_of(made, layer, data, metric)
        kept = make_layer(PLUS.quantize_linear(layer_of(layer), data, cfg, FastSearch)["state"])
        assert min(errors, key=errors.get) == best
        assert error_of(kept, layer, data, metric) == pytest.approx(errors[best], rel=1e-4)


def error_of(made, layer, data, metric):
    """Squared error of a layer's outputs, weighted by the gradient if that is the metric."""
    weights = (c.grad if metric == "hessian" else 1 for c in data)
    errors = (made(c.x, c.group) - layer(c.x) for c in data)
    return sum((w * e).square().sum().item() for w, e in zip(weights, errors, strict=True))


def test_rounds_alternate():
    """R = 2: weight, input, weight, input."""
    calls = []

    class Counted(FastSearch):
        def __call__(self, *args):
            calls.append(type(args[2]).__name__)
            return super().__call__(*args)

    layer, data, *_ = quantized()
    PLUS.quantize_linear(layer_of(layer), data, PLUS.Settings(**PLAIN | dict(rounds=2)), Counted)
    assert calls == 2 * ["WeightLoss", "InputLoss"]


def test_gram_weighs_rows_by_their_squared_gradient():
    """Eq. (16) of a row whose outputs are alike: the mean of G^(l) over them."""
    x, grad = torch.randn(30, 4), torch.randn(30, 3) * torch.logspace(-1, 1, 30)[:, None]
    found = gram(linear_data(grad, x=x), q.FullPrecision())
    weight = torch.stack([(g * g).mean() for g in grad]).double()
    expected = sum(w * torch.outer(v, v) for w, v in zip(weight, x.double(), strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_last_layer_is_fitted_by_the_sensitivity_of_its_rows(tiny_run, tmp_path, monkeypatch):
    """Each row weighs by how much the sampler moves x with its eps."""
    seen, real = [], PLUS.fitted
    monkeypatch.setattr(PLUS, "fitted", lambda *args: seen.append(args) or real(*args))
    quant_file(tiny_run, tmp_path, [])
    ((_, _, _, importance),) = seen
    calib = load_calib(tiny_run)
    t = calib["calibration"]["t"][rows_to_search(calib, 6)]
    torch.testing.assert_close(importance, Diffusion(6).sensitivity()[t])
