"""common/int_losses.py: losses on integer codes are those of quant_ops.py."""

import pytest
import torch
from conftest import alternate, linear_data, search_case

import quant_ops as q
from common import int_losses
from common.fast_search import FastSearch
from common.quantizers import DynamicQuantizer
from engine import avx2, cpu_products, int_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bits, by_group", [(8, False), (6, True), (4, True)])
def test_search_on_integers_chooses_what_the_plain_search_chooses(
    monkeypatch, gelu, bits, by_group
):
    """The same scales of weights and inputs from int8 products as from floating point."""
    if not int_products.int_mm_is_exact():
        pytest.skip("oneDNN is told to do without VNNI, and saturates")
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: True)
    case = search_case(bits, gelu, by_group)
    data, loss, tried = case[-1], q.WeightLoss(case[0], case[2]), case[1][1]
    assert isinstance(int_losses.on_integers(loss, tried, data), int_losses.IntWeightLoss)
    found, expected = (alternate(search, case, gelu) for search in (FastSearch(), q.search))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weight_with_one_scale_has_one_loss_on_integers(monkeypatch):
    """D5: of a weight with one scale for all channels the search on integers chooses one."""
    if not int_products.int_mm_is_exact():
        pytest.skip("oneDNN is told to do without VNNI, and saturates")
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: True)
    W, _, Q_X, _, data = search_case(6, gelu=False, by_group=False)
    loss, (_, tried) = q.WeightLoss(W, Q_X), q.uniform_candidates(*W.aminmax(), 6)
    assert isinstance(int_losses.on_integers(loss, tried, data), int_losses.IntWeightLoss)
    found, expected = (search(tried, data, loss) for search in (FastSearch(), q.search))
    assert torch.equal(found.scale, expected.scale)


PRODUCTS = {"int8": int_losses.INT_MM, "u8s8": int_losses._u8s8(32)}  # a region's largest code


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("region", [1, 2])
def test_loss_of_a_region_is_that_of_both(kind, region, by_group):
    """Only one scale of MRQ moves: the other's product, taken off z once, is not missed."""
    if kind == "u8s8" and cpu_products.pair_limit() == 0:
        pytest.skip("no u8 x s8 product on this CPU")
    W, (Q_W, _), Q_X, near, data = search_case(6, True, by_group)
    loss, candidates = q.InputLoss(W, Q_W), near[region - 1](Q_X)
    assert int_losses._moving_region(candidates) == region
    twin = int_losses.IntRegionLoss(*loss, PRODUCTS[kind], Q_X, region)
    for chunk in data:
        shared, expected = twin.prepare(chunk), loss.prepare(chunk)
        for Q in (candidates[9], candidates[60]):
            pair = twin(chunk, shared, Q), loss(chunk, expected, Q)
            torch.testing.assert_close(*pair, rtol=1e-5, atol=0)


def test_search_after_gelu_multiplies_one_region_for_each_candidate(monkeypatch):
    """A candidate of s_1 or s_2 costs one product, not two; both are made where both may change."""
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: True)
    W, (Q_W, _), Q_X, near, data = search_case(6, gelu=True, by_group=False)
    loss, both = q.InputLoss(W, Q_W), lambda a: q.GeluQuantizer(6, a, a)
    for region, around in enumerate(near, start=1):
        twin = int_losses.on_integers(loss, around(Q_X), data)
        assert isinstance(twin, int_losses.IntRegionLoss) and twin.region == region
    twin = int_losses.on_integers(loss, q.Candidates(both, torch.tensor([0.1, 0.2])), data)
    assert isinstance(twin, int_losses.IntInputLoss)


STATIC = q.UniformQuantizer(8, torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("device, unit, inputs, rows, outputs, integers", [
    (CPU, True, STATIC, 3, 23, True),
    (CPU, True, q.FullPrecision(), 40, 24, False),
    (CPU, True, DynamicQuantizer(8, "token"), 40, 24, False),
    (CPU, False, STATIC, 40, 24, False),
    (CUDA, True, STATIC, 17, 24, True),
    (CUDA, True, STATIC, 16, 24, False),  # a chunk too short for CUDA's unit
])  # fmt: skip
def test_losses_are_on_integers_where_they_can(
    monkeypatch, device, unit, inputs, rows, outputs, integers
):
    """Codes where there is a unit for them, it takes every chunk, and inputs have static scales."""
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: unit)
    data = linear_data(torch.zeros(50 + rows, outputs), x=torch.zeros(50 + rows, 64), rows=50)
    data.device = device
    W, tried = torch.zeros(outputs, 64), q.Candidates(lambda i: STATIC, torch.arange(3))
    for loss in (q.WeightLoss(W, inputs), q.InputLoss(W, STATIC)):
        on_codes = type(int_losses.on_integers(loss, tried, data)) is not type(loss)
        assert on_codes == (integers or inputs is not STATIC and isinstance(loss, q.InputLoss))


@pytest.mark.skipif(cpu_products.pair_limit() == 0, reason="no u8 x s8 product on this CPU")
@pytest.mark.parametrize("whose", ["oneDNN", cpu_products.AVX2])
@pytest.mark.parametrize("gelu, by_group", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("bits", [6, 4])
def test_search_on_u8s8_chooses_what_the_plain_search_chooses(
    monkeypatch, bits, gelu, by_group, whose
):
    """CPUs without VNNI: the same scales from products of uint8 by int8 codes, oneDNN's or ours;
    most weights have one sign, so that sums are large. Candidates of a weight behind two regions
    (MRQ) stay in floating point, which is faster."""
    if whose == cpu_products.AVX2 and avx2.why_not():
        pytest.skip(avx2.why_not())
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: False)
    monkeypatch.setattr(cpu_products, "whose", lambda: whose)
    case = search_case(bits, gelu, by_group, (32, 256), mean=0.3)
    W, (Q_W, tried), Q_X, grids, data = case
    of_weight, of_inputs = q.WeightLoss(W, Q_X), q.InputLoss(W, Q_W)
    sought = [(of_inputs, near(Q_X)) for near in grids] if gelu else [(of_inputs, grids)]
    twins = [int_losses.on_integers(*what, data) for what in sought]
    twin = int_losses.on_integers(of_weight, tried, data)
    assert (twin is of_weight) == gelu
    twins += [] if gelu else [twin]
    for twin in twins:
        assert twin.product.error is cpu_products.error
        assert bool(twin.product.weight(Q_W, W).run) == (whose == cpu_products.AVX2)
    found, expected = (alternate(search, case, gelu) for search in (FastSearch(), q.search))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(cpu_products.pair_limit() == 0, reason="no u8 x s8 product on this CPU")
def test_a_scale_of_zero_does_not_stop_a_search():
    """Nor do weights that are no number: codes are NaN before they are int8."""
    Q_W = q.UniformQuantizer(6, torch.zeros(32, 1), torch.zeros(32, 1))
    codes = cpu_products.weight_codes(Q_W, torch.zeros(32, 256), highest=63)
    assert codes.row_sum.isnan().all()


@pytest.mark.parametrize("limit, bits, highest, inputs, pays", [
    (cpu_products.SATURATING, 6, 63, 256, True),
    (cpu_products.SATURATING, 7, 255, 256, False),  # 2 * 127 * 255 does not fit
    (cpu_products.SATURATING, 6, 255, 256, True),  # 2 * 63 * 255 does
    (cpu_products.SATURATING, 7, 128, 256, True),  # a region of 8 bits
    (cpu_products.EXACT, 8, 255, 256, False),  # a weight less its zero point may need nine bits
    (0, 4, 15, 256, False),  # no such product
    (cpu_products.SATURATING, 6, 63, 255, False),  # too little work
])  # fmt: skip
def test_u8s8_is_taken_where_nothing_saturates_and_it_pays(
    monkeypatch, limit, bits, highest, inputs, pays
):
    """The bound is that of two neighbouring products."""
    monkeypatch.setattr(cpu_products, "pair_limit", lambda: limit)
    assert cpu_products.pays(torch.zeros(8, inputs), bits, highest) is pays


@pytest.mark.skipif(bool(avx2.why_not()), reason=avx2.why_not())
@pytest.mark.parametrize("gelu", [False, True])
def test_weight_of_a_search_is_packed_for_the_inputs_bits(monkeypatch, gelu):
    """Its run is the longest that no input's code of these bits, or of a region, overflows."""
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: False)
    monkeypatch.setattr(cpu_products, "whose", lambda: cpu_products.AVX2)
    monkeypatch.setattr(cpu_products, "pair_limit", lambda: cpu_products.SATURATING)
    for bits in (4, 6):
        W, (Q_W, _), Q_X, grids, data = search_case(bits, gelu, False, (32, 256), mean=0.3)
        candidates = grids[0](Q_X) if gelu else grids
        product = int_losses.on_integers(q.InputLoss(W, Q_W), candidates, data).product
        v = (q.quantize(W, Q_W.scale, Q_W.zero_point, bits) - Q_W.zero_point).to(torch.int8)
        highest = 2 ** (bits - 1) if gelu else 2**bits - 1
        assert product.weight(Q_W, W).run == avx2.quick_run(v, highest)
