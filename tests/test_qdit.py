"""methods/qdit.py: GPTQ in groups, dynamic ranges, the search for group sizes, the script itself.

The numbers of the authors' code are from Juanerx/Q-DiT at commit 519d24a."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    layer_of,
    linear_data,
    load_script,
    quant_file_of,
    refused,
    run_in_process,
    snapshot,
)

from common.checkpoints import load_calib
from common.quant_file import load_quant, make_layer
from common.quantizers import DynamicQuantizer
from methods import group_search
from methods.dynamic import OnRows, operands
from methods.group_search import Evolution, Fitness
from methods.rounding import gptq_groups
from models_dit import MatMul

SCRIPT = "methods/qdit"
QDIT = load_script(SCRIPT)
FLAGS = "--wbits 4 --abits 5 --rows 6 --batch-size 4".split()
SEARCH = "--group-size 64 --group-search --generations 2 --population 5 --search-rows 4".split()

# ------------------------------------------------------------------------------------------------
# Weights


def correlated(rows=60, inputs=16):
    """Inputs of which one is always 0, and a weight."""
    torch.manual_seed(0)
    x = torch.randn(rows, 4) @ torch.randn(4, inputs) + 0.3 * torch.randn(rows, inputs)
    weight = torch.randn(3, inputs)
    x[:, 5] = 0
    return x, weight


def test_gptq_in_groups_is_that_of_the_authors():
    """qdit/gptq.py:240 with groupsize 8 and blocksize 8: there its ranges (line 289) are not those
    of weights that errors of its own block have yet to reach."""
    x, weight = correlated()
    expected = [
        [1.1903, 0, -1.1903, -1.7854, 1.7854, 0, 0.5951, 1.1903,
         0, 1.4203, 0.7101, 2.8405, -0.7101, -2.1304, -0.7101, -1.4203],
        [-0.4107, 0.8214, 0.8214, 0.8214, -0.8214, 0, 0.8214, 2.0534,
         0.3546, 1.0639, -1.0639, -1.0639, 1.4185, 0.7093, 0.7093, 1.0639],
        [0.9908, 0, -0.4954, 0.4954, 0.9908, 0, 1.4862, -1.4862,
         -1.5499, -1.0333, 2.0666, 0.5166, 0, 0, 0, 1.5499],
    ]  # fmt: skip
    found, Q_W = gptq_groups(weight, 8, 3, x.T @ x)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    assert Q_W.scale.shape == Q_W.zero_point.shape == (3, 2, 1)
    torch.testing.assert_close(Q_W(found.view(3, 2, 8)).view(3, 16), found)  # on its grids
    error = (x @ (found - weight).T).norm()
    assert error < 0.7 * (x @ (QDIT.round_groups(weight, 8, 3) - weight).T).norm()


def test_gptq_in_groups_of_uncorrelated_inputs_is_nearest_rounding():
    """A diagonal Gram matrix leaves nothing to make up for: the min-max grids of the groups."""
    weight = torch.randn(5, 24)
    found, _ = gptq_groups(weight, 6, 3, torch.diag(torch.rand(24) + 0.1))
    torch.testing.assert_close(found, QDIT.round_groups(weight, 6, 3))


def test_group_size_is_the_nearest_divisor():
    """Of a layer's inputs; a width that no size divides has its own."""
    cases = {(1152, 128): 128, (4608, 288): 288, (24, 128): 24, (192, 128): 96, (131, 128): 131}
    assert {case: QDIT.divisor(*case) for case in cases} == cases
    assert QDIT.divisor(128, 192) == 128 and QDIT.divisor(512, 192) == 256


# ------------------------------------------------------------------------------------------------
# Activations


def test_dynamic_ranges_are_those_of_the_authors():
    """qdit/quant.py:151 with 3 bits and groups of 4, asymmetric, of every token."""
    torch.manual_seed(2)
    x = torch.randn(2, 8) * torch.tensor([1.0] * 4 + [8.0] * 4)
    expected = [
        [-0.9518, 0.9518, -1.269, -0.9518, -10.9091, 8.1818, -8.1818, 0.0],
        [-0.895, 0.358, -0.537, -0.179, 8.0479, -6.036, -2.012, -4.024],
    ]
    found = DynamicQuantizer(3, "token", 4)(x)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("post_softmax", [False, True])
def test_operands_have_a_range_for_each_token_and_head(post_softmax):
    """q, k and v as quantized on their own; k^T has its tokens in columns."""
    x = torch.randn(2, 3, 5, 4) * torch.logspace(-1, 1, 5)[:, None]
    by_token = DynamicQuantizer(4, "token")(x)
    Q_A, Q_B = operands(layer_of(MatMul(), post_softmax=post_softmax), 4, "token")
    assert torch.equal(Q_A(x), by_token)
    found = Q_B(x) if post_softmax else Q_B(x.transpose(2, 3)).transpose(2, 3)
    assert torch.equal(found, by_token)


def test_rows_of_a_sample_share_a_range():
    """What the search of a layer sees, a row for each token, is what the network sees."""
    x, Q = torch.randn(6, 5, 8), DynamicQuantizer(4, "sample")
    assert torch.equal(OnRows(Q, 5)(x.flatten(0, 1)), Q(x).flatten(0, 1))


# ------------------------------------------------------------------------------------------------
# Group sizes


def test_evolution_finds_the_best_within_the_budget():
    """Far fewer candidates than there are, none twice; the first one is where it starts."""
    space, target, seen = [(1, 2, 3, 4)] * 8, (4, 1, 4, 1, 4, 1, 4, 1), []

    def fitness(candidate):
        seen.append(candidate)
        return -sum(abs(a - b) for a, b in zip(candidate, target, strict=True))

    def allowed(candidate):
        return sum(candidate) >= 20

    found = [
        Evolution().search(space, (3,) * 8, allowed, fitness, random.Random(0)) for _ in range(2)
    ]
    assert found == [target] * 2 and seen[0] == (3,) * 8 and len(seen) == 2 * 550
    assert len(set(seen)) == 550 and all(map(allowed, seen))


def test_evolution_ends_where_nothing_is_left_to_try():
    """A space of three candidates, one of them not allowed."""
    found = Evolution().search([(1, 2, 3)], (2,), lambda x: x != (3,), sum, random.Random(0))
    assert found == (2,)


def test_mutants_and_crossovers_stay_near_their_parents():
    """A mutant changes a layer in ten; a crossover takes every layer from one of its two."""
    draw, how = random.Random(0), Evolution()
    mutant = how.mutant((0,) * 1000, [range(1, 9)] * 1000, draw)
    assert 60 < sum(map(bool, mutant)) < 140
    child = how.cross([(1,) * 100, (2,) * 100], draw)
    assert set(child) <= {1, 2} and len(child) == 100
    assert any(set(how.cross([(1,) * 100, (2,) * 100], draw)) == {1, 2} for _ in range(5))


# ------------------------------------------------------------------------------------------------
# The script


def made(run, *flags):
    """The layers of the quant file, and what was printed."""
    file, printed = quant_file_of(SCRIPT, run, *FLAGS, *flags)
    return file["layers"], printed


def test_own_layers_are_those_of_the_blocks(run):
    """Weights and inputs of four, weights alone of adaLN; groups have scales of their own."""
    layers, printed = made(run, "--group-size", 16)
    assert len(layers) == 2 * 5 and "eps, signal to noise" in printed
    for name, state in layers.items():
        inputs = 128 if "fc2" in name else 32
        outputs = state["weight"]["shape"][0]
        assert state["weight"]["scale"].shape == (outputs, inputs // 16, 1)
        assert state["weight"]["bits"] == 4
        act = dict(type="dynamic", bits=5, per="token", group_size=16)
        assert state["act"] == (dict(type="none") if "adaLN" in name else act)
    sampled = "--run", run, "--wbits", 4, "--abits", 5, "--tag", "qdit", "--num-images", 2
    result = run_in_process("04_sample", *sampled)
    assert result.returncode == 0, result.stderr


def test_released_layers_are_those_of_03(run, tiny_run):
    """Embedding and final layer too, attention products per token; adaLN in full precision."""
    layers, _ = made(run, "--layers", "released")
    assert layers.keys() == load_quant(tiny_run / "quant_w6a6.pt")["layers"].keys()
    assert layers["x_embedder.proj"]["act"] == dict(type="none")
    kinds = {name: layers[f"blocks.1.attn.{name}"] for name in ("qk", "av")}
    found = [kinds[name][side]["per"] for name in ("qk", "av") for side in "ab"]
    assert found == ["token", "column", "token", "token"]
    layers, _ = made(run, "--layers", "released", "--act-range", "sample", "--force")
    assert layers["blocks.1.attn.qk"]["b"]["per"] == layers["final_layer.linear"]["act"]["per"]


def test_gptq_sees_quantized_inputs_of_quantized_units(run, monkeypatch):
    """On every layer's inputs its own quantizer changes nothing any more; they are not those of the
    full-precision units, but for the first."""
    seen, Q = [], DynamicQuantizer(5, "token", 32)
    gram = QDIT.gram
    monkeypatch.setattr(QDIT, "gram", lambda data, Q: seen.append(data) or gram(data, Q))
    quantize = QDIT.quantize_linear
    plain = []

    def noted(phase3, layer, *rest):
        plain.append((layer.spec.name, phase3.data(layer)))
        return quantize(phase3, layer, *rest)

    monkeypatch.setattr(QDIT, "quantize_linear", noted)
    made(run, "--group-size", 32)
    for (name, full), data in zip(plain, seen, strict=True):
        x, before = (torch.cat([chunk.x for chunk in chunks]) for chunks in (data, full))
        on_grid = x if "adaLN" in name else Q(x)
        torch.testing.assert_close(x, on_grid, rtol=0, atol=1e-5)
        assert "adaLN" in name or 0 < (x - before).norm() < 0.3 * before.norm()
    first, later = (torch.cat([c.x for c in seen[i]]) for i in (0, 5))  # qkv of both blocks
    on_grid = [Q(torch.cat([c.x for c in plain[i][1]])) for i in (0, 5)]
    assert torch.equal(first, on_grid[0]) and not torch.allclose(later, on_grid[1])


def stopped_after(monkeypatch, owner, name, calls):
    """This function ends as if the user had stopped the run, after so many calls; those calls."""
    function, done = getattr(owner, name), []

    def counted(*args):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(args)
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return done


def test_stopped_run_resumes_its_search_and_its_units(run, monkeypatch):
    """Nothing is measured or quantized twice; the file is the same, bit for bit."""
    layers, printed = made(run, *SEARCH)
    sizes = [state["act"]["group_size"] for name, state in layers.items() if "fc2" in name]
    assert "group sizes: SNR" in printed and sum(sizes) >= 2 * 64 and len(sizes) == 2
    path = run / "quant_w4a5_qdit.pt"
    whole = path.read_bytes()
    path.unlink()
    limits, counts = (3, 100, 100), (100, 2, 100)
    measured = units = 0
    for limit, count in zip(limits, counts, strict=True):
        with monkeypatch.context() as patch:
            measures = stopped_after(patch, Fitness, "measure", limit)
            quantized = stopped_after(patch, QDIT, "quantize_unit", count)
            status = run_in_process(SCRIPT, "--run", run, *FLAGS, *SEARCH).returncode
        measured, units = measured + len(measures), units + len(quantized)
        assert status == (0 if (limit, count) == (100, 100) else 130)
    assert path.read_bytes() == whole and units == 4 and measured == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--group-size 0", "--group-size 0"), ("--generations -1", "--generations -1"),
     ("--search-rows 0", "--search-rows 0"), ("--wbits 9", "--wbits 9"), ("--tag a/b", "--tag")],
)  # fmt: skip
def test_bad_flags_are_refused(run, flags, words):
    """One line, exit status 2, nothing written."""
    before = snapshot(run)
    refused(run_in_process(SCRIPT, "--run", run, *FLAGS, *flags.split()), words)
    assert snapshot(run) == before


def test_fitness_is_measured_on_as_many_calibration_rows_as_asked(run, monkeypatch):
    """--search-rows, spread over the groups; never the report's validation rows."""
    seen, real = [], group_search.signal_to_noise
    monkeypatch.setattr(group_search, "signal_to_noise", lambda *a: seen.append(a[2]) or real(*a))
    flags = "--wbits 4 --abits 5 --rows 6 --group-size 64 --group-search --generations 1"
    quant_file_of(SCRIPT, run, *flags.split(), "--population", 2, "--search-rows", 3)
    rows, known = seen[0]["validation"], load_calib(run)["calibration"]["x"]
    assert rows["group"].tolist() == [0, 1, 2]
    assert all((x == known).flatten(1).all(1).any() for x in rows["x"])


@pytest.mark.parametrize("act_range", ["token", "sample"])
def test_cost_is_the_error_of_the_layer_in_the_file(act_range):
    """Ranges of a sample are those of all its tokens, in the report as in the network."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 6).requires_grad_(False)
    x = torch.randn(12, 5, 16) * torch.logspace(-1, 1, 5)[:, None]
    rows = x.flatten(0, 1)
    data = linear_data(torch.ones(60, 6), rows @ layer.weight.T, rows, rows=20)
    unit = SimpleNamespace(groups=torch.zeros(12))
    phase3 = SimpleNamespace(data=lambda layer: data, unit=unit)
    cfg = QDIT.Settings(4, 5, 8, False, 1, 1, 1, act_range, "own", None, "")
    Q_X = DynamicQuantizer(5, act_range, 8)
    found = QDIT.quantize_linear(phase3, layer_of(layer), Q_X, 8, data, cfg)
    error = make_layer(found["state"])(x) - layer(x)
    assert error.square().sum().item() == pytest.approx(found["cost"], rel=1e-4)
