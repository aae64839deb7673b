"""What the trajectories of Phase 1 start from, and sampling them again with another model.

A trajectory has an index; its label and its noise follow from that and the seed of calib.pt.
"""

import numpy as np
import torch

from common.errors import InputError
from models_dit import Diffusion, image_generators, trajectory

STREAM = 1  # of random numbers; the images of 04_sample.py come from stream 0
HELD_OUT = 16  # trajectories that only validation rows come from
LOT = 32  # trajectories that are sampled again at a time


def draw_labels(settings, num_classes):
    """(count,) labels of all trajectories, all classes equally often (but for the remainder), and
    the random generator for what is drawn next."""
    rng = np.random.default_rng([settings["seed"], STREAM])
    count = settings["trajectories"] + HELD_OUT
    rounds = [rng.permutation(num_classes) for _ in range(-(-count // num_classes))]
    return torch.from_numpy(np.concatenate(rounds)[:count]), rng


@torch.no_grad()
def pass_by(model, diffusion, indices, y, rows, settings, bar):
    """Phase 1's lines 4-5 once more, by this model, for the trajectories with these indices, in
    rising order, of labels y: the places of their rows, `mine`, and their x_t."""
    mine = torch.isin(rows["trajectory"], indices).nonzero()[:, 0]
    index, row_t = torch.searchsorted(indices, rows["trajectory"][mine]), rows["t"][mine]
    generators = image_generators(settings["seed"], indices.tolist(), STREAM)
    guidance = settings["cfg_scale"], settings["cfg_channels"]
    x = torch.empty(len(mine), model.in_channels, model.input_size, model.input_size)
    for t, x_t in trajectory(model, diffusion, y, generators, *guidance):
        if (row_t == t).any():
            x[row_t == t] = x_t.cpu()[index[row_t == t]]
        bar.update()
    return dict(mine=mine, x=x)


def sample_again(model, rows, settings, parts, group, device):
    """x_t (R, C, H, W) of the rows with this `trajectory` and `t`, as this model samples them: the
    labels and the noise are those of Phase 1. Kept in `parts` lot by lot: a killed run resumes."""
    lots = rows["trajectory"].unique().split(LOT)
    todo = [i for i in range(len(lots)) if not parts.has(f"x_{i}")]
    labels, _ = draw_labels(settings, model.num_classes)
    diffusion = Diffusion(settings["steps"], device)
    total = len(todo) * (diffusion.num_timesteps + 1)
    with group.bar(total=total, desc="trajectories", unit="step") as bar:
        for i in todo:
            y = labels[lots[i]].to(device)
            parts.save(f"x_{i}", pass_by(model, diffusion, lots[i], y, rows, settings, bar))
    found = [parts.load(f"x_{i}") for i in range(len(lots))]
    x, mine = (torch.cat([part[key] for part in found]) for key in ("x", "mine"))
    if not x.isfinite().all():
        raise InputError("sampling with the quantized model gave NaN or infinity: more bits?")
    return x[mine.argsort()]
