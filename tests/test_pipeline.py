"""The scripts as a user meets them: run to the end, again, killed, spread, and given bad input.

Each test is one claim. Bytes are compared with those of `tiny_run`, which nothing disturbed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FLAGS, ROOT, load_script, run_script, tiny_flags

from models_dit import draw_noise, image_generators

TARGETS = {  # what each phase writes, the file that ends it first
    "01_collect_calib": ["calib.pt"],
    "02_grad_cache": [f"grads/{unit}.pt" for unit in ("embed", "block_00", "block_01", "final")],
    "03_quantize": ["quant_w6a6.pt"],
    "04_sample": ["samples_w6a6.npz", "samples_w6a6.png"],
}
NEXT = {
    "01_collect_calib": "02_grad_cache.py --run",
    "02_grad_cache": "03_quantize.py --run",
    "03_quantize": "04_sample.py --run",
    "04_sample": "05_eval_fid.py --run",
}
OTHER = {  # another setting of each phase
    "01_collect_calib": ["--seed", "1"],
    "02_grad_cache": ["--eps", "renoise"],
    "03_quantize": ["--rounds", "1"],
    "04_sample": ["--num-images", "5"],
}
PHASES = pytest.mark.parametrize("name", FLAGS)
SITECUSTOMIZE = '''"""Kills its process with SIGKILL at one os.replace, which $KILL names."""
import os, signal
real, when, kept, done = os.replace, os.environ["KILL"], os.environ["KEPT"], [0]

def replace(source, target):
    done[0] += 1
    if when in (str(done[0]), os.path.basename(target)):
        os.truncate(source, os.path.getsize(source) // 2)  # as if in the middle of the write
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
    open(kept, "a").write(os.path.basename(target) + "\\n")
    if when == "after " + os.path.basename(target):
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace
'''


def snapshot(folder):
    """Every path under a folder, hidden ones too, with its bytes."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def leftovers(folder):
    """What no finished phase may leave behind: temporary files and folders of parts."""
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]


def targets(run, name):
    return {target: (run / target).read_bytes() for target in TARGETS[name]}


def without(tiny_run, folder, name):
    """A copy of the tiny run in which this phase has not been run yet."""
    run = folder / "run"
    shutil.copytree(tiny_run, run)
    for target in TARGETS[name]:
        (run / target).unlink()
    return run


def refused(result, *words):
    """The contract for bad input: status 2 and one line on stderr that says what is wrong."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def arrays(run, model="w6a6"):
    with np.load(run / f"samples_{model}.npz") as file:
        return file["arr_0"].astype(int), file["labels"]


# ------------------------------------------------------------------------------------------------
# To the end, and again


def test_phases_run_to_the_end_and_name_the_next_command(tiny_ckpt, tmp_path):
    """From a checkpoint to samples: status 0, the next command last, nothing temporary left."""
    run = tmp_path / "new" / "run"
    for name in FLAGS:
        result = run_script(name, *tiny_flags(name, run, tiny_ckpt))
        assert result.returncode == 0, result.stderr
        assert f"Next: python {NEXT[name]} {run}" in result.stdout.splitlines()[-1]
        assert all(targets(run, name).values())
    assert not leftovers(run)


def test_same_seed_gives_the_same_bytes(tiny_run, tiny_ckpt, tmp_path):
    """Phase 1 run twice, in two folders, writes the same file."""
    run_script("01_collect_calib", *tiny_flags("01_collect_calib", tmp_path, tiny_ckpt))
    assert targets(tmp_path, "01_collect_calib") == targets(tiny_run, "01_collect_calib")


def test_tiny_samples_are_lively(tiny_run):
    """Guards the other tests: images are not saturated, differ, and quantizing changes them."""
    for images, labels in (arrays(tiny_run), arrays(tiny_run, "fp")):
        assert np.isin(images, (0, 255)).mean() < 0.5 and images.std() > 20
        assert len(np.unique(images, axis=0)) == 6 and labels.tolist() == [0, 1, 2, 3, 4, 0]
    assert np.abs(arrays(tiny_run)[0] - arrays(tiny_run, "fp")[0]).max() > 1


@PHASES
def test_help_tells_the_papers_flags_from_the_machines(name, monkeypatch, capsys):
    """--help of every script has both groups of flags."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        load_script(name).parse_args()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.search(r"^paper\b", text, re.M) and re.search(r"^machine\b", text, re.M)


@PHASES
def test_same_command_again_is_up_to_date(name, tiny_run, tiny_ckpt):
    """Run again, a phase says so, succeeds and touches nothing."""
    before = snapshot(tiny_run)
    times = {p: p.stat().st_mtime_ns for p in before}
    result = run_script(name, *tiny_flags(name, tiny_run, tiny_ckpt))
    assert result.returncode == 0 and "is up to date" in result.stdout.splitlines()[-1]
    assert snapshot(tiny_run) == before and {p: p.stat().st_mtime_ns for p in before} == times


@PHASES
def test_other_settings_need_force(name, tiny_run, tiny_ckpt, tmp_path):
    """Another setting is refused and changes nothing; with --force it replaces the file."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before, flags = snapshot(run), tiny_flags(name, run, tiny_ckpt) + OTHER[name]
    refused(run_script(name, *flags), "--force", OTHER[name][0].strip("-").replace("-", "_"))
    assert snapshot(run) == before
    assert run_script(name, *flags, "--force").returncode == 0
    assert targets(run, name).items().isdisjoint(targets(tiny_run, name).items())
    assert not leftovers(run)


# ------------------------------------------------------------------------------------------------
# Killed


@PHASES
def test_killed_run_continues_and_ends_with_the_same_bytes(name, tiny_run, tiny_ckpt, tmp_path):
    """kill -9 in the first write, amid the parts, in the last write and right after it."""
    run, kept = without(tiny_run, tmp_path, name), tmp_path / "kept"
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    last = TARGETS[name][0].split("/")[-1]
    for when in ("1", "3", last, f"after {last}", "never"):
        env = {"PYTHONPATH": str(tmp_path), "KILL": when, "KEPT": str(kept)}
        result = run_script(name, *tiny_flags(name, run, tiny_ckpt), env=env)
        assert result.returncode == (0 if when == "never" else -signal.SIGKILL), result.stderr
        assert (run / TARGETS[name][0]).exists() == (when in (f"after {last}", "never"))
    assert targets(run, name) == targets(tiny_run, name)
    assert not leftovers(run)
    written = kept.read_text().split()
    assert len(written) - len(set(written)) <= 2, f"finished work was done again: {written}"


# ------------------------------------------------------------------------------------------------
# Image i is image i


def test_noise_of_an_image_depends_on_its_seed_and_index_only():
    """Exactly: the noise of images 3..5 is the same alone and among others, step after step."""
    alone, among = image_generators(7, range(3, 6)), image_generators(7, range(64))
    for _ in range(3):
        noise = draw_noise(among, (3, 8, 8), "cpu")
        assert torch.equal(draw_noise(alone, (3, 8, 8), "cpu"), noise[3:6])
        assert len(noise.flatten(1).unique(dim=0)) == 64
    for other in (image_generators(8, [3]), image_generators(7, [3], stream=1)):
        fresh = draw_noise(image_generators(7, [3]), (3, 8, 8), "cpu")
        assert not torch.equal(draw_noise(other, (3, 8, 8), "cpu"), fresh)


@pytest.mark.parametrize("model", ["fp", "w6a6"])
def test_image_is_the_same_in_any_batch_and_range(model, tiny_run, tmp_path, monkeypatch):
    """Eight images at --batch-size 1, 7 and 64, and images 3..5 alone, agree within 1/255."""
    run, script = tmp_path / "run", load_script("04_sample")
    shutil.copytree(tiny_run, run)

    def sample(*flags):
        bits = ["--fp"] if model == "fp" else ["--wbits", "6", "--abits", "6"]
        command = ["04", "--run", str(run), "--device", "cpu", "--force", *bits, *flags]
        monkeypatch.setattr(sys, "argv", command)
        script.main(script.parse_args())
        return arrays(run, model)

    images, labels = sample("--num-images", "8", "--batch-size", "64")
    for size in ("1", "7"):
        assert np.abs(sample("--num-images", "8", "--batch-size", size)[0] - images).max() <= 1
    part, part_labels = sample("--first", "3", "--num-images", "3")
    assert np.abs(part - images[3:6]).max() <= 1 and (part_labels == labels[3:6]).all()


@pytest.mark.parametrize("name", ["03_quantize", "04_sample"])
def test_two_processes_write_the_same_bytes_as_one(name, tiny_run, tmp_path):
    """torchrun over two processes spreads the work and changes nothing."""
    run = without(tiny_run, tmp_path, name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run_script(name, *tiny_flags(name, run, None), launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert targets(run, name) == targets(tiny_run, name)
    assert not leftovers(run)


def test_quant_file_alone_is_enough_to_sample(tiny_run, tmp_path):
    """quant_w6a6.pt in an empty folder gives the same images."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    result = run_script("04_sample", *tiny_flags("04_sample", tmp_path, None))
    assert result.returncode == 0, result.stderr
    assert targets(tmp_path, "04_sample") == targets(tiny_run, "04_sample")


@pytest.mark.parametrize("steps", ["2", "11"])
def test_sampling_steps_may_differ_from_the_calibrated_ones(steps, tiny_run, tmp_path):
    """Deviation D4: fewer steps than time groups, or more steps than calibrated, sample as well."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = [*tiny_flags("04_sample", tmp_path, None), "--steps", steps]
    assert run_script("04_sample", *flags).returncode == 0
    assert not np.array_equal(arrays(tmp_path)[0], arrays(tiny_run)[0])


# ------------------------------------------------------------------------------------------------
# Refusals: (script, flags after --run, what happens to the run before, words of the line)


class Payload:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, (os.environ["PAYLOAD"],)


def cut(file):
    return lambda run: os.truncate(run / file, (run / file).stat().st_size // 2)


def copy(source, target):
    return lambda run: shutil.copy(run / source, run / target)


def poison(file):
    return lambda run: torch.save({"kind": "calib", "format": 1, "x": Payload()}, run / file)


def edit(change):
    """A change to the loaded calib.pt."""

    def prepare(run):
        calib = torch.load(run / "calib.pt", weights_only=True)
        change(calib, run)
        torch.save(calib, run / "calib.pt")

    return prepare


def other_checkpoint(calib, run):
    state = torch.load(run / "dit.pt", weights_only=True)
    torch.save(state | {"pos_embed": state["pos_embed"] + 1}, run / "dit.pt")
    calib["settings"]["ckpt"] = str(run / "dit.pt")


@edit
def no_checkpoint(calib, run):
    calib["settings"]["ckpt"] = str(run / "gone.pt")


C, W8, NEW = "--ckpt dit.pt --vae none --steps 6", "--wbits 8 --abits 8", "--num-heads 4 --run new"
REFUSALS = {
    "ckpt missing": ("01", f"--ckpt gone.pt {NEW}", None, "gone.pt"),
    "ckpt truncated": ("01", f"{C} {NEW}", cut("dit.pt"), "dit.pt is damaged"),
    "ckpt hostile": ("01", f"{C} {NEW}", poison("dit.pt"), "holds pickled objects, refused"),
    "ckpt no DiT": ("01", f"--ckpt calib.pt {NEW}", None, "not a DiT checkpoint"),
    "heads unknown": ("01", f"{C} --run new", None, "--num-heads"),
    "heads do not divide": ("01", f"{C} --run new --num-heads 5", None, "--num-heads 5"),
    "heads negative": ("01", f"{C} --run new --num-heads -4", None, "--num-heads"),
    "groups over steps": ("01", f"{C} {NEW} --steps 3 --groups 5", None, "--groups 5"),
    "flag unknown": ("01", f"{C} {NEW} --group 5x --nonsense", None, "--help"),
    "number not one": ("01", f"{C} {NEW} --groups three", None, "three"),
    "run is a file": ("01", f"{C} --num-heads 4 --groups 2 --run calib.pt", None, "calib.pt"),
    "cuda absent": ("01", f"{C} {NEW} --device cuda", None, "--device cpu"),
    "device unknown": ("02", "--device abacus", None, "abacus"),
    "calib truncated": ("02", "", cut("calib.pt"), "calib.pt is damaged"),
    "calib hostile": ("02", "", poison("calib.pt"), "holds pickled objects, refused"),
    "calib of a phase": ("02", "", copy("grads/final.pt", "calib.pt"), "is grads, not calib"),
    "calib NaN": ("02", "", edit(lambda c, _: c["calibration"]["x"][3].fill_(np.nan)), "NaN"),
    "calib label": ("02", "", edit(lambda c, _: c["calibration"]["y"][3].fill_(77)), "label 77"),
    "calib hollow": ("02", "", edit(lambda c, _: c.pop("settings")), "calib.pt"),
    "ckpt changed": ("02", "", edit(other_checkpoint), "01_collect_calib.py --force"),
    "grads of another": ("03", W8, edit(lambda c, _: c.update(git="another")), "02_grad_cache.py"),
    "grads missing": ("03", W8, lambda run: shutil.rmtree(run / "grads"), "02_grad_cache.py"),
    "wbits 1": ("03", "--wbits 1 --abits 8", None, "--wbits 1"),
    "abits 9": ("03", "--wbits 8 --abits 9", None, "--abits 9"),
    "quant of a phase": ("04", W8, copy("calib.pt", "quant_w8a8.pt"), "is calib, not quant"),
    "quant truncated": ("04", FLAGS["04_sample"], cut("quant_w6a6.pt"), "quant_w6a6.pt is damaged"),
    "quant missing": ("04", W8, None, "03_quantize.py"),
    "ckpt gone": ("04", "--fp", no_checkpoint, "gone.pt"),
    "classes": ("04", "--fp --classes 1 99", None, "label 99 is outside 0..4"),
    "steps 0": ("04", f"{FLAGS['04_sample']} --steps 0 --force", None, "T = 0"),
    "samples truncated": ("04", FLAGS["04_sample"], cut("samples_w6a6.npz"), "npz is damaged"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line(case, tiny_run, tiny_ckpt, tmp_path):
    """Status 2, one line that names the fault, no code of a file run, nothing written."""
    number, flags, prepare, words = REFUSALS[case]
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    shutil.copy(tiny_ckpt, run / "dit.pt")
    if prepare:
        prepare(run)
    before = snapshot(tmp_path)
    (name,) = (name for name in FLAGS if name.startswith(number))
    env = {"PAYLOAD": str(tmp_path / "executed")}
    refused(run_script(name, "--run", ".", *flags.split(), cwd=run, env=env), words)
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where root may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "name, free", [("01_collect_calib", 100_000), ("03_quantize", 8192), ("04_sample", 8192)]
)
def test_full_disk_is_one_line_and_the_run_continues_later(
    name, free, tiny_run, tiny_ckpt, small_disk
):
    """No half file is left; the same command with space again ends with the same bytes."""
    run, filler = without(tiny_run, small_disk, name), small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - free)
    flags = tiny_flags(name, run, tiny_ckpt)
    refused(run_script(name, *flags), "free some disk space")
    assert not (run / TARGETS[name][0]).exists() and not list(run.rglob("*.tmp"))
    filler.unlink()
    assert run_script(name, *flags).returncode == 0
    assert targets(run, name) == targets(tiny_run, name)


def test_every_torch_load_runs_no_code():
    """torch.load is never called without weights_only=True on the same line, nor pickle at all."""
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            for line in path.read_text().splitlines():
                assert "torch" + ".load(" not in line or "weights_only=True" in line, path
                assert not re.search(r"^\s*(import|from) pickle|allow_pickle=True", line), path
