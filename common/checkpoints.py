"""DiT checkpoints and public downloads: from a file or an address to a model that samples."""

import argparse
import fcntl
import math
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import torch
from tqdm import tqdm

from common.artifacts import load_artifact, load_hashed, sha256_of
from common.checks import Fault, check, need, told
from common.diffusers_names import check_config, from_diffusers, is_diffusers
from common.errors import InputError, reading
from common.model_schema import ANY_FLOAT, count_blocks, decodes, model_config, parameters
from common.weight_files import config_beside, find_weights, load_weights
from models_dit import DiT, DiT_models

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{0}x{0}.pt"
# in the environment: an address that has the same files, each by its name in the cache
MIRROR = "TQ_DIT_MIRROR"
HEADS = {spec["hidden_size"]: spec["num_heads"] for spec in DiT_models.values()}


def download(url, name, sha256_prefix=""):
    """Fetch a public file into the cache ($XDG_CACHE_HOME/tq-dit), resuming a partial download."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tq-dit"
    target, partial = cache / name, cache / (name + ".part")
    if os.environ.get(MIRROR):
        url = f"{os.environ[MIRROR].rstrip('/')}/{name}"
    try:
        if target.exists():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / (name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait for it
            if not target.exists():
                _download_to(partial, url, name)
                if not sha256_of(partial).startswith(sha256_prefix):
                    partial.unlink()
                    raise InputError(f"{url}: wrong sha256, download discarded; run again")
                os.replace(partial, target)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: of an address that is none
        raise InputError(f"cannot download {url}: {error}; run again to resume") from error
    return target


def _download_to(partial, url, name):
    have = partial.stat().st_size - 1 if partial.exists() else 0  # one byte again: never none
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have > 0 else {})
    with opened(request, partial) as reply:
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


def opened(request, partial):
    """The server's reply; a partial file longer than the whole one is of another, and goes."""
    try:
        return urllib.request.urlopen(request, timeout=60)
    except HTTPError as error:
        if error.code == 416:
            partial.unlink()
        raise


def read_config(state, num_heads=None):
    """The DiT constructor's keywords, read off a checkpoint's shapes; Fault if it is no DiT's.

    Only the number of heads leaves no trace; known widths know theirs, others need `num_heads`.
    """
    need(isinstance(state, dict), f"it is {told(state)}")
    depth, sizes = count_blocks(state), {}
    need(depth > 0, "it has no blocks.0")
    check(state, parameters(depth, ANY_FLOAT), "", sizes)
    width, channels, patch = (sizes[size] for size in ("width", "channels", "patch"))
    heads = HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise InputError(f"width {width} is none of the known DiTs: give --num-heads")
    if heads < 1 or width % heads:
        told_by = "--num-heads or config.json"
        raise InputError(f"{heads} heads ({told_by}) do not divide the width {width}")
    found = dict(
        input_size=math.isqrt(sizes["tokens"]) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=sizes["hidden"] / width,
        num_classes=sizes["labels"] - 1,
        learn_sigma=sizes["outputs"] == 2 * channels * patch**2,
    )
    check(found, model_config, "its shape", sizes)
    return found


def build_dit(config, state):
    """A DiT in eval mode with these weights."""
    with torch.device("meta"):
        model = DiT(**config)
    model.load_state_dict(state, strict=True, assign=True)
    return model.float().eval().requires_grad_(False)


def load_dit(ckpt, num_heads=None, input_size=None):
    """(model, config) of a checkpoint: official, of DiT's train.py, or of diffusers, from which the
    size of x is taken if no config.json says it. Half precision becomes float32."""
    state, told_beside = load_weights(ckpt, "a DiT checkpoint", [argparse.Namespace]), {}
    with reading(ckpt):
        try:
            if is_diffusers(state):
                told_beside = config_beside(ckpt)
                state, num_heads = from_diffusers(state, told_beside, num_heads, input_size)
            config = read_config(state, num_heads)
            check_config(told_beside, config)
        except Fault as fault:
            raise InputError(f"{ckpt} is not a DiT checkpoint: {fault}") from fault
        return build_dit(config, state), config


def find_checkpoint(ckpt, model, image_size):
    """The checkpoint's path: `ckpt` if one was named, else DiT-XL/2, downloaded once."""
    if ckpt == "":
        raise InputError("--ckpt names no file")
    if ckpt:
        return find_weights(ckpt, "transformer")
    if model not in (None, "DiT-XL/2"):
        raise InputError(f"{model} has no public weights: give --ckpt")
    url = DIT_URL.format(image_size)
    return str(download(url, url.rpartition("/")[2]))


def check_model(config, model, vae, image_size):
    """InputError if the checkpoint is not of this --model or, if given, this --image-size, or does
    not go with this --vae."""
    channels, size = config["in_channels"], config["input_size"] * (1 if vae == "none" else 8)
    if image_size not in (None, size):
        raise InputError(f"--image-size {image_size}: the checkpoint's images have {size} pixels")
    if not decodes(vae, channels):
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
    """RUN/calib.pt, checked, and its own sha256."""
    path, made_by = Path(run) / "calib.pt", "01_collect_calib.py"
    calib, digest = load_hashed(path, lambda path: load_artifact(path, "calib", made_by))
    return calib | dict(sha256=digest)


def load_calibrated(calib):
    """The full-precision DiT that `calib` was collected from, and no other."""
    ckpt, want = calib["settings"]["ckpt"], calib["inputs"]["checkpoint"]
    with reading(ckpt):
        if not Path(ckpt).is_file():
            raise InputError(f"{ckpt}: no such file, yet calib.pt was collected from it")
        found = sha256_of(ckpt)
    if found != want:
        raise InputError(
            f"calib.pt was collected from a checkpoint with sha256 {want[:12]}; {ckpt} is now "
            f"{found[:12]}: run 01_collect_calib.py --force"
        )
    config = calib["settings"]["config"]
    model, read = load_dit(ckpt, config["num_heads"], config["input_size"])
    for key, value in read.items():
        if config[key] != value:
            raise InputError(
                f"calib.pt is damaged: settings.config.{key} is {config[key]}, that of {ckpt} is "
                f"{value}; run 01_collect_calib.py --force"
            )
    return model
