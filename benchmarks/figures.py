"""Pictures of a finished run: after the paper's Fig. 2, 3 and 6, and the error of every layer.

fig2_histograms: values after softmax and GELU, with the regions and the levels that MRQ chose.
fig3_softmax_over_time: channel maxima after softmax over t, with s_1 of every time group.
fig6_samples: the same seeds under several models.
layer_error: where HO, MRQ and TGQ change the weighted output error; drawn last, in layer_error.py.
Needs what `make tables` leaves in RUN. Run it from the repository root, to which the checkpoint's
path is relative.

    python benchmarks/figures.py --run runs/tables/quick/T100_seed0
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from layer_error import BLUE, DPI, INK, InputError, canvas, layer_error, need, save

from common.checkpoints import load_calib, load_calibrated
from common.cli import run_script
from common.quant_file import load_quant
from models_dit import Diffusion, explicit_products
from quant_ops import time_group

MODELS = "w8a8 w6a6 w6a6_plus w4a8 w4a8_plus".split()
HAZE, EDGE = "#7f9db9", "#c04a00"
PALE, LOW, HIGH = "#eef1f5", "#d3e6f5", "#fcebdc"  # shades of groups, of R1, of R2


def softmax_border(scale1, bits):
    """Where R2 begins after softmax (D8), shaped like scale1: half a step past R1's last level."""
    return ((2 ** (bits - 1) - 0.5) * scale1).clamp(min=0.5**bits)


def softmax_levels(scale1, bits):
    """The values of MRQ after softmax (D8), ascending: of R2's those past R1; scale1 is ()."""
    half = 2 ** (bits - 1)
    low, high = torch.arange(half) * scale1, torch.arange(1, half + 1) / half
    return torch.cat([low, high[high + 0.5 / half > softmax_border(scale1, bits)]])


def gelu_levels(scale1, scale2, bits):
    """The 2^k values of MRQ after GELU (D9), ascending; the scales are () each."""
    levels = torch.arange(2**bits) - 2 ** (bits - 1)
    return levels * torch.where(levels < 0, scale1, scale2)


@torch.no_grad()
def record(calib, blocks, per_group):
    """t (R,) of the first calibration rows of every group, and the full-precision inputs by
    (block, layer): of "av" (R, H, S, S), softmax outputs; of "fc2" (R, S, 4 D), GELU outputs."""
    model, rows, kept = explicit_products(load_calibrated(calib)), calib["calibration"], {}
    for i in blocks:
        for layer in (model.blocks[i].attn.av, model.blocks[i].mlp.fc2):
            seen = kept[i, "av" if layer is model.blocks[i].attn.av else "fc2"] = []
            layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
    place = torch.cat([torch.arange(int(n)) for n in rows["group"].bincount()])
    x, t, y = (rows[key][place < per_group] for key in ("x", "t", "y"))
    told = Diffusion(calib["settings"]["steps"]).timestep_map[t]
    for batch in zip(x.split(16), told.split(16), y.split(16), strict=True):
        model(*batch)
    return t, {key: torch.cat(seen) for key, seen in kept.items()}


def histogram(ax, values, levels, border):
    """Log-scaled counts of values (R,); shades of R1 and R2; above, the levels in view as a rug."""
    low, high = values.min(), values.max()
    count, *_ = ax.hist(values, np.linspace(low, high, 101), color=HAZE, log=True)
    above = ax.get_xaxis_transform()  # x in data, y in axes
    for name, left, right, color in ("R1", low, border, LOW), ("R2", border, high, HIGH):
        ax.axvspan(max(left, levels[0]), min(right, levels[-1]), color=color, zorder=0, lw=0)
        if right - left > 0.05 * (high - low):
            ax.text(left + 0.012 * (high - low), 0.91, name, transform=above)
    levels = levels[(levels >= low) & (levels <= high)]
    ax.vlines(levels, 1.015, 1.055, INK, lw=0.8, transform=above, clip_on=False)
    ax.set(xlim=(low, high), ylim=(None, 8 * count.max()))


def draw_histograms(quant, kept, block, info):
    """Fig. 2 for one block. With several groups the shades and the rug are the median group's."""
    bits, layers = quant["settings"]["abits"], quant["layers"]
    scale1 = layers[f"blocks.{block}.attn.av"]["a"]["scale1"]
    act = layers[f"blocks.{block}.mlp.fc2"]["act"]
    fig = canvas(4, f"Values after softmax and GELU in block {block}, and MRQ's regions", info)
    left, right = fig.subplots(1, 2)
    levels = softmax_levels(scale1.median(), bits).numpy()
    border = softmax_border(scale1.reshape(-1), bits)
    histogram(left, kept[block, "av"].flatten().numpy(), levels, border.median().item())
    edges = list(zip(*(x.tolist() for x in border.unique(return_counts=True)), strict=True))
    text = "".join(f"\n{edge:.3f} in {n} of {len(border)} groups" for edge, n in edges)
    where = dict(ha="right", va="top", transform=left.transAxes)
    left.text(0.97, 0.8, f"R2 begins at{text}", color=EDGE, **where)
    for edge, _ in edges:
        left.axvline(edge, color=EDGE, lw=1.5)
    levels = gelu_levels(act["scale1"].median(), act["scale2"].median(), bits).numpy()
    values = kept[block, "fc2"].flatten().numpy()
    near = values[values < -2 * values.min()]
    for ax, part in (right, values), (right.inset_axes([0.42, 0.38, 0.58, 0.46]), near):
        histogram(ax, part, levels, 0)
        ax.axvline(0, color=EDGE, lw=1.5)
    left.set_title(f"after softmax; ticks: the {2**bits} levels", size=10, pad=15)
    right.set_title("after GELU; inset: around zero; white: clipped", size=10, pad=15)
    left.set_ylabel("count")
    return fig


def channel_maxima(softmax, t):
    """Timesteps (U,) and, of softmax (R, H, S, S), every channel's maximum over heads and queries:
    the 10 %, 50 % and 90 % quantile and the largest over the channels of a timestep, (4, U)."""
    peaks, at = softmax.amax((1, 2)), t.unique()
    share = torch.tensor([0.1, 0.5, 0.9, 1.0])
    return at, torch.stack([peaks[t == i].flatten().quantile(share) for i in at], dim=1)


def draw_over_time(calib, quant, t, kept, info):
    """Fig. 3: the maxima over t on the left axis; on the right the staircase of s_1, in log2."""
    steps, groups = (calib["settings"][key] for key in ("steps", "groups"))
    group = time_group(np.arange(steps), steps, groups)
    starts = np.searchsorted(group, np.arange(groups + 1)) - 0.5
    blocks = [block for block, layer in kept if layer == "av"]
    fig = canvas(3.7, "Maximum of every channel after softmax, over the timesteps", info)
    axes, twins = fig.subplots(1, len(blocks), sharey=True, squeeze=False)[0], []
    for ax, block in zip(axes, blocks, strict=True):
        at, maxima = (x.numpy() for x in channel_maxima(kept[block, "av"], t))
        low, middle, high, largest = maxima
        for i in range(0, groups, 2):
            ax.axvspan(starts[i], starts[i + 1], color=PALE, zorder=0, lw=0)
        ax.plot(at, largest, color=INK, label="largest channel")
        ax.plot(at, middle, color=BLUE, lw=1, label="median channel")
        ax.fill_between(at, low, high, color=HAZE, alpha=0.5, lw=0, label="10 to 90 % of channels")
        twins.append(ax.twinx())
        scale1 = quant["layers"][f"blocks.{block}.attn.av"]["a"]["scale1"]
        stairs = dict(color=EDGE, lw=2, baseline=None, label="scale $s_1$ (right)")
        twins[-1].stairs(scale1.log2().expand(groups).numpy(), starts, **stairs)
        ax.set(title=f"block {block}", xlim=starts[[0, -1]], ylim=(0, 1.02), xlabel="timestep t")
    ends = [edge for twin in twins for edge in twin.dataLim.intervaly]
    powers = range(round(min(ends)) - 1, round(max(ends)) + 2)
    for twin in twins:
        twin.set(ylim=(powers[0], powers[-1]), yticks=powers, yticklabels=[])
    twin.set_yticklabels([f"$2^{{{i}}}$" for i in powers], color=EDGE)
    axes[0].set_ylabel("channel maximum")
    handles = [h for a in (axes[0], twins[0]) for h in a.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, ncols=4, loc="outside lower center", frameon=False)
    return fig


def draw_samples(run, models, columns):
    """Fig. 6: a row of images for every model; a column shares label and noise."""
    rows, twins = [], set()
    for name in models:
        path = need(run / f"samples_{name}.npz", f"python 04_sample.py --run {run}, for {name}")
        with np.load(path) as file:
            settings = json.loads(str(file["meta"]))["settings"]
            rows.append(file["arr_0"][:columns])  # (N, H, W, C)
            labels = file["labels"][:columns].tolist()
            twins.add((*(settings[key] for key in ("seed", "first", "steps")), *labels))
    if len(twins) > 1:
        raise InputError(f"{run}: samples of other seeds, labels or T; run 04_sample.py alike")
    scale = max(1, 162 // rows[0].shape[2])  # whole pixels: they stay squares
    sheet = np.stack(rows).repeat(scale, 2).repeat(scale, 3)
    sheet = np.pad(sheet, [(0, 0), (0, 0), (0, 6), (0, 6), (0, 0)], constant_values=255)
    sheet = np.concatenate(list(np.concatenate(list(sheet.swapaxes(0, 1)), axis=2)))
    width, height = sheet.shape[1] + 160, sheet.shape[0] + 110
    info = f"T = {settings['steps']}, guidance {settings['cfg_scale']:g}, seed {settings['seed']}"
    fig = canvas(height / DPI, "Samples from the same labels and noise", info, width / DPI)
    fig.figimage(sheet.squeeze(), 160, 0, cmap="gray", vmin=0, vmax=255)
    for i, name in enumerate(reversed(models)):
        text = f"{name.partition('_')[0].upper()}\n{name.partition('_')[2]}".strip()
        y = (i + 0.5) / len(models) * sheet.shape[0] / height
        fig.text(14 / width, y, text, va="center", weight="bold")
    return fig


def main(args):
    calib, command = load_calib(args.run), f"python 03_quantize.py --run {args.run}"
    path = need(args.run / f"quant_{args.bits}.pt", f"{command}, for {args.bits}")
    quant, settings = load_quant(path), calib["settings"]
    if not quant["settings"]["mrq"]:
        raise InputError(f"{path} has no MRQ: run 03_quantize.py without --no-mrq")
    name = f"{Path(settings['ckpt']).stem}, {args.bits.upper()}, T = {settings['steps']}"
    depth = settings["config"]["depth"]
    t, kept = record(calib, sorted({0, depth // 2, depth - 1}), args.per_group)
    info = f"{name}, G = {settings['groups']}; full-precision values of {len(t)} calibration rows"
    there = [model for model in MODELS if (args.run / f"samples_{model}.npz").is_file()]
    figures = dict(
        fig2_histograms=draw_histograms(quant, kept, depth // 2, info),
        fig3_softmax_over_time=draw_over_time(
            calib, quant, t, kept, f"{info}; shades: time groups"
        ),
        fig6_samples=draw_samples(args.run, args.models or ["fp", *there], args.columns),
        layer_error=layer_error(args.run, args.bits, name),
    )
    for stem, figure in figures.items():
        save(args.out / f"{stem}.png", figure)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    p.add_argument("--bits", default="w6a6", help="of the quant files, as in their names")
    p.add_argument("--models", nargs="+", help="rows of fig6; default: fp and those that are there")
    p.add_argument("--columns", type=int, default=10, help="images of each model")
    p.add_argument("--per-group", type=int, default=32, help="calibration rows of a time group")
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
