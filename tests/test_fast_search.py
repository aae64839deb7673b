"""common/fast_search.py chooses what `quant_ops.search` chooses, with fewer losses computed."""

import shutil

import pytest
import torch
from conftest import alternate, search_case

import quant_ops as q
from common import int_losses
from common.fast_search import FastSearch


class Chunks(list):
    """Data whose chunks are numbers."""

    group, device = None, torch.device("cpu")


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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("unit", [False, True])
def test_compiled_search_chooses_the_same_scales(monkeypatch, unit):
    """--compile fuses passes over memory and changes no scale."""
    monkeypatch.setattr(int_losses, "has_int_unit", lambda device: unit)
    case = search_case(6, gelu=True, by_group=True)
    searches = FastSearch(compile_losses=True), FastSearch()
    found, expected = (alternate(search, case, gelu=True) for search in searches)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
