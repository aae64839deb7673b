"""methods/ptq4dit.py: balanced layers, and the script on the tiny DiT.

THEIRS is what the authors' code gives on `drawn`: adreamwu/PTQ4DiT@fc27e97, models.py:137-145, the
factors of one layer; each of its samples is a timestep here.
"""

import pytest
import torch
from conftest import quant_file_of, refused, run_in_process, snapshot, wave

from methods.balancing import by_timestep, salience_factors

SCRIPT = "methods/ptq4dit"
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
