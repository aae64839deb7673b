"""Phase 1: collect calibration tuples (x_t, t, y) along full-precision sampling trajectories.

Paper: Sec. III-A, Alg. 1 lines 3-8, Eq. (9)-(10).  In: a DiT checkpoint.  Out: RUN/calib.pt.
Which (trajectory, t) pairs are kept is drawn before sampling, so memory is O(n G), not O(T).
Next: 02_grad_cache.py.

    python 01_collect_calib.py --run runs/xl                                    # DiT-XL/2, 256 px
    python 01_collect_calib.py --run runs/mine --ckpt mine.pt --num-heads 8 --vae none
"""

import math

import numpy as np
import torch
from tqdm import tqdm

from models_dit import (
    DIT_URL, Diffusion, DiT_models, InputError, Parser, Parts, already_made, at_least_one, download,
    header, image_generators, load_dit, run_script, save_artifact, sha256_of, trajectory,
)
from quant_ops import time_group

STREAM = 1  # of random numbers; the images of 04_sample.py come from stream 0
HELD_OUT = 16  # trajectories that only validation rows come from
HELD_OUT_PER_GROUP = 8  # validation rows of each time group


def parse_args():
    p = Parser(__doc__)
    p.paper.add_argument("--model", choices=sorted(DiT_models), help="checked against --ckpt")
    p.paper.add_argument("--ckpt", help="DiT checkpoint; without it DiT-XL/2 is downloaded")
    p.paper.add_argument("--image-size", type=int, choices=(256, 512), default=256)
    p.paper.add_argument("--num-heads", type=int, help="if the width is no official one")
    p.paper.add_argument("--vae", choices=("mse", "ema", "none"), default="mse", help="or pixels")
    p.paper.add_argument("--steps", type=int, default=250, help="T, Sec. IV-A: 250 or 100")
    p.paper.add_argument("--groups", type=int, default=10, help="G, Sec. IV-A")
    p.paper.add_argument("--per-group", type=int, default=32, help="n, Sec. IV-A")
    p.paper.add_argument("--trajectories", type=int, default=64, help="to draw the n G tuples from")
    p.paper.add_argument("--cfg-scale", type=float, default=1.5, help="1 turns guidance off (D3)")
    p.paper.add_argument("--cfg-channels", type=int, default=3, help="guided channels of eps (D3)")
    p.paper.add_argument("--seed", type=int, default=0)
    p.machine.add_argument("--batch-size", type=int, default=32, help="trajectories at a time")
    return p.parse_args()


def check(args):
    if not 1 <= args.groups <= args.steps:
        raise InputError(f"--groups {args.groups}: G must be 1..T, and T is {args.steps}")
    at_least_one(args, "per_group", "trajectories", "batch_size")
    if args.trajectories * (args.steps // args.groups) < args.per_group:
        raise InputError(f"--per-group {args.per_group} needs more --trajectories")
    if args.seed < 0 or args.cfg_channels < 1 or not math.isfinite(args.cfg_scale):
        raise InputError("--seed >= 0, --cfg-channels >= 1 and a finite --cfg-scale are needed")


def draw_rows(rng, args, trajectories, per_group, labels, null_label):
    """Alg. 1 lines 6-8: n distinct (trajectory, t) pairs of every group, Eq. (9)-(10).

    Returns a dict of (n G,) tensors: trajectory, t, group, y. With guidance every second tuple
    carries the null label, because guided sampling asks the network under both (D3).
    """
    t_all = np.arange(args.steps)
    picked = []
    for i in range(args.groups):
        t_i = t_all[time_group(t_all, args.steps, args.groups) == i]
        pairs = rng.choice(len(trajectories) * len(t_i), per_group, replace=False)
        picked.append(np.stack([trajectories[pairs // len(t_i)], t_i[pairs % len(t_i)]]))
    row_trajectory, t = torch.from_numpy(np.concatenate(picked, axis=1))
    null = (torch.arange(len(t)) % per_group % 2 == 1) & (args.cfg_scale != 1)
    y = torch.where(null, null_label, labels[row_trajectory])
    return dict(trajectory=row_trajectory, t=t, group=time_group(t, args.steps, args.groups), y=y)


def draw_labels(rng, count, num_classes):
    """(count,) labels, all classes equally often (but for the remainder)."""
    rounds = [rng.permutation(num_classes) for _ in range(-(-count // num_classes))]
    return torch.from_numpy(np.concatenate(rounds)[:count])


@torch.no_grad()
def collect(model, diffusion, args, first, y, rows, bar):
    """Alg. 1 lines 4-5 for the trajectories first, first + 1, ...: x_t and x_0 of the kept rows."""
    mine = (rows["trajectory"] >= first) & (rows["trajectory"] < first + len(y))
    mine = mine.nonzero()[:, 0]
    index, row_t = rows["trajectory"][mine] - first, rows["t"][mine]
    generators = image_generators(args.seed, range(first, first + len(y)), STREAM)
    x = torch.empty(len(mine), model.in_channels, model.input_size, model.input_size)
    for t, x_t in trajectory(model, diffusion, y, generators, args.cfg_scale, args.cfg_channels):
        if (row_t == t).any():
            x[row_t == t] = x_t.cpu()[index[row_t == t]]
        bar.update()
    return dict(mine=mine, x=x, x_0=x_t.cpu()[index])


def collect_all(model, args, labels, rows, parts):
    """Fill rows["x"] and rows["x_0"], (R, C, H, W), one batch of trajectories after the other."""
    diffusion = Diffusion(args.steps, labels.device)
    shape = (len(rows["t"]), model.in_channels, model.input_size, model.input_size)
    rows["x"], rows["x_0"] = torch.empty(shape), torch.empty(shape)
    batches = labels.split(args.batch_size)
    todo = [i for i in range(len(batches)) if not parts.has(i)]
    with tqdm(total=len(todo) * (args.steps + 1), desc="01 trajectories", unit="step") as bar:
        for i in todo:
            part = collect(model, diffusion, args, i * args.batch_size, batches[i], rows, bar)
            parts.save(i, part)
    for part in map(parts.load, range(len(batches))):
        rows["x"][part["mine"]], rows["x_0"][part["mine"]] = part["x"], part["x_0"]
    if not (rows["x"].isfinite().all() and rows["x_0"].isfinite().all()):
        raise InputError("sampling gave NaN or infinity: is the checkpoint whole?")


def find_checkpoint(args):
    """The path of the checkpoint, downloaded if none was named."""
    if args.ckpt:
        return args.ckpt
    if args.model not in (None, "DiT-XL/2"):
        raise InputError(f"{args.model} has no public weights: give --ckpt")
    url = DIT_URL.format(args.image_size)
    return str(download(url, url.rpartition("/")[2]))


def check_model(args, config):
    channels = config["in_channels"]
    if channels not in ((1, 3) if args.vae == "none" else (4,)):
        raise InputError(f"--vae {args.vae} does not go with the checkpoint's {channels} channels")
    for key, value in DiT_models.get(args.model, {}).items():
        if config[key] != value:
            raise InputError(f"--model {args.model} has {key} {value}, --ckpt has {config[key]}")


def main(args):
    check(args)
    ckpt = find_checkpoint(args)
    model, config = load_dit(ckpt, args.num_heads)
    check_model(args, config)
    knobs = "steps groups per_group trajectories cfg_scale cfg_channels seed vae"
    settings = {key: getattr(args, key) for key in knobs.split()}
    settings |= dict(ckpt=str(ckpt), config=config)
    head = header("calib", settings, {"checkpoint": sha256_of(ckpt)}, args.device)
    path = args.run / "calib.pt"
    parts = Parts(path, head, args.batch_size)
    if already_made(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    rng = np.random.default_rng([args.seed, STREAM])
    classes, count = config["num_classes"], args.trajectories + HELD_OUT
    labels = draw_labels(rng, count, classes)
    used, spare = np.arange(args.trajectories), np.arange(args.trajectories, count)
    calibration = draw_rows(rng, args, used, args.per_group, labels, classes)
    validation = draw_rows(rng, args, spare, HELD_OUT_PER_GROUP, labels, classes)
    rows = {key: torch.cat([calibration[key], validation[key]]) for key in calibration}
    collect_all(model.to(args.device), args, labels.to(args.device), rows, parts)
    split = len(calibration["t"])
    head["calibration"] = {key: value[:split].clone() for key, value in rows.items()}
    head["validation"] = {key: value[split:].clone() for key, value in rows.items()}
    wrote = save_artifact(path, head)
    parts.clear()
    print(f"{wrote}, n G = {split} rows.  Next: python 02_grad_cache.py --run {args.run}")


if __name__ == "__main__":
    run_script(main, parse_args)
