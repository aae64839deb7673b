"""DiT checkpoints and public downloads: from a file or an address to a model that samples."""

import argparse
import fcntl
import math
import os
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from common.artifacts import load_artifact, load_tensors, sha256_of
from common.cli import InputError
from models_dit import DiT, DiT_models

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{0}x{0}.pt"
HEADS = {spec["hidden_size"]: spec["num_heads"] for spec in DiT_models.values()}


def download(url, name, sha256_prefix=""):
    """Fetch a public file into the cache ($XDG_CACHE_HOME/tq-dit), resuming a partial download."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tq-dit"
    target, partial = cache / name, cache / (name + ".part")
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / (name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait for it
        if target.exists():
            return target
        try:
            _download_to(partial, url, name)
        except OSError as error:
            raise InputError(f"cannot download {url}: {error}; run again to resume") from error
        if not sha256_of(partial).startswith(sha256_prefix):
            partial.unlink()
            raise InputError(f"{url}: wrong sha256, download discarded; run again")
        os.replace(partial, target)
    return target


def _download_to(partial, url, name):
    have = partial.stat().st_size - 1 if partial.exists() else 0  # one byte again: never none
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have > 0 else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:  # the whole file is coming
            have = 0
        total = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(desc=name, initial=have, total=total or None, unit="B", unit_scale=True)
        with open(partial, "r+b" if have else "wb") as file, bar:
            file.seek(have)
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if total and bar.n < total:
            raise OSError(f"connection closed after {bar.n} of {total} bytes")


def read_config(state, num_heads=None):
    """The DiT constructor's keywords, read off a checkpoint's shapes.

    Only the number of heads leaves no trace; known widths know theirs, others need `num_heads`.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        outputs = state["final_layer.linear.weight"].shape[0] // patch**2
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"not a DiT checkpoint: it has no usable {error}") from error
    heads = HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise InputError(f"width {width} is none of the known DiTs: give --num-heads")
    if heads < 1 or width % heads:
        raise InputError(f"--num-heads {heads} does not divide the width {width}")
    return dict(
        input_size=math.isqrt(tokens) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        num_classes=classes,
        learn_sigma=outputs == 2 * channels,
    )


def build_dit(config, state, source):
    """A DiT in eval mode with these weights; InputError names the first thing that does not fit."""
    with torch.device("meta"):
        model = DiT(**config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{source} does not fit this DiT: {reason}") from error
    return model.float().eval().requires_grad_(False)


def load_dit(ckpt, num_heads=None):
    """(model, config) of a checkpoint, plain or with an `ema` entry as DiT's train.py saves it."""
    state = load_tensors(ckpt, "a DiT checkpoint", [argparse.Namespace])  # train.py saves one
    state = state.get("ema", state) if isinstance(state, dict) else state
    config = read_config(state, num_heads)
    return build_dit(config, state, ckpt), config


def find_checkpoint(ckpt, model, image_size):
    """The checkpoint's path: `ckpt` if one was named, else DiT-XL/2, downloaded once."""
    if ckpt:
        return ckpt
    if model not in (None, "DiT-XL/2"):
        raise InputError(f"{model} has no public weights: give --ckpt")
    url = DIT_URL.format(image_size)
    return str(download(url, url.rpartition("/")[2]))


def check_model(config, model, vae):
    """InputError if the checkpoint is not of this --model, or does not go with this --vae."""
    channels = config["in_channels"]
    if channels not in ((1, 3) if vae == "none" else (4,)):
        raise InputError(f"--vae {vae} does not go with the checkpoint's {channels} channels")
    for key, value in DiT_models.get(model, {}).items():
        if config[key] != value:
            raise InputError(f"--model {model} has {key} {value}, --ckpt has {config[key]}")


def check_labels(y, num_classes, what):
    """Labels must be 0..num_classes - 1; `num_classes` itself is the null label."""
    if y.numel() and (y.min() < 0 or y.max() >= num_classes):
        bad = y.min() if y.min() < 0 else y.max()
        raise InputError(f"{what}: label {int(bad)} is outside 0..{num_classes - 1}")


def load_calib(run):
    """RUN/calib.pt, checked: finite, timesteps and labels in range; and its own sha256."""
    path = Path(run) / "calib.pt"
    calib = load_artifact(path, "calib", "01_collect_calib.py") | dict(sha256=sha256_of(path))
    settings = calib["settings"]
    for part in ("calibration", "validation"):
        rows = calib.get(part, {})
        if not {"x", "x_0", "t", "y", "group"} <= rows.keys():
            raise InputError(f"{path} is damaged: parts are missing; run 01 --force")
        if not all(torch.isfinite(rows[key]).all() for key in ("x", "x_0")):
            raise InputError(f"{path}: NaN or infinity in its {part} rows; run 01 --force")
        check_labels(rows["y"], settings["config"]["num_classes"] + 1, f"{path} {part}")
        check_labels(rows["t"], settings["steps"], f"{path} {part} timesteps")
    return calib


def load_calibrated(calib):
    """The full-precision DiT that `calib` was collected from, and no other."""
    ckpt, want = calib["settings"]["ckpt"], calib["inputs"]["checkpoint"]
    if not Path(ckpt).is_file():
        raise InputError(f"{ckpt}: no such file, yet calib.pt was collected from it")
    if sha256_of(ckpt) != want:
        raise InputError(
            f"calib.pt was collected from a checkpoint with sha256 {want[:12]}; {ckpt} is now "
            f"{sha256_of(ckpt)[:12]}: run 01_collect_calib.py --force"
        )
    return load_dit(ckpt, calib["settings"]["config"]["num_heads"])[0]
