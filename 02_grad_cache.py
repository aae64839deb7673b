"""Phase 2: one forward and one backward pass over the calibration set.

Paper: Sec. III-B, Alg. 1 lines 9-12, Eq. (11).  In: RUN/calib.pt.
Out: RUN/grads/{embed,block_NN,final}.pt, each with dL/d(outputs) of a unit, and the embedder's with
the network's inputs. Every layer's output and gradient inside a unit follow from these in Phase 3,
as in gradient checkpointing, so nothing is stored per layer (D14). Units are outside and batches of
samples inside: the device holds one of each at a time, the host one unit's rows; disk: 4 bytes x
n G x tokens x width x depth (11 GB for DiT-XL/2), two units' worth more meanwhile.

    python 02_grad_cache.py --run runs/xl
"""

from functools import partial
from itertools import pairwise

import torch
from tqdm import tqdm

from common.artifacts import atomic_write, check_place, is_up_to_date, provenance
from common.checkpoints import load_calib, load_calibrated
from common.cli import Parser, at_least, run_script, whole_number
from common.offload import in_batches, next_inputs, unit_on, units, units_of
from common.parts import Parts
from common.report import print_peak
from models_dit import Diffusion, draw_noise, explicit_products, image_generators

STREAM = 2  # of random numbers, for --eps renoise


def parse_args():
    p = Parser(__doc__)
    choices = ("implied", "renoise")
    p.ours.add_argument("--eps", choices=choices, default="implied", help="eps of Eq. (11), D2")
    p.machine.add_argument("--batch-size", type=whole_number, default=8, help="rows at a time")
    return p.parse_args()


def noise_and_inputs(rows, diffusion, which_eps, seed):
    """The eps of Eq. (11) and the x_t it was added to (D2), both (R, C, H, W)."""
    if which_eps == "implied":
        return diffusion.implied_eps(rows["x"], rows["x_0"], rows["t"]), rows["x"]
    generators = image_generators(seed, range(len(rows["t"])), STREAM)
    eps = draw_noise(generators, rows["x"].shape[1:], "cpu")
    return eps, diffusion.q_sample(rows["x_0"], rows["t"], eps)


def forward_pass(model, inputs, parts, batch_size, device):
    """Alg. 1 lines 10-11: the inputs of every unit, one unit after the other, kept in `parts`."""
    names = list(units(model))
    parts.save(f"in_{names[0]}", inputs)
    for name, following in pairwise(tqdm(names, desc="02 forward", unit="unit")):  # l = 1, ..., L
        if not parts.has(f"in_{following}"):
            inputs = next_inputs(model, name, parts.load(f"in_{name}"), batch_size, device)
            parts.save(f"in_{following}", inputs)


def loss_gradient(model, out, eps):
    """dL/d(final layer's output), Eq. (11): L = ||eps - eps_theta||^2 for each row on its own."""
    out = out.detach().requires_grad_()
    eps_theta = model.unpatchify(out)[:, : model.in_channels]
    return torch.autograd.grad(((eps - eps_theta) ** 2).sum(), out)[0]


def unit_gradient(function, x, c, grad):
    """dL/dx and dL/dc of a block or of the final layer, from dL/d(output)."""
    x, c = x.requires_grad_(), c.requires_grad_()
    (out,) = function(x, c)
    return torch.autograd.grad(out, (x, c), grad)


def start_backward(model, eps, parts, batch_size, device):
    """Alg. 1 line 12 begins: dL/d(output) of the final layer, (R, S, outputs), and dL/dc, summed up
    from zero, (R, D)."""
    x, c = parts.load("in_final")
    with unit_on(model, "final", device) as function:

        def gradient(x, c, eps):
            (out,) = function(x, c)
            return [loss_gradient(model, out, eps)]

        grad = in_batches(gradient, [x, c, eps], batch_size, device)
    parts.save("grad_final", [*grad, torch.zeros_like(c)])


def can_resume(parts, files):
    """Whether a killed run's backward pass can go on, from the gradient that it kept last; if files
    that it had written are gone, its gradients go too."""
    kept = [i for i, file in enumerate(files) if parts.has(f"grad_{file.stem}")]
    resumes = bool(kept) and all(file.exists() for file in files[kept[0] + 1 :])
    for i in kept if not resumes else ():
        parts.remove(f"grad_{files[i].stem}")
    return resumes


def backward_pass(model, folder, parts, head, batch_size, device):
    """Alg. 1 line 12: write the file of every unit, the last first; each hands its gradient on."""
    names = list(units(model))
    previous = dict(zip(names[1:], names, strict=False))
    reached = next(i for i, name in enumerate(names) if parts.has(f"grad_{name}"))  # resuming
    for name in tqdm(names[reached::-1], desc="02 backward", unit="unit"):  # l = L, ..., 1
        inputs, (grad, grad_c) = parts.load(f"in_{name}"), parts.load(f"grad_{name}")
        unit = dict(unit=name, unit_grads=[grad])
        if name == "embed":
            unit |= dict(unit_grads=[grad, grad_c], unit_inputs=inputs)
        with atomic_write(folder / f"{name}.pt") as file:
            torch.save(head | unit, file)
        if name in previous:
            with unit_on(model, name, device) as function:
                backward = partial(unit_gradient, function)
                grad, more_c = in_batches(backward, [*inputs, grad], batch_size, device)
            parts.save(f"grad_{previous[name]}", [grad, grad_c + more_c])
            for part in (f"grad_{name}", f"in_{name}"):
                parts.remove(part)


def main(args):  # Alg. 1 line 9
    at_least(1, args, "batch_size")
    calib, folder = load_calib(args.run), args.run / "grads"
    batches = args.batch_size, args.device
    head = provenance("grads", {"eps": args.eps}, {"calib": calib["sha256"]}, args.device)
    last = folder / "embed.pt"  # written last: its presence says that all are there
    parts = Parts(folder, head)
    files = [folder / f"{name}.pt" for name in units_of(calib["settings"]["config"]["depth"])]
    missing = [file for file in files if not file.exists()]
    if is_up_to_date(last, head, args.force):
        if not missing:
            return parts.clear()  # a run killed after its last write left them
        print(f"but {missing[0]} is missing: all are made again")
    for file in files:
        check_place(file)
    parts.claim()
    model = explicit_products(load_calibrated(calib))
    rows, diffusion = calib["calibration"], Diffusion(calib["settings"]["steps"])
    eps, x_t = noise_and_inputs(rows, diffusion, args.eps, calib["settings"]["seed"])
    parts.clear(others_only=True)  # whose unit files this run is about to replace
    last.unlink(missing_ok=True)
    if not can_resume(parts, files):
        inputs = [x_t, diffusion.timestep_map[rows["t"]], rows["y"]]
        forward_pass(model, inputs, parts, *batches)
        start_backward(model, eps, parts, *batches)
    backward_pass(model, folder, parts, head, *batches)
    parts.clear()
    sizes = [file.stat().st_size for file in files]
    print(f"wrote {len(sizes)} files in {folder}, {sum(sizes) / 2**20:.0f} MiB.  ", end="")
    print(f"Next: python 03_quantize.py --run {args.run} --wbits 8 --abits 8")
    print_peak(args.device)


if __name__ == "__main__":
    run_script(main, parse_args)
