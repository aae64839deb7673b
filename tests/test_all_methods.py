"""What holds of every script in methods/, on two DiTs that are not the demo's, in seconds each.

A new method is found by its `main`; if it iterates, SHORT has its flags for a few iterations.
"""

import functools
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    FAKE_CUDA,
    LIVELY,
    ROOT,
    leftovers,
    linked,
    load_script,
    needs_fake_cuda,
    refused,
    run_in_process,
    run_script,
    snapshot,
    trained_dit,
)

from common import cli
from common.artifacts import load_artifact, save_artifact
from common.vae import VAE_SCALE
from models_dit import LAYERS

METHODS = sorted(
    path.stem for path in (ROOT / "methods").glob("*.py") if "\ndef main(" in path.read_text()
)
EVERY = pytest.mark.parametrize("method", METHODS)
TWO_PHASES = "--weight-iterations 3 --weight-batch 4 --scale-iterations 3 --scale-batch 4"
SHORT = dict(
    ditas="--alternations 2",
    ptq4dit="--iterations 3 --batch 4",
    ptqd=f"{TWO_PHASES} --trajectories 3",
    qdiffusion=TWO_PHASES,
    tcaqdm=f"{TWO_PHASES} --par-rounds 1",
    tqdit_plus="--tune-epochs 2",
)
KINDS = dict(  # neither has the demo's width, heads, patch, channels; G does not divide T
    latents=dict(dit=dict(learn_sigma=False, mlp_ratio=2.0), steps=7, vae="mse", layers="own"),
    pixels=dict(
        dit=dict(hidden_size=40, num_heads=5, patch_size=4, in_channels=3),
        steps=5, vae="none", layers="released",
    ),
)  # fmt: skip
CALIBRATION = "--groups 2 --per-group 8 --trajectories 5 --batch-size 8"


def run_dit(folder, dit, steps, vae, layers):
    """Phases 1 and 2 of a tiny DiT, and its samples in full precision."""
    ckpt, config = folder / "dit.pt", LIVELY | dit
    torch.save(trained_dit(**config).state_dict(), ckpt)
    first = f"--ckpt {ckpt} --num-heads {config['num_heads']} --steps {steps} --vae {vae}"
    first += f" {CALIBRATION}"
    phases = {"01_collect_calib": first, "02_grad_cache": "", "04_sample": "--fp --num-images 4"}
    for name, flags in phases.items():
        log = run_in_process(name, "--run", folder, *flags.split())
        assert log.returncode == 0, log.stderr


class TinyDecoder(torch.nn.Module):
    """In place of the VAE's decoder: three of the latents' channels."""

    def forward(self, z):
        return z[:, :3] * VAE_SCALE


@pytest.fixture(scope="module", autouse=True)
def decoder():
    """04 with that decoder; it is downloaded otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_script("04_sample"), "load_vae", lambda *names: TinyDecoder())
        yield


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """run_of(kind): the folder of a run of this DiT, its Phase 3 still to come."""

    @functools.cache
    def run_of(kind):
        folder = tmp_path_factory.mktemp(kind)
        run_dit(folder, **KINDS[kind])
        return folder

    return run_of


def command(method, run, kind, bits="--wbits 8 --abits 8"):
    """This script's flags for a few iterations, on this kind's choice of layers if it has one."""
    fields = load_script(f"methods/{method}").Settings._fields
    layers = f"--layers {KINDS[kind]['layers']}" if "layers" in fields else ""
    flags = f"--run {run} {bits} --rows 12 {SHORT.get(method, '')} {layers}"
    return f"methods/{method}", *flags.split()


@pytest.fixture(scope="module")
def file_of(run_of, tmp_path_factory):
    """file_of(method, kind): the path of its quant file, and what it printed."""

    @functools.cache
    def file_of(method, kind):
        run = linked(run_of(kind), tmp_path_factory.mktemp(method) / kind)
        log = run_in_process(*command(method, run, kind))
        assert log.returncode == 0 and not leftovers(run), log.stderr
        (path,) = run.glob("quant_*")
        return path, log.stdout

    return file_of


def name_of(path):
    """What 04 calls the model of this file: its flags."""
    return f"--wbits 8 --abits 8 --tag {path.stem.removeprefix('quant_w8a8_')}"


# ------------------------------------------------------------------------------------------------
# Its file


@pytest.mark.parametrize("kind", KINDS)
@EVERY
def test_writes_a_file_with_a_report_that_04_samples_alone(method, kind, file_of, run_of, tmp_path):
    """W8A8 is near full precision, by the report and by the images; the next command is right."""
    path, log = file_of(method, kind)
    file = load_artifact(path, "quant", f"{method}.py")
    assert file["method"] == method and file["report"]["snr_weighted"] > 20
    assert all(x in log for x in ("signal to noise", "weighted by", "layers that cost most"))
    assert f"Next: python 04_sample.py --run {path.parent} {name_of(path)}\n" in log
    shutil.copy(path, tmp_path)
    flags = f"--run {tmp_path} {name_of(path)} --num-images 4 --batch-size 3"
    sampled = run_in_process("04_sample", *flags.split())
    assert sampled.returncode == 0, sampled.stderr
    with np.load(tmp_path / f"samples_{path.stem[6:]}.npz") as ours:
        images = ours["arr_0"].astype(float)
    with np.load(run_of(kind) / "samples_fp.npz") as twins:
        expected = twins["arr_0"].astype(float)
    assert 0 < np.abs(images - expected).mean() < 0.5 * np.abs(images - expected[::-1]).mean()


@EVERY
def test_released_layers_are_those_of_03(method, file_of):
    """`--layers released`: all on tokens, adaLN and embedders left alone, x_t as it is (D6)."""
    if "layers" not in load_script(f"methods/{method}").Settings._fields:
        pytest.skip("it has no --layers")
    layers = load_artifact(file_of(method, "pixels")[0], "quant", f"{method}.py")["layers"]
    prefixes = {"embed": [""], "block": ["blocks.0.", "blocks.1."], "final": ["final_layer."]}
    on_tokens = [spec for spec in LAYERS if not spec.conditioning]
    assert layers.keys() == {p + spec.name for spec in on_tokens for p in prefixes[spec.unit]}
    for name, layer in layers.items():
        quantizers = [layer[key] for key in ("act", "a", "b") if key in layer]
        full = {quantizer["type"] == "none" for quantizer in quantizers}
        assert full == {name == "x_embedder.proj"}, name


@EVERY
def test_interrupted_between_two_units_it_resumes_to_the_same_bytes(
    method, file_of, run_of, tmp_path, monkeypatch
):
    """Stopped at its third write; what was written is not made again."""
    run, real = linked(run_of("latents"), tmp_path / "run"), os.replace
    written, stopped = [], []

    def replace(source, target):
        if len(written) == 2 and not stopped:
            stopped.append(target)
            raise KeyboardInterrupt
        written.append(str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert run_in_process(*command(method, run, "latents")).returncode == 130
    assert run_in_process(*command(method, run, "latents")).returncode == 0
    path, _ = file_of(method, "latents")
    assert (run / path.name).read_bytes() == path.read_bytes()
    learned = [file for file in written if file.endswith("tuning.pt")]  # each epoch anew
    assert len(written) - len(learned) == len(set(written) - {*learned}) and not leftovers(run)
    assert len(learned) == 2 * (method == "tqdit_plus")


@pytest.mark.slow
@needs_fake_cuda
@EVERY
def test_runs_on_a_simulated_cuda_device(method, file_of, run_of, tmp_path):
    """Each tensor is where it is needed, and the file is as good as the CPU's."""
    run = linked(run_of("pixels"), tmp_path / "run")
    name, *flags = command(method, run, "pixels")
    log = run_script(name, *flags, "--device", "cuda", launcher=[FAKE_CUDA])
    assert log.returncode == 0, log.stderr
    path, _ = file_of(method, "pixels")
    twins = (load_artifact(file, "quant", f"{method}.py") for file in (path, run / path.name))
    cpu, cuda = (file["report"]["snr_weighted"] for file in twins)
    assert cuda == pytest.approx(cpu, abs=1)


@pytest.mark.parametrize("key", ["type", "act", "a"])
@EVERY
def test_04_refuses_layers_and_quantizers_of_an_unknown_type(method, key, file_of, tmp_path):
    """In one line that names it: a layer, the inputs of one, an operand of a product."""
    path, _ = file_of(method, "pixels")
    file = load_artifact(path, "quant", f"{method}.py")
    layer = next(layer for layer in file["layers"].values() if key in layer)
    (layer if key == "type" else layer[key])["type"] = "newer"
    save_artifact(tmp_path / path.name, file)
    log = run_in_process("04_sample", "--run", tmp_path, *name_of(path).split())
    refused(log, "newer")
    assert [*tmp_path.iterdir()] == [tmp_path / path.name]


# ------------------------------------------------------------------------------------------------
# Its command line

BAD = {
    "--wbits 9 --abits 8": "--wbits 9",
    "--wbits 4 --abits 1": "--abits 1",
    "--abits 8": "--wbits",
    "--wbits 4 --abits 8 --tag a/b": "--tag",
    "--wbits 4 --abits 8 --rows 0": "--rows 0",
    "--wbits 4 --abits 8 --batch-size 0": "--batch-size 0",
    "--wbits 4 --abits 8 --unheard-of": "--unheard-of",
}


@pytest.mark.parametrize("flags", BAD)
@EVERY
def test_bad_flags_are_refused(method, flags, run_of, tmp_path):
    """Status 2, one line that names the flag, and nothing is written."""
    run = linked(run_of("latents"), tmp_path / "run")
    before = snapshot(run)
    log = run_in_process(f"methods/{method}", "--run", run, *flags.split())
    refused(log, BAD[flags])
    assert snapshot(run) == before


@EVERY
def test_without_calib_it_says_what_to_run(method, tmp_path):
    """Status 2, one line that names the file and the script that makes it; nothing is written."""
    log = run_in_process(f"methods/{method}", *f"--run {tmp_path} --wbits 4 --abits 8".split())
    refused(log, "made by 01_collect_calib.py")
    assert "calib.pt" in log.stderr and not [*tmp_path.iterdir()]


@EVERY
def test_help_explains_every_flag(method, monkeypatch):
    """Each has a line of its own, each setting has a flag; the docstring names the paper and the
    commands."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self))
    script = load_script(f"methods/{method}")
    script.parse_args()
    actions = {action.dest: action for action in parsers[0]._actions}
    assert all(action.help for action in actions.values())
    assert not {*script.Settings._fields} - actions.keys()
    text = parsers[0].format_help()
    assert re.search(r"arXiv \d{4}\.\d{5}", text) or method == "tqdit_plus"
    assert f"python methods/{method}.py --run" in text and f"--tag {actions['tag'].default}" in text
