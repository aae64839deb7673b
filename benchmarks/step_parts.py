"""Where the time of a sampling step on a CPU goes, and the least that each part could take.

The models of sampling.py, compiled, take steps in turn under torch's profiler. The parts are
- products of linear layers, of the patch embedding's convolution and of adaLN;
- products of attention, with the softmax where the fused kernel takes it;
- passes over memory: LayerNorm, GELU, softmax, quantization and all else that the compiler fuses.

Floors: products at the best rate this CPU reached in this run on a large product, of floats, or
with --engine int8 of codes; passes at the rate of a copy, if each linear layer's and attention
product's output were read once and its input written once, a byte for a code. Everything is told
over the time of full precision's whole step in the same round, the median over rounds.

    OMP_NUM_THREADS=1 python benchmarks/step_parts.py --bits 6/6 --engines int8 int8-folded
"""

import argparse
import copy
import math
import os
import time
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from page import table
from processes import machine
from sampling import FULL, add_input_flag, make_models, ours, widths

from common.cli import run_script
from engine.cpu_products import pack, pair_limit, u8s8
from engine.int8_linear import Int8Linear
from models_dit import Linear, MatMul, explicit_products
from quant_ops import QuantLinear, QuantMatMul

LINEAR, ATTENTION, PASSES = "linear layers", "products of attention", "passes over memory"
PARTS = {
    LINEAR: ("onednn::qlinear", "tqdit::int8", "aten::addmm", "aten::mm", "aten::mkldnn_conv"),
    ATTENTION: ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
}


# ------------------------------------------------------------------------------------------------
# What a step takes


def parts_of(run):
    """Seconds of each part in the next step of a run."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        next(run)
    seconds = dict.fromkeys([*PARTS, PASSES], 0.0)
    for event in found.key_averages():
        names = (part for part, names in PARTS.items() if event.key.startswith(names))
        seconds[next(names, PASSES)] += event.self_cpu_time_total / 1e6
    return seconds


def measure(runs, rounds):
    """Label -> part -> time over that of full precision's whole step, and the seconds of that;
    medians over rounds."""
    for run in runs.values():
        for _ in range(3):  # the first steps compile
            parts_of(run)
    ratios = {label: {part: [] for part in (*PARTS, PASSES, "all")} for label in runs}
    units = []
    for i in range(rounds):
        times = {label: parts_of(runs[label]) for label in list(runs)[:: -1 if i % 2 else 1]}
        units.append(sum(times[FULL].values()))
        for label, parts in times.items():
            for part, seconds in (parts | {"all": sum(parts.values())}).items():
                ratios[label][part].append(seconds / units[-1])
    medians = {label: {k: median(v) for k, v in parts.items()} for label, parts in ratios.items()}
    return medians, median(units)


# ------------------------------------------------------------------------------------------------
# What it would take at the least


def rate(function, work):
    """Work a second of the fastest of a few calls."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return work / min(seconds)


def rates(size=1536):
    """Operations a second of a product of floats and, if there is one, of codes; bytes a second of
    a copy."""
    a, b = torch.randn(2, size, size)
    source, target = torch.zeros(2, 2**26)
    found = dict(floats=rate(lambda: a @ b, 2 * size**3), codes=math.nan)
    found["bytes"] = rate(lambda: target.copy_(source), 8 * len(source))
    if pair_limit():
        codes, scale = torch.randint(64, (size, size), dtype=torch.uint8), torch.ones(size)
        weight = pack(codes.to(torch.int8) - 32, highest=63)
        operands = codes, scale[0], torch.tensor(0), *weight, scale, None
        found["codes"] = rate(lambda: u8s8(*operands), 2 * size**3)
    return found


def operations(model, batch):
    """Of one pass through the full-precision model: those of linear layers, those of attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        explicit_products(copy.deepcopy(model))(*batch)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm")
    return sum(counts.values()), attention


def bytes_between(model, batch):
    """That passes over memory must move at the least, between the products of tokens."""
    moved = 0

    def count(module, inputs, output):
        nonlocal moved
        size = 1 if isinstance(module, Int8Linear) else 4
        moved += sum(size * x.numel() for x in inputs if x is not None and x.is_floating_point())
        moved += 4 * output.numel()

    kinds = Linear, MatMul, QuantLinear, QuantMatMul, Int8Linear
    hooks = [m.register_forward_hook(count) for m in model.modules() if type(m) in kinds]
    with torch.no_grad():
        model(*batch)
    for hook in hooks:
        hook.remove()
    return moved


def floors(models, batch):
    """Label -> part -> the least seconds."""
    best, found = rates(), {}
    linear, attention = operations(models[FULL], batch)
    for label, model in models.items():
        unit = best["codes" if "int8" in label else "floats"]
        passes = bytes_between(model, batch) / best["bytes"]
        found[label] = {LINEAR: linear / unit, ATTENTION: attention / best["floats"]}
        found[label] |= {PASSES: passes, "all": sum(found[label].values()) + passes}
    return found, best


def main(args):
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's own messages
    with torch.no_grad():
        models, _, (x, t, y) = make_models("xl", args)
    least, best = floors(models, [torch.cat([part, part]) for part in (x, t, y)])
    times, unit = measure({k: ours(m, y, compiled=True) for k, m in models.items()}, args.rounds)
    lines = [
        [label, *(f"{took:.3f} ({least[label][k] / unit:.3f})" for k, took in parts.items())]
        for label, parts in times.items()
    ]
    print(f"{machine(args.device)}; {args.blocks} blocks of DiT-XL/2, batch {args.batch_size},")
    rates_found = "floats {floats:.3g}, codes {codes:.3g} op/s, a copy {bytes:.3g} bytes/s"
    print(f"doubled by guidance. Best rates: {rates_found.format(**best)}.\n")
    print(table(["over full precision (floor)", *times[FULL]], lines))


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--blocks", type=int, default=2, help="of DiT-XL/2's 28")
    p.add_argument("--bits", type=widths, nargs="+", default=[(6, 6)], help="such as 6/6 4/8")
    engines = ("float", "int8", "int8-folded")
    p.add_argument("--engines", nargs="+", choices=engines, default=["int8"], help="of 04")
    add_input_flag(p)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--rounds", type=int, default=9)
    p.set_defaults(device=torch.device("cpu"))
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
