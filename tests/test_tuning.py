"""methods/tuning.py: what learns, what stays, what it gains, and that a killed run resumes."""

import pytest
import torch
import torch.nn as nn
from conftest import (
    STATIC,
    leftovers,
    linked,
    quant_file_of,
    refused,
    run_in_process,
    same_leaves,
)

from common import quant_file
from common.checkpoints import load_calib, load_calibrated
from common.parts import Parts
from common.phase3 import Machine, Phase3
from common.quantizers import DynamicQuantizer
from common.unit_data import rows_to_search
from methods import tuning
from models_dit import Diffusion, explicit_products
from quant_ops import UniformQuantizer, qparams_from_range

BITS = "--wbits 3 --abits 6 --rows 12".split()


@pytest.fixture(scope="module")
def run_like(tiny_run, tmp_path_factory):
    """run_like(name): a new run with the tiny run's calibration rows and gradients."""
    return lambda name: linked(tiny_run, tmp_path_factory.mktemp(name) / "run")


@pytest.fixture(scope="module", params=[["--rank", "2"], [*STATIC, "--cond-bits", "none"]])
def files(run_like, request):
    """The files without and with learning, by epochs: dynamic scales and a branch; time groups."""

    def file(epochs):
        flags = *BITS, *request.param, "--tune-epochs", epochs
        return quant_file_of("methods/tqdit_plus", run_like(f"epochs_{epochs}"), *flags)[0]

    return {epochs: file(epochs) for epochs in ("none", "60")}


def test_scales_and_biases_change_and_nothing_else(files):
    """Codes, zero points, branches, products and what is in full precision stay."""
    before, after = (file["layers"] for file in (files["none"], files["60"]))
    assert before.keys() == after.keys()
    for name, state in before.items():
        new = after[name]
        if state["type"] != "matmul":
            assert not torch.equal(state["weight"]["scale"], new["weight"]["scale"]), name
            assert not torch.equal(state["bias"], new["bias"]), name
            new = new | dict(bias=state["bias"])
            new["weight"] = new["weight"] | dict(scale=state["weight"]["scale"])
        assert same_leaves(state, new), name
    assert same_leaves(files["none"]["state"], files["60"]["state"])


def test_the_network_comes_nearer_to_full_precision(files, tiny_run):
    """On the rows it learns from, as `output_error` counts."""
    errors = {epochs: error_of(file, tiny_run) for epochs, file in files.items()}
    assert errors["60"] < 0.8 * errors["none"]


class Given:
    """What `examples` asks of a Phase3."""

    rows = 12

    def __init__(self, run):
        self.calib = load_calib(run)
        self.model = explicit_products(load_calibrated(self.calib))
        self.machine = Machine(torch.device("cpu"), batch_size=5, memory_limit=None, force=False)

    timesteps, sensitivity = Phase3.timesteps, Phase3.sensitivity


@torch.no_grad()
def error_of(file, run):
    """`output_error` of a quant file over the calibration rows."""
    quantized = quant_file.build_quantized(file, "a test")
    return tuning.output_error(quantized, *tuning.examples(Given(run))).item()


def test_examples_are_weighted_by_the_sampler_s_sensitivity(tiny_run):
    """On average by 1, each row's outputs are those of full precision."""
    given = Given(tiny_run)
    x, told, y, out, sensitivity = tuning.examples(given)
    rows, diffusion = given.calib["calibration"], Diffusion(given.calib["settings"]["steps"])
    wanted = rows_to_search(given.calib, given.rows)
    t = rows["t"][wanted]
    assert torch.equal(x, rows["x"][wanted]) and torch.equal(y, rows["y"][wanted])
    assert torch.equal(told, diffusion.timestep_map[t]) and not torch.equal(told, t)
    s = diffusion.sensitivity()[t]
    torch.testing.assert_close(sensitivity, s / s.mean())
    with torch.no_grad():
        torch.testing.assert_close(out, given.model(x, diffusion.timestep_map[t], y))


def test_error_is_the_mean_over_rows_of_weighted_squares():
    """By hand: of two rows, 4 values off by 1 in the first and by 3 in the second."""
    out = torch.zeros(2, 1, 2, 2)
    wrong, weights = out + torch.tensor([1.0, 3.0])[:, None, None, None], torch.tensor([2, 0.5])
    error = tuning.output_error(lambda x, t, y: wrong, None, None, None, out, weights)
    assert error.item() == (2 * 4 * 1 + 0.5 * 4 * 9) / 2


def test_steps_are_adam_s_and_shorten_along_a_cosine():
    """With a gradient that stays, Adam goes by the learning rate itself."""
    p = nn.Parameter(torch.zeros(()))
    learner, moved = tuning.Learner([], [p]), []
    for progress in (0, 0.5, 0.75, 1):
        before = p.item()
        learner.step(1e-6 * p, progress)
        moved.append((before - p.item()) / tuning.LEARNING_RATE)
    assert moved == pytest.approx([1, 0.5, 0.5 - 0.5**1.5, 0], abs=1e-3)


def test_before_it_learns_the_network_is_the_quantized_one(files, tiny_run):
    """And every scale and bias gets a gradient, from the first layer to the last."""
    x, told, y, out, sensitivity = tuning.examples(Given(tiny_run))
    plain, learns = (quant_file.build_quantized(files["none"], "a test") for _ in range(2))
    tuned = tuning.learning(learns, files["none"]["layers"])
    branch = dict(rtol=0, atol=1e-6)  # is added later: all else is so to the bit
    torch.testing.assert_close(learns(x, told, y), plain(x, told, y), **branch)
    tuning.output_error(learns, x, told, y, out, sensitivity).backward()
    for name, layer in tuned.items():
        assert layer.factor.grad.abs().max() > 0 and layer.shift.grad.abs().max() > 0, name


def test_what_is_written_is_the_layer_as_it_has_learned():
    """Of a weight in groups; a bias moves by the length of the weight's rows."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6), torch.randn(5, 8)
    view = (6, 2, 4)
    low, high = layer.weight.detach().view(view).aminmax(dim=2, keepdim=True)
    Q_W = UniformQuantizer(4, *qparams_from_range(low, high, 4))
    W_hat = Q_W(layer.weight.detach().view(view)).view(6, 8)
    state = quant_file.linear_state(layer, W_hat, Q_W, DynamicQuantizer(8, "token"), view=view)
    tuned = tuning.TunedLinear(quant_file.make_layer(state), state)
    with torch.no_grad():
        tuned.factor += 0.1 * torch.randn_like(tuned.factor)
        tuned.shift += torch.randn_like(tuned.shift)
    written = quant_file.make_layer(tuned.learned(state))
    torch.testing.assert_close(tuned(x), written(x))
    rms = W_hat.square().sum(1).mean().sqrt()
    torch.testing.assert_close(written.bias - layer.bias, rms * tuned.shift)


def test_a_quantizer_passes_the_gradient_on():
    """Its values are to the bit those of the quantizer alone."""
    Q, x = DynamicQuantizer(3, "token"), torch.randn(4, 8, requires_grad=True)
    out, weights = tuning.StraightThrough(Q)(x), torch.randn(4, 8)
    assert torch.equal(out, Q(x.detach()))
    (out * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_killed_after_an_epoch_it_ends_with_the_same_bytes(run_like, monkeypatch):
    """And learns only what was left: in the second run two epochs of three."""
    command = [*BITS, "--tune-epochs", "3"]
    whole, run = run_like("whole"), run_like("killed")
    quant_file_of("methods/tqdit_plus", whole, *command)
    real, kept = Parts.save, []

    def save(self, name, payload):
        real(self, name, payload)
        if name == tuning.PART:
            kept.append(payload["epoch"])
            if kept == [1]:
                raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "save", save)
    log = run_in_process("methods/tqdit_plus", "--run", run, *command)
    assert log.returncode == 130 and not (run / "quant_w3a6_plus.pt").exists()
    quant_file_of("methods/tqdit_plus", run, *command)
    assert kept == [1, 2, 3] and not leftovers(run)
    files = [(folder / "quant_w3a6_plus.pt").read_bytes() for folder in (whole, run)]
    assert files[0] == files[1]


def test_scales_stay_above_zero_however_long_they_learn():
    """Descending all the time, further than to 0."""
    factor = nn.Parameter(torch.ones(2))
    learner = tuning.Learner([factor], [])
    for _ in range(1200):
        learner.step(factor.sum(), progress=0)
    assert (factor == tuning.LEAST).all()


def test_too_little_gpu_memory_is_told_in_one_line(run_like, monkeypatch):
    """Naming the flag; what was finished before is kept."""

    def step(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tuning.Learner, "step", step)
    run = run_like("small")
    command = [*BITS, "--tune-epochs", "1"]
    refused(run_in_process("methods/tqdit_plus", "--run", run, *command), "leave it out")
    assert len([*run.glob(".quant_w3a6_plus.pt.*/block_*.pt")]) == 2


def test_no_epochs_are_refused(run_like):
    """0 is not `none`."""
    command = [*BITS, "--tune-epochs", "0"]
    log = run_in_process("methods/tqdit_plus", "--run", run_like("zero"), *command)
    refused(log, "--tune-epochs 0")
