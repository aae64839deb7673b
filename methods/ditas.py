"""DiTAS (arXiv 2409.07756): smoothing aggregated over time, and a low-rank branch; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_ditas.pt, for `04 --tag ditas`. Layer by layer:

    weights       W = Q + L R: Q quantized, in groups of 32 elements of an input channel; L R of
                  rank 32 in full precision; by turns, 10 times (training-free LoRA)
    smoothing     inputs over s, Q and R times s; s_j = a_j^alpha / w_j^(1 - alpha), where a_j is
                  the channel's peak over all timesteps, w_j that of Q (temporal aggregation)
    grid search   alpha of 0, 0.05 .. 1 with the least error of the layer's output
    activations   one dynamic range for each sample

    the paper / its code                              here
    grid search on 50 steps, whatever T; a pass       all rows, all alphas in one pass
    over the trajectory for each layer
    ranges of activations over the batch              for each sample: no image depends on another
    steps of range / 2^k, so the top is cut off       range / (2^k - 1), Eq. (5); 0 in range
    groups that need outputs divisible by 32          of the least divisor from 32 on; all, below 32
    rank 32 of layers 1152 wide and more              half of the layer's smaller side at most: more
                                                      would store the layer itself
    s of qkv and fc1 in adaLN, of proj in V's rows,   proj's at run time as well: V's rows would
    of fc2 at run time                                leave the grid of their groups
    own layers: qkv, proj, fc1, fc2                   the same; operands of attention products in
                                                      `released`: a dynamic range for each sample

    python methods/ditas.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py     --run runs/xl --wbits 4 --abits 8 --tag ditas
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import quant_file  # noqa: E402
from common.cli import (  # noqa: E402
    Parser, at_least, check_method_flags, model_name, run_script, settings_of, whole_number,
)  # fmt: skip
from common.phase3 import Machine, Phase3  # noqa: E402
from common.quantizers import DynamicQuantizer  # noqa: E402
from common.report import linear_cost, matmul_cost  # noqa: E402
from methods.balancing import channel_peaks, fold_into_adaln, smoothquant_factors  # noqa: E402
from methods.dynamic import on_rows, operands  # noqa: E402
from models_dit import MatMul  # noqa: E402
from quant_ops import FullPrecision, UniformQuantizer, qparams_from_range  # noqa: E402

ALPHAS = [0.05 * i for i in range(21)]
LEAST = 1e-4  # of a_j and s_j
GROUP = 32  # elements of a weight that share a scale


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    rank: int
    alternations: int
    layers: str
    rows: int | None
    tag: str


def parse_args():
    p = Parser(__doc__)
    p.add_method_flags("ditas", own="qkv, proj, fc1, fc2")
    p.paper.add_argument("--rank", type=whole_number, default=32, help="of the branch; 0: none")
    turns = "how often Q and L R take turns"
    p.paper.add_argument("--alternations", type=whole_number, default=10, help=turns)
    return p.parse_args()


def check(args):
    check_method_flags(args)
    at_least(1, args, "alternations")
    at_least(0, args, "rank")


def layers_of(phase3, unit, cfg):
    """The layers of a unit that are quantized."""
    layers = phase3.layers(unit, conditioning=False)
    if cfg.layers == "released":
        return layers
    return (x for x in layers if x.spec.unit == "block" and not isinstance(x.module, MatMul))


# ------------------------------------------------------------------------------------------------
# Advanced weight quantization


def group_quantizer(weight, bits, size=GROUP):
    """The min-max quantizer of a weight (O, I) in the view (g, O / g, I): elements of an input
    channel O / g rows apart share a scale (1, O / g, I). g is the least divisor of O from `size`
    on, or O."""
    outputs, inputs = weight.shape
    g = next((d for d in range(size, outputs) if outputs % d == 0), outputs)
    groups = weight.view(g, outputs // g, inputs)
    return UniformQuantizer(bits, *qparams_from_range(*groups.aminmax(dim=0, keepdim=True), bits))


def on_groups(Q_W, weight):
    """The weight (O, I) on the grids of `group_quantizer`."""
    groups, inputs = Q_W.scale.shape[1:]
    return Q_W(weight.view(-1, groups, inputs)).view_as(weight)


def low_rank(weight, rank):
    """L (O, r) and R (r, I), whose product is the weight's best approximation of this rank."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


def decompose(weight, rank, alternations, quantizer):
    """W = Q + L R by turns: Q is W - L R quantized, L R the best approximation of W - Q.

    `quantizer` makes that of a weight. Returns the last one, Q (O, I), L (O, r) and R (r, I).
    """
    left, right = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    for _ in range(alternations if rank else 1):
        residual = weight - left @ right
        Q_W = quantizer(residual)
        quantized = on_groups(Q_W, residual)
        left, right = low_rank(weight - quantized, rank)
    return Q_W, quantized, left, right


# ------------------------------------------------------------------------------------------------
# Temporal-aggregated smoothing


def peaks(data):
    """a_j: the largest magnitude of each input channel over all rows, of all timesteps, (I,)."""
    return channel_peaks(data).clamp(min=LEAST)


def factors(x_max, quantized, alpha):
    """s_j = a_j^alpha / w_j^(1 - alpha), (I,), w_j of the weight already quantized (O, I)."""
    return smoothquant_factors(x_max, quantized, alpha).clamp(min=LEAST)


def losses(data, weight, smooths, Q_X):
    """Squared error of the layer's output with each of the factors (I,), summed over all rows; the
    weight (O, I), of Q and branch, is theirs to multiply. One pass over the data."""
    total = 0
    for chunk in data:
        outs = ((Q_X(chunk.x / s) * s) @ weight.T for s in smooths)
        total = total + torch.stack([(out - chunk.out).square().sum() for out in outs]).double()
    return total


def best_factors(data, quantized, weight, Q_X):
    """The factors of the strength alpha with the least error (grid search)."""
    x_max = peaks(data)
    smooths = [factors(x_max, quantized, alpha) for alpha in ALPHAS]
    return smooths[losses(data, weight, smooths, Q_X).argmin()]


# ------------------------------------------------------------------------------------------------
# A layer


def quantize_weight(layer, data, cfg):
    """The patch embedding: inputs in full precision, so nothing to smooth; groups, no branch."""
    weight = layer.module.weight.detach().flatten(1)
    Q_W = group_quantizer(weight, cfg.wbits)
    W_hat = on_groups(Q_W, weight)
    state = quant_file.linear_state(
        layer.module, W_hat, Q_W, FullPrecision(), view=view_of(Q_W, weight)
    )
    return dict(state=state, cost=linear_cost(data, W_hat, FullPrecision()))


def view_of(Q_W, weight):
    """The sizes (g, O / g, I) in which a weight (O, I) has these scales."""
    _, groups, inputs = Q_W.scale.shape
    return [len(weight) // groups, groups, inputs]


def quantize_linear(layer, data, rows, cfg):
    """A linear layer's state and cost: Q s, L and R s, and s for the inputs."""
    weight = layer.module.weight.detach()
    rank = min(cfg.rank, *(size // 2 for size in weight.shape))
    how = rank, cfg.alternations, lambda residual: group_quantizer(residual, cfg.wbits)
    Q_W, quantized, left, right = decompose(weight, *how)
    Q_X = DynamicQuantizer(cfg.abits, "sample")
    on_tokens = on_rows(Q_X, data, rows)
    s = best_factors(data, quantized, quantized + left @ right, on_tokens)
    Q_W = UniformQuantizer(cfg.wbits, Q_W.scale * s, Q_W.zero_point)
    branch = dict(low_rank=dict(left=left, right=right * s)) if rank else {}
    more = dict(smooth=s, view=view_of(Q_W, weight)) | branch
    state = quant_file.linear_state(layer.module, quantized * s, Q_W, Q_X, **more)
    W_hat = (quantized + left @ right) * s
    return dict(state=state, cost=linear_cost(data.smoothed(s), W_hat, on_tokens))


def quantize_matmul(layer, data, cfg):
    """An attention product, which DiTAS leaves alone, with its plain quantizer."""
    Q_A, Q_B = operands(layer, cfg.abits, "sample")
    state = quant_file.matmul_state(Q_A, Q_B)
    return dict(state=state, cost=matmul_cost(data, Q_A, Q_B))


def quantize_layer(layer, data, rows, cfg):
    if isinstance(layer.module, MatMul):
        return quantize_matmul(layer, data, cfg)
    if layer.spec.reads_image:
        return quantize_weight(layer, data, cfg)
    return quantize_linear(layer, data, rows, cfg)


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    settings = cfg._asdict()
    phase3 = Phase3(args.run, model_name(args), "ditas", settings, machine, gradients=False)
    if phase3.is_done():
        return
    for unit in phase3.units():
        done, rows = {}, len(phase3.unit.groups)
        for layer in layers_of(phase3, unit, cfg):
            done[layer.name] = quantize_layer(layer, phase3.data(layer), rows, cfg)
        phase3.save(unit, done)
    phase3.finish(fold_into_adaln)


if __name__ == "__main__":
    run_script(main, parse_args)
