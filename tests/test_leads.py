"""benchmarks/leads.py measures every lead on the tiny run; each method does what its name says."""

import re
import subprocess
import sys
from itertools import combinations, pairwise
from os import environ

import pytest
import torch
from conftest import BATCH, ENVIRONMENT, ROOT, run_script

import models_dit as dit
import quant_ops as q

sys.path.insert(0, str(ROOT / "benchmarks"))
import leads  # noqa: E402
import methods  # noqa: E402


def run(*flags):
    command = [sys.executable, ROOT / "benchmarks" / "leads.py", *map(str, flags)]
    text = dict(capture_output=True, text=True, timeout=300)
    return subprocess.run(command, env=environ | ENVIRONMENT, **text)


@pytest.fixture(scope="module")
def best_run(tiny_run):
    """The tiny run with a quant file of --preset best, W4A8, beside what it has."""
    flags = "--wbits 4 --abits 8 --preset best --rows 6".split()
    log = run_script("03_quantize", "--run", tiny_run, "--batch-size", BATCH["03"], *flags)
    assert log.returncode == 0, log.stderr
    yield tiny_run
    (tiny_run / "quant_w4a8_best.pt").unlink()


@pytest.fixture(scope="module")
def table(best_run, tmp_path_factory):
    """Cells of the table, [variant, bits, SNR, PSNR, change, time]; printed and written agree."""
    out = tmp_path_factory.mktemp("leads") / "table.md"
    flags = ["--bits", "4/8", "--num-images", 4, "--iterations", 50, "--out", out]
    result = run("--run", best_run, *flags)
    assert result.returncode == 0, result.stderr
    assert out.read_text() == result.stdout
    assert run("--run", best_run, *flags).returncode == 2  # nothing is overwritten
    return [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[2:]]


def test_table_has_a_row_for_each_variant(table, best_run):
    """In their order, with SNR and PSNR; best is the file as it is, its rounding's time 1."""
    assert [row[0] for row in table] == list(leads.BASE)
    assert all(float(row[2]) > 0 and float(row[3]) > 0 and row[1] == "4/8" for row in table)
    quant = dit.load_artifact(best_run / "quant_w4a8_best.pt", "quant", "03")
    assert table[0][2] == f"{quant['report']['snr_weighted']:.2f}"
    assert table[0][5] == "1"


def test_change_is_that_of_the_means(table):
    """Every row but best's tells the mean difference to its base's PSNR and its interval."""
    psnr = {row[0]: float(row[3]) for row in table}
    for variant, _, _, _, change, *_ in table[1:]:
        mean, low, high = map(float, re.findall(r"[+-]\d+\.\d+", change))
        assert low <= mean <= high
        assert abs(mean - psnr[variant] + psnr[leads.BASE[variant]]) < 0.021


@pytest.mark.parametrize("flags", ["--bits 3/3", "--num-images 0", "--run nowhere"])
def test_bad_input_is_one_line(best_run, flags):
    """Status 2 and the reason, before anything is measured."""
    result = run("--run", best_run, "--bits", "4/8", *flags.split())
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def layer(bits=4):
    """A weight (8, 16), its grid, and the gram matrix of correlated inputs (200, 16)."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 16), torch.randn(200, 16) @ torch.randn(16, 16)
    grid = q.qparams_from_range(*weight.aminmax(dim=1, keepdim=True), bits)
    return weight, x, (*grid, bits), (x.T @ x).double()


def test_adaround_stays_on_the_grid_within_a_step():
    """Grid values, each no more than a step from its weight, and of less error than the nearest."""
    weight, x, grid, gram = layer()
    rounded = methods.adaround(weight, *grid, gram, 300)
    torch.testing.assert_close(q.fake_quant(rounded, *grid), rounded)
    assert ((rounded - weight).abs() <= 1.001 * grid[0]).all()
    error, nearest = (x @ (w - weight).T for w in (rounded, q.fake_quant(weight, *grid)))
    assert error.norm() < 0.8 * nearest.norm()


def test_refit_without_damping_is_least_squares():
    """The solution of torch.linalg.lstsq on rows scaled by the root of their weight."""
    weight, x, *_ = layer()
    x, y, grad = x.double(), torch.randn(200, 8).double(), torch.rand(200, 8).double()
    rows = grad.square().mean(dim=1, keepdim=True)
    chunks = [[v[part] for v in (grad, y, x, rows)] for part in (slice(120), slice(120, 200))]
    found = methods.refit(weight.double(), (x * rows).T @ x, chunks, damp=0)
    wanted = torch.linalg.lstsq(rows.sqrt() * x, rows.sqrt() * y).solution.T
    torch.testing.assert_close(found, wanted)


def test_group_bias_removes_a_groups_mean_error():
    """With the bias of its own group a layer's mean error is 0 in each group; in two chunks."""
    weight, x, grid, _ = layer()
    group, bias = torch.arange(200) % 3, torch.randn(8)
    y = x @ weight.T
    w, none = q.fake_quant(weight, *grid), dict(type="none")
    chunks = [[y[part], y[part], x[part], group[part]] for part in (slice(90), slice(90, 200))]
    errors, _ = methods.mean_errors(w, chunks, 3)
    packed = q.pack_weight(w, *grid)
    state = dict(weight=packed, bias=bias + errors, act=none, balance=None)
    out = methods.GroupBias(state)(x[:, None], group)[:, 0]
    for i in range(3):
        mean = (out - y - bias)[group == i].mean(dim=0)
        torch.testing.assert_close(mean, torch.zeros(8), atol=1e-5, rtol=0)


def test_bias_of_all_timesteps_removes_the_mean_error():
    """The second of `mean_errors` is the mean over all tokens, however groups differ in size."""
    weight, x, *_ = layer()
    group, y = (torch.arange(200) > 150).long(), torch.randn(200, 8)
    _, error = methods.mean_errors(weight, [[y, y, x, group]], 2)
    torch.testing.assert_close(error, (y - x @ weight.T).mean(dim=0))


def spread(levels, t, table):
    """Summed squared distance of the levels to the mean of their group."""
    groups = [levels[table[t] == i] for i in table.unique()]
    return sum((rows - rows.mean(dim=0)).square().sum().item() for rows in groups)


@pytest.mark.parametrize("least", [1, 4])
def test_cluster_equals_brute_force(least):
    """Among all splits of 9 timesteps into 3 runs that hold enough rows, none is better."""
    torch.manual_seed(least)
    t = torch.randint(9, (30,)).sort().values
    levels, searched = torch.randn(30, 4) + t[:, None] ** 0.5, t[::2]
    splits = {}
    for cuts in combinations(range(1, 9), 2):
        table = torch.bucketize(torch.arange(9), torch.tensor(cuts), right=True)
        counts = [((searched >= i) & (searched < j)).sum() for i, j in pairwise((0, *cuts, 9))]
        if min(counts) >= least:
            splits[tuple(table.tolist())] = spread(levels, t, table)
    found = tuple(methods.cluster(levels, t, searched, 9, 3, least).tolist())
    assert len(splits) > 1 and splits[found] == min(splits.values())


def test_cluster_without_enough_rows_is_refused():
    """5 rows cannot fill 3 groups of 2."""
    with pytest.raises(dit.InputError):
        methods.cluster(torch.randn(5, 2), torch.arange(5), torch.arange(5), 5, 3, 2)
