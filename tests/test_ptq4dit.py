"""methods/ptq4dit.py: balanced layers, and the script on the tiny DiT.

THEIRS is what the authors' code gives on `drawn`: adreamwu/PTQ4DiT@fc27e97, models.py:137-145, the
factors of one layer; each of its samples is a timestep here.
"""

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
    wave,
)

from common.checkpoints import load_calib
from common.unit_data import rows_to_search
from methods.balancing import by_timestep, salience_factors
from methods.reconstruction import Recipe
from models_dit import LayerSpec

SCRIPT = "methods/ptq4dit"
PTQ = load_script(SCRIPT)
FLAGS = "--wbits 4 --abits 6 --iterations 3 --batch 4".split()
THEIRS = [1.18156, 2.031879, 0.938001, 1.173524, 1.590289, 1.307228]


def drawn():
    """Inputs (3, 4, 6) of three samples, and a weight (5, 6)."""
    scale = torch.tensor([1, 8, 0.5, 2, 1, 3])
    return wave(3, 4, 6) * torch.stack([scale, scale.flip(0), torch.ones(6)])[:, None], wave(5, 6)


def test_factors_are_those_of_the_authors():
    """Spearman-weighted mean of the channels' magnitudes, over the weight's, and the root."""
    x, weight = drawn()
    _, low, high = by_timestep(x.amin(1), x.amax(1), torch.arange(3))
    found = salience_factors(torch.maximum(-low, high), weight, by_rank=True)
    torch.testing.assert_close(found, torch.tensor(THEIRS), rtol=0, atol=1e-5)


def made(run, *flags):
    return quant_file_of(SCRIPT, run, *FLAGS, *flags)[0]


def test_qkv_and_fc1_are_folded_and_proj_divides(run):
    """After folding only proj's inputs are divided; adaLN, quantized, took the rest."""
    balanced, plain = made(run), made(run, "--no-csb", "--force")
    with_smooth = {name for name, state in balanced["layers"].items() if "smooth" in state}
    assert with_smooth == {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert not any("smooth" in state for state in plain["layers"].values())
    name = "blocks.0.adaLN_modulation.1"
    ratio = balanced["layers"][name]["weight"]["scale"] / plain["layers"][name]["weight"]["scale"]
    width = 32
    assert (ratio[2 * width : 3 * width] == 1).all()  # gates are nobody's inputs
    torch.testing.assert_close(ratio[:width], ratio[width : 2 * width])
    assert (ratio[:width] != 1).any() and (ratio[3 * width : 5 * width] != 1).any()


def test_released_layers_fold_into_adaln_in_full_precision(run):
    """adaLN's parameters stand in the state, divided; the patch embedding reads the image."""
    file = made(run, "--layers", "released")
    path = torch.load(run / "calib.pt", weights_only=True)["settings"]["ckpt"]
    checkpoint = torch.load(path, weights_only=True)
    name = "blocks.1.adaLN_modulation.1.weight"
    ratio = file["state"][name] / checkpoint[name]
    assert (ratio.std(dim=1) < 1e-4).all() and (ratio[:, 0] - 1).abs().max() > 0.01
    assert file["layers"]["x_embedder.proj"]["act"] == dict(type="none")


@pytest.mark.parametrize("flags, words", [
    (["--softmax-bits", "1"], "--softmax-bits 1: must be 2..8"),
    (["--iterations", "-1"], "--iterations -1: at least 0"),
    (["--batch", "0"], "--batch 0: at least 1"),
])  # fmt: skip
def test_bad_flags_are_refused(run, flags, words):
    """One line, status 2, nothing written."""
    before = snapshot(run)
    refused(run_in_process(SCRIPT, "--run", run, *FLAGS, *flags), words)
    assert snapshot(run) == before


def test_timesteps_are_those_of_the_rows_searched(run, monkeypatch):
    """--rows 6: two of each group, from both ends."""
    seen, real = [], PTQ.start

    def watched(layer, data, t, cfg):
        seen.append(t)
        return real(layer, data, t, cfg)

    monkeypatch.setattr(PTQ, "start", watched)
    quant_file_of(SCRIPT, run, *"--wbits 4 --abits 6 --iterations 0 --rows 6".split())
    calib = load_calib(run)
    expected = calib["calibration"]["t"][rows_to_search(calib, 6)]
    assert seen and all(torch.equal(t, expected) for t in seen)


def test_rounding_and_scales_learn_together_on_what_quantized_units_give(run, monkeypatch):
    """The paper's recipe; values after softmax have 8 bits whatever the others have."""
    seen = []
    monkeypatch.setattr(PTQ, "reconstruct", lambda *args: seen.append(args))
    flags = "--wbits 4 --abits 6 --batch 4 --weight-lr 0.1 --scale-lr 0.2".split()
    file, _ = quant_file_of(SCRIPT, run, *flags)
    assert [recipe for *_, recipe in seen] == 4 * [Recipe(20000, 4, 0.1, 0.2)]
    phase3, _, inputs, _ = seen[-1]
    assert not torch.equal(inputs[0], phase3.unit.inputs[0])
    av = file["layers"]["blocks.1.attn.av"]
    assert (av["a"]["bits"], av["b"]["bits"]) == (8, 6)


@pytest.mark.parametrize("ssc", [True, False])
def test_a_layer_starts_balanced_with_ranges_of_what_it_will_see(ssc):
    """a_j is a magnitude; --no-ssc weighs timesteps alike; the range is that of x / s."""
    torch.manual_seed(0)
    module = torch.nn.Linear(6, 5).requires_grad_(False)
    x = torch.randn(24, 6) * torch.tensor([1.0, 30, 1, 2, 1, 5])
    x[:, 3] = -40 * x[:, 3].abs()  # large below zero alone
    data = linear_data(torch.ones(24, 5), x @ module.weight.T, x, rows=8)
    layer = layer_of(module)._replace(spec=LayerSpec("block", "mlp.fc1"))
    cfg = PTQ.Settings(4, 8, 8, True, ssc, 0, 4, 1e-3, 1e-3, "own", None, "")
    t, peaks = torch.tensor([5, 5, 1, 1, 3, 3]), x.view(6, 4, 6).abs().amax(1)
    x_max = torch.stack([peaks[t == i].amax(0) for i in (1, 3, 5)])
    s, other = (salience_factors(x_max, module.weight, by_rank) for by_rank in (ssc, not ssc))
    soft = PTQ.start(layer, data, t, cfg)
    torch.testing.assert_close(soft.smooth, s)
    assert not torch.allclose(s, other)
    span = ((x / s).max() - (x / s).min()).item()
    assert soft.act.scale.item() * 255 == pytest.approx(span, rel=0.1)
