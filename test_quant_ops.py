"""The audit in executable form: each test is one claim about one equation of the paper.

Formulas are written here a second time, in plain loops, and never call the code they check.
"""

from types import SimpleNamespace

import pytest
import torch

import quant_ops as q

BITS = range(2, 9)
torch.manual_seed(0)


def test_qparams_follow_eq_5():
    """Eq. (5): s = (max - min) / (2^k - 1) and z = -round(min / s)."""
    for bits in BITS:
        scale, zero_point = q.qparams_from_range(torch.tensor(-1.3), torch.tensor(2.9), bits)
        assert scale.item() == pytest.approx(4.2 / (2**bits - 1))
        assert zero_point.item() == -round(-1.3 / scale.item())


def test_qparams_range_holds_zero():
    """A range on one side of 0 is widened to 0, or the clip would move every value."""
    x = torch.linspace(5.0, 6.0, 50)
    scale, zero_point = q.qparams_from_range(x.min(), x.max(), 8)
    assert (q.fake_quant(x, scale, zero_point, 8) - x).abs().max() <= scale / 2 + 1e-6
    assert zero_point == 0


def test_qparams_of_all_zero_tensor_are_finite():
    """An all-zero tensor, or nearly so, stays zero and makes no NaN; candidates are above zero."""
    for end in torch.tensor([0.0, 1e-42]):
        scale, zero_point = q.qparams_from_range(-end, end, 4)
        assert q.fake_quant(end, 0.01 * scale, zero_point, 4) == 0 and 0.01 * scale > 0


def test_dequantize_spans_the_grid_of_eq_6():
    """Eq. (6), read with D1: the grid is s * {-z, ..., 2^k - 1 - z}; as printed it mixes units."""
    scale, zero_point = torch.tensor(0.1), torch.tensor(3.0)
    grid = q.dequantize(torch.arange(8.0), scale, zero_point)
    torch.testing.assert_close(grid, 0.1 * torch.arange(-3.0, 5.0))
    printed = scale * torch.arange(8.0) - zero_point
    assert not torch.allclose(printed, grid)


@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_equals_naive_eq_5(bits):
    """Eq. (5) with deviation D1, element by element, beyond the range too."""
    x = torch.randn(200).double() * 2
    scale, zero_point = q.qparams_from_range(*torch.tensor([-1.7, 2.2]).double(), bits)
    s, z = scale.item(), zero_point.item()
    naive = [s * (min(max(round(v / s) + z, 0), 2**bits - 1) - z) for v in x.tolist()]
    found = q.fake_quant(x, scale, zero_point, bits)
    torch.testing.assert_close(found, torch.tensor(naive).double())
    codes = q.quantize(x, scale, zero_point, bits)
    assert torch.equal(q.dequantize(codes, scale, zero_point), found)


@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_error_is_at_most_half_a_step(bits):
    """Inside the range |error| <= s / 2, 0 is exact, and quantizing twice changes nothing."""
    x = torch.linspace(-1.7, 2.2, 4001)
    scale, zero_point = q.qparams_from_range(x.min(), x.max(), bits)
    inside = x[(x >= -zero_point * scale) & (x <= (2**bits - 1 - zero_point) * scale)]
    y = q.fake_quant(inside, scale, zero_point, bits)
    assert (y - inside).abs().max() <= scale / 2 * (1 + 1e-5)
    assert q.fake_quant(torch.zeros(1), scale, zero_point, bits) == 0
    assert torch.equal(q.fake_quant(y, scale, zero_point, bits), y)


# ------------------------------------------------------------------------------------------------
# MRQ


@pytest.mark.parametrize("bits", BITS)
def test_mrq_softmax_error_is_at_most_half_a_step_of_its_region(bits):
    """Sec. III-C: below the border |error| <= s_1 / 2, above it <= s_2 / 2; 0 and 1 are exact."""
    x = torch.cat([torch.linspace(0, 1, 20001), torch.logspace(-8, 0, 5000)])
    for scale1 in 2.0 ** -torch.arange(20) / 2 ** (bits - 1):
        error = (q.mrq_softmax(x, scale1, bits) - x).abs()
        in_r1 = x < (2 ** (bits - 1) - 0.5) * scale1
        assert (error[in_r1] <= scale1 / 2 * (1 + 1e-5)).all()
        assert (error[~in_r1] <= 2.0**-bits * (1 + 1e-5)).all()
        assert q.mrq_softmax(torch.tensor([0.0, 1.0]), scale1, bits).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bits", BITS)
def test_mrq_softmax_codes_fit_k_bits(bits):
    """D8: one bit of region and k - 1 of level; a value is a level of its region."""
    x, levels = torch.linspace(0, 1, 5001), 2 ** (bits - 1)
    for scale1 in 2.0 ** -torch.arange(20) / levels:
        low, high, upper = q.softmax_regions(x, scale1, bits)
        assert low.min() >= 0 and low.max() <= levels - 1
        assert high.min() >= 1 and high.max() <= levels
        values = torch.where(upper, high / levels, low * scale1)
        assert torch.equal(q.mrq_softmax(x, scale1, bits), values)


def _upstream_twin(x, scale1, bits):
    """The sum of two clamped halves found in public code: both are clamped at the border."""
    border, scale2 = 2 ** (bits - 1) * scale1, 2.0 ** (1 - bits)
    low = (x / scale1).round().clamp(0, 2 ** (bits - 1) - 1) * scale1
    high = (x.clamp(border, 1) / scale2).round().clamp(0, 2 ** (bits - 1)) * scale2
    return low + high


def test_mrq_softmax_is_not_the_sum_of_two_clamps():
    """That formula adds the border to every value; the bound of half a step catches it."""
    x, scale1 = torch.linspace(0, 1, 1001), torch.tensor(2.0**-2 / 128)
    assert (_upstream_twin(x, scale1, 8) - x).abs().mean() > 0.1
    assert (q.mrq_softmax(x, scale1, 8) - x).abs().max() <= 2.0**-8 * (1 + 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_mrq_gelu_equals_naive_two_regions(bits):
    """Sec. III-C, D9: s_1 below 0 with levels to -2^(k-1), s_2 above to 2^(k-1) - 1."""
    x, half = torch.randn(500).double(), 2 ** (bits - 1)
    s1, s2 = 0.17 / half, 3.0 / half
    naive = [
        s1 * max(round(v / s1), -half) if v < 0 else s2 * min(round(v / s2), half - 1)
        for v in x.tolist()
    ]
    out = q.mrq_gelu(x, torch.tensor(s1).double(), torch.tensor(s2).double(), bits)
    torch.testing.assert_close(out, torch.tensor(naive).double())
    inside = (x >= -half * s1) & (x <= (half - 1) * s2)
    bound = torch.where(x < 0, s1 / 2, s2 / 2)
    assert ((out - x).abs() <= bound * (1 + 1e-9))[inside].all()


# ------------------------------------------------------------------------------------------------
# Time groups


@pytest.mark.parametrize("T, G", [(250, 10), (100, 10), (100, 25), (7, 3), (5, 5), (9, 1)])
def test_time_group_covers_all_timesteps_in_runs(T, G):
    """Eq. (9): contiguous groups 0..G-1, equal when G divides T, else equal up to one (D4)."""
    found = [q.time_group(t, T, G) for t in range(T)]
    assert found == sorted(found) and set(found) == set(range(G))
    sizes = [found.count(g) for g in range(G)]
    assert max(sizes) - min(sizes) <= (0 if T % G == 0 else 1)
    for i in range(1, G + 1) if T % G == 0 else ():  # as printed, with i from 1
        assert found[(i - 1) * T // G] == found[i * T // G - 1] == i - 1


# ------------------------------------------------------------------------------------------------
# Candidates, HO and the search


def test_grids_hold_both_ends():
    """D7, D8: 100 factors from 0.01 to 1.2; 20 powers of two from 2^0 / 2^(k-1) down."""
    alphas, scales = q.scale_grid(), q.softmax_grid(6)
    assert len(alphas) == 100 and len(scales) == 20
    assert alphas[0] == pytest.approx(0.01) and alphas[-1] == pytest.approx(1.2)
    assert scales[0] == 2**-5 and scales[-1] == 2.0**-24


def test_candidates_are_alpha_times_the_min_max_scale():
    """D7, D9, D15: alpha times s, or after GELU times s_1 or s_2; the zero point stays."""
    low, high, alphas = *torch.tensor([-0.2, 1.3]), q.scale_grid()
    start, candidates = q.uniform_candidates(low, high, 4)
    assert all(Q.scale == a * start.scale for a, Q in zip(alphas, candidates, strict=True))
    assert candidates[99].zero_point == start.zero_point == 2
    start, (first, second) = q.gelu_candidates(low, high, 4)
    torch.testing.assert_close([start.scale1 * 8, start.scale2 * 7], [-low, high])
    Q = second(first(start)[3])[99]
    assert (Q.scale1, Q.scale2) == (alphas[3] * start.scale1, alphas[99] * start.scale2)


def test_hessian_loss_equals_naive_eq_16():
    """Eq. (16): sum of gradient squared times error squared; D11: G = 1 is the squared error."""
    delta, grad = torch.randn(2, 4, 5).double()
    pairs = zip(delta.flatten().tolist(), grad.flatten().tolist(), strict=True)
    assert q.hessian_loss(delta, grad).item() == pytest.approx(sum(d * d * g * g for d, g in pairs))
    columns = [(delta[:, j] ** 2 * grad[:, j] ** 2).sum() for j in range(5)]
    torch.testing.assert_close(q.hessian_loss(delta, grad, dim=0), torch.stack(columns))
    torch.testing.assert_close(q.hessian_loss(delta, torch.ones(4, 5)), (delta**2).sum())


def check_loss(loss, quantizer, chunk, expected):
    """A loss is what was worked out by hand."""
    torch.testing.assert_close(loss(chunk, loss.prepare(chunk), quantizer), expected)


@pytest.mark.parametrize("per_channel", [True, False])
def test_losses_of_a_linear_layer_are_eq_16(per_channel):
    """Eq. (16) of out = X W^T: of the weight a loss for each of its scales, of the input one."""
    W, x, (grad, out) = torch.randn(6, 4), torch.randn(30, 4), torch.randn(2, 30, 6)
    ends = W.aminmax(dim=1, keepdim=True) if per_channel else W.aminmax()
    Q_W, Q_X = q.uniform_candidates(*ends, 3)[0], q.uniform_candidates(*x.aminmax(), 4)[0]
    error = (grad * (out - Q_X(x) @ Q_W(W).T)) ** 2
    by_scale = error.sum(0)[:, None] if per_channel else error.sum()
    chunk = SimpleNamespace(grad=grad, out=out, x=x, group=None)
    check_loss(q.WeightLoss(W, Q_X), Q_W, chunk, by_scale)
    check_loss(q.InputLoss(W, Q_W), Q_X, chunk, error.sum())


def test_losses_of_a_product_are_eq_16():
    """Eq. (16), (17) of out = A B, as a function of either factor."""
    a, b, group = torch.rand(3, 2, 4, 5), torch.randn(3, 2, 5, 6), torch.tensor([0, 1, 0])
    grad, out = torch.randn(2, 3, 2, 4, 6)
    Q_A = q.SoftmaxQuantizer(4, torch.tensor([0.02, 0.005]))
    Q_B = q.uniform_candidates(*b.aminmax(), 4)[0]
    error = (grad * (out - Q_A(a, group) @ Q_B(b))).square().sum()
    chunk = SimpleNamespace(grad=grad, out=out, a=a, b=b, group=group)
    check_loss(q.LossOfA(Q_B), Q_A, chunk, error)
    check_loss(q.LossOfB(Q_A), Q_B, chunk, error)


class Loss:
    """A loss, as `search` takes it, of a function of chunk and candidate."""

    def __init__(self, function):
        self.function = function

    def prepare(self, chunk):
        return chunk

    def __call__(self, chunk, shared, candidate):
        return self.function(shared, candidate)


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (0.9, 1.1), (-30.0, 30.0)])
def test_search_equals_brute_force_both_ends_included(low, high):
    """Eq. (8), (12): for every channel the argmin of the whole loss, wherever it lies."""
    W, x, (grad, out) = torch.randn(6, 4), torch.randn(30, 4), torch.randn(2, 30, 6)
    alphas = torch.linspace(low, high, 21)
    chunks = list(zip(grad.split(7), out.split(7), x.split(7), strict=True))

    def loss(chunk, alpha):
        return q.hessian_loss(chunk[2] @ (alpha * W).T - chunk[1], chunk[0], dim=0)

    found = q.search(q.Candidates(lambda alpha: alpha, alphas), chunks, Loss(loss))
    for o in range(6):
        naive = [
            sum((grad[r, o] * (x[r] @ (a * W[o]) - out[r, o])).item() ** 2 for r in range(30))
            for a in alphas
        ]
        assert found[o] == alphas[naive.index(min(naive))]


@pytest.mark.parametrize("best", [0, 57, 99])
def test_search_takes_the_first_of_equals_and_never_nan(best):
    """The first and the last candidate can win; a NaN in any chunk cannot."""
    table = torch.full((3, 100, 2), 2.0)
    table[1, :best, 0], table[:, best:, 0], table[2, 5:, 1] = torch.nan, 1.0, torch.nan
    numbers = q.Candidates(lambda i: i, torch.arange(100))
    found = q.search(numbers, range(3), Loss(lambda chunk, i: table[chunk, i]))
    assert found.tolist() == [best, 0]


@pytest.mark.parametrize("share, dead", [(1e-5, False), (1e-7, True)])
def test_without_gradient_has_a_threshold_of_1e_6(share, dead):
    """D2: a group below 1e-6 of the layer's largest gradient has none; a channel only at 0."""
    rows, channels = torch.tensor([0.1, 7.0, 0.0, 7 * share]), torch.tensor([7.0, 1e-30, 0.0])
    groups, channels = q.without_gradient(rows, channels, torch.tensor([0, 0, 1, 1]))
    assert groups.tolist() == [False, dead] and channels.tolist() == [False, False, True]


# ------------------------------------------------------------------------------------------------
# Layers


def test_quant_linear_rounds_each_row_with_the_scale_of_its_group():
    """Inputs through Eq. (5) of their time group, joined of one quantizer each, then X W^T + b."""
    W, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(2, 5, 4)
    ends = [(torch.tensor(0.1), torch.tensor(7.0)), (torch.tensor(0.3), torch.tensor(8.0))]
    act = q.join_groups([q.UniformQuantizer(4, *values) for values in ends])
    found = q.QuantLinear(W, bias, act)(x, torch.tensor([1, 0]))
    for row, rounded, values in zip(x, found, reversed(ends), strict=True):
        torch.testing.assert_close(rounded, q.fake_quant(row, *values, 4) @ W.T + bias)


def test_quant_linear_at_8_bits_is_close_to_nn_linear():
    """Eight bits on both operands: within one per cent of the full-precision layer."""
    linear, x = torch.nn.Linear(64, 32), torch.randn(100, 64)
    Q_W = q.uniform_candidates(*linear.weight.aminmax(dim=1, keepdim=True), 8)[0]
    act = q.uniform_candidates(*x.aminmax(), 8)[0]
    found = q.QuantLinear(Q_W(linear.weight), linear.bias, act)(x)
    assert 0 < (found - linear(x)).norm() / linear(x).norm() < 0.01


def test_quant_conv_is_a_linear_layer_on_patches():
    """The patch embedding: stride equals kernel size."""
    weight, bias, x = torch.randn(6, 3, 2, 2), torch.randn(6), torch.randn(2, 3, 8, 8)
    patches = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    expected = (patches @ weight.flatten(1).T + bias).transpose(1, 2).reshape(2, 6, 4, 4)
    found = q.QuantConv2d(weight, bias, q.FullPrecision())(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_quant_matmul_gives_each_sample_its_groups_scale():
    """Eq. (17): a batch of mixed timesteps uses, sample by sample, the scale of its own group."""
    a, b, group = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 5), torch.tensor([1, 0, 0])
    scale1 = torch.tensor([0.02, 0.005])
    layer = q.QuantMatMul(q.SoftmaxQuantizer(4, scale1), q.FullPrecision())
    expected = torch.stack([q.mrq_softmax(a[i], scale1[group[i]], 4) @ b[i] for i in range(3)])
    torch.testing.assert_close(layer(a, b, group), expected)
