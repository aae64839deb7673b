"""TCAQ-DM (arXiv 2412.16700): timestep-channel adaptive quantization; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_tcaqdm.pt, for `04 --tag tcaqdm`.
On top of Q-Diffusion's block reconstruction, each with a switch of its own:

    TCR    inputs over r, weights times r: channels evened out by their peaks over all timesteps
    DAQ    a logarithmic or a uniform grid after softmax, as its values follow a power law or not
    PAR    x_t sampled again with the quantized model, and reconstruction on these, shorter

There is no code of the authors. They quantize U-Nets; what is silent or unclear is read so:

    the paper                                       here
    TCR of convolutions                             of qkv, fc1 (folded into adaLN), proj, fc2
    peaks of timesteps, in uniform groups           of the G time groups of calib.pt
    r is relative to the least channel, bounded     1 .. --tcr-limit
    power law against another distribution          against the exponential one, from the x_min
                                                    of least Kolmogorov-Smirnov distance
    DAQ for each layer and timestep                 each layer and time group
    scale of either grid                            least |error|^2.4; phase A and PAR, which learn
                                                    all others, leave it
    PAR in several rounds of fewer iterations       --par-rounds, --par-share; rounding and scales
                                                    go on from where they were

    python methods/tcaqdm.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py      --run runs/xl --wbits 4 --abits 8 --tag tcaqdm
"""

import math
import sys
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, at_least, model_name  # noqa: E402
from common.cli import run_script, settings_of, whole_number  # noqa: E402
from common.errors import InputError  # noqa: E402
from common.offload import offloaded, units  # noqa: E402
from common.phase3 import Machine, Phase3  # noqa: E402
from common.quant_file import build_quantized, make_quantizer, quantized_parts  # noqa: E402
from common.quant_file import unpack_weight  # noqa: E402
from common.quantizers import AdaptiveQuantizer  # noqa: E402
from common.trajectories import sample_again  # noqa: E402
from common.unit_data import rows_to_search  # noqa: E402
from methods import qdiffusion as base  # noqa: E402
from methods.balancing import channel_peaks, fold_into_adaln  # noqa: E402
from methods.power_law import power_law_ratio  # noqa: E402
from methods.ranges import SHRINKS, ValueLoss, some_of, weight_by_shrinking  # noqa: E402
from methods.reconstruction import Recipe, SoftLinear, SoftMatMul  # noqa: E402
from methods.reconstruction import reconstruct, weights_only  # noqa: E402
from models_dit import MatMul  # noqa: E402
from quant_ops import Candidates, FullPrecision, UniformQuantizer  # noqa: E402
from quant_ops import join_groups, search  # noqa: E402

MOST = 100_000  # values that a power law is fitted to

OWN = dict(tcr=bool, tcr_limit=float, daq=bool, par_rounds=int, par_share=float)
# what decides the result: Q-Diffusion's settings, and its own
Settings = NamedTuple("Settings", (base.Settings.__annotations__ | OWN).items())


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    base.add_flags(p, 20000, 32, 5000, 32, "tcaqdm")
    p.paper.add_argument("--tcr", action=flag, default=True, help="reparameterize channels")
    p.paper.add_argument("--daq", action=flag, default=True, help="choose the grid after softmax")
    p.ours.add_argument("--tcr-limit", type=float, default=10, help="greatest r")
    p.ours.add_argument("--par-rounds", type=whole_number, default=2, help="of PAR; 0: none")
    p.ours.add_argument("--par-share", type=float, default=0.25, help="of iterations, in each")
    return p.parse_args()


def check(args):
    base.check(args)
    at_least(0, args, "par_rounds")
    if not 1 <= args.tcr_limit < math.inf:
        raise InputError(f"--tcr-limit {args.tcr_limit}: at least 1, and finite")
    if not 0 < args.par_share <= 1:
        raise InputError(f"--par-share {args.par_share}: above 0, at most 1")


# ------------------------------------------------------------------------------------------------
# TCR: timestep-channel joint reparameterization


def group_peaks(data):
    """a_tj = max |X_tj|, the largest magnitude of every input channel in every time group, (G, I);
    `data` is a linear layer's."""
    return torch.stack([channel_peaks(data.of_group(i)) for i in range(data.num_groups)])


def reparameterization(peaks, limit):
    """r (I,) of peaks (G, I): inputs over r and weights times r are the same product.

    A channel's magnitude is the mean of its peaks, each weighted by itself:
    sum_t a_tj^2 / sum_t a_tj; r_j is that relative to the least channel's, in 1..limit.
    """
    mean = peaks.square().sum(dim=0) / peaks.sum(dim=0).clamp(min=1e-12)
    return (mean / mean.min().clamp(min=1e-12)).clamp(1, limit)


# ------------------------------------------------------------------------------------------------
# DAQ: dynamically adaptive quantizer


def adaptive_quantizer(rows, bits):
    """The quantizer of softmax outputs a, the rows of one time group."""
    log2 = power_law_ratio(some_of([chunk.a for chunk in rows.chunks], MOST)) > 0
    step = rows.range("a")[1] / (1 if log2 else 2**bits - 1)
    shares, log2 = 1 - 0.01 * torch.arange(SHRINKS).to(step), torch.tensor(log2).to(step.device)
    candidates = Candidates(lambda share: AdaptiveQuantizer(bits, share * step, log2), shares)
    return search(candidates, rows, ValueLoss(base.SCALE_POWER, "a"))


# ------------------------------------------------------------------------------------------------
# Reconstruction, and PAR: progressively aligned reconstruction


def start(layer, phase3, cfg):
    """A layer before phase W, its input channels evened out, else as Q-Diffusion's."""
    matmul = isinstance(layer.module, MatMul)
    if not cfg.tcr or matmul or layer.spec.unit != "block" or layer.spec.conditioning:
        return base.start(layer, cfg.wbits)
    r = reparameterization(group_peaks(phase3.data(layer)), cfg.tcr_limit)
    weight = layer.module.weight.detach() * r
    Q_W = weight_by_shrinking(weight, cfg.wbits)
    return SoftLinear(layer.module, weight, Q_W, FullPrecision(), r)


def set_ranges(soft, layer, data, cfg):
    """Before phase A: ranges of activations as Q-Diffusion's, and the grid after softmax."""
    smooth = getattr(soft, "smooth", None)
    seen = data if smooth is None else data.smoothed(smooth)
    base.set_ranges(soft, layer, seen, cfg, cfg.abits)
    if cfg.daq and layer.spec.post_softmax:
        groups = map(data.of_group, range(data.num_groups))
        soft.a = join_groups([adaptive_quantizer(rows, cfg.softmax_bits) for rows in groups])


def again(layer, state, device):
    """A layer as the round before left it, free to learn on."""
    if isinstance(layer.module, MatMul):
        return SoftMatMul(*(make_quantizer(state[key]).to(device) for key in "ab"))
    smooth = state["smooth"].to(device) if "smooth" in state else None
    weight, packed = layer.module.weight.detach().flatten(1), state["weight"]
    grid = packed["scale"].to(device), packed["zero_point"].to(weight)
    Q_W, Q_X = UniformQuantizer(packed["bits"], *grid), make_quantizer(state["act"]).to(device)
    weight = weight if smooth is None else weight * smooth
    soft = SoftLinear(layer.module, weight, Q_W, Q_X, smooth)
    soft.rounding.go_on_from(unpack_weight(packed).flatten(1).to(device))
    return soft


def recipes(cfg, share):
    """Phases W and A, with this share of their iterations."""
    counts = (math.ceil(share * n) for n in (cfg.weight_iterations, cfg.scale_iterations))
    weights, scales = zip(counts, (cfg.weight_batch, cfg.scale_batch), strict=True)
    phase_w = Recipe(*weights, weight_lr=cfg.weight_lr)
    return phase_w, Recipe(*scales, scale_lr=cfg.scale_lr, power=base.SCALE_POWER)


def quantize_unit(phase3, unit, cfg, before):
    """A unit in one round: name -> dict(state, cost). The first is Q-Diffusion's recipe; in others,
    given the states `before`, inputs and activations are quantized ones all along."""
    layers = list(phase3.layers(unit, conditioning=cfg.layers == "own"))
    phase_w, phase_a = recipes(cfg, cfg.par_share if before else 1)
    if before:
        soft = {x.name: again(x, before[x.name], phase3.machine.device) for x in layers}
        inputs = phase3.quantized_inputs()
        reconstruct(phase3, soft, inputs, phase_w)
    else:
        soft = {layer.name: start(layer, phase3, cfg) for layer in layers}
        reconstruct(phase3, soft, phase3.quantized_inputs(weights_only), phase_w)
        for layer in layers:
            set_ranges(soft[layer.name], layer, phase3.data(layer), cfg)
        inputs = phase3.unit.inputs
    reconstruct(phase3, soft, inputs, phase_a)
    return {layer.name: soft[layer.name].done(phase3.data(layer)) for layer in layers}


def finished(phase3):
    """The state of every layer, by name, as the present round leaves them."""
    layers = (item for unit in units(phase3.model) for item in phase3.parts.load(unit).items())
    return {name: layer["state"] for name, layer in layers}


def aligned(phase3, states):
    """calib.pt's content with x_t as the quantized model with these states samples them."""
    settings, rows = phase3.calib["settings"], phase3.calib["calibration"]
    shape = settings["config"], states, settings["steps"], settings["groups"]
    model = build_quantized(quantized_parts(phase3.model, *shape), "this round")
    wanted, x = rows_to_search(phase3.calib, phase3.rows), rows["x"].clone()
    kept = {key: rows[key][wanted] for key in ("trajectory", "t")}
    with offloaded(model, phase3.machine.device):
        where = phase3.parts, phase3.group, phase3.machine.device
        x[wanted] = sample_again(model, kept, settings, *where)
    return phase3.calib | dict(calibration=rows | dict(x=x))


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    how = dict(gradients=False, in_order=True)
    phase3 = Phase3(args.run, model_name(args), "tcaqdm", cfg._asdict(), machine, **how)
    if phase3.is_done():
        return
    before = None
    for number in range(cfg.par_rounds + 1):
        if number:
            before = finished(phase3)
            phase3.start_over(number)
            phase3.calib = aligned(phase3, before)
        for unit in phase3.units():
            phase3.save(unit, quantize_unit(phase3, unit, cfg, before))
    phase3.finish(fold_into_adaln)


if __name__ == "__main__":
    run_script(main, parse_args)
