"""Phase 3: choose every scale by Hessian-guided search and write the quantized model.

Paper: Sec. III, Alg. 1 lines 13-33, Eq. (15)-(17), Table III.  In: RUN/calib.pt, RUN/grads/.
Out: RUN/quant_wXaY.pt, which alone is enough to sample. Layers are independent of each other: the
inputs and targets of each are full-precision ones. Ends with the quantized model's signal-to-noise
ratio of eps on rows it was not fitted to, and the layers that cost most.

    python 03_quantize.py --run runs/xl --wbits 8 --abits 8
    python 03_quantize.py --run runs/xl --wbits 6 --abits 6 --no-tgq --tag ho_mrq     # Table III
    torchrun --nproc_per_node=8 -- 03_quantize.py --run runs/xl --wbits 6 --abits 6
"""

from argparse import BooleanOptionalAction
from typing import NamedTuple

import torch.nn as nn

from common import quant_file
from common.cli import (
    Parser, at_least, check_bits, check_tag, check_unit_flags, model_name, run_script, settings_of,
    whole_number,
)  # fmt: skip
from common.fast_search import make_search
from common.phase3 import Machine, Phase3
from common.report import linear_cost, matmul_cost
from quant_ops import (
    FullPrecision, InputLoss, LossOfA, LossOfB, WeightLoss, gelu_candidates, join_groups,
    softmax_candidates, uniform_candidates,
)  # fmt: skip


class Settings(NamedTuple):
    """What decides the result, and what it is called: Table III, deviations D5, D6, D11."""

    wbits: int  # k of weights
    abits: int  # k of activations
    metric: str  # "hessian" (HO), or "mse"
    mrq: bool
    tgq: bool
    rounds: int  # R
    layers: str  # "released", or "all"
    weight_granularity: str  # "channel", or "tensor"
    rows: int | None  # searched on; None: all n G
    tag: str


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    p.paper.add_argument("--wbits", type=whole_number, required=True, help="k of weights, 2..8")
    p.paper.add_argument("--abits", type=whole_number, required=True, help="k of activations, 2..8")
    p.paper.add_argument("--metric", choices=("hessian", "mse"), default="hessian", help="HO, D11")
    p.paper.add_argument("--mrq", action=flag, default=True, help="multi-region quantization")
    p.paper.add_argument("--tgq", action=flag, default=True, help="time-grouping quantization")
    p.paper.add_argument("--rounds", type=whole_number, default=3, help="R, Sec. IV-A")
    p.ours.add_argument("--layers", choices=("released", "all"), default="released", help="D6")
    granularity = ("channel", "tensor")
    p.ours.add_argument("--weight-granularity", choices=granularity, default="channel", help="D5")
    p.ours.add_argument("--rows", type=whole_number, help="search on about so many, spread over t")
    p.ours.add_argument("--tag", default="", help="names the file quant_wXaY_TAG.pt")
    p.add_search_flags()
    return p.parse_args()


def check(args):
    check_bits(args, "wbits", "abits")
    check_tag(args)
    at_least(1, args, "rounds", "rows")
    check_unit_flags(args)


def weight_range(weight, granularity):
    """Ends of a weight (O, I): of each output channel, (O, 1), or of all of it, () (D5)."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    return (low, high) if granularity == "channel" else (low.amin(), high.amax())


# ------------------------------------------------------------------------------------------------
# Alg. 1 lines 15-33 for one layer l. `layer` has its module and what it is (`spec`, of LAYERS in
# models_dit.py); `data`, gone through chunk by chunk, its inputs x or a and b, its output, gradient
# and time groups; `search` is quant_ops.search, or a faster one with the same choice. Each returns
# the layer's state for the quant file, and its cost by Eq. (16).


def objective_data(data, cfg):
    """The data that searches see: for plain MSE with G^(l) = 1 (D11)."""
    return data if cfg.metric == "hessian" else data.unweighted()


def input_candidates(layer, data, mrq, cfg):
    """Line 16 for Delta_X: Q_X at min-max (D15), and its candidates; for MRQ those of s_1 and s_2
    around a quantizer; None where X stays in full precision."""
    if layer.spec.reads_image and cfg.layers == "released":
        return FullPrecision(), None  # D6: of the patch embedding only the weight
    candidates = gelu_candidates if mrq else uniform_candidates
    return candidates(*data.range("x"), cfg.abits)


def quantize_linear(layer, data, cfg, search):
    """Alg. 1 lines 15-22: l is a CNN or linear layer, X W^T; a convolution is one on patches."""
    W, fit = layer.module.weight.detach().flatten(1), objective_data(data, cfg)
    mrq = layer.spec.post_gelu and cfg.mrq
    ends = weight_range(W, cfg.weight_granularity)
    _, candidates_W = uniform_candidates(*ends, cfg.wbits)  # line 16
    Q_X, candidates_X = input_candidates(layer, data, mrq, cfg)  # line 16
    for _ in range(cfg.rounds):  # line 17: r = 1, ..., R
        Q_W = search(candidates_W, fit, WeightLoss(W, Q_X))  # line 18, HO: Eq. (16)
        if candidates_X is None:
            break  # D6: X stays as it is, so one round is all
        if mrq:  # line 19: l is the post-GELU layer
            for candidates_near in candidates_X:  # line 20: s_1, then s_2, MRQ with HO
                Q_X = search(candidates_near(Q_X), fit, InputLoss(W, Q_W))
        else:
            Q_X = search(candidates_X, fit, InputLoss(W, Q_W))  # line 22, HO
    state = quant_file.linear_state(layer.module, W, Q_W, Q_X)
    return dict(state=state, cost=linear_cost(data, Q_W(W), Q_X))


def a_candidates(layer, data, cfg):
    """Line 24 for Delta_A: after softmax those of MRQ."""
    if layer.spec.post_softmax and cfg.mrq:
        return softmax_candidates(cfg.abits, data.device)
    return uniform_candidates(*data.range("a"), cfg.abits)[1]


def quantize_matmul(layer, data, cfg, search):
    """Alg. 1 lines 23-33: l is a matrix multiplication, A B."""
    fit, tgq = objective_data(data, cfg), layer.spec.post_softmax and cfg.tgq
    groups = [fit.of_group(i) for i in range(data.num_groups)] if tgq else [fit]
    candidates_A = [a_candidates(layer, rows, cfg) for rows in groups]  # line 24
    Q_B, candidates_B = uniform_candidates(*data.range("b"), cfg.abits)  # line 24; D15
    for _ in range(cfg.rounds):  # line 25: r = 1, ..., R
        if tgq:  # line 28: l is the post-softmax layer
            found = []
            for i in range(data.num_groups):  # line 29: for each group G_i
                Q_A_i = search(candidates_A[i], groups[i], LossOfA(Q_B))  # line 30, HO: Eq. (17)
                found.append(Q_A_i)
            Q_A = join_groups(found)
        else:
            Q_A = search(candidates_A[0], fit, LossOfA(Q_B))  # line 32, HO
        Q_B = search(candidates_B, fit, LossOfB(Q_A))  # line 33, HO
    state = quant_file.matmul_state(Q_A, Q_B)
    return dict(state=state, cost=matmul_cost(data, Q_A, Q_B))


def quantize_layer(layer, data, cfg, search):
    """Alg. 1 lines 15-33."""
    if isinstance(layer.module, (nn.Conv2d, nn.Linear)):  # line 15: l is a CNN or linear layer
        return quantize_linear(layer, data, cfg, search)
    return quantize_matmul(layer, data, cfg, search)  # line 23: l is a matrix multiplication


def main(args):  # Alg. 1 line 13
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    phase3 = Phase3(args.run, model_name(args), "tqdit", cfg._asdict(), machine)
    if phase3.is_done():
        return
    for unit in phase3.units():
        done = {}
        for layer in phase3.layers(unit, conditioning=cfg.layers == "all"):  # line 14: l = 1..L, D6
            search = make_search(args.search, args.compile)  # remembers a layer's last losses
            done[layer.name] = quantize_layer(layer, phase3.data(layer), cfg, search)
        phase3.save(unit, done)
    phase3.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
