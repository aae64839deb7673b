"""What tables.py measures of the models of a sweep."""

import json
from collections import defaultdict

import numpy as np
import torch

from processes import ROOT, hardware
from random_run import released_layers
from scores import pick_device
from sweep import PLUS

from common.checkpoints import load_calib, load_calibrated
from common.layer_data import capture
from common.offload import unit_on, units
from common.unit_data import load_units
from common.quant_file import load_quant
from models_dit import LAYERS, Diffusion, explicit_products

# ------------------------------------------------------------------------------------------------
# Rows of results.json


def measure(sweep, scores, row):
    """Everything known of one model."""
    quant, samples = quant_path(sweep, row), samples_path(sweep, row)
    twin, settings = sweep.run(row.steps) / "samples_fp.npz", load_quant(quant)["settings"]
    report = load_quant(quant)["report"]
    return common_columns(sweep.args.name, row.steps, sweep.args.num_images) | dict(
        model=row.name,
        calibration_seed=row.seed,
        rows=settings["rows"] or 320,
        rounds=settings["rounds"],
        commands=commands(sweep.run_of(row), row.name),
        snr=report["snr_weighted"],
        snr_per_group=report["snr_per_group"],
        weighted_error=sum(cost_by_kind(sweep, row).values()),
        mib=quant.stat().st_size / 2**20,
        **scores.against(samples, twin),
    )


def full_precision_row(sweep, scores, steps):
    """The same of the full-precision model at this T."""
    run, size = sweep.run(steps), (ROOT / "demo" / "dit_mnist.pt").stat().st_size / 2**20
    found = scores.metrics(run / "samples_fp.npz") | dict(commands=commands(run, "fp"))
    common = common_columns(sweep.args.name, steps, sweep.args.num_images)
    return common | dict(model="fp", mib=size) | found


def common_columns(name, steps, num_images):
    images = dict(num_images=num_images, image_seed=0)
    return dict(sweep=name, steps=steps, **images, hardware=hardware(pick_device()))


def quant_path(sweep, row):
    return sweep.run_of(row) / f"quant_{row.name}.pt"


def samples_path(sweep, row):
    return sweep.run_of(row) / f"samples_{row.name}.npz"


def commands(run, name):
    """The jobs that made a model and its samples."""
    files = [run / "jobs" / f"{job}.json" for job in ("01", "02", f"03 {name}", f"04 {name}")]
    return [json.loads(file.read_text())["command"] for file in files if file.exists()]


def compare(sweep, scores, row, other):
    """What one model gains over another, with paired intervals over images and validation rows;
    the ratio of their weighted errors, Eq. (16), over the layers that both quantize on tokens."""
    files = [samples_path(sweep, row), samples_path(sweep, other)]
    twin = sweep.run(row.steps) / "samples_fp.npz"
    gain, gain_interval = scores.psnr_gain(*files, twin)
    snr, interval = scores.snr_change(quant_path(sweep, row), quant_path(sweep, other))
    errors = [sum(cost_by_kind(sweep, one).values()) for one in (row, other)]
    return dict(
        models=[row.name, other.name],
        steps=row.steps,
        num_images=sweep.args.num_images,
        weighted_error=errors[0] / errors[1],
        psnr_gain=gain,
        psnr_gain_interval=gain_interval,
        snr_gain=snr,
        snr_gain_interval=interval,
    )


# ------------------------------------------------------------------------------------------------
# Layers, gradients, phases


def kind_of(name):
    """A layer's name without the number of its block."""
    return ".".join(name.split(".")[-2:])


CONDITIONING = {kind_of(f"unit.{spec.name}") for spec in LAYERS if spec.conditioning}


def cost_by_kind(sweep, row):
    """Weighted output error, Eq. (16), summed over the layers of each kind that sees tokens."""
    kinds = defaultdict(float)
    for name, cost in load_quant(quant_path(sweep, row))["report"]["costs"].items():
        if kind_of(name) not in CONDITIONING:
            kinds[kind_of(name)] += cost
    return kinds


def softmax_scales(sweep, row):
    """Block -> (G,) i of the chosen s_1 = 2^-i / 2^(k-1), one for each time group."""
    top, layers = 2 ** (row.bits[1] - 1), load_quant(quant_path(sweep, row))["layers"]
    states = {name: state["a"] for name, state in layers.items() if name.endswith("attn.av")}
    return {
        name.split(".")[1]: (-(state["scale1"] * top).log2()).round().int().tolist()
        for name, state in states.items()
    }


def gradient_shares(run):
    """Share of the squared gradient at the outputs of each kind of layer, Eq. (11), that lies in
    each time group, and the share of the sampler's sensitivity. Name -> (G,)."""
    calib, device = load_calib(run), pick_device()
    count, energies = calib["settings"]["groups"], defaultdict(lambda: torch.zeros(count).double())
    model = explicit_products(load_calibrated(calib))
    for unit in load_units(run, units(model), model, calib, None, 8, device):
        with unit_on(model, unit.name, device) as function:
            for name in released_layers(model, unit.name):
                layer = model.get_submodule(name)
                grad = capture(function, layer, unit, 8, device)[0].double()
                energy = grad.square().flatten(1).sum(dim=1)
                energies[kind_of(name)].index_add_(0, unit.groups, energy)
    diffusion = Diffusion(calib["settings"]["steps"])
    at = torch.arange(diffusion.num_timesteps) * count // diffusion.num_timesteps
    energies["sampler's sensitivity"].index_add_(0, at, diffusion.sensitivity().double())
    return {name: (energy / energy.sum()).tolist() for name, energy in energies.items()}


def phases(sweep):
    """Wall seconds and peak host memory of each sort of job, medians over the sweep; of 03 and 04
    those of the paper's whole method, of methods/tqdit_plus.py, and of full precision."""
    found, sorts = defaultdict(list), {"": "", "plus": PLUS, "fp": "FP"}
    for file in sweep.folder.glob("*/jobs/*.json"):
        phase, _, name = file.stem.partition(" ")
        tag = "fp" if name == "fp" else name.partition("_")[2]
        if tag in sorts:
            steps = int(file.parents[1].name.split("_")[0].removeprefix("T"))
            found[steps, f"{phase} {sorts[tag]}".strip()].append(json.loads(file.read_text()))
    return {
        key: {c: float(np.median([job[c] for job in jobs])) for c in ("seconds", "peak_mib")}
        for key, jobs in sorted(found.items())
    }
