"""Phase 5: score every samples_*.npz of a run against a reference.

Paper: Sec. IV, Tables I-III, Fig. 6.  In: RUN/samples_*.npz, a reference.  Out: RUN/metrics.json,
a table, and RUN/comparison.png with a row of images for every model, from the same seeds.
FID, sFID, IS, precision, recall as in the ADM evaluator (openai/guided-diffusion); PSNR against
RUN/samples_fp.npz. The reference is ADM's .npz, an .npz of images (arr_0), a folder of png or jpg,
or the demo's .npz. Numbers of the demo's own features are named FD(demo): no FID compares to them.

    python 05_eval_fid.py --run runs/xl --reference VIRTUAL_imagenet256_labeled.npz
    python 05_eval_fid.py --reference demo/reference_mnist.npz --features demo/features_mnist.pt
    torchrun --nproc_per_node=8 -- 05_eval_fid.py --run runs/xl --reference REFERENCE.npz
"""

import json
from functools import partial
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from re import findall

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy.linalg import eigvals

import models_dit as dit

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # ADM's TensorFlow graph, ported to PyTorch
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
INCEPTION_SHA = "6726825d"
NAMES = {"inception": ("FID", "sFID", "IS"), "demo": ("FD(demo)", "sFD(demo)", "IS(demo)")}
POOLED, SPATIAL = itemgetter("mu", "sigma"), itemgetter("mu_s", "sigma_s")
GROUP = itemgetter("feature_space", "features", "reference")
ROW_KEY = itemgetter("samples_sha256", "reference_sha256", "features_sha256")
TWIN_SETTINGS = ("num_images", "first", "seed", "steps", "cfg_scale", "cfg_channels")


def parse_args():
    p = dit.Parser(__doc__)
    p.paper.add_argument("--reference", type=Path, required=True, help=".npz, or folder of images")
    p.paper.add_argument("--features", default="inception", help="or PATH of the demo's network")
    p.paper.add_argument("--inception", type=Path, help=f"{INCEPTION}; without it, downloaded")
    p.machine.add_argument("--batch-size", type=int, default=64, help="images at a time")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# Feature networks. Inception v3 runs from a state dict with torchvision's parameter names.

MEAN = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = partial(F.max_pool2d, kernel_size=3, stride=2)
BRANCHES_7 = "1x1 | 3x3_1 3x3_2a+3x3_2b | 3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b"
MIXED = (  # blocks; their branches, each a chain of convolutions, + for two side by side; the pool
    ("5b 5c 5d", "1x1 | 5x5_1 5x5_2 | 3x3dbl_1 3x3dbl_2 3x3dbl_3", MEAN),
    ("6a", "3x3 | 3x3dbl_1 3x3dbl_2 3x3dbl_3", HALVE),
    ("6b 6c 6d 6e", "1x1 | 7x7_1 7x7_2 7x7_3 | 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", MEAN),
    ("7a", "3x3_1 3x3_2 | 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", HALVE),
    ("7b", BRANCHES_7, MEAN),
    ("7c", BRANCHES_7, MAX),  # not an average: the 2015 graph has it so
)
STRIDED = ("1a_3x3", "6a.branch3x3", "6a.branch3x3dbl_3", "7a.branch3x3_2", "7a.branch7x7x3_4")
UNPADDED = (*STRIDED, "2a_3x3", "4a_3x3")


def conv(w, x, name):
    """Convolution, batch norm, ReLU."""
    weight = w[f"{name}.conv.weight"]
    padding = [0 if name.endswith(UNPADDED) else size // 2 for size in weight.shape[2:]]
    x = F.conv2d(x, weight, stride=2 if name.endswith(STRIDED) else 1, padding=padding)
    norm = [w[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(x, *norm, eps=1e-3))


def mixed(w, x, name, branches, pool):
    """Branches and a pool over the same input, joined on channels."""
    outputs = []
    for branch in branches.split("|"):
        h = [x]
        for step in branch.split():
            h = [conv(w, h[0], f"{name}.branch{part}") for part in step.split("+")]
        outputs += h
    pooled = pool(x) if pool is HALVE else conv(w, pool(x), f"{name}.branch_pool")
    return torch.cat([*outputs, pooled], dim=1)


def resize_matrix(size, new_size):
    """TensorFlow 1 bilinear: output i reads input i * size / new_size, no half-pixel centres."""
    at, eye = torch.arange(new_size) * torch.tensor(size / new_size), torch.eye(size)
    low = at.long()
    return torch.lerp(eye[low], eye[(low + 1).clamp(max=size - 1)], (at - low)[:, None])


def inception(w, images):
    """uint8 (N, H, W, C) -> pooled (N, 2048), spatial (N, 17 * 17 * 7), logits without the bias."""
    x = images.permute(0, 3, 1, 2).float()
    rows, columns = (resize_matrix(size, 299).to(x.device) for size in x.shape[2:])
    x = ((rows @ x @ columns.T - 128) / 128).expand(-1, 3, -1, -1)  # grey to (N, 3, 299, 299)
    for name in ("1a_3x3", "2a_3x3", "2b_3x3", "", "3b_1x1", "4a_3x3", ""):
        x = conv(w, x, f"Conv2d_{name}") if name else HALVE(x)
    for names, branches, pool in MIXED:
        for name in names.split():
            x = mixed(w, x, f"Mixed_{name}", branches, pool)
            if name == "6d":  # its first channels are branch1x1, TensorFlow's mixed_6/conv
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    pooled = x.mean(dim=(2, 3))
    return pooled, spatial, pooled @ w["fc.weight"].T


@torch.no_grad()
def load_network(args, device):
    """A function of uint8 images, and the path of its weights."""
    demo = args.features != "inception"
    path = Path(args.features) if demo else args.inception
    path = path or dit.download(INCEPTION_URL, INCEPTION, INCEPTION_SHA)
    try:
        w = {k: v.to(device) for k, v in dit.load_state(path, "feature network").items()}
        if not demo:
            inception(w, torch.zeros(1, 8, 8, 3, device=device))  # fails unless the weights fit
            return partial(inception, w), path
        width, channels = w["convs.0.weight"].shape[:2]
        net = dit.FeatureNet(channels, width, len(w["fc.weight"])).to(device).eval()
        net.load_state_dict(w)
        return (lambda images: net(images.permute(0, 3, 1, 2) / 127.5 - 1)), path
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise dit.InputError(f"{path} holds other weights: {str(error)[:200]}") from error


# ------------------------------------------------------------------------------------------------
# Metrics


def moments(features, rows=4096):
    """mu (D,) and unbiased sigma (D, D) of features (N, D), summed in float64 block by block."""
    mu = sum(part.double().sum(0) for part in features.split(rows)) / len(features)
    centred = (part.double() - mu for part in features.split(rows))
    sigma = sum(part.T @ part for part in centred) / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))  (Heusel et al., 2017); the
    root's trace is the sum of the roots of the eigenvalues, which are >= 0 but for rounding."""
    roots = np.sqrt(eigvals(sigma1 @ sigma2).real.clip(min=0))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * roots.sum())


def inception_score(logits, split=5000):
    """Mean over splits of exp(E_x KL(p(y|x) || p(y)))  (Salimans et al., 2016; splits as ADM)."""
    log_ps = [part.log_softmax(1) for part in logits.double().split(split)]  # (split, K)
    kl = [(p.exp() * (p - p.logsumexp(0) + np.log(len(p)))).sum(1).mean() for p in log_ps]
    return torch.stack(kl).exp().mean().item()


def coverage(points, centres, k=3, rows=1024):
    """Share of points no further from some centre than its k-th neighbour, itself not counted
    (Kynkaanniemi et al., 2019). In float64; the float16 distances of ADM are coarser."""
    if min(len(points), len(centres)) <= k:
        return None
    points, centres = points.double(), centres.double()  # (N, D), (M, D)
    near = [torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(rows)]
    inside = [(torch.cdist(part, centres) <= torch.cat(near)).any(1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def psnr(images, twins):
    """Mean of 10 log10(255^2 / max(mse, 1/12)); 1/12 is 8-bit rounding, so 58.9 dB is equal."""
    pairs = zip(images, twins, strict=True)
    mse = np.array([np.square(a.astype(np.float64) - b).mean() for a, b in pairs])
    return float((10 * np.log10(255**2 / mse.clip(min=1 / 12))).mean())


# ------------------------------------------------------------------------------------------------
# Files, and rows of metrics.json


def mapped(path, file):
    """arr_0 of the open .npz `file` at `path`: on disk as a memory map, if np.savez wrote uint8."""
    entry = file.zip.getinfo("arr_0.npy")
    with file.zip.open(entry) as member:
        np.lib.format.read_magic(member)
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        start = entry.header_offset + 30 + member.tell()  # zip: 30 bytes, two texts, the .npy
        if dtype != np.uint8 or entry.compress_type:
            return file["arr_0"]
        while member.read(1 << 20):  # raises at the end if the checksum is another
            pass
    file.fid.seek(entry.header_offset + 26)
    lengths = np.frombuffer(file.fid.read(4), "<u2")  # of the two texts
    return np.memmap(path, np.uint8, "r", start + int(lengths.sum()), shape)


def read(path, or_statistics=False):
    """Images arr_0 (N, H, W, C), of an .npz or a folder of png and jpg; and all else it holds."""
    try:
        if path.is_dir():
            opened = map(Image.open, sorted(path.glob("*.[pj]*g")))  # png, jpg, jpeg
            images = (image.convert("L" if image.mode == "L" else "RGB") for image in opened)
            arrays = {"arr_0": np.stack([np.atleast_3d(image) for image in images])}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {k: mapped(path, file) if k == "arr_0" else file[k] for k in file}
        arrays["meta"] = json.loads(str(arrays.get("meta", "{}")))
    except Exception as error:  # numpy, zipfile, zlib, PIL and json each raise their own
        raise dit.InputError(f"{path} cannot be read, make it again: {error}") from error
    images = arrays.get("arr_0", np.empty(0))
    statistics = or_statistics and "arr_0" not in arrays and {"mu", "sigma"} <= arrays.keys()
    good = images.dtype == np.uint8 and images.shape[3:] in ((1,), (3,)) and len(images) > 1
    if not good and not statistics:
        raise dit.InputError(f"{path}: {images.dtype} {images.shape} is not 2 or more uint8 images")
    return arrays


def read_rows(path):
    try:
        metrics = json.loads(path.read_text()) if path.exists() else {"format": 1, "rows": []}
        rows = metrics["rows"] if metrics["format"] == dit.FORMAT else None
        return [row for row in rows if GROUP(row) and ROW_KEY(row)]
    except (KeyError, TypeError, ValueError) as error:
        raise dit.InputError(f"{path} is damaged: move it away, then run again") from error


@torch.no_grad()
def extract(network, images, reference, head, args, world):
    """What a reference holds, of images (N, H, W, C): statistics and features; and logits. All
    processes share the batches; rank 0 joins them, the others get {}."""
    parts = dit.Parts(args.run / "metrics.json", dict(settings=head, inputs={}), args.batch_size)
    starts, name = range(0, len(images), args.batch_size), head["file"]
    mine = world.share(parts, starts)
    for at in world.bar(mine, desc=f"05 {name}"):
        try:
            batch = torch.tensor(images[at : at + args.batch_size], device=args.device)
            outputs = network(batch)
        except RuntimeError as error:  # other channels than it was trained on, or out of memory
            raise dit.InputError(f"{name} does not fit the feature network: {error}") from error
        keys = {"mu", "sigma", "features", "mu_s", "sigma_s"} if at == mine[0] else set()
        for key in reference.keys() & keys:
            have, need = reference[key].shape[-1], outputs[key.endswith("_s")].shape[1]
            if have != need or not torch.as_tensor(reference[key]).isfinite().all():
                what = f"{key} of the reference has {have} dimensions (or NaN), {name} has {need}"
                raise dit.InputError(f"{what}: make it with these --features and image size")
        parts.save(at, [x.cpu() for x in outputs])
    world.wait()
    if world.rank:
        return {}
    columns = zip(*map(parts.load, starts), strict=True)
    features, spatial, logits = (torch.cat(column).to(args.device) for column in columns)
    (mu, sigma), (mu_s, sigma_s) = moments(features), moments(spatial)
    return dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, features=features, logits=logits)


def compare(arrays, file, twin):
    """(PSNR against the full-precision images, ""), or (None, why they do not pair up)."""
    if file == twin or not twin.exists():
        return None, "" if file == twin else f"no PSNR: no {twin.name}"
    other = read(twin)
    a, b = (x["meta"].get("settings", {}) for x in (arrays, other))
    differ = [key for key in TWIN_SETTINGS if key not in a or a[key] != b.get(key)]
    if differ or not np.array_equal(arrays.get("labels"), other.get("labels")):
        return None, f"no PSNR: {', '.join(differ) or 'labels'} not as in {twin.name}"
    return psnr(arrays["arr_0"], other["arr_0"]), ""


def score(file, arrays, made, reference, args, head):
    """The row of one file of samples: its metrics, and what they depend on."""
    images, meta = arrays["arr_0"], arrays["meta"]
    fid = frechet_distance(*POOLED(made), *POOLED(reference))
    sfid = frechet_distance(*SPATIAL(made), *SPATIAL(reference)) if "mu_s" in reference else None
    values = fid, sfid, inception_score(made["logits"])
    row = head | dict(zip(NAMES[head["feature_space"]], values, strict=True))
    ours, real = made["features"], torch.as_tensor(reference.get("features", ())).to(args.device)
    row |= dict(precision=coverage(ours, real), recall=coverage(real, ours))
    row["psnr"], row["note"] = compare(arrays, file, file.with_name("samples_fp.npz"))
    settings = {"name": file.stem.removeprefix("samples_")} | meta.get("settings", {})
    row |= {key: settings.get(key) for key in ("name", "seed", "steps", "cfg_scale")}
    row |= {key: meta.get(key) for key in ("inputs", "model_bytes")} | {"num_images": len(images)}
    same_weights = head["features_sha256"].startswith(INCEPTION_SHA)
    return row | dict(comparable=same_weights and len(images) in (10_000, 50_000))  # ours, ADM's


def print_table(rows):
    """One table for each feature network and reference."""
    for (space, features, reference), group in groupby(sorted(rows, key=GROUP), GROUP):
        known = "not comparable with the paper's FID" if space == "demo" else "paper: N = 10,000"
        print(f"feature space: {space} ({features}), {known}; reference: {reference}")
        columns = ["num_images", "steps", "cfg_scale", *NAMES[space], "precision", "recall", "psnr"]
        print(f"{'name':16}" + "".join(f"{title:>11}" for title in [*columns, "MiB"]))
        for row in group:
            cells = [*map(row.get, columns), (row["model_bytes"] or 0) / 2**20 or None]
            cells = "".join("          -" if c is None else f"{c:11.5g}" for c in cells)
            comparable = "" if space == "demo" or row["comparable"] else "(N is not comparable)"
            print(f"{row['name']:16}{cells} ", row["note"], comparable)


def by_bits(row):
    """FP first, then the most bits."""
    return row["name"] != "fp", [-int(bits) for bits in findall(r"\d+", row["name"])], row["name"]


def save_comparison(path, rows, columns=10):
    """A labelled row of the first images of every model that was sampled from the same seeds."""
    paired = [row for row in rows if row["name"] == "fp" or row["psnr"] is not None] or rows
    files = {row["name"]: path.parent / row["file"] for row in paired}
    images = {name: read(f)["arr_0"][:columns] for name, f in files.items() if f.exists()}
    height, width = 64, 64 + 64 * columns  # of a row; the label takes one cell
    sheet = Image.new("RGB", (width, height * len(images)), "white")
    for i, (name, line) in enumerate(images.items()):
        ImageDraw.Draw(sheet).text((4, height * i + 24), name.upper(), fill="black")
        for j, image in enumerate(line):
            cell = Image.fromarray(image.squeeze()).convert("RGB").resize((62, 62))
            sheet.paste(cell, (64 + 64 * j, height * i))
    dit.write_atomic(path, lambda file: sheet.save(file, "png"))


def main(args):
    world, path, source = dit.World(), args.run / "metrics.json", args.reference
    rows, files = read_rows(path), sorted(args.run.glob("samples_*.npz"))
    if not files or args.batch_size < 1:
        raise dit.InputError(f"--batch-size < 1, or no samples_*.npz in {args.run}: run 04 first")
    reference = read(source, or_statistics=True)
    network, weights = load_network(args, args.device)
    common = dict(features=weights.name, features_sha256=dit.sha256_of(weights))
    common["feature_space"] = "inception" if args.features == "inception" else "demo"
    digest = sha256(reference["arr_0"]).hexdigest() if source.is_dir() else dit.sha256_of(source)
    common |= dict(reference=source.name, reference_sha256=digest)
    digests = {file: dit.sha256_of(file) for file in files}
    common["fp_sha256"] = digests.get(args.run / "samples_fp.npz")
    heads = [common | dict(file=file.name, samples_sha256=digests[file]) for file in files]
    known = {} if args.force else {ROW_KEY(row): row.get("fp_sha256") for row in rows}
    todo = world.agree([head for head in heads if known.get(ROW_KEY(head), 0) != head["fp_sha256"]])
    samples = [read(args.run / head["file"]) for head in todo]
    if todo and "arr_0" in reference and "features" not in reference:  # its own statistics win
        head = common | dict(file="reference")
        reference = extract(network, reference["arr_0"], reference, head, args, world) | reference
    for head, arrays in zip(todo, samples, strict=True):
        made = extract(network, arrays["arr_0"], reference, head, args, world)
        if world.rank == 0:
            new = score(args.run / head["file"], arrays, made, reference, args, head)
            rows = [new, *(row for row in rows if ROW_KEY(row) != ROW_KEY(new))]
            rows.sort(key=by_bits)
            text = json.dumps({"format": dit.FORMAT, "rows": rows}, indent=1).encode()
            dit.write_atomic(path, lambda out, text=text: out.write(text))
    if world.rank == 0:
        dit.Parts(path, dict(settings=common, inputs={})).clear()
        print_table(rows)
        save_comparison(args.run / "comparison.png", rows)
        print(f"wrote {path} ({len(rows)} rows) and comparison.png.  Next: other bits, from 03 on")


if __name__ == "__main__":
    dit.run_script(main, parse_args)
