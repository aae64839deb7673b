"""Phases 1 to 3 from the inside, against plain loops and plain autograd."""

import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import load_script

import models_dit as m
import quant_ops as q

PHASE1, PHASE2, PHASE3 = map(load_script, ("01_collect_calib", "02_grad_cache", "03_quantize"))
OPTIONS = dict(
    wbits=4, abits=5, metric="hessian", mrq=True, tgq=True, rounds=2, layers="released",
    weight_granularity="channel", rows=None, batch_size=3, memory_limit=0.02,
    device=torch.device("cpu"), edge_bits=None, cond_bits=None, tgq_inputs=False, balance=False,
    rounding="nearest", compile=False,
)  # fmt: skip


def options(**changes):
    return Namespace(**OPTIONS | changes)


def one_unit(name, model, calib, args):
    (unit,) = PHASE3.load_units([name], model, calib, args)
    return unit


def quantized_units(names, model, calib, args):
    """States and costs of the layers of these units, by layer name."""
    done = {}
    for unit in PHASE3.load_units(names, model, calib, args):
        done |= PHASE3.quantize_unit(unit, model, args)
    return done


# ------------------------------------------------------------------------------------------------
# Phase 1


def draw(steps=20, groups=4, per_group=6, cfg_scale=1.5):
    args = Namespace(steps=steps, groups=groups, cfg_scale=cfg_scale)
    rng, labels = np.random.default_rng(0), torch.arange(8) % 5
    return PHASE1.draw_rows(rng, args, np.arange(8), per_group, labels, null_label=5)


def test_draw_rows_takes_n_distinct_tuples_from_every_group():
    """Eq. (10): n per group, each (trajectory, t) once, each t inside its group of Eq. (9)."""
    rows = draw()
    assert rows["group"].bincount().tolist() == [6, 6, 6, 6]
    assert len(set(zip(rows["trajectory"].tolist(), rows["t"].tolist(), strict=True))) == 24
    assert (rows["t"] // 5 == rows["group"]).all()


def test_draw_rows_gives_half_of_each_group_the_null_label():
    """D3: with guidance the network is asked under both labels; without it, never under null."""
    rows = draw()
    for i in range(4):
        assert (rows["y"][rows["group"] == i] == 5).sum() == 3
    kept = rows["y"] != 5
    assert (rows["y"][kept] == rows["trajectory"][kept] % 5).all()
    assert (draw(cfg_scale=1)["y"] != 5).all()


def test_collected_rows_lie_on_the_sampler_s_trajectory(tiny_run):
    """x_t and x_0 of a row are those of its trajectory, sampled again here."""
    calib = m.load_calib(tiny_run)
    s, rows = calib["settings"], calib["calibration"]
    model = m.load_calibrated(calib)
    pick = int(rows["trajectory"][0])
    labels = rows["y"][(rows["trajectory"] == pick) & (rows["y"] < model.num_classes)]
    if not len(labels):
        pytest.skip("the trajectory kept null-label rows only")
    generators = m.image_generators(s["seed"], [pick], PHASE1.STREAM)
    with torch.no_grad():
        steps = m.trajectory(model, m.Diffusion(s["steps"]), labels[:1], generators, s["cfg_scale"])
        path = dict(steps)
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
    t = rows["t"]
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    abar = abar[diffusion.timestep_map[t]][:, None, None, None]
    eps = ((rows["x"] - abar.sqrt() * rows["x_0"]) / (1 - abar).sqrt()).float()
    out = model(rows["x"], diffusion.timestep_map[t], rows["y"])
    loss = (eps - out[:, : model.in_channels]).square().sum()
    grads = torch.autograd.grad(loss, [zeros[name] for name in names])
    for handle in handles:
        handle.remove()
    return dict(zip(names, grads, strict=True))


def test_unit_local_gradients_equal_autograd_of_the_whole_network(tiny_run):
    """Alg. 1 line 12: what Phase 3 recomputes inside a unit is dL/d(output) of every layer."""
    calib, args = m.load_calib(tiny_run), options(run=tiny_run)
    model = m.explicit_products(m.load_calibrated(calib))
    layers = {}
    for name, prefix in m.units(model).items():
        kind = name.split("_")[0]
        layers |= {prefix + c: name for c in PHASE3.RELEASED[kind] + PHASE3.EXTRA[kind]}
    expected = whole_network_gradients(model, list(layers), calib)
    assert len(layers) == 3 + 7 * len(model.blocks) + 2
    loaded = {unit.name: unit for unit in PHASE3.load_units(m.units(model), model, calib, args)}
    for layer, name in layers.items():
        module = model.get_submodule(layer)
        with m.unit_on(model, name, "cpu") as function:
            chunks = PHASE3.capture(function, module, loaded[name], args)
        found = torch.cat([chunk[0] for chunk in chunks])
        assert expected[layer].norm() > 0
        error = (found - expected[layer]).norm() / expected[layer].norm()
        assert error <= 1e-4, layer


def test_units_take_a_stratified_subset(tiny_run):
    """--rows: equally many of every group, and the rows asked for, of inputs and gradients."""
    calib = m.load_calib(tiny_run)
    model, groups = m.load_calibrated(calib), calib["settings"]["groups"]
    unit = one_unit("final", model, calib, options(run=tiny_run, rows=2 * groups))
    assert unit.groups.bincount().tolist() == [2] * groups
    assert all(len(x) == 2 * groups for x in (*unit.inputs, *unit.grads))


def test_units_skipped_are_passed_through(tiny_run):
    """Line 11: a unit's inputs are the same whether or not those before it are asked for."""
    calib, args = m.load_calib(tiny_run), options(run=tiny_run)
    model = m.explicit_products(m.load_calibrated(calib))
    for unit in PHASE3.load_units(m.units(model), model, calib, args):
        alone = one_unit(unit.name, model, calib, args)
        for mine, other in zip(unit.inputs + unit.grads, alone.inputs + alone.grads, strict=True):
            assert torch.equal(mine, other)
    assert not list(PHASE3.load_units([], model, calib, args))


def test_spread_rows_reach_both_ends_of_every_group():
    """The first and the last timestep of a group are among its rows; none is taken twice."""
    t, groups = torch.randperm(60), torch.arange(60) % 2
    rows = PHASE3.spread_rows(t, groups, 10)
    assert len(rows.unique()) == 10 and groups[rows].tolist() == [0] * 5 + [1] * 5
    for i in range(2):
        mine, all_t = t[rows[groups[rows] == i]], t[groups == i]
        assert mine.min() == all_t.min() and mine.max() == all_t.max()
    assert len(PHASE3.spread_rows(t, groups, 1000)) == 60


def test_patch_dead_gives_plain_squared_error_where_there_is_no_gradient():
    """D2: a channel or a time group without gradient gets the layer's mean weight; no other."""
    grad = torch.randn(6, 4, 3)
    grad[4:] = 1e-7 * torch.randn(2, 4, 3)
    grad[:, :, 1] = 0
    rms = grad[:4][..., [0, 2]].square().mean().sqrt()
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    chunks = [[g, None] for g in grad.split(4)]
    found = torch.cat([chunk[0] for chunk in PHASE3.patch_dead(chunks, groups)])
    torch.testing.assert_close(found[:, :, 1], rms.expand(6, 4))
    torch.testing.assert_close(found[4:], rms.expand(2, 4, 3))
    assert torch.equal(found[:4][..., [0, 2]], grad[:4][..., [0, 2]])


def test_patch_dead_knows_a_convolution_s_channels():
    """The channel of (N, O, H, W) is its second axis, not its last."""
    grad = torch.randn(2, 3, 4, 4)
    grad[:, 2], grad[:, 0, :, 1] = 0, 0
    (found, _), = PHASE3.patch_dead([[grad, None]], torch.tensor([0, 1]), channel=1)
    expected = grad[:, :2].square().mean().sqrt().expand(2, 4, 4)
    torch.testing.assert_close(found[:, 2], expected)
    assert torch.equal(found[:, :2], grad[:, :2])


def test_final_layer_falls_back_in_the_variance_channels_only(tiny_run):
    """D2: Eq. (11) never sees the learned variance, so those gradients are exactly zero."""
    calib, args = m.load_calib(tiny_run), options(run=tiny_run)
    model = m.explicit_products(m.load_calibrated(calib))
    unit = one_unit("final", model, calib, args)
    with m.unit_on(model, "final", "cpu") as function:
        chunks = PHASE3.capture(function, model.final_layer.linear, unit, args)
    size = torch.cat([chunk[0] for chunk in chunks]).abs().amax((0, 1))
    variance = torch.arange(len(size)) % model.out_channels >= model.in_channels
    assert (size[variance] == 0).all() and (size[~variance] > 0).all()


# ------------------------------------------------------------------------------------------------
# Phase 3's searches against brute force

ALPHAS = [0.01 + i * (1.2 - 0.01) / 99 for i in range(100)]


def brute_uniform(x, bits, low=None, high=None):
    """Step and zero point of Eq. (5), and a function that quantizes with alpha times the step."""
    low = min(x.min().item() if low is None else low, 0)
    high = max(x.max().item() if high is None else high, 0)
    step = (high - low) / (2**bits - 1)
    zero = -round(low / step)
    return step, lambda v, s: s * ((v / s).round() + zero).clamp(0, 2**bits - 1).sub(zero)


def linear_case(seed=0, rows=40, inputs=8, outputs=5):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs).double()
    x, grad = torch.randn(rows, inputs).double(), torch.randn(rows, outputs).double()
    y = (x @ layer.weight.T).detach()
    return layer.requires_grad_(False), x, y, grad


@pytest.mark.parametrize("metric", ["hessian", "mse"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_quantize_linear_equals_brute_force(metric, granularity):
    """Alg. 1 lines 16-22: all alphas for every channel, then all for the input, R times."""
    layer, x, y, grad = linear_case()
    columns = grad, y, x, torch.zeros(len(x)).long()
    chunks = list(zip(*(column.split(7) for column in columns), strict=True))
    args = options(metric=metric, weight_granularity=granularity)
    w, found, _, act = PHASE3.quantize_linear(layer.weight, chunks, "uniform", args)
    g = torch.ones_like(grad) if metric == "mse" else grad
    in_step, quantize_x = brute_uniform(x, args.abits)
    xs = in_step
    ends = dict(low=layer.weight.min().item(), high=layer.weight.max().item())
    ends = ends if granularity == "tensor" else {}
    for _ in range(args.rounds):
        xq = quantize_x(x, xs)
        tables, rows = [], []
        for o in range(len(y[0])):
            row = layer.weight[o]
            step, quantize_w = brute_uniform(row, args.wbits, **ends)
            deltas = [xq @ quantize_w(row, a * step) - y[:, o] for a in ALPHAS]
            losses = [((g[:, o] * delta) ** 2).sum() for delta in deltas]
            tables.append(torch.stack(losses))
            rows.append((row, step, quantize_w))
        table = torch.stack(tables)
        if granularity == "tensor":
            table = table.sum(0, keepdim=True).expand_as(table)
        best = [ALPHAS[i] for i in table.argmin(1).tolist()]
        steps = [a * step for a, (_, step, _) in zip(best, rows, strict=True)]
        wq = torch.stack([f(row, s) for s, (row, _, f) in zip(steps, rows, strict=True)])
        losses = [((g * (quantize_x(x, a * in_step) @ wq.T - y)) ** 2).sum() for a in ALPHAS]
        xs = ALPHAS[torch.stack(losses).argmin()] * in_step
    found = found.flatten().double()
    torch.testing.assert_close(found, torch.tensor(steps)[: len(found)].double(), rtol=1e-5, atol=0)
    assert act.step.item() == pytest.approx(xs, rel=1e-5)
    torch.testing.assert_close(w.double(), wq, rtol=1e-4, atol=1e-6)


def test_quantize_linear_searches_both_steps_after_gelu():
    """D9: s_1 with s_2 fixed, then s_2 with the new s_1, each on its own alpha grid."""
    layer, x, _, grad = linear_case(1)
    x = torch.nn.functional.gelu(2 * x)
    y = x @ layer.weight.T
    args, group = options(rounds=1), torch.zeros(len(x)).long()
    wq, _, _, act = PHASE3.quantize_linear(layer.weight, [(grad, y, x, group)], "gelu", args)
    wq, half = wq.double(), 2 ** (args.abits - 1)
    first = [-x.min().item() / half, x.max().item() / (half - 1)]

    def loss(s1, s2):
        low, high = (x / s1).round().clamp(-half, 0) * s1, (x / s2).round().clamp(0, half - 1) * s2
        return ((grad * (torch.where(x < 0, low, high) @ wq.T - y)) ** 2).sum()

    s1 = min((a * first[0] for a in ALPHAS), key=lambda s: loss(s, first[1]))
    s2 = min((a * first[1] for a in ALPHAS), key=lambda s: loss(s1, s))
    assert act.step1.item() == pytest.approx(s1, rel=1e-5)
    assert act.step2.item() == pytest.approx(s2, rel=1e-5)


@pytest.mark.parametrize("tgq", [True, False])
@pytest.mark.parametrize("mrq", [True, False])
def test_quantize_matmul_equals_brute_force(tgq, mrq):
    """Alg. 1 lines 24-33: s_1 (or alpha) of every time group on that group's rows, then B."""
    torch.manual_seed(2)
    sharpness = torch.tensor([3.0, 3, 3, 0.1, 0.1, 0.1])[:, None, None, None]
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    a = (torch.randn(6, 2, 40, 40).double() * sharpness).softmax(-1)
    b = torch.randn(6, 2, 40, 3).double()
    grad = torch.randn(6, 2, 40, 3).double()
    y = a @ b
    args = options(rounds=1, tgq=tgq, mrq=mrq)
    columns = (grad, y, a, b, groups)
    chunks = [list(c) for c in zip(*(v.split(4) for v in columns), strict=True)]
    state = PHASE3.quantize_matmul(chunks, True, groups, args)
    step_b, quantize_b = brute_uniform(b, args.abits)
    bq, half = quantize_b(b, step_b), 2 ** (args.abits - 1)

    def best_for(rows):
        if mrq:
            candidates = [2.0**-i / half for i in range(20)]
            make = lambda v, s: q.mrq_softmax(v, torch.tensor(s).double(), args.abits)  # noqa: E731
        else:
            step, make = brute_uniform(a[rows], args.abits)
            candidates = [alpha * step for alpha in ALPHAS]
        part = grad[rows], y[rows], bq[rows]
        return min(
            candidates,
            key=lambda s: ((part[0] * (make(a[rows], s) @ part[2] - part[1])) ** 2).sum(),
        )

    which = [groups == i for i in range(2)] if tgq else [groups >= 0]
    expected = torch.tensor([best_for(rows) for rows in which])
    found = state["a"]["step1" if mrq else "step"]
    assert found.ndim == (1 if tgq else 0)
    torch.testing.assert_close(found.flatten().float(), expected.float(), rtol=1e-5, atol=0)
    if tgq:
        assert expected[0] != expected[1]  # or the test would not see the groups
    aq = q.make_quantizer(state["a"])(a, groups)
    losses = [((grad * (aq @ quantize_b(b, x * step_b) - y)) ** 2).sum() for x in ALPHAS]
    best = ALPHAS[torch.stack(losses).argmin()] * step_b
    assert state["b"]["step"].item() == pytest.approx(best, rel=1e-5)


def test_each_switch_of_table_3_changes_its_own_quantizers(tiny_run):
    """--no-mrq makes softmax and GELU uniform, --no-tgq one step for all groups; D6's sets."""
    calib = m.load_calib(tiny_run)
    model = m.explicit_products(m.load_calibrated(calib))

    def quantized(**changes):
        args = options(run=tiny_run, rounds=1, **changes)
        done = quantized_units(["block_00"], model, calib, args)
        return {name.removeprefix("blocks.0."): layer["state"] for name, layer in done.items()}

    full, plain = quantized(layers="all"), quantized(mrq=False, tgq=False)
    assert full["attn.av"]["a"]["type"] == "softmax" and full["mlp.fc2"]["act"]["type"] == "gelu"
    assert full["attn.av"]["a"]["step1"].shape == (calib["settings"]["groups"],)
    assert plain["attn.av"]["a"]["type"] == plain["mlp.fc2"]["act"]["type"] == "uniform"
    assert plain["attn.av"]["a"]["step"].ndim == 0
    assert set(full) - set(plain) == {"adaLN_modulation.1"}
    assert full["attn.qk"]["b"]["bits"] == 5 and full["attn.qkv"]["weight"]["bits"] == 4


@pytest.mark.parametrize("kind", ["uniform", "gelu"])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("tgq_inputs", [False, True])
def test_search_on_integers_chooses_what_the_float_search_chooses(kind, bits, tgq_inputs):
    """The same steps of weights and inputs, and the same objective to 1e-5."""
    torch.manual_seed(bits)
    layer, group = torch.nn.Linear(64, 24).requires_grad_(False), torch.arange(150) // 50
    x = torch.nn.functional.gelu(2 * torch.randn(150, 64))
    columns = torch.randn(150, 24), layer(x), x, group
    chunks = list(zip(*(column.split(40) for column in columns), strict=True))
    args = options(wbits=bits, abits=bits, tgq_inputs=tgq_inputs)
    results, losses = [], []
    for product in (q.FloatProduct, q.IntProduct):
        found = PHASE3.quantize_linear(layer.weight, chunks, kind, args, layer.bias, product)
        w, step, zero, act = found
        results.append([w, step, zero, *act.buffers()])
        codes = product.quantize_weight(layer.weight, step, zero, bits)
        delta = product.error(product.quantize_input(act, x, group), codes, layer(x) - layer.bias)
        losses.append(q.hessian_loss(delta, columns[0]).item())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("device, unit, kind, rows, outputs, product", [
    ("cpu", True, "uniform", 40, 24, q.IntProduct),
    ("cpu", True, "gelu", 3, 23, q.IntProduct),
    ("cpu", True, "fp", 40, 24, q.FloatProduct),  # inputs that are no integers
    ("cpu", False, "uniform", 40, 24, q.FloatProduct),
    ("cuda", True, "uniform", 40, 24, q.IntProduct),
    ("cuda", True, "uniform", 16, 24, q.FloatProduct),  # shapes that CUDA's unit does not take
    ("cuda", True, "uniform", 40, 23, q.FloatProduct),
])  # fmt: skip
def test_products_are_on_integers_where_they_can(monkeypatch, device, unit, kind, rows, outputs,
                                                 product):  # fmt: skip
    """Codes where there is a unit for them, it takes the shapes, and the inputs are quantized."""
    monkeypatch.setattr(PHASE3, "has_int_unit", lambda device: unit)
    chunks = [[None, None, torch.zeros(n, 64), None] for n in (50, rows)]
    args = options(device=torch.device(device))
    assert PHASE3.product_for(torch.zeros(outputs, 64), chunks, kind, args) is product


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("product", [q.FloatProduct, q.IntProduct])
def test_compiled_search_chooses_the_same_steps(product):
    """--compile fuses passes over memory and changes no step."""
    torch.manual_seed(0)
    layer, group = torch.nn.Linear(64, 24).requires_grad_(False), torch.arange(150) // 50
    x = torch.nn.functional.gelu(2 * torch.randn(150, 64))
    columns = torch.randn(150, 24), layer(x), x, group
    chunks = list(zip(*(column.tensor_split(4) for column in columns), strict=True))
    found = []
    for flag in (False, True):
        args = options(compile=flag, tgq_inputs=True)
        w, step, _, act = PHASE3.quantize_linear(
            layer.weight, chunks, "gelu", args, layer.bias, product
        )
        found.append([w, step, *act.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_chunks_are_even_and_of_no_more_rows_than_fit():
    """--memory-limit: 10 rows of which 4 fit are three chunks, none of a single row."""
    columns = [torch.arange(10 * 64).view(10, 64), torch.arange(10)]  # 520 bytes a row
    limit = PHASE3.COPIES * 520 / 2**20  # MiB that one row takes
    chunks = PHASE3.split(columns, options(memory_limit=4.5 * limit))
    assert [len(chunk[0]) for chunk in chunks] == [4, 3, 3]
    for pieces, column in zip(zip(*chunks, strict=True), columns, strict=True):
        assert torch.equal(torch.cat(pieces), column)
    assert len(PHASE3.split(columns, options(memory_limit=1e-6))) == 10


def test_search_does_not_depend_on_the_chunks(tiny_run):
    """--memory-limit: the same steps from one chunk as from many."""
    calib, states = m.load_calib(tiny_run), []
    model = m.explicit_products(m.load_calibrated(calib))
    for limit in (0.01, None):
        args = options(run=tiny_run, memory_limit=limit, rounds=1)
        states.append(quantized_units(["block_00"], model, calib, args))
    for name, layer in states[0].items():
        state, other = layer["state"], states[1][name]["state"]
        for part in ("weight", "act", "a", "b"):
            for key, value in state.get(part, {}).items():
                if not isinstance(value, str):  # the quantizer's type
                    value, there = map(torch.as_tensor, (value, other[part][key]))
                    assert torch.equal(value, there), (name, part, key)


# ------------------------------------------------------------------------------------------------
# Beyond the paper


def test_tgq_inputs_fits_every_group_to_its_own_rows():
    """Each time group's step is the one that its rows alone choose, with the same weights."""
    layer, x, _, grad = linear_case(3, rows=60)
    group = torch.arange(60) % 3
    x = x * torch.tensor([0.1, 1.0, 5.0]).double()[group][:, None]
    y = x @ layer.weight.T
    chunks = list(zip(*(column.split(7) for column in (grad, y, x, group)), strict=True))
    args = options(rounds=1, tgq_inputs=True)
    w, _, _, act = PHASE3.quantize_linear(layer.weight, chunks, "uniform", args)
    for i in range(3):
        rows = group == i
        step, quantize_x = brute_uniform(x[rows], args.abits)
        losses = [
            ((grad[rows] * (quantize_x(x[rows], a * step) @ w.T - y[rows])) ** 2).sum()
            for a in ALPHAS
        ]
        best = ALPHAS[torch.stack(losses).argmin()] * step
        assert act.step[i].item() == pytest.approx(best, rel=1e-5)
    assert act.step[2] > 10 * act.step[0]


def quantized_linear(**changes):
    """A linear layer whose inputs are correlated and have two loud channels; its state."""
    torch.manual_seed(4)
    layer = torch.nn.Linear(16, 12).requires_grad_(False)
    x = torch.randn(5, 30, 4) @ torch.randn(4, 16) + 0.2 * torch.randn(5, 30, 16)
    x = x * torch.tensor([30.0, 8.0, *[1.0] * 14])
    y, grad = layer(x), torch.randn(5, 30, 12)
    columns = (grad, y, x, torch.zeros(5).long())
    chunks = [list(c) for c in zip(*(v.split(2) for v in columns), strict=True)]
    args = options(rounds=1, **changes)
    return layer, PHASE3.quantize_layer("mlp.fc1", "block", layer, chunks, None, args), chunks, args


def cost(state, chunks, args):
    return PHASE3.layer_cost(state, chunks, args)["cost"]


def test_balance_quiets_loud_channels_and_keeps_the_product():
    """Inputs are divided by what the weight's columns are multiplied by; the error falls."""
    _, plain, *_ = quantized_linear(abits=4, wbits=8)
    layer, balanced, chunks, args = quantized_linear(abits=4, wbits=8, balance=True)
    assert plain["balance"] is None and balanced["balance"].shape == (16,)
    assert cost(balanced, chunks, args) < cost(plain, chunks, args) / 2
    weight = q.unpack_weight(balanced["weight"]) / balanced["balance"]
    torch.testing.assert_close(weight, layer.weight, rtol=0, atol=0.05)


def test_balance_keeps_the_cheapest_strength():
    """Of all strengths, none among them, the state with the least cost is kept."""
    layer, kept, chunks, args = quantized_linear(balance=True)
    costs = [
        cost(PHASE3.linear_state(layer, chunks, "uniform", strength, args), chunks, args)
        for strength in PHASE3.BALANCE
    ]
    assert cost(kept, chunks, args) == min(costs) < max(costs)


def test_gptq_rounding_lowers_the_layer_s_cost():
    """Errors of a column made up for by the others: less weighted output error, same steps."""
    _, nearest, chunks, args = quantized_linear(wbits=3, abits=8)
    _, compensated, *_ = quantized_linear(wbits=3, abits=8, rounding="gptq")
    assert torch.equal(nearest["weight"]["step"], compensated["weight"]["step"])
    assert cost(compensated, chunks, args) < 0.7 * cost(nearest, chunks, args)


def test_edge_and_cond_bits_reach_their_layers_only(tiny_run):
    """--edge-bits the first and last layer, --cond-bits the weights of adaLN and embedders."""
    calib, args = m.load_calib(tiny_run), options(run=tiny_run, rounds=1, edge_bits=8, cond_bits=7)
    args.tgq_inputs = True
    model = m.explicit_products(m.load_calibrated(calib))
    done = quantized_units(["embed", "block_00", "final"], model, calib, args)
    states = {name: layer["state"] for name, layer in done.items()}
    bits = {name: s["weight"]["bits"] for name, s in states.items() if "weight" in s}
    assert bits.pop("x_embedder.proj") == bits.pop("final_layer.linear") == 8
    for name in bits:
        assert bits[name] == (7 if "adaLN" in name or "t_embedder" in name else 4), name
    assert states["blocks.0.adaLN_modulation.1"]["act"]["type"] == "none"
    assert states["final_layer.linear"]["act"]["bits"] == 8
    assert states["blocks.0.mlp.fc2"]["act"]["step1"].shape == (3,)
    assert states["blocks.0.attn.qk"]["a"]["bits"] == 5
    all_layers = options(run=tiny_run, rounds=1, edge_bits=8, layers="all")
    done = quantized_units(["final"], model, calib, all_layers)
    assert done["final_layer.adaLN_modulation.1"]["state"]["weight"]["bits"] == 4


def test_preset_best_sets_flags_that_others_override(monkeypatch):
    """--preset best is its flags under a tag; a flag given beside it wins; the default is paper."""
    parse = ["03", "--wbits", "6", "--abits", "6"]
    monkeypatch.setattr("sys.argv", parse)
    plain = vars(PHASE3.parse_args())
    monkeypatch.setattr("sys.argv", [*parse, "--preset", "best", "--no-balance", "--rounds", "2"])
    best = vars(PHASE3.parse_args())
    changed = {key: best[key] for key in best if best[key] != plain[key]}
    expected = PHASE3.PRESETS["best"] | dict(preset="best", rounds=2)
    del expected["balance"]
    assert changed == expected and not best["balance"]


@torch.no_grad()
def test_signal_to_noise_equals_the_definition(tiny_run):
    """10 log10 of energy over error of eps, per group, and weighted by (d x_(t-1) / d eps)^2."""
    calib, args = m.load_calib(tiny_run), options()
    model = m.load_calibrated(calib)

    class Off(torch.nn.Module):
        def forward(self, x, t, y):
            return model(x, t, y) + 0.01 * t[:, None, None, None] / 1000

    report = PHASE3.signal_to_noise(model, Off(), calib, args)
    rows, diffusion = calib["validation"], m.Diffusion(calib["settings"]["steps"])
    told = diffusion.timestep_map[rows["t"]]
    eps = model(rows["x"], told, rows["y"])[:, : model.in_channels]
    signal = eps.square().sum((1, 2, 3))
    noise = (0.01 * told / 1000) ** 2 * eps[0].numel()
    weight = diffusion.sensitivity()[rows["t"]]
    expected = 10 * torch.log10((weight * signal).sum() / (weight * noise).sum())
    assert report["snr_weighted"] == pytest.approx(expected.item(), abs=0.01)
    last = rows["group"] == calib["settings"]["groups"] - 1
    expected = 10 * torch.log10(signal[last].sum() / noise[last].sum())
    assert report["snr_per_group"][-1] == pytest.approx(expected.item(), abs=0.01)
