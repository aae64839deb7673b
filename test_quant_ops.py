"""The audit in executable form: each test is one claim about one equation of the paper.

Formulas are written here a second time, in plain loops, and never call the code they check.
"""

import itertools
import math

import pytest
import torch

import quant_ops as q

BITS = range(2, 9)
torch.manual_seed(0)


def test_qparams_step_and_zero_follow_eq_5():
    """Eq. (5): s = (max - min) / (2^k - 1) and z = -round(min / s)."""
    for bits in BITS:
        step, zero = q.qparams_from_range(torch.tensor(-1.3), torch.tensor(2.9), bits)
        assert step.item() == pytest.approx(4.2 / (2**bits - 1))
        assert zero.item() == -round(-1.3 / step.item())


def test_qparams_range_holds_zero():
    """A range on one side of 0 is widened to 0, or the clip would move every value."""
    x = torch.linspace(5.0, 6.0, 50)
    step, zero = q.qparams_from_range(x.min(), x.max(), 8)
    assert (q.fake_quant(x, step, zero, 8) - x).abs().max() <= step / 2 + 1e-6
    assert zero == 0


def test_qparams_of_all_zero_tensor_are_finite():
    """An all-zero tensor stays zero and makes no NaN."""
    step, zero = q.qparams_from_range(torch.zeros(()), torch.zeros(()), 4)
    assert q.fake_quant(torch.zeros(3), step, zero, 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_equals_naive_eq_5(bits):
    """Eq. (5) with deviation D1, element by element, beyond the range too."""
    x = torch.randn(200, dtype=torch.float64) * 2
    step, zero = q.qparams_from_range(torch.tensor(-1.7).double(), torch.tensor(2.2).double(), bits)
    s, z = step.item(), zero.item()
    naive = [s * (min(max(round(v / s) + z, 0), 2**bits - 1) - z) for v in x.tolist()]
    torch.testing.assert_close(q.fake_quant(x, step, zero, bits), torch.tensor(naive).double())


@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_error_is_at_most_half_a_step(bits):
    """Inside the range |error| <= s / 2, 0 is exact, and quantizing twice changes nothing."""
    x = torch.linspace(-1.7, 2.2, 4001)
    step, zero = q.qparams_from_range(x.min(), x.max(), bits)
    inside = x[(x >= -zero * step) & (x <= (2**bits - 1 - zero) * step)]
    y = q.fake_quant(inside, step, zero, bits)
    assert (y - inside).abs().max() <= step / 2 * (1 + 1e-5)
    assert q.fake_quant(torch.zeros(1), step, zero, bits) == 0
    assert torch.equal(q.fake_quant(y, step, zero, bits), y)


def test_dequantize_spans_the_grid_of_eq_6():
    """Eq. (6), read with D1: the grid is s * {-z, ..., 2^k - 1 - z}; as printed it mixes units."""
    step, zero = torch.tensor(0.1), torch.tensor(3.0)
    grid = q.dequantize(torch.arange(8.0), step, zero)
    torch.testing.assert_close(grid, 0.1 * torch.arange(-3.0, 5.0))
    printed = step * torch.arange(8.0) - zero
    assert not torch.allclose(printed, grid)


# ------------------------------------------------------------------------------------------------
# MRQ


def softmax_grids(bits):
    return [(i, torch.tensor(2.0**-i / 2 ** (bits - 1))) for i in range(20)]


@pytest.mark.parametrize("bits", BITS)
def test_mrq_softmax_error_is_at_most_half_a_step_of_its_region(bits):
    """Sec. III-C: below the border |error| <= s_1 / 2, above it <= s_2 / 2; never an offset."""
    x = torch.cat([torch.linspace(0, 1, 20001), torch.logspace(-8, 0, 5000)])
    step2 = 2.0 ** (1 - bits)
    for _, step1 in softmax_grids(bits):
        error = (q.mrq_softmax(x, step1, bits) - x).abs()
        in_r1 = x < (2 ** (bits - 1) - 0.5) * step1
        assert (error[in_r1] <= step1 / 2 * (1 + 1e-5)).all()
        assert (error[~in_r1] <= step2 / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_mrq_softmax_zero_and_one_are_exact(bits):
    """D8: 0.0 is R1's level 0, 1.0 is R2's level 2^(k-1)."""
    for _, step1 in softmax_grids(bits):
        assert q.mrq_softmax(torch.tensor([0.0, 1.0]), step1, bits).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bits", BITS)
def test_mrq_softmax_codes_fit_and_decode(bits):
    """D8: one bit of region and k-1 of level; each value has one code, which decodes to it."""
    x = torch.linspace(0, 1, 5001)
    for _, step1 in softmax_grids(bits):
        codes = q.mrq_softmax_codes(x, step1, bits)
        assert codes.min() >= 0 and codes.max() <= 2**bits - 1
        assert torch.equal(q.mrq_softmax_values(codes, step1, bits), q.mrq_softmax(x, step1, bits))


def _upstream_twin(x, step1, bits):
    """The sum of two clamped halves found in public code: both are clamped at the border."""
    border, step2 = 2 ** (bits - 1) * step1, 2.0 ** (1 - bits)
    low = (x / step1).round().clamp(0, 2 ** (bits - 1) - 1) * step1
    high = (x.clamp(border, 1) / step2).round().clamp(0, 2 ** (bits - 1)) * step2
    return low + high


def test_mrq_softmax_is_not_the_sum_of_two_clamps():
    """That formula adds the border to every value; the bound of half a step catches it."""
    x, step1 = torch.linspace(0, 1, 1001), torch.tensor(2.0**-2 / 128)
    assert (_upstream_twin(x, step1, 8) - x).abs().mean() > 0.1
    assert (q.mrq_softmax(x, step1, 8) - x).abs().max() <= 2.0**-8 * (1 + 1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_mrq_gelu_equals_naive_two_regions(bits):
    """Sec. III-C, D9: step s_1 below 0 with levels to -2^(k-1), s_2 above to 2^(k-1) - 1."""
    x, half = torch.randn(500, dtype=torch.float64), 2 ** (bits - 1)
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


@pytest.mark.parametrize("steps, groups", [(250, 10), (100, 10), (100, 25), (7, 3), (5, 5), (9, 1)])
def test_time_group_covers_all_steps_in_runs(steps, groups):
    """Eq. (9): contiguous groups 0..G-1, equal when G divides T, else equal up to one."""
    found = [q.time_group(t, steps, groups) for t in range(steps)]
    assert found == sorted(found) and set(found) == set(range(groups))
    sizes = [found.count(g) for g in range(groups)]
    assert max(sizes) - min(sizes) <= (0 if steps % groups == 0 else 1)
    if steps % groups == 0:
        for i in range(1, groups + 1):  # as printed, with i from 1
            start, end = (i - 1) * steps // groups, i * steps // groups - 1
            assert found[start] == found[end] == i - 1


def test_group_table_answers_in_network_timesteps():
    """The network is told timesteps 0..999; the table gives the group of the sampling index."""
    timestep_map = torch.tensor([round(i * 999 / 49) for i in range(50)])
    table = q.group_table(timestep_map, 10)
    assert table[timestep_map].tolist() == [t * 10 // 50 for t in range(50)]
    assert table.shape == (1000,) and (table.diff() >= 0).all()


# ------------------------------------------------------------------------------------------------
# HO and the search


def test_hessian_loss_equals_naive_eq_16():
    """Eq. (16): sum over elements of gradient squared times error squared."""
    delta, grad = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    pairs = zip(delta.flatten().tolist(), grad.flatten().tolist(), strict=True)
    assert q.hessian_loss(delta, grad).item() == pytest.approx(sum(d * d * g * g for d, g in pairs))
    columns = [(delta[:, j] ** 2 * grad[:, j] ** 2).sum() for j in range(5)]
    torch.testing.assert_close(q.hessian_loss(delta, grad, dim=0), torch.stack(columns))


def test_hessian_loss_is_squared_error_when_gradient_is_one():
    """D11: the baseline of Table III is the same code with G = 1."""
    delta = torch.randn(7, 3)
    torch.testing.assert_close(q.hessian_loss(delta, torch.ones(7, 3)), (delta**2).sum())


def test_grids_hold_both_ends():
    """D7, D8: 100 factors from 0.01 to 1.2; 20 powers of two from 2^0 / 2^(k-1) down."""
    alphas = q.step_grid()
    assert len(alphas) == 100
    assert alphas[0] == pytest.approx(0.01) and alphas[-1] == pytest.approx(1.2)
    steps = q.softmax_grid(6)
    assert len(steps) == 20 and steps[0] == 2**-5 and steps[-1] == 2.0**-24


@pytest.mark.parametrize("low, high", [(-0.4, 0.4), (0.9, 1.1), (-30.0, 30.0)])
def test_search_equals_brute_force_both_ends_included(low, high):
    """Eq. (17): the argmin over all candidates of the whole loss, wherever it lies on the grid."""
    weight, x = torch.randn(6, 4), torch.randn(30, 4)
    y, grad = torch.randn(2, 30, 6)
    candidates = torch.linspace(low, high, 21)

    def loss_of(chunk, alpha):
        x, y, grad = chunk
        return q.hessian_loss(x @ (alpha * weight).T - y, grad, dim=0)

    chunks = list(zip(x.split(7), y.split(7), grad.split(7), strict=True))
    best, least = q.search(loss_of, candidates, lambda: chunks)
    for o in range(6):
        naive = [
            sum(
                (grad[r, o] * ((x[r] * alpha * weight[o]).sum() - y[r, o])).item() ** 2
                for r in range(30)
            )
            for alpha in candidates
        ]
        assert best[o].item() == min(range(21), key=naive.__getitem__)
        assert least[o].item() == pytest.approx(min(naive), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("end", [0, -1])
def test_search_can_choose_either_end(end):
    """The first and the last candidate are tried (public code forgets the last)."""
    candidates = torch.linspace(0.01, 1.2, 100)
    best, _ = q.search(lambda _, c: (c - candidates[end]) ** 2, candidates, lambda: [None])
    assert best == range(100)[end]


@pytest.mark.parametrize("expected", [None, 0.0, 0.5, 1.0, 9.0])
@pytest.mark.parametrize("shape", [(), (3,), (4, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_search_chooses_as_if_no_candidate_stopped(shape, seed, expected):
    """The first of the least sums, ties and all, whatever was expected of it. No loss is computed
    twice, every candidate is tried, and where little was wrong many losses are not computed."""
    generator = torch.Generator().manual_seed(seed)
    curve = torch.linspace(-3, 2, 100).square().view(100, *[1] * len(shape))
    noise = torch.rand(20, 100, *shape, generator=generator).mul(4).round()
    table, calls = curve.round() + noise, []  # whole numbers: many ties
    table[-3:] = 0  # reached before the last chunk
    total = table.sum(dim=0).double()

    def loss_of(chunk, candidate):
        calls.append((chunk, int(candidate)))
        return table[chunk, int(candidate)]

    expected = None if expected is None else expected * total.amin(dim=0)
    best, least = q.search(loss_of, torch.arange(100), lambda: range(20), expected)
    assert torch.equal(best, total.argmin(dim=0)) and torch.equal(least, total.amin(dim=0))
    assert len(calls) == len({*calls}) and {i for _, i in calls} == {*range(100)}
    if expected is None or torch.equal(expected, least):
        assert len(calls) < 0.8 * 20 * 100


def test_search_keeps_a_candidate_that_one_channel_still_needs():
    """Channels have minima at either end; nothing but the whole sum separates the best two."""
    table = torch.full((8, 100, 2), 9.0)
    table[:, 2, 0], table[:, 97, 1] = 1, 1
    table[:, 1:3, 1], table[:, 97, 0] = 99, 99
    table[0, 2, 0], table[7, 1, 0], table[:7, 1, 0] = 2, 3, 1  # 9 and 10 in the end
    best, _ = q.search(lambda i, c: table[i, int(c)], torch.arange(100), lambda: range(8))
    assert best.tolist() == [2, 97]


# ------------------------------------------------------------------------------------------------
# Beyond the paper


def test_balance_factors_even_out_what_they_promise():
    """Strength 1: all input channels alike; 0: all columns alike; the product never changes."""
    x, weight = torch.randn(50, 4) * torch.tensor([1.0, 5, 20, 0.1]), torch.randn(3, 4)
    for strength in (0.0, 0.5, 1.0):
        s = q.balance_factors(x.abs().amax(0), weight, strength)
        torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-4, atol=1e-4)
        even = (x / s).abs().amax(0) if strength else (weight * s).abs().amax(0)
        assert strength == 0.5 or torch.allclose(even, torch.ones(4))


def compensated(inputs=32, rows=400, bits=3):
    mixed = torch.randn(rows, 8) @ torch.randn(8, inputs) + 0.1 * torch.randn(rows, inputs)
    weight = torch.randn(6, inputs)
    step, zero = q.qparams_from_range(weight.amin(1, True), weight.amax(1, True), bits)
    rounded = q.compensated_rounding(weight, step, zero, bits, mixed.T @ mixed)
    return mixed, weight, rounded, q.fake_quant(weight, step, zero, bits), (step, zero, bits)


def test_compensated_rounding_stays_on_the_grid_and_lowers_the_output_error():
    """Same grid as nearest rounding, Eq. (5); far less error where inputs are correlated."""
    x, weight, rounded, nearest, grid = compensated()
    torch.testing.assert_close(q.fake_quant(rounded, *grid), rounded, rtol=0, atol=1e-5)
    assert (x @ (rounded - weight).T).norm() < 0.5 * (x @ (nearest - weight).T).norm()


def test_compensated_rounding_of_uncorrelated_inputs_is_nearest_rounding():
    """A diagonal Gram matrix leaves nothing to make up for; so does one that is zero."""
    _, weight, _, nearest, grid = compensated()
    for gram in (torch.diag(torch.rand(32) + 0.1), torch.zeros(32, 32)):
        rounded = q.compensated_rounding(weight, *grid, gram)
        torch.testing.assert_close(rounded, nearest, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Packing and layers


@pytest.mark.parametrize("bits, count", list(itertools.product(BITS, [1, 7, 8, 1000])))
def test_pack_codes_round_trip(bits, count):
    """Codes of every width come back, in ceil(count * k / 8) bytes."""
    codes = torch.randint(0, 2**bits, (count,))
    codes[0] = 2**bits - 1
    packed = q.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(q.unpack_codes(packed, bits, (count,)).long(), codes)


def test_unpack_codes_refuses_a_wrong_length():
    """A cut-off stream raises instead of giving wrong weights."""
    with pytest.raises(ValueError, match="cannot hold"):
        q.unpack_codes(torch.zeros(3, dtype=torch.uint8), 6, (5,))


def linear_state(weight, bits, act):
    low, high = weight.flatten(1).aminmax(dim=1, keepdim=True)
    step, zero = q.qparams_from_range(low, high, bits)
    packed = q.pack_weight(weight, step, zero, bits)
    bias = torch.randn(len(weight))
    return dict(type="linear", weight=packed, bias=bias, act=act, balance=None)


def test_quant_linear_is_the_layer_on_fake_quantized_operands():
    """Weights from the packed codes and inputs through Eq. (5), then a plain linear layer."""
    weight, x = torch.randn(6, 4), torch.randn(3, 5, 4)
    act = dict(type="uniform", bits=6, step=torch.tensor(0.1), zero=torch.tensor(31.0))
    state = linear_state(weight, 4, act)
    wq = torch.stack([
        q.fake_quant(row, *q.qparams_from_range(row.min(), row.max(), 4), 4) for row in weight
    ])
    expected = q.fake_quant(x, act["step"], act["zero"], 6) @ wq.T + state["bias"]
    torch.testing.assert_close(q.QuantLinear(state)(x), expected)


def test_quant_linear_balances_before_it_quantizes_by_group():
    """Inputs are divided by the balance, then rounded with the step of their time group."""
    x, balance = torch.randn(2, 5, 4), torch.tensor([0.5, 1.0, 2.0, 4.0])
    step, zero = torch.tensor([0.1, 0.3]), torch.tensor([7.0, 8.0])
    state = linear_state(torch.randn(6, 4), 4, dict(type="uniform", bits=4, step=step, zero=zero))
    state["balance"] = balance
    group, wq = torch.tensor([1, 0]), q.unpack_weight(state["weight"])
    expected = [
        q.fake_quant(x[i] / balance, step[g], zero[g], 4) @ wq.T + state["bias"]
        for i, g in enumerate(group)
    ]
    torch.testing.assert_close(q.QuantLinear(state)(x, group), torch.stack(expected))


def test_quant_linear_at_8_bits_is_close_to_nn_linear():
    """Eight bits on both operands: within one per cent of the full-precision layer."""
    linear, x = torch.nn.Linear(64, 32), torch.randn(100, 64)
    step, zero = q.qparams_from_range(x.min(), x.max(), 8)
    act = dict(type="uniform", bits=8, step=step, zero=zero)
    state = linear_state(linear.weight.detach(), 8, act)
    state["bias"] = linear.bias.detach()
    error = (q.QuantLinear(state)(x) - linear(x)).norm() / linear(x).norm()
    assert error < 0.01


def test_quant_conv_is_a_linear_layer_on_patches():
    """The patch embedding: stride equals kernel size."""
    weight, x = torch.randn(6, 3, 2, 2), torch.randn(2, 3, 8, 8)
    state = linear_state(weight, 8, dict(type="none"))
    out = q.QuantConv2d(state)(x)
    patches = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    matrix = q.unpack_weight(state["weight"]).flatten(1)
    expected = (patches @ matrix.T + state["bias"]).transpose(1, 2).reshape(2, 6, 4, 4)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_quant_matmul_gives_each_sample_its_groups_step():
    """Eq. (17): a batch of mixed timesteps uses, sample by sample, the step of its own group."""
    a, b = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 5)
    step1 = torch.tensor([0.02, 0.005])
    layer = q.QuantMatMul(dict(a=dict(type="softmax", bits=4, step1=step1), b=dict(type="none")))
    group = torch.tensor([1, 0, 0])
    expected = torch.stack([q.mrq_softmax(a[i], step1[group[i]], 4) @ b[i] for i in range(3)])
    torch.testing.assert_close(layer(a, b, group), expected)


def test_quantizer_state_round_trips():
    """What a quant file says of a quantizer makes the same quantizer again."""
    x, group = torch.rand(2, 3, 4), torch.tensor([0, 1])
    step = torch.tensor([0.01, 0.03])
    for quantizer in (
        q.UniformQuantizer(5, step, torch.tensor([0.0, 2.0])),
        q.SoftmaxQuantizer(5, step),
        q.GeluQuantizer(5, step, 2 * step),
    ):
        again = q.make_quantizer(q.quantizer_state(quantizer))
        assert torch.equal(again(x, group), quantizer(x, group))


@pytest.mark.parametrize("bits, share", [(8, 0.26), (6, 0.20), (4, 0.14)])
def test_packed_layers_of_dit_xl_are_small(bits, share):
    """At DiT-XL/2's shapes the stored linear layers take their share of the fp32 size."""
    shapes = [(3456, 1152), (1152, 1152), (4608, 1152), (1152, 4608)]
    stored = full = 0
    for shape in shapes:
        state = linear_state(torch.zeros(shape), bits, dict(type="none"))
        parts = [*state["weight"].values(), state["bias"]]
        stored += sum(p.nbytes for p in parts if isinstance(p, torch.Tensor))
        full += 4 * (shape[0] * shape[1] + shape[0])
    assert stored <= share * full


# ------------------------------------------------------------------------------------------------
# Products on integers

RANGES = {"both signs": (-1.0, 2.0), "no negative": (0.0, 3.0), "no positive": (-2.5, 0.0)}


def int_product(terms, weight):
    """The product alone: what is left of nothing, with the other sign."""
    return -q.int_error(terms, weight, torch.zeros(len(terms[0].codes), len(weight.codes)))


def int_case(bits, x_range, w_range, groups=None):
    """Inputs (40, 24), weights (16, 24), the quantizer of the inputs, steps of the weights."""
    torch.manual_seed(bits)
    x, w = (torch.empty(n, 24).uniform_(*RANGES[r]) for n, r in ((40, x_range), (16, w_range)))
    low, high = x.aminmax() if groups is None else x.view(groups, -1).aminmax(dim=1)
    return x, w, q.uniform_candidates(low, high, bits)[0], w.aminmax(dim=1, keepdim=True)


@pytest.mark.parametrize("w_range", RANGES)
@pytest.mark.parametrize("x_range", RANGES)
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_int_product_equals_the_product_of_fake_quantized(bits, x_range, w_range):
    """Eq. (5): zero points folded into sums of rows and columns, wherever the ranges lie."""
    x, w, act, per_channel = int_case(bits, x_range, w_range)
    for ends in (per_channel, w.aminmax()):
        step, zero = q.qparams_from_range(*ends, bits)
        found = int_product(act.codes(x), q.signed_codes(w, step, zero, bits))
        expected = act(x).double() @ q.fake_quant(w, step, zero, bits).double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_int_product_takes_a_step_for_each_time_group(bits):
    """--tgq-inputs: every row has its own step and zero point."""
    x, w, act, ends = int_case(bits, "both signs", "both signs", groups=4)
    group, (step, zero) = torch.arange(40) // 10, q.qparams_from_range(*ends, bits)
    found = int_product(act.codes(x, group), q.signed_codes(w, step, zero, bits))
    expected = act(x, group) @ q.fake_quant(w, step, zero, bits).T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_int_product_after_gelu_is_the_sum_of_two(bits, groups):
    """MRQ: the codes below zero with s_1, those above with s_2, also where they clip."""
    x, w, _, ends = int_case(bits, "both signs", "both signs")
    group = None if groups is None else torch.arange(40) % groups
    scale = torch.tensor(1.0) if groups is None else torch.rand(groups) + 0.5
    act = q.GeluQuantizer(bits, 0.6 * scale * 2.0**-bits, 3 * scale * 2.0**-bits)
    step, zero = q.qparams_from_range(*ends, bits)
    found = int_product(act.codes(x, group), q.signed_codes(w, step, zero, bits))
    expected = act(x, group) @ q.fake_quant(w, step, zero, bits).T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_int_product_is_exact_where_float_is_not():
    """4608 inputs at the ends of the range: int32 holds the sum, float32 would round it."""
    ends = torch.tensor(0.0), torch.tensor(255.0)
    x, w = torch.full((20, 4608), 255.0), torch.full((8, 4608), 255.0)
    x[:, ::2], act = 254, q.uniform_candidates(*ends, 8)[0]
    found = int_product(act.codes(x), q.signed_codes(w, torch.tensor(1.0), torch.tensor(0.0), 8))
    assert (found == 2304 * (255 * 255 + 254 * 255)).all()
