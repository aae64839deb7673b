"""methods/tcaqdm.py: its three parts on small tensors, and a tiny run."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import layer_of, linear_data, load_script, run_in_process, same_leaves

import quant_ops as q
from common import trajectories
from common.artifacts import load_artifact
from common.checkpoints import load_calib, load_calibrated
from common.distributed import ProcessGroup
from common.layer_data import LayerData, MatMulChunk
from common.parts import Parts
from common.quantizers import AdaptiveQuantizer
from methods.power_law import exponent, lower_cutoff, power_law_ratio
from methods.ranges import values_by_shrinking

TCAQ = load_script("methods/tcaqdm")
CPU, ALONE = torch.device("cpu"), ProcessGroup(0, 1)

# ------------------------------------------------------------------------------------------------
# TCR


def test_group_peaks_are_those_of_each_group():
    """a_tj: the largest magnitude of each channel in each time group, over several chunks."""
    torch.manual_seed(0)
    x, group = torch.randn(23, 5), torch.randint(3, (23,))
    group[-3:] = torch.arange(3)
    peaks = TCAQ.group_peaks(linear_data(torch.ones(23, 2), None, x, group, rows=4))
    for i in range(3):
        assert torch.equal(peaks[i], x[group == i].abs().max(dim=0).values)


def test_reparameterization_by_hand():
    """sum a^2 / sum a: (1, 1) -> 1, (1, 3) -> 10/4, (0, 8) -> 8, (30, 0) -> 30, over the least."""
    peaks = torch.tensor([[1.0, 1.0, 0.0, 30.0], [1.0, 3.0, 8.0, 0.0]])
    assert TCAQ.reparameterization(peaks, 100).tolist() == [1, 2.5, 8, 30]
    assert TCAQ.reparameterization(peaks, 10).tolist() == [1, 2.5, 8, 10]
    assert TCAQ.reparameterization(2 * peaks, 10).tolist() == [1, 2.5, 8, 10]
    dead = torch.zeros(2, 3)
    assert TCAQ.reparameterization(dead, 10).tolist() == [1, 1, 1]


# ------------------------------------------------------------------------------------------------
# DAQ


def power_law(k, x_min, count):
    """Values of a power law with this exponent."""
    return x_min * torch.rand(count, dtype=torch.double) ** (-1 / (k - 1))


def exponential(rate, x_min, count):
    return x_min - torch.rand(count, dtype=torch.double).log() / rate


def test_exponent_is_the_likeliest():
    """1 + n / sum ln x: near the one that was drawn from, and no other is likelier."""
    torch.manual_seed(0)
    tail = power_law(2.5, 1, 20000)
    k = exponent(tail)
    assert abs(k - 2.5) < 0.05

    def likelihood(k):
        return (len(tail) * (k - 1).log() - k * tail.log().sum()).item()

    assert likelihood(k) > max(likelihood(k * 1.01), likelihood(k * 0.99))


def test_lower_cutoff_is_where_the_law_begins():
    """Below x = 1 values are flat, above a power law: the cutoff is none of the deciles below; a
    power law that ends early is not cut to its last tenths."""
    torch.manual_seed(1)
    flat, tail = torch.rand(25000, dtype=torch.double), power_law(3, 1, 75000)
    assert lower_cutoff(torch.cat([flat, tail]).sort().values) > 1
    assert lower_cutoff(tail[tail < 3].sort().values) < 1.2


def test_power_law_ratio_is_the_difference_of_log_likelihoods():
    """Term by term, of both densities at their best on what is above the cutoff."""
    torch.manual_seed(2)
    values = power_law(2, 0.01, 500)
    x_min = lower_cutoff(values.sort().values)
    x = values[values >= x_min]
    k, rate = exponent(x / x_min), 1 / (x - x_min).mean()
    laws = ((k - 1) / x_min * (x / x_min) ** -k, rate * (-rate * (x - x_min)).exp())
    expected = laws[0].log().sum() - laws[1].log().sum()
    assert power_law_ratio(values) == pytest.approx(expected.item())


def test_power_law_ratio_tells_the_two_apart():
    """Above 0 for a power law, zeros aside; below for exponential values; 0 for equal ones."""
    torch.manual_seed(3)
    law = power_law(2, 1e-4, 5000)
    assert power_law_ratio(torch.cat([law, torch.zeros(900)])) == power_law_ratio(law) > 100
    assert power_law_ratio(exponential(20, 0.01, 5000)) < -20
    assert power_law_ratio(torch.full((64,), 1 / 64)) == power_law_ratio(torch.zeros(5)) == 0


def attention(heavy):
    """The data of a product whose a, of two time groups, is a power law, or exponential."""
    count = 4 * 2 * 25 * 25
    a = power_law(2, 1e-4, count) if heavy else exponential(20, 0.01, count)
    a = a.clamp(max=1).float().view(4, 2, 25, 25)
    group, b = torch.tensor([0, 0, 1, 1]), torch.randn(4, 2, 25, 3)
    chunks = [MatMulChunk(a @ b, a @ b, a, b, group)]
    return LayerData(chunks, CPU, num_groups=2)


def test_ranges_are_those_of_inputs_over_r():
    """Phase A begins with scales for what the layer will see."""
    torch.manual_seed(0)
    layer, r = torch.nn.Linear(4, 6).requires_grad_(False), torch.tensor([1.0, 2.0, 5.0, 10.0])
    x, weight = torch.randn(40, 4) * r, layer.weight * r
    data = linear_data(torch.ones(40, 6), x @ layer.weight.T, x)
    Q_W = q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), 4)[0]
    soft = TCAQ.SoftLinear(layer, weight, Q_W, q.FullPrecision(), r)
    cfg = SimpleNamespace(daq=False, abits=8, layers="own")
    TCAQ.set_ranges(soft, layer_of(layer), data, cfg)
    expected = values_by_shrinking(data.smoothed(r), "x", 8)
    assert soft.act.scale.item() == expected.scale.item()


def test_adaptive_quantizer_tests_the_values_of_every_key(monkeypatch):
    """Of more values than it fits a law to, some of each key's."""
    rows, seen = attention(True), []
    for chunk in rows.chunks:
        chunk.a.copy_(torch.arange(25).expand_as(chunk.a))
    monkeypatch.setattr(TCAQ, "MOST", 1000)  # of 5,000: every fifth would see five keys
    monkeypatch.setattr(TCAQ, "power_law_ratio", lambda values: seen.append(values) or 0)
    TCAQ.adaptive_quantizer(rows, 4)
    assert seen[0].unique().tolist() == [*range(25)] and len(seen[0]) <= 1000


class Reused(LayerData):
    """Chunks come in two buffers, in turn, as from `prefetch` on CUDA."""

    def __iter__(self):
        buffers = [[torch.empty_like(x) for x in self.chunks[0]] for _ in range(2)]
        for i, chunk in enumerate(self.chunks):
            for buffer, x in zip(buffers[i % 2], chunk, strict=True):
                buffer.copy_(x)
            yield MatMulChunk(*buffers[i % 2])


def test_adaptive_quantizer_sees_all_chunks_of_a_group():
    """The greatest value is in the first of four, whose buffer has another's by then."""
    torch.manual_seed(4)
    a, b = exponential(20, 0.01, 4 * 2 * 25 * 25), torch.randn(4, 2, 25, 3)
    a = a.float().view(4, 2, 25, 25)
    a[0, 0, 0, 0] = 2 * a.max()
    columns = a @ b, a @ b, a, b, torch.zeros(4).long()
    chunks = [MatMulChunk(*x) for x in zip(*(column.split(1) for column in columns), strict=True)]
    whole, reused = (kind(chunks, CPU, num_groups=1) for kind in (LayerData, Reused))
    found = (TCAQ.adaptive_quantizer(rows, 4).state_dict() for rows in (whole, reused))
    assert same_leaves(*found)


@pytest.mark.parametrize("heavy", [True, False])
def test_adaptive_quantizer_takes_the_grid_of_its_distribution_at_least_error(heavy):
    """Logarithmic for a power law, else uniform; its scale has the least |error|^2.4 of 80."""
    torch.manual_seed(4)
    rows = attention(heavy)
    Q = TCAQ.adaptive_quantizer(rows, 4)
    assert type(Q) is AdaptiveQuantizer and Q.log2.item() is heavy
    a = next(iter(rows)).a
    top = a.max() if heavy else a.max() / 15
    errors = {
        i: (AdaptiveQuantizer(4, (1 - 0.01 * i) * top, Q.log2)(a) - a).abs().pow(2.4).sum()
        for i in range(80)
    }
    best = min(errors, key=errors.get)
    assert Q.scale.item() == pytest.approx(((1 - 0.01 * best) * top).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# PAR


def test_a_round_goes_on_from_the_one_before():
    """A layer made again of its state: the same scales, and the same weight unless it learns; h
    lies between, so that it can."""
    torch.manual_seed(5)
    layer = layer_of(torch.nn.Linear(16, 12).requires_grad_(False))
    weight, r = layer.module.weight, torch.linspace(1, 3, 16)
    Q_W, Q_X = (q.uniform_candidates(-torch.tensor(x), torch.tensor(x), 4)[0] for x in (0.7, 2.0))
    soft = TCAQ.SoftLinear(layer.module, weight * r, Q_W, Q_X, r)
    soft.rounding.alpha.data.normal_()  # rounded up or down at random
    soft.harden()
    again = TCAQ.again(layer, soft.state(), CPU)
    x = torch.randn(5, 16)
    assert not torch.equal(soft.rounded, Q_W(weight * r))
    h = again.rounding.h()
    assert ((h > 0) & (h < 1)).all()
    again.harden()
    torch.testing.assert_close(again(x), soft(x), rtol=0, atol=1e-5)
    assert same_leaves(again.state(), soft.state())


@pytest.fixture
def lots_of_two(monkeypatch):
    monkeypatch.setattr(trajectories, "LOT", 2)


def test_sampling_again_with_the_same_network_gives_the_same_x_t(tiny_run, tmp_path, lots_of_two):
    """Labels, noise and guidance are Phase 1's: calib.pt's own x_t come back, for any rows."""
    calib = load_calib(tiny_run)
    rows, model = calib["calibration"], load_calibrated(calib)
    for wanted in (torch.arange(len(rows["t"])), torch.tensor([11, 2, 7])):
        kept = {key: rows[key][wanted] for key in ("trajectory", "t")}
        parts = Parts(tmp_path / f"{len(wanted)}.pt", dict(settings={}, inputs={}))
        x = trajectories.sample_again(model, kept, calib["settings"], parts, ALONE, CPU)
        torch.testing.assert_close(x, rows["x"][wanted], rtol=1e-4, atol=1e-4)
        assert len([*parts.folder.iterdir()]) == len(kept["trajectory"].unique().split(2))


def test_sampling_again_guides_the_channels_of_phase_1(tiny_run, tmp_path):
    """Another cfg_channels of calib.pt, other x_t."""
    calib, found = load_calib(tiny_run), {}
    kept = {key: calib["calibration"][key] for key in ("trajectory", "t")}
    for channels in (1, 3):
        parts = Parts(tmp_path / f"{channels}.pt", dict(settings={}, inputs={}))
        settings, model = calib["settings"] | dict(cfg_channels=channels), load_calibrated(calib)
        found[channels] = trajectories.sample_again(model, kept, settings, parts, ALONE, CPU)
    assert not torch.allclose(found[1], found[3], rtol=1e-2, atol=1e-2)


def flags(run, more=""):
    tiny = "--wbits 4 --abits 4 --softmax-bits 4 --weight-iterations 4 --scale-iterations 4"
    return f"--run {run} {tiny} --weight-batch 4 --scale-batch 4 --rows 6 {more}".split()


@pytest.fixture
def run(tiny_run, tmp_path):
    """calib.pt alone: no gradients are needed."""
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run / "calib.pt", tmp_path / "run")
    return tmp_path / "run"


def quantized(run, more=""):
    log = run_in_process("methods/tcaqdm", *flags(run, f"--force {more}"))
    assert log.returncode == 0, log.stderr
    return load_artifact(run / "quant_w4a4_tcaqdm.pt", "quant", "tcaqdm.py")["layers"]


def test_each_part_reaches_its_layers_only(run):
    """TCR the block's four linear layers, two of them by way of adaLN; DAQ what comes after
    softmax; PAR every learned scale."""
    full = quantized(run, "--par-rounds 0")
    plain = quantized(run, "--par-rounds 0 --no-tcr --no-daq")
    smooth = {name.split(".", 2)[-1] for name in full if "smooth" in full[name]}
    assert smooth == {"attn.proj", "mlp.fc2"}
    for name in ("attn.qkv", "mlp.fc1", "adaLN_modulation.1"):
        weights = (layers[f"blocks.0.{name}"]["weight"] for layers in (full, plain))
        assert not torch.equal(*(weight["scale"] for weight in weights)), name
    assert not any("smooth" in layer for layer in plain.values())
    assert full["blocks.0.attn.av"]["a"]["type"] == "adaptive"
    assert full["blocks.0.attn.av"]["a"]["log2"].shape == (3,)
    assert len(full["blocks.0.attn.av"]["a"]["scale"].unique()) == 3  # of each group's own rows
    assert plain["blocks.0.attn.av"]["a"]["type"] == "uniform"
    assert full["x_embedder.proj"]["act"]["type"] == "uniform"
    again = quantized(run, "--par-rounds 1")
    for name, layer in again.items():
        if "smooth" in layer:
            assert torch.equal(layer["smooth"], full[name]["smooth"])
            assert torch.equal(layer["weight"]["scale"], full[name]["weight"]["scale"])
            assert layer["act"]["scale"] != full[name]["act"]["scale"]


def test_par_reconstructs_on_what_the_quantized_model_samples(run, monkeypatch):
    """The units' inputs and their targets' follow from another x_t in the second round, but for the
    noise that all begins with; it has a share of the iterations."""
    seen, in_full, real = [], [], TCAQ.reconstruct

    def reconstruct(phase3, soft, inputs, recipe):
        if phase3.unit.name == "block_01":  # before it, another network would give others
            in_full.append(torch.equal(inputs[0], phase3.unit.inputs[0]))
        if phase3.unit.name == "embed":
            x, t, _ = phase3.unit.inputs
            seen.append((inputs[0], x, t, recipe.iterations))
        real(phase3, soft, inputs, recipe)

    monkeypatch.setattr(TCAQ, "reconstruct", reconstruct)
    quantized(run, "--par-rounds 1 --par-share 0.5")
    first, *_, last = seen
    assert [iterations for *_, iterations in seen] == [4, 4, 2, 2]
    assert in_full == [False, True, False, False]
    assert torch.equal(first[0], first[1]) and torch.equal(last[0], last[1])
    same = (first[0] == last[0]).all((1, 2, 3))
    assert torch.equal(same, first[2] == 999) and 0 < same.sum() < 6


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    """The bytes of the file of a run that nothing kills; it samples as many at a time."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copy(tiny_run / "calib.pt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "LOT", 2)
        quantized(folder, "--par-rounds 1")
    return (folder / "quant_w4a4_tcaqdm.pt").read_bytes()


@pytest.mark.parametrize("call", [3, 6, 8])
def test_killed_in_any_round_it_resumes_to_the_same_file(
    call, run, undisturbed, monkeypatch, lots_of_two
):
    """Interrupted in its first round, in sampling again and in the second round: no piece is done
    twice, and the file is the undisturbed one's, bit for bit."""
    real, written, stopped = os.replace, [], []

    def replace(source, target):
        if len(written) + 1 == call and not stopped:
            stopped.append(target)
            raise KeyboardInterrupt
        written.append(str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    command = flags(run, "--par-rounds 1")
    assert run_in_process("methods/tcaqdm", *command).returncode == 130
    assert run_in_process("methods/tcaqdm", *command).returncode == 0
    assert stopped and len(written) == len(set(written))
    assert (run / "quant_w4a4_tcaqdm.pt").read_bytes() == undisturbed
    assert not [*run.glob(".*")]
