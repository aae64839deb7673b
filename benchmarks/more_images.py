"""Samples of a run's model, as many as asked for: images that are there stay, 04 adds the rest.

Image i has noise of its own, drawn from (seed, i), so RUN/samples_MODEL.npz grows into what 04
makes of N images in one go: on one core byte for byte, unless a batch of very few images rounds
products in another way. A file of N images or more stays as it is. A killed script resumes.

    python benchmarks/more_images.py --run runs/demo --wbits 6 --abits 6 --num-images 800
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from jobs import sampling_flags
from random_run import run_phase

from common.artifacts import sha256_of
from common.cli import at_least, model_name, run_script, whole_number
from common.errors import InputError
from common.images import save_samples

COUNT = "num_images", "first"  # the settings of 04 that slices of one file differ in


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, default=Path("runs/demo"))
    p.add_argument("--num-images", type=whole_number, required=True, help="N, of the whole file")
    p.add_argument("--fp", action="store_true", help="the full-precision model")
    p.add_argument("--compile", action="store_true", help="04 --compile")
    p.add_argument("--batch-size", type=whole_number, help="of 04")
    for flag in ("--wbits", "--abits", "--tag"):
        p.add_argument(flag, help="the model, as for 04")
    args = p.parse_args()
    at_least(1, args, "num_images", "batch_size")
    return args


def load(path):
    """Images, labels and meta of a file of samples."""
    with np.load(path) as file:
        return file["arr_0"], file["labels"], json.loads(str(file["meta"]))


def origin(meta):
    """What slices of one file share."""
    return {k: v for k, v in meta["settings"].items() if k not in COUNT}, meta["inputs"]


def sample(args, source, first):
    """The folder in which 04 has sampled the images first..N - 1, beside nothing but the model."""
    folder = slices(args) / f"{first}_{args.num_images}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / source.name).exists():
        (folder / source.name).symlink_to(source.resolve())
    model = ["--fp"] if args.fp else ["--wbits", args.wbits, "--abits", args.abits]
    model += ["--tag", args.tag] if args.tag else []
    count = ["--first", first, "--num-images", args.num_images - first]
    run_phase("04_sample", "--run", folder.resolve(), *model, *count, *sampling_flags(args))
    return folder


def slices(args):
    return args.run / ".slices" / model_name(args)


def append(path, added):
    """Put the images of `added` behind those of `path`, if there are any."""
    files = [load(file) for file in (path, added) if file.exists()]
    images, labels, metas = zip(*files, strict=True)
    if origin(metas[0]) != origin(metas[-1]):
        raise InputError(f"{path} is of another model or other settings: delete it")
    count = sum(map(len, images))
    metas[-1]["settings"] |= dict(num_images=count, first=0)
    meta = np.array(json.dumps(metas[-1]))
    save_samples(path, arr_0=np.concatenate(images), labels=np.concatenate(labels), meta=meta)


def check_samples(path, meta, source):
    """InputError unless these samples are of this quant file, from image 0 on."""
    quant = meta["inputs"].get("quant")
    if meta["settings"]["first"] or quant and quant != sha256_of(source):
        raise InputError(f"{path} is of another {source.name}, or of later images: delete it")


def main(args):
    name, have = model_name(args), 0
    source = args.run / ("calib.pt" if args.fp else f"quant_{name}.pt")
    path = args.run / f"samples_{name}.npz"
    if path.exists():
        images, _, meta = load(path)
        check_samples(path, meta, source)
        have = len(images)
    if have < args.num_images:
        append(path, sample(args, source, have) / path.name)
    shutil.rmtree(slices(args), ignore_errors=True)
    print(f"{path}: {max(have, args.num_images)} images")


if __name__ == "__main__":
    run_script(main, parse_args)
