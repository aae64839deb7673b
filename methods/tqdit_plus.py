"""TQ-DiT and what goes beyond the paper; another Phase 3.

In: RUN/calib.pt, RUN/grads/, as 03_quantize.py.  Out: RUN/quant_wXaY_plus.pt, for `04 --tag plus`.
Algorithm 1 and its objective, Eq. (16), as in 03, and, each with a switch of its own:

    --input-group        linear inputs: a scale for each token and so many channels, at run time
    --dynamic-products   q, k, v and softmax: a scale for each row or column and head, at run time
    --weight-group       weights: a scale for each output channel and so many input channels
    --hadamard           inputs rotated within blocks of channels, where it pays (arXiv 2404.00456)
    --smoothquant        input channels evened out (arXiv 2211.10438): the strength of least error
    --rounding           gptq: weights rounded column by column, errors made up for (2210.17323);
                         gptq-scales: with the scales, for each row, that leave it least error
    --rank               in blocks, a branch in full precision makes up for rounding (2410.06040)
    --fit-last           the last layer fitted to what the quantized network before it gives
    --tune-epochs        weight scales and biases of all layers learn together (2407.11062)
    --edge-bits          the first layer's weight, the last layer's weight and inputs have more bits
    --cond-bits          the weights of adaLN's and the embedders' linear layers are quantized too:
                         a scale for each output channel, searched, rounded to nearest
    --tgq-inputs         with --input-group none: TGQ for linear inputs, not only after softmax

Scales taken at run time need no search, and leave MRQ, TGQ and R nothing to do; without the first
two all are static, as in the paper. Gains: docs/log.md. R = 1: three rounds take 1 % off the error.
With --input-group token --weight-group none --no-hadamard, `04 --engine int8` multiplies the codes.

    python methods/tqdit_plus.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py          --run runs/xl --wbits 4 --abits 8 --tag plus
"""

import sys
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import quant_file  # noqa: E402
from common.cli import (  # noqa: E402
    Parser, at_least, check_bits, check_tag, check_unit_flags, model_name, number_or_none,
    run_script, settings_of, whole_number,
)  # fmt: skip
from common.fast_search import make_search  # noqa: E402
from common.offload import units  # noqa: E402
from common.phase3 import Machine, Phase3  # noqa: E402
from common.quantizers import DynamicQuantizer  # noqa: E402
from common.report import matmul_cost  # noqa: E402
from methods.dynamic import channels_or_token  # noqa: E402
from methods.last_layer import fitted  # noqa: E402
from methods.plus_linear import ROUNDING, quantize_linear, to_fit  # noqa: E402
from methods.static_scales import joined  # noqa: E402
from methods.tuning import tune  # noqa: E402
from models_dit import MatMul  # noqa: E402
from quant_ops import LossOfA, LossOfB, softmax_candidates, uniform_candidates  # noqa: E402


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    metric: str
    rounds: int
    edge_bits: int | None
    cond_bits: int | None
    tgq_inputs: bool
    smoothquant: bool
    rounding: str
    input_group: int | str | None  # "token": all channels
    dynamic_products: bool
    weight_group: int | None
    hadamard: bool
    rank: int | None
    fit_last: bool
    tune_epochs: int | None
    rows: int | None
    tag: str


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    p.paper.add_argument("--wbits", type=whole_number, required=True, help="k of weights, 2..8")
    p.paper.add_argument("--abits", type=whole_number, required=True, help="k of activations, 2..8")
    p.paper.add_argument("--metric", choices=("hessian", "mse"), default="hessian", help="HO, D11")
    p.ours.add_argument("--rounds", type=whole_number, default=1, help="R; the paper has 3")
    optional = dict(type=number_or_none, default=8)
    p.ours.add_argument("--edge-bits", **optional, help="2..8, none: no others")
    p.ours.add_argument("--cond-bits", **optional, help="2..8, none: as they are")
    p.ours.add_argument("--tgq-inputs", action=flag, default=True, help="TGQ for linear inputs")
    p.ours.add_argument("--smoothquant", action=flag, default=True, help="even out input channels")
    p.ours.add_argument("--rounding", choices=ROUNDING, default="gptq-scales", help="weights")
    group = "channels; token: all of a token; none: static scales, searched"
    p.ours.add_argument("--input-group", type=channels_or_token, default=32, help=group)
    p.ours.add_argument("--dynamic-products", action=flag, default=True, help="of attention")
    group = "input channels; none: all have one scale"
    p.ours.add_argument("--weight-group", type=number_or_none, default=32, help=group)
    p.ours.add_argument("--hadamard", action=flag, default=True, help="rotate input channels")
    p.ours.add_argument("--rank", type=number_or_none, help="of the branch")
    p.ours.add_argument("--fit-last", action=flag, default=True, help="fit the last layer")
    epochs = "passes over the rows that scales and biases learn in; at W4A8 20 pay"
    p.ours.add_argument("--tune-epochs", type=number_or_none, help=epochs)
    p.ours.add_argument("--rows", type=whole_number, help="search on about so many, spread over t")
    p.ours.add_argument("--tag", default="plus", help="names the file quant_wXaY_TAG.pt")
    p.add_search_flags()
    return p.parse_args()


def check(args):
    optional = [flag for flag in ("edge_bits", "cond_bits") if getattr(args, flag) is not None]
    check_bits(args, "wbits", "abits", *optional)
    check_tag(args)
    numbers = ["rounds", "rows", "weight_group", "rank", "tune_epochs"]
    at_least(1, args, *numbers, *["input_group"] * (args.input_group != "token"))
    check_unit_flags(args)


def matmul_found(data, Q_A, Q_B):
    """State and cost of a product of activations."""
    return dict(state=quant_file.matmul_state(Q_A, Q_B), cost=matmul_cost(data, Q_A, Q_B))


def quantize_matmul(layer, data, cfg, search):
    """Alg. 1 lines 23-33 as in 03, with MRQ and TGQ after softmax; or scales taken at run time, one
    for each row of A and column of B, which the product's own entries can be multiplied by."""
    if cfg.dynamic_products:
        Q_A, Q_B = (DynamicQuantizer(cfg.abits, per) for per in ("token", "column"))
        return matmul_found(data, Q_A, Q_B)
    search, fit = search(), to_fit(data, cfg)
    Q_B, candidates_B = uniform_candidates(*data.range("b"), cfg.abits)
    parts, candidates_A = [fit], uniform_candidates(*data.range("a"), cfg.abits)[1]
    if layer.spec.post_softmax:
        parts = [fit.of_group(i) for i in range(data.num_groups)]
        candidates_A = softmax_candidates(cfg.abits, data.device)
    for _ in range(cfg.rounds):
        Q_A = joined([search(candidates_A, rows, LossOfA(Q_B)) for rows in parts])
        Q_B = search(candidates_B, fit, LossOfB(Q_A))
    return matmul_found(data, Q_A, Q_B)


def quantize_unit(phase3, unit, cfg, search):
    """All layers of a unit: name -> dict(state, cost)."""
    done = {}
    for layer in phase3.layers(unit, conditioning=cfg.cond_bits is not None):
        data, matmul = phase3.data(layer), isinstance(layer.module, MatMul)
        if cfg.fit_last and unit == "final" and not layer.spec.conditioning:
            layer, data = fit_last(phase3, layer, data)
        quantize_layer = quantize_matmul if matmul else quantize_linear
        done[layer.name] = quantize_layer(layer, data, cfg, search)
    return done


def fit_last(phase3, layer, data):
    """The last layer, fitted, and its data on quantized inputs."""
    given = phase3.data(layer, phase3.quantized_inputs())
    module, data = fitted(layer.module, data, given, phase3.sensitivity())
    return layer._replace(module=module), data


def main(args):
    check(args)
    cfg = settings_of(Settings, args)
    search_of_a_layer = partial(make_search, args.search, args.compile)
    machine = Machine.of(args)
    phase3 = Phase3(args.run, model_name(args), "tqdit_plus", cfg._asdict(), machine)
    if phase3.is_done():
        return
    *before, last = units(phase3.model)
    for names in (before, [last]):  # the last needs all before it, if it is fitted to them
        for unit in phase3.units(names):
            phase3.save(unit, quantize_unit(phase3, unit, cfg, search_of_a_layer))
    phase3.finish(partial(tune, phase3, cfg.tune_epochs) if cfg.tune_epochs else None)


if __name__ == "__main__":
    run_script(main, parse_args)
