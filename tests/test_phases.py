"""Phases 1 to 3 from the inside, against plain loops and plain autograd."""

import shutil
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from conftest import (
    layer_of,
    linear_data,
    load_script,
    run_in_process,
    same_leaves,
    tiny_flags,
)

import models_dit as m
import quant_ops as q
from common import fast_search, quant_file, trajectories, unit_data
from common import layer_data as d
from common import phase3 as phase3_module
from common.artifacts import load_artifact
from common.checkpoints import load_calib, load_calibrated
from common.distributed import ProcessGroup
from common.errors import InputError
from common.offload import unit_on, units
from common.phase3 import Machine, Phase3
from common.quant_file import make_quantizer, unpack_weight
from common.report import print_report, signal_to_noise
from common.trajectories import STREAM
from common.unit_data import load_units, rows_to_search, spread_rows

PHASE1, PHASE2 = load_script("01_collect_calib"), load_script("02_grad_cache")
PHASE3 = load_script("03_quantize")
CPU = torch.device("cpu")
SETTINGS = dict(
    wbits=4, abits=5, metric="hessian", mrq=True, tgq=True, rounds=2, layers="released",
    weight_granularity="channel", rows=None, tag="",
)  # fmt: skip


def settings(**changes):
    return PHASE3.Settings(**SETTINGS | changes)


def opened(run):
    """The calibration of a run, and its model with explicit products."""
    calib = load_calib(run)
    return calib, m.explicit_products(load_calibrated(calib))


def found_units(run, names, model, calib, rows=None):
    return {unit.name: unit for unit in load_units(run, names, model, calib, rows, 3, CPU)}


# ------------------------------------------------------------------------------------------------
# Phase 1


@torch.no_grad()
def test_noise_of_phases_1_and_2_follows_from_the_seed(tiny_ckpt, tmp_path):
    """--seed 3: x_0 of a trajectory behind the first batch, sampled again; renoise's own stream."""
    flags = [*tiny_flags("01_collect_calib", tmp_path, tiny_ckpt), "--seed", 3, "--cfg-scale", 1]
    assert run_in_process("01_collect_calib", *flags).returncode == 0
    with torch.enable_grad():
        log = run_in_process("02_grad_cache", "--run", tmp_path, "--eps", "renoise")
    assert log.returncode == 0, log.stderr
    calib, model = opened(tmp_path)
    diffusion, rows, held = m.Diffusion(6), calib["calibration"], calib["validation"]
    generators = m.image_generators(3, held["trajectory"][:1].tolist(), STREAM)
    x_0 = dict(m.trajectory(model, diffusion, held["y"][:1], generators, 1))[-1]
    torch.testing.assert_close(held["x_0"][:1], x_0, rtol=1e-3, atol=1e-3)
    generators = m.image_generators(3, range(len(rows["t"])), 2)  # 0: images, 1: trajectories
    eps = m.draw_noise(generators, rows["x"].shape[1:], "cpu")
    x_t = load_artifact(tmp_path / "grads" / "embed.pt", "grads", "")["unit_inputs"][0]
    torch.testing.assert_close(x_t, diffusion.q_sample(rows["x_0"], rows["t"], eps))


def draw(null_label=5):
    """20 timesteps in 4 groups, 6 tuples of each, from 8 trajectories of 5 classes."""
    rng, labels = np.random.default_rng(0), torch.arange(8) % 5
    return PHASE1.draw_tuples(rng, 20, 4, 6, np.arange(8), labels, null_label)


def test_draw_tuples_takes_n_distinct_ones_from_every_group():
    """Eq. (10): n per group, each (trajectory, t) once, each t inside its group of Eq. (9)."""
    rows = draw()
    assert rows["group"].bincount().tolist() == [6, 6, 6, 6]
    assert len(set(zip(rows["trajectory"].tolist(), rows["t"].tolist(), strict=True))) == 24
    assert (rows["t"] // 5 == rows["group"]).all()


def test_draw_tuples_gives_half_of_each_group_the_null_label():
    """D3: with guidance the network is asked under both labels; without it, never under null."""
    rows = draw()
    for i in range(4):
        assert (rows["y"][rows["group"] == i] == 5).sum() == 3
    kept = rows["y"] != 5
    assert (rows["y"][kept] == rows["trajectory"][kept] % 5).all()
    assert (draw(null_label=None)["y"] != 5).all()


@torch.no_grad()
def test_collected_rows_lie_on_the_sampler_s_trajectory(tiny_run):
    """Alg. 1 lines 4-5: x_t and x_0 of a row are those of its trajectory, sampled again here."""
    calib, model = opened(tiny_run)
    s, rows = calib["settings"], calib["calibration"]
    labelled = (rows["y"] < model.num_classes).nonzero()[0]
    pick = rows["trajectory"][labelled].item()
    generators = m.image_generators(s["seed"], [pick], STREAM)
    diffusion = m.Diffusion(s["steps"])
    path = dict(m.trajectory(model, diffusion, rows["y"][labelled], generators, s["cfg_scale"]))
    for i in (rows["trajectory"] == pick).nonzero()[:, 0]:
        expected = path[int(rows["t"][i])][0]
        torch.testing.assert_close(rows["x"][i], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(rows["x_0"][i], path[-1][0], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# Phase 2 and the unit-local passes of Phase 3


def whole_network_gradients(model, names, calib):
    """dL/d(output) of the named layers by autograd through the whole network, Eq. (11)."""
    zeros, handles = {}, []

    def hook_for(name):
        def hook(module, inputs, output):
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return hook

    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(hook_for(name)))
    rows, diffusion = calib["calibration"], m.Diffusion(calib["settings"]["steps"])
    told = diffusion.timestep_map[rows["t"]]
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    abar = abar[told][:, None, None, None]
    eps = ((rows["x"] - abar.sqrt() * rows["x_0"]) / (1 - abar).sqrt()).float()
    out = model(rows["x"], told, rows["y"])
    loss = (eps - out[:, : model.in_channels]).square().sum()
    grads = torch.autograd.grad(loss, [zeros[name] for name in names])
    for handle in handles:
        handle.remove()
    return dict(zip(names, grads, strict=True))


def test_validation_rows_come_from_trajectories_that_calibration_never_sees(tiny_ckpt, tmp_path):
    """The report's rows are held out: of trajectories behind those of the calibration rows."""
    log = run_in_process("01_collect_calib", *tiny_flags("01_collect_calib", tmp_path, tiny_ckpt))
    assert log.returncode == 0, log.stderr
    calib = load_calib(tmp_path)
    used, held = (calib[part]["trajectory"] for part in ("calibration", "validation"))
    assert used.max() < calib["settings"]["trajectories"] <= held.min()


def test_without_guidance_no_row_has_the_null_label(tiny_ckpt, tmp_path):
    """D3: --cfg-scale 1 never asks under it, so no row is of it."""
    flags = tiny_flags("01_collect_calib", tmp_path, tiny_ckpt)
    assert run_in_process("01_collect_calib", *flags, "--cfg-scale", 1).returncode == 0
    calib = load_calib(tmp_path)
    assert all((calib[part]["y"] < 5).all() for part in ("calibration", "validation"))


@torch.no_grad()
def test_guidance_covers_the_channels_asked_for_in_01_and_04(tiny_ckpt, tmp_path):
    """--cfg-channels 1: rows and images are those of trajectories guided in one channel."""
    flags = tiny_flags("01_collect_calib", tmp_path, tiny_ckpt)
    assert run_in_process("01_collect_calib", *flags, "--cfg-channels", 1).returncode == 0
    flags = "--run", tmp_path, "--fp", "--num-images", 2
    assert run_in_process("04_sample", *flags).returncode == 0
    calib, model = opened(tmp_path)
    diffusion, rows, how = m.Diffusion(6), calib["calibration"], (calib["settings"]["cfg_scale"], 1)
    i = (rows["y"] < 5).nonzero()[0]
    generators = m.image_generators(0, rows["trajectory"][i].tolist(), STREAM)
    x_0 = dict(m.trajectory(model, diffusion, rows["y"][i], generators, *how))[-1]
    torch.testing.assert_close(rows["x_0"][i], x_0, rtol=1e-3, atol=1e-3)
    generators = m.image_generators(0, [0, 1])
    *_, (_, x) = m.trajectory(model, diffusion, torch.arange(2), generators, *how)
    images = (127.5 * x + 128).clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    with np.load(tmp_path / "samples_fp.npz") as samples:
        assert np.abs(samples["arr_0"].astype(int) - images).max() <= 1


def test_seed_of_phase_1_draws_other_labels_and_tuples():
    """Classes stay equally frequent; what is drawn next differs too."""
    (one, rng), (other, more) = (
        trajectories.draw_labels(dict(seed=i, trajectories=64), 1000) for i in (0, 1)
    )
    assert not torch.equal(one, other) and rng.integers(2**60) != more.integers(2**60)


def test_renoise_adds_noise_of_the_seed_to_x_0(tiny_run):
    """--eps renoise: the gradient is taken at the x_t that this eps makes (D2)."""
    calib = load_calib(tiny_run)
    rows, diffusion = calib["calibration"], m.Diffusion(calib["settings"]["steps"])
    eps, x_t = PHASE2.noise_and_inputs(rows, diffusion, "renoise", 7)
    implied = diffusion.implied_eps(x_t, rows["x_0"], rows["t"])
    torch.testing.assert_close(eps, implied, rtol=0, atol=1e-3)
    assert not torch.equal(eps, PHASE2.noise_and_inputs(rows, diffusion, "renoise", 8)[0])


def test_every_token_has_the_time_group_of_its_row(tiny_run):
    """Rows of a linear layer's data are tokens, those of a sample next to each other."""
    calib, model = opened(tiny_run)
    unit = found_units(tiny_run, ["block_00"], model, calib)["block_00"]
    with unit_on(model, "block_00", "cpu") as function:
        data = d.layer_data(function, model.blocks[0].attn.qkv, unit, 5, None, CPU)
    found = torch.cat([chunk.group for chunk in data])
    assert torch.equal(found, unit.groups.repeat_interleave(16))


def test_unit_local_gradients_equal_autograd_of_the_whole_network(tiny_run):
    """Alg. 1 line 12, D14: what Phase 3 makes again inside a unit is dL/d(output) of each layer."""
    calib, model = opened(tiny_run)
    layers = {
        prefix + spec.name: name
        for name, prefix in units(model).items()
        for spec in m.LAYERS
        if spec.unit == name.split("_")[0]
    }
    assert len(layers) == 3 + 7 * len(model.blocks) + 2
    expected = whole_network_gradients(model, list(layers), calib)
    found = found_units(tiny_run, units(model), model, calib)
    for layer, name in layers.items():
        with unit_on(model, name, "cpu") as function:
            grad, *_ = d.capture(function, model.get_submodule(layer), found[name], 5, CPU)
        assert expected[layer].norm() > 0
        error = (grad - expected[layer]).norm() / expected[layer].norm()
        assert error <= 1e-4, layer


def test_units_take_a_stratified_subset(tiny_run):
    """--rows: equally many of every group, and the rows asked for, of inputs and gradients."""
    calib, model = opened(tiny_run)
    unit = found_units(tiny_run, ["final"], model, calib, rows=6)["final"]
    assert unit.groups.bincount().tolist() == [2, 2, 2]
    assert all(len(x) == 6 for x in (*unit.inputs, *unit.grads))


def test_units_take_the_rows_asked_for(tiny_run):
    """--rows: inputs and gradients are those of the same rows of the whole set."""
    calib, model = opened(tiny_run)
    wanted = rows_to_search(calib, 6)
    for name in ("embed", "final"):
        some, every = (found_units(tiny_run, [name], model, calib, n)[name] for n in (6, None))
        pairs = zip(some.inputs + some.grads, every.inputs + every.grads, strict=True)
        for x, whole in pairs:
            torch.testing.assert_close(x, whole[wanted], rtol=1e-4, atol=1e-4)


def test_data_of_the_patch_embedding_are_those_of_its_patches(tiny_run):
    """Gradients of a convolution have a row for each patch; D2's fallback knows its channels."""
    calib, model = opened(tiny_run)
    unit, proj = found_units(tiny_run, ["embed"], model, calib)["embed"], model.x_embedder.proj
    unit.grads[0][..., 1] = 0
    with unit_on(model, "embed", "cpu") as function:
        grad, *_ = d.capture(function, proj, unit, 5, CPU)
        data = d.layer_data(function, proj, unit, 5, None, CPU)
    width = grad.shape[1]
    assert f"1 of {width} output channels" in data.note
    found, expected = torch.cat([c.grad for c in data]), grad.permute(0, 2, 3, 1).flatten(0, 2)
    others = torch.arange(width) != 1
    assert torch.equal(found[:, others], expected[:, others]) and (found[:, 1] > 0).all()


def test_gradients_of_one_unit_at_a_time_are_held(tiny_run, monkeypatch):
    """While a unit is at work nothing is left of what was read, the embedder's among it."""
    calib, model = opened(tiny_run)
    real, read = unit_data.load_grads, []

    def load_grads(*args):
        unit = real(*args)
        read.extend(weakref.ref(x) for x in unit["unit_grads"])
        return unit

    monkeypatch.setattr(unit_data, "load_grads", load_grads)
    for _ in load_units(tiny_run, list(units(model)), model, calib, None, 3, CPU):
        assert read and not any(x() is not None for x in read)


def test_units_skipped_are_passed_through(tiny_run):
    """Line 11: a unit's inputs are the same whether or not those before it are asked for."""
    calib, model = opened(tiny_run)
    for name, unit in found_units(tiny_run, units(model), model, calib).items():
        alone = found_units(tiny_run, [name], model, calib)[name]
        for mine, other in zip(unit.inputs + unit.grads, alone.inputs + alone.grads, strict=True):
            assert torch.equal(mine, other)
    assert not found_units(tiny_run, [], model, calib)


def test_spread_rows_reach_both_ends_of_every_group():
    """The first and the last timestep of a group are among its rows; none is taken twice."""
    t, groups = torch.randperm(60), torch.arange(60) % 2
    rows = spread_rows(t, groups, 10)
    assert len(rows.unique()) == 10 and groups[rows].tolist() == [0] * 5 + [1] * 5
    for i in range(2):
        mine, all_t = t[rows[groups[rows] == i]], t[groups == i]
        assert mine.min() == all_t.min() and mine.max() == all_t.max()
    assert len(spread_rows(t, groups, 1000)) == 60


# ------------------------------------------------------------------------------------------------
# A layer's data


def test_fall_back_gives_plain_squared_error_where_there_is_no_gradient():
    """D2: a channel or a time group without gradient gets the layer's mean weight; no other."""
    grad, groups = torch.randn(6, 4, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    grad[4:] = 1e-7 * torch.randn(2, 4, 3)
    grad[:, :, 1] = 0
    rms = grad[:4][..., [0, 2]].square().mean().sqrt()
    chunks, note = d.fall_back([[g, None] for g in grad.split(4)], groups, -1, CPU)
    found = torch.cat([chunk[0] for chunk in chunks])
    torch.testing.assert_close(found[:, :, 1], rms.expand(6, 4))
    torch.testing.assert_close(found[4:], rms.expand(2, 4, 3))
    assert torch.equal(found[:4][..., [0, 2]], grad[:4][..., [0, 2]])
    assert "1 of 3 time groups" in note and "1 of 3 output channels" in note


def test_fall_back_knows_a_convolution_s_channels():
    """The channel of (N, O, H, W) is its second axis, not its last."""
    grad = torch.randn(2, 3, 4, 4)
    grad[:, 2], grad[:, 0, :, 1] = 0, 0
    ((found, _),), _ = d.fall_back([[grad, None]], torch.tensor([0, 1]), 1, CPU)
    expected = grad[:, :2].square().mean().sqrt().expand(2, 4, 4)
    torch.testing.assert_close(found[:, 2], expected)
    assert torch.equal(found[:, :2], grad[:, :2])


def test_fall_back_leaves_small_gradients_alone():
    """D2: a group at 1e-5 of the largest gradient keeps its own, and nothing is said."""
    grad = torch.ones(4, 2, 3)
    grad[2:] = 1e-5
    chunks = [[grad, None]]
    assert d.fall_back(chunks, torch.tensor([0, 0, 1, 1]), -1, CPU) == (chunks, "")


def test_fallback_is_one_line_for_a_layer_and_only_where_it_fires(tiny_run):
    """D2: Eq. (11) never sees the learned variance: the final layer's 12 channels of 24, no other
    layer's. Its search gets the mean weight there."""
    log = (tiny_run.parent / "03_quantize.log").read_text().splitlines()
    (line,) = [line for line in log if "D2" in line]
    assert line.startswith("final_layer.linear: ") and "12 of 24 output channels" in line
    calib, model = opened(tiny_run)
    unit = found_units(tiny_run, ["final"], model, calib)["final"]
    with unit_on(model, "final", "cpu") as function:
        where = function, model.final_layer.linear, unit, 5
        grad, *_ = d.capture(*where, CPU)
        given = torch.cat([chunk.grad for chunk in d.layer_data(*where, None, CPU)])
    grad = grad.flatten(0, 1)
    variance = torch.arange(grad.shape[1]) % model.out_channels >= model.in_channels
    assert (grad[:, variance] == 0).all() and (grad[:, ~variance].abs().amax(0) > 0).all()
    mean = grad[:, ~variance].square().mean().sqrt()
    torch.testing.assert_close(given[:, variance], mean.expand_as(given[:, variance]))
    assert torch.equal(given[:, ~variance], grad[:, ~variance])


def test_chunks_are_even_and_of_no_more_rows_than_fit():
    """--memory-limit: 10 rows of which 4 fit are three chunks, none of a single row."""
    columns = [torch.arange(10 * 64).view(10, 64), torch.arange(10)]  # 520 bytes a row
    limit = d.COPIES * 520 / 2**20  # MiB that one row takes
    chunks = d.split(columns, 4.5 * limit, CPU)
    assert [len(chunk[0]) for chunk in chunks] == [4, 3, 3]
    for pieces, column in zip(zip(*chunks, strict=True), columns, strict=True):
        assert torch.equal(torch.cat(pieces), column)
    assert len(d.split(columns, 1e-6, CPU)) == 10


# ------------------------------------------------------------------------------------------------
# Phase 3's searches against brute force

ALPHAS = [0.01 + i * (1.2 - 0.01) / 99 for i in range(100)]


def brute_uniform(x, bits, low=None, high=None):
    """Scale of Eq. (5), and a function that quantizes with another one, the zero point kept."""
    low = min(x.min().item() if low is None else low, 0)
    high = max(x.max().item() if high is None else high, 0)
    scale = (high - low) / (2**bits - 1)
    zero_point = -round(low / scale)

    def quantize(v, s):
        return s * ((v / s).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point)

    return scale, quantize


def linear_case(seed=0, rows=40, inputs=8, outputs=5, act=None):
    """A layer in float64, x, z and grad, and the same as LayerData."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs).double().requires_grad_(False)
    x, grad = torch.randn(rows, inputs).double(), torch.randn(rows, outputs).double()
    x = act(2 * x) if act else x
    z = x @ layer.weight.T
    return layer, x, z, grad, linear_data(grad, z, x)


def losses(deltas, grad):
    return torch.stack([((grad * delta) ** 2).sum() for delta in deltas])


def brute_linear(layer, x, z, grad, cfg):
    """Alg. 1 lines 16-18 and 22: scales of the weight's rows and of the input, the weight."""
    W = layer.weight
    ends = dict(low=W.min().item(), high=W.max().item())
    rows = [brute_uniform(row, cfg.wbits, **ends if cfg.weight_granularity == "tensor" else {})
            for row in W]  # fmt: skip
    start, quantize_x = brute_uniform(x, cfg.abits)
    scale_x = start
    for _ in range(cfg.rounds):
        x_hat = quantize_x(x, scale_x)
        table = torch.stack(
            [
                losses([x_hat @ f(W[o], a * s) - z[:, o] for a in ALPHAS], grad[:, o])
                for o, (s, f) in enumerate(rows)
            ]
        )
        if cfg.weight_granularity == "tensor":
            table = table.sum(0, keepdim=True).expand_as(table)
        scales = [ALPHAS[i] * s for i, (s, _) in zip(table.argmin(1), rows, strict=True)]
        W_hat = torch.stack([f(w, s) for w, s, (_, f) in zip(W, scales, rows, strict=True)])
        found = losses([quantize_x(x, a * start) @ W_hat.T - z for a in ALPHAS], grad)
        scale_x = ALPHAS[found.argmin()] * start
    return scales, scale_x, W_hat


@pytest.mark.parametrize("metric", ["hessian", "mse"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_quantize_linear_equals_brute_force(metric, granularity):
    """Alg. 1 lines 16-22: all alphas for every channel, then all for the input, R times."""
    layer, x, z, grad, data = linear_case()
    cfg = settings(metric=metric, weight_granularity=granularity)
    state = PHASE3.quantize_linear(layer_of(layer), data, cfg, q.search)["state"]
    g = torch.ones_like(grad) if metric == "mse" else grad
    scales, scale_x, W_hat = brute_linear(layer, x, z, g, cfg)
    found = state["weight"]["scale"].flatten().double()
    expected = torch.tensor(scales)[: len(found)].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert len(found) == (1 if granularity == "tensor" else 5)
    assert state["act"]["scale"].item() == pytest.approx(scale_x, rel=1e-5)
    weight = unpack_weight(state["weight"]).double()
    torch.testing.assert_close(weight, W_hat, rtol=1e-4, atol=1e-6)


def test_quantize_linear_searches_both_scales_after_gelu():
    """Line 20, D9: s_1 with s_2 fixed, then s_2 with the new s_1, each on its own alpha grid."""
    layer, x, z, grad, data = linear_case(1, act=torch.nn.functional.gelu)
    cfg = settings(rounds=1)
    state = PHASE3.quantize_linear(layer_of(layer, post_gelu=True), data, cfg, q.search)["state"]
    W_hat, half = unpack_weight(state["weight"]).double(), 2 ** (cfg.abits - 1)
    first = [-x.min().item() / half, x.max().item() / (half - 1)]

    def loss(s1, s2):
        low, high = (x / s1).round().clamp(-half, 0) * s1, (x / s2).round().clamp(0, half - 1) * s2
        return ((grad * (torch.where(x < 0, low, high) @ W_hat.T - z)) ** 2).sum()

    s1 = min((a * first[0] for a in ALPHAS), key=lambda s: loss(s, first[1]))
    s2 = min((a * first[1] for a in ALPHAS), key=lambda s: loss(s1, s))
    assert state["act"]["scale1"].item() == pytest.approx(s1, rel=1e-5)
    assert state["act"]["scale2"].item() == pytest.approx(s2, rel=1e-5)


def matmul_case():
    """z = A B after a softmax, sharp in time group 0 and flat in 1: columns, and LayerData."""
    torch.manual_seed(2)
    sharpness = torch.tensor([3.0, 3, 3, 0.1, 0.1, 0.1])[:, None, None, None]
    a = (torch.randn(6, 2, 40, 40).double() * sharpness).softmax(-1)
    b, grad = torch.randn(2, 6, 2, 40, 3).double()
    columns = grad, a @ b, a, b, torch.tensor([0, 0, 0, 1, 1, 1])
    chunks = zip(*(column.split(4) for column in columns), strict=True)
    return columns, d.LayerData([d.MatMulChunk(*chunk) for chunk in chunks], CPU, 2)


@pytest.mark.parametrize("metric", ["hessian", "mse"])
@pytest.mark.parametrize("tgq", [True, False])
@pytest.mark.parametrize("mrq", [True, False])
def test_quantize_matmul_equals_brute_force(tgq, mrq, metric):
    """Alg. 1 lines 24-33, R = 2: s_1 (or alpha) of every time group on that group's rows, then B;
    the cost is Eq. (16) of that, whatever was searched by."""
    (grad, z, a, b, groups), data = matmul_case()
    cfg = settings(tgq=tgq, mrq=mrq, metric=metric)
    found = PHASE3.quantize_matmul(layer_of(None, post_softmax=True), data, cfg, q.search)
    state, g = found["state"], torch.ones_like(grad) if metric == "mse" else grad
    (scale_b, quantize_b), half = brute_uniform(b, cfg.abits), 2 ** (cfg.abits - 1)

    def best_for(rows, b_hat):
        scale, make = brute_uniform(a[rows], cfg.abits)
        candidates = [alpha * scale for alpha in ALPHAS]
        if mrq:
            candidates = [2.0**-i / half for i in range(20)]
            make = lambda v, s: q.mrq_softmax(v, torch.tensor(s).double(), cfg.abits)  # noqa: E731
        tried = [make(a[rows], s) for s in candidates]
        best = losses([x @ b_hat[rows] - z[rows] for x in tried], g[rows]).argmin()
        return candidates[best], tried[best]

    which, alpha = [groups == i for i in range(2)] if tgq else [groups >= 0], 1.0
    for _ in range(cfg.rounds):
        best = [best_for(rows, quantize_b(b, alpha * scale_b)) for rows in which]
        a_hat = torch.cat([x for _, x in best])
        tried = [a_hat @ quantize_b(b, x * scale_b) - z for x in ALPHAS]
        alpha = ALPHAS[losses(tried, g).argmin()]
    expected = torch.tensor([s for s, _ in best]).double()
    scales = state["a"]["scale1" if mrq else "scale"]
    assert scales.ndim == (1 if tgq else 0)
    torch.testing.assert_close(scales.flatten().double(), expected, rtol=1e-5, atol=0)
    assert not tgq or expected[0] != expected[1]  # or the test would not see the groups
    assert state["b"]["scale"].item() == pytest.approx(alpha * scale_b, rel=1e-5)
    cost = losses([a_hat @ quantize_b(b, alpha * scale_b) - z], grad).item()
    assert found["cost"] == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("metric", ["hessian", "mse"])
def test_cost_is_weighted_whatever_the_metric(metric):
    """The report's cost is Eq. (16) of what was chosen, by HO or by plain MSE (D11)."""
    layer, x, z, grad, data = linear_case()
    found = PHASE3.quantize_linear(layer_of(layer), data, settings(metric=metric), q.search)
    W_hat = unpack_weight(found["state"]["weight"]).double()
    error = make_quantizer(found["state"]["act"])(x) @ W_hat.T - z
    assert found["cost"] == pytest.approx((grad * error).square().sum().item(), rel=1e-4)


# ------------------------------------------------------------------------------------------------
# 03 as a whole


@pytest.fixture(scope="module")
def quantized(tiny_run, tmp_path_factory):
    """quantized(flags): the layers that 03 writes on six rows of the tiny run, R = 1."""
    run = tmp_path_factory.mktemp("quantized")
    for name in ("calib.pt", "grads"):
        (run / name).symlink_to(tiny_run / name)

    @cache
    def layers(flags):
        common = f"--run {run} --wbits 4 --abits 5 --rows 6 --rounds 1 --force {flags}"
        log = run_in_process("03_quantize", *common.split())
        assert log.returncode == 0, log.stderr
        return load_artifact(run / "quant_w4a5.pt", "quant", "03_quantize.py")["layers"]

    return layers


def test_each_switch_of_table_3_changes_its_own_quantizers(quantized):
    """--no-mrq makes softmax and GELU uniform, --no-tgq one scale for all groups; D6's sets."""
    full, plain = quantized("--layers all"), quantized("--no-mrq --no-tgq")
    softmax, gelu = "blocks.0.attn.av", "blocks.1.mlp.fc2"
    assert full[softmax]["a"]["type"] == "softmax" and full[gelu]["act"]["type"] == "gelu"
    assert plain[softmax]["a"]["type"] == plain[gelu]["act"]["type"] == "uniform"
    assert full[softmax]["a"]["scale1"].shape == (3,) and plain[softmax]["a"]["scale"].ndim == 0
    assert {name.rpartition(".")[2] for name in full.keys() - plain} == {"0", "1", "2"}
    assert all("adaLN" in name or "t_embedder" in name for name in full.keys() - plain)
    assert full["x_embedder.proj"]["act"]["type"] == "uniform"
    assert plain["x_embedder.proj"]["act"]["type"] == "none"
    qk = full["blocks.0.attn.qk"]
    assert qk["b"]["bits"] == 5 and full["blocks.0.attn.qkv"]["weight"]["bits"] == 4


@pytest.mark.parametrize("machine", ["--search plain", "--memory-limit 0.01"])
def test_machine_flags_change_no_scale_and_no_code(machine, quantized):
    """The plain search, and other chunks, write the same layers, bit for bit."""
    assert same_leaves(quantized(""), quantized(machine))


def test_search_plain_never_asks_the_fast_one(tiny_run, tmp_path, monkeypatch):
    """--search plain is the definition."""
    for name in ("calib.pt", "grads"):
        (tmp_path / name).symlink_to(tiny_run / name)
    monkeypatch.setattr(fast_search.FastSearch, "__call__", pytest.fail)
    flags = f"--run {tmp_path} --wbits 4 --abits 4 --rows 3 --rounds 1 --search plain"
    assert run_in_process("03_quantize", *flags.split()).returncode == 0


@torch.no_grad()
def test_signal_to_noise_equals_the_definition(tiny_run):
    """10 log10 of energy over error of eps, per group, and weighted by (d x_(t-1) / d eps)^2."""
    calib, model = opened(tiny_run)

    class Off(torch.nn.Module):
        def forward(self, x, t, y):
            return model(x, t, y) + 0.01 * t[:, None, None, None] / 1000

    report = signal_to_noise(model, Off(), calib, 4, CPU)
    rows, diffusion = calib["validation"], m.Diffusion(calib["settings"]["steps"])
    told = diffusion.timestep_map[rows["t"]]
    eps = model(rows["x"], told, rows["y"])[:, : model.in_channels]
    signal = eps.square().sum((1, 2, 3))
    noise = (0.01 * told / 1000) ** 2 * eps[0].numel()
    weight = diffusion.sensitivity()[rows["t"]]
    expected = 10 * torch.log10((weight * signal).sum() / (weight * noise).sum())
    assert report["snr_weighted"] == pytest.approx(expected.item(), abs=0.01)
    for i, found in enumerate(report["snr_per_group"]):
        mine = (rows["group"] == i) & (told > 0)  # at 0 there is no error here
        expected = 10 * torch.log10(signal[rows["group"] == i].sum() / noise[mine].sum())
        assert found == pytest.approx(expected.item(), abs=0.01)


def test_report_names_the_costliest_layers_first(capsys):
    print_report(dict(snr_per_group=[1.0], snr_weighted=1.0, costs=dict(a=1.0, b=3.0)))
    assert capsys.readouterr().out.endswith("b 75%, a 25%\n")


def test_signal_to_noise_of_no_number_is_none(tiny_run):
    """A network that breaks is not taken for one without error."""
    calib, model = opened(tiny_run)
    report = signal_to_noise(model, lambda *inputs: torch.nan * model(*inputs), calib, 4, CPU)
    assert np.isnan(report["snr_weighted"]) and np.isnan(report["snr_per_group"]).all()


# ------------------------------------------------------------------------------------------------
# A method without gradients, and one that works in order


def driver(run, tmp_path, **how):
    """A Phase 3 of its own in a run without grads/."""
    shutil.copy(run / "calib.pt", tmp_path)
    where = Machine(CPU, 4, None, False)
    settings = dict(wbits=4, abits=4, rows=None, tag="own")
    return Phase3(tmp_path, "w4a4_own", "own", settings, where, **how)


def rounded_layers(phase3, unit, bits=4):
    """The weights of a unit's linear layers on min-max grids, softmax outputs on one grid for each
    time group: name -> dict(state, cost)."""
    done, by_group = {}, q.SoftmaxQuantizer(3, torch.tensor([0.001, 0.01, 0.1]))
    for layer in phase3.layers(unit, conditioning=False):
        if layer.spec.post_softmax:
            state = quant_file.matmul_state(by_group, q.FullPrecision())
            done[layer.name] = dict(state=state, cost=1.0)
        if not isinstance(layer.module, m.MatMul):
            weight = layer.module.weight.detach().flatten(1)
            Q_W = q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), bits)[0]
            state = quant_file.linear_state(layer.module, Q_W(weight), Q_W, q.FullPrecision())
            done[layer.name] = dict(state=state, cost=1.0)
    return done


def test_without_gradients_all_rows_weigh_the_same(tiny_run, tmp_path):
    """No grads/ is needed; G^(l) = 1, and inputs and outputs are the layer's own."""
    phase3 = driver(tiny_run, tmp_path, gradients=False)
    assert not phase3.is_done()
    for unit in phase3.units():
        for layer in phase3.layers(unit, conditioning=True):
            for chunk in phase3.data(layer):
                assert (chunk.grad == 1).all() and chunk.grad.shape == chunk.out.shape
                if not isinstance(layer.module, m.MatMul):
                    weight = layer.module.weight.flatten(1)
                    torch.testing.assert_close(chunk.x @ weight.T, chunk.out, rtol=1e-4, atol=1e-4)
        phase3.save(unit, rounded_layers(phase3, unit))
    phase3.finish()
    file = load_artifact(tmp_path / "quant_w4a4_own.pt", "quant", "")
    assert file["inputs"].keys() == {"calib", "checkpoint"} and "eps" not in file["settings"]


def test_in_order_inputs_come_out_of_the_quantized_units_before(tiny_run, tmp_path):
    """Of every unit: those that a hook sees in the finished quantized model; resumed or not."""
    seen, phase3 = {}, driver(tiny_run, tmp_path, gradients=False, in_order=True)
    phase3.is_done()
    for unit in phase3.units():
        if unit != "block_01":
            seen[unit] = phase3.quantized_inputs()
        phase3.save(unit, rounded_layers(phase3, unit))
    phase3.finish()
    artifact = quant_file.load_quant(tmp_path / "quant_w4a4_own.pt")
    model, rows = quant_file.build_quantized(artifact, ""), phase3.calib["calibration"]
    told = m.Diffusion(6).timestep_map[rows["t"]]
    got, final = [], model.final_layer
    final.register_forward_pre_hook(lambda module, inputs: got.extend(inputs[:2]))
    model(rows["x"], told, rows["y"])
    torch.testing.assert_close(seen["final"], got)
    full = phase3.unit.inputs[0]
    assert (full - got[0]).norm() > 0.01 * full.norm()  # the full-precision ones are others


def test_in_order_is_for_one_process(tiny_run, tmp_path, monkeypatch):
    """Several processes would each start from full precision: refused in one line."""
    monkeypatch.setattr(phase3_module, "join_process_group", lambda: ProcessGroup(0, 2))
    with pytest.raises(InputError, match="own works through the network in order: run one process"):
        driver(tiny_run, tmp_path, gradients=False, in_order=True)
