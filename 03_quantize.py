"""Phase 3: choose every step size by Hessian-guided search and write the quantized model.

Paper: Sec. III, Alg. 1 lines 13-33, Eq. (9), (15)-(17), Table III.  In: RUN/calib.pt, RUN/grads/.
Out: RUN/quant_wXaY.pt, which alone is enough to sample. Layers are independent of each other: the
inputs and targets of each are full-precision ones. Ends with the quantized model's signal-to-noise
ratio of eps on rows it was not fitted to, and the layers that cost most.

    python 03_quantize.py --run runs/xl --wbits 8 --abits 8
    python 03_quantize.py --run runs/xl --wbits 6 --abits 6 --tag b --metric mse --no-mrq --no-tgq
    torchrun --nproc_per_node=8 -- 03_quantize.py --run runs/xl --wbits 6 --abits 6
"""

from argparse import BooleanOptionalAction

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from models_dit import (
    Diffusion, InputError, MatMul, Parser, Parts, World, already_made, at_least_one, check_bits,
    explicit_products, header, load_artifact, load_calib, load_calibrated, model_name, run_script,
    save_artifact, sha256_of, unit_on, units,
)
from quant_ops import (
    LAYERS, FullPrecision, build_quantized, fake_quant, gelu_candidates, group_table, hessian_loss,
    pack_weight, qparams_from_range, quantizer_state, search, softmax_candidates, step_grid,
    uniform_candidates,
)

RELEASED = {  # Deviation D6: the layers of the authors' release, by the unit they are in
    "embed": ("x_embedder.proj",),
    "block": ("attn.qkv", "attn.qk", "attn.av", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "final": ("linear",),
}
EXTRA = {  # and the linear layers that --layers all adds
    "embed": ("t_embedder.mlp.0", "t_embedder.mlp.2"),
    "block": ("adaLN_modulation.1",),
    "final": ("adaLN_modulation.1",),
}


def parse_args():
    p, flag = Parser(__doc__), BooleanOptionalAction
    p.paper.add_argument("--wbits", type=int, required=True, help="bits of weights, 2..8")
    p.paper.add_argument("--abits", type=int, required=True, help="bits of activations, 2..8")
    p.paper.add_argument("--metric", choices=("hessian", "mse"), default="hessian", help="HO, D11")
    p.paper.add_argument("--mrq", action=flag, default=True, help="multi-region quantization")
    p.paper.add_argument("--tgq", action=flag, default=True, help="time-grouping quantization")
    p.paper.add_argument("--rounds", type=int, default=3, help="R, Sec. IV-A")
    p.paper.add_argument("--layers", choices=("released", "all"), default="released", help="D6")
    p.paper.add_argument(
        "--weight-granularity", choices=("channel", "tensor"), default="channel", help="D5"
    )
    p.paper.add_argument("--rows", type=int, help="search on a stratified subset of the rows")
    p.paper.add_argument("--tag", default="", help="names the file quant_wXaY_TAG.pt")
    p.machine.add_argument("--batch-size", type=int, default=8, help="calibration rows at a time")
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# A layer's calibration data: chunks [grad, y, *inputs, group] on the host, rows first


def load_grads(name, args):
    """What Phase 2 wrote of a unit; InputError if it did so for another calib.pt."""
    unit = load_artifact(args.run / "grads" / f"{name}.pt", "grads", "02_grad_cache.py")
    if unit["inputs"]["calib"] != sha256_of(args.run / "calib.pt"):
        raise InputError(f"{args.run}/grads is of another calib.pt: run 02_grad_cache.py --force")
    return unit


def load_unit(name, calib, args):
    """A unit's inputs, output gradients and time groups, of all rows or of --rows of them."""
    unit = load_grads(name, args)
    groups = calib["calibration"]["group"]
    wanted = torch.ones(len(groups), dtype=torch.bool)
    if args.rows:  # the first of every group: rows of a group are in random order
        place = torch.cat([torch.arange(int(n)) for n in groups.bincount()])
        wanted = place < args.rows / calib["settings"]["groups"]
    columns = [[x[wanted] for x in unit[key]] for key in ("unit_inputs", "unit_grads")]
    return *columns, groups[wanted]


def capture(function, layer, inputs, grads, groups, args):
    """Alg. 1 lines 11-12 for one layer: its inputs, output and dL/d(output), by a unit-local pass.

    A zero is added to the layer's output and the unit runs on; the gradient with respect to that
    zero is the layer's.
    """
    kept, chunks = {}, []

    def hook(module, layer_inputs, output):
        kept["zero"] = torch.zeros_like(output, requires_grad=True)
        kept["data"] = [output, *(x for x in layer_inputs if x is not None)]
        return output + kept["zero"]

    handle = layer.register_forward_hook(hook)
    try:
        columns = [x.split(args.batch_size) for x in (*inputs, *grads, groups)]
        for *batch, group in zip(*columns, strict=True):
            batch = [x.to(args.device) for x in batch]
            outputs = zip(function(*batch[: len(inputs)]), batch[len(inputs) :], strict=True)
            ends, ends_grad = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
            (grad,) = torch.autograd.grad(ends, kept["zero"], ends_grad)
            chunks.append([x.detach().cpu() for x in (grad, *kept["data"], group)])
    finally:
        handle.remove()
    return chunks


def patch_dead(chunks, groups, channel=-1):
    """Where the loss has no gradient, an output channel or a whole time group falls back to plain
    squared error (Deviation D2), weighted like the rest of the layer. Returns new chunks."""
    grads = torch.cat([grad for grad, *_ in chunks])
    size = grads.abs()
    largest = torch.stack([size[groups == i].max() for i in range(int(groups.max()) + 1)])
    dead_row = (largest <= 1e-4 * size.max())[groups].view(-1, *[1] * (grads.ndim - 1))
    others = [d for d in range(grads.ndim) if d != channel % grads.ndim]
    dead = dead_row | (size.amax(others, keepdim=True) == 0)
    alive = (~dead).expand_as(grads).sum()
    rms = (torch.where(dead, 0, grads).square().sum() / alive).sqrt() if alive else torch.ones(())
    grads = torch.where(dead, rms, grads)
    parts = grads.split(len(chunks[0][0]))
    return [[grad, *rest] for grad, (_, *rest) in zip(parts, chunks, strict=True)]


def as_matrices(layer, grad, y, x, _):
    """A convolution's or linear layer's chunk as matrices: grad, y less bias (R, O), x (R, I)."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        y, grad = y.movedim(1, -1), grad.movedim(1, -1)
    return grad.flatten(0, -2), (y - layer.bias.cpu()).flatten(0, -2), x.flatten(0, -2)


# ------------------------------------------------------------------------------------------------
# Alg. 1 lines 15-33: the alternating search of one layer


def stream(chunks, args):
    """Chunks on the device. Where the metric is plain MSE the gradient becomes 1 (D11)."""
    for grad, *rest in chunks:
        weight = torch.ones_like(grad) if args.metric == "mse" else grad
        yield [x.to(args.device) for x in (weight, *rest)]


def value_range(tensors, args):
    lows, highs = zip(*(x.aminmax() for x in tensors), strict=True)
    return torch.stack(lows).amin().to(args.device), torch.stack(highs).amax().to(args.device)


def group_range(tensors, groups, args):
    """Range of the rows of every time group, (G,) each."""
    low, high = torch.cat([torch.stack(x.flatten(1).aminmax(dim=1)) for x in tensors], dim=1)
    mine = [groups == i for i in range(int(groups.max()) + 1)]
    ends = [low[rows].min() for rows in mine], [high[rows].max() for rows in mine]
    return [torch.stack(end).to(args.device) for end in ends]


def quantize_linear(layer, chunks, post_gelu, args):
    """Lines 15-22: alternate Delta_W and Delta_X for R rounds. Returns the layer's state."""
    weight, alphas = layer.weight.flatten(1), step_grid().to(args.device)
    low, high = weight.aminmax(dim=1, keepdim=True)  # (O, 1)
    if args.weight_granularity == "tensor":
        low, high = low.amin(), high.amax()
    step0, zero = qparams_from_range(low, high, args.wbits)
    make = gelu_candidates if post_gelu and args.mrq else uniform_candidates
    act, searches = make(*value_range([x for _, _, x in chunks], args), args.abits)
    if isinstance(layer, nn.Conv2d) and args.layers == "released":
        act, searches = FullPrecision(), []  # D6: of the patch embedding only the weight

    def weight_loss(chunk, alpha):
        grad, y, x = chunk
        w = fake_quant(weight, alpha * step0, zero, args.wbits)
        loss = hessian_loss(torch.addmm(y, x, w.T, beta=-1), grad, dim=0)  # (O,)
        return loss[:, None] if step0.ndim else loss.sum()

    def input_loss(chunk, value):
        grad, y, x = chunk
        return hessian_loss(torch.addmm(y, vary(act, value)(x), w.T, beta=-1), grad)

    for _ in range(args.rounds):  # line 17
        inputs = ([grad, y, act(x)] for grad, y, x in stream(chunks, args))
        best, _ = search(weight_loss, alphas, inputs)
        step = alphas[best] * step0  # line 18
        w = fake_quant(weight, step, zero, args.wbits)
        for vary, values in searches:
            best, _ = search(input_loss, values, stream(chunks, args))
            act = vary(act, values[best])  # line 20 (MRQ) or line 22
    return dict(
        type="conv" if isinstance(layer, nn.Conv2d) else "linear",
        weight=pack_weight(layer.weight.cpu(), step.cpu(), zero.cpu(), args.wbits),
        bias=layer.bias.detach().cpu(),
        act=quantizer_state(act),
    )


def quantize_matmul(chunks, post_softmax, groups, args):
    """Lines 23-33: alternate Delta_A, per time group after softmax, and Delta_B for R rounds."""
    by_group, count = post_softmax and args.tgq, int(groups.max()) + 1
    _, _, a_all, b_all, _ = zip(*chunks, strict=True)
    if post_softmax and args.mrq:
        qa, [(vary_a, values_a)] = softmax_candidates(args.abits, args.device)
    else:
        low_high = group_range(a_all, groups, args) if by_group else value_range(a_all, args)
        qa, [(vary_a, values_a)] = uniform_candidates(*low_high, args.abits)
    qb, [(vary_b, values_b)] = uniform_candidates(*value_range(b_all, args), args.abits)

    def a_loss(chunk, value):
        grad, y, a, b, group = chunk
        delta = vary_a(qa, value)(a, group) @ qb(b) - y
        loss = hessian_loss(delta, grad, dim=(1, 2, 3))  # (rows,)
        return F.one_hot(group, count).to(loss).T @ loss if by_group else loss.sum()

    def b_loss(chunk, value):
        grad, y, a, b, group = chunk
        return hessian_loss(qa(a, group) @ vary_b(qb, value)(b) - y, grad)

    for _ in range(args.rounds):  # line 25
        best, _ = search(a_loss, values_a, stream(chunks, args))
        qa = vary_a(qa, values_a[best])  # line 30, all groups at once, or line 32
        best, _ = search(b_loss, values_b, stream(chunks, args))
        qb = vary_b(qb, values_b[best])  # line 33
    return dict(type="matmul", a=quantizer_state(qa), b=quantizer_state(qb))


# ------------------------------------------------------------------------------------------------
# Units, the model, and the report at the end


@torch.no_grad()
def layer_cost(state, chunks, args):
    """The finished layer's error, Eq. (16), and its output's energy, both weighted by the gradient
    (or D2's stand-in for it) whatever --metric is, so that runs compare."""
    layer, cost, energy = LAYERS[state["type"]](state).to(args.device), 0.0, 0.0
    for chunk in chunks:
        grad, y, *inputs, group = (x.to(args.device) for x in chunk)
        out = layer(*inputs, group) if state["type"] == "matmul" else layer(*inputs)
        cost += hessian_loss(out - y, grad).item()
        energy += hessian_loss(y, grad).item()
    return dict(cost=cost, energy=energy)


def quantize_unit(name, model, calib, args):
    """Lines 14-33 for the layers of one unit: their states and costs, by layer name."""
    inputs, grads, groups = load_unit(name, calib, args)
    kind, prefix, done = name.split("_")[0], units(model)[name], {}
    with unit_on(model, name, args.device) as function:
        for child in RELEASED[kind] + (EXTRA[kind] if args.layers == "all" else ()):
            layer = model.get_submodule(prefix + child)
            chunks = capture(function, layer, inputs, grads, groups, args)
            chunks = patch_dead(chunks, groups, 1 if isinstance(layer, nn.Conv2d) else -1)
            if isinstance(layer, MatMul):  # line 23
                state = quantize_matmul(chunks, child == "attn.av", groups, args)
            else:  # line 15
                matrices = [as_matrices(layer, *chunk) for chunk in chunks]
                state = quantize_linear(layer, matrices, child == "mlp.fc2", args)
            done[prefix + child] = dict(state=state, **layer_cost(state, chunks, args))
    return done


def assemble(model, config, done, calib):
    """The quantized model's part of the file: codes, steps, and what stays in full precision."""
    layers = {name: layer["state"] for name, layer in done.items()}
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in layers}
    timestep_map = Diffusion(calib["settings"]["steps"]).timestep_map
    table = group_table(timestep_map, calib["settings"]["groups"])
    return dict(config=config, state=state, layers=layers, group_table=table)


@torch.no_grad()
def signal_to_noise(model, quantized, calib, args):
    """SNR in dB of eps on the validation rows: (G,) per time group, and one weighted by how much
    each step's eps moves the sample."""
    diffusion, rows = Diffusion(calib["settings"]["steps"]), calib["validation"]
    signal, noise = [], []
    for x, t, y in zip(*(rows[k].split(args.batch_size) for k in ("x", "t", "y")), strict=True):
        batch = [v.to(args.device) for v in (x, diffusion.timestep_map[t], y)]
        out, out_q = (m(*batch)[:, : model.in_channels].cpu() for m in (model, quantized))
        signal.append(out.double().square().sum((1, 2, 3)))
        noise.append((out_q - out).double().square().sum((1, 2, 3)))
    energy = torch.stack([torch.cat(signal), torch.cat(noise)])  # (2, R)
    groups = torch.zeros(2, calib["settings"]["groups"], dtype=energy.dtype)
    groups.index_add_(1, rows["group"], energy)
    weighted = (energy * diffusion.sensitivity()[rows["t"]]).sum(1)
    ratio = torch.cat([groups, weighted[:, None]], dim=1)
    *per_group, weighted = (10 * torch.log10(ratio[0] / ratio[1])).tolist()
    return dict(snr_per_group=per_group, snr_weighted=weighted)


def print_report(report):
    per_group = "  ".join(f"{snr:.1f}" for snr in report["snr_per_group"])
    print(f"eps, signal to noise on validation rows, dB per time group: {per_group}")
    print(f"weighted by the sampler's sensitivity: {report['snr_weighted']:.2f} dB")
    total = sum(layer["cost"] for layer in report["layers"].values())
    costliest = sorted(report["layers"].items(), key=lambda item: -item[1]["cost"])[:6]
    print("layers that cost most (share of the weighted error): ", end="")
    print(", ".join(f"{name} {layer['cost'] / total:.0%}" for name, layer in costliest))


def main(args):
    check_bits(args)
    at_least_one(args, "rounds", "rows", "batch_size")
    world, calib = World(), load_calib(args.run)
    knobs = "wbits abits metric mrq tgq rounds layers weight_granularity rows tag"
    settings = {key: getattr(args, key) for key in knobs.split()}
    settings |= load_grads("embed", args)["settings"]  # written last: all are there
    knobs = "steps groups cfg_scale cfg_channels vae"  # all that 04 needs to know of Phase 1
    settings["sampling"] = {key: calib["settings"][key] for key in knobs.split()}
    inputs = {"calib": sha256_of(args.run / "calib.pt"), **calib["inputs"]}
    inputs["grads"] = sha256_of(args.run / "grads" / "embed.pt")
    head = header("quant", settings, inputs, args.device)
    path = args.run / f"quant_{model_name(args)}.pt"
    parts, done = Parts(path, head), {}
    if already_made(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    model = explicit_products(load_calibrated(calib))
    names = list(units(model))
    for name in tqdm(names[world.rank :: world.size], desc=f"03 {path.stem}", unit="unit"):
        if not parts.has(name):
            parts.save(name, quantize_unit(name, model, calib, args))
    world.wait()
    if world.rank == 0:
        for name in names:
            done |= parts.load(name)
        head |= assemble(model, calib["settings"]["config"], done, calib)
        quantized = build_quantized(head, "this run").to(args.device)
        head["report"] = signal_to_noise(model.to(args.device), quantized, calib, args)
        keys = ("cost", "energy")
        head["report"]["layers"] = {n: {k: d[k] for k in keys} for n, d in done.items()}
        print_report(head["report"])
        wrote = save_artifact(path, head)
        parts.clear()
        flags = f"--wbits {args.wbits} --abits {args.abits}{' --tag ' * bool(args.tag)}{args.tag}"
        print(f"{wrote}.  Next: python 04_sample.py --run {args.run} {flags}")


if __name__ == "__main__":
    run_script(main, parse_args)
