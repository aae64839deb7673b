"""Sample images from the quantized model, or with --fp from the full-precision one.

Paper: Sec. IV-A, Eq. (2)-(4).  In: RUN/quant_wXaY.pt alone, or with --fp RUN/calib.pt and the
checkpoint it names.  Out: RUN/samples_wXaY.npz (arr_0: uint8 images N, H, W, C; labels; meta) and
a .png grid. Image i has noise of its own, drawn from (seed, i), the same in any batch, on any
number of processes and for every model, so samples of two models pair up.

    python 04_sample.py --run runs/xl --wbits 8 --abits 8 --num-images 10000
    torchrun --nproc_per_node=8 -- 04_sample.py --run runs/xl --fp --num-images 10000
"""

import json
import os
from contextlib import nullcontext

import numpy as np
import torch

from common.artifacts import load_hashed, provenance
from common.checkpoints import check_labels, load_calib, load_calibrated
from common.cli import Parser, at_least, check_bits, check_tag, model_name, run_script, whole_number
from common.distributed import join_process_group
from common.errors import InputError
from common.images import samples_up_to_date, save_samples, to_uint8
from common.int8_engine import build, compile_mode
from common.noise_correction import make_diffusion
from common.parts import Parts
from common.quant_file import load_quant, table_at
from common.vae import load_vae, local_vae
from models_dit import TRAIN_TIMESTEPS, image_generators, trajectory

SAMPLING = ("steps", "cfg_scale", "cfg_channels", "vae")  # decided in 01
OWN = ("num_images", "first", "seed", "dtype", "classes", "engine")  # decided here


def parse_args():
    p = Parser(__doc__)
    bits = "k of weights, 2..8; with --abits and --tag names the model"
    p.paper.add_argument("--wbits", type=whole_number, help=bits)
    p.paper.add_argument("--abits", type=whole_number, help="k of activations, 2..8")
    p.paper.add_argument("--fp", action="store_true", help="sample the full-precision model")
    p.paper.add_argument("--num-images", type=whole_number, default=10000, help="Sec. IV-A: 10,000")
    p.ours.add_argument("--tag", default="", help="as given to 03_quantize.py, or a method's")
    p.ours.add_argument("--first", type=whole_number, default=0, help="index of the first image")
    p.ours.add_argument("--seed", type=whole_number, default=0, help="of the noise of every image")
    p.ours.add_argument("--classes", type=whole_number, nargs="+", help="labels, taken, in turn")
    p.ours.add_argument("--steps", type=whole_number, help="T, if other than calibrated (D4)")
    p.ours.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products")
    p.ours.add_argument(
        "--engine", choices=("float", "int8", "int8-folded"), default="float", help="of the layers"
    )
    p.ours.add_argument("--vae-path", help="the VAE's file or folder; without it, downloaded")
    p.machine.add_argument("--batch-size", type=whole_number, default=64, help="images at a time")
    p.machine.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p.parse_args()


def check(args):
    if args.fp and args.engine != "float":
        raise InputError(f"--engine {args.engine} is for quantized models, not for --fp")
    if args.fp == (args.wbits is not None or args.abits is not None):
        raise InputError("give either --fp or both --wbits and --abits")
    if args.fp and args.tag:
        raise InputError(f"--tag {args.tag} is for quantized models, not for --fp")
    if not args.fp:
        check_bits(args, "wbits", "abits")
    check_tag(args)
    at_least(1, args, "steps", "num_images", "batch_size")
    if args.steps and args.steps > TRAIN_TIMESTEPS:
        raise InputError(f"--steps {args.steps}: T must be 1..{TRAIN_TIMESTEPS}")
    at_least(0, args, "first", "seed")
    if args.first + args.num_images > 10**8:
        raise InputError("--first and --num-images: the last image must be below 100 million")


def full_precision(run):
    """The model that calib.pt names, how it is to be sampled, what it came from, its bytes."""
    calib = load_calib(run)
    model, size = load_calibrated(calib), os.path.getsize(calib["settings"]["ckpt"])
    return model, calib["settings"], calib["inputs"], size


def quantized(path, num_timesteps, engine, device):
    """The model of a quant file, how it is to be sampled, what it came from, its bytes."""
    artifact, digest = load_hashed(path, load_quant)
    model = build(artifact, path, engine, device)
    sampling = dict(noise=artifact.get("noise"), folded=model.folded)
    sampling |= artifact["settings"]["sampling"]
    if num_timesteps:
        model.group_table = table_at(artifact, num_timesteps)
    return model, sampling, artifact["inputs"] | {"quant": digest}, os.path.getsize(path)


@torch.no_grad()
def sample(model, vae, diffusion, indices, labels, settings, bar):
    """uint8 images (N, H, W, C) with these indices, (N,), whatever else is sampled beside them."""
    generators = image_generators(settings["seed"], indices)
    y = labels.to(diffusion.timestep_map.device)
    precise = settings["dtype"] == "fp32"
    guidance = settings["cfg_scale"], settings["cfg_channels"]
    with nullcontext() if precise else torch.autocast(y.device.type, torch.bfloat16):
        for _, x in trajectory(model, diffusion, y, generators, *guidance):  # noqa: B007
            bar.update()
    return to_uint8(x.float(), vae)


def main(args):
    check(args)
    group, device, name = join_process_group(), args.device, model_name(args)
    how = args.run / f"quant_{name}.pt", args.steps, args.engine, device
    model, sampling, inputs, size = full_precision(args.run) if args.fp else quantized(*how)
    settings = {key: sampling[key] for key in SAMPLING} | {key: getattr(args, key) for key in OWN}
    settings |= dict(steps=args.steps or sampling["steps"], name=name) | sampling.get("folded", {})
    classes = torch.tensor(args.classes or range(model.num_classes))
    check_labels(classes, model.num_classes, "--classes")
    indices = torch.arange(args.first, args.first + args.num_images)
    labels = classes[indices % len(classes)]
    if group.agree(settings) != settings:
        raise InputError("machines that fold MRQ to other bits: --engine int8, or machines alike")
    inputs = inputs | local_vae(settings["vae"], args.vae_path)
    head = provenance("samples", settings, inputs, device)
    path = args.run / f"samples_{name}.npz"
    parts = Parts(path, head, args.batch_size)
    if samples_up_to_date(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    batches = list(zip(indices.split(args.batch_size), labels.split(args.batch_size), strict=True))
    mine = group.share(parts, range(len(batches)))
    vae = None if settings["vae"] == "none" else load_vae(settings["vae"], args.vae_path).to(device)
    diffusion = make_diffusion(sampling.get("noise"), settings["steps"], device)  # PTQD's, or plain
    model = model.to(device)
    if args.compile:
        model.compile(mode=compile_mode(device))
    total = len(mine) * (diffusion.num_timesteps + 1)
    with group.bar(total=total, desc=f"04 {path.stem}", unit="step") as bar:
        for i in mine:
            index, y = batches[i]
            parts.save(i, sample(model, vae, diffusion, index.tolist(), y, settings, bar))
    group.wait()
    if group.rank == 0:
        images = torch.cat([parts.load(i) for i in range(len(batches))]).numpy()
        meta = json.dumps(head | dict(model_bytes=size))
        save_samples(path, arr_0=images, labels=labels.numpy(), meta=np.array(meta))
        parts.clear()
        print(f"wrote {path} and its .png: {len(images)} images.  ", end="")
        print(f"Next: python 05_eval_fid.py --run {args.run} --reference REFERENCE.npz")


if __name__ == "__main__":
    run_script(main, parse_args)
