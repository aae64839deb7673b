"""benchmarks/compare.py: its plan, its jobs and their times, images added to images, its page and
picture; no sweep is run."""

import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, parsed, run_in_process
from matplotlib.figure import Figure
from PIL import Image

from common.errors import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import compare_page  # noqa: E402
import contenders  # noqa: E402
import forward_pass  # noqa: E402
import jobs  # noqa: E402
import layer_error  # noqa: E402
import more_images  # noqa: E402
import processes  # noqa: E402
import scores  # noqa: E402
from contenders import LAYERS, MAIN, METHODS, WIDTHS, Model  # noqa: E402

QUICK = ["--quick", "--only", "tqdit", "plus", "6/6", "8/8"]


def options(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, flags)])
    return compare.parse_args()


# ------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("method", METHODS)
def test_every_command_of_the_plan_is_one_its_script_accepts(monkeypatch, method):
    """All jobs of a method, parsed and checked by the scripts themselves; a tag names the file that
    the flags make."""
    comparison, entries = compare.plan(options(monkeypatch, "--rows", 40, "--only", method))
    models = {model for _, model, _ in entries}
    for job in (job for stage in comparison.stages for job in stage):
        args = parsed(monkeypatch, job.command)
        if job.name.startswith("03"):
            assert job.name == f"03 w{args.wbits}a{args.abits}_{args.tag}" and args.rows == 40
    assert len(comparison.stages[2]) == len(models) >= 4


@pytest.mark.parametrize("method", METHODS)
def test_iterations_are_scaled_from_the_paper_s(monkeypatch, method):
    """The numbers that --iterations scales are the script's own defaults; a flag that is missing
    here would go unscaled."""
    script = METHODS[method].script
    command = [script, "--wbits", "4", "--abits", "8", *METHODS[method].released]
    args = vars(parsed(monkeypatch, [x.format(abits=8) for x in command]))
    theirs = {k: x for k, x in args.items() if k.endswith("iterations") or k == "trajectories"}
    ours = METHODS[method].iterations
    assert theirs == {flag[2:].replace("-", "_"): count for flag, count in ours.items()}
    comparison = contenders.Comparison(options(monkeypatch, "--iterations", 0.25))
    assert comparison.iterations(method) == {flag: n / 4 for flag, n in ours.items()}


def test_own_layers_are_compared_at_two_widths_and_more_images(monkeypatch):
    """Every model once; TQ-DiT's own layers are the released ones."""
    comparison, entries = compare.plan(options(monkeypatch, "--num-images-main", 300))
    released, own = ({m for table, m, _ in entries if table == layers} for layers in LAYERS)
    assert len(entries) == len(released) + len(own) == 4 * len(METHODS) + 2 * (len(METHODS) - 3)
    assert {model.bits for model in own} == {*MAIN}
    assert not {"plus_even", "plus_token", "qdit_16"} & {model.method for model in own}
    assert Model("tqdit", MAIN[0]) in released & own
    names = [job.name for job in comparison.stages[3]]
    assert {"04 fp 300", "04 w6a6_tqdit 300", "04 w6a6_htg 300", "04 w6a6_htg_own 200"} < {*names}
    assert len(names) == len({name.rpartition(" ")[0] for name in names})  # a model once
    assert {name.rpartition(" ")[2] for name in names} == {"200", "300"}


def test_only_picks_methods_widths_and_tables(monkeypatch):
    """What is not named is not narrowed: two methods at two widths, in both tables."""

    def names(*flags):
        _, entries = compare.plan(options(monkeypatch, *flags))
        return [(layers, model.name) for layers, model, _ in entries]

    released = ["w8a8_tqdit", "w8a8_plus", "w6a6_tqdit", "w6a6_plus"]
    own = [("own", "w6a6_tqdit"), ("own", "w6a6_plus_own")]
    assert names(*QUICK) == [("released", name) for name in released] + own
    only = names("--only", "own", "plus")
    assert only == [("own", "w6a6_plus_own"), ("own", "w4a8_plus_own")]


@pytest.mark.parametrize("flags", [["--num-images", 0], ["--iterations", 0], ["--iterations", "2"]])
def test_bad_numbers_are_refused(monkeypatch, flags):
    with pytest.raises(InputError, match=flags[0]):
        options(monkeypatch, *flags)


def test_a_run_may_start_from_another_s_calibration(tmp_path):
    """A copy, which later calls leave alone; a run without gradients is refused before any copy."""
    source, run = tmp_path / "source", tmp_path / "run"
    (source / "grads").mkdir(parents=True)
    (source / "calib.pt").write_text("calib")
    (source / "grads" / "embed.pt").write_text("grads")
    compare.start_from(source, run)
    assert (run / "calib.pt").read_text() == "calib" and (run / "grads" / "embed.pt").is_file()
    (run / "calib.pt").write_text("its own")
    compare.start_from(source, run)
    assert (run / "calib.pt").read_text() == "its own"
    shutil.rmtree(source / "grads")
    with pytest.raises(InputError, match="no grads"):
        compare.start_from(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------
# Jobs, their time and memory


def test_a_method_that_fails_is_left_out_and_the_others_go_on(monkeypatch, tmp_path):
    """Its images are not asked for; calibration that fails stops all."""
    comparison, _ = compare.plan(options(monkeypatch, *QUICK, "--runs", tmp_path))
    done = []

    def perform(job, *_, **__):
        if "plus" in job.name:
            raise InputError(f"{job.name} failed")
        done.append(job.name)
        return job

    monkeypatch.setattr(contenders, "perform", perform)
    for stage in comparison.stages[2:]:
        assert [comparison.perform(job) for job in stage] == stage
    assert comparison.failed == ["w8a8_plus", "w6a6_plus", "w6a6_plus_own"]
    assert done == ["03 w8a8_tqdit", "03 w6a6_tqdit", "04 fp 20"] + [
        "04 w8a8_tqdit 20", "04 w6a6_tqdit 20"
    ]  # fmt: skip
    monkeypatch.setattr(contenders, "perform", lambda job: perform(job._replace(name="plus")))
    with pytest.raises(InputError):
        comparison.perform(comparison.stages[0][0])


def test_time_is_told_in_units_of_just_before_and_just_after(tmp_path):
    """Their mean, and what else is to be kept."""
    job, units = jobs.Job(tmp_path, "03 x", ["-c", "print('here')"], 1), iter([1.0, 2.0])
    jobs.perform(job, lambda: next(units), resumed=False)
    found = json.loads(job.path("json").read_text())
    assert found["unit_seconds"] == 1.5 and found["resumed"] is False
    assert job.path("log").read_text() == "here\n" and found["command"] == "-c print('here')"


def test_a_method_that_was_killed_is_told_to_be_resumed(monkeypatch, tmp_path):
    """Its parts are there before it starts; another's do not count."""
    comparison, _ = compare.plan(options(monkeypatch, *QUICK, "--runs", tmp_path))
    (comparison.run / ".quant_w6a6_plus.pt.0123").mkdir(parents=True)
    found = {}
    monkeypatch.setattr(
        contenders, "perform", lambda job, _, resumed: found.setdefault(job.name, resumed)
    )
    for job in comparison.stages[2]:
        comparison.perform(job)
    assert [name for name, resumed in found.items() if resumed] == ["03 w6a6_plus"]
    found.clear()
    (comparison.run / "quant_w8a8_plus.pt").touch()  # it went on when the sweep was killed
    for job in comparison.stages[2]:
        comparison.perform(job)
    names = [name for name, resumed in found.items() if resumed]
    assert names == ["03 w8a8_plus", "03 w6a6_plus"]


def test_a_process_is_charged_for_its_own_memory_and_processor_alone(tmp_path):
    """Beside a parent with torch in it: a small child is small, sleep is no processor time."""
    with open(tmp_path / "log", "wb") as log:
        used = processes.timed(["-c", "import time; time.sleep(0.3)"], log)
        assert used.status == 0 and used.peak_mib < 60
        assert used.cpu_seconds < 0.25 < 0.3 <= used.seconds
        used = processes.timed(["-c", "x = bytearray(100 << 20); raise SystemExit(3)"], log)
        assert used.status == 3 and 100 < used.peak_mib < 200


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system pins no threads")
def test_a_worker_and_what_it_starts_stay_on_one_core():
    """One worker for each core; this thread keeps all of its own."""
    cores = jobs.usable_cores()
    with jobs.workers(cores) as pool:
        assert all(len(found) == 1 for found in pool.map(os.sched_getaffinity, [0] * 8))
    assert jobs.usable_cores() == cores


def test_forward_pass_prints_its_seconds(tiny_run, capsys):
    forward_pass.main(SimpleNamespace(run=tiny_run))
    assert 0 < float(capsys.readouterr().out) < 5


# ------------------------------------------------------------------------------------------------
# More images


@pytest.fixture
def sample(tiny_run, tmp_path, monkeypatch):
    """sample(N): more_images.py on the tiny run's W6A6 model without its samples; 04 is run in this
    process. Returns the file's bytes."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run / "quant_w6a6.pt", run)

    def phase(name, *flags):
        result = run_in_process(name, *flags)
        assert result.returncode == 0, result.stderr
        monkeypatch.setattr(sys, "argv", before)

    before = sys.argv
    monkeypatch.setattr(more_images, "run_phase", phase)

    def call(count):
        flags = f"--run {run} --wbits 6 --abits 6 --num-images {count}"
        monkeypatch.setattr(sys, "argv", ["more_images.py", *flags.split()])
        more_images.main(more_images.parse_args())
        return (run / "samples_w6a6.npz").read_bytes()

    call.run = run
    return call


def test_images_are_added_to_those_that_are_there(sample, tiny_run):
    """2, then 6: what 04 makes of 6 in one go, byte for byte. Fewer are there already."""
    assert len(sample(2)) < len(sample(6))
    whole = (tiny_run / "samples_w6a6.npz").read_bytes()
    assert sample(6) == whole == sample(3)
    assert not (sample.run / ".slices" / "w6a6").exists()


def test_a_comparison_that_compiles_tells_04_so(sample, monkeypatch):
    """Through more_images.py; batches of one size, as each size is compiled anew."""
    comparison = contenders.Comparison(options(monkeypatch, "--compile"))
    comparison.sample("w6a6_tqdit", ["--wbits", 6, "--abits", 6], 200)
    assert "--compile" in comparison.stages[3][0].command
    seen = []

    def phase(_, *flags):
        seen.extend(flags)
        raise InputError("far enough")

    monkeypatch.setattr(more_images, "run_phase", phase)
    flags = f"--run {sample.run} --wbits 6 --abits 6 --num-images 200 --compile"
    monkeypatch.setattr(sys, "argv", ["more_images.py", *flags.split()])
    with pytest.raises(InputError, match="far enough"):
        more_images.main(more_images.parse_args())
    assert parsed(monkeypatch, ["04_sample.py", *map(str, seen)]).compile
    assert seen[-2:] == ["--batch-size", 100]


def test_images_of_another_quant_file_are_refused(sample):
    """Neither kept nor added to; so are samples that do not begin at image 0."""
    sample(2)
    quant = torch.load(sample.run / "quant_w6a6.pt", weights_only=True)
    torch.save(quant | dict(torch="another"), sample.run / "quant_w6a6.pt")
    for count in (2, 4):
        with pytest.raises(InputError, match="delete it"):
            sample(count)
    meta = dict(settings=dict(first=3), inputs={})
    with pytest.raises(InputError, match="later images"):
        more_images.check_samples(sample.run / "samples_fp.npz", meta, sample.run / "calib.pt")


def test_jobs_share_a_gpu_and_large_batches_reach_04(monkeypatch, tmp_path):
    """--jobs at a time where a GPU does the work; --batch-size on the way to 04."""
    flags = ["--jobs", 3, "--batch-size", 400, "--runs", tmp_path]
    comparison = contenders.Comparison(options(monkeypatch, *flags))
    comparison.sample("fp", ["--fp"], 800)
    command = comparison.stages[3][0].command
    assert command[command.index("--batch-size") + 1] == "400"
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(jobs, "seconds_per_row", lambda cuda: 1)
    monkeypatch.setattr(jobs, "workers", lambda cores: asked.append(cores) or ThreadPoolExecutor())
    comparison.stages = [[] for _ in comparison.stages]
    comparison.go("test")
    assert asked == 4 * [[None, None, None]]


def test_images_sampled_otherwise_are_not_joined(sample, tiny_run):
    """Same model, other seed of the noise."""
    sample(2)
    flags = "--wbits 6 --abits 6 --num-images 2 --seed 1".split()
    other = sample.run / "other"
    other.mkdir()
    shutil.copy(tiny_run / "quant_w6a6.pt", other)
    assert run_in_process("04_sample", "--run", other, *flags).returncode == 0
    with pytest.raises(InputError, match="other settings"):
        more_images.append(sample.run / "samples_w6a6.npz", other / "samples_w6a6.npz")


# ------------------------------------------------------------------------------------------------
# Scores


def test_scores_are_of_the_first_images(tmp_path):
    """A file of 30 looked at as one of 20; one of fewer is refused."""
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28, 1), dtype=np.uint8)
    for name, count in (("long", 30), ("short", 20)):
        np.savez(tmp_path / name, arr_0=images[:count])
    made = scores.Scores(20)
    assert made.metrics(tmp_path / "long.npz") == made.metrics(tmp_path / "short.npz")
    with pytest.raises(InputError, match="20 images, not 30"):
        scores.Scores(30).of(tmp_path / "short.npz")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A comparison of made-up models: scores by N and `found`, for the page. The PSNR of `plus`
    is 3 dB better in every image, its Frechet distance half as much in every draw."""
    flags = ["--num-images", 40, "--num-images-main", 40, "--runs", tmp_path]
    comparison = contenders.Comparison(options(monkeypatch, *flags))
    noise, one = np.random.default_rng(0).normal(size=40), scores.Scores(40)
    released, own = {}, {}
    files = {"fp": (None, 1.0)} | {
        model.name: (30 + 3 * (model.method == "plus") + noise, 2 - (model.method == "plus"))
        for model in (Model(m, b, x) for m in METHODS for b in WIDTHS.values() for x in LAYERS)
    }
    drawn = np.exp(0.1 * np.random.default_rng(1).normal(size=scores.DRAWS))
    psnrs = {}
    for name, (psnr, fd) in files.items():
        path = comparison.run / f"samples_{name}.npz"
        one.files[path], psnrs[path] = dict(fd=fd, drawn=fd * drawn), psnr
    monkeypatch.setattr(one, "psnr", lambda path, twin: psnrs[path])
    comparison.run.mkdir()
    meta = json.dumps(dict(device="NVIDIA H200", torch="2.11"))
    np.savez(comparison.run / "samples_fp.npz", meta=np.array(meta))
    numbers = dict(fd_ratio=1.2, fd_ratio_interval=[1.1, 1.3], psnr=30, psnr_interval=[29, 31])
    numbers |= dict(snr=35, mib=2, passes=12.3, peak_mib=400, unit_seconds=2.0, resumed=False)
    numbers |= dict(steps=100, num_images=40)
    for method in METHODS:
        for model in (Model(method, bits) for bits in WIDTHS.values()):
            released[model] = numbers | dict(gradients=method == "tqdit", resumed=method == "ptqd")
    for bits in MAIN:
        own[Model("qdit", bits, "own")] = numbers | dict(gradients=False)
    path = comparison.run / "jobs" / "forward.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(cpu_seconds=11.0, peak_mib=300.0)))
    return comparison, {40: one}, dict(released=released, own=own)


def test_what_is_measured_of_a_model_is_its_own(tiny_run, tmp_path, monkeypatch):
    """Time over the unit of its own job, rows of its quant file; samples of another are refused."""
    flags = ["--name", "run", "--runs", tmp_path, "--rows", 40]
    comparison = contenders.Comparison(options(monkeypatch, *flags))
    shutil.copytree(tiny_run, comparison.run)
    names = {name: f"{name}_w6a6{end}" for name, end in (("quant", ".pt"), ("samples", ".npz"))}
    for name in names.values():
        (comparison.run / name).rename(comparison.run / name.replace("w6a6", "w6a6_tqdit"))
    record = dict(command="03", seconds=9.0, cpu_seconds=8.0, unit_seconds=2.0, peak_mib=5.0)
    (comparison.run / "jobs").mkdir()
    path = comparison.run / "jobs" / "03 w6a6_tqdit.json"
    path.write_text(json.dumps(record | dict(resumed=False)))
    made = SimpleNamespace(num_images=6, against=lambda *paths: dict(files=[p.name for p in paths]))
    found = contenders.measure(comparison, made, Model("tqdit", (6, 6)))
    passes = (9.0 if torch.cuda.is_available() else 8.0) / 2
    assert (found["passes"], found["rows"], found["gradients"]) == (passes, 320, True)
    assert found["files"] == ["samples_w6a6_tqdit.npz", "samples_fp.npz"]
    quant = comparison.run / "quant_w6a6_tqdit.pt"
    torch.save(torch.load(quant, weights_only=True) | dict(torch="another"), quant)
    with pytest.raises(InputError, match="delete it"):
        contenders.measure(comparison, made, Model("tqdit", (6, 6)))


# ------------------------------------------------------------------------------------------------
# The page


def tables_of(text):
    """Heading -> lines of cells of every table below it."""
    found = {}
    for section in text.split("\n### ")[1:]:
        lines = [line.strip("| ").split(" | ") for line in section.split("\n") if line[:1] == "|"]
        found[section.split("\n")[0]] = lines
    return found


def test_page_has_a_row_for_every_model(made):
    """Four widths of all methods, in the same order; two of Q-DiT's own layers."""
    text, _ = compare_page.render(*made)
    tables = tables_of(text)
    labels = [line[0] for line in tables["The same layers"]]
    width = ["method", "---|---|---|---|---|---|---", *(m.label for m in METHODS.values())]
    assert labels == 4 * width
    row = "1.200 [1.100, 1.300] | 30.00 [29.00, 31.00] | 35.00 | 2.00 | ≥ 12 | 400"
    assert f"| PTQD | {row} |" in text and text.count("≥ 12") == 4
    own = [line for line in tables["Each method's own choice of layers"] if line[0] == "Q-DiT"]
    assert [line[-1] for line in own] == 2 * ["0.00 [0.00, 0.00]"]


def test_page_says_what_time_holds(made):
    """11 s of forward passes of 2 s, of which there were four: a start of 1.5; 50 for Phase 1."""
    text, _ = compare_page.render(*made)
    text = " ".join(text.split())
    assert "About 2 passes of it" in text and "50 passes' worth" in text
    assert "those that use gradients (TQ-DiT)." in text and "takes 300 MiB" in text
    assert "Q-Diffusion `--weight-iterations 2000` of 20000" in text
    assert ("sampled on an NVIDIA H200, torch 2.11." in text) != torch.cuda.is_available()


def test_methods_are_compared_image_by_image(made):
    """3 dB and half the Frechet distance, with intervals of no width: the same images. What is
    better has the plus sign, and a ratio below 1."""
    text, values = compare_page.render(*made)
    line = next(
        x for x in tables_of(text)["Against TQ-DiT, image by image"] if x[0] == "TQ-DiT plus"
    )
    assert line[1:3] == ["3.00 [3.00, 3.00]", "0.500 [0.500, 0.500]"] and len(line) == 9
    line = next(x for x in tables_of(text)["Against TQ-DiT plus, image by image"] if x[0] == "HTG")
    assert line[1:3] == ["-3.00 [-3.00, -3.00]", "2.000 [2.000, 2.000]"]
    assert len(values["against_tqdit"]) == 4 * (len(METHODS) - 1)
    assert json.dumps(values)


def test_page_of_some_models_has_no_empty_table(made):
    """One method at one width: nothing to compare with, no other layers."""
    comparison, by_count, found = made
    model = Model("htg", (8, 8))
    some = dict(released={model: found["released"][model]})
    text, values = compare_page.render(comparison, by_count, some)
    assert list(tables_of(text)) == ["The same layers"] and not any(values.values())
    text, values = compare_page.render(comparison, by_count, dict(own=found["own"]))
    assert list(tables_of(text)) == ["Each method's own choice of layers"]
    assert "from the same layers" not in text  # there is nothing to compare with
    assert "Q-DiT" in text and not any(values.values())


def test_hand_written_page_has_a_place_for_the_tables_and_a_word_on_every_method():
    text = (ROOT / "docs" / "methods.md").read_text()
    assert re.search(r"<!-- sweep compare -->.*<!-- end of compare -->", text, re.S)
    for method in METHODS.values():
        assert method.variant or f"\n### {method.label}\n" in text, method.label
        assert method.script in text


# ------------------------------------------------------------------------------------------------
# The picture


def test_axis_is_linear_near_one_and_logarithmic_far_from_it():
    """Its functions undo each other; a percent is a percent near 1, a factor a factor far off."""
    ratios = np.array([0.01, 0.9, 1, 1.02, 1.04, 40, 80, 160])
    np.testing.assert_allclose(compare_page.ratio_at(compare_page.height(ratios)), ratios)
    steps = np.diff(compare_page.height(ratios))
    assert steps[3] == pytest.approx(steps[2], rel=0.03)
    assert steps[6] < 1.3 * steps[5] and compare_page.height(1.0) == 0


def test_names_are_moved_apart_in_their_order():
    moved = compare_page.spread_out([3.0, 1.0, 1.1, 1.05], 0.5)
    assert np.argsort(moved).tolist() == [1, 3, 2, 0]
    assert np.diff(np.sort(moved)).min() >= 0.5 - 1e-12
    assert compare_page.spread_out([0.0, 9.0], 0.5).tolist() == [0.0, 9.0]


@pytest.mark.parametrize("ratios", [(1.0, 1.001), (1.19, 1.199)])
def test_names_stay_beside_the_axis(ratios):
    """Of many methods at its lower end, or at its upper one."""
    ax = Figure().subplots()
    ax.set_yscale("function", functions=(compare_page.height, compare_page.ratio_at))
    ax.set_ylim(0.99, 1.2)
    ends = {method: (0, ratios[i % 2]) for i, method in enumerate(METHODS)}
    compare_page.name_lines(ax, ends, 1, 0.1)
    assert len(ax.texts) == len(METHODS)
    assert all(0.99 < text.get_position()[1] < 1.2 + 1e-9 for text in ax.texts)


def test_picture_has_a_line_and_a_name_for_every_method(made, tmp_path):
    """Colors of all methods in the file; a method at one width, or at none, does no harm."""
    found = made[2]["released"]
    for i, model in enumerate(found):
        found[model] = found[model] | dict(fd_ratio=1.15 + 0.01 * i)
    found = {m: x for m, x in found.items() if m.method != "htg" or m.bits == (6, 6)}
    found = {m: x for m, x in found.items() if m.method != "ditas"}
    figure = compare_page.draw(found)
    names = {text.get_text() for text in figure.axes[0].texts}
    assert names == {m.label for m in METHODS.values()} - {"DiTAS"}
    layer_error.save(tmp_path / "x.png", figure)
    image = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    colors = {bytes(color).hex() for color in np.unique(image, axis=0)}
    styles = {method: style for method, style in compare_page.STYLES.items() if method != "ditas"}
    assert {color.removeprefix("#") for color, *_ in styles.values()} <= colors


def test_every_method_has_a_style_of_its_own():
    assert compare_page.STYLES.keys() == METHODS.keys()
    assert len(set(compare_page.STYLES.values())) == len(METHODS)
