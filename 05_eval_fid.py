"""Scores: hold every samples_*.npz of a run against a reference.

01 to 03 are the paper's three phases, 04 samples, this script scores.  Paper: Sec. IV, Tables
I-III, Fig. 6.  In: RUN/samples_*.npz, a reference.  Out: RUN/metrics.json, a table, and
RUN/comparison.png with a row of images for every model, from the same seeds. FID, sFID, IS,
precision and recall are the ADM evaluator's (openai/guided-diffusion); PSNR is against
RUN/samples_fp.npz. The reference is ADM's .npz, an .npz of images (arr_0), a folder of png or jpg,
or the demo's .npz. Numbers of the demo's own features are named FD(demo): no FID compares to them.
Every process reads a file whole: 50,000 images of 256 px take 9.8 GB, with PSNR twice that.

    python 05_eval_fid.py --run runs/xl --reference VIRTUAL_imagenet256_labeled.npz
    python 05_eval_fid.py --reference demo/reference_mnist.npz --features demo/features_mnist.pt
    torchrun --nproc_per_node=8 -- 05_eval_fid.py --run runs/xl --reference REFERENCE.npz
"""

import json
import re
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from common.artifacts import FORMAT, atomic_write, sha256_of
from common.cli import Parser, at_least, run_script, whole_number
from common.distributed import join_process_group
from common.errors import InputError
from common.feature_networks import check_fit, load_network, run_network
from common.images import save_rows
from common.inception import INCEPTION, INCEPTION_SHA
from common.metrics import coverage, frechet_distance, inception_score, moments, psnr
from common.parts import Parts
from common.score_files import (
    NAMES, STATISTICS, digest_of, read_reference, read_rows, read_samples,
)  # fmt: skip

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # known by name: we know no sha256 of it
PAPER = dict(  # Tables I and II; the guidance is the authors' release's (D16)
    num_images=[10_000], size=[(256, 256)], steps=[250, 100], cfg_scale=[1.5], cfg_channels=[3],
    classes=[None], vae=["mse"], dtype=["fp32"], engine=["float", "int8"],
)  # fmt: skip
TWIN_SETTINGS = ("num_images", "first", "seed", "steps", "cfg_scale", "cfg_channels", "vae")
TWIN_INPUTS = "checkpoint", "vae"
TABLE_KEY = ("feature_space", "features", "reference")
ROW_KEY = ("samples_sha256", "reference_sha256", "features_sha256")


def parse_args():
    p = Parser(__doc__)
    p.paper.add_argument("--reference", type=Path, required=True, help=".npz, or folder of images")
    p.paper.add_argument("--features", default="inception", help="or PATH of the demo's network")
    p.paper.add_argument("--inception", type=Path, help=f"{INCEPTION}; without it, downloaded")
    p.machine.add_argument("--batch-size", type=whole_number, default=64, help="images at a time")
    return p.parse_args()


def pick(row, keys):
    return tuple(row[key] for key in keys)


# ------------------------------------------------------------------------------------------------
# Scores of one file


def extract(network, images, head, path, batch_size, group):
    """What a reference holds, of images (N, H, W, C): statistics and features; and logits. All
    processes share the batches; rank 0 joins them, the others get {}."""
    parts = Parts(path, dict(settings=head, inputs={}), batch_size)
    starts, name = range(0, len(images), batch_size), head["file"]
    for at in group.bar(group.share(parts, starts), desc=f"05 {name}"):
        outputs = run_network(network, images[at : at + batch_size], name)
        parts.save(at, [x.cpu() for x in outputs])
    group.wait()
    if group.rank:
        return {}
    columns = zip(*map(parts.load, starts), strict=True)
    features, spatial, logits = (torch.cat(column).to(network.device) for column in columns)
    if not all(x.isfinite().all() for x in (features, spatial, logits)):
        raise InputError(f"{network.path} gives NaN or infinity for {name}: other --features?")
    (mu, sigma), (mu_s, sigma_s) = moments(features), moments(spatial)
    return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, features=features, logits=logits)


def compare(samples, file, twin):
    """(PSNR against the full-precision images, ""), or (None, why they do not pair up)."""
    if file == twin or not twin.exists():
        return None, "" if file == twin else f"no PSNR: no {twin.name}"
    other = read_samples(twin)
    a, b = samples["settings"], other["settings"]
    differ = [key for key in TWIN_SETTINGS if key not in a or a[key] != b.get(key)]
    a, b = samples["inputs"] or {}, other["inputs"] or {}
    known = a.keys() & b.keys()  # a VAE without --vae-path is the downloaded one
    differ += [f"{key}'s file" for key in TWIN_INPUTS if key in known and a[key] != b[key]]
    if samples["arr_0"].shape[1:] != other["arr_0"].shape[1:]:
        differ.append("size")
    if differ or not np.array_equal(samples["labels"], other["labels"]):
        return None, f"no PSNR: {', '.join(differ) or 'labels'} not as in {twin.name}"
    return psnr(samples["arr_0"], other["arr_0"]), ""


def unlike_paper(facts):
    """What keeps a score from standing beside those of Tables I and II."""
    return [key for key, allowed in PAPER.items() if facts.get(key) not in allowed]


def score(file, samples, made, reference, head):
    """The row of one file of samples: its metrics, and what they depend on."""
    pooled, spatial = STATISTICS[:2], STATISTICS[2:]
    fid = frechet_distance(*pick(made, pooled), *pick(reference, pooled))
    sfid = None
    if "mu_s" in reference:
        sfid = frechet_distance(*pick(made, spatial), *pick(reference, spatial))
    scores = fid, sfid, inception_score(made["logits"])
    row = head | dict(zip(NAMES[head["feature_space"]], scores, strict=True))
    ours = made["features"]
    real = torch.as_tensor(reference.get("features", ())).to(ours.device)
    row |= dict(precision=coverage(ours, real), recall=coverage(real, ours))
    row["psnr"], row["note"] = compare(samples, file, file.with_name("samples_fp.npz"))
    settings = samples["settings"] | {"name": file.stem.removeprefix("samples_")}
    row |= {key: settings.get(key) for key in ("name", "seed", "steps", "cfg_scale")}
    row |= {key: samples[key] for key in ("inputs", "model_bytes")}
    row["num_images"] = len(samples["arr_0"])
    differ = unlike_paper(settings | row | dict(size=samples["arr_0"].shape[1:3]))
    return row | dict(not_comparable=head["not_comparable"] + differ)


# ------------------------------------------------------------------------------------------------
# All rows


def describe(source, reference, network, is_inception):
    """The part that every row shares: by what it is scored."""
    digest = sha256(reference["arr_0"]).hexdigest() if source.is_dir() else sha256_of(source)
    common = dict(
        features=network.path.name,
        features_sha256=sha256_of(network.path),
        feature_space="inception" if is_inception else "demo",
        reference=source.name,
        reference_sha256=digest,
    )
    differ = [] if common["features_sha256"].startswith(INCEPTION_SHA) else ["features"]
    if source.name != ADM_REFERENCE or not reference.keys() >= set(STATISTICS):
        differ.append("reference")  # or its statistics were made here
    return common | dict(not_comparable=differ)


def print_table(rows):
    """One table for each feature network and reference."""
    rows = sorted(rows, key=lambda row: pick(row, TABLE_KEY))
    for (space, features, reference), group in groupby(rows, lambda row: pick(row, TABLE_KEY)):
        known = "not comparable with the paper's FID" if space == "demo" else "paper: N = 10,000"
        print(f"feature space: {space} ({features}), {known}; reference: {reference}")
        columns = ["num_images", "steps", "cfg_scale", *NAMES[space], "precision", "recall", "psnr"]
        group = list(group)
        wide = max(16, *(len(row["name"]) + 1 for row in group))
        print("name".ljust(wide) + "".join(f"{title:>11}" for title in [*columns, "MiB"]))
        for row in group:
            cells = [*map(row.get, columns), (row["model_bytes"] or 0) / 2**20 or None]
            cells = "".join("          -" if c is None else f"{c:11.5g}" for c in cells)
            differ = ", ".join(row["not_comparable"]) if space != "demo" else ""
            name, differ = row["name"].ljust(wide), differ and f"not comparable: {differ}"
            print(f"{name}{cells} ", row["note"], differ)


def by_bits(row):
    """FP first, then the most bits; of the same bits 03's, then the methods by name."""
    bits, _, tag = row["name"].partition("_")
    return row["name"] != "fp", [-int(bits) for bits in re.findall(r"\d+", bits)], tag, bits


def label_of(name):
    """Its bits and, on a line below, its method."""
    bits, _, tag = name.partition("_")
    return f"{bits.upper()}\n{tag}".strip()


def save_comparison(path, rows, digests, columns=10):
    """A labelled row of the first images of every model that was sampled from the same seeds."""
    there = [row for row in rows if digests.get(row["file"]) == row["samples_sha256"]]
    paired = [row for row in there if row["name"] == "fp" or row["psnr"] is not None] or there
    files = {row["name"]: path.with_name(row["file"]) for row in paired}
    images = {name: read_samples(f)["arr_0"][:columns].copy() for name, f in files.items()}
    save_rows(path, [(label_of(name), line) for name, line in images.items()], columns)


def check_all(network, reference, made_here, todo, folder):
    """InputError unless network, reference and samples go together; before any work."""
    wanted = {key: len(reference[key]) for key in ("mu", "mu_s") if key in reference}
    if made_here:
        wanted = check_fit(network, reference["arr_0"], "the reference", wanted)
    for head in todo:
        samples = read_samples(folder / head["file"])
        check_fit(network, samples["arr_0"], head["file"], wanted)


def score_run(args, files, group):
    """Score what is new of these files of samples, and write metrics.json and comparison.png."""
    path = args.run / "metrics.json"
    rows = sorted(read_rows(path), key=by_bits)
    reference = read_reference(args.reference)
    network = load_network(args.features, args.inception, args.device)
    common = describe(args.reference, reference, network, args.features == "inception")
    digests = {file.name: digest_of(file) for file in files}
    common["fp_sha256"] = digests.get("samples_fp.npz")  # for PSNR: another one, another row
    heads = [common | dict(file=name, samples_sha256=digest) for name, digest in digests.items()]
    known = set() if args.force else {pick(row, (*ROW_KEY, "fp_sha256")) for row in rows}
    todo = [head for head in heads if pick(head, (*ROW_KEY, "fp_sha256")) not in known]
    todo = group.agree(todo)  # another process may already write
    # what the reference does not hold is made of its images
    made_here = bool(todo) and "arr_0" in reference and "features" not in reference
    check_all(network, reference, made_here, todo, args.run)
    how = path, args.batch_size, group
    if made_here:
        head = common | dict(file="reference")
        reference = extract(network, reference["arr_0"], head, *how) | reference  # its own win
    reference.pop("arr_0", None)
    for head in todo:
        file = args.run / head["file"]
        samples = read_samples(file)
        if digest_of(file) != head["samples_sha256"]:
            raise InputError(f"{file} was replaced meanwhile: run again")
        made = extract(network, samples["arr_0"], head, *how)
        if group.rank == 0:
            new = score(file, samples, made, reference, head)
            rows = [new, *(row for row in rows if pick(row, ROW_KEY) != pick(new, ROW_KEY))]
            rows.sort(key=by_bits)
            with atomic_write(path) as out:
                out.write(json.dumps({"format": FORMAT, "rows": rows}, indent=1).encode())
    if group.rank == 0:
        Parts(path, dict(settings=common, inputs={})).clear()
        print_table(rows)
        save_comparison(args.run / "comparison.png", rows, digests)
        print(f"wrote {path} ({len(rows)} rows) and comparison.png.  Next: other bits, from 03 on")


def main(args):
    at_least(1, args, "batch_size")
    if args.inception and args.features != "inception":
        raise InputError("--inception and --features: give one network")
    files, group = sorted(args.run.glob("samples_*.npz")), join_process_group()
    if not files:
        raise InputError(f"no samples_*.npz in {args.run}: run 04_sample.py first")
    with group.alone_in(args.run):  # two runs would write one metrics.json
        score_run(args, files, group)


if __name__ == "__main__":
    run_script(main, parse_args)
