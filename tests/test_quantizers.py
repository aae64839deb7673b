"""common/quantizers.py: quantizers and layers beyond the paper, by hand."""

import pytest
import torch

import quant_ops as q
from common import quant_file as f
from common import quantizers as z


def on_min_max(x, bits):
    """Values on the min-max grid of all of them, Eq. (5), 0 in range."""
    return q.fake_quant(x, *q.qparams_from_range(x.min(), x.max(), bits), bits)


@pytest.mark.parametrize("bits", [3, 8])
def test_dynamic_quantizer_takes_each_range_from_its_own_part(bits):
    """Per sample, per token, and per token and group: each part as if it were alone."""
    x = torch.randn(3, 4, 6) * torch.logspace(-2, 2, 72).view(3, 4, 6)
    by_sample = torch.stack([on_min_max(sample, bits) for sample in x])
    by_token = torch.stack([on_min_max(token, bits) for token in x.flatten(0, 1)]).view_as(x)
    by_group = torch.stack([on_min_max(part, bits) for part in x.view(-1, 2)]).view_as(x)
    torch.testing.assert_close(z.DynamicQuantizer(bits, "sample")(x), by_sample)
    torch.testing.assert_close(z.DynamicQuantizer(bits, "token")(x), by_token)
    torch.testing.assert_close(z.DynamicQuantizer(bits, "token", 2)(x), by_group)
    halves = torch.cat([z.DynamicQuantizer(bits, "sample", 3)(part) for part in x.split(1)])
    assert torch.equal(z.DynamicQuantizer(bits, "sample", 3)(x), halves)  # whatever is beside it


def test_dynamic_quantizer_keeps_a_range_that_is_far_from_zero():
    """Inputs in [5, 6] come back within half a step; zeros come back as zeros."""
    x = torch.linspace(5, 6, 32)[None]
    error = (z.DynamicQuantizer(8, "token")(x) - x).abs().max()
    assert 0 < error <= 6 / 255 / 2 + 1e-6
    assert torch.equal(z.DynamicQuantizer(8, "token")(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_dynamic_quantizer_takes_its_scales_in_float32():
    """Of bfloat16 inputs what it gives is that of the same inputs in float32."""
    x = torch.randn(64, 32).bfloat16()
    Q = z.DynamicQuantizer(8, "token")
    torch.testing.assert_close(Q(x).float(), Q(x.float()), rtol=2**-8, atol=1e-6)


def test_log2_grid():
    """Powers of two below the scale stay; between two, the nearer exponent; below all, the last."""
    x = torch.tensor([1.0, 0.5, 0.25, 0.72, 0.70, 0.0, 1e-9])
    found = z.log2_quant(x, torch.tensor(1.0), 3)
    assert found.tolist() == [1.0, 0.5, 0.25, 1.0, 0.5, 2.0**-7, 2.0**-7]
    x = torch.tensor([2.0**-11, 2.0**-15, 2.0**-20])
    assert z.log2_quant(x, torch.tensor(1.0), 4).tolist() == [2.0**-11, 2.0**-15, 2.0**-15]


def test_adaptive_quantizer_takes_the_grid_of_each_time_group():
    """Group 0 is uniform, group 1 logarithmic, each with its scale."""
    Q = z.AdaptiveQuantizer(3, torch.tensor([0.1, 1.0]), torch.tensor([False, True]))
    x = torch.tensor([[0.26, 0.9], [0.26, 0.9]])
    found = Q(x, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.7], [0.25, 1.0]]))


def shifted_layer(by_group):
    """A linear layer's state with shift, factors, bias by group and a low-rank branch; and what
    they stand for."""
    layer, shape = torch.nn.Linear(4, 6), (2, 4) if by_group else (4,)
    shift, smooth = torch.randn(shape), torch.rand(4) + 0.5
    low_rank = dict(left=torch.randn(6, 2), right=torch.randn(2, 4))
    weight = layer.weight.detach() * smooth
    bias = layer.bias.detach() + shift @ layer.weight.detach().T
    ends = weight.aminmax(dim=1, keepdim=True)
    Q_W, Q_X = q.uniform_candidates(*ends, 8)[0], z.DynamicQuantizer(8, "token", 2)
    more = dict(shift=shift, bias=bias, low_rank=low_rank)
    state = f.linear_state(layer, Q_W(weight), Q_W, Q_X, smooth, **more)
    W_hat = Q_W(weight) + low_rank["left"] @ low_rank["right"]
    return state, lambda x, g: Q_X((x - shift[g]) / smooth) @ W_hat.T + bias[g]


@pytest.mark.parametrize("by_group", [False, True])
def test_layer_with_shift_bias_and_low_rank_branch(by_group):
    """(x - z_g) / s through the quantizer, times W s + L R, plus the group's bias; of samples
    (N, S, I) and of rows (R, I)."""
    state, expected = shifted_layer(by_group)
    made, x, group = f.make_layer(state), torch.randn(3, 5, 4), torch.tensor([0, 1, 1])
    for i, sample in enumerate(x):
        wanted = expected(sample, group[i] if by_group else ...)
        torch.testing.assert_close(made(x, group)[i], wanted)
        torch.testing.assert_close(made(sample, group[i].expand(5)), wanted)


@pytest.mark.parametrize("view, scale", [((6, 4, 2), (6, 4, 1)), ((2, 3, 8), (1, 3, 8))])
def test_weight_with_scales_of_its_own_view(view, scale):
    """Groups along the input, or rows apart that share an input: packed and back, on the grid."""
    layer = torch.nn.Linear(8, 6)
    ends = [torch.rand(scale) + 0.1 for _ in range(2)]
    Q_W = q.UniformQuantizer(4, *q.qparams_from_range(-ends[0], ends[1], 4))
    W_hat = Q_W(layer.weight.detach().view(view))
    packed = f.pack_weight(W_hat.view(6, 8), Q_W, view)
    assert len(packed["codes"]) == 24 and packed["scale"].shape == scale
    torch.testing.assert_close(f.unpack_weight(packed), W_hat.view(6, 8))


def test_dynamic_quantizer_state_round_trips():
    """Plain values, no tensors: what the file says makes the same quantizer again."""
    state = f.quantizer_state(z.DynamicQuantizer(5, "sample", 3))
    assert state == dict(type="dynamic", bits=5, per="sample", group_size=3)
    again, x = f.make_quantizer(state), torch.randn(2, 4, 6)
    assert torch.equal(again(x), z.DynamicQuantizer(5, "sample", 3)(x))


# ------------------------------------------------------------------------------------------------
# Those of quant_ops.py, where test_quant_ops.py has no room


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_quantized_in_float32(dtype):
    """Eq. (5) of the value itself: codes up to 255 are beyond bfloat16's digits."""
    x = torch.linspace(-1.7, 2.2, 500).to(dtype)
    Q = q.uniform_candidates(torch.tensor(-1.7), torch.tensor(2.2), 8)[0]
    assert Q(x).dtype == torch.float32 and torch.equal(Q(x), Q(x.float()))


@pytest.mark.parametrize("low, high", [(0.0, 2.0), (-0.1, 0.0), (0.0, 0.0)])
def test_gelu_quantizer_of_one_sign_makes_no_nan(low, high):
    """D9: a time group without values below zero, or above, or none at all."""
    Q, (first, second) = q.gelu_candidates(torch.tensor(low), torch.tensor(high), 4)
    x = torch.tensor([low, 0.0, high])
    for tried in (Q, first(Q)[0], second(Q)[99]):
        assert tried(x).isfinite().all() and tried(x)[1] == 0
