"""Time of DiT-XL/2's four linear layers, and of its whole MLP, each alone: in full precision, as a
bare product of codes, and by the engines of 04, the quantization of their inputs counted or not.

As in sampling.py the contenders take turns, and a ratio is the median over rounds. Weights and
inputs are random. Everything is compiled, but for products of given codes, which are left out where
the machine has no unit for them.

    python benchmarks/engine_layers.py --dtype bf16
    python benchmarks/engine_layers.py --rows 1024 --bits 6/6
"""

import argparse
import copy
from statistics import median

import torch

from processes import machine
from random_run import lively
from sampling import GROUPS, add_timing_flags, quantize, seconds, widths

from common.cli import run_script
from common.int8_engine import compile_mode
from engine.int_products import has_int_unit
from models_dit import DiT_models

TOKENS, LAYERS = 256, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "mlp")
ENGINES = "int8", "int8-folded"
CONFIG = DiT_models["DiT-XL/2"] | dict(depth=1)


def forever(function, *inputs):
    """Endless calls."""
    while True:
        yield function(*inputs)


def inputs_of(name, args):
    """Inputs (N, 256, I), and time groups (N,), one for all as in sampling."""
    width = CONFIG["hidden_size"] * (4 if name == "mlp.fc2" else 1)
    x = torch.randn(args.rows // TOKENS, TOKENS, width, device=args.device)
    x = torch.nn.functional.gelu(x) if name == "mlp.fc2" else x
    group = torch.full((len(x),), GROUPS // 2, device=args.device)
    return x.bfloat16() if args.dtype == "bf16" else x, group


def only_block(model):
    """The block of a model that has one, with Triton inside a module of all blocks."""
    block = model.blocks[0]
    return getattr(block, "blocks", [block])[0]


def contenders(name, block, twins, args):
    """Label -> endless calls of this layer of the block."""
    x, group = inputs_of(name, args)
    dtype = x.dtype

    def compiled(module):
        return torch.compile(module, mode=compile_mode(x.device)) if args.compile else module

    layer = copy.deepcopy(block.get_submodule(name)).to(dtype)
    runs = {args.dtype: forever(compiled(layer), x, group)}
    codes = torch.randint(-128, 128, x.shape, device=x.device).to(torch.int8)
    if name != "mlp" and has_int_unit(x.device):
        v = torch.randint(-128, 128, layer.weight.shape, device=x.device).to(torch.int8)
        runs["torch._int_mm alone"] = forever(torch._int_mm, codes.flatten(0, 1), v.T)
    for engine, twin in twins.items():
        if engine == "int8" or name in ("mlp", "mlp.fc2"):  # the others are the same
            layer = twin.get_submodule(name)
            runs[f"--engine {engine}"] = forever(compiled(layer), x, group)
            if name != "mlp" and x.is_cuda:
                given = codes, layer.grid(), group
                runs[f"--engine {engine}, given codes"] = forever(layer.product, *given)
    return runs


def measure(runs, args):
    """Label -> seconds of a call in every round."""
    for run in runs.values():  # the first calls compile, and choose tiles
        seconds(run, args)
    times = {label: [] for label in runs}
    for i in range(args.rounds):
        for label in list(runs)[:: -1 if i % 2 else 1]:
            times[label].append(seconds(runs[label], args))
    return times


@torch.no_grad()
def main(args):
    model = lively(CONFIG, args.device)
    y = torch.arange(4, device=args.device)
    batch = torch.randn(4, 4, 32, 32, device=args.device), torch.full_like(y, 500), y
    twins = {
        engine: only_block(quantize(model, CONFIG, batch, args.bits, engine)) for engine in ENGINES
    }
    rows = args.rows // TOKENS * TOKENS
    print(f"{machine(args.device)}; {rows} rows, W{args.bits[0]}A{args.bits[1]}\n")
    print(f"| layer | way | ms | x {args.dtype} |\n|---|---|---|---|")
    for name in LAYERS:
        times = measure(contenders(name, model.blocks[0], twins, args), args)
        for label, found in times.items():
            ratio = median(a / b for a, b in zip(found, times[args.dtype], strict=True))
            print(f"| {name} | {label} | {1000 * median(found):.3f} | {ratio:.2f} |")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rows", type=int, default=32768, help="samples times 256 tokens")
    p.add_argument("--bits", type=widths, default=(8, 8), help="such as 8/8 or 4/8")
    add_timing_flags(p, 20, "a round's calls of each")
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
