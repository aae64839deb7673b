"""Time of a sampling step: the public DiT code, ours in full precision, and quantized.

Every contender takes some steps in turn, in alternating order, for some rounds; guidance is on. The
ratio is the median over rounds of its time to that of full precision in the same round.
Weights: the demo's checkpoint, and random ones, all gates open, in the shape of DiT-XL/2. Scales of
the quantizers are min-max ones of a single forward pass: values do not change the time.
--official is a checkout of github.com/facebookresearch/DiT; its code imports timm. --openvino takes
openvino and nncf.

    python benchmarks/sampling.py --official DiT
    python benchmarks/sampling.py --models xl --blocks 2 --bits 6/6 4/8 --engines float int8
"""

import argparse
import copy
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median

import torch

from processes import ROOT, machine
import openvino_dit
from random_run import STEPS, lively, released_layers

from common.checkpoints import load_dit
from common.cli import pick_device, run_script
from common.errors import InputError
from common.int8_engine import build, compile_mode
from common.offload import units
from common.quant_file import linear_state, matmul_state, quantized_parts
from common.quantizers import DynamicQuantizer
from models_dit import (
    Diffusion, DiT_models, MatMul, explicit_products, image_generators, trajectory,
)  # fmt: skip
from quant_ops import (
    FullPrecision, SoftmaxQuantizer, gelu_candidates, softmax_grid, uniform_candidates,
)  # fmt: skip

GROUPS, GUIDANCE = 10, 1.5  # the paper's
FULL = "ours, full precision"


def activations(layer, spec, ranges, bits, dynamic):
    """Quantizers of a layer's inputs, of these ranges, or with scales found at run time."""
    if spec.reads_image:  # D6
        return [FullPrecision()]
    if dynamic:
        of_product = ("token", "column") if isinstance(layer, MatMul) else ("token",)
        return [DynamicQuantizer(bits, per) for per in of_product]
    found = [uniform_candidates(*ends, bits)[0] for ends in ranges]
    if spec.post_softmax:
        found[0] = SoftmaxQuantizer(bits, softmax_grid(bits)[4].repeat(GROUPS))
    return [gelu_candidates(*ranges[0], bits)[0]] if spec.post_gelu else found


def layer_state(layer, spec, ranges, bits, dynamic=False):
    """What 03 would write of a layer, or with dynamic scales methods/tqdit_plus.py with one for
    each token; weights' from min-max. `ranges` are those of its inputs."""
    wbits, abits = bits
    of_inputs = activations(layer, spec, ranges, abits, dynamic)
    if isinstance(layer, MatMul):
        return matmul_state(*of_inputs)
    weight = layer.weight.flatten(1)
    Q_W = uniform_candidates(*weight.aminmax(dim=1, keepdim=True), wbits)[0]
    return linear_state(layer, weight, Q_W, *of_inputs)


def input_ranges(model, names, batch):
    """The least and the greatest value of each input of these layers, by name."""
    ranges, hooks = {}, []
    for name in names:

        def keep(_, inputs, name=name):
            ranges[name] = [x.aminmax() for x in inputs if x is not None]

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    explicit_products(model)(*batch)
    for hook in hooks:
        hook.remove()
    for block in model.blocks:
        block.attn.fused = True
    return ranges


def quantize(model, config, batch, bits=(8, 8), engine="float", dynamic=False):
    """The model of a quant file with the released layers (D6), as 04 makes it for this engine."""
    layers = {}
    for unit in units(model):
        layers |= released_layers(model, unit)
    ranges = input_ranges(model, layers, batch)
    states = {
        name: layer_state(model.get_submodule(name), spec, ranges[name], bits, dynamic)
        for name, spec in layers.items()
    }
    file = quantized_parts(model, config, states, STEPS, GROUPS)
    device = batch[0].device
    return build(file, "this model", engine, device).to(device)


def load_official(path, config, model):
    """The public code's DiT and its sampler, on the same weights."""
    sys.path.insert(0, str(path))
    try:
        import diffusion
        import models
    except ImportError as error:
        raise InputError(f"--official {path}: {error}") from error
    theirs = models.DiT(**config).to(model.pos_embed.device).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs, diffusion.create_diffusion(str(STEPS))


def official(theirs, sampler, x, y, null):
    """Endless sampling steps of the public code, called as its sample.py does."""
    keywords = dict(y=torch.cat([y, torch.full_like(y, null)]), cfg_scale=GUIDANCE)
    noise = torch.cat([x, x])
    while True:
        yield from sampler.p_sample_loop_progressive(
            theirs.forward_with_cfg,
            noise.shape,
            noise,
            clip_denoised=False,
            model_kwargs=keywords,
            device=y.device,
        )


def ours(model, y, compiled=False):
    """Endless sampling steps of `trajectory`."""
    model, diffusion = copy.copy(model), Diffusion(STEPS, y.device)
    if compiled:
        model.compile(mode=compile_mode(y.device))
    while True:
        generators = image_generators(0, range(len(y)))
        yield from trajectory(model, diffusion, y, generators, GUIDANCE)


def make_models(name, args):
    """Label -> model, full precision first; its configuration; a batch (x, t, y)."""
    if name == "demo":
        model, config = load_dit(ROOT / "demo" / "dit_mnist.pt")
        model = model.to(args.device)
    else:
        config = DiT_models["DiT-XL/2"] | ({"depth": args.blocks} if args.blocks else {})
        model = lively(config, args.device)
    y = torch.arange(args.batch_size, device=args.device) % model.num_classes
    x = torch.randn(len(y), model.in_channels, *[model.input_size] * 2, device=args.device)
    models, batch = {FULL: model}, (x, torch.full_like(y, 500), y)
    for bits, engine, inputs in product(args.bits, args.engines, args.inputs):
        label = f"W{bits[0]}A{bits[1]}" + f" {inputs}" * (inputs != "static")
        label += f", --engine {engine}" * (engine != "float")
        models[label] = quantize(model, config, batch, bits, engine, inputs == "dynamic")
    return models, config, batch


def contenders(name, args):
    """Label -> endless iterator over sampling steps."""
    models, config, batch = make_models(name, args)
    runs, (x, _, y) = {}, batch
    for label, model in models.items():
        runs[label] = ours(model, y)
        if args.compile:
            runs[f"{label}, --compile"] = ours(model, y, compiled=True)
    if args.openvino:
        twins = openvino_dit.twins(models[FULL], [torch.cat([part, part]) for part in batch])
        runs |= {label: ours(twin, y) for label, twin in twins.items()}
    if args.official:
        theirs = load_official(args.official, config, models[FULL])
        runs["public DiT code"] = official(*theirs, x, y, models[FULL].num_classes)
    return runs


def widths(text):
    """`6/6` as the bits of weights and activations."""
    wbits, abits = map(int, text.split("/"))
    return wbits, abits


@torch.no_grad()
def seconds(run, args):
    """Seconds a sampling step takes, of `--steps` of them."""
    synchronize = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    half = args.dtype == "bf16"
    with torch.autocast(args.device.type, torch.bfloat16) if half else nullcontext():
        for _ in range(args.steps):
            next(run)
    synchronize()
    return (time.perf_counter() - start) / args.steps


def main(args):
    if args.openvino:
        openvino_dit.check(args)
    print(f"{machine(args.device)}; {args.dtype}, TF32 off; ", end="")
    print(f"batch {args.batch_size}, doubled by guidance; medians of {args.rounds} rounds")
    torch._dynamo.config.recompile_limit = 64  # contenders share one code: none is to run eager
    for name in args.models:
        torch.compiler.reset()  # else this model's sizes would be symbols after another's
        with torch.no_grad():
            runs = contenders(name, args)
        for run in runs.values():  # the first steps compile, and take longer
            seconds(run, args)
        times = {label: [] for label in runs}
        for i in range(args.rounds):
            for label in list(runs)[:: -1 if i % 2 else 1]:
                times[label].append(seconds(runs[label], args))
        blocks = f", {args.blocks} blocks" if name == "xl" and args.blocks else ""
        bases = [label for label in times if label.startswith(FULL)]
        print(f"\n| {'DiT-XL/2' if name == 'xl' else 'demo'}{blocks} | ms per step", end=" | x ")
        print(*bases, sep=" | x ", end=" |\n" + "|---" * (2 + len(bases)) + "|\n")
        for label, found in times.items():
            pairs = [zip(found, times[base], strict=True) for base in bases]
            ratios = [f"{median(a / b for a, b in pair):.2f}" for pair in pairs]
            print(f"| {label}", f"{1000 * median(found):.2f}", *ratios, sep=" | ", end=" |\n")


def add_timing_flags(p, steps, what):
    """How often to time what, in which numbers, and where."""
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--steps", type=int, default=steps, help=what)
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=pick_device, default=device)


def add_input_flag(p):
    """What scales of activations the quant files have."""
    scales = "static", "dynamic"
    what = "their scales: as 03 writes them, found at run time for each token"
    p.add_argument("--inputs", nargs="+", choices=scales, default=["static"], help=what)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--official", type=Path, help="a checkout of the public DiT code")
    p.add_argument("--openvino", action="store_true", help="OpenVINO too, in fp32 and 8 bits")
    p.add_argument("--models", nargs="+", choices=("demo", "xl"), default=["demo", "xl"])
    p.add_argument("--blocks", type=int, help="of DiT-XL/2, if not all 28")
    p.add_argument("--bits", type=widths, nargs="+", default=[(8, 8)], help="such as 8/8 6/6 4/8")
    engines = ("float", "int8", "int8-folded")
    p.add_argument("--engines", nargs="+", choices=engines, default=["float"], help="of 04")
    add_input_flag(p)
    p.add_argument("--batch-size", type=int, default=8)
    add_timing_flags(p, 5, "a round's steps of each")
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
