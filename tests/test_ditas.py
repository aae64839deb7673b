"""methods/ditas.py: low-rank branch, smoothing, grid search, and the script on the tiny DiT. The
numbers of the authors' code are from DZY122/DiTAS at commit 665c7eb."""

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

from common.quant_file import load_quant, make_layer, unpack_weight
from quant_ops import UniformQuantizer

SCRIPT = "methods/ditas"
DITAS = load_script(SCRIPT)
FLAGS = "--wbits 4 --abits 5 --rows 6 --batch-size 4".split()
STEPS = 50


def their_quantizer(weight):
    """utils_qaunt.py:110 with 4 bits: steps of range / 2^4, and 0 need not be in range."""
    low, high = weight.view(32, -1, weight.shape[1]).aminmax(dim=0, keepdim=True)
    scale = (high - low) / 16
    return UniformQuantizer(4, scale, -(low / scale).round())


class TheirInputs:
    """utils_qaunt.py:143 with 4 bits, of the 15 rows of a step; steps of range / 2^4."""

    def __call__(self, x, group=None):
        parts = x.view(-1, 15 * x.shape[1])
        low, high = parts.aminmax(dim=1, keepdim=True)
        scale = (high - low) / 16
        zero_point = -(low / scale).round()
        codes = ((parts / scale).round() + zero_point).clamp(0, 15)
        return ((codes - zero_point) * scale).view_as(x)


@pytest.fixture
def case():
    """A weight (64, 6), decomposed, and the data of 50 steps of 15 rows."""
    torch.manual_seed(0)
    weight = torch.randn(64, 6) * torch.logspace(-1, 1, 6)
    torch.manual_seed(1)
    sizes = torch.linspace(0.2, 2.7, STEPS).view(-1, 1, 1, 1)
    x = (torch.randn(STEPS, 3, 5, 6) * torch.logspace(1, -1, 6) * sizes).view(-1, 6)
    data = linear_data(torch.ones(len(x), 64), x @ weight.T, x, rows=150)
    return weight, DITAS.decompose(weight, 2, 10, their_quantizer), data


def test_decomposition_is_that_of_the_authors(case):
    """LinearQuant.py:265, rank 2: Q and L R."""
    _, quantized, left, right = case[1]
    product = left @ right
    expected = [
        [-0.1243, -0.2673, -0.1254, -0.7415, -2.3153, -3.3144],
        [-0.0225, -0.5245, 0.1362, -1.8829, -2.1561, 1.9153],
    ]
    torch.testing.assert_close(quantized[:2], torch.tensor(expected), rtol=0, atol=1e-4)
    expected = [
        [0.0067, -0.0161, 0.0213, 0.1254, 5.6942, 10.2334],
        [0.0002, -0.0001, 0.0036, 0.008, 3.5498, 1.1645],
    ]
    torch.testing.assert_close(product[:2], torch.tensor(expected), rtol=0, atol=1e-4)


def test_grid_search_is_that_of_the_authors(case):
    """LinearQuant.py:534 on all of 50 steps: losses, and the factors of the least, at 0.75."""
    _, (_, quantized, left, right), data = case
    weight, peaks = quantized + left @ right, DITAS.peaks(data)
    smooths = [DITAS.factors(peaks, quantized, alpha) for alpha in DITAS.ALPHAS]
    means = DITAS.losses(data, weight, smooths, TheirInputs()) / (15 * 64)
    expected = {0: 12.295, 1: 11.971, 10: 10.220, 14: 9.612, 15: 9.448, 16: 9.630, 20: 10.281}
    for i, loss in expected.items():
        assert abs(means[i] - loss) < 1e-3
    assert len(means) == 21
    found = DITAS.best_factors(data, quantized, weight, TheirInputs())
    expected = torch.tensor([33.1334, 12.733, 4.9964, 2.1682, 0.9401, 0.3271])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_peaks_are_of_all_timesteps(case):
    """a_j: a chunk of its own for every 10 steps, and the floor."""
    x = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 0.5, 0.0]]).repeat_interleave(7, dim=0)
    data = linear_data(torch.ones(14, 2), x=x, rows=7)
    assert DITAS.peaks(data).tolist() == pytest.approx([3.0, 2.0, 1e-4])


@pytest.mark.parametrize(("outputs", "size"), [(64, 32), (72, 36), (24, 24), (37, 37)])
def test_groups_are_of_one_input_channel(outputs, size):
    """Elements O / g rows apart share a scale; what 32 does not divide has the next divisor."""
    weight = torch.randn(outputs, 3)
    weight[:: outputs // size] *= 100  # all that shares a scale with row 0
    Q_W = DITAS.group_quantizer(weight, 4)
    assert Q_W.scale.shape == (1, outputs // size, 3)
    assert DITAS.view_of(Q_W, weight) == [size, outputs // size, 3]
    assert (Q_W.scale[0, 0] > 10 * Q_W.scale[0, 1:]).all()
    error = (DITAS.on_groups(Q_W, weight) - weight).abs().view(size, -1, 3)
    assert (error <= Q_W.scale / 2 + 1e-5).all() and error.max() > 0


def test_more_turns_and_rank_come_nearer():
    """Each turn lowers the error of Q + L R; so does a branch at all."""
    torch.manual_seed(0)
    weight = torch.randn(64, 48)

    def error(rank, turns):
        how = rank, turns, lambda w: DITAS.group_quantizer(w, 4)
        _, quantized, left, right = DITAS.decompose(weight, *how)
        return (weight - quantized - left @ right).norm()

    assert error(8, 10) < error(8, 2) < error(8, 1) < error(0, 10)


def quantized_layer(outputs, inputs, **changes):
    """A layer with an outlier channel, its data and what becomes of it."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    x = torch.randn(60, inputs)
    x[:, 1] *= 20
    data = linear_data(torch.ones(60, outputs), x @ layer.weight.T, x, rows=20)
    cfg = dict(wbits=4, abits=6, rank=32, alternations=3, layers="own", rows=None, tag="ditas")
    found = DITAS.quantize_linear(layer_of(layer), data, 12, DITAS.Settings(**cfg | changes))
    return layer, x, found


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 24), (37, 9), (6, 50)])
def test_state_is_the_layer_that_was_searched(outputs, inputs):
    """Of its data the made layer has the error that `cost` says; inputs are over s, per sample."""
    layer, x, found = quantized_layer(outputs, inputs)
    state, rank = found["state"], min(outputs, inputs) // 2
    assert state["low_rank"]["left"].shape == (outputs, min(rank, 32))
    made = make_layer(state)(x.view(12, 5, inputs)) - layer(x).view(12, 5, outputs)
    assert made.square().sum().item() == pytest.approx(found["cost"], rel=1e-4)
    assert state["smooth"][1] > 2 * state["smooth"][0]
    _, quantized, *_ = DITAS.decompose(layer.weight, rank, 3, lambda w: DITAS.group_quantizer(w, 4))
    stored = unpack_weight(state["weight"]) / state["smooth"]
    torch.testing.assert_close(stored, quantized, rtol=1e-4, atol=1e-6)


def test_smoothing_and_branch_lower_the_cost():
    """Against alpha = 0 with nothing but the weight's own peaks, and without a branch."""
    cost = quantized_layer(64, 24)[2]["cost"]
    assert cost < 0.8 * quantized_layer(64, 24, rank=0)[2]["cost"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DITAS, "ALPHAS", [0.0])
        assert cost < 0.5 * quantized_layer(64, 24)[2]["cost"]


# ------------------------------------------------------------------------------------------------
# The script


def made(run, *flags):
    """The quant file, and what was printed."""
    return quant_file_of(SCRIPT, run, *FLAGS, *flags)


def test_own_layers_are_the_four_of_a_block(run):
    """s is folded into adaLN for qkv and fc1, divided out at run time for proj and fc2."""
    file, printed = made(run)
    layers = file["layers"]
    assert len(layers) == 2 * 4 and "eps, signal to noise" in printed
    for name, state in layers.items():
        outputs, inputs = state["weight"]["shape"]
        assert state["weight"]["view"] == [32, outputs // 32, inputs]
        assert state["low_rank"]["right"].shape == (16, inputs)  # half of 32
        assert ("smooth" in state) == ("proj" in name or "fc2" in name)
        assert state["act"] == dict(type="dynamic", bits=5, per="sample", group_size=None)
    sampled = "--run", run, "--wbits", 4, "--abits", 5, "--tag", "ditas", "--num-images", 2
    result = run_in_process("04_sample", *sampled)
    assert result.returncode == 0, result.stderr


def test_released_layers_are_those_of_03(run, tiny_run):
    """The embedding has groups alone, the final layer all; attention products are per sample."""
    layers = made(run, "--layers", "released", "--rank", 0)[0]["layers"]
    assert layers.keys() == load_quant(tiny_run / "quant_w6a6.pt")["layers"].keys()
    embedding, product = layers["x_embedder.proj"], layers["blocks.1.attn.qk"]
    assert embedding["act"] == dict(type="none") and "low_rank" not in embedding
    assert product["a"]["per"] == product["b"]["per"] == "sample"
    assert not any("low_rank" in state for state in layers.values())


def test_stopped_run_resumes(run, monkeypatch):
    """The file is the same, bit for bit; finished units are not done again."""
    made(run)
    path = run / "quant_w4a5_ditas.pt"
    whole, done = path.read_bytes(), []
    path.unlink()
    quantize = DITAS.quantize_layer

    def stops(*args):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(args[0].name)
        return quantize(*args)

    with monkeypatch.context() as patch:
        patch.setattr(DITAS, "quantize_layer", stops)
        assert run_in_process(SCRIPT, "--run", run, *FLAGS).returncode == 130
    again = []
    monkeypatch.setattr(DITAS, "quantize_layer", lambda *a: again.append(a) or quantize(*a))
    made(run)
    assert path.read_bytes() == whole and len(again) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [("--rank -1", "--rank -1"), ("--alternations 0", "--alternations 0"),
     ("--abits 1", "--abits 1"), ("--rows 0", "--rows 0")],
)  # fmt: skip
def test_bad_flags_are_refused(run, flags, words):
    """One line, exit status 2, nothing written."""
    before = snapshot(run)
    refused(run_in_process(SCRIPT, "--run", run, *FLAGS, *flags.split()), words)
    assert snapshot(run) == before
