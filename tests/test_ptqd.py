"""PTQD: what is measured of the noise, the sampler that corrects it, and methods/ptqd.py."""

import shutil

import numpy as np
import pytest
import torch
from conftest import LIVELY, load_script, refused, run_in_process, same_leaves
from tqdm import tqdm

from common.artifacts import load_artifact
from common.export_layouts import check_known
from common.noise_correction import (
    STREAM,
    CorrectedDiffusion,
    error_energy,
    make_diffusion,
    measure,
    moments_of,
    noise_of,
)
from common.parts import Parts
from methods import qdiffusion
from models_dit import Diffusion, DiT, image_generators, trajectory

# What PTQD's own code makes of `errors()`: ziplab/PTQD@6b190f9, quant_scripts/analyze_error.py,
# get_kt_dict_imagenet (:36), calculate_t_channel_error (:10), get_t_residualerror_std_dict (:63)
THEIR_SLOPE = [0.10269071, -0.05368388, 0.01505442, 0.30298761]
THEIR_STD = [0.11068828, 0.12110127, 0.10701996, 0.09422904]
THEIR_BIAS = [
    [0.08890014, 0.01722592, 0.03387938],
    [0.03332484, -0.04596073, -0.01678289],
    [0.05628651, -0.03465030, 0.00268086],
    [0.09377757, 0.01478156, 0.04289469],
]


def errors():
    """eps and Delta (T, N, C, H, W) with a slope, an offset in each channel, and noise."""
    generator, shape = torch.Generator().manual_seed(0), (4, 6, 3, 4, 4)
    eps = torch.randn(shape, generator=generator) + 0.2
    slope = torch.tensor([0.1, -0.05, 0.02, 0.3]).view(4, 1, 1, 1, 1)
    offset = torch.tensor([0.05, -0.02, 0.0]).view(1, 1, 3, 1, 1)
    return eps, slope * eps + offset + 0.1 * torch.randn(shape, generator=generator)


def moments(eps, delta):
    pairs = zip(eps.double(), delta.double(), strict=True)
    return torch.stack([moments_of(*pair) for pair in pairs])


# ------------------------------------------------------------------------------------------------
# What is measured


def test_noise_of_is_what_the_authors_code_finds():
    """k where it is positive; the bias of r is theirs of Delta less k times eps's mean; their std
    divides by n - 1."""
    eps, delta = errors()
    noise, slope = noise_of(moments(eps, delta)), torch.tensor(THEIR_SLOPE).clamp(min=0)
    torch.testing.assert_close(noise["slope"], slope, rtol=0, atol=1e-6)
    bias = torch.tensor(THEIR_BIAS) - slope[:, None] * eps.mean(dim=(1, 3, 4))
    torch.testing.assert_close(noise["bias"], bias, rtol=0, atol=1e-6)
    count = eps[0, 0].numel()
    std = torch.tensor(THEIR_STD) * ((count - 1) / count) ** 0.5
    torch.testing.assert_close(noise["std"], std, rtol=0, atol=1e-6)


def test_error_energy_is_that_of_the_corrected_eps():
    """Mean square of (eps + Delta - bias) / (1 + k) - eps; where k fits well, far below Delta's."""
    eps, delta = errors()
    noise = noise_of(moments(eps, delta))
    before, after = error_energy(moments(eps, delta), noise)
    k, bias = noise["slope"].view(4, 1, 1, 1, 1), noise["bias"][:, None, :, None, None]
    rest = (eps + delta - bias) / (1 + k) - eps
    torch.testing.assert_close(before.float(), delta.square().mean(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(after.float(), rest.square().mean(dim=(1, 2, 3, 4)))
    assert after[3] < 0.1 * before[3]


def lively(seed, **changes):
    """A DiT with no layer zero."""
    torch.manual_seed(seed)
    model = DiT(**LIVELY | changes).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("cfg_scale, learn_sigma, channels", [
    (1.0, True, 3), (1.5, True, 3), (1.5, False, 3), (1.5, True, 2),
])  # fmt: skip
def test_measure_compares_on_full_precision_trajectories(cfg_scale, learn_sigma, channels):
    """Both networks see the x_t that full precision samples; eps is the one after guidance, of so
    many channels."""
    model, other = (lively(i, learn_sigma=learn_sigma) for i in (0, 1))
    diffusion, indices = Diffusion(4), [3, 4, 5]
    guidance = cfg_scale, channels
    settings = dict(seed=7, cfg_scale=cfg_scale, cfg_channels=channels)
    found = measure(model, other, diffusion, indices, settings, tqdm(disable=True))
    y, null = torch.tensor([3, 4, 0]), torch.full((3,), 5)
    steps = trajectory(model, diffusion, y, image_generators(7, indices, STREAM), *guidance)
    for t, x in list(steps)[:-1]:
        told = diffusion.timestep_map[t].repeat(3)
        eps = []
        for network in (model, other):
            cond, uncond = (network(x, told, label)[:, :4] for label in (y, null))
            guided = uncond + cfg_scale * (cond - uncond)
            eps.append(torch.cat([guided[:, :channels], cond[:, channels:]], dim=1))
        expected = moments_of(eps[0].double(), (eps[1] - eps[0]).double())
        torch.testing.assert_close(found[t], expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------
# The sampler

T = 5


def made_up(std=0.1):
    """Noise of T steps, four channels."""
    generator = torch.Generator().manual_seed(2)
    slope, bias = torch.rand(T, generator=generator), torch.randn(T, 4, generator=generator)
    return dict(slope=slope, bias=bias, std=torch.full((T,), std))


def step(learn_sigma):
    """A network's output, x_t and t, a row for each step."""
    generator, t = torch.Generator().manual_seed(3), torch.arange(T)
    out = torch.randn(T, 8 if learn_sigma else 4, 6, 6, generator=generator)
    out[:, 4:] = out[:, 4:].tanh()
    return out, torch.randn(T, 4, 6, 6, generator=generator), t


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sampler_undoes_slope_and_bias(learn_sigma):
    """Of (1 + k) eps + bias the mean is that of eps; the learned variance is not scaled."""
    noise, (out, x_t, t) = made_up(std=0.0), step(learn_sigma)
    noisy = out.clone()
    noisy[:, :4] *= 1 + noise["slope"].view(T, 1, 1, 1)
    noisy[:, :4] += noise["bias"][:, :, None, None]
    expected = Diffusion(T).p_mean_log_var(out, x_t, t)
    found = CorrectedDiffusion(noise, T).p_mean_log_var(noisy, x_t, t)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sampler_adds_less_noise_by_what_the_rest_brings(learn_sigma):
    """Variance of x_{t-1} from r, after the division, and the sampler's own make up the old one."""
    noise, (out, x_t, t) = made_up(std=0.002), step(learn_sigma)
    corrected = CorrectedDiffusion(noise, T)
    mean, log_var = corrected.p_mean_log_var(out, x_t, t)
    out[:, :4] += noise["std"][0]
    moved = (corrected.p_mean_log_var(out, x_t, t)[0] - mean).square()  # what one std does
    old = Diffusion(T).p_mean_log_var(out, x_t, t)[1].exp()
    total = (log_var.exp() + moved)[1:]  # the last step, t = 0, adds no noise
    torch.testing.assert_close(total, old[1:].expand_as(total), rtol=1e-3, atol=1e-7)
    assert (log_var.exp() < old)[1:].all()


def test_sampler_with_more_noise_than_its_own_adds_none():
    """Where r brings more than sigma_t^2 nothing is left, and nothing becomes NaN."""
    out, x_t, t = step(True)
    corrected = CorrectedDiffusion(made_up(std=100.0), T)
    mean, _ = corrected.p_mean_log_var(out, x_t, t)
    torch.testing.assert_close(corrected.p_sample(out, x_t, t, torch.randn_like(x_t)), mean)


def test_other_steps_take_the_nearest_timestep(capsys):
    """T = 5 visits 0, 250, 500, 749, 999; T = 3 the first, third and fifth; T = 4 0, 333, 666,
    999, nearest to the first, second, fourth and fifth. A line says so."""
    noise = made_up()
    for count, rows in ((3, [0, 2, 4]), (4, [0, 1, 3, 4])):
        found = make_diffusion(noise, count, "cpu")
        assert torch.equal(found.bias, noise["bias"][rows])
        assert torch.equal(found.divisor, 1 + noise["slope"][rows])
        assert f"measured at T = 5; at T = {count} " in capsys.readouterr().out
    assert torch.equal(make_diffusion(noise, T, "cpu").bias, noise["bias"])
    assert not capsys.readouterr().out and type(make_diffusion(None, T, "cpu")) is Diffusion


# ------------------------------------------------------------------------------------------------
# methods/ptqd.py

FLAGS = "--wbits 4 --abits 5 --weight-iterations 4 --scale-iterations 4 --trajectories 40 --rows 6"


def quantized(tiny_run, folder, flags=""):
    """The tiny run's quant file of ptqd.py with these flags."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny_run / "calib.pt", folder)
    log = run_in_process("methods/ptqd", *f"--run {folder} {FLAGS} {flags}".split())
    assert log.returncode == 0, log.stderr
    return load_artifact(folder / "quant_w4a5_ptqd.pt", "quant", "ptqd.py"), log.stdout


@pytest.fixture(scope="module")
def ptqd_run(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptqd") / "run"
    return folder, *quantized(tiny_run, folder)


def test_file_holds_the_noise_of_every_step(ptqd_run):
    """T = 6 steps, three channels; what is corrected is nearer; the ends of the network have 8
    bits and no AdaRound; without VSC only the variance differs."""
    _, file, printed = ptqd_run
    assert file["method"] == "ptqd"
    shapes = {key: tuple(x.shape) for key, x in file["noise"].items()}
    assert shapes == dict(slope=(6,), bias=(6, 3), std=(6,))
    assert file["noise"]["std"].min() > 0
    (line,) = (x for x in printed.splitlines() if x.startswith("eps after guidance"))
    before, after = (float(x.split()[-1]) for x in line.split(" dB")[:2])
    assert after > before
    bits = {name: x["weight"]["bits"] for name, x in file["layers"].items() if "weight" in x}
    ends = {name for name in bits if not name.startswith("blocks")}
    assert all(bits[name] == (8 if name in ends else 4) for name in bits)


def test_the_ends_of_the_network_are_not_reconstructed(tiny_run, tmp_path, monkeypatch):
    """Phases W and A are of the blocks alone; without --edge-bits of all units."""
    seen = []
    monkeypatch.setattr(qdiffusion, "reconstruct", lambda phase3, *_: seen.append(phase3.unit.name))
    quantized(tiny_run, tmp_path / "run")
    assert seen == ["block_00", "block_00", "block_01", "block_01"]
    quantized(tiny_run, tmp_path / "even", "--edge-bits none")
    assert len(seen) == 4 + 8


def test_04_samples_its_file_alone_and_corrects(ptqd_run, tmp_path):
    """Nearly full precision's images; others than without the noise in the file."""
    shutil.copy(ptqd_run[0] / "quant_w4a5_ptqd.pt", tmp_path)
    file, images = dict(ptqd_run[1]), []
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --num-images 6 --tag".split()
    torch.save({k: x for k, x in file.items() if k != "noise"}, tmp_path / "quant_w4a5_plain.pt")
    for tag, *steps in (["ptqd"], ["plain"], ["ptqd", "--steps", 4]):
        log = run_in_process("04_sample", *flags, tag, *steps, "--force")
        assert log.returncode == 0, log.stderr
        assert ("nearest timestep" in log.stdout) == bool(steps)
        images.append(np.load(tmp_path / f"samples_w4a5_{tag}.npz")["arr_0"].astype(float))
    assert 0 < np.abs(images[0] - images[1]).mean() < 20
    assert not np.array_equal(images[0], images[2])


def test_a_killed_run_resumes_to_the_same_file(ptqd_run, tiny_run, tmp_path, monkeypatch):
    """Stopped after the first lot of trajectories: what is kept is not measured again."""
    save, kept = Parts.save, []

    def stop(self, name, payload):
        save(self, name, payload)
        kept.append(name)
        if name == "noise_0" and kept.count(name) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "save", stop)
    with pytest.raises(AssertionError):
        quantized(tiny_run, tmp_path)
    file, _ = quantized(tiny_run, tmp_path)
    assert kept.count("noise_0") == kept.count("noise_1") == kept.count("embed") == 1
    assert same_leaves(file, ptqd_run[1])


def test_no_variance_leaves_std_at_zero(ptqd_run, tiny_run, tmp_path):
    """--no-variance: slope and bias alone."""
    noise = quantized(tiny_run, tmp_path, "--no-variance")[0]["noise"]
    expected = ptqd_run[1]["noise"]
    assert not noise["std"].any() and torch.equal(noise["bias"], expected["bias"])


def test_no_correction_leaves_the_network_alone(ptqd_run, tiny_run, tmp_path):
    """--no-correction: the same layers, no table, and no trajectory sampled for one."""
    file, printed = quantized(tiny_run, tmp_path, "--no-correction")
    assert "noise" not in file and "after guidance" not in printed
    assert same_leaves(file["layers"], ptqd_run[1]["layers"])


def test_noise_of_another_shape_is_refused(ptqd_run, tmp_path):
    """A table for other steps than the file's is damage, told in one line; 03's layouts have no
    place for any."""
    file = dict(ptqd_run[1])
    with pytest.raises(Exception, match="no layout yet for noise of method ptqd"):
        check_known(file, "the file")
    file["noise"] = file["noise"] | dict(std=torch.ones(7))
    torch.save(file, tmp_path / "quant_w4a5_ptqd.pt")
    flags = f"--run {tmp_path} --wbits 4 --abits 5 --num-images 2 --tag ptqd"
    refused(run_in_process("04_sample", *flags.split()), "noise.std")


def test_noise_is_measured_on_every_trajectory_of_the_seed(run, monkeypatch):
    """40 trajectories in lots of 32, from --seed; none twice."""
    ptqd, seen = load_script("methods/ptqd"), []

    def watched(model, other, diffusion, indices, settings, bar):
        seen.append((indices, settings["seed"]))
        return measure(model, other, diffusion, indices, settings, bar)

    monkeypatch.setattr(ptqd, "measure", watched)
    log = run_in_process("methods/ptqd", *f"--run {run} {FLAGS} --seed 3".split())
    assert log.returncode == 0, log.stderr
    assert seen == [([*range(32)], 3), ([*range(32, 40)], 3)]


@pytest.mark.parametrize(
    "flags", ["--edge-bits 9", "--trajectories 0", "--trajectories 1000001", "--seed -1"]
)
def test_bad_flags_are_refused(flags, tiny_run):
    """One line, status 2, nothing written."""
    command = f"--run {tiny_run} --wbits 4 --abits 5 {flags}"
    refused(run_in_process("methods/ptqd", *command.split()), flags.split()[0])
    assert not (tiny_run / "quant_w4a5_ptqd.pt").exists()
