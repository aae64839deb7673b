"""Host memory of sampling: full precision, and quant files with either engine of 04_sample.py.

Each model is loaded as 04 loads it, in a process of its own, which then takes a sampling step of
one image; guidance doubles it. Counted is what Linux says is resident, less what the process held
before: Python, torch and this code. Weights are random, scales from min-max. Released: the layers
that 03 quantizes; `cond` has the weights of adaLN and of the embedder of t in 8 bits too, as
methods/tqdit_plus.py makes them (--cond-bits 8).

    python benchmarks/memory.py --out docs/speed.md
    python benchmarks/memory.py --model DiT-S/8 --depth 1
"""

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from page import publish, table
from processes import machine
from random_run import STEPS, lively, released_layers
from sampling import GROUPS, GUIDANCE, input_ranges, layer_state, widths

from common.artifacts import provenance, save_artifact, sha256_of
from common.checkpoints import load_dit
from common.cli import run_script
from common.errors import InputError
from common.int8_engine import build
from common.offload import units
from common.quant_file import linear_state, load_quant, quantized_parts
from models_dit import LAYERS, Diffusion, DiT_models, image_generators, trajectory
from quant_ops import FullPrecision, uniform_candidates

CPU = torch.device("cpu")
DEFAULTS = dict(input_size=32, in_channels=4, num_classes=1000, mlp_ratio=4.0, learn_sigma=True)
CHECKPOINT = "dit.pt"
INTRODUCTION = """## Memory of a quantized model

What is resident in a process that loads a model as `04_sample.py` does and takes a sampling step of
one image, doubled by guidance, less what it held before: Python, torch and the scripts. `loading`
and `step` are the most meanwhile, `x` is over full precision, for the `process` with what it held
before. `cond`: the weights of adaLN and of the embedder of t have 8 bits too, as with
`methods/tqdit_plus.py --cond-bits 8`; without, they stay as they are, and adaLN has a third of all
parameters. `--engine int8` holds weights as int8, of 4 bits as of 8, also those of layers whose
product this CPU can only do in floating point. `--engine float` holds fp32. Weights are random.
"""


def in_new_process(function, *args):
    """What the function returns, called in a process that starts without any memory of this one."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# ------------------------------------------------------------------------------------------------
# Files


class QuantFile(NamedTuple):
    """One of the quant files: bits of weights and inputs, and whether adaLN's weights have 8."""

    bits: tuple
    cond: bool

    def path(self, folder):
        return folder / f"quant_{self.label().lower().replace(' ', '_')}.pt"

    def label(self):
        return "W{}A{}".format(*self.bits) + (" cond" if self.cond else "")


def conditioning_states(model):
    """States of adaLN's layers and of t's embedder: weights in 8 bits, inputs as they are."""
    states = {}
    for unit, prefix in units(model).items():
        for spec in LAYERS:
            if spec.unit == unit.split("_")[0] and spec.conditioning:
                layer = model.get_submodule(prefix + spec.name)
                Q_W, _ = uniform_candidates(*layer.weight.aminmax(dim=1, keepdim=True), 8)
                states[prefix + spec.name] = linear_state(layer, layer.weight, Q_W, FullPrecision())
    return states


def write_quant(path, model, config, states, bits, checkpoint):
    """A quant file as 03 writes it; its report says nothing."""
    sampling = dict(steps=STEPS, groups=GROUPS, cfg_scale=GUIDANCE, cfg_channels=3, vae="mse")
    settings = dict(wbits=bits[0], abits=bits[1], sampling=sampling)
    head = provenance("quant", settings, dict(checkpoint=checkpoint, calib="0" * 64), CPU)
    costs = dict.fromkeys(states, 0.0)
    head |= dict(report=dict(snr_per_group=[0.0] * GROUPS, snr_weighted=0.0, costs=costs))
    file = quantized_parts(model, config, states, STEPS, GROUPS)
    save_artifact(path, head | file | dict(method="min-max"))


@torch.no_grad()
def write_files(folder, config, all_bits):
    """FOLDER/dit.pt and its quant files of these widths."""
    model = lively(config, CPU)
    torch.save(model.state_dict(), folder / CHECKPOINT)
    x = torch.randn(1, config["in_channels"], *[config["input_size"]] * 2)
    released = {k: v for unit in units(model) for k, v in released_layers(model, unit).items()}
    ranges = input_ranges(model, released, (x, torch.tensor([500]), torch.tensor([0])))
    cond, checkpoint = conditioning_states(model), sha256_of(folder / CHECKPOINT)
    for bits in all_bits:
        states = {
            name: layer_state(model.get_submodule(name), spec, ranges[name], bits)
            for name, spec in released.items()
        }
        for file, more in (QuantFile(bits, False), {}), (QuantFile(bits, True), cond):
            write_quant(file.path(folder), model, config, states | more, bits, checkpoint)


# ------------------------------------------------------------------------------------------------
# What a process holds


def resident(key):
    """MiB of this process's memory: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def forget_peak():
    """VmHWM begins anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def load(path, engine):
    """The model as 04_sample.py has it, of a checkpoint or of a quant file."""
    if engine is None:
        return load_dit(path)[0]
    return build(load_quant(path), path, engine, CPU)


@torch.no_grad()
def measure(path, engine):
    """MiB that a model takes beyond what the process held `before`: the most while it is `loading`,
    once it is `loaded`, and the most in a sampling `step`."""
    before = resident("VmRSS")
    forget_peak()
    model = load(path, engine)
    loading, loaded = resident("VmHWM"), resident("VmRSS")
    noise, y = image_generators(0, [0]), torch.tensor([0])
    steps = trajectory(model, Diffusion(STEPS), y, noise, GUIDANCE)
    next(steps)
    forget_peak()
    next(steps)
    found = dict(loading=loading, loaded=loaded, step=resident("VmHWM"))
    return {key: value - before for key, value in found.items()} | dict(before=before)


# ------------------------------------------------------------------------------------------------
# The table

MIB, RATIOS = ("file", "loading", "loaded", "step"), ("loaded", "step", "process")
HEADER = ["", *(f"{name}, MiB" for name in MIB), *(f"{name}, x" for name in RATIOS)]


def line(label, path, found, full):
    """A row of HEADER."""
    found, full = (x | dict(process=x["step"] + x["before"]) for x in (found, full))
    found["file"] = path.stat().st_size / 2**20
    ratios = [f"{found[name] / full[name]:.2f}" for name in RATIOS]
    return [label, *(f"{found[name]:.0f}" for name in MIB), *ratios]


def measure_all(folder, files, engines):
    """Rows of the table: full precision, then every file with every engine."""
    models = [("full precision", folder / CHECKPOINT, None)]
    for file in files:
        models += [(f"{file.label()}, --engine {x}", file.path(folder), x) for x in engines]
    rows, full = [], None
    for label, path, engine in models:
        found = in_new_process(measure, path, engine)
        full = full or found
        rows.append(line(label, path, found, full))
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main(args):
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("memory is counted by Linux's /proc, which is not there")
    config = DEFAULTS | DiT_models[args.model] | ({"depth": args.depth} if args.depth else {})
    files = [QuantFile(bits, cond) for bits in args.bits for cond in (False, True)]
    with tempfile.TemporaryDirectory(dir=args.runs) as folder:
        in_new_process(write_files, Path(folder), config, args.bits)
        rows = table(HEADER, measure_all(Path(folder), files, args.engines))
    blocks = f", {args.depth} blocks" if args.depth else ""
    text = f"{args.model}{blocks}. {machine(CPU)}.\n\n{rows}"
    publish(args.out, "memory", INTRODUCTION, text)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=sorted(DiT_models), default="DiT-XL/2")
    p.add_argument("--depth", type=int, help="blocks, if not all")
    bits = [(8, 8), (6, 6), (4, 8)]
    p.add_argument("--bits", type=widths, nargs="+", default=bits, help="such as 8/8 6/6 4/8")
    engines = ("float", "int8")
    p.add_argument("--engines", nargs="+", choices=engines, default=list(engines), help="of 04")
    p.add_argument("--runs", type=Path, help="where there is space for the files")
    p.add_argument("--out", type=Path, help="the page that gets a section")
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
