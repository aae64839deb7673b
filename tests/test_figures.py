"""benchmarks/figures.py: the borders and tables that it draws, its pictures and its refusals."""

import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from quant_ops import mrq_gelu, mrq_softmax

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "benchmarks"))

import figures  # noqa: E402
import layer_error  # noqa: E402

PICTURES = ["fig2_histograms", "fig3_softmax_over_time", "fig6_samples", "layer_error"]


def draw(monkeypatch, capsys, run, out):
    """figures.py on a run, in this process: its exit status, and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["figures.py", "--run", str(run), "--out", str(out)])
    status = 0
    try:
        figures.run_script(figures.main, figures.parse_args)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of the finished run with a quant file for every rung, each of half the last's cost."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for i, tag in enumerate(("base", "ho", "ho_mrq")):
        quant = torch.load(run / "quant_w6a6.pt", weights_only=True)
        for name in quant["report"]["costs"]:
            quant["report"]["costs"][name] *= 2 ** (3 - i)
        torch.save(quant, run / f"quant_w6a6_{tag}.pt")
    return run


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("exponent", [-1, -3, -6, -12])
def test_softmax_border_parts_the_multiples_of_the_two_scales(bits, exponent):
    """Sec. III-C: below it values are multiples of s_1 and under R2's first half step, above it
    multiples of 1 / 2^(k-1). The grid of x holds the border itself."""
    scale1 = torch.tensor([2.0**exponent, 2.0 ** (exponent - 1)]) / 2 ** (bits - 1)
    border = figures.softmax_border(scale1, bits)
    for s, edge in zip(scale1, border, strict=True):
        x = torch.cat([torch.linspace(0, 1, 4001), edge[None], edge[None] * (1 - 1e-6)])
        out, scale2 = mrq_softmax(x, s, bits), 2.0 ** (1 - bits)
        low, high = out[x < edge] / s, out[x >= edge] / scale2
        assert torch.equal(low, low.round()) and low.max() <= 2 ** (bits - 1) - 1
        assert torch.equal(high, high.round()) and high.min() >= 1


@pytest.mark.parametrize("exponent", [0, -1, -3, -12])
def test_softmax_levels_are_the_values_of_mrq_softmax(exponent):
    """A fine sweep of [0, 1] gives these levels and no other."""
    scale1 = torch.tensor(2.0**exponent) / 2**3
    found = mrq_softmax(torch.linspace(0, 1, 200_001), scale1, 4).unique()
    torch.testing.assert_close(figures.softmax_levels(scale1, 4), found)


def test_gelu_levels_are_the_values_of_mrq_gelu():
    """A fine sweep far past both ends gives these levels and no other."""
    scale1, scale2 = torch.tensor(0.01), torch.tensor(0.3)
    found = mrq_gelu(torch.linspace(-1, 20, 200_001), scale1, scale2, 4).unique()
    torch.testing.assert_close(figures.gelu_levels(scale1, scale2, 4), found)


def test_channel_maxima_are_over_heads_and_queries_of_a_timestep():
    """Four channels of two rows at t = 5 and one at t = 2, whose maxima are set by hand."""
    softmax = torch.zeros(3, 2, 4, 4)
    softmax[0, 1, 2], softmax[1, 0, 3], softmax[2, 1, 0] = 0.2, 0.4, torch.tensor([0, 0, 0, 0.9])
    at, (low, middle, _, largest) = figures.channel_maxima(softmax, torch.tensor([5, 5, 2]))
    assert at.tolist() == [2, 5]
    torch.testing.assert_close(largest, torch.tensor([0.9, 0.4]))
    torch.testing.assert_close(middle, torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(low, torch.tensor([0.0, 0.2]))


def test_cost_table_puts_every_layer_in_its_cell():
    """The embedder in the first column, the final layer in the last, blocks in their own."""
    names = ["x_embedder.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "final_layer.linear"]
    costs = [{name: 10.0 * i + j for j, name in enumerate(names)} for i in range(2)]
    kinds, table = layer_error.cost_table(costs)
    assert kinds == ["x_embedder.proj", "fc1", "final"]
    nan = np.nan
    np.testing.assert_equal(table[1], [[10, nan], [11, 12], [nan, 13]])


def test_record_gives_softmax_rows_that_sum_to_one_and_a_part_of_each_group(tiny_run):
    """2 rows of each of 3 groups; GELU is never below -0.17."""
    calib = figures.load_calib(tiny_run)
    t, kept = figures.record(calib, [0, 1], per_group=2)
    assert (t * 3 // 6).tolist() == [0, 0, 1, 1, 2, 2]
    for block in (0, 1):
        sums = kept[block, "av"].sum(-1)
        torch.testing.assert_close(sums, torch.ones(6, 4, 16))
        assert kept[block, "fc2"].shape[:2] == (6, 16) and kept[block, "fc2"].min() > -0.1701


def test_pictures_appear_and_have_content(run, tmp_path, monkeypatch, capsys):
    """Four pictures; every one has ink, paper and more than two colors."""
    assert draw(monkeypatch, capsys, run, tmp_path / "out") == (0, "")
    for name in PICTURES:
        image = np.asarray(Image.open(tmp_path / "out" / f"{name}.png").convert("RGB"))
        colors = np.unique(image.reshape(-1, 3), axis=0)
        assert image.shape[1] > 1000 and len(colors) > 20, name
        assert (image == 255).all(2).mean() < 0.97 and image.min() < 80, name


def test_scales_may_be_of_a_tensor_or_of_every_group(tiny_run, tmp_path):
    """Softmax without TGQ, (), and GELU with one pair of scales for each of 3 groups, (3,)."""
    calib = figures.load_calib(tiny_run)
    quant = torch.load(tiny_run / "quant_w6a6.pt", weights_only=True)
    t, kept = figures.record(calib, [0], per_group=4)
    quant["layers"]["blocks.0.attn.av"]["a"]["scale1"] = torch.tensor(2.0**-8)
    act = quant["layers"]["blocks.0.mlp.fc2"]["act"]
    act |= {key: act[key].flatten()[0] * torch.tensor([1, 2, 4]) for key in ("scale1", "scale2")}
    layer_error.save(tmp_path / "a.png", figures.draw_histograms(quant, kept, 0, ""))
    layer_error.save(tmp_path / "b.png", figures.draw_over_time(calib, quant, t, kept, ""))


def test_samples_stand_in_the_picture_pixel_for_pixel(run):
    """The first image of the second model, enlarged by a whole factor, at its place."""
    layer_error.save(run / "out.png", figures.draw_samples(run, ["fp", "w6a6"], 5))
    pixels = np.asarray(Image.open(run / "out.png").convert("RGB"))
    with np.load(run / "samples_w6a6.npz") as file:
        image = file["arr_0"][0].repeat(20, 0).repeat(20, 1)  # 162 // 8
    top = 110 + 166
    np.testing.assert_array_equal(pixels[top : top + 160, 160 : 160 + 160], image)


@pytest.mark.parametrize(
    "missing, command",
    [
        ("calib.pt", "01_collect_calib.py"),
        ("quant_w6a6.pt", "03_quantize.py"),
        ("samples_fp.npz", "04_sample.py"),
        ("quant_w6a6_ho.pt", "make tables"),
    ],
)
def test_missing_input_is_one_line_that_names_the_command(
    run, tmp_path, monkeypatch, capsys, missing, command
):
    """Status 2, and not even the pictures that could be drawn."""
    (run / missing).unlink()
    status, error = draw(monkeypatch, capsys, run, tmp_path / "out")
    assert status == 2 and len(error.splitlines()) == 1
    assert missing in error and command in error
    assert not (tmp_path / "out").exists()


def test_rungs_of_other_rows_are_refused_but_plus_is_left_out(run):
    """Errors summed over other rows do not compare."""
    quant = torch.load(run / "quant_w6a6.pt", weights_only=True)
    quant["settings"]["rows"] = 6
    torch.save(quant, run / "quant_w6a6_plus.pt")
    assert list(layer_error.load_rungs(run, "w6a6")) == ["base", "ho", "ho_mrq", "full"]
    torch.save(quant, run / "quant_w6a6_ho.pt")
    with pytest.raises(layer_error.InputError, match="other rows"):
        layer_error.load_rungs(run, "w6a6")


def test_without_matplotlib_one_line_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer_error, "Figure", None)
    status, error = draw(monkeypatch, capsys, run, tmp_path / "out")
    assert status == 2 and len(error.splitlines()) == 1
    assert "matplotlib is missing" in error
