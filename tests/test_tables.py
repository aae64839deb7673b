"""benchmarks/tables.py: its plan, its jobs, its intervals and its page; no sweep is run."""

import importlib.util
import sys

import numpy as np
import pytest
from conftest import ROOT, load_script

SCRIPTS = ("01_collect_calib", "02_grad_cache", "03_quantize", "04_sample")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(tables, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["tables.py", *flags])
    return tables.parse_args()


def test_every_command_of_the_plan_is_one_its_script_accepts(tables, monkeypatch):
    """All jobs of both sweeps, parsed by the scripts' own parsers; tags name their flags."""
    scripts = {f"{name}.py": load_script(name) for name in SCRIPTS}
    for flags in ([], ["--quick"]):
        sweep, _ = tables.plan(options(tables, monkeypatch, *flags))
        for *_, command, _ in (job for stage in sweep.stages for job in stage):
            monkeypatch.setattr(sys, "argv", command)
            args = scripts[command[0]].parse_args()
            if command[0] == "03_quantize.py":
                tag = args.tag or "full"
                assert tag in tables.FLAGS and (args.preset == "best") == tag.startswith("best")


def test_the_plan_holds_what_each_table_needs(tables, monkeypatch):
    """A row's model is quantized and sampled once, from a calibration set of its T and seed."""
    sweep, rows = tables.plan(options(tables, monkeypatch, "--quick"))
    names = [(job[0].name, job[1]) for stage in sweep.stages for job in stage]
    assert len(names) == len(set(names))
    for group in rows.values():
        for steps, bits, tag, seed in group:
            run, model = sweep.run(steps, seed, tag).name, tables.label(bits, tag)
            assert {(run, "01"), (run, "02"), (run, f"03 {model}"), (run, f"04 {model}")} < {*names}
    assert {("T250_seed0", "04 fp"), ("T100_seed0", "04 fp")} < {*names}
    assert len(rows["ablation"]) == 2 * 4 * 3


def test_only_leaves_the_other_tables_out(tables, monkeypatch):
    args = options(tables, monkeypatch, "--only", "layers", "--quick", "--num-images", "7")
    sweep, rows = tables.plan(args)
    assert list(rows) == ["layers"] and args.num_images == 7 and args.rounds == 1
    assert sum(map(len, sweep.stages)) == 2 + 4 + 5  # one calibration set; FP is sampled too


def test_a_failed_job_stops_the_sweep_and_leaves_no_record(tables, tmp_path):
    job = (tmp_path, "03 x", ["03_quantize.py", "--run", str(tmp_path), "--wbits", "9"], 1)
    with pytest.raises(tables.dit.InputError, match="03 x.log"):
        tables.perform(job)
    assert not tables.kept(job).exists()
    good = (tmp_path, "help", ["03_quantize.py", "--help"], 1)
    assert tables.perform(good) == good
    record = tables.json.loads(tables.kept(good).read_text())
    assert record.keys() == {"command", "seconds", "peak_mib"}


def scores(tables, count=400, features=4):
    """Scores over made-up features, without files."""
    made = tables.Scores.__new__(tables.Scores)
    made.scoring = tables.load_scoring()
    made.draws = np.random.default_rng(0).integers(count, size=(200, count))
    made.reference = dict(mu=np.zeros(features), sigma=np.eye(features))
    return made


def test_intervals_are_paired_and_cover_the_mean(tables):
    """A constant difference has an interval of no width; the mean of noise lies inside its own."""
    made, noise = scores(tables), np.random.default_rng(1).normal(size=400)
    low, high = made.interval((noise + 0.3) - noise)
    assert low == pytest.approx(0.3) == high
    low, high = made.interval(noise)
    assert low < noise.mean() < high and 0.15 < high - low < 0.25  # 2 x 1.96 / sqrt(400)


def test_drawn_distances_use_the_same_images_for_every_model(tables):
    """A model's copy has ratio 1 in every draw; a shifted one is further off in every draw."""
    made = scores(tables)
    features = tables.torch.randn(400, 4, generator=tables.torch.Generator().manual_seed(0))
    own, copy, off = (made.drawn_fd(dict(features=features + x)) for x in (0, 0, 1))
    assert np.array_equal(own, copy) and (off > own).all() and own.std() > 0


def test_intervals_of_distances_stand_around_the_estimate(tables):
    """Draws that are all too high by 5 keep their spread and lose their place."""
    draws = 5 + np.linspace(-1, 1, 401)
    np.testing.assert_allclose(tables.centred(2.0, draws), [1.05, 2.95])


def test_a_section_is_replaced_and_all_else_kept(tables, tmp_path):
    path = tmp_path / "RESULTS.md"
    tables.write_section(path, "a", "first")
    tables.write_section(path, "b", "second")
    path.write_text(path.read_text() + "by hand\n")
    tables.write_section(path, "a", "third")
    text = path.read_text()
    assert text.startswith("# The paper's tables") and text.endswith("by hand\n")
    assert "first" not in text and text.index("third") < text.index("second")


def test_row_says_what_it_was_measured_with(tables):
    row = dict(sweep="quick", num_images=40, steps=100, calibration_seed=1, image_seed=0, rows=40)
    assert tables.origin(row) == "quick: N = 40, T = 100, seeds 1, 0, 40 rows"
    assert tables.origin(row | dict(num_images=None)) == "quick: T = 100, seeds 1, 0, 40 rows"


def test_recorded_command_tells_no_folder_of_the_writer(tables, monkeypatch):
    flags = ["tables.py", "--name", "x", "--out", "/some/where", "--rows", "80", "--runs", "here"]
    monkeypatch.setattr(sys, "argv", flags)
    assert tables.command_line() == "python benchmarks/tables.py --name x --rows 80"
