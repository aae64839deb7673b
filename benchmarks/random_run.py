"""A model of random weights, a run of it with random calibration rows as 01 would write it, the
layers that are quantized, and scripts as processes."""

import tempfile

import torch

from processes import ROOT, timed

from common.artifacts import provenance, save_artifact, sha256_of
from common.errors import InputError
from common.offload import units
from models_dit import LAYERS, Diffusion, DiT
from quant_ops import time_group

STEPS = 250  # T, the paper's


def lively(config, device):
    """A DiT of this shape with random weights: no gate is zero, no number explodes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(**config)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 2)
    return model.to(device).eval().requires_grad_(False)  # positions come from numpy


def released_layers(model, unit):
    """The LayerSpec of every layer of a unit that the released variant quantizes (D6), by name."""
    prefix, kind = units(model)[unit], unit.split("_")[0]
    specs = [spec for spec in LAYERS if spec.unit == kind and not spec.conditioning]
    return {prefix + spec.name: spec for spec in specs}


def random_rows(config, count, groups):
    """Rows of calib.pt, about as many of every time group: noise x_0, and x_t drawn from it."""
    diffusion = Diffusion(STEPS)
    group = torch.arange(groups).repeat_interleave(-(-count // groups))
    t = ((group + torch.rand(len(group))) * STEPS / groups).long().clamp(max=STEPS - 1)
    x_0 = torch.randn(len(t), config["in_channels"], *[config["input_size"]] * 2)
    y = torch.randint(config["num_classes"] + 1, (len(t),))
    x = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return dict(trajectory=group, t=t, group=time_group(t, STEPS, groups), y=y, x=x, x_0=x_0)


def write_run(run, config, rows, groups):
    """RUN/dit.pt and RUN/calib.pt as 01 writes them."""
    torch.manual_seed(0)
    run.mkdir(parents=True, exist_ok=True)
    ckpt, defaults = run / "dit.pt", dict(input_size=32, in_channels=4, num_classes=1000)
    config = defaults | dict(mlp_ratio=4.0, learn_sigma=True) | config
    torch.save(lively(config, "cpu").state_dict(), ckpt)
    settings = dict(steps=STEPS, groups=groups, per_group=rows // groups, seed=0)
    vae = "mse" if config["in_channels"] == 4 else "none"
    settings |= dict(trajectories=64, cfg_scale=1.5, cfg_channels=3, vae=vae)
    settings |= dict(ckpt=str(ckpt), config=config)
    inputs = {"checkpoint": sha256_of(ckpt)}
    head = provenance("calib", settings, inputs, torch.device("cpu"))
    head["calibration"] = random_rows(config, rows, groups)
    head["validation"] = random_rows(config, groups, groups)
    save_artifact(run / "calib.pt", head)


def run_phase(name, *flags, launcher=(), **environment):
    """A script as a process: seconds, peak MiB of host memory, what it printed."""
    with tempfile.TemporaryFile("w+") as out:
        used = timed([*launcher, ROOT / f"{name}.py", *flags], out, **environment)
        out.seek(0)
        text = out.read()
    if used.status:
        raise InputError(f"{name}.py failed: {text.strip().rpartition(chr(10))[2]}")
    return used.seconds, used.peak_mib, text
