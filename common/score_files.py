"""What 05_eval_fid.py reads: images, statistics of a reference, rows of metrics.json.

Each is checked before any work; what does not fit is refused in one line.
"""

import json
import zipfile

import numpy as np
from PIL import Image

from common.artifacts import FORMAT, sha256_of
from common.checks import Fault, Float, Int, OneOf, Plain, check, need
from common.errors import InputError, reading
from common.model_schema import SHA256, TEXT
from common.schemas import SAMPLES

NAMES = {"inception": ("FID", "sFID", "IS"), "demo": ("FD(demo)", "sFD(demo)", "IS(demo)")}
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of pooled features, of spatial features
ARRAYS = ("arr_0", "labels", "meta", *STATISTICS, "features")  # others are not read


def check_file(path):
    """InputError unless it is a file; a pipe would keep us waiting."""
    if not path.is_file():
        raise InputError(f"{path} is {'no file' if path.exists() else 'not there'}")


def digest_of(path):
    """sha256 of a file; InputError if it is none that can be read."""
    check_file(path)
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def load_arrays(path):
    """Those of ARRAYS that an .npz holds; nothing is unpickled."""
    check_file(path)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is cut off or no .npz: make it again")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.asarray(file[key]) for key in ARRAYS if key in file}
    except MemoryError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise InputError(f"{path} cannot be read: {error}; make it again") from error


def check_images(path, images):
    found = "missing" if images is None else f"{images.dtype} {images.shape}"
    good = images is not None and images.dtype == np.uint8 and images.shape[3:] in ((1,), (3,))
    if not good or len(images) < 2 or images.size == 0:
        raise InputError(f"{path}: arr_0 is {found}, not 2 or more uint8 images (N, H, W, 1 or 3)")


# ------------------------------------------------------------------------------------------------
# Samples

META = {key: SAMPLES[key] for key in ("settings", "inputs", "model_bytes")}


def read_meta(text, count):
    """What `count` images say of themselves, in whatever format of 04's: the entries of META."""
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Fault(f"is no JSON: {error}") from error
    need(isinstance(meta, dict), "is no object")
    meta = {key: meta[key] for key in META if key in meta}
    check(meta, META, "", {})
    found = meta["settings"]["num_images"]
    need(found == count, f"settings.num_images is {found}, yet arr_0 holds {count}")
    return meta


def read_samples(path):
    """Images arr_0 (N, H, W, C), labels, settings, inputs, model_bytes of a file of samples.

    One without meta, as ADM's scripts write them, says nothing of itself.
    """
    arrays = load_arrays(path)
    images, labels = arrays.get("arr_0"), arrays.get("labels")
    check_images(path, images)
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        found = f"labels are {labels.dtype} {labels.shape}, not {len(images)} whole numbers"
        raise InputError(f"{path}: {found}; run 04_sample.py --force")
    meta = dict(settings={}, inputs=None, model_bytes=None)
    if "meta" in arrays:
        try:
            meta = read_meta(str(arrays["meta"]), len(images))
        except Fault as fault:
            raise InputError(f"{path}: its meta {fault}; run 04_sample.py --force") from fault
    return dict(arr_0=images, labels=labels) | meta


# ------------------------------------------------------------------------------------------------
# References


def read_folder(path):
    """The png and jpg in a folder as images (N, H, W, C); grey ones have one channel."""
    with reading(path):
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                need(image.mode[0] not in "IF", "more than 8 bits a channel")  # would be clipped
                images.append(np.atleast_3d(image.convert("L" if image.mode == "L" else "RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Fault) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
        if images[-1].shape != images[0].shape:
            raise InputError(f"{file} is of another size than {files[0].name}, or one is grey")
    if len(images) < 2:
        raise InputError(f"{path} holds {len(images)} png or jpg: 2 or more are needed")
    return np.stack(images)


def check_statistics(path, arrays):
    """mu (D,) and sigma (D, D), mu_s and sigma_s, features (M, D): finite numbers that agree."""
    shapes = {}
    for mu, sigma in ("mu", "sigma"), ("mu_s", "sigma_s"):
        if mu in arrays or sigma in arrays or (mu == "mu" and "features" in arrays):
            size = np.shape(arrays.get(mu))[:1] or (1,)
            shapes |= {mu: size, sigma: size * 2}
    if "features" in arrays:
        shapes["features"] = (*np.shape(arrays["features"])[:1], *shapes["mu"])
    for key, shape in shapes.items():
        if key not in arrays:
            raise InputError(f"{path} has no {key}")
        array = arrays[key]
        if array.dtype not in (np.float32, np.float64) or array.shape != shape:
            raise InputError(f"{path}: {key} is {array.dtype} {array.shape}, not floats {shape}")
        if not np.abs(array).max(initial=0) < 1e30:  # squares of squares stay finite
            raise InputError(f"{path}: {key} holds NaN, infinity or numbers beyond 1e30")


def read_reference(path):
    """Images arr_0, or statistics, or both, and features: what a reference holds."""
    if path.is_dir():
        return {"arr_0": read_folder(path)}
    arrays = load_arrays(path)
    if "arr_0" in arrays:
        check_images(path, arrays["arr_0"])
    elif "mu" not in arrays:
        raise InputError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
    check_statistics(path, arrays)
    return arrays


# ------------------------------------------------------------------------------------------------
# metrics.json


def or_null(spec):
    """What this spec says, or null."""
    return lambda value, name, sizes: value is None or check(value, spec, name, sizes)


NUMBER = or_null(Float())


def texts(value, name, sizes):
    fits = isinstance(value, list) and all(type(item) is str for item in value)
    need(fits, f"{name} is no list of texts")


ROW = (
    dict.fromkeys(("features", "reference", "file", "name", "note"), TEXT)
    | dict.fromkeys(("features_sha256", "reference_sha256", "samples_sha256"), SHA256)
    | dict.fromkeys(("seed", "steps", "model_bytes"), or_null(Int(0)))
    | dict.fromkeys(("cfg_scale", "precision", "recall", "psnr"), NUMBER)
    | dict(feature_space=OneOf(*NAMES), fp_sha256=or_null(SHA256), inputs=Plain())
    | dict(num_images=Int(2), not_comparable=texts)
)


def check_rows(rows, name, sizes):
    """Fault unless these are rows of metrics.json; a feature space has names for its own scores."""
    need(isinstance(rows, list), "rows are no list")
    for i, row in enumerate(rows):
        need(isinstance(row, dict), f"rows[{i}] is no object")
        fid, sfid, score = NAMES.get(str(row.get("feature_space")), NAMES["demo"])
        check(row, ROW | {fid: Float(), sfid: NUMBER, score: Float()}, f"rows[{i}]", sizes)


def read_rows(path):
    """The rows of metrics.json; none if there is no such file."""
    if not path.exists():
        return []
    check_file(path)
    try:
        metrics = json.loads(path.read_text())
        check(metrics, dict(format=OneOf(FORMAT), rows=check_rows), "", {})
    except (OSError, ValueError, RecursionError, Fault) as error:
        raise InputError(f"{path}: {error}; move it away, then run again") from error
    return metrics["rows"]
