"""Sample images from the quantized model, or with --fp from the full-precision one.

Paper: Sec. IV-A, Eq. (2)-(4).  In: RUN/quant_wXaY.pt alone, or with --fp RUN/calib.pt and the
checkpoint it names.  Out: RUN/samples_wXaY.npz (arr_0: uint8 images N, H, W, C; labels; meta) and
a .png grid. Image i has noise of its own, drawn from (seed, i): it is the same in any batch, on
any number of processes and for every model, so samples of two models pair up.

    python 04_sample.py --run runs/xl --wbits 8 --abits 8 --num-images 10000
    torchrun --nproc_per_node=8 -- 04_sample.py --run runs/xl --fp --num-images 10000
"""

import json
import os
from contextlib import nullcontext
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from models_dit import (
    VAE_SCALE, Diffusion, InputError, Parser, Parts, World, at_least_one, check_bits, check_labels,
    header, image_generators, load_artifact, load_calib, load_calibrated, load_vae, model_name,
    run_script, same_result, sha256_of, trajectory, write_atomic,
)
from quant_ops import build_quantized, group_table


def parse_args():
    p = Parser(__doc__)
    p.paper.add_argument("--wbits", type=int, help="bits of weights; with --abits names the model")
    p.paper.add_argument("--abits", type=int, help="bits of activations")
    p.paper.add_argument("--tag", default="", help="as given to 03_quantize.py")
    p.paper.add_argument("--fp", action="store_true", help="sample the full-precision model")
    p.paper.add_argument("--num-images", type=int, default=10000, help="Sec. IV-A: 10,000")
    p.paper.add_argument("--first", type=int, default=0, help="index of the first image")
    p.paper.add_argument("--seed", type=int, default=0)
    p.paper.add_argument("--classes", type=int, nargs="+", help="only these labels, in turn")
    p.paper.add_argument("--steps", type=int, help="T, if other than calibrated (D4)")
    p.paper.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products")
    p.machine.add_argument("--batch-size", type=int, default=64, help="images at a time")
    p.machine.add_argument("--compile", action="store_true", help="torch.compile the network")
    return p.parse_args()


def check(args):
    if args.fp == (args.wbits is not None or args.abits is not None):
        raise InputError("give either --fp or both --wbits and --abits")
    if not args.fp:
        check_bits(args, "wbits", "abits")
    at_least_one(args, "steps", "num_images", "batch_size")
    if min(args.first, args.seed) < 0:
        raise InputError("--first and --seed must not be negative")


def load_model(args):
    """The model, how it is to be sampled, and what it came from."""
    if args.fp:
        calib = load_calib(args.run)
        model = load_calibrated(calib)
        size = os.path.getsize(calib["settings"]["ckpt"])
        return model, calib["settings"], calib["inputs"], size
    path = args.run / f"quant_{model_name(args)}.pt"
    artifact = load_artifact(path, "quant", "03_quantize.py")
    model, sampling = build_quantized(artifact, path), artifact["settings"]["sampling"]
    if args.steps:
        timestep_map = Diffusion(args.steps).timestep_map
        model.group_table = group_table(timestep_map, sampling["groups"])
    return model, sampling, artifact["inputs"] | {"quant": sha256_of(path)}, os.path.getsize(path)


def to_uint8(x, vae):
    """(N, C, h, w) samples, decoded if latent -> (N, H, W, C) uint8."""
    if vae is not None:
        x = torch.cat([vae(z / VAE_SCALE) for z in x.split(4)])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()


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


def save_grid(path, images, columns=8):
    """A .png of the first 64 images, row by row."""
    images = images[: min(64, len(images))]
    _, height, width, channels = images.shape
    rows = -(-len(images) // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels).squeeze()
    write_atomic(path, lambda file: Image.fromarray(sheet).save(file, "png"))


def finished(path, head, force):
    """True if `path` holds these very samples; InputError if it holds others, unless --force."""
    if force or not path.exists():
        return False
    try:
        with np.load(path) as old:
            return same_result(path, json.loads(str(old["meta"])), head)
    except (OSError, EOFError, LookupError, TypeError, ValueError, BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}); --force replaces it") from error


def main(args):
    check(args)
    world, device = World(), args.device
    model, sampling, inputs, size = load_model(args)
    settings = {key: sampling[key] for key in ("steps", "cfg_scale", "cfg_channels", "vae")}
    settings["steps"] = args.steps or settings["steps"]
    settings |= {key: getattr(args, key) for key in ("num_images", "first", "seed", "dtype")}
    classes = args.classes or list(range(model.num_classes))
    settings |= dict(name=model_name(args), classes=args.classes)
    indices = torch.arange(args.first, args.first + args.num_images)
    labels = torch.tensor(classes)[indices % len(classes)]
    check_labels(labels, model.num_classes, "--classes")
    diffusion = Diffusion(settings["steps"], device)
    head = header("samples", settings, inputs, device)
    path = args.run / f"samples_{model_name(args)}.npz"
    parts = Parts(path, head, args.batch_size)
    if finished(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    vae = None if settings["vae"] == "none" else load_vae(settings["vae"]).to(device)
    model = model.to(device)
    if args.compile:
        model.compile()
    batches = list(zip(indices.split(args.batch_size), labels.split(args.batch_size), strict=True))
    mine = world.share(parts, range(len(batches)))
    total = len(mine) * (diffusion.steps + 1)
    with world.bar(total=total, desc=f"04 {path.stem}", unit="step") as bar:
        for i in mine:
            index, y = batches[i]
            parts.save(i, sample(model, vae, diffusion, index.tolist(), y, settings, bar))
    world.wait()
    if world.rank == 0:
        images = torch.cat([parts.load(i) for i in range(len(batches))]).numpy()
        meta = json.dumps(head | dict(model_bytes=size))
        arrays = dict(arr_0=images, labels=labels.numpy(), meta=np.array(meta))
        save_grid(path.with_suffix(".png"), images)
        write_atomic(path, lambda file: np.savez(file, **arrays))  # last: it says all is done
        parts.clear()
        print(f"wrote {path} and its .png: {len(images)} images.  ", end="")
        print(f"Next: python 05_eval_fid.py --run {args.run} --reference REFERENCE.npz")


if __name__ == "__main__":
    run_script(main, parse_args)
