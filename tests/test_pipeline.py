"""The scripts as a user meets them: run to the end, again, interrupted, killed, and spread.

Each test is one claim. Bytes are compared with those of `tiny_run`, which nothing disturbed.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    FLAGS,
    ROOT,
    leftovers,
    load_script,
    refused,
    run_script,
    same_images,
    snapshot,
    tiny_flags,
)  # fmt: skip

from common import parts, source
from common.mnist_classifier import FeatureNet
from common.parts import Parts
from common.quant_file import load_quant
from models_dit import Diffusion, DiT

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


def targets(run, name):
    return {target: (run / target).read_bytes() for target in TARGETS[name]}


def without(tiny_run, folder, name):
    """A copy of the tiny run in which this phase has not been run yet."""
    run = shutil.copytree(tiny_run, folder / "run")
    for target in TARGETS[name]:
        (run / target).unlink()
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
def test_same_command_again_is_up_to_date(name, tiny_run, tiny_ckpt, run_here):
    """Run again, a phase says so, succeeds and touches nothing."""
    before = snapshot(tiny_run)
    result = run_here(name, *tiny_flags(name, tiny_run, tiny_ckpt))
    assert result.returncode == 0 and "is up to date" in result.stdout.splitlines()[-1]
    assert snapshot(tiny_run) == before


def test_gradients_of_a_missing_unit_are_made_again(tiny_run, tiny_ckpt, tmp_path, run_here):
    """02 on a run whose last file is there and another is not: the same files, and says why."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "grads" / "block_01.pt").unlink()
    result = run_here("02_grad_cache", *tiny_flags("02_grad_cache", run, tiny_ckpt))
    assert result.returncode == 0 and "block_01.pt is missing" in result.stdout
    assert "wrote 4 files" in result.stdout
    assert targets(run, "02_grad_cache") == targets(tiny_run, "02_grad_cache")


def test_pieces_made_before_an_edit_are_not_taken(tmp_path, monkeypatch):
    """A run that was killed, and goes on with other source, makes all of its result anew."""
    head = dict(settings={}, inputs={})
    Parts(tmp_path / "a.pt", head).save("x", 1)
    assert Parts(tmp_path / "a.pt", head).has("x")
    monkeypatch.setattr(parts, "source_digest", lambda: "after an edit")
    assert not Parts(tmp_path / "a.pt", head).has("x")


def test_every_source_of_a_result_is_in_the_digest(monkeypatch, tmp_path):
    """C as Python, of every folder; tests are none."""
    monkeypatch.setattr(source, "ROOT", tmp_path)
    seen = set()
    for name in ("a.py", "engine/a.py", "engine/a.c", "common/a.py", "methods/a.py", "test_a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
        source.source_digest.cache_clear()
        seen.add(source.source_digest())
    source.source_digest.cache_clear()
    assert len(seen) == 5


@pytest.mark.parametrize("zeros", [("adaLN", "final_layer"), ("",)])
def test_a_network_whose_eps_is_zero_runs_to_the_end(zeros, tmp_path, run_here):
    """An untrained DiT, with adaLN-Zero and a final layer of zeros, or nothing but zeros: no error,
    an infinite SNR."""
    torch.manual_seed(0)
    how = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4)
    model = DiT(**how, num_classes=5)
    for name, parameter in model.named_parameters():
        if any(word in name for word in zeros):
            parameter.data.zero_()
    torch.save(model.state_dict(), tmp_path / "zero.pt")
    for name in FLAGS:
        result = run_here(name, *tiny_flags(name, tmp_path / "run", tmp_path / "zero.pt"))
        assert result.returncode == 0, f"{name}: {result.stderr}"
    report = load_quant(tmp_path / "run" / "quant_w6a6.pt")["report"]
    assert set(report["snr_per_group"]) == {report["snr_weighted"]} == {float("inf")}


@PHASES
def test_other_settings_need_force(name, tiny_run, tiny_ckpt, tmp_path, run_here):
    """Another setting is refused and changes nothing; with --force it replaces the file."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    before, flags = snapshot(run), tiny_flags(name, run, tiny_ckpt) + OTHER[name].split()
    refused(run_here(name, *flags), "--force replaces it")
    assert snapshot(run) == before
    assert run_here(name, *flags, "--force").returncode == 0
    assert not leftovers(run) and not targets(run, name).items() & targets(tiny_run, name).items()


@pytest.mark.parametrize("bits", ["--fp", "--wbits 6 --abits 6"])
def test_image_is_the_same_in_any_batch_and_range(bits, tiny_run, tmp_path, run_here):
    """Eight images at --batch-size 1, 7 and 64, and images 3..5 alone, agree within 1/255; if
    quantized, but for a few where rounding puts an input on the other side of a code's border."""
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def sample(flags):
        command = f"--run {run} --force {bits} {flags}"
        assert run_here("04_sample", *command.split()).returncode == 0
        return arrays(run, "fp" if bits == "--fp" else "w6a6")

    same = partial(same_images, few_differ=bits != "--fp")
    images, labels = sample("--num-images 8 --batch-size 64")
    for size in (1, 7):
        assert same(sample(f"--num-images 8 --batch-size {size}")[0], images)
    part, part_labels = sample("--first 3 --num-images 3")
    assert same(part, images[3:6]) and (part_labels == labels[3:6]).all()
    assert not same(part, images[:3]) and not same(part, images[[3, 5, 4]])


@pytest.mark.parametrize("T", ["6", "2", "11"])
def test_quant_file_alone_samples_with_any_timesteps(T, tiny_run, tmp_path, run_here):
    """quant_w6a6.pt in an empty folder gives the same images; other --steps, others (D4)."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = [*tiny_flags("04_sample", tmp_path, None), "--steps", T]
    assert run_here("04_sample", *flags).returncode == 0
    assert np.array_equal(arrays(tmp_path)[0], arrays(tiny_run)[0]) == (T == "6")


@pytest.mark.parametrize("T", [6, 2, 11])
def test_time_groups_follow_the_number_of_steps(T, tiny_run):
    """Eq. (9) at another T: every step's group is that of its own sampling index (D4)."""
    how = tiny_run / "quant_w6a6.pt", T, "float", torch.device("cpu")
    model, *_ = load_script("04_sample").quantized(*how)
    told = Diffusion(T).timestep_map
    assert model.group_table[told].tolist() == [t * 3 // T for t in range(T)]


def test_seed_draws_other_noise_for_every_image(tiny_run, tmp_path, run_here):
    """04 --seed 1: no image is the one of --seed 0."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = [*tiny_flags("04_sample", tmp_path, None), "--seed", 1]
    assert run_here("04_sample", *flags).returncode == 0
    assert np.abs(arrays(tmp_path)[0] - arrays(tiny_run)[0]).mean((1, 2, 3)).min() > 1


def test_classes_are_taken_in_turn(tiny_run, tmp_path, run_here):
    """04 --classes 3 1: image 0 is of class 3, so another; image 1 is of class 1 as before."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = f"--run {tmp_path} --wbits 6 --abits 6 --num-images 3 --classes 3 1"
    assert run_here("04_sample", *flags.split()).returncode == 0
    (images, labels), (before, _) = arrays(tmp_path), arrays(tiny_run)
    assert labels.tolist() == [3, 1, 3]
    assert same_images(images[1:2], before[1:2], few_differ=True)
    assert np.abs(images[0] - before[0]).mean() > 1


def test_bf16_is_near_fp32_and_not_equal(tiny_run, tmp_path, run_here):
    """04 --dtype bf16 reaches the network."""
    (tmp_path / "calib.pt").symlink_to(tiny_run / "calib.pt")
    flags = "--run", tmp_path, "--fp", "--num-images", 6, "--dtype", "bf16"
    assert run_here("04_sample", *flags).returncode == 0
    apart = np.abs(arrays(tmp_path, "fp")[0] - arrays(tiny_run, "fp")[0])
    assert 0 < apart.mean() < 20


# ------------------------------------------------------------------------------------------------
# Interrupted, killed, without space


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(target, call): Ctrl-C as a file of that name is to be renamed for the call-th time;
    "*" is any name. Tells the names of the files written."""
    real, written = os.replace, []

    def interrupt(target, call=1):
        def replace(source, to):
            nonlocal call
            name = os.path.basename(to)
            call -= target in ("*", name)
            if call == 0:
                raise KeyboardInterrupt
            real(source, to)
            written.append(name)

        monkeypatch.setattr(os, "replace", replace)
        return written

    return interrupt


@PHASES
def test_interrupted_run_continues_and_ends_with_the_same_bytes(
    name, tiny_run, tiny_ckpt, tmp_path, interrupt, run_here
):
    """Ctrl-C in the second write and in the last: one line, status 130; no work is done twice."""
    run, last = without(tiny_run, tmp_path, name), os.path.basename(TARGETS[name][0])
    flags = tiny_flags(name, run, tiny_ckpt)
    for when in (("*", 2), (last, 1)):
        written = interrupt(*when)
        refused(run_here(name, *flags), "the same command again continues", status=130)
        assert not (run / TARGETS[name][0]).exists()
    interrupt("no file")
    assert run_here(name, *flags).returncode == 0
    assert targets(run, name) == targets(tiny_run, name) and not leftovers(run)
    assert len(written) <= len(set(written)) + 1, f"finished work was done again: {written}"


def test_forced_02_that_is_interrupted_leaves_no_mixture_for_03(
    tiny_run, tmp_path, interrupt, run_here
):
    """Half of its units are replaced: 03 is told that 02 is not finished."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "quant_w6a6.pt").unlink()
    interrupt("block_00.pt")
    flags = [*tiny_flags("02_grad_cache", run, None), "--eps", "renoise", "--force"]
    assert run_here("02_grad_cache", *flags).returncode == 130
    interrupt("no file")
    refused(run_here("03_quantize", *tiny_flags("03_quantize", run, None)), "02_grad_cache.py")


def test_another_batch_size_takes_no_parts_of_the_first(tiny_run, tmp_path, interrupt, run_here):
    """Stopped after two images, continued three at a time: six images, those of one go."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "samples_fp.npz").unlink()
    flags = "--run", run, "--fp", "--num-images", 6, "--batch-size"
    interrupt("*", 2)
    assert run_here("04_sample", *flags, 2).returncode == 130
    interrupt("no file")
    assert run_here("04_sample", *flags, 3).returncode == 0
    assert same_images(arrays(run, "fp")[0], arrays(tiny_run, "fp")[0])


@PHASES
def test_a_phase_that_is_up_to_date_clears_what_a_killed_one_left(
    name, tiny_run, tiny_ckpt, tmp_path, run_here
):
    """Killed after its last write, it left the folder of its parts."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    whole = "grads" if name.startswith("02") else TARGETS[name][0]
    (run / f".{whole}.0123456789ab").mkdir()
    result = run_here(name, *tiny_flags(name, run, tiny_ckpt))
    assert "is up to date" in result.stdout and not leftovers(run)


@pytest.mark.parametrize("stopped, last", [("A", "B"), ("AB", "A")])
def test_interrupted_runs_of_two_settings_never_mix(
    stopped, last, tiny_run, tmp_path, interrupt, run_here
):
    """02 stopped at its last file, with one setting or with two in turn, ends as if alone."""
    name, settings = "02_grad_cache", {"A": [], "B": OTHER["02_grad_cache"].split()}
    alone, run = (without(tiny_run, tmp_path / x, name) for x in ("alone", "stopped"))
    assert run_here(name, *tiny_flags(name, alone, None), *settings[last]).returncode == 0
    for which in stopped:
        interrupt("embed.pt")
        assert run_here(name, *tiny_flags(name, run, None), *settings[which]).returncode == 130
    interrupt("no file")
    assert run_here(name, *tiny_flags(name, run, None), *settings[last]).returncode == 0
    assert targets(run, name) == targets(alone, name)


def kill_at(when, folder):
    """The environment of a run that gets SIGKILL `when`; folder/written lists what it wrote."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return {"PYTHONPATH": str(folder), "KILL": when, "WRITTEN": str(folder / "written")}


@pytest.mark.slow
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where root may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
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


# ------------------------------------------------------------------------------------------------
# Spread over processes


@pytest.fixture(scope="module")
def scored_run(tiny_run, tmp_path_factory):
    """The tiny run with the metrics that one process wrote."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("scored") / "run")
    torch.manual_seed(0)
    torch.save(FeatureNet(3, 2, 10).state_dict(), run / "features.pt")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["03_quantize", "04_sample", "05_eval_fid"])
def test_three_processes_write_the_same_bytes_as_one(name, scored_run, tmp_path):
    """torchrun spreads the work and changes nothing; one process alone speaks."""
    run = without(scored_run, tmp_path, name)
    result = spread(name, run, 3)
    assert result.returncode == 0 and not leftovers(run), result.stderr
    assert targets(run, name) == targets(scored_run, name)
    bars = re.findall(r"(\S+):   0%", result.stderr)
    assert result.stdout.count("Next:") == 1 and len(bars) == len(set(bars)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["04_sample", "05_eval_fid"])
def test_dead_process_stops_the_others_and_fewer_continue(name, scored_run, tmp_path):
    """kill -9 of one of three: each other says so in one line; two processes end with the bytes."""
    run = without(scored_run, tmp_path, name)
    result = spread(name, run, 3, **rank_1_dies(tmp_path, 100))
    ours = [line for line in result.stderr.splitlines() if line.startswith(name)]
    assert result.returncode == 1 and len(ours) == 2, result.stderr
    assert all("the same command again continues" in line for line in ours)
    assert "Traceback" not in result.stderr.partition("torch/distributed/elastic")[0]
    assert not (run / TARGETS[name][0]).exists()
    result = spread(name, run, 2)
    assert result.returncode == 0, result.stderr
    assert targets(run, name) == targets(scored_run, name) and not leftovers(run)


@pytest.mark.slow
def test_dead_process_on_another_node_is_one_line(tiny_run, tmp_path):
    """Nothing but a broken connection tells of it: status 2, one line, what is done stays."""
    run = without(tiny_run, tmp_path, "04_sample")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | rank_1_dies(tmp_path, 0)
    env |= dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, ROOT / "04_sample.py", *tiny_flags("04_sample", run, None)]
    start = partial(subprocess.Popen, command, stderr=subprocess.PIPE, text=True)
    processes = [start(env=env | dict(RANK=rank)) for rank in "01"]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL]
    refused(subprocess.CompletedProcess(command, 2, "", errors[0]), "another process died")
    assert len([*run.glob(".samples_w6a6.npz.*/*.pt")]) == 2
