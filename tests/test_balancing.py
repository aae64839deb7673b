"""methods/balancing.py: channels over timesteps, PTQ4DiT's salience, folding into adaLN."""

import pytest
import torch
from conftest import linear_data, lively_dit
from scipy.stats import spearmanr

import quant_ops as q
from common import quant_file
from methods import balancing as b

WIDTH = 24


def test_channel_ends_are_those_of_each_sample_and_timestep():
    """Samples have tokens next to each other, chunks or not; timesteps join their samples."""
    x = torch.randn(6, 4, 5)  # six samples of four tokens
    data = linear_data(torch.zeros(24, 3), x=x.flatten(0, 1), rows=8)
    low, high = b.channel_ends(data, 6)
    assert torch.equal(low, x.amin(1)) and torch.equal(high, x.amax(1))
    t = torch.tensor([9, 2, 9, 5, 2, 2])
    visited, low, high = b.by_timestep(low, high, t)
    assert visited.tolist() == [2, 5, 9]
    assert torch.equal(low[0], x[[1, 4, 5]].amin((0, 1)))
    assert torch.equal(high[2], x[[0, 2]].amax((0, 1)))


def test_spearman_is_that_of_scipy():
    """Rank correlation of every row, whatever the scales."""
    torch.manual_seed(0)
    a, w = torch.randn(5, 40).exp(), torch.randn(40).exp()
    expected = [spearmanr(row, w).statistic for row in a.numpy()]
    torch.testing.assert_close(b.spearman(a, w), torch.tensor(expected, dtype=torch.float64))


def test_salience_factors_leave_the_geometric_mean():
    """One timestep: channels of input and weight both become sqrt(a w), Eq. (8)."""
    torch.manual_seed(0)
    x_max, weight = torch.rand(1, 6) + 0.1, torch.randn(8, 6)
    s = b.salience_factors(x_max, weight, by_rank=True)
    torch.testing.assert_close(x_max[0] / s, (weight * s).abs().amax(0))


def test_timesteps_unlike_the_weight_weigh_more():
    """eta of two timesteps with rank correlations 1 and -1: e to the 2 apart, Eq. (7)."""
    weight = torch.tensor([[1.0, 2.0, 4.0]])
    x_max = torch.tensor([[1.0, 2.0, 3.0], [9.0, 5.0, 1.0]])
    eta = torch.tensor([-1.0, 1.0]).softmax(0)
    expected = ((eta[:, None] * x_max).sum(0) / weight[0]).sqrt()
    torch.testing.assert_close(b.salience_factors(x_max, weight, by_rank=True), expected)
    plain = b.salience_factors(x_max, weight, by_rank=False)
    torch.testing.assert_close(plain, (x_max.mean(0) / weight[0]).sqrt())


# ------------------------------------------------------------------------------------------------
# Folding


def grid_of(weight):
    return q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), 8)[0]


def smoothed_file(model, adaln):
    """What a quant file holds of a DiT whose qkv, fc1 and final layers have `smooth`, the first
    also a shift by group; adaLN in full precision, or quantized by "channel" or by "tensor"."""
    layers = {}
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("qkv", "fc1", "linear"):
            smooth, Q_X = torch.rand(WIDTH) + 0.5, q.FullPrecision()
            weight = module.weight.detach() * smooth
            Q_W, more = grid_of(weight), {}
            if kind == "qkv":
                more["shift"] = torch.randn(2, WIDTH)
                more["bias"] = module.bias + more["shift"] @ module.weight.T
            state = quant_file.linear_state(module, Q_W(weight), Q_W, Q_X, smooth, **more)
            layers[name] = state
        if adaln and name.endswith("adaLN_modulation.1"):
            weight = module.weight.detach()
            Q_W = grid_of(weight)
            if adaln == "tensor":
                Q_W = q.uniform_candidates(*weight.aminmax(), 8)[0]
            layers[name] = quant_file.linear_state(module, Q_W(weight), Q_W, q.FullPrecision())
    config = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=WIDTH, depth=2)
    config |= dict(num_heads=3, num_classes=5)
    return quant_file.quantized_parts(model, config, layers, 6, 2)


@pytest.mark.parametrize("adaln", [None, "channel", "tensor"])
@torch.no_grad()
def test_folded_file_is_the_same_model(adaln):
    """Nothing is left to divide, but where adaLN has one scale for all rows; the output stays."""
    model = lively_dit()
    file = smoothed_file(model, adaln)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([999, 10, 500]), torch.tensor([0, 5, 2])
    before = quant_file.build_quantized(file, "unfolded")(x, t, y)
    parameters = {name: p.clone() for name, p in model.named_parameters()}
    b.fold_into_adaln(file)
    after = quant_file.build_quantized(file, "folded")(x, t, y)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    left = [name for name, state in file["layers"].items() if "smooth" in state]
    assert len(left) == (5 if adaln == "tensor" else 0)
    for name, p in model.named_parameters():
        assert torch.equal(p, parameters[name])  # the full-precision network is as it was
