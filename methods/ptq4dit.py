"""PTQ4DiT (arXiv 2405.16005): salience balancing, then block reconstruction; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_ptq4dit.pt, for `04 --tag ptq4dit`.
Large channels of inputs and of weights rarely coincide, so magnitude moves from one to the other
(CSB, its Sec. 3.2); how large a channel is changes with t, so timesteps are averaged, those least
rank-correlated with the weight first (SSC, Sec. 3.3). The factors are folded into adaLN (Sec. 3.4).
Then rounding and scales of activations learn together, unit by unit (BRECQ).

    the paper / its code                            here
    timesteps: 25 of 250, all of class 0 in code    all rows of calib.pt, by timestep
    eta_t, code: of 100 samples, not of timesteps   of timesteps, as printed
    folding: not in the code, which divides         qkv and fc1 into adaLN; proj divides its inputs,
                                                    as the paper's dequantization of softmax(q k) v
    ranges "mse": the best of three percentiles     the same, of inputs in full precision
    embedders' three layers: each learns alone      they learn together, as one unit

    python methods/ptq4dit.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py       --run runs/xl --wbits 4 --abits 8 --tag ptq4dit
"""

import sys
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import (  # noqa: E402
    Parser, at_least, check_bits, check_method_flags, model_name, run_script, settings_of,
    whole_number,
)  # fmt: skip
from common.phase3 import Machine, Phase3  # noqa: E402
from methods.balancing import (  # noqa: E402
    by_timestep, channel_ends, fold_into_adaln, salience_factors,
)  # fmt: skip
from methods.learning_rates import add_rate_flags, check_rates  # noqa: E402
from methods.ranges import values_by_percentile, weight_by_percentile  # noqa: E402
from methods.reconstruction import (  # noqa: E402
    Recipe, SoftLinear, SoftMatMul, reconstruct,
)  # fmt: skip
from models_dit import MatMul  # noqa: E402
from quant_ops import FullPrecision  # noqa: E402

BALANCED = "attn.qkv", "attn.proj", "mlp.fc1"


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    softmax_bits: int
    csb: bool
    ssc: bool
    iterations: int
    batch: int
    weight_lr: float
    scale_lr: float
    layers: str
    rows: int | None
    tag: str


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    p.add_method_flags("ptq4dit", own="all that multiply")
    p.paper.add_argument("--softmax-bits", type=whole_number, default=8, help="k after softmax")
    p.paper.add_argument("--csb", action=flag, default=True, help="balance channels")
    p.paper.add_argument("--ssc", action=flag, default=True, help="weigh timesteps by rank")
    what = "of reconstruction, a unit; 0: none"
    p.paper.add_argument("--iterations", type=whole_number, default=20000, help=what)
    p.paper.add_argument("--batch", type=whole_number, default=32, help="rows of an iteration")
    add_rate_flags(p, 4e-5)
    return p.parse_args()


def check(args):
    check_method_flags(args)
    check_bits(args, "softmax_bits")
    at_least(1, args, "batch")
    at_least(0, args, "iterations")
    check_rates(args)


def factors(layer, data, t, cfg):
    """What a layer's inputs are divided by, (I,), or None. t (N,): timesteps of the rows."""
    if not cfg.csb or layer.spec.name not in BALANCED:
        return None
    _, low, high = by_timestep(*channel_ends(data, len(t)), t)
    x_max = torch.maximum(-low, high)  # a_j^(t), Eq. (6)
    return salience_factors(x_max, layer.module.weight.detach(), cfg.ssc)


def start(layer, data, t, cfg):
    """A layer before reconstruction: balanced, and ranges by percentile."""
    if isinstance(layer.module, MatMul):
        bits = cfg.softmax_bits if layer.spec.post_softmax else cfg.abits
        sides = values_by_percentile(data, "a", bits), values_by_percentile(data, "b", cfg.abits)
        return SoftMatMul(*sides)
    weight, smooth = layer.module.weight.detach().flatten(1), factors(layer, data, t, cfg)
    if smooth is not None:
        weight, data = weight * smooth, data.smoothed(smooth)
    Q_X = FullPrecision()
    if not (layer.spec.reads_image and cfg.layers == "released"):  # D6
        Q_X = values_by_percentile(data, "x", cfg.abits)
    return SoftLinear(layer.module, weight, weight_by_percentile(weight, cfg.wbits), Q_X, smooth)


def quantize_unit(phase3, unit, t, cfg):
    """Balance and reconstruct a unit: name -> dict(state, cost)."""
    layers = list(phase3.layers(unit, conditioning=cfg.layers == "own"))
    soft = {layer.name: start(layer, phase3.data(layer), t, cfg) for layer in layers}
    recipe = Recipe(cfg.iterations, cfg.batch, cfg.weight_lr, cfg.scale_lr)
    if cfg.iterations:
        reconstruct(phase3, soft, phase3.quantized_inputs(), recipe)
    return {layer.name: soft[layer.name].done(phase3.data(layer)) for layer in layers}


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    how = dict(gradients=False, in_order=True)
    phase3 = Phase3(args.run, model_name(args), "ptq4dit", cfg._asdict(), machine, **how)
    if phase3.is_done():
        return
    t = phase3.timesteps()
    for unit in phase3.units():
        phase3.save(unit, quantize_unit(phase3, unit, t, cfg))
    phase3.finish(fold_into_adaln)


if __name__ == "__main__":
    run_script(main, parse_args)
