"""common/fast_search.py chooses what `quant_ops.search` chooses, with fewer losses computed."""

import shutil

import pytest
import torch
from conftest import alternate, linear_data, search_case

import quant_ops as q
from common import fast_search
from common.fast_search import FastSearch
from common.quantizers import DynamicQuantizer
from engine import avx2, cpu_products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Chunks(list):
    """Data whose chunks are numbers."""

    group, device = None, CPU


class Table:
    """A loss that is looked up, entry (chunk, candidate) of a table; remembers the entries."""

    def __init__(self, table):
        self.table, self.calls = table, []

    def prepare(self, chunk):
        return chunk

    def __call__(self, chunk, shared, candidate):
        self.calls.append((chunk, int(candidate)))
        return self.table[chunk, int(candidate)]


NUMBERS = q.Candidates(lambda i: i, torch.arange(100))


def random_table(shape, seed):
    """(20, 100, ...) losses around a minimum: whole numbers, so with many ties; some are NaN, and
    the last candidates, without loss, are reached before the last chunk."""
    generator = torch.Generator().manual_seed(seed)
    curve = torch.linspace(-3, 2, 100).square().view(100, *[1] * len(shape))
    noise = torch.rand(20, 100, *shape, generator=generator).mul(4).round()
    table = curve.round() + noise
    table[-3:] = 0
    table[5, (seed * 31) % 97 :: 7] = torch.nan
    return table


@pytest.mark.parametrize("shape", [(), (3,), (4, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_choice_is_that_of_the_plain_search(shape, seed):
    """The first of the least sums, ties and all, NaN never, whatever an earlier search expected."""
    search, rows = FastSearch(), Chunks(range(20))
    for table in (random_table(shape, seed), random_table(shape, seed + 50)):
        for scale in (1.0, 0.1, 30.0):  # what is expected is right, too little, too much
            loss = Table(scale * table)
            found = search(NUMBERS, rows, loss)
            assert torch.equal(found, q.search(NUMBERS, rows, loss))
            assert not loss.table.sum(dim=0)[found].isnan().any()


def test_nan_everywhere_leaves_the_first():
    """No candidate is better than another: both searches take the first, and end."""
    loss = Table(torch.full((3, 100), torch.nan))
    assert FastSearch()(NUMBERS, Chunks(range(3)), loss) == q.search(NUMBERS, range(3), loss) == 0


def test_no_loss_is_computed_twice_and_pruning_saves_many():
    """Every candidate is tried; the losses of pruned ones are left out, the more so the second
    time, when it is known what to expect."""
    search, counts = FastSearch(), []
    for _ in range(2):
        loss = Table(random_table((), 1).nan_to_num(9.0))
        search(NUMBERS, Chunks(range(20)), loss)
        assert len(loss.calls) == len({*loss.calls}) and {i for _, i in loss.calls} == {*range(100)}
        counts.append(len(loss.calls))
    assert counts[1] < counts[0] < 0.8 * 20 * 100


def test_candidate_that_one_channel_still_needs_is_kept():
    """Channels have minima at either end; nothing but the whole sum separates the best two."""
    table = torch.full((8, 100, 2), 9.0)
    table[:, 2, 0], table[:, 97, 1] = 1, 1
    table[:, 1:3, 1], table[:, 97, 0] = 99, 99
    table[0, 2, 0], table[7, 1, 0], table[:7, 1, 0] = 2, 3, 1  # 9 and 10 in the end
    assert FastSearch()(NUMBERS, Chunks(range(8)), Table(table)).tolist() == [2, 97]


# ------------------------------------------------------------------------------------------------
# Losses of linear layers on integer codes


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bits, by_group", [(8, False), (6, True), (4, True)])
def test_search_on_integers_chooses_what_the_plain_search_chooses(
    monkeypatch, gelu, bits, by_group
):
    """The same scales of weights and inputs from int8 products as from floating point."""
    monkeypatch.setattr(fast_search, "has_int_unit", lambda device: True)
    case = search_case(bits, gelu, by_group)
    data, loss, tried = case[-1], q.WeightLoss(case[0], case[2]), case[1][1]
    assert isinstance(fast_search.on_integers(loss, tried, data), fast_search.IntWeightLoss)
    found, expected = (alternate(search, case, gelu) for search in (FastSearch(), q.search))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
    monkeypatch.setattr(fast_search, "has_int_unit", lambda device: unit)
    data = linear_data(torch.zeros(50 + rows, outputs), x=torch.zeros(50 + rows, 64), rows=50)
    data.device = device
    W, tried = torch.zeros(outputs, 64), q.Candidates(lambda i: STATIC, torch.arange(3))
    for loss in (q.WeightLoss(W, inputs), q.InputLoss(W, STATIC)):
        on_codes = type(fast_search.on_integers(loss, tried, data)) is not type(loss)
        assert on_codes == (integers or inputs is not STATIC and isinstance(loss, q.InputLoss))


@pytest.mark.skipif(cpu_products.pair_limit() == 0, reason="no u8 x s8 product on this CPU")
@pytest.mark.parametrize("whose", ["oneDNN", cpu_products.AVX2])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("bits", [6, 4])
def test_search_on_u8s8_chooses_what_the_plain_search_chooses(monkeypatch, bits, by_group, whose):
    """CPUs without VNNI: the same scales from products of uint8 by int8 codes, oneDNN's or ours;
    most weights have one sign, so that sums are large."""
    if whose == cpu_products.AVX2 and avx2.why_not():
        pytest.skip(avx2.why_not())
    monkeypatch.setattr(fast_search, "has_int_unit", lambda device: False)
    monkeypatch.setattr(cpu_products, "whose", lambda: whose)
    case = search_case(bits, False, by_group, (32, 256), mean=0.3)
    W, (Q_W, tried), Q_X, grids, data = case
    for loss, candidates in ((q.WeightLoss(W, Q_X), tried), (q.InputLoss(W, Q_W), grids)):
        product = fast_search.on_integers(loss, candidates, data).product
        assert product.inputs is cpu_products.input_codes
        assert bool(product.weight(Q_W, W).run) == (whose == cpu_products.AVX2)
    found, expected = (alternate(search, case, False) for search in (FastSearch(), q.search))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(cpu_products.pair_limit() == 0, reason="no u8 x s8 product on this CPU")
def test_a_scale_of_zero_does_not_stop_a_search():
    """Nor do weights that are no number: codes are NaN before they are int8."""
    Q_W = q.UniformQuantizer(6, torch.zeros(32, 1), torch.zeros(32, 1))
    codes = cpu_products.weight_codes(Q_W, torch.zeros(32, 256), highest=63)
    assert codes.row_sum.isnan().all()


@pytest.mark.parametrize("limit, bits, inputs, pays", [
    (cpu_products.SATURATING, (6, 6), 256, True),
    (cpu_products.SATURATING, (7, 8), 256, False),  # 2 * 127 * 255 does not fit
    (cpu_products.SATURATING, (6, 8), 256, True),  # 2 * 63 * 255 does
    (cpu_products.EXACT, (8, 8), 256, False),  # a weight less its zero point may need nine bits
    (0, (4, 4), 256, False),  # no such product
    (cpu_products.SATURATING, (6, 6), 255, False),  # too little work
])  # fmt: skip
def test_u8s8_is_taken_where_nothing_saturates_and_it_pays(monkeypatch, limit, bits, inputs, pays):
    """The bound is that of two neighbouring products; after GELU the floating product is faster."""
    monkeypatch.setattr(cpu_products, "pair_limit", lambda: limit)
    one, weight = torch.tensor(1.0), torch.zeros(8, inputs)
    assert cpu_products.pays(weight, bits[0], q.UniformQuantizer(bits[1], one, one)) is pays
    assert not cpu_products.pays(weight, bits[0], q.GeluQuantizer(bits[1], one, one))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("unit", [False, True])
def test_compiled_search_chooses_the_same_scales(monkeypatch, unit):
    """--compile fuses passes over memory and changes no scale."""
    monkeypatch.setattr(fast_search, "has_int_unit", lambda device: unit)
    case = search_case(6, gelu=True, by_group=True)
    searches = FastSearch(compile_losses=True), FastSearch()
    found, expected = (alternate(search, case, gelu=True) for search in searches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
