"""Phase 3: choose every scale by Hessian-guided search and write the quantized model.

Paper: Sec. III, Alg. 1 lines 13-33, Eq. (9), (15)-(17), Table III.  In: RUN/calib.pt, RUN/grads/.
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
    Parser, at_least_one, check_bits, check_search, check_tag, model_name, run_script, whole_number,
)  # fmt: skip
from common.fast_search import make_search
from common.phase3 import Machine, Phase3
from common.report import linear_cost, matmul_cost
from quant_ops import (
    FullPrecision, InputLoss, LossOfA, LossOfB, WeightLoss, gelu_candidates, join_groups,
    softmax_candidates, uniform_candidates,
)  # fmt: skip


class Settings(NamedTuple):
    """What decides the result, as in Table III and the deviations D5, D6, D11."""

    wbits: int  # k of weights
    abits: int  # k of activations
    metric: str  # "hessian" (HO), or "mse"
    mrq: bool
    tgq: bool
    rounds: int  # R
    layers: str  # "released", or "all"
    weight_granularity: str  # "channel", or "tensor"
    rows: int | None  # of all n G
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
    p.ours.add_argument("--rows", type=whole_number, help="search on so many rows, spread over t")
    p.ours.add_argument("--tag", default="", help="names the file quant_wXaY_TAG.pt")
    p.add_search_flags()
    return p.parse_args()


def check(args):
    check_bits(args, "wbits", "abits")
    check_tag(args)
    at_least_one(args, "rounds", "rows")
    check_search(args)


def weight_range(weight, granularity):
    """Ends of a weight (O, I): of each output channel, (O, 1), or of all of it, () (D5)."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    return (low, high) if granularity == "channel" else (low.amin(), high.amax())


def input_candidates(layer, data, cfg):
    """Line 16 for Delta_X: Q_X at min-max (D15), and its candidates: None where it stays in full
    precision, for MRQ those of s_1 and of s_2 around a quantizer."""
    if layer.spec.reads_image and cfg.layers == "released":
        return FullPrecision(), None  # D6: of the patch embedding only the weight
    candidates = gelu_candidates if layer.spec.post_gelu and cfg.mrq else uniform_candidates
    return candidates(*data.range("x"), cfg.abits)


def quantize_linear(layer, data, cfg, search):  # line 15: l is a CNN or linear layer, z = X W^T
    """Alg. 1 lines 15-22: the layer's state, and its cost by Eq. (16)."""
    W = layer.module.weight.detach().flatten(1)
    fit = data if cfg.metric == "hessian" else data.unweighted()  # D11: G^(l) = 1
    ends = weight_range(W, cfg.weight_granularity)
    Q_W, weights = uniform_candidates(*ends, cfg.wbits)  # line 16; at min-max first (D15)
    Q_X, inputs = input_candidates(layer, data, cfg)  # line 16
    for _ in range(cfg.rounds):  # line 17: r = 1, ..., R
        Q_W = search(weights, fit, WeightLoss(W, Q_X))  # line 18, Eq. (16)
        if inputs is None:
            break  # nothing to alternate with
        if layer.spec.post_gelu and cfg.mrq:  # line 19: l is the post-GELU layer
            for around in inputs:  # line 20: s_1, then s_2, MRQ with HO
                Q_X = search(around(Q_X), fit, InputLoss(W, Q_W))
        else:
            Q_X = search(inputs, fit, InputLoss(W, Q_W))  # line 22, HO
    state = quant_file.linear_state(layer.module, W, Q_W, Q_X)
    return dict(state=state, cost=linear_cost(data, Q_W(W), Q_X))


def candidates_of_A(layer, rows, cfg):
    """Line 24 for Delta_A, on these rows."""
    if layer.spec.post_softmax and cfg.mrq:
        return softmax_candidates(cfg.abits, rows.device)[1]
    return uniform_candidates(*rows.range("a"), cfg.abits)[1]


def quantize_matmul(layer, data, cfg, search):  # line 23: l is a matrix multiplication, z = A B
    """Alg. 1 lines 23-33: the layer's state, and its cost by Eq. (16)."""
    fit = data if cfg.metric == "hessian" else data.unweighted()  # D11: G^(l) = 1
    by_group = layer.spec.post_softmax and cfg.tgq
    groups = [fit.of_group(i) for i in range(data.num_groups)] if by_group else [fit]
    A = [candidates_of_A(layer, rows, cfg) for rows in groups]  # line 24
    Q_B, B = uniform_candidates(*data.range("b"), cfg.abits)  # line 24; at min-max first (D15)
    for _ in range(cfg.rounds):  # line 25: r = 1, ..., R
        if by_group:  # line 28: l is the post-softmax layer
            Q_A_of = []
            for i in range(data.num_groups):  # line 29: for each group G_i
                Q_A_of.append(search(A[i], groups[i], LossOfA(Q_B)))  # line 30, Eq. (17), MRQ, HO
            Q_A = join_groups(Q_A_of)
        else:
            Q_A = search(A[0], fit, LossOfA(Q_B))  # line 32, HO
        Q_B = search(B, fit, LossOfB(Q_A))  # line 33, HO
    state = quant_file.matmul_state(Q_A, Q_B)
    return dict(state=state, cost=matmul_cost(data, Q_A, Q_B))


def quantize_layer(layer, data, cfg, search):
    """Lines 15-33 for layer l."""
    if isinstance(layer.module, (nn.Conv2d, nn.Linear)):  # line 15
        return quantize_linear(layer, data, cfg, search)
    return quantize_matmul(layer, data, cfg, search)  # line 23


def main(args):  # Alg. 1 line 13
    check(args)
    cfg = Settings(**{key: getattr(args, key) for key in Settings._fields})
    machine = Machine(args.device, args.batch_size, args.memory_limit, args.force)
    phase3 = Phase3(args.run, model_name(args), "tqdit", cfg._asdict(), machine)
    if phase3.is_done():
        return
    for unit in phase3.units():
        done = {}
        for layer in phase3.layers(unit, cfg.layers == "all"):  # line 14: for l = 1, ..., L (D6)
            search = make_search(args.search, args.compile)  # quant_ops.search, or a sooner one
            done[layer.name] = quantize_layer(layer, phase3.data(layer), cfg, search)
        phase3.save(unit, done)
    flags = f"--wbits {cfg.wbits} --abits {cfg.abits}" + (f" --tag {cfg.tag}" if cfg.tag else "")
    phase3.finish(flags)


if __name__ == "__main__":
    run_script(main, parse_args)
