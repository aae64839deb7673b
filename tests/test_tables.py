"""benchmarks/tables.py: its plan, its jobs, its intervals and its page; no sweep is run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, parsed

from common.checkpoints import load_calib, load_calibrated
from common.errors import InputError
from models_dit import Diffusion

sys.path.insert(0, str(ROOT / "benchmarks"))

import jobs  # noqa: E402
import measurements  # noqa: E402
import page  # noqa: E402
import scores  # noqa: E402
import sweep  # noqa: E402
import tables  # noqa: E402
from sweep import Row  # noqa: E402


def options(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tables.py", *flags])
    return tables.parse_args()


def test_every_command_of_the_plan_is_one_its_script_accepts(monkeypatch):
    """All jobs of both sweeps, parsed and checked by the scripts themselves; a tag names the file
    that the flags make."""
    for flags in ([], ["--quick"]):
        plan, _ = tables.plan(options(monkeypatch, *flags))
        for _, name, command, _ in (job for stage in plan.stages for job in stage):
            args = parsed(monkeypatch, command)
            if name.startswith("03"):
                assert name.removeprefix("03 ").partition("_")[2] == args.tag


def test_every_rung_of_the_ladder_changes_one_setting(monkeypatch):
    """methods/tqdit_plus.py with the flags of one rung and of the next; the last has none."""
    base, before = ["methods/tqdit_plus.py", "--wbits", "6", "--abits", "6"], None
    for tag, flags in sweep.LADDER.items():
        now = vars(parsed(monkeypatch, base + flags))
        if before:
            assert sum(now[key] != before[key] for key in now) == 1, tag
        before = now
    assert flags == []


def test_the_plan_holds_what_each_table_needs(monkeypatch):
    """A row's model is quantized and sampled once, from a calibration set of its T and seed."""
    plan, rows = tables.plan(options(monkeypatch, "--quick"))
    names = [(job.run.name, job.name) for stage in plan.stages for job in stage]
    assert len(names) == len(set(names))
    for row in (row for group in rows.values() for row in group):
        jobs = ("01", "02", f"03 {row.name}", f"04 {row.name}")
        assert {(plan.run_of(row).name, job) for job in jobs} < {*names}
    assert {("T250_seed0", "04 fp"), ("T100_seed0", "04 fp")} < {*names}
    assert len(rows["ablation"]) == 2 * 5 * 3


def test_only_leaves_the_other_tables_out(monkeypatch):
    flags = ["--quick", "--num-images", "7", "--only"]
    plan, rows = tables.plan(options(monkeypatch, *flags, "layers"))
    assert list(rows) == ["layers"] and plan.args.num_images == 7 and plan.args.rounds == 1
    assert sum(map(len, plan.stages)) == 2 + 4 + 5  # one calibration set; FP is sampled too
    plan, _ = tables.plan(options(monkeypatch, *flags, "gradient"))
    assert [len(stage) for stage in plan.stages] == [1, 1, 0, 0]
    plan, _ = tables.plan(options(monkeypatch, "--steps", "50", *flags[1:], "models", "gradient"))
    assert {job.run.name for job in plan.stages[1]} == {"T50_seed0", "T250_seed0"}


def test_a_failed_job_stops_the_sweep_and_leaves_no_record(tmp_path):
    """Then one that goes well, with its record."""
    command = ["03_quantize.py", "--run", str(tmp_path), "--wbits", "9"]
    job = jobs.Job(tmp_path, "03 x", command, 1)
    with pytest.raises(InputError, match="03 x.log"):
        jobs.perform(job)
    assert not job.is_done() and "abits" in job.path("log").read_text()
    good = jobs.Job(tmp_path, "help", ["benchmarks/tables.py", "--help"], 1)
    assert jobs.perform(good).is_done()
    assert json.loads(good.path("json").read_text()).keys() == {
        "command", "seconds", "cpu_seconds", "peak_mib",
    }  # fmt: skip


def test_models_of_other_flags_are_not_taken(tmp_path):
    """A record of other rows is no record of this job; the folder and the machine do not count."""

    def job(flags, run=tmp_path):
        command = f"03_quantize.py --wbits 6 {flags} --run {run}".split()
        return jobs.Job(tmp_path, "03 x", command, 1)

    assert not job("--rows 10").is_done()
    job("").path("json").parent.mkdir()
    text = json.dumps(dict(command=" ".join(job("--rows 10").command)))
    job("").path("json").write_text(text)
    assert job("--rows 10").is_done() and job("--rows 10", "elsewhere").is_done()
    assert job("--compile --rows 10 --batch-size 400").is_done()
    for flags in ("--rows 320", "--rows 10 --compiler", ""):
        with pytest.raises(InputError, match="03 x.json is of .*--rows 10"):
            job(flags).is_done()


# ------------------------------------------------------------------------------------------------
# Scores


def scores_of(count=400, features=4):
    """Scores whose reference is a standard normal distribution, for made-up features."""
    made = scores.Scores(count)
    made.reference = dict(mu=np.zeros(features), sigma=np.eye(features))
    return made


def test_intervals_are_paired_and_cover_the_mean():
    """A constant difference has an interval of no width; the mean of noise lies inside its own."""
    made, noise = scores_of(), np.random.default_rng(1).normal(size=400)
    low, high = made.interval((noise + 0.3) - noise)
    assert low == pytest.approx(0.3) == high
    low, high = made.interval(noise)
    assert low < noise.mean() < high and 0.15 < high - low < 0.25  # 2 x 1.96 / sqrt(400)


def test_drawn_distances_use_the_same_images_for_every_model():
    """A model's copy has ratio 1 in every draw; a shifted one is further off in every draw."""
    made = scores_of()
    features = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    made.files = {shift: dict(features=features + shift) for shift in (0, 1)}
    made.files["copy"] = dict(features=features.clone())
    own, copy, off = map(made.drawn_fd, (0, "copy", 1))
    assert np.array_equal(own, copy) and (off > own).all() and own.std() > 0


def test_intervals_of_distances_stand_around_the_estimate():
    """Draws that are all too high by 5 keep their spread and lose their place."""
    draws = 5 + np.linspace(-1, 1, 401)
    np.testing.assert_allclose(scores.centred(2.0, draws), [1.05, 2.95])


def test_scores_of_samples_are_those_of_their_images(tmp_path):
    """Frechet distance 0 to its own statistics; PSNR of a difference of 1 in all pixels."""
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28, 1), dtype=np.uint8)
    for name, offset in (("a", 0), ("b", 1)):
        np.savez(tmp_path / name, arr_0=images + np.uint8(offset))
    made = scores.Scores(30)
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    np.testing.assert_allclose(made.psnr(b, a), 20 * np.log10(255))
    assert set(made.metrics(a)) == {"fd", "sfd", "inception", "precision", "recall"}
    mu, sigma = scores.moments(made.of(a)["features"])
    again = scores.Scores(30)
    again.reference |= dict(mu=mu, sigma=sigma)
    assert again.metrics(a)["fd"] == pytest.approx(0, abs=1e-4)


def test_energy_of_eps_gives_the_report_s_ratio(tiny_run):
    """Row by row here, summed in the report of 03; of itself a model gains nothing."""
    path, made = tiny_run / "quant_w6a6.pt", scores.Scores(6)
    signal, noise = made.energy(path).sum(axis=1)
    report = measurements.load_quant(path)["report"]
    assert 10 * np.log10(signal / noise) == pytest.approx(report["snr_weighted"], abs=1e-3)
    assert made.snr_change(path, path) == (0.0, [0.0, 0.0])


def test_gain_of_snr_is_paired_by_row():
    """Noise of every row doubled: 3 dB in every draw, whatever the rows."""
    made, noise = scores.Scores(6), np.random.default_rng(0).exponential(size=50)
    made.energies = {"a": np.stack([noise, noise]), "b": np.stack([noise, 2 * noise])}
    change, interval = made.snr_change("a", "b")
    np.testing.assert_allclose([change, *interval], 10 * np.log10(2))


# ------------------------------------------------------------------------------------------------
# Measurements


def test_gradient_shares_are_those_of_a_pass_through_the_whole_network(tiny_run):
    """Eq. (11) at the outputs of the final layer and of fc2 in both blocks, by group; a share's sum
    is 1."""
    shares = measurements.gradient_shares(tiny_run)
    calib = load_calib(tiny_run)
    model, rows, diffusion = load_calibrated(calib), calib["calibration"], Diffusion(6)
    watched = {"mlp.fc2": [block.mlp.fc2 for block in model.blocks]}
    watched["final_layer.linear"], outputs = [model.final_layer.linear], {}

    def keep(module, _, output):
        outputs[module] = output.requires_grad_()

    for layers in watched.values():
        for layer in layers:
            layer.register_forward_hook(keep)
    out = model(rows["x"], diffusion.timestep_map[rows["t"]], rows["y"])[:, :3]
    loss = (diffusion.implied_eps(rows["x"], rows["x_0"], rows["t"]) - out).square().sum()
    for kind, layers in watched.items():
        grads = torch.autograd.grad(loss, [outputs[x] for x in layers], retain_graph=True)
        energy = sum(grad.square().flatten(1).sum(1) for grad in grads)
        wanted = torch.stack([energy[rows["group"] == i].sum() for i in range(3)]) / energy.sum()
        np.testing.assert_allclose(shares[kind], wanted, rtol=1e-4)
    assert len(shares) == 9
    for share in shares.values():
        assert sum(share) == pytest.approx(1)


def test_weighted_error_counts_layers_on_tokens_alone(monkeypatch, tmp_path):
    """Of adaLN and the embedders only methods/tqdit_plus.py knows; blocks of a kind are summed."""
    costs = {"blocks.0.mlp.fc1": 1.0, "blocks.1.mlp.fc1": 2.0, "final_layer.linear": 4.0}
    costs |= {"t_embedder.mlp.0": 8.0, "blocks.0.adaLN_modulation.1": 16.0}
    quant = dict(report=dict(costs=costs))
    monkeypatch.setattr(measurements, "load_quant", lambda path: quant)
    args = options(monkeypatch, "--runs", str(tmp_path))
    found = measurements.cost_by_kind(sweep.Sweep(args), Row(100, (6, 6), "plus"))
    assert found == {"mlp.fc1": 3.0, "final_layer.linear": 4.0}


# ------------------------------------------------------------------------------------------------
# The page


def test_a_section_is_replaced_and_all_else_kept(tmp_path):
    path = tmp_path / "results.md"
    page.write_section(path, "a", "first")
    page.write_section(path, "b", "second")
    path.write_text(path.read_text() + "by hand\n")
    page.write_section(path, "a", "third")
    text = path.read_text()
    assert text.startswith("# Results on the demo model") and text.endswith("by hand\n")
    assert "first" not in text and text.index("third") < text.index("second")


def test_row_says_what_it_was_measured_with():
    found = dict(num_images=40, steps=100, image_seed=0)
    assert page.origin(found) == "N = 40, T = 100, seed 0"
    found |= dict(calibration_seed=1, rows=40, rounds=3)
    assert page.origin(found) == "N = 40, T = 100, seeds 1, 0, 40 rows, R = 3"


def test_recorded_command_tells_no_folder_of_the_writer(monkeypatch):
    flags = ["tables.py", "--name", "x", "--out", "/some/where", "--rows", "80", "--runs", "here"]
    monkeypatch.setattr(sys, "argv", flags)
    assert page.command_line() == "python benchmarks/tables.py --name x --rows 80"


def test_comparison_is_of_the_first_model_over_the_second(monkeypatch):
    """Gains are the first's, the error is the first's over the second's."""
    costs = dict(w6a6_plus={"fc": 1.0}, w6a6={"fc": 4.0})
    monkeypatch.setattr(measurements, "cost_by_kind", lambda sweep, row: costs[row.name])
    where = dict(run_of=lambda row: Path("run"), run=lambda T: Path("run"))
    plan = SimpleNamespace(**where, args=SimpleNamespace(num_images=3))

    def gain(first, second, *twin):
        assert "plus" in first.name and "plus" not in second.name
        return 2.0, [1.0, 3.0]

    made = SimpleNamespace(psnr_gain=gain, snr_change=gain)
    rows = [SimpleNamespace(name=name, steps=100) for name in costs]
    found = measurements.compare(plan, made, *rows)
    assert found["weighted_error"] == 0.25 and found["psnr_gain"] == found["snr_gain"] == 2


def test_weighted_errors_are_averaged_over_the_calibration_sets(monkeypatch):
    """Each over the baseline's on the same set."""
    costs = {("base", 0): (1.0, 3.0), ("base", 1): (2.0, 2.0)}
    costs |= {("ho", 0): (0.5, 3.0), ("ho", 1): (2.0, 1.0)}
    monkeypatch.setattr(
        page,
        "cost_by_kind",
        lambda sweep, row: dict(zip("ab", costs[row.tag, row.seed], strict=True)),
    )
    models = {tag: [Row(100, (6, 6), tag, seed) for seed in (0, 1)] for tag in ("base", "ho")}
    *_, share, base, ho = page.error_table(None, models).strip().splitlines()
    assert (
        share == "| share in base | 38% | 62% | 100% |" and base == "| base | 1.00 | 1.00 | 1.00 |"
    )
    assert ho == "| ho | 0.75 | 0.75 | 0.81 |"


def test_changes_are_from_the_row_before(monkeypatch):
    """PSNR of 20, 21, 23 and 26 dB, Frechet distances of 4, 3, 2 and 1: what is better has a plus
    sign in PSNR, and a minus sign in distance; last the whole method, from the first row."""
    levels = dict(base=(20, 4.0), ho=(21, 3.0), ho_mrq=(23, 2.0), full=(26, 1.0), tensor=(25, 1.5))
    rows = [Row(100, (6, 6), tag, seed) for tag in levels for seed in (0, 1)]
    origin = dict(num_images=4, steps=100, rows=320, rounds=1, calibration_seed=0, image_seed=0)
    found = {row: origin | dict(snr=1.0, psnr=1.0, fd=levels[row.tag][1]) for row in rows}
    plan = SimpleNamespace(
        args=SimpleNamespace(ablation_steps=100), run=lambda T: Path("fp"), run_of=lambda row: row
    )
    monkeypatch.setattr(page, "samples_path", lambda sweep, row: row)
    made = SimpleNamespace(
        psnr=lambda row, twin: levels[row.tag][0] + np.arange(4.0),
        drawn_fd=lambda row: levels[row.tag][1] + np.zeros(9),
        interval=lambda gains: [gains.min(), gains.max()],
    )
    lines = page.rung_lines(plan, made, rows, found, (6, 6))
    gains = [line[5:7] for line in lines]
    wanted = ["", ""], [1, -1], [2, -1], [3, -1], [-1, 0.5], [6, -3]
    assert gains[0] == wanted[0] and lines[-1][0] == "full, from base"
    for gain, (psnr, fd) in zip(gains[1:], wanted[1:], strict=True):
        assert gain == [page.ranged(psnr, [psnr, psnr]), page.ranged(fd, [fd, fd], 3)]


def test_a_sweep_of_one_t_names_the_machine_of_its_own_images(monkeypatch, tmp_path):
    """--only models --steps 10: there are no images at the T of the other tables."""
    monkeypatch.setattr(page, "models_section", lambda *_: [])
    monkeypatch.setattr(page, "phase_section", lambda *_: [])
    flags = ["--runs", str(tmp_path), "--steps", "10", "--only", "models"]
    plan, rows = tables.plan(options(monkeypatch, *flags))
    plan.run(10).mkdir(parents=True)
    meta = json.dumps(dict(device="NVIDIA H200", torch="2.11"))
    np.savez(plan.run(10) / "samples_fp.npz", meta=np.array(meta))
    text, _ = page.render(plan, None, rows, {})
    assert ("sampled on an NVIDIA H200" in text) != torch.cuda.is_available()
    assert "torch" in page.render(plan, None, dict(models=[]), {})[0]


def test_softmax_scales_are_exponents_below_the_largest(monkeypatch):
    """s_1 = 2^-i / 2^(k-1) of every block's product after softmax, group by group."""
    state = dict(a=dict(scale1=2.0 ** -torch.tensor([0.0, 5.0, 2.0]) / 2**5))
    layers = {"blocks.3.attn.av": state, "blocks.3.attn.qk": {}}
    monkeypatch.setattr(measurements, "load_quant", lambda path: dict(layers=layers))
    plan = SimpleNamespace(run_of=lambda row: Path())
    assert measurements.softmax_scales(plan, Row(100, (6, 6), "full")) == {"3": [0, 5, 2]}


def test_phases_take_the_median_of_each_sort_of_job(tmp_path):
    """03 of the whole method and of plus, 04 in full precision; rungs are left out."""
    found = {"T100_seed0": {"01": 3, "03 w6a6": 5, "03 w6a6_plus": 7, "04 fp": 9}}
    found["T100_seed0"]["03 w6a6_mse"] = 99
    found |= {"T100_seed1": {"03 w6a6": 6, "03 w8a8": 10}, "T250_seed0": {"01": 30}}
    for folder, times in found.items():
        (tmp_path / folder / "jobs").mkdir(parents=True)
        for name, seconds in times.items():
            text = json.dumps(dict(seconds=seconds, peak_mib=2 * seconds))
            (tmp_path / folder / "jobs" / f"{name}.json").write_text(text)
    plus = f"03 {measurements.PLUS}"
    wanted = {(100, "01"): 3, (100, "03"): 6, (100, plus): 7, (100, "04 FP"): 9, (250, "01"): 30}
    expected = {key: dict(seconds=x, peak_mib=2 * x) for key, x in wanted.items()}
    assert measurements.phases(SimpleNamespace(folder=tmp_path)) == expected


def test_sensitivity_is_shared_out_by_group(tiny_run):
    """The sampler's own row of the table of gradients."""
    s = Diffusion(6).sensitivity().double()
    found = measurements.gradient_shares(tiny_run)["sampler's sensitivity"]
    assert found == pytest.approx((s.view(3, 2).sum(1) / s.sum()).tolist())


@torch.no_grad()
def test_features_are_of_images_from_minus_one_to_one(tmp_path, monkeypatch):
    """As 05 feeds the demo's network; precision is of the samples, recall of the reference."""
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "a", arr_0=images)
    monkeypatch.setattr(scores, "coverage", lambda points, centres: len(points) / len(centres))
    made = scores.Scores(30)
    found, x = made.of(tmp_path / "a.npz"), torch.from_numpy(images).permute(0, 3, 1, 2)
    wanted = made.network((x / 127.5 - 1).to(made.device))[0]
    torch.testing.assert_close(found["features"], wanted)
    share = 30 / len(made.reference["features"])
    assert (found["precision"], found["recall"]) == (share, 1 / share)
