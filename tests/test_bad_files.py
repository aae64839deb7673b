"""Every file that a script reads, spoiled in every way: one line, status 2, nothing written.

Mutants are made of the files of the tiny run: each entry dropped, each leaf of another type, each
tensor of another dtype or shape, empty, NaN, out of range; each number a little or far off. What no
reader could notice, or need not, is listed in HARMLESS.
"""

import contextlib
import inspect
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run_in_process

from common import artifacts
from common.checkpoints import load_dit
from common.checks import product
from common.model_schema import ANY_FLOAT, model_config, parameters
from models_dit import DiT, DiT_models

READERS = {  # file -> the command that reads it, in the run's folder
    "dit.pt": "01_collect_calib --run new --ckpt dit.pt --vae none --num-heads 4 --steps 6 "
    "--groups 3 --per-group 4 --trajectories 6",
    "calib.pt": "02_grad_cache --run . --force",
    "grads/embed.pt": "03_quantize --run . --wbits 8 --abits 8",
    "grads/block_01.pt": "03_quantize --run . --wbits 8 --abits 8",
    "grads/final.pt": "03_quantize --run . --wbits 8 --abits 8",
    "quant_w6a6.pt": "04_sample --run . --wbits 6 --abits 6 --num-images 2 --force",
    "samples_fp.npz": "04_sample --run . --fp --num-images 6 --batch-size 2",
}
HARMLESS = {  # file -> mutants that read as another good file, or that change what nobody uses
    "dit.pt": r".*: float64|y_embedder.*: shorter",
    "calib.pt": r"settings\.(seed|trajectories|cfg_channels): (more|a million)|"
    r"(calibration|validation)\.trajectory: above",
    "quant_w6a6.pt": r"settings\.(?!wbits|abits|eps|sampling)\w+: .*|settings: one more|"
    r"settings\.(wbits|abits|sampling\.steps): more|.*codes: above|.*(act|[ab])\.bits: more|"
    r".*av\.a\.scale1: one axis less|"
    r"settings\.sampling\.cfg_channels: (more|a million)|report\..*: more than all",
    "samples_fp.npz": "model_bytes: (more|a million)",
}
OTHERS = (None, True, "text", 3.5, 2**70, [], {}, [[1, 2]], torch.ones(2, 3))
DTYPES = torch.float64, torch.int64, torch.bool, torch.complex64
POSITIVE = r".*\.(scale1?2?|smooth)"  # tensors without values at or below zero
CHOSEN = {  # one layer and one tensor of each kind; all of them take minutes
    "dit.pt": r"(?!blocks\.0|t_embedder).*",
    "quant_w6a6.pt": r"(?!layers|state|report\.costs).*|layers|state|"
    r"layers\.(x_embedder|blocks\.0\.(attn\.av|mlp\.fc2)(\.|$)).*|"
    r"state\.(pos_embed|blocks\.0\.adaLN).*|report\.costs\.x_embedder.*",
}


# ------------------------------------------------------------------------------------------------
# Mutants


def mutants(good, path=""):
    """Yields (what was done where, spoiled copy) for everything that a value holds."""
    if isinstance(good, dict):
        yield f"{path}: one more", good | {"other": 1}
    for key, value in items(good):
        where = f"{path}.{key}".lstrip(".")
        yield f"{where}: dropped", without(good, key)
        for what, bad in spoiled(value, where):
            yield f"{where}: {what}", replaced(good, key, bad)
        if isinstance(value, dict | list):
            for what, bad in mutants(value, where):
                yield what, replaced(good, key, bad)


def items(value):
    return [*value.items()] if isinstance(value, dict) else [*enumerate(value)]


def without(value, key):
    pairs = [(k, x) for k, x in items(value) if k != key]
    return dict(pairs) if isinstance(value, dict) else [x for _, x in pairs]


def replaced(value, key, new):
    changed = value.copy()
    changed[key] = new
    return changed


def spoiled(value, where):
    """Yields (what was done, spoiled value); two or three of the other types each."""
    for bad in OTHERS[len(where) % 3 :: 3]:
        if type(bad) is not type(value):
            yield f"a {type(bad).__name__}", bad
    if isinstance(value, torch.Tensor):
        yield from spoiled_tensors(value, where)
    elif type(value) is int:
        yield from {"more": value + 1, "a million": 10**6, "negative": -1, "huge": 2**70}.items()
    elif type(value) is float:
        yield from {"NaN": float("nan"), "more than all": 1e999, "an int": 1}.items()
    elif type(value) is str:
        yield "long", "x" * 10**6


def spoiled_tensors(value, where):
    for dtype in DTYPES[len(where) % 2 :: 2]:
        if dtype != value.dtype:
            yield str(dtype).removeprefix("torch."), value.to(dtype)
    yield "one axis more", value[None]
    yield "empty", value[..., None][:0].flatten()
    yield "on meta", value.to("meta")
    yield "one value for all", torch.zeros((), dtype=value.dtype).expand(value.shape or 9)
    if value.ndim:
        yield "shorter", value[:-1].clone()
        yield "one axis less", value[0].clone()
    if value.is_floating_point():
        yield "with a gradient", value.clone().requires_grad_()
        yield "NaN", last_set(value, float("nan"))
        yield "infinite", last_set(value, float("inf"))
    else:
        yield "above", last_set(value, 255 if value.dtype == torch.uint8 else 10**9)
    if value.dtype == torch.int64 or re.fullmatch(POSITIVE, where):
        yield "negative", last_set(value, -1)


def last_set(value, number):
    changed = value.clone()
    changed.view(-1)[-1] = number
    return changed


# ------------------------------------------------------------------------------------------------
# The walk


def read(path):
    if path.suffix == ".npz":
        with np.load(path) as file:
            return json.loads(str(file["meta"]))
    return torch.load(path, weights_only=True)


def write(path, value):
    if path.suffix == ".npz":
        images = np.zeros((6, 8, 8, 3), np.uint8)
        np.savez(path, arr_0=images, labels=np.arange(6), meta=np.array(json.dumps(value)))
    else:
        torch.save(value, path)


@pytest.fixture
def run(tiny_run, tiny_ckpt, tmp_path, monkeypatch):
    """A copy of the tiny run and its checkpoint, the working directory."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copy(tiny_ckpt, run / "dit.pt")
    monkeypatch.chdir(run)
    return run


@contextlib.contextmanager
def at_most(seconds):
    """TimeoutError after so many seconds."""

    def stop(*_):
        raise TimeoutError(f"hangs: {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def state_of(folder):
    """Every path under a folder, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def fault_of(command, folder):
    """The line in which a command refuses its input; AssertionError if it does anything else."""
    before = state_of(folder)
    with at_most(20):
        result = run_in_process(*command.split())
    lines = [line for line in result.stderr.splitlines() if line.strip() and "%|" not in line]
    assert result.returncode == 2 and len(lines) == 1, f"{result.returncode} {result.stderr}"
    assert state_of(folder) == before, "something was written"
    return lines[0]


def of_one_block(quant):
    """A quant file of the first block alone, which is read sooner."""

    def kept(entries):
        return {name: x for name, x in entries.items() if not name.startswith("blocks.1.")}

    report = quant["report"] | dict(costs=kept(quant["report"]["costs"]))
    layers, state = kept(quant["layers"]), kept(quant["state"])
    config = quant["config"] | dict(depth=1)
    return quant | dict(layers=layers, state=state, report=report, config=config)


@pytest.mark.parametrize("file", READERS)
def test_every_mutant_is_refused(file, run):
    """In one line that comes of the file's schema, not of an error nobody thought of."""
    good, failed, count = read(run / file), [], 0
    if file.startswith("quant"):
        good = of_one_block(good)
        write(run / file, good)
        assert run_in_process(*QUANT.split()).returncode == 0
    for what, bad in mutants(good):
        chosen = re.fullmatch(CHOSEN.get(file, ".*"), what.partition(":")[0])
        if re.fullmatch(HARMLESS.get(file, ""), what) or not chosen:
            continue
        try:
            write(run / file, bad)
        except TypeError:  # JSON has no tensors
            continue
        count += 1
        try:
            line = fault_of(READERS[file], run)
            assert "could not be read" not in line and len(line) < 500, line
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__} {str(error)[:300]}")
    assert not failed, "\n".join([f"{len(failed)} of {count}", *failed])
    assert count > 50


# ------------------------------------------------------------------------------------------------
# Faults that no change of one entry makes


def edit(file, change):
    """A preparation: the file's value changed in place, or what `change` returns instead."""

    def prepare(run):
        value = read(run / file)
        changed = change(value)
        write(run / file, value if changed is None else changed)

    return prepare


def nested(depth):
    """A list in a list in a list, and so on."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def shared(width, depth):
    """A list of so many times the same list, and so on: little to store, endless to walk."""
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


def cyclic():
    value = []
    value.append(value)
    return value


def folder(name):
    """A preparation: a folder in this place."""

    def prepare(run):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir(parents=True)

    return prepare


def file(name):
    """A preparation: a file in the place of this folder."""

    def prepare(run):
        shutil.rmtree(run / name)
        (run / name).write_text("a file")

    return prepare


def swap(first, second):
    """A preparation: two layers of the quant file, each in the other's place."""

    def change(quant):
        layers = quant["layers"]
        layers[first], layers[second] = layers[second], layers[first]

    return edit("quant_w6a6.pt", change)


def by_group(count, name, like=None):
    """A preparation: so many scales for the inputs of this layer of the quant file, which `like`
    or else it has one scale for."""

    def change(quant):
        act = quant["layers"][like or name]["act"]
        repeated = {k: x.repeat(count) for k, x in act.items() if isinstance(x, torch.Tensor)}
        quant["layers"][name]["act"] = act | repeated

    return edit("quant_w6a6.pt", change)


def layer(change):
    return edit("quant_w6a6.pt", lambda quant: change(quant["layers"][QKV]))


def viewed(view, scales):
    """A preparation: the weight (96, 32) with so many scales in each of its rows."""
    many = dict(scale=torch.ones(96, scales, 1), zero_point=torch.zeros(96, scales, 1).byte())
    return layer(lambda x: x["weight"].update(many, view=view))


def dynamic(**changes):
    """A preparation: inputs with scales of their own."""
    act = dict(type="dynamic", bits=6, per="token", group_size=8) | changes
    return layer(lambda x: x.update(act=act))


def low_rank(*ranks):
    left, right = torch.ones(96, ranks[0]), torch.ones(ranks[1], 32)
    return layer(lambda x: x.update(low_rank=dict(left=left, right=right)))


def config(**changes):
    return edit("quant_w6a6.pt", lambda quant: quant["config"].update(changes))


def calib(change):
    return edit("calib.pt", change)


def dit(change):
    return edit("dit.pt", change)


def samples(text):
    """A preparation: samples whose meta is this text."""

    def prepare(run):
        np.savez(run / "samples_fp.npz", arr_0=np.zeros((6, 8, 8, 3), np.uint8), meta=text)

    return prepare


QKV, FC1, CONV, QK = "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "x_embedder.proj", "blocks.0.attn.qk"
HUGE = torch.zeros(1).expand(1, 2**20, 2**12)  # four bytes in the file
CKPT, CALIB, GRADS, QUANT, SAMPLES = (
    READERS[x] for x in ("dit.pt", "calib.pt", "grads/embed.pt", "quant_w6a6.pt", "samples_fp.npz")
)
NO_FORCE = QUANT.replace(" --force", "")
SEEN = {  # command, what happens to the run before, words of the line
    "01: run is a file": (CKPT.replace("new", "calib.pt"), None, "calib.pt is a file"),
    "02: run is a file": ("02_grad_cache --run calib.pt", None, "no such file"),
    "name too long": (f"02_grad_cache --run {'x' * 300}", None, "could not be read: OSError"),
    "calib a folder": (CALIB, folder("calib.pt"), "calib.pt: is a folder"),
    "quant a folder": (QUANT, folder("quant_w6a6.pt"), "quant_w6a6.pt: is a folder"),
    "ckpt a folder": (CKPT, folder("dit.pt"), "dit.pt: "),
    "samples a folder": (QUANT, folder("samples_w6a6.npz"), "samples_w6a6.npz is a folder"),
    "picture a folder": (QUANT, folder("samples_w6a6.png"), "samples_w6a6.png is a folder"),
    "02: grads a file": (CALIB, file("grads"), "grads is a file, where a folder belongs"),
    "03: grads a file": (GRADS, file("grads"), "no such file (made by 02_grad_cache.py)"),
    "02: a unit a folder": (CALIB, folder("grads/block_01.pt"), "block_01.pt is a folder"),
    "03: a unit a folder": (GRADS, folder("grads/block_01.pt"), "block_01.pt: is a folder"),
    "ckpt a tensor": (CKPT, dit(lambda state: torch.ones(3)), "it is float32 (3)"),
    "ckpt a list": (CKPT, dit(lambda state: [*state.values()]), "it is a list"),
    "ckpt of numbers": (CKPT, dit(lambda state: dict(enumerate(state))), "it has no blocks.0"),
    "ckpt with an odd key": (CKPT, dit(lambda state: state.update({(1, 2): 3})), "unknown entry"),
    "ema a tensor": (CKPT, dit(lambda state: dict(ema=torch.ones(3))), "not a DiT"),
    "block 999999": (
        CKPT,
        dit(lambda state: state.update({"blocks.999999.attn.qkv.weight": torch.ones(96, 32)})),
        "blocks.2.attn.qkv.weight is missing",
    ),
    "no blocks": (
        CKPT,
        dit(lambda state: {k: x for k, x in state.items() if "blocks" not in k}),
        "blocks",
    ),
    "0 classes": (
        CKPT,
        dit(lambda state: state.update({"y_embedder.embedding_table.weight": torch.ones(1, 32)})),
        "num_classes is 0",
    ),
    "15 tokens": (
        CKPT,
        dit(lambda state: state.update(pos_embed=torch.ones(1, 15, 32))),
        "tokens is 15 and 9",
    ),
    "pos_embed of nothing": (CKPT, dit(lambda state: state.update(pos_embed=HUGE)), "pos_embed"),
    "ckpt of another width": (
        CALIB,
        calib(lambda c: c["settings"]["config"].update(hidden_size=64)),
        "hidden_size is 64",
    ),
    "settings nested": (CALIB, calib(lambda c: c["settings"].update(x=nested(300))), "settings"),
    "time group of another": (
        CALIB,
        calib(lambda c: c["calibration"].update(group=c["calibration"]["group"].flip(0))),
        "Eq. (9)",
    ),
    "one time group": (
        CALIB,
        calib(
            lambda c: c["validation"].update({k: torch.zeros(24).long() for k in ("t", "group")})
        ),
        "validation has no rows of some time group",
    ),
    "grads of another unit": (
        GRADS,
        lambda run: shutil.copy(run / "grads/block_00.pt", run / "grads/block_01.pt"),
        "block_01.pt is damaged: it is of block_00",
    ),
    "matmul for linear": (QUANT, swap(QKV, QK), f"{QKV}.type is 'matmul', not 'linear'"),
    "linear for conv": (QUANT, swap(CONV, QKV), f"{CONV}.type is 'linear', not 'conv'"),
    "layer of another shape": (QUANT, swap(QKV, FC1), f"{QKV}.weight.shape[0] is 128, not 96"),
    "layer type": (QUANT, layer(lambda x: x.update(type="lookup")), "type is 'lookup'"),
    "quantizer type": (QUANT, layer(lambda x: x["act"].update(type="log")), "type is 'log'"),
    "layer unknown": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["layers"].update(head=q["layers"][QKV])),
        "layers has an unknown entry, 'head'",
    ),
    "smooth of another length": (QUANT, layer(lambda x: x.update(smooth=torch.ones(33))), "smooth"),
    "smooth 0": (QUANT, layer(lambda x: x.update(smooth=torch.zeros(32))), "smooth holds 0 to 0"),
    "conv by group": (QUANT, by_group(3, CONV, like=QKV), "scale is float32 (3), not float32 ()"),
    "groups of another number": (QUANT, by_group(4, QKV), "scale is float32 (4), not float32 (3)"),
    "view of another size": (QUANT, viewed([96, 2, 8], 2), "view is of 1536 elements, not 3072"),
    "view beyond 64 bits": (QUANT, viewed([96, 2, 2**70], 2), "view[2] is beyond 64 bits"),
    "view with other scales": (QUANT, viewed([96, 2, 16], 3), "scale does not go with the view"),
    "view of nothing": (QUANT, layer(lambda x: x["weight"].update(view=None, scale=None)), "scale"),
    "dynamic group": (QUANT, dynamic(group_size=5), "group_size is 5, which does not divide 32"),
    "dynamic group 0": (QUANT, dynamic(group_size=0), "group_size is 0, which does not divide 32"),
    "dynamic scope": (QUANT, dynamic(per="batch"), "per is 'batch', not 'sample' or 'token'"),
    "shift of other groups": (QUANT, layer(lambda x: x.update(shift=torch.ones(4, 32))), "shift"),
    "bias of other groups": (QUANT, layer(lambda x: x.update(bias=torch.ones(4, 96))), "bias"),
    "conv with a shift": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["layers"][CONV].update(shift=torch.ones(12))),
        "unknown entry, 'shift'",
    ),
    "low rank alone": (QUANT, layer(lambda x: x.update(low_rank={})), "low_rank.left is missing"),
    "low rank of two ranks": (QUANT, low_rank(2, 3), "low_rank"),
    "gradients of nowhere": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["inputs"].__delitem__("grads")),
        "one of settings.eps and inputs.grads is missing",
    ),
    "depth a million": (QUANT, config(depth=10**6), "depth is 1000000"),
    "all sizes huge": (
        QUANT,
        config(hidden_size=2**16, depth=2**16, input_size=2**16, mlp_ratio=2.0**16),
        "depth is 65536",
    ),
    "width of nothing": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["state"].update(pos_embed=HUGE)),
        "pos_embed",
    ),
    "settings cyclic": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["settings"].update(x=cyclic())),
        "settings holds too much",
    ),
    "settings endless": (
        QUANT,
        edit("quant_w6a6.pt", lambda q: q["settings"].update(x=shared(1000, 6))),
        "settings holds too much",
    ),
    "meta no JSON": (SAMPLES, samples("{"), "is damaged"),
    "meta nested": (SAMPLES, samples("[" * 10**5), "is damaged"),
    "meta a list": (SAMPLES, samples("[1, 2]"), "no artifact"),
    "meta absent": (SAMPLES, lambda run: np.savez(run / "samples_fp.npz", a=1), "is damaged"),
    "samples no zip": (SAMPLES, lambda run: (run / "samples_fp.npz").write_text("x"), "is damaged"),
    "trajectories": (CKPT + " --trajectories 1000000000000", None, "--trajectories"),
    "memory limit": (GRADS + " --memory-limit 1e308", None, "too large"),
}


@pytest.mark.parametrize("case", SEEN)
def test_fault_is_named_in_one_line(case, run):
    """The line says which entry is wrong, and how."""
    command, prepare, words = SEEN[case]
    if prepare:
        prepare(run)
    assert words in fault_of(command, run)


NUMBERS = {  # script -> its whole-numbered flags
    "01_collect_calib": "steps groups per-group num-heads trajectories cfg-channels seed",
    "02_grad_cache": "batch-size",
    "03_quantize": "wbits abits rounds rows batch-size",
    "04_sample": "wbits abits num-images first seed classes steps batch-size",
}


@pytest.mark.parametrize("script", NUMBERS)
def test_numbers_beyond_64_bits_are_refused(script, run):
    for flag in NUMBERS[script].split():
        for number in (2**63, -(10**30)):
            line = fault_of(f"{script} --run . --{flag}={number}", run)
            assert f"--{flag}: {number} is beyond 64 bits" in line


def test_unforeseen_error_is_one_line_and_traceback_shows_more(run, monkeypatch):
    """What no schema foresees: a bug of a reader, not of the file."""

    def fail(*_):
        raise TypeError("nobody\nthought of this")

    monkeypatch.setattr(artifacts, "check_artifact", fail)
    words = "calib.pt could not be read: TypeError: nobody thought of this; --traceback shows more"
    assert words in fault_of(CALIB, run)
    shown = run_in_process(*CALIB.split(), "--traceback").stderr
    assert "in fail\n" in shown and words in shown.splitlines()[-1]


def test_missing_permissions_are_told_as_such(run, monkeypatch):
    """A file that may not be read is not called damaged; a folder that may not be written into is
    told before any work. Root may do both, so the system's answer is made up."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", refuse)
        assert "calib.pt cannot be read: Permission denied" in fault_of(CALIB, run)
    monkeypatch.setattr(artifacts.os, "access", lambda *_: False)
    assert "no permission to write in" in fault_of(GRADS, run)


# ------------------------------------------------------------------------------------------------
# What is good stays good


@pytest.mark.parametrize("size", [*DiT_models.values(), dict(learn_sigma=False, mlp_ratio=61 / 24)])
def test_table_of_parameters_is_that_of_the_network(size):
    """Names and shapes of DiT's own state dict, from the constructor's keywords alone."""
    defaults = inspect.signature(DiT.__init__).parameters.items()
    config = {key: x.default for key, x in defaults if key != "self"} | size | dict(depth=2)
    with torch.device("meta"):
        state = DiT(**config).state_dict()
    model_config(config, "config", sizes := {})
    table = {k: x.shape.split() for k, x in parameters(2, ANY_FLOAT).items()}
    shapes = {key: [product(x, sizes) for x in shape] for key, shape in table.items()}
    assert shapes == {key: list(x.shape) for key, x in state.items()}


def test_quant_file_of_another_method_is_sampled(run):
    """Scales by group, smoothed inputs, a tensor-wide weight scale, a name of its own."""
    by_group(3, QKV)(run)

    def change(quant):
        state = quant["layers"][QKV]
        state["smooth"], quant["method"] = torch.ones(32), "theirs"
        weight = state["weight"]
        weight |= {key: weight[key][0, 0] for key in ("scale", "zero_point")}

    edit("quant_w6a6.pt", change)(run)
    assert run_in_process(*QUANT.split()).returncode == 0


def test_quant_file_without_gradients_is_sampled(run):
    """Scales within rows, dynamic inputs, shifts and biases by group, a low-rank branch; nothing
    of Phase 2."""
    viewed([96, 2, 16], 2)(run), dynamic()(run), low_rank(2, 2)(run)
    layer(lambda x: x.update(shift=torch.zeros(3, 32), bias=torch.zeros(3, 96)))(run)

    def change(quant):
        del quant["settings"]["eps"], quant["inputs"]["grads"]
        adaptive = dict(type="adaptive", bits=4, scale=torch.ones(3), log2=torch.arange(3) > 1)
        quant["layers"]["blocks.0.attn.av"]["a"] = adaptive

    edit("quant_w6a6.pt", change)(run)
    assert run_in_process(*QUANT.split()).returncode == 0


@pytest.mark.parametrize("dtype", ANY_FLOAT)
def test_checkpoint_may_have_any_floats(dtype, run):
    """Parameters or plain tensors; it is float32 from there on."""
    dit(lambda state: {key: torch.nn.Parameter(x.to(dtype)) for key, x in state.items()})(run)
    model, _ = load_dit("dit.pt", num_heads=4)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
