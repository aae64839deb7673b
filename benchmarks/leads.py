"""Leads beyond the paper that `--preset best` leaves out, and what each would bring.

Each variant changes one thing of RUN/quant_wXaY_best.pt: how weights are rounded, biases, or which
timesteps share a step. The rest is as 03_quantize.py does it, by its own functions: the rows, their
weights (the squared gradient), the steps. Biases change where a layer is told the time group.

AdaRound sees all rows at once, through the same gram matrix as compensated rounding. `refit` fits
weights to the full-precision outputs on quantized inputs before they are rounded. SNR of eps is on
the validation rows, weighted by the sampler's sensitivity. PSNR is against images of the
full-precision model; its change, from the variant's base, has a 95 % bootstrap interval over the
images. Time is processor time of rounding, given the gram matrix; compensated rounding is 1.

    python benchmarks/leads.py --run runs/tables/quick/T100_seed0 --bits 4/8 6/6 --num-images 40
"""

import sys
import time
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import methods  # noqa: E402
import models_dit as dit  # noqa: E402
import quant_ops as q  # noqa: E402
from random_run import load_script  # noqa: E402

BIASES = (" + bias per time group", " + bias of all timesteps")
BASE = dict.fromkeys(["best", "nearest", "AdaRound", "refit"], "best")  # of every variant
BASE |= {base + bias: base for base in ("best", "nearest") for bias in BIASES}
BASE |= {"clustered time groups": "best"}
DRAWS = 400  # bootstrap resamples of the images


def parse_args():
    p = dit.Parser(__doc__)
    p.paper.add_argument("--bits", nargs="+", default=["4/8", "6/6"], help="weights/activations")
    p.paper.add_argument("--num-images", type=int, default=40, help="N")
    p.paper.add_argument("--rows", type=int, help="calibration rows; default: as many as 03 had")
    p.paper.add_argument("--iterations", type=int, default=1000, help="of AdaRound")
    p.machine.add_argument("--batch-size", type=int, default=8, help="calibration rows at a time")
    p.machine.add_argument("--out", type=Path, help="also write the table here")
    return p.parse_args()


s03, s04, s05 = map(load_script, ("03_quantize", "04_sample", "05_eval_fid"))


def regrouped(model, calib, args):
    """Layers searched anew by 03 with time groups from clustering, and their (1000,) table."""
    steps, groups = (calib["settings"][key] for key in ("steps", "groups"))
    timestep_map, done = dit.Diffusion(steps).timestep_map, {}
    (embed,) = s03.load_units(["embed"], model, calib, args)
    searched = torch.searchsorted(timestep_map, embed.inputs[1])  # t of the rows
    levels, t = methods.input_levels(model, calib, args), calib["calibration"]["t"]
    least = max(len(searched) // (2 * groups), 1)
    table = methods.cluster(levels, t, searched, steps, groups, least)
    for unit in all_units(model, calib, args, "clustered time groups"):
        done |= s03.quantize_unit(unit._replace(groups=table[searched]), model, args)
    visited = q.group_table(timestep_map, steps)  # with as many groups as steps
    return {name: layer["state"] for name, layer in done.items()}, table[visited]


def all_units(model, calib, args, desc):
    """What 03 knows of every unit of the model, under a bar."""
    names = dit.units(model)
    found = s03.load_units(names, model, calib, args)
    return tqdm(found, total=len(names), desc=desc, leave=False)


def rounded_layers(model, calib, layers, args):
    """Every layer that 03 rounds with compensation: its name, weight (O, I), a function that begins
    its chunks anew, and its flags."""
    for unit in all_units(model, calib, args, "rounding"):
        kind, prefix = unit.name.split("_")[0], dit.units(model)[unit.name]
        with dit.unit_on(model, unit.name, args.device) as function:
            for child in s03.RELEASED[kind]:
                layer, state = model.get_submodule(prefix + child), layers[prefix + child]
                if isinstance(layer, dit.MatMul):
                    continue
                chunks = s03.capture(function, layer, unit, args)
                chunks = s03.patch_dead(chunks, unit.groups, 1 if state["type"] == "conv" else -1)
                chunks = [s03.as_matrices(layer, *chunk) for chunk in chunks]
                weight, balance = layer.weight.detach().flatten(1), state["balance"]
                if balance is None:
                    balance = torch.ones(weight.shape[1])
                own, balance = s03.settings_of(child, kind, layer, args), balance.to(args.device)
                source = partial(s03.stream, chunks, own, layer.bias, balance)
                yield prefix + child, weight * balance, source, own


def vary(state, weight, source, args):
    """One layer's state under every variant but clustering, and seconds of its roundings."""
    act, stored = q.make_quantizer(state["act"]).to(args.device), state["weight"]
    grid = [stored[key].to(weight) for key in ("step", "zero")] + [args.wbits]
    gram, states, seconds = s03.gram(weight, act, source), {}, {}
    roundings = {
        "best": lambda: q.compensated_rounding(weight, *grid, gram),
        "nearest": lambda: q.fake_quant(weight, *grid),
        "AdaRound": lambda: methods.adaround(weight, *grid, gram, args.iterations),
        "refit": lambda: q.compensated_rounding(
            methods.refit(weight, gram, s03.quantized_inputs(act, source)), *grid, gram
        ),
    }
    for variant, rounding in roundings.items():
        start = time.process_time()
        w = rounding().cpu().view(stored["shape"])
        seconds[variant] = time.process_time() - start
        packed = q.pack_weight(w, stored["step"], stored["zero"].float(), args.wbits)
        states[variant] = state | dict(weight=stored if variant == "best" else packed)
        if args.tgq_inputs and variant in BASE.values():  # the layer is told the time group
            w = q.unpack_weight(states[variant]["weight"]).to(weight)
            quantized = s03.quantized_inputs(act, source)
            errors = methods.mean_errors(w, quantized, len(next(act.buffers())))  # G
            for bias, error in zip(BIASES, errors, strict=True):
                states[variant + bias] = states[variant] | dict(bias=state["bias"] + error.cpu())
    return states, seconds


def variants(quant, model, calib, args):
    """Yield each variant's name, its model, and the time of its rounding relative to best's."""
    layers, seconds = {variant: dict(quant["layers"]) for variant in BASE}, Counter()
    for name, *data in rounded_layers(model, calib, quant["layers"], args):
        states, spent = vary(quant["layers"][name], *data)
        seconds.update(spent)
        for variant, state in states.items():
            layers[variant][name] = state
    tables = dict.fromkeys(BASE, quant["group_table"])
    layers["clustered time groups"], tables["clustered time groups"] = regrouped(model, calib, args)
    for variant, states in layers.items():
        built = q.build_quantized(quant | dict(layers=states, group_table=tables[variant]), variant)
        for name, state in states.items():
            if "bias" in state and state["bias"].ndim == 2:
                q.swap_layer(built, name, methods.GroupBias(state))
        yield variant, built.to(args.device), seconds.get(variant, 0) / seconds["best"]


@torch.no_grad()
def sample(model, calib, args):
    """uint8 images 0..N-1 of seed 0, (N, H, W, C), as 04_sample.py makes them."""
    settings = calib["settings"] | dict(seed=0, dtype="fp32")
    vae = None if settings["vae"] == "none" else dit.load_vae(settings["vae"]).to(args.device)
    how = model.to(args.device), vae, dit.Diffusion(settings["steps"], args.device)
    batches = torch.arange(args.num_images).split(64)
    batches = [(index.tolist(), index % model.num_classes) for index in batches]
    images = [s04.sample(*how, *batch, settings, tqdm(disable=True)) for batch in batches]
    return torch.cat(images).numpy()


def load_quant(bits, calib, args):
    """The quant file of --preset best at these bits; InputError if it is another's."""
    path = args.run / f"quant_w{bits.replace('/', 'a')}_best.pt"
    quant = dit.load_artifact(path, "quant", "03_quantize.py --preset best")
    s03.load_grads("embed", calib, args)  # InputError here rather than after the first images
    same = quant["inputs"]["calib"] == calib["sha256"]
    if quant["settings"]["rounding"] != "gptq" or not same:
        raise dit.InputError(f"{path} is not --preset best on this calib.pt: run 03_quantize.py")
    return quant


def score(bits, quant, model, calib, twins, args):
    """Yield the table's rows of one bit width; `twins` are the full-precision images."""
    args = Namespace(**quant["settings"] | vars(args), memory_limit=None, compile=False)
    args.rows = args.rows or quant["settings"]["rows"]
    draws, psnr = np.random.default_rng(0).integers(len(twins), size=(DRAWS, len(twins))), {}
    for variant, quantized, ratio in variants(quant, model.cpu(), calib, args):
        snr = s03.signal_to_noise(model.to(args.device), quantized, calib, args)["snr_weighted"]
        pairs = zip(sample(quantized, calib, args), twins, strict=True)
        psnr[variant] = np.array([s05.psnr([image], [twin]) for image, twin in pairs])
        gain = psnr[variant] - psnr[BASE[variant]]
        low, high = np.quantile(gain[draws].mean(axis=1), [0.025, 0.975])
        change = f"{gain.mean():+.2f} [{low:+.2f}, {high:+.2f}]" if variant != "best" else ""
        mean, ratio = f"{psnr[variant].mean():.2f}", f"{ratio:.3g}" if ratio else ""
        yield " | ".join([variant, bits, f"{snr:.2f}", mean, change, ratio])


def main(args):
    dit.at_least_one(args, "num_images", "rows", "iterations", "batch_size")
    if args.out and args.out.exists() and not args.force:
        raise dit.InputError(f"{args.out} exists; --force replaces it")
    calib = dit.load_calib(args.run)
    quants = {bits: load_quant(bits, calib, args) for bits in args.bits}
    model = dit.explicit_products(dit.load_calibrated(calib))
    twins = sample(model, calib, args)
    lines = ["variant | bits | SNR of eps, dB | PSNR, dB | change, dB | time", "---|" * 5 + "---"]
    for bits, quant in quants.items():
        lines += score(bits, quant, model, calib, twins, args)
    table = "".join(f"| {line} |\n" for line in lines)
    print(table, end="")
    if args.out:
        dit.write_atomic(args.out, lambda file: file.write(table.encode()))


if __name__ == "__main__":
    dit.run_script(main, parse_args)
