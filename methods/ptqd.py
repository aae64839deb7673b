"""PTQD (arXiv 2305.10657): Q-Diffusion's recipe, and a sampler that corrects the noise of
quantization; a Phase 3.

In: RUN/calib.pt.  Out: RUN/quant_wXaY_ptqd.pt, for `04 --tag ptqd`: the one file that changes
Eq. (4) too. After phases W and A of methods/qdiffusion.py both networks see the same x_t, at every
t of full-precision trajectories, and the difference of their eps, after guidance, is taken apart
as Delta = k eps + r (its Sec. 3.3). The sampler of the file then

    divides eps by 1 + k, and takes off the mean of r in each channel      CNC, bias correction
    adds less noise, by the variance that r brings to x_{t-1}              VSC

common/noise_correction.py has the formulas. Bits for each step (its Sec. 3.4) are not here: nor
are they in its code.

    the paper / its code                               here
    code: a scale for all of a weight                  for each output channel
    code: first and last layer 8 bits, not learned     --edge-bits 8: the embedder, the final layer,
          the last layer's inputs in full precision     whose inputs have 8 bits too
    code: linear layers and convolutions alone         the products of attention too
    code: DDIM with eta 0, where VSC is void           DDPM, whose variance the network may learn
    code: the mean of Delta for that of r              of r, as the paper has it
    code: eps of the latent's 3 channels               all; its variance half stays
    statistics are of one number of steps              04 --steps: those of the nearest timestep

    python methods/ptqd.py --run runs/xl --wbits 4 --abits 8
    python 04_sample.py    --run runs/xl --wbits 4 --abits 8 --tag ptqd
"""

import sys
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import (  # noqa: E402
    Parser, at_least, check_bits, model_name, number_or_none, run_script, settings_of, whole_number,
)  # fmt: skip
from common.errors import InputError  # noqa: E402
from common.noise_correction import error_energy, measure, noise_of  # noqa: E402
from common.phase3 import SAMPLING, Machine, Phase3  # noqa: E402
from common.quant_file import build_quantized  # noqa: E402
from methods import qdiffusion  # noqa: E402
from models_dit import Diffusion  # noqa: E402

LOT = 32  # trajectories at a time


OWN = dict(edge_bits=int | None, trajectories=int, seed=int, variance=bool, correction=bool)
# what decides the result: Q-Diffusion's settings, and its own
Settings = NamedTuple("Settings", (qdiffusion.Settings.__annotations__ | OWN).items())


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    qdiffusion.add_flags(p, 10000, 8, 5000, 16, "ptqd")
    edge = "k of the embedder and final layer, 2..8; none: as the others, and learned"
    p.paper.add_argument("--edge-bits", type=number_or_none, default=8, help=edge)
    many = "sampled to measure the noise on, in full precision"
    p.paper.add_argument("--trajectories", type=whole_number, default=1024, help=many)
    p.paper.add_argument("--variance", action=flag, default=True, help="VSC, else only k and bias")
    alone = "k, bias and VSC; without, the network alone"
    p.paper.add_argument("--correction", action=flag, default=True, help=alone)
    p.ours.add_argument("--seed", type=whole_number, default=0, help="of these trajectories")
    return p.parse_args()


def check(args):
    qdiffusion.check(args)
    if args.edge_bits is not None:
        check_bits(args, "edge_bits")
    at_least(1, args, "trajectories")
    if args.trajectories > 10**6:  # told before hours of work
        raise InputError(f"--trajectories {args.trajectories}: at most a million")
    at_least(0, args, "seed")


def measured(phase3, quantized, cfg):
    """The moments of the quantized network's error, (T, N, C, 5), on the host. Kept lot by lot: a
    run that is killed resumes."""
    device, parts = phase3.machine.device, phase3.parts
    sampling = {key: phase3.calib["settings"][key] for key in SAMPLING}
    diffusion = Diffusion(sampling["steps"], device)
    lots = torch.arange(cfg.trajectories).split(LOT)
    todo = [i for i in range(len(lots)) if not parts.has(f"noise_{i}")]
    model, quantized = phase3.model.to(device), quantized.to(device)
    settings = sampling | dict(seed=cfg.seed)
    total = len(todo) * (diffusion.num_timesteps + 1)
    with phase3.group.bar(total=total, desc="noise", unit="step") as bar:
        for i in todo:
            both = model, quantized, diffusion
            parts.save(f"noise_{i}", measure(*both, lots[i].tolist(), settings, bar))
    phase3.model.cpu()
    return torch.cat([parts.load(f"noise_{i}") for i in range(len(lots))], dim=1)


def add_noise(file, phase3, cfg):
    """Puts what the sampler corrects into the quant file, and says in a line what that is."""
    moments = measured(phase3, build_quantized(file, "this run"), cfg)
    file["noise"] = noise = noise_of(moments)
    sensitivity = Diffusion(len(moments)).sensitivity().double()
    signal = moments[..., 3].mean(dim=(1, 2))
    levels = [
        10 * torch.log10((sensitivity @ signal) / (sensitivity @ error)).item()
        for error in error_energy(moments, noise)
    ]
    print("eps after guidance, {:.2f} dB; corrected, {:.2f} dB; ".format(*levels), end="")
    print("k from {:.4f} to {:.4f}".format(*noise["slope"].aminmax()))
    if not cfg.variance:
        noise["std"].zero_()


def main(args):
    check(args)
    cfg, machine = settings_of(Settings, args), Machine.of(args)
    how = dict(gradients=False, in_order=True)
    phase3 = Phase3(args.run, model_name(args), "ptqd", cfg._asdict(), machine, **how)
    if phase3.is_done():
        return
    for unit in phase3.units():
        phase3.save(unit, qdiffusion.quantize_unit(phase3, unit, cfg, cfg.edge_bits))
    phase3.finish(edit=partial(add_noise, phase3=phase3, cfg=cfg) if cfg.correction else None)


if __name__ == "__main__":
    run_script(main, parse_args)
