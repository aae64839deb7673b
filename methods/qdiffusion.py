"""Q-Diffusion (arXiv 2302.04304): block reconstruction on inputs of all timesteps; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_qdiffusion.pt, for `04 --tag qdiffusion`.
Calibration rows are spread over the trajectory (its Sec. 3.2): calib.pt's are. Then, unit by unit,

    phase W   AdaRound of all weights, activations in full precision, inputs from the units before
              with their weights quantized (BRECQ, Eq. 7 and 8)
    phase A   scales of all activations learned, weights fixed, inputs in full precision

The paper splits the two halves that a U-Net's shortcuts join; a DiT has none, so that part is void.

    the paper / its code                           here
    phase A follows phase W of all units           unit by unit: phase A needs no other unit's
    activation ranges from 64 samples, of one t    from all calibration rows
    embedders' three layers: each learns alone     they learn together, as one unit
    softmax has 8 bits, or 16                      --softmax-bits 8

    python methods/qdiffusion.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py          --run runs/xl --wbits 4 --abits 8 --tag qdiffusion
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import (  # noqa: E402
    Parser, at_least, check_bits, check_method_flags, model_name, run_script, settings_of,
    whole_number,
)  # fmt: skip
from common.phase3 import Machine, Phase3  # noqa: E402
from methods.learning_rates import add_rate_flags, check_rates  # noqa: E402
from methods.ranges import values_by_shrinking, weight_by_shrinking  # noqa: E402
from methods.reconstruction import (  # noqa: E402
    Recipe, SoftLinear, SoftMatMul, learned, reconstruct, weights_only,
)  # fmt: skip
from models_dit import MatMul  # noqa: E402
from quant_ops import FullPrecision  # noqa: E402

SCALE_POWER = 2.4  # p of |error|^p, for ranges and scales of activations


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    softmax_bits: int
    layers: str
    weight_iterations: int
    weight_batch: int
    weight_lr: float
    scale_lr: float
    scale_iterations: int
    scale_batch: int
    rows: int | None
    tag: str


def add_flags(p, weight_iterations, weight_batch, scale_iterations, scale_batch, tag):
    """The flags of this recipe, with a paper's defaults."""
    p.add_method_flags(tag, own="all that multiply")
    p.paper.add_argument("--softmax-bits", type=whole_number, default=8, help="k after softmax")
    counts = (
        ("--weight-iterations", weight_iterations, "of phase W, a unit"),
        ("--weight-batch", weight_batch, "rows at a time in phase W"),
        ("--scale-iterations", scale_iterations, "of phase A, a unit"),
        ("--scale-batch", scale_batch, "rows at a time in phase A"),
    )
    for flag, default, what in counts:
        p.paper.add_argument(flag, type=whole_number, default=default, help=what)
    add_rate_flags(p, 4e-4)


def parse_args():
    p = Parser(__doc__)
    add_flags(p, 20000, 32, 5000, 32, "qdiffusion")
    return p.parse_args()


def check(args):
    check_method_flags(args)
    check_bits(args, "softmax_bits")
    at_least(1, args, "weight_batch", "scale_batch")
    at_least(0, args, "weight_iterations", "scale_iterations")
    check_rates(args)


def start(layer, wbits):
    """A layer before phase W: its weight's range by least |error|^2.4, nothing else quantized."""
    if isinstance(layer.module, MatMul):
        return SoftMatMul(FullPrecision(), FullPrecision())
    weight = layer.module.weight.detach().flatten(1)
    return SoftLinear(layer.module, weight, weight_by_shrinking(weight, wbits), FullPrecision())


def set_ranges(soft, layer, data, cfg, abits):
    """Before phase A: ranges of activations by least |error|^2.4."""
    if isinstance(soft, SoftMatMul):
        bits = cfg.softmax_bits if layer.spec.post_softmax else abits
        soft.a = learned(values_by_shrinking(data, "a", bits))
        soft.b = learned(values_by_shrinking(data, "b", abits))
    elif not (layer.spec.reads_image and cfg.layers == "released"):  # D6
        soft.act = learned(values_by_shrinking(data, "x", abits))


def quantize_unit(phase3, unit, cfg, edge_bits=None):
    """Phases W and A of a unit: name -> dict(state, cost). With `edge_bits` the embedder and the
    final layer have so many bits, and are not reconstructed."""
    layers = list(phase3.layers(unit, conditioning=cfg.layers == "own"))
    edge = edge_bits is not None and unit in ("embed", "final")
    wbits, abits = (edge_bits, edge_bits) if edge else (cfg.wbits, cfg.abits)
    soft = {layer.name: start(layer, wbits) for layer in layers}
    phase_w = Recipe(cfg.weight_iterations, cfg.weight_batch, weight_lr=cfg.weight_lr)
    if not edge:
        reconstruct(phase3, soft, phase3.quantized_inputs(weights_only), phase_w)
    for layer in layers:
        set_ranges(soft[layer.name], layer, phase3.data(layer), cfg, abits)
    learn = dict(scale_lr=cfg.scale_lr, power=SCALE_POWER)
    if not edge:
        phase_a = Recipe(cfg.scale_iterations, cfg.scale_batch, **learn)
        reconstruct(phase3, soft, phase3.unit.inputs, phase_a)
    return {layer.name: soft[layer.name].done(phase3.data(layer)) for layer in layers}


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    how = dict(gradients=False, in_order=True)
    phase3 = Phase3(args.run, model_name(args), "qdiffusion", cfg._asdict(), machine, **how)
    if phase3.is_done():
        return
    for unit in phase3.units():
        phase3.save(unit, quantize_unit(phase3, unit, cfg))
    phase3.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
