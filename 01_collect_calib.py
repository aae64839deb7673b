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

from common.artifacts import is_up_to_date, load_hashed, provenance, save_artifact
from common.checkpoints import check_model, find_checkpoint, load_dit
from common.cli import Parser, at_least, run_script, whole_number
from common.errors import InputError
from common.parts import Parts
from common.trajectories import STREAM, draw_labels
from models_dit import TRAIN_TIMESTEPS, Diffusion, DiT_models, image_generators, trajectory
from quant_ops import time_group

HELD_OUT_PER_GROUP = 8  # validation rows of each time group
SETTINGS = (
    "steps", "groups", "per_group", "trajectories", "cfg_scale", "cfg_channels", "seed", "vae",
)  # fmt: skip


def parse_args():
    p = Parser(__doc__)
    p.paper.add_argument("--steps", type=whole_number, default=250, help="T, Sec. IV-A: 250 or 100")
    p.paper.add_argument("--groups", type=whole_number, default=10, help="G, Sec. IV-A")
    p.paper.add_argument("--per-group", type=whole_number, default=32, help="n, Sec. IV-A")
    p.paper.add_argument("--model", choices=sorted(DiT_models), help="checked against --ckpt")
    p.paper.add_argument("--ckpt", help="official or diffusers; without it DiT-XL/2 is downloaded")
    size = "pixels; default: the checkpoint's, or 256"
    p.paper.add_argument("--image-size", type=int, choices=(256, 512), help=size)
    p.ours.add_argument("--num-heads", type=whole_number, help="where the width is no official one")
    p.ours.add_argument("--vae", choices=("mse", "ema", "none"), default="mse", help="none: pixels")
    p.ours.add_argument("--cfg-scale", type=float, default=1.5, help="1 turns guidance off (D3)")
    p.ours.add_argument("--cfg-channels", type=whole_number, default=3, help="of eps, guided (D3)")
    p.ours.add_argument("--trajectories", type=whole_number, default=64, help="to draw from (D13)")
    p.ours.add_argument("--seed", type=whole_number, default=0, help="of labels, tuples, noise")
    p.machine.add_argument("--batch-size", type=whole_number, default=32, help="trajectories")
    return p.parse_args()


def check(args):
    at_least(1, args, "steps", "groups", "per_group", "trajectories", "batch_size")
    if args.steps > TRAIN_TIMESTEPS:
        raise InputError(f"--steps {args.steps}: T must be 1..{TRAIN_TIMESTEPS}")
    if args.groups > args.steps:
        raise InputError(f"--groups {args.groups}: G must be 1..T, and T is {args.steps}")
    if args.trajectories * (args.steps // args.groups) < args.per_group:  # in the smallest group
        raise InputError(f"--per-group {args.per_group} needs more --trajectories")
    if args.trajectories > 10**6:
        raise InputError(f"--trajectories {args.trajectories}: at most a million")
    if args.seed < 0 or args.cfg_channels < 1 or not math.isfinite(args.cfg_scale):
        raise InputError("--seed >= 0, --cfg-channels >= 1 and a finite --cfg-scale are needed")


def draw_tuples(rng, T, G, n, trajectories, labels, null_label=None):
    """Alg. 1 lines 6-8: which n distinct (trajectory, t) of every time group to keep, Eq. (9)-(10).

    Returns a dict of (n G,) tensors: trajectory, t in 0..T-1, group in 0..G-1, y. Given a null
    label, every second tuple of a group carries it, as guided sampling asks under both (D3).
    """
    t_all, picked = np.arange(T), []
    for i in range(G):  # line 6
        t_i = t_all[time_group(t_all, T, G) == i]  # line 7, Eq. (9)
        pairs = rng.choice(len(trajectories) * len(t_i), n, replace=False)  # line 8
        picked.append(np.stack([trajectories[pairs // len(t_i)], t_i[pairs % len(t_i)]]))
    row_trajectory, t = torch.from_numpy(np.concatenate(picked, axis=1))  # Eq. (10): n G tuples
    y = labels[row_trajectory]
    if null_label is not None:
        y = torch.where(torch.arange(len(t)) % n % 2 == 1, null_label, y)
    return dict(trajectory=row_trajectory, t=t, group=time_group(t, T, G), y=y)


@torch.no_grad()
def collect(model, diffusion, first, y, rows, settings, bar):
    """Alg. 1 lines 4-5 for the trajectories first, first + 1, ... of labels y: the kept rows."""
    mine = (rows["trajectory"] >= first) & (rows["trajectory"] < first + len(y))
    mine = mine.nonzero()[:, 0]
    index, row_t = rows["trajectory"][mine] - first, rows["t"][mine]
    generators = image_generators(settings["seed"], range(first, first + len(y)), STREAM)
    guidance = settings["cfg_scale"], settings["cfg_channels"]
    x = torch.empty(len(mine), model.in_channels, model.input_size, model.input_size)
    for t, x_t in trajectory(model, diffusion, y, generators, *guidance):  # line 4: T-1..0, x_0
        if (row_t == t).any():
            x[row_t == t] = x_t.cpu()[index[row_t == t]]  # line 5
        bar.update()
    return dict(mine=mine, x=x, x_0=x_t.cpu()[index])  # x_t is the last that came, x_0


def collect_all(model, batches, rows, settings, parts):
    """Fill rows["x"] and rows["x_0"], (R, C, H, W), one batch of trajectories after the other."""
    diffusion = Diffusion(settings["steps"], batches[0].device)
    shape = (len(rows["t"]), model.in_channels, model.input_size, model.input_size)
    rows["x"], rows["x_0"] = torch.empty(shape), torch.empty(shape)
    starts = range(0, sum(map(len, batches)), len(batches[0]))
    todo = [i for i in range(len(batches)) if not parts.has(i)]
    total = len(todo) * (diffusion.num_timesteps + 1)
    with tqdm(total=total, desc="01 trajectories", unit="step") as bar:
        for i in todo:
            parts.save(i, collect(model, diffusion, starts[i], batches[i], rows, settings, bar))
    for part in map(parts.load, range(len(batches))):
        rows["x"][part["mine"]], rows["x_0"][part["mine"]] = part["x"], part["x_0"]
    if not (rows["x"].isfinite().all() and rows["x_0"].isfinite().all()):
        raise InputError("sampling gave NaN or infinity: is the checkpoint whole?")


def main(args):  # Alg. 1 line 3
    check(args)
    size = args.image_size or 256
    ckpt = find_checkpoint(args.ckpt, args.model, size)
    how = args.num_heads, size // 8  # 8: the VAE's
    (model, config), digest = load_hashed(ckpt, lambda path: load_dit(path, *how))
    check_model(config, args.model, args.vae, args.image_size)
    settings = {key: getattr(args, key) for key in SETTINGS} | dict(ckpt=str(ckpt), config=config)
    head = provenance("calib", settings, {"checkpoint": digest}, args.device)
    path = args.run / "calib.pt"
    parts = Parts(path, head, args.batch_size)
    if is_up_to_date(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    parts.claim()
    labels, rng = draw_labels(settings, config["num_classes"])
    null = config["num_classes"] if args.cfg_scale != 1 else None
    used, spare = np.split(np.arange(len(labels)), [args.trajectories])
    kept = draw_tuples(rng, args.steps, args.groups, args.per_group, used, labels, null)
    held = draw_tuples(rng, args.steps, args.groups, HELD_OUT_PER_GROUP, spare, labels, null)
    rows = {key: torch.cat([kept[key], held[key]]) for key in kept}
    batches = labels.to(args.device).split(args.batch_size)
    collect_all(model.to(args.device), batches, rows, settings, parts)
    n_g = len(kept["t"])
    head["calibration"] = {key: value[:n_g].clone() for key, value in rows.items()}
    head["validation"] = {key: value[n_g:].clone() for key, value in rows.items()}
    wrote = save_artifact(path, head)
    parts.clear()
    print(f"{wrote}, n G = {n_g} rows.  Next: python 02_grad_cache.py --run {args.run}")


if __name__ == "__main__":
    run_script(main, parse_args)
