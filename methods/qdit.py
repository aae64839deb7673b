"""Q-DiT (arXiv 2406.17343): group quantization, activation ranges as they come; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_qdit.pt, for `04 --tag qdit`.
Unit by unit, on inputs that the quantized units before it make:

    weights        groups along the inputs, each with scale and zero point, rounded by GPTQ
    activations    the same groups of every token, their ranges dynamic
    --group-search one group size a layer by evolutionary search, where the mean size shall not fall

    the paper / its code                            here
    ranges for each sample; code: and each token    --act-range token
    a group size that divides 1152                  of a layer's inputs the divisor nearest to it
    fitness: FID of 800 images, 440000 in all       SNR of eps on --search-rows calibration rows
    budget: BitOps; code: mean size at least 128    mean size at least that of --group-size
    search with symmetric grids                     asymmetric, as the result has them
    own layers: qkv, proj, fc1, fc2, weights of     the same; attention products in `released`: per
    adaLN; q, k, v off                              token and head, softmax too (code: not)
    a range of weights holds 0 in GPTQ alone        everywhere: else values far from 0 are lost
    group ranges from weights GPTQ has not updated  from updated ones, for every group size
    within its block of 128 columns

    python methods/qdit.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py    --run runs/xl --wbits 4 --abits 8 --tag qdit
"""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import quant_file  # noqa: E402
from common.cli import (  # noqa: E402
    Parser, at_least, check_method_flags, model_name, run_script, settings_of, whole_number,
)  # fmt: skip
from common.layer_data import layer_data  # noqa: E402
from common.offload import units  # noqa: E402
from common.phase3 import Machine, Phase3  # noqa: E402
from common.quantizers import DynamicQuantizer  # noqa: E402
from common.report import linear_cost, matmul_cost  # noqa: E402
from methods.dynamic import on_rows, operands  # noqa: E402
from methods.group_search import Evolution, search_sizes  # noqa: E402
from methods.rounding import divisor, gptq_groups, gram  # noqa: E402
from models_dit import MatMul  # noqa: E402
from quant_ops import FullPrecision, QuantLinear, fake_quant, qparams_from_range  # noqa: E402

SIZES = 32, 64, 128, 192, 288  # that the search chooses from


class Settings(NamedTuple):
    """What decides the result."""

    wbits: int
    abits: int
    group_size: int
    group_search: bool
    generations: int
    population: int
    search_rows: int
    act_range: str
    layers: str
    rows: int | None
    tag: str


def parse_args():
    p = Parser(__doc__)
    p.add_method_flags("qdit", own="qkv, proj, fc1, fc2, weights of adaLN")
    p.paper.add_argument("--group-size", type=whole_number, default=128, help="input channels")
    p.paper.add_argument("--group-search", action="store_true", help="a size for each layer")
    p.paper.add_argument("--generations", type=whole_number, default=10, help="of the search")
    p.paper.add_argument("--population", type=whole_number, default=50, help="new in each")
    p.ours.add_argument("--search-rows", type=whole_number, default=64, help="for its fitness")
    ranges = "activations: per token and group, or per sample and group"
    p.ours.add_argument("--act-range", choices=("token", "sample"), default="token", help=ranges)
    return p.parse_args()


def check(args):
    check_method_flags(args)
    at_least(1, args, "group_size", "generations", "population", "search_rows")


def layers_of(phase3, unit, cfg):
    """The layers of a unit that are quantized."""
    if cfg.layers == "released":
        return list(phase3.layers(unit, conditioning=False))
    layers = phase3.layers(unit, conditioning=True)
    return [x for x in layers if x.spec.unit == "block" and not isinstance(x.module, MatMul)]


def inputs_of(module):
    """How many inputs each output of a linear layer or convolution has."""
    return module.weight[0].numel()


def quantizers_of(layer, cfg, size):
    """The quantizers of a layer's inputs, one for each."""
    if isinstance(layer.module, MatMul):
        return operands(layer, cfg.abits, cfg.act_range)
    if layer.spec.reads_image or layer.spec.conditioning:
        return (FullPrecision(),)
    return (DynamicQuantizer(cfg.abits, cfg.act_range, size),)


# ------------------------------------------------------------------------------------------------
# Weights


@contextmanager
def on_quantized_inputs(layers, quantizers):
    """Meanwhile each layer's inputs are quantized."""

    def hook_of(own):
        def hook(module, args):
            return (*(Q(x) for Q, x in zip(own, args, strict=False)), *args[len(own) :])

        return hook

    pairs = zip(layers, quantizers, strict=True)
    handles = [layer.module.register_forward_pre_hook(hook_of(own)) for layer, own in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantize_linear(phase3, layer, Q_X, size, data, cfg):
    """A linear layer's state and cost; `data` has its inputs, quantized."""
    weight = layer.module.weight.detach().flatten(1)
    W_hat, Q_W = gptq_groups(weight, size, cfg.wbits, gram(data, FullPrecision()))
    view = [len(weight), weight.shape[1] // size, size]
    state = quant_file.linear_state(layer.module, W_hat, Q_W, Q_X, view=view)
    data, rows = phase3.data(layer), len(phase3.unit.groups)
    return dict(state=state, cost=linear_cost(data, W_hat, on_rows(Q_X, data, rows)))


def quantize_unit(phase3, unit, cfg, sizes):
    """Name -> dict(state, cost) of a unit's layers, given group sizes by name."""
    layers, machine, done = layers_of(phase3, unit, cfg), phase3.machine, {}
    quantizers = [quantizers_of(layer, cfg, sizes.get(layer.name)) for layer in layers]
    here = phase3.unit._replace(inputs=phase3.quantized_inputs())
    where = machine.batch_size, machine.memory_limit, machine.device
    for layer, own in zip(layers, quantizers, strict=True):
        if isinstance(layer.module, MatMul):
            cost = matmul_cost(phase3.data(layer), *own)
            done[layer.name] = dict(state=quant_file.matmul_state(*own), cost=cost)
            continue
        with on_quantized_inputs(layers, quantizers):
            data = layer_data(phase3.function, layer.module, here, *where)
        size = sizes[layer.name]
        done[layer.name] = quantize_linear(phase3, layer, *own, size, data, cfg)
    return done


# ------------------------------------------------------------------------------------------------
# Group sizes


def round_groups(weight, size, bits):
    """A weight (O, I) on the min-max grids of its groups."""
    groups = weight.unflatten(1, (-1, size))
    grid = qparams_from_range(*groups.aminmax(dim=2, keepdim=True), bits)
    return fake_quant(groups, *grid, bits).flatten(1)


def twin(layer, size, cfg, device):
    """A linear layer quantized with this group size, its weight rounded to nearest; on the host."""
    weight = round_groups(layer.module.weight.detach().to(device), size, cfg.wbits).cpu()
    return QuantLinear(weight, layer.module.bias.detach(), *quantizers_of(layer, cfg, size))


def searched(phase3, genes, cfg):
    """The group size of each of these layers, in their order."""
    counts = [inputs_of(layer.module) for layer in genes]
    start = tuple(divisor(n, cfg.group_size) for n in counts)
    space = [sorted({divisor(n, size) for size in (*SIZES, cfg.group_size)}) for n in counts]
    half = cfg.population // 2
    how = Evolution(cfg.generations, cfg.population, mutants=cfg.population - half, crossovers=half)
    make = partial(twin, cfg=cfg, device=phase3.machine.device)
    return search_sizes(phase3, genes, space, start, how, cfg.search_rows, make)


def group_sizes(phase3, cfg):
    """The group size of every linear layer, by name."""
    layers = [x for unit in units(phase3.model) for x in layers_of(phase3, unit, cfg)]
    linear = [x for x in layers if not isinstance(x.module, MatMul)]
    sizes = {x.name: divisor(inputs_of(x.module), cfg.group_size) for x in linear}
    if cfg.group_search:
        genes = [x for x in linear if x.spec.unit == "block" and not x.spec.conditioning]
        sizes |= zip((x.name for x in genes), searched(phase3, genes, cfg), strict=True)
    return sizes


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    how = dict(gradients=False, in_order=True)
    phase3 = Phase3(args.run, model_name(args), "qdit", cfg._asdict(), machine, **how)
    if phase3.is_done():
        return
    sizes = group_sizes(phase3, cfg)
    for unit in phase3.units():
        phase3.save(unit, quantize_unit(phase3, unit, cfg, sizes))
    phase3.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
