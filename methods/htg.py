"""HTG, hierarchical timestep grouping (arXiv 2503.06930); a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_htg.pt, for `04 --tag htg`.
Channels of inputs are off-centre, and drift with t. For qkv, proj and fc1, each layer on its own:

    z_t     centre of every channel at timestep t, (max + min) / 2 (Eq. 2)
    groups  neighbouring timesteps, merged pairwise, those first whose centres differ least (Alg. 1)
    zbar_g  mean of z_t over a group (Eq. 4); x_hat = (x - zbar_g) / s, bias + W zbar_g, W s
    s       one for all t, from an exponential average over timesteps (Eq. 7)

s is folded into adaLN before qkv and fc1; zbar_g, which differs from group to group, is taken off
at run time, for adaLN knows no time group. There is no code of the authors; unclear is:

    s, read in two ways   balanced: m from t = T-1 down to 0, sqrt(m / max_i |W_ij|); relative: m of
                          |x - zbar_g| from 0 up, m / max m. On the demo these two and --decay none
                          are within 0.3 dB of each other at every width
    other layers          uniform, min-max, one scale a tensor; all weights by output channel, GPTQ
    ends of channels      of the rows of calib.pt, one or two a timestep; not of 32 images at each
    s before proj         divided by at run time: no adaLN stands there
    how many groups       --timestep-groups 10; re-implementations take T / 10

    python methods/htg.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py   --run runs/xl --wbits 4 --abits 8 --tag htg
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import quant_file  # noqa: E402
from common.cli import (  # noqa: E402
    Parser, at_least, check_method_flags, model_name, run_script, settings_of, whole_number,
)  # fmt: skip
from common.errors import InputError  # noqa: E402
from common.phase3 import Machine, Phase3  # noqa: E402
from common.quantizers import ScaledInput  # noqa: E402
from common.report import linear_cost, matmul_cost  # noqa: E402
from methods.balancing import by_timestep, channel_ends, fold_into_adaln, tokens_of  # noqa: E402
from methods.rounding import gram, rounded_to  # noqa: E402
from models_dit import Diffusion, MatMul  # noqa: E402
from quant_ops import (  # noqa: E402
    FullPrecision, UniformQuantizer, qparams_from_range, uniform_candidates,
)  # fmt: skip

SHIFTED = "attn.qkv", "attn.proj", "mlp.fc1"


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    timestep_groups: int
    decay: float
    factors: str
    rounding: str
    layers: str
    rows: int | None
    tag: str


class Grouped(NamedTuple):
    """What HTG finds for a layer: for each of G_l groups of timesteps a centre and a range."""

    regroup: torch.Tensor  # (T,), group of every timestep
    centre: torch.Tensor  # (G_l, I)
    factors: torch.Tensor  # (I,)
    Q_X: UniformQuantizer  # Delta (G_l,)


def parse_args():
    p = Parser(__doc__)
    p.add_method_flags("htg", own="all that multiply")
    groups = "groups a layer merges its timesteps into"
    p.paper.add_argument("--timestep-groups", type=whole_number, default=10, help=groups)
    decay = "of the exponential average over timesteps; none: the plain mean"
    p.paper.add_argument("--decay", type=decay_or_mean, default=0.99, help=decay)
    p.ours.add_argument("--factors", choices=("balanced", "relative"), default="balanced", help="s")
    p.ours.add_argument("--rounding", choices=("gptq", "nearest"), default="gptq", help="weights")
    return p.parse_args()


def decay_or_mean(text):
    return None if text == "none" else float(text)


def check(args):
    check_method_flags(args)
    at_least(1, args, "timestep_groups")
    if args.decay is not None and not 0 <= args.decay < 1:
        raise InputError(f"--decay {args.decay}: 0 or more, below 1, or none")


# ------------------------------------------------------------------------------------------------
# Groups, centres, factors


def merge_timesteps(z, count):
    """Alg. 1: which of `count` groups each of z (V, I), in the order of timesteps, is in, (V,):
    the two neighbouring groups whose mean centres are nearest become one, until so many are left.
    """
    groups = [[i] for i in range(len(z))]
    means = [*z.double()]
    while len(groups) > count:
        gaps = torch.stack([(a - b).square().sum() for a, b in zip(means, means[1:], strict=False)])
        i = int(gaps.argmin())
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
        means[i : i + 2] = [z[groups[i]].double().mean(dim=0)]
    return torch.cat([torch.full((len(g),), i) for i, g in enumerate(groups)])


def averaged(values, decay):
    """m (I,) of values (V, I): m = decay m + (1 - decay) v, beginning with the first row."""
    if decay is None:
        return values.mean(dim=0)
    m = values[0]
    for value in values[1:]:
        m = decay * m + (1 - decay) * value
    return m


def channel_factors(low, high, centre, weight, cfg):
    """s (I,) of ends (V, I) in the order of timesteps, the centres (V, I) of their groups, and a
    weight (O, I)."""
    if cfg.factors == "balanced":  # Eq. (7), from the noisy end
        m = averaged(((high - low) / 2).flip(0), cfg.decay)
        s = (m.clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
    else:
        m = averaged(torch.maximum(high - centre, centre - low), cfg.decay)
        s = m / m.max().clamp(min=1e-5)
    return s.clamp(min=1e-5)


def nearest_visited(visited, steps):
    """(T,) place in `visited` of the nearest timestep that calibration rows have."""
    return (torch.arange(steps)[:, None] - visited).abs().argmin(dim=1)


def find_groups(layer, data, t, steps, cfg):
    """The `Grouped` of a layer whose rows have timesteps t (N,) of `steps`."""
    visited, low, high = by_timestep(*channel_ends(data, len(t)), t)
    z = (low + high) / 2  # Eq. (2)
    group = merge_timesteps(z.cpu(), cfg.timestep_groups)
    mine = [(group == g).to(z.device) for g in range(int(group.max()) + 1)]
    centre = torch.stack([z[rows].mean(dim=0) for rows in mine])  # Eq. (4)
    s = channel_factors(low, high, centre[group.to(z.device)], layer.module.weight.detach(), cfg)
    ends = [((low[r] - c) / s, (high[r] - c) / s) for r, c in zip(mine, centre, strict=True)]
    lows = torch.stack([low.min() for low, _ in ends])
    highs = torch.stack([high.max() for _, high in ends])
    Q_X = UniformQuantizer(cfg.abits, *qparams_from_range(lows, highs, cfg.abits))
    return Grouped(group[nearest_visited(visited, steps)], centre, s, Q_X)


# ------------------------------------------------------------------------------------------------
# Layers


def as_grouped(data, found, t, weight):
    """The layer's data with its own groups, and the output that x - zbar_g has to give."""
    rows = found.regroup[t].repeat_interleave(tokens_of(data, len(t)))
    groups = rows.split([len(c.x) for c in data.chunks])
    offset = (found.centre @ weight.T).cpu()
    chunks = [
        chunk._replace(group=group, out=chunk.out - offset[group])
        for chunk, group in zip(data.chunks, groups, strict=True)
    ]
    return replace(data, chunks=chunks, num_groups=len(found.centre))


def rounded(weight, Q_W, data, act, cfg):
    """The weight on its grid."""
    return rounded_to(Q_W, weight, gram=gram(data, act) if cfg.rounding == "gptq" else None)


def quantize_shifted(layer, data, cfg, t, steps):
    """A layer with groups of its own: state and cost."""
    found, weight = find_groups(layer, data, t, steps, cfg), layer.module.weight.detach()
    act = ScaledInput(found.Q_X, found.factors, found.centre)
    data = as_grouped(data, found, t, weight)
    scaled = weight * found.factors
    Q_W = uniform_candidates(*scaled.aminmax(dim=1, keepdim=True), cfg.wbits)[0]
    W_hat = rounded(scaled, Q_W, data, act, cfg)
    more = dict(shift=found.centre, bias=layer.module.bias.detach() + found.centre @ weight.T)
    how = W_hat, Q_W, found.Q_X, found.factors
    state = quant_file.linear_state(layer.module, *how, regroup=found.regroup, **more)
    return dict(state=state, cost=linear_cost(data, W_hat, act))


def quantize_plain(layer, data, cfg):
    """Any other linear layer, or a product of activations: min-max, one scale a tensor."""

    def min_max(name):
        return uniform_candidates(*data.range(name), cfg.abits)[0]

    if isinstance(layer.module, MatMul):
        Q_A, Q_B = min_max("a"), min_max("b")
        return dict(state=quant_file.matmul_state(Q_A, Q_B), cost=matmul_cost(data, Q_A, Q_B))
    image = layer.spec.reads_image and cfg.layers == "released"  # D6
    Q_X = FullPrecision() if image else min_max("x")
    weight = layer.module.weight.detach().flatten(1)
    Q_W = uniform_candidates(*weight.aminmax(dim=1, keepdim=True), cfg.wbits)[0]
    W_hat = rounded(weight, Q_W, data, Q_X, cfg)
    state = quant_file.linear_state(layer.module, W_hat, Q_W, Q_X)
    return dict(state=state, cost=linear_cost(data, W_hat, Q_X))


def edit(file, steps):
    """Fold s into adaLN; tell layers the timestep in place of the time group."""
    fold_into_adaln(file)
    file["group_table"] = quant_file.group_table(Diffusion(steps).timestep_map, steps)


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    phase3 = Phase3(args.run, model_name(args), "htg", cfg._asdict(), machine, gradients=False)
    if phase3.is_done():
        return
    steps = phase3.calib["settings"]["steps"]
    t = phase3.timesteps()
    for unit in phase3.units():
        done = {}
        for layer in phase3.layers(unit, conditioning=cfg.layers == "own"):
            quantize, more = quantize_plain, ()
            if layer.spec.name in SHIFTED:
                quantize, more = quantize_shifted, (t, steps)
            done[layer.name] = quantize(layer, phase3.data(layer), cfg, *more)
        phase3.save(unit, done)
    phase3.finish(partial(edit, steps=steps))


if __name__ == "__main__":
    run_script(main, parse_args)
