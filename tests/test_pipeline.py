"""The scripts as a user meets them: run to the end, again, killed, spread, and given bad input.

Each test is one claim. Bytes are compared with those of `tiny_run`, which nothing disturbed.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, FLAGS, ROOT, load_script, run_script, tiny_flags

import models_dit

TARGETS = {  # what each phase writes, the file that says it is done first
    "01_collect_calib": ["calib.pt"],
    "02_grad_cache": [f"grads/{x}.pt" for x in ("embed", "block_00", "block_01", "final")],
    "03_quantize": ["quant_w6a6.pt"],
    "04_sample": ["samples_w6a6.npz", "samples_w6a6.png"],
    "05_eval_fid": ["metrics.json", "comparison.png"],
}
OTHER = dict(zip(FLAGS, ["--seed 1", "--eps renoise", "--rounds 1", "--num-images 5"], strict=True))
PHASES = pytest.mark.parametrize("name", FLAGS)
SITECUSTOMIZE = """
import os, signal
real, when, written, calls = os.replace, os.environ["KILL"], os.environ["WRITTEN"], []
def replace(source, target):
    calls.append(os.path.basename(target))
    if when in (str(len(calls)), calls[-1]):
        os.truncate(source, os.path.getsize(source) // 2)  # as if in the middle of the write
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    print(calls[-1], file=open(written, "a"))
    if when == "after " + calls[-1]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
"""
RANK_1_DIES = """
import os, signal, time
def replace(source, target):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ["HOLD"]))  # a long piece of work
    real(source, target)
real, os.replace = os.replace, replace
"""


def snapshot(folder):
    """Every path under a folder, hidden ones too; of files, when they were written and what."""
    paths = sorted(folder.rglob("*"))
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None for p in paths}


def leftovers(folder):
    """What no finished phase may leave behind: temporary files and folders of parts."""
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]


def targets(run, name):
    return {target: (run / target).read_bytes() for target in TARGETS[name]}


def without(tiny_run, folder, name):
    """A copy of the tiny run in which this phase has not been run yet."""
    run = shutil.copytree(tiny_run, folder / "run")
    for target in TARGETS[name]:
        (run / target).unlink()
    return run


def kill_at(when, folder):
    """The environment of a run that gets SIGKILL `when`; folder/written lists what it wrote."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(folder), "KILL": when, "WRITTEN": str(folder / "written")}


def refused(result, words):
    """The contract for bad input: status 2 and one line on stderr, progress bars aside."""
    lines = [x for x in result.stderr.splitlines() if x.strip() and "%|" not in x]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert words in lines[0]


@pytest.fixture
def run_here(monkeypatch, capsys):
    """`run_script` inside this process: two seconds sooner, where a process proves nothing."""
    monkeypatch.setenv("GIT_DIR", ENVIRONMENT["GIT_DIR"])

    def run(name, *flags):
        script, status = load_script(name), 0
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu", *flags])
        try:
            models_dit.run_script(script.main, script.parse_args)
        except SystemExit as stop:
            status = stop.code
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())

    return run


def arrays(run, model="w6a6"):
    with np.load(run / f"samples_{model}.npz") as file:
        return file["arr_0"].astype(int), file["labels"]


def test_phases_run_to_the_end_and_name_the_next_command(tiny_run):
    """From a checkpoint to samples: status 0, the next command last, nothing temporary left."""
    for name, following in zip(FLAGS, [*TARGETS][1:], strict=True):
        log = (tiny_run.parent / f"{name}.log").read_text()
        assert f"Next: python {following}.py --run {tiny_run}" in log.splitlines()[-1]
    assert not leftovers(tiny_run)


def test_tiny_samples_are_lively(tiny_run):
    """Guards the other tests: images are not saturated, differ, and quantizing changes them."""
    for images, labels in (arrays(tiny_run), arrays(tiny_run, "fp")):
        assert np.isin(images, (0, 255)).mean() < 0.5 and images.std() > 20
        assert len(np.unique(images, axis=0)) == 6 and labels.tolist() == [0, 1, 2, 3, 4, 0]
    assert np.abs(arrays(tiny_run)[0] - arrays(tiny_run, "fp")[0]).max() > 1


@PHASES
def test_help_tells_the_papers_flags_from_the_machines(name, run_here):
    """--help of every script has both groups of flags."""
    result = run_here(name, "--help")
    assert result.returncode == 0
    assert re.search(r"^paper\b.*^machine\b", result.stdout, re.M | re.S)


@PHASES
def test_same_command_again_is_up_to_date(name, tiny_run, tiny_ckpt, run_here):
    """Run again, a phase says so, succeeds and touches nothing."""
    before = snapshot(tiny_run)
    result = run_here(name, *tiny_flags(name, tiny_run, tiny_ckpt))
    assert result.returncode == 0 and "is up to date" in result.stdout.splitlines()[-1]
    assert snapshot(tiny_run) == before


@PHASES
def test_other_settings_need_force(name, tiny_run, tiny_ckpt, tmp_path, run_here):
    """Another setting is refused and changes nothing; with --force it replaces the file."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before, flags = snapshot(run), tiny_flags(name, run, tiny_ckpt) + OTHER[name].split()
    refused(run_here(name, *flags), "--force replaces it")
    assert snapshot(run) == before
    assert run_here(name, *flags, "--force").returncode == 0
    assert not leftovers(run) and not targets(run, name).items() & targets(tiny_run, name).items()


@PHASES
def test_killed_run_continues_and_ends_with_the_same_bytes(name, tiny_run, tiny_ckpt, tmp_path):
    """kill -9 in the second write, in the last one and right after it; then undisturbed."""
    run, last = without(tiny_run, tmp_path, name), TARGETS[name][0]
    final = last.removeprefix("grads/")
    for when in ("2", final, f"after {final}", "never"):
        result = run_script(name, *tiny_flags(name, run, tiny_ckpt), env=kill_at(when, tmp_path))
        assert result.returncode == (0 if when == "never" else -signal.SIGKILL), result.stderr
        assert (run / last).exists() == (when in (f"after {final}", "never"))
    assert targets(run, name) == targets(tiny_run, name) and not leftovers(run)
    written = (tmp_path / "written").read_text().split()
    assert len(written) <= len(set(written)) + 1, f"finished work was done again: {written}"


def test_killed_runs_of_two_settings_never_mix(tiny_run, tmp_path, run_here):
    """02 killed at its last file, so with other settings, then run as at first: the first bytes."""
    run = without(tiny_run, tmp_path, "02_grad_cache")
    flags = tiny_flags("02_grad_cache", run, None)
    for other in ([], OTHER["02_grad_cache"].split()):
        run_script("02_grad_cache", *flags, *other, env=kill_at("embed.pt", tmp_path))
    assert run_here("02_grad_cache", *flags).returncode == 0
    assert targets(run, "02_grad_cache") == targets(tiny_run, "02_grad_cache")


def test_noise_of_an_image_depends_on_its_seed_and_index_only():
    """Exactly: the noise of images 3..5 is the same alone and among others, step after step."""
    make, draw = models_dit.image_generators, models_dit.draw_noise
    alone, among = make(7, range(3, 6)), make(7, range(64))
    for _ in range(3):
        noise = draw(among, (3, 8, 8), "cpu")
        assert torch.equal(draw(alone, (3, 8, 8), "cpu"), noise[3:6])
        assert len(noise.flatten(1).unique(dim=0)) == 64
    others = make(7, [3]) + make(8, [3]) + make(7, [3], stream=1)
    assert len(draw(others, (3,), "cpu").unique(dim=0)) == 3


@pytest.mark.parametrize("bits", ["--fp", "--wbits 6 --abits 6"])
def test_image_is_the_same_in_any_batch_and_range(bits, tiny_run, tmp_path, run_here):
    """Eight images at --batch-size 1, 7 and 64, and images 3..5 alone, agree within 1/255."""
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def sample(flags):
        command = f"--run {run} --force {bits} {flags}"
        assert run_here("04_sample", *command.split()).returncode == 0
        return arrays(run, "fp" if bits == "--fp" else "w6a6")

    images, labels = sample("--num-images 8 --batch-size 64")
    for size in (1, 7):
        assert np.abs(sample(f"--num-images 8 --batch-size {size}")[0] - images).max() <= 1
    part, part_labels = sample("--first 3 --num-images 3")
    assert np.abs(part - images[3:6]).max() <= 1 and (part_labels == labels[3:6]).all()


@pytest.fixture(scope="module")
def scored_run(tiny_run, tmp_path_factory):
    """The tiny run with the metrics that one process wrote."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("scored") / "run")
    torch.manual_seed(0)
    torch.save(models_dit.FeatureNet(3, 2, 10).state_dict(), run / "features.pt")
    result = spread("05_eval_fid", run, 1)
    assert result.returncode == 0, result.stderr
    return run


def spread(name, run, count, **env):
    """A script in `count` processes of torchrun's, in pieces of two images."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "--"]
    score = ["--reference", run / "samples_fp.npz", "--features", run / "features.pt"]
    flags = ["--run", run, "--batch-size", 2, *score] if name.startswith("05") else None
    return run_script(name, *flags or tiny_flags(name, run, None), launcher=launcher, env=env)


def rank_1_dies(folder, hold):
    """The environment of a run whose rank 1 gets SIGKILL in its first write, and in which every
    piece of the others takes `hold` seconds."""
    (folder / "sitecustomize.py").write_text(RANK_1_DIES)
    return {"PYTHONPATH": str(folder), "HOLD": str(hold)}


def lines_of(name, result):
    return [line for line in result.stderr.splitlines() if line.startswith(name)]


@pytest.mark.parametrize("name", ["03_quantize", "04_sample", "05_eval_fid"])
def test_three_processes_write_the_same_bytes_as_one(name, scored_run, tmp_path):
    """torchrun spreads the work and changes nothing; one process alone speaks."""
    run = without(scored_run, tmp_path, name)
    result = spread(name, run, 3)
    assert result.returncode == 0 and not leftovers(run), result.stderr
    assert targets(run, name) == targets(scored_run, name)
    bars = re.findall(r"(\S+):   0%", result.stderr)
    assert result.stdout.count("Next:") == 1 and len(bars) == len(set(bars)) > 0


@pytest.mark.parametrize("name", ["04_sample", "05_eval_fid"])
def test_dead_process_stops_the_others_and_fewer_continue(name, scored_run, tmp_path):
    """kill -9 of one of three: each other says so in one line; two processes end with the bytes."""
    run = without(scored_run, tmp_path, name)
    result = spread(name, run, 3, **rank_1_dies(tmp_path, 100))
    ours = lines_of(name, result)
    assert result.returncode == 1 and len(ours) == 2, result.stderr
    assert all("the same command again continues" in line for line in ours)
    assert "Traceback" not in result.stderr.partition("torch/distributed/elastic")[0]
    assert not (run / TARGETS[name][0]).exists()
    result = spread(name, run, 2)
    assert result.returncode == 0, result.stderr
    assert targets(run, name) == targets(scored_run, name) and not leftovers(run)


def test_dead_process_on_another_node_is_one_line(scored_run, tmp_path):
    """Nothing but a broken connection tells of it: status 2, one line, what is done stays."""
    run = without(scored_run, tmp_path, "04_sample")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | ENVIRONMENT | rank_1_dies(tmp_path, 0)
    env |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, ROOT / "04_sample.py", *tiny_flags("04_sample", run, None)]
    start = partial(subprocess.Popen, command, stderr=subprocess.PIPE, text=True)
    processes = [start(env=env | dict(RANK=rank)) for rank in "01"]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL]
    refused(subprocess.CompletedProcess(command, 2, "", errors[0]), "another process died")
    assert len([*run.glob(".samples_w6a6.npz.*/*.pt")]) == 2


@pytest.mark.parametrize("steps", ["6", "2", "11"])
def test_quant_file_alone_samples_with_any_steps(steps, tiny_run, tmp_path, run_here):
    """quant_w6a6.pt in an empty folder gives the same images; other --steps, others (D4)."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = [*tiny_flags("04_sample", tmp_path, None), "--steps", steps]
    assert run_here("04_sample", *flags).returncode == 0
    assert np.array_equal(arrays(tmp_path)[0], arrays(tiny_run)[0]) == (steps == "6")


class Payload:  # unpickled, it would make a folder in the working directory
    def __reduce__(self):
        return os.mkdir, ("executed",)


def cut(file):
    return lambda run: os.truncate(run / file, (run / file).stat().st_size // 2)


def copy(source, target):
    return lambda run: shutil.copy(run / source, run / target)


def poison(file):
    return lambda run: torch.save({"kind": "calib", "x": Payload()}, run / file)


def edit(change):
    def prepare(run):
        calib = torch.load(run / "calib.pt", weights_only=True)
        change(calib)
        torch.save(calib, run / "calib.pt")

    return prepare


C, W8 = "--ckpt dit.pt --vae none --steps 6 --groups 3 --per-group 4", "--wbits 8 --abits 8"
NEW = "--num-heads 4 --run new"
REFUSALS = {  # script, flags, what happens to the run before, words of the line
    "ckpt missing": ("01", f"--ckpt gone.pt {NEW}", None, "gone.pt"),
    "ckpt truncated": ("01", f"{C} {NEW}", cut("dit.pt"), "dit.pt is damaged"),
    "ckpt hostile": ("01", f"{C} {NEW}", poison("dit.pt"), "holds pickled objects, refused"),
    "ckpt no DiT": ("01", f"--ckpt calib.pt {NEW}", None, "not a DiT checkpoint"),
    "heads unknown": ("01", f"{C} --run new", None, "--num-heads"),
    "heads do not divide": ("01", f"{C} --run new --num-heads 5", None, "--num-heads 5"),
    "heads negative": ("01", f"{C} --run new --num-heads -4", None, "--num-heads"),
    "groups over steps": ("01", f"{C} {NEW} --steps 3 --groups 5", None, "--groups 5"),
    "flag unknown": ("01", f"{C} {NEW} --nonsense 1", None, "--help"),
    "number not one": ("01", f"{C} {NEW} --groups three", None, "three"),
    "run is a file": ("01", f"{C} --num-heads 4 --run calib.pt", None, "calib.pt"),
    "memory limit zero": ("03", "--wbits 6 --abits 6 --memory-limit 0", None, "--memory-limit 0"),
    "memory limit inf": ("03", "--wbits 6 --abits 6 --memory-limit inf", None, "not finite"),
    "cuda absent": ("01", f"{C} {NEW} --device cuda", None, "--device cpu"),
    "device unknown": ("02", "--device abacus", None, "abacus"),
    "calib truncated": ("02", "", cut("calib.pt"), "calib.pt is damaged"),
    "calib hostile": ("02", "", poison("calib.pt"), "holds pickled objects, refused"),
    "calib Namespace": ("02", "", edit(lambda c: c.update(git=Namespace())), "refused"),
    "calib of a phase": ("02", "", copy("grads/final.pt", "calib.pt"), "is grads, not calib"),
    "calib NaN": ("02", "", edit(lambda c: c["calibration"]["x"][3].fill_(np.nan)), "NaN"),
    "calib label": ("02", "", edit(lambda c: c["calibration"]["y"][3].fill_(77)), "label 77"),
    "calib hollow": ("02", "", edit(lambda c: c.pop("settings")), "calib.pt"),
    "ckpt new": ("02", "--force", edit(lambda c: c["settings"].update(ckpt="calib.pt")), "is now"),
    "grads of another": ("03", W8, edit(lambda c: c.update(git="another")), "02_grad_cache.py"),
    "grads missing": ("03", W8, lambda run: shutil.rmtree(run / "grads"), "02_grad_cache.py"),
    "wbits 1": ("03", "--wbits 1 --abits 8", None, "--wbits 1"),
    "abits 9": ("03", "--wbits 8 --abits 9", None, "--abits 9"),
    "quant of a phase": ("04", W8, copy("calib.pt", "quant_w8a8.pt"), "is calib, not quant"),
    "quant truncated": ("04", FLAGS["04_sample"], cut("quant_w6a6.pt"), "quant_w6a6.pt is damaged"),
    "quant missing": ("04", W8, None, "03_quantize.py"),
    "ckpt gone": ("04", "--fp", edit(lambda c: c["settings"].update(ckpt="gone.pt")), "gone.pt"),
    "classes": ("04", "--fp --classes 1 99", None, "label 99 is outside 0..4"),
    "steps 0": ("04", f"{FLAGS['04_sample']} --steps 0 --force", None, "steps"),
    "samples truncated": ("04", FLAGS["04_sample"], cut("samples_w6a6.npz"), "npz is damaged"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line(case, tiny_run, tiny_ckpt, tmp_path):
    """Status 2, one line that names the fault, no code of a file run, nothing written."""
    number, flags, prepare, words = REFUSALS[case]
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(tiny_ckpt, run / "dit.pt")
    if prepare:
        prepare(run)
    before = snapshot(tmp_path)
    refused(
        run_script(
            next(x for x in FLAGS if x.startswith(number)), "--run", ".", *flags.split(), cwd=run
        ),
        words,
    )
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where root may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["01_collect_calib", "03_quantize", "04_sample"])
def test_full_disk_leaves_no_half_file(name, tiny_run, tiny_ckpt, small_disk):
    """One line says so; the same command with space again ends with the same bytes."""
    run, filler = without(tiny_run, small_disk, name), small_disk / "filler"
    free = 100_000 if name.startswith("01") else 8192  # the last write of 01, the first of others
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
    flags = tiny_flags(name, run, tiny_ckpt)
    refused(run_script(name, *flags), "free some disk space")
    assert not (run / TARGETS[name][0]).exists() and not list(run.rglob("*.tmp"))
    filler.unlink()
    assert run_script(name, *flags).returncode == 0
    assert targets(run, name) == targets(tiny_run, name)


def test_every_torch_load_runs_no_code():
    """torch.load is never called without weights_only=True on the same line, nor pickle at all."""
    unsafe = (
        r"torch\.load\((?!.*weights_only=True)|^\s*(import|from) pickle|allow_pickle\s*=\s*True"
    )
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert not re.search(unsafe, path.read_text(), re.M), path
