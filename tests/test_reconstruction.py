"""methods/reconstruction.py, rounding.py, ranges.py: AdaRound, learned scales, clipping ranges.

THEIRS are what the authors' code gives on `wave`: Xiuyu-Li/q-diffusion@715783d, in qdiff/,
quant_layer.py (UniformAffineQuantizer, "mse"), adaptive_rounding.py, block_recon.py (LossFunction).
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import linear_data, wave

import quant_ops as q
from common.quant_file import make_layer, unpack_weight
from common.unit_data import Unit
from methods import ranges
from methods import reconstruction as r
from methods.rounding import AdaRound

CPU = torch.device("cpu")
THEIRS = dict(
    scale=[0.271864, 0.522216, 0.140746, 0.856726],
    zero_point=[4, 3, 3, 3],
    input=(0.129333, 5),
    losses=[
        0.21994, 0.17916, 0.15355, 0.59373, 0.57686, 0.55945, 0.54032, 0.52225, 0.50269, 0.48356,
        0.46446, 0.44320, 0.42116, 0.40267, 0.38666, 0.37141, 0.35463, 0.33734, 0.31896, 0.29199,
    ],
    up="001010110011101101010111011010111001000100110110",
)  # fmt: skip


def drawn():
    """A weight (4, 12) and inputs (10, 3, 12)."""
    return wave(4, 12) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None], wave(10, 3, 12) + 0.3


# ------------------------------------------------------------------------------------------------
# Ranges


def test_shrunk_ranges_are_those_of_the_authors():
    """Least |error|^2.4 of 80 ranges: of every output channel, and of all inputs."""
    weight, x = drawn()
    Q_W = ranges.weight_by_shrinking(weight, 3)
    torch.testing.assert_close(Q_W.scale[:, 0], torch.tensor(THEIRS["scale"]), rtol=0, atol=1e-5)
    assert Q_W.zero_point[:, 0].tolist() == THEIRS["zero_point"]
    data = linear_data(torch.ones(30, 4), x=x.flatten(0, 1))
    Q_X = ranges.values_by_shrinking(data, "x", 4)
    assert (round(Q_X.scale.item(), 6), Q_X.zero_point) == THEIRS["input"]


def test_percentiles_leave_out_what_costs_more_than_it_saves():
    """One outlier among 20,000 values: cut off; a tenth of all values: kept. Rows on their own."""
    x = wave(2, 20000)
    x[0, 7], x[1, ::10] = 40, 40
    Q = ranges.weight_by_percentile(x, 4)
    assert Q.scale[0] * 15 < 4 and Q.scale[1] * 15 > 40
    lows, highs = ranges.quantiles(x)
    p = torch.tensor(ranges.PERCENTILES)
    torch.testing.assert_close(lows, torch.quantile(x, 1 - p))
    torch.testing.assert_close(highs, torch.quantile(x, p))
    data = linear_data(torch.ones(2000, 4), x=x[0].view(2000, 10))
    assert ranges.values_by_percentile(data, "x", 4).scale * 15 < 4


@pytest.mark.parametrize("most", [7, 50, 10_000])
@pytest.mark.parametrize("columns", [6, 49, 64])
def test_some_of_sees_every_column(columns, most):
    """At most so many values, evenly spread, and no column of any width is left out."""
    parts = torch.arange(300 * columns).view(3, 100, columns).unbind()
    found = ranges.some_of(parts, most)
    steps = found.diff().unique()
    assert len(found) <= most and len(steps) == 1
    assert len((found % columns).unique()) == min(columns, len(found))


def test_percentiles_see_an_outlying_channel_of_any_index(monkeypatch):
    """Few values of many: a large channel still widens the range."""
    monkeypatch.setattr(ranges, "MOST", 6000)
    for channel in range(12):
        x = wave(3000, 12)  # 36,000 values: every sixth would see two channels
        x[:, channel] *= 40
        data = linear_data(torch.ones(3000, 4), x=x)
        assert ranges.values_by_percentile(data, "x", 4).scale * 15 > 40, channel


# ------------------------------------------------------------------------------------------------
# AdaRound


def grid(weight, bits=3):
    return ranges.weight_by_shrinking(weight, bits)


def test_adaround_begins_with_the_weight_itself():
    """h is the fraction at first, so inside the range the soft weight is the weight."""
    weight, _ = drawn()
    wide = q.UniformQuantizer(8, torch.full((4, 1), 0.05), torch.full((4, 1), 128.0))
    torch.testing.assert_close(AdaRound(weight, wide)(), weight, rtol=0, atol=1e-6)


def test_adaround_ends_on_the_grid():
    """Every element is at one of the two grid values around it, or at the end of the grid."""
    weight, _ = drawn()
    Q_W = grid(weight)
    rounding = AdaRound(weight, Q_W)
    with torch.no_grad():
        rounding.alpha.copy_(wave(4, 12))
    hard = rounding.hard()
    torch.testing.assert_close(Q_W(hard), hard, rtol=0, atol=1e-6)
    up = (wave(4, 12) >= 0).float()
    levels = ((weight / Q_W.scale).floor() + up + Q_W.zero_point).clamp(0, 7)
    torch.testing.assert_close(hard, (levels - Q_W.zero_point) * Q_W.scale)


def test_regularizer_is_zero_at_both_ends_and_counts_the_undecided():
    """1 - |2 h - 1|^beta: 0 where h is 0 or 1, 1 where it is a half."""
    rounding = AdaRound(torch.tensor([[0.0, 0.5, 1.0]]), grid(torch.tensor([[0.0, 0.5, 1.0]])))
    with torch.no_grad():
        rounding.alpha.copy_(torch.tensor([[-9.0, 0.0, 9.0]]))
    assert rounding.h().tolist() == [[0.0, 0.5, 1.0]]
    assert rounding.regularizer(2.0) == rounding.regularizer(20.0) == 1


# ------------------------------------------------------------------------------------------------
# Reconstruction


class Root(nn.Module):
    """A network whose only unit, "block_00", is one linear layer."""

    def __init__(self, layer):
        super().__init__()
        block = nn.Module()
        block.fc = layer
        self.blocks = nn.ModuleList([block])


def phase3_of(layer, x, groups=None):
    """What `reconstruct` needs of a Phase3 at this layer."""
    model = Root(layer)
    groups = torch.zeros(len(x), dtype=torch.long) if groups is None else groups
    return SimpleNamespace(
        unit=Unit("block_00", [x], [], groups),
        machine=SimpleNamespace(device=CPU, batch_size=4),
        model=model,
        function=lambda x, group=None: (call(model.blocks[0].fc, x, group),),
    )


def call(layer, x, group):
    return layer(x) if isinstance(layer, nn.Linear) else layer(x, group)


def linear_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight.copy_(weight), layer.bias.zero_()
    return layer


def test_losses_along_the_schedule_are_those_of_the_authors(monkeypatch):
    """20 steps on all rows: warm-up, exponent 20 to 2, Adam; and what is rounded up in the end."""
    weight, x = drawn()
    layer, seen, real = linear_of(weight), [], r.penalty
    soft = {"blocks.0.fc": r.SoftLinear(layer, weight, grid(weight), q.FullPrecision())}
    (one,) = soft.values()

    def penalty(roundings, step, recipe):
        found = real(roundings, step, recipe)
        error = r.output_loss([x @ one.rounding().T], [x @ weight.T], 2.0)
        seen.append((error + found).item())
        return found

    monkeypatch.setattr(r, "penalty", penalty)
    r.reconstruct(phase3_of(layer, x), soft, [x], r.Recipe(20, 10, weight_lr=0.1))
    torch.testing.assert_close(seen, THEIRS["losses"], rtol=0, atol=1e-5)
    up = one.rounding.alpha >= 0
    assert up.flatten().tolist() == [c == "1" for c in THEIRS["up"]]
    state = one.state()
    torch.testing.assert_close(unpack_weight(state["weight"]), one.rounding.hard())


def correlated():
    """A layer (6, 16) on inputs (40, 3, 16) of rank 4, and its weight."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 3, 4) @ torch.randn(4, 16), torch.randn(6, 16)
    return linear_of(weight), x, weight


def error_of(layer, state, x, group=None):
    return (call(make_layer(state), x, group) - layer(x)).square().mean().item()


def test_adaround_lowers_the_output_error():
    """Inputs of low rank leave freedom that rounding to nearest does not use."""
    layer, x, weight = correlated()
    whole = q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), 3)[0]
    soft = {"blocks.0.fc": r.SoftLinear(layer, weight, whole, q.FullPrecision())}
    before = error_of(layer, soft["blocks.0.fc"].state(), x)
    phase3 = phase3_of(layer, x)
    r.reconstruct(phase3, soft, [x], r.Recipe(300, 16, weight_lr=0.02))
    assert error_of(layer, soft["blocks.0.fc"].state(), x) < 0.6 * before
    assert phase3.model.blocks[0].fc is layer  # the network is as it was


def test_scales_of_inputs_learn_for_each_time_group_on_their_own():
    """Both groups begin four times too wide; only the group whose rows are seen changes."""
    layer, x, weight = correlated()
    group = torch.zeros(40, dtype=torch.long)
    wide = 4 * (x.max() - x.min()) / 15
    Q_X = q.UniformQuantizer(4, wide.repeat(2), torch.full((2,), 8.0))
    fine = q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), 8)[0]
    soft = {"blocks.0.fc": r.SoftLinear(layer, weight, fine, Q_X)}
    before = error_of(layer, soft["blocks.0.fc"].state(), x, group)
    recipe = r.Recipe(200, 16, scale_lr=0.05, power=2.4)
    r.reconstruct(phase3_of(layer, x, group), soft, [x], recipe)
    state = soft["blocks.0.fc"].state()
    assert error_of(layer, state, x, group) < 0.3 * before
    assert state["act"]["scale"][0] < 0.5 * wide and state["act"]["scale"][1] == wide
    expected = soft["blocks.0.fc"].rounded  # no rounding learned: to nearest
    torch.testing.assert_close(expected, fine(weight))


def test_no_scale_falls_below_a_hundredth_of_what_it_was():
    """A gradient that only shrinks it, at a rate as large as the scale itself."""
    scale = nn.Parameter(torch.tensor([0.004, 1.0]))
    adam = r.ScaleAdam([scale], 0.01, 100)
    for _ in range(20):
        adam.zero_grad()
        scale.sum().backward()
        adam.step()
    assert scale[0].item() == pytest.approx(0.00004) and 0.8 < scale[1] < 0.9


@pytest.mark.parametrize("power, expected", [(2.0, 1 + 4), (1.0, 1 + 2)])
def test_output_loss_sums_the_second_axis_and_averages_the_others(power, expected):
    """Errors 1 and 2 of two tokens, of every sample and channel."""
    wanted = torch.zeros(3, 2, 5)
    found = wanted + torch.tensor([1.0, -2.0])[None, :, None]
    assert r.output_loss([found], [wanted], power) == expected


def test_layers_of_the_quantized_prefix_keep_activations_in_full_precision():
    """Phase W: the weight of the state, inputs and products as they are."""
    layer, x, weight = correlated()
    coarse = q.UniformQuantizer(2, torch.tensor(1.0), torch.tensor(1.0))
    state = r.SoftLinear(layer, weight, grid(weight), coarse).state()
    torch.testing.assert_close(r.weights_only(state)(x), x @ grid(weight)(weight).T)
    product = r.weights_only(r.SoftMatMul(coarse, coarse).state())
    assert torch.equal(product(x, x.mT), x @ x.mT)


def test_targets_follow_from_full_precision_inputs():
    """Inputs that the units before have spoilt: the layer learns to make up for it."""
    layer, x, weight = correlated()
    found = []
    for targets in (None, [layer(x)]):
        soft = {"blocks.0.fc": r.SoftLinear(layer, weight, grid(weight), q.FullPrecision())}
        recipe = r.Recipe(20, 8, weight_lr=0.1)
        r.reconstruct(phase3_of(layer, x), soft, [1.5 * x], recipe, targets)
        found.append(soft["blocks.0.fc"].rounding.alpha.detach())
    assert torch.equal(*found)


def test_every_unit_draws_batches_of_its_own():
    """By its place in the network and the recipe's seed."""
    layer, x, weight = correlated()
    draws = []
    for name, seed in (("block_00", 1), ("final", 1), ("block_00", 2)):
        phase3, seen = phase3_of(layer, x), []
        phase3.unit, function = phase3.unit._replace(name=name), phase3.function
        phase3.function = lambda x, g, f=function, seen=seen: seen.append(x) or f(x, g)
        soft = {"blocks.0.fc": r.SoftLinear(layer, weight, grid(weight), q.FullPrecision())}
        r.reconstruct(phase3, soft, [x], r.Recipe(1, 8, weight_lr=0.1, seed=seed), [layer(x)])
        draws.append(seen[0])
    assert not any(torch.equal(draws[0], other) for other in draws[1:])
