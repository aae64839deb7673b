"""Flags and files that a script refuses: one line, exit status 2, nothing written."""

import os
import re
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import FLAGS, ROOT, load_script, refused, run_script, snapshot

from common import cli
from common.artifacts import load_tensors


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
NEW, BITS = "--num-heads 4 --run new", "--wbits 6 --abits 6"
REFUSALS = {  # script, flags, what happens to the run before, words of the line
    "ckpt missing": ("01", f"--ckpt gone.pt {NEW}", None, "gone.pt"),
    "ckpt truncated": ("01", f"{C} {NEW}", cut("dit.pt"), "dit.pt is damaged"),
    "ckpt hostile": ("01", f"{C} {NEW}", poison("dit.pt"), "holds pickled objects, refused"),
    "ckpt no DiT": ("01", f"--ckpt calib.pt {NEW}", None, "not a DiT checkpoint"),
    "heads unknown": ("01", f"{C} --run new", None, "--num-heads"),
    "heads do not divide": ("01", f"{C} --run new --num-heads 5", None, "5 heads (--num-heads"),
    "heads negative": ("01", f"{C} --run new --num-heads -4", None, "--num-heads"),
    "groups over T": ("01", f"{C} {NEW} --steps 3 --groups 5", None, "--groups 5"),
    "T over 1000": ("01", f"{C} {NEW} --steps 1001", None, "T must be 1..1000"),
    "flag unknown": ("01", f"{C} {NEW} --nonsense 1", None, "--help"),
    "number not one": ("01", f"{C} {NEW} --groups three", None, "three"),
    "number too long": ("01", f"{C} {NEW} --seed {2**63}", None, "beyond 64 bits"),
    "run is a file": ("01", f"{C} --num-heads 4 --run calib.pt", None, "calib.pt"),
    "model is another": ("01", f"{C} {NEW} --model DiT-S/2", None, "--model DiT-S/2 has"),
    "memory limit zero": ("03", f"{BITS} --memory-limit 0", None, "--memory-limit 0"),
    "memory limit inf": ("03", f"{BITS} --memory-limit inf", None, "not finite"),
    "cuda absent": ("01", f"{C} {NEW} --device cuda", None, "--device cpu"),
    "device unknown": ("02", "--device abacus", None, "abacus"),
    "calib truncated": ("02", "", cut("calib.pt"), "calib.pt is damaged"),
    "calib hostile": ("02", "", poison("calib.pt"), "holds pickled objects, refused"),
    "calib Namespace": ("02", "", edit(lambda c: c.update(git=Namespace())), "refused"),
    "calib of a phase": ("02", "", copy("grads/final.pt", "calib.pt"), "is grads, not calib"),
    "ckpt new": ("02", "--force", edit(lambda c: c["settings"].update(ckpt="calib.pt")), "is now"),
    "grads of another calib": ("03", W8, edit(lambda c: c.update(git="x")), "another calib.pt"),
    "bits 1": ("03", "--wbits 1 --abits 8", None, "--wbits 1"),
    "bits 9": ("03", "--wbits 8 --abits 9", None, "--abits 9"),
    "bits missing": ("03", "--abits 8", None, "required: --wbits"),
    "rounds 0": ("03", f"{W8} --rounds 0", None, "--rounds 0"),
    "tag a path": ("03", f"{W8} --tag ../x", None, "--tag"),
    "half of the bits": ("04", "--abits 8", None, "--wbits is required"),
    "no model": ("04", "", None, "either --fp or both --wbits and --abits"),
    "two models": ("04", f"--fp {W8}", None, "either --fp or both"),
    "fp with a tag": ("04", "--fp --tag x", None, "--tag x is for quantized models"),
    "size is another": ("01", f"{C} {NEW} --image-size 512", None, "images have 8 pixels"),
    "plain, compiled": (
        "03",
        f"{BITS} --search plain --compile",
        None,
        "--compile is for --search",
    ),
    "quant of a phase": ("04", W8, copy("calib.pt", "quant_w8a8.pt"), "is calib, not quant"),
    "quant truncated": ("04", f"{BITS}", cut("quant_w6a6.pt"), "quant_w6a6.pt is damaged"),
    "quant missing": ("04", W8, None, "03_quantize.py"),
    "ckpt gone": ("04", "--fp", edit(lambda c: c["settings"].update(ckpt="gone.pt")), "gone.pt"),
    "classes": ("04", "--fp --classes 1 99", None, "label 99 is outside 0..4"),
    "steps 0": ("04", f"{BITS} --steps 0 --force", None, "steps"),
    "samples truncated": ("04", FLAGS["04_sample"], cut("samples_w6a6.npz"), "npz is damaged"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_in_one_line(
    case, tiny_run, tiny_ckpt, tmp_path, monkeypatch, run_here
):
    """Status 2, one line that names the fault, no code of a file run, nothing written."""
    number, flags, prepare, words = REFUSALS[case]
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(tiny_ckpt, run / "dit.pt")
    if prepare:
        prepare(run)
    before = snapshot(tmp_path)
    monkeypatch.chdir(run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name = next(x for x in FLAGS if x.startswith(number))
    refused(run_here(name, "--run", ".", *flags.split()), words)
    assert snapshot(tmp_path) == before


def test_refusal_of_a_process_is_one_line_too(tmp_path):
    """Nothing but that line comes out of a script started by hand, in the folder it is started."""
    result = run_script("02_grad_cache", "--run", ".", cwd=tmp_path)
    refused(result, "01_collect_calib.py")
    assert result.stdout == "" and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory", "std::bad_alloc"])
def test_host_memory_that_is_out_is_one_line(words, monkeypatch, capsys, tmp_path):
    """torch tells it by a plain RuntimeError, of a tensor as of a file, which is not damaged."""
    torch.save({}, tmp_path / "whole.pt")

    def out_of_memory(*args, **kwargs):
        raise RuntimeError(f"[enforce fail] {words}: you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "load", out_of_memory)
    for main in (out_of_memory, lambda _: load_tensors(tmp_path / "whole.pt", "a file")):
        with pytest.raises(SystemExit) as status:
            cli.run_script(main, dict)
        line = capsys.readouterr().err
        assert status.value.code == 2 and "out of memory" in line and line.count("\n") == 1


@pytest.mark.slow
def test_compiler_that_is_missing_is_told_in_one_line(tiny_run, tmp_path):
    """04 --compile on a machine without a C++ compiler."""
    (tmp_path / "quant_w6a6.pt").symlink_to(tiny_run / "quant_w6a6.pt")
    nowhere = dict(CXX=str(tmp_path / "c++"), PATH="", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    flags = "--run", tmp_path, *"--wbits 6 --abits 6 --num-images 1 --steps 1 --compile".split()
    result = run_script("04_sample", *flags, env=nowhere)
    refused(result, "C++ compiler")
    assert not (tmp_path / "samples_w6a6.npz").exists()


def test_traceback_shows_where_it_failed(tmp_path, run_here):
    """--traceback: the same status and last line, and above it where the fault was found."""
    result = run_here("02_grad_cache", "--run", tmp_path, "--traceback")
    *above, last = result.stderr.strip().splitlines()
    assert result.returncode == 2 and above[0].startswith("Traceback") and "calib.pt" in last


@pytest.mark.parametrize("name", [*FLAGS, "methods/tqdit_plus"])
def test_help_tells_the_papers_flags_from_the_machines(name, run_here):
    """--help of every script has its docstring, and the groups of its flags in this order."""
    result = run_here(name, "--help")
    assert result.returncode == 0 and load_script(name).__doc__[:40] in result.stdout
    groups = re.findall(r"^(paper|ours|machine) \(", result.stdout, re.M)
    assert groups == ["paper", "ours", "machine"][name == "02_grad_cache" :]


def test_tf32_is_off_once_a_script_runs():
    """The same seed gives the same result: run_script turns TF32 off, whatever it was."""
    flags, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []
    for flag in flags:
        flag.allow_tf32 = True
    cli.run_script(lambda args: seen.extend(flag.allow_tf32 for flag in flags), lambda: None)
    assert seen == [False, False]


def test_every_torch_load_runs_no_code():
    """torch.load is never called without weights_only=True on the same line, nor pickle at all."""
    unsafe = (
        r"torch\.load\((?!.*weights_only=True)|^\s*(import|from) pickle|allow_pickle\s*=\s*True"
    )
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert not re.search(unsafe, path.read_text(), re.M), path
