"""Two runs at once: pieces of one that is at work are its own, and so is what it makes."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import FLAGS, ROOT, leftovers, load_script, refused, tiny_flags

from common import locks
from common.artifacts import load_hashed, sha256_of
from common.errors import InputError
from common.parts import Parts

HOLDS = """
import sys, time
from common.parts import Parts
parts = Parts(sys.argv[1], dict(settings={}, inputs={}))
parts.claim()
parts.save("x", 1)
print("holds", flush=True)
time.sleep(100)
"""
WHOLE = dict(zip(FLAGS, ["calib.pt", "grads", "quant_w6a6.pt", "samples_w6a6.npz"], strict=True))


def parts(path, **settings):
    return Parts(path, dict(settings=settings, inputs={}))


@pytest.mark.parametrize("settings", [{}, dict(rounds=1)])
def test_a_run_at_work_keeps_others_from_the_same_file(settings, tmp_path):
    """With its settings or others, until it is done; another file is free; nothing is left."""
    here, other = parts(tmp_path / "a.pt"), parts(tmp_path / "a.pt", **settings)
    here.claim()
    here.claim()  # of every stage of a run
    here.save("x", 1)
    with pytest.raises(InputError, match="another run is making .*a.pt"):
        other.claim()
    parts(tmp_path / "b.pt").claim()
    other.clear()
    assert here.load("x") == 1
    here.clear()
    other.claim()
    other.clear()
    assert not leftovers(tmp_path)


def test_a_run_that_ends_before_its_first_piece_leaves_no_folder(tmp_path):
    parts(tmp_path / "a.pt").claim()  # and is gone
    assert not leftovers(tmp_path)


def test_a_killed_run_holds_nothing(tmp_path):
    """Its pieces are there, for one with the same settings to go on."""
    command = [sys.executable, "-c", HOLDS, tmp_path / "a.pt"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    with pytest.raises(InputError, match="another run"):
        parts(tmp_path / "a.pt").claim()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = parts(tmp_path / "a.pt")
    again.claim()
    assert again.load("x") == 1


def test_a_folder_that_is_removed_just_then_is_made_again(tmp_path, monkeypatch):
    """Before it is opened, and before it is locked, by a run that clears what it has made."""
    real, done = locks.take, []

    def take(folder):
        done.append(folder)
        if len(done) == 1:
            folder.rmdir()
        handle = real(folder)
        if len(done) == 2:
            folder.rmdir()
        return handle

    monkeypatch.setattr(locks, "take", take)
    here = parts(tmp_path / "a.pt")
    here.claim()
    assert len(done) == 3 and here.folder.is_dir()
    with pytest.raises(InputError, match="another run"):
        parts(tmp_path / "a.pt", rounds=1).claim()
    assert len(here.folders()) == 1


@pytest.mark.parametrize("script, at", [
    ("methods/tcaqdm", "aligned"), ("methods/qdit", "group_sizes"),
])  # fmt: skip
def test_what_comes_before_a_method_s_units_is_held_too(
    script, at, tiny_run, tmp_path, monkeypatch, run_here
):
    """Sampling between rounds, the search of group sizes: no other run may make the file."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    name, module = f"quant_w4a4_{script.partition('/')[2]}.pt", load_script(script)
    real, held = getattr(module, at), []

    def asked(*args):
        with pytest.raises(InputError, match="another run is making"):
            parts(run / name, rounds=1).claim()
        held.append(1)
        return real(*args)

    monkeypatch.setattr(module, at, asked)
    more = "--weight-iterations 1 --scale-iterations 1 --par-rounds 1" * (at == "aligned")
    flags = f"--run {run} --wbits 4 --abits 4 --rows 6 {more}".split()
    assert run_here(script, *flags).returncode == 0 and held and not leftovers(run)


def test_gradients_that_are_replaced_meanwhile_are_refused(tiny_run, tmp_path, run_here):
    """A unit's file of another eps than the embedder's."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "grads" / "final.pt"
    unit = torch.load(path, weights_only=True)
    torch.save(unit | dict(settings=dict(eps="renoise")), path)
    flags = [*tiny_flags("03_quantize", run, None), "--force"]
    refused(run_here("03_quantize", *flags), "grads were replaced meanwhile")


@pytest.mark.parametrize("name", FLAGS)
def test_a_phase_leaves_another_run_of_it_alone(name, tiny_run, tiny_ckpt, tmp_path, run_here):
    """Beside a run with other settings: up to date is told and removes nothing of it; a result that
    is not there is not made."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    at_work = parts(run / WHOLE[name], rounds=1)
    at_work.claim()
    at_work.save("x", 1)
    flags = tiny_flags(name, run, tiny_ckpt)
    assert "is up to date" in run_here(name, *flags).stdout
    refused(run_here(name, *flags, "--force"), f"another run is making {run / WHOLE[name]}")
    assert at_work.load("x") == 1


def test_digest_is_of_the_file_that_was_read(tmp_path):
    """Replaced while it is read; what cannot be read is told by the one who reads."""
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def load(path):
        found = path.read_bytes()
        path.write_bytes(b"new")
        return found

    old = sha256_of(path)
    assert load_hashed(path, load) == (b"old", old) != (b"old", sha256_of(path))
    with pytest.raises(IsADirectoryError):
        load_hashed(tmp_path, lambda path: path.read_bytes())


def test_samples_of_a_quant_file_that_is_replaced_meanwhile_name_the_old_one(
    tiny_run, tmp_path, monkeypatch
):
    """So the next 04 does not take them for the new one's."""
    path = shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    script = load_script("04_sample")

    def build(artifact, *_):
        torch.save(artifact | dict(torch="another"), path)
        model = torch.nn.Identity()
        model.folded = {}
        return model

    monkeypatch.setattr(script, "build", build)
    old = sha256_of(path)
    _, _, inputs, _ = script.quantized(path, None, "float", torch.device("cpu"))
    assert inputs["quant"] == old != sha256_of(path)


def test_gradients_that_were_deleted_are_made_again(
    tiny_run, tiny_ckpt, tmp_path, run_here, monkeypatch
):
    """02 stopped at a block, RUN/grads deleted, and run again: the same files as at once."""
    name, run = "02_grad_cache", shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "grads")
    script = load_script(name)
    real = script.unit_gradient

    def stop(function, x, c, grad):
        if (run / "grads" / "block_01.pt").exists():
            raise KeyboardInterrupt
        return real(function, x, c, grad)

    monkeypatch.setattr(script, "unit_gradient", stop)
    assert run_here(name, *tiny_flags(name, run, tiny_ckpt)).returncode == 130
    monkeypatch.undo()
    shutil.rmtree(run / "grads")
    assert run_here(name, *tiny_flags(name, run, tiny_ckpt)).returncode == 0
    for file in (tiny_run / "grads").iterdir():
        assert (run / "grads" / file.name).read_bytes() == file.read_bytes()
    assert not leftovers(run)
