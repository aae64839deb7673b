"""methods/htg.py: groups, centres, factors, by hand; and the script on the tiny DiT."""

import pytest
import torch
import torch.nn as nn
from conftest import (
    layer_of,
    linear_data,
    load_script,
    quant_file_of,
    refused,
    run_in_process,
    snapshot,
)

import quant_ops as q
from common.checkpoints import load_calib
from common.quant_file import load_quant, make_layer, unpack_weight
from common.unit_data import rows_to_search

SCRIPT = "methods/htg"
HTG = load_script(SCRIPT)
FLAGS = "--wbits 4 --abits 6 --timestep-groups 2".split()


def settings(**changes):
    plain = dict(wbits=8, abits=8, timestep_groups=2, decay=0.9, factors="balanced")
    return HTG.Settings(
        **plain | dict(rounding="nearest", layers="own", rows=None, tag="") | changes
    )


def test_nearest_neighbours_are_merged_first():
    """Centres 0, 1, 4, 6, 20: 0-1 (gap 1), 4-6 (2), then their means 0.5 and 5; equals of other
    timesteps in between are not neighbours."""
    z = torch.tensor([[0.0], [1.0], [4.0], [6.0], [20.0]])
    assert HTG.merge_timesteps(z, 4).tolist() == [0, 0, 1, 2, 3]
    assert HTG.merge_timesteps(z, 3).tolist() == [0, 0, 1, 1, 2]
    assert HTG.merge_timesteps(z, 2).tolist() == [0, 0, 0, 0, 1]
    assert HTG.merge_timesteps(z, 9).tolist() == [0, 1, 2, 3, 4]
    assert HTG.merge_timesteps(torch.tensor([[0.0], [9.0], [0.0]]), 2).tolist() in (
        [0, 1, 1],
        [0, 0, 1],
    )


def test_merged_group_has_the_mean_of_its_timesteps():
    """0, 0 and 3 are around 1, not between 0 and 3: 7.5 goes with 13.75 instead."""
    z = torch.tensor([[0.0], [0.0], [3.0], [7.5], [13.75]])
    assert HTG.merge_timesteps(z, 2).tolist() == [0, 0, 0, 1, 1]


def test_distance_counts_every_channel():
    """Squared distance over all channels, not the largest."""
    z = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 0.0], [5.0, 2.5]])
    assert HTG.merge_timesteps(z, 3).tolist() == [0, 1, 1, 2]
    assert HTG.merge_timesteps(z, 2).tolist() == [0, 0, 0, 1]  # 9 against 4 + 6.25


def test_average_begins_with_its_first_row():
    """m = d m + (1 - d) v; none: the mean."""
    values = torch.tensor([[4.0], [0.0], [8.0]])
    assert HTG.averaged(values, 0.5).item() == 0.5 * (0.5 * 4) + 0.5 * 8
    assert HTG.averaged(values, None).item() == 4


def test_factors_of_both_readings():
    """Balanced: half the range, from the noisy end, over the weight's largest; relative: the
    largest distance from the group's centre, from the clean end, over the largest channel."""
    low, high = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[1.0, 2.0], [5.0, 2.0]])
    centre, weight = torch.tensor([[0.5, 0.0], [0.5, 0.0]]), torch.tensor([[2.0, -4.0], [1, 1]])
    balanced = HTG.channel_factors(low, high, centre, weight, settings())
    m = 0.9 * torch.tensor([4.0, 1.0]) + 0.1 * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(balanced, (m / torch.tensor([2.0, 4.0])).sqrt())
    relative = HTG.channel_factors(low, high, centre, weight, settings(factors="relative"))
    m = 0.9 * torch.tensor([1.5, 2.0]) + 0.1 * torch.tensor([4.5, 2.0])
    torch.testing.assert_close(relative, m / m.max())


def test_timesteps_that_no_row_has_follow_the_nearest():
    """Of 10 timesteps rows have 2, 3 and 8."""
    found = HTG.nearest_visited(torch.tensor([2, 3, 8]), 10)
    assert found.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def drifting():
    """A layer (6, 8) and data of 12 samples of 3 tokens, at timesteps 0..5 of 6: channels are
    around -20 in timesteps 0..2 and around 20 from 3 on."""
    torch.manual_seed(0)
    layer, t = nn.Linear(8, 6).requires_grad_(False), torch.arange(12) // 2
    x = torch.randn(12, 3, 8) + torch.where(t < 3, -20.0, 20.0)[:, None, None]
    x = x.flatten(0, 1)
    return layer, t, x, linear_data(torch.ones(36, 6), x @ layer.weight.T, x, rows=9)


def test_shifted_layer_follows_the_drift():
    """Two groups, each centred: the error is that of a spread of 1, not of 40; and what the state
    makes is x_hat W s + bias + W zbar_g, exactly."""
    layer, t, x, data = drifting()
    found = HTG.quantize_shifted(layer_of(layer), data, settings(abits=4), t, 6)
    plain = HTG.quantize_plain(layer_of(layer), data, settings(abits=4))
    assert found["cost"] < 0.02 * plain["cost"]
    state = found["state"]
    assert state["regroup"].tolist() == [0, 0, 0, 1, 1, 1]
    at_t = x.view(6, 6, 8)  # six rows of tokens a timestep
    z = (at_t.amin(1) + at_t.amax(1)) / 2  # Eq. (2), (4)
    torch.testing.assert_close(state["shift"], torch.stack([z[:3].mean(0), z[3:].mean(0)]))
    made, rows = make_layer(state), t.repeat_interleave(3)
    torch.testing.assert_close(made(x, rows), made(x.view(12, 3, 8), t).flatten(0, 1))
    error = (made(x, rows) - layer(x)).square().sum().item()
    assert abs(error / found["cost"] - 1) < 1e-3  # the report's cost is the layer's own error


def made(run, *flags):
    return quant_file_of(SCRIPT, run, *FLAGS, *flags)[0]


def test_file_tells_layers_the_timestep(run):
    """The table has the six timesteps; each of qkv, proj, fc1 has two groups of its own; qkv and
    fc1 are folded; sampled also at another T, and on integers with a reason."""
    file = made(run)
    assert sorted(set(file["group_table"].tolist())) == list(range(6))
    shifted = {name: s for name, s in file["layers"].items() if "regroup" in s}
    assert {name.rpartition(".")[2] for name in shifted} == {"qkv", "proj", "fc1"}
    for name, state in shifted.items():
        assert state["regroup"].shape == (6,) and state["shift"].shape[0] == 2
        assert ("smooth" in state) == name.endswith("proj")
    flags = "--run", run, *FLAGS[:4], "--tag", "htg", "--num-images", "2", "--force"
    for more in ((), ("--steps", "4"), ("--engine", "int8")):
        result = run_in_process("04_sample", *flags, *more)
        assert result.returncode == 0, result.stderr
    assert "time groups of its own" in result.stdout or "shifted" in result.stdout


def test_own_layers_are_all_that_multiply(run, tiny_run):
    """Embedders and adaLN too, the image's inputs too; --layers released: those of 03 (D6)."""
    layers = made(run)["layers"]
    assert len(layers) == 3 + 2 * 7 + 2 and layers["x_embedder.proj"]["act"]["bits"] == 6
    assert {x["weight"]["bits"] for x in layers.values() if "weight" in x} == {4}
    released = made(run, "--layers", "released", "--force")["layers"]
    assert released.keys() == load_quant(tiny_run / "quant_w6a6.pt")["layers"].keys()
    assert released["x_embedder.proj"]["act"] == dict(type="none")


@pytest.mark.parametrize("flags, words", [
    (["--decay", "1"], "--decay 1.0: 0 or more, below 1, or none"),
    (["--timestep-groups", "0"], "--timestep-groups 0: at least 1"),
    (["--factors", "c"], "argument --factors"),
])  # fmt: skip
def test_bad_flags_are_refused(run, flags, words):
    """One line, status 2, nothing written."""
    before = snapshot(run)
    refused(run_in_process(SCRIPT, "--run", run, *FLAGS, *flags), words)
    assert snapshot(run) == before


def test_rounding_is_the_one_asked_for():
    """nearest: the weight on its grid; gptq: another one, of less error."""
    layer, t, _, data = drifting()
    found = {
        how: HTG.quantize_shifted(layer_of(layer), data, settings(wbits=3, rounding=how), t, 6)
        for how in ("nearest", "gptq")
    }
    state = found["nearest"]["state"]
    scaled = layer.weight * state["smooth"]
    Q_W = q.uniform_candidates(*scaled.aminmax(dim=1, keepdim=True), 3)[0]
    torch.testing.assert_close(unpack_weight(state["weight"]), Q_W(scaled))
    assert found["gptq"]["cost"] < found["nearest"]["cost"]


def test_timesteps_are_those_of_the_rows_searched(run, monkeypatch):
    """--rows 6: the centres of a timestep are of its own rows."""
    seen, real = [], HTG.quantize_shifted
    monkeypatch.setattr(HTG, "quantize_shifted", lambda *a: seen.append(a[3]) or real(*a))
    quant_file_of(SCRIPT, run, *"--wbits 4 --abits 6 --timestep-groups 2 --rows 6".split())
    calib = load_calib(run)
    expected = calib["calibration"]["t"][rows_to_search(calib, 6)]
    assert seen and all(torch.equal(t, expected) for t in seen)
