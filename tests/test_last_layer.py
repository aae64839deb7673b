"""methods/last_layer.py: the layer fitted to quantized inputs, against least squares by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from conftest import linear_data

from methods.last_layer import fitted


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


def on(layer, x):
    """LayerData of a layer on these inputs, 4 tokens in each of 10 samples."""
    with torch.no_grad():
        data = linear_data(torch.ones(len(x), 3), layer(x), x)
    return replace(data, bias=layer.bias.detach())


def mixed(x):
    """Inputs that have lost something, which partly follows from what they are."""
    mixing = torch.eye(5) + 0.2 * torch.randn(5, 5)
    return x @ mixing + 0.3 + 0.05 * torch.randn_like(x)


def test_it_is_the_weighted_least_squares_solution(layer):
    """sqrt(s) [x^, 1] against sqrt(s) (W x + b), by torch's solver; damping aside."""
    x, s = torch.randn(40, 5) + 1, torch.rand(10)
    x_hat = mixed(x)
    found, _ = fitted(layer, on(layer, x), on(layer, x_hat), s, damp=0)
    root = s.sqrt().repeat_interleave(4)[:, None]
    A = root * torch.cat([x_hat, torch.ones(40, 1)], dim=1)
    expected = torch.linalg.lstsq(A.double(), (root * layer(x).detach()).double()).solution.float()
    torch.testing.assert_close(found.weight, expected[:5].T)
    torch.testing.assert_close(found.bias, expected[5])


def test_rows_that_do_not_matter_change_nothing(layer):
    """Two samples of s = 0 are as good as none."""
    x = torch.randn(40, 5)
    x_hat = mixed(x)
    s = torch.tensor([1.0] * 8 + [0.0] * 2)
    all_rows, _ = fitted(layer, on(layer, x), on(layer, x_hat), s)
    fewer, _ = fitted(layer, on(layer, x[:32]), on(layer, x_hat[:32]), s[:8])
    torch.testing.assert_close(all_rows.weight, fewer.weight)
    torch.testing.assert_close(all_rows.bias, fewer.bias)


def test_inputs_that_are_as_they_were_leave_the_layer_as_it_was(layer):
    x = torch.randn(40, 5)
    found, _ = fitted(layer, on(layer, x), on(layer, x), torch.rand(10))
    assert torch.equal(found.weight, layer.weight) and torch.allclose(found.bias, layer.bias)


def test_inputs_that_are_all_zero_leave_the_weight_as_it_was(layer):
    """Nothing to fit but the bias: the mean output."""
    x = torch.randn(40, 5)
    found, _ = fitted(layer, on(layer, x), on(layer, torch.zeros(40, 5)), torch.ones(10))
    torch.testing.assert_close(found.weight, layer.weight)
    torch.testing.assert_close(found.bias, layer(x).mean(dim=0).detach())


def test_it_makes_up_for_a_loss_on_rows_it_has_not_seen(layer):
    """A tenth of the error is left of inputs mixed in one way; the layer itself is not touched."""
    before = layer.weight.clone()
    x = torch.randn(400, 5)
    torch.manual_seed(1)
    x_hat = mixed(x)
    found, _ = fitted(layer, on(layer, x[:200]), on(layer, x_hat[:200]), torch.ones(50))
    wanted = layer(x[200:])
    errors = [(each(x_hat[200:]) - wanted).square().mean() for each in (found, layer)]
    assert errors[0] < 0.1 * errors[1] and torch.equal(layer.weight, before)


def test_its_data_are_its_own(layer):
    """Inputs are the quantized ones; outputs, less the bias, are what the fitted weight makes."""
    x = torch.randn(40, 5)
    x_hat = mixed(x)
    found, data = fitted(layer, on(layer, x), on(layer, x_hat), torch.ones(10))
    torch.testing.assert_close(torch.cat([chunk.x for chunk in data]), x_hat)
    torch.testing.assert_close(torch.cat([chunk.out for chunk in data]), x_hat @ found.weight.T)


def test_damping_pulls_towards_the_layer_as_it_was(layer):
    """Without bound, nothing of the weight changes."""
    x = torch.randn(40, 5)
    given = on(layer, x), on(layer, mixed(x)), torch.ones(10)
    near, far = (fitted(layer, *given, damp)[0] for damp in (1e9, 0.01))
    torch.testing.assert_close(near.weight, layer.weight)
    assert (far.weight - layer.weight).norm() > 0.01
