"""Phase 3: choose every step size by Hessian-guided search and write the quantized model.

Paper: Sec. III, Alg. 1 lines 13-33, Eq. (9), (15)-(17), Table III.  In: RUN/calib.pt, RUN/grads/.
Out: RUN/quant_wXaY.pt, which alone is enough to sample. Layers are independent of each other: the
inputs and targets of each are full-precision ones. Ends with the quantized model's signal-to-noise
ratio of eps on rows it was not fitted to, and the layers that cost most.

    python 03_quantize.py --run runs/xl --wbits 8 --abits 8
    python 03_quantize.py --run runs/xl --wbits 6 --abits 6 --tag b --metric mse --no-mrq --no-tgq
    python 03_quantize.py --run runs/xl --wbits 4 --abits 8 --preset best      # beyond the paper
    torchrun --nproc_per_node=8 -- 03_quantize.py --run runs/xl --wbits 6 --abits 6
"""

import math
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from models_dit import (
    Diffusion, InputError, Linear, MatMul, Parser, Parts, World, already_made, at_least_one,
    check_bits, explicit_products, header, load_artifact, load_calib, load_calibrated,
    model_name, next_inputs, on_device, print_peak, run_script, save_artifact, sha256_of, streamed,
    unit_on, units,
)
from quant_ops import (
    LAYERS, FloatProduct, FullPrecision, IntProduct, balance_factors, build_quantized,
    compensated_rounding, fake_quant, gelu_candidates, group_table, has_int_unit, hessian_loss,
    pack_weight, qparams_from_range, quantizer_state, search, softmax_candidates, step_grid,
    uniform_candidates,
)

RELEASED = {  # Deviation D6: the layers of the authors' release, by the unit they are in
    "embed": ("x_embedder.proj",),
    "block": ("attn.qkv", "attn.qk", "attn.av", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "final": ("linear",),
}
EXTRA = {  # and the linear layers that --layers all or --cond-bits adds
    "embed": ("t_embedder.mlp.0", "t_embedder.mlp.2"),
    "block": ("adaLN_modulation.1",),
    "final": ("adaLN_modulation.1",),
}
BALANCE = (None, 0.5, 1.0)  # strengths that --balance tries for each layer
COPIES = 5  # a search holds a little less than so many times its chunk
PRESETS = {
    "paper": {},
    "best": dict(tag="best", rounds=1, edge_bits=8, cond_bits=8, tgq_inputs=True)
    | dict(balance=True, rounding="gptq"),
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
    p.paper.add_argument("--rows", type=int, help="search on so many rows, spread over t")
    p.paper.add_argument("--tag", default="", help="names the file quant_wXaY_TAG.pt")
    more = p.add_argument_group("beyond the paper (off by default)")
    more.add_argument("--preset", choices=tuple(PRESETS), default="paper", help="best: all these")
    more.add_argument("--edge-bits", type=int, help="bits of the first and the last layer")
    more.add_argument("--cond-bits", type=int, help="bits of adaLN's and the embedders' weights")
    more.add_argument("--tgq-inputs", action=flag, default=False, help="TGQ for inputs of linears")
    more.add_argument("--balance", action=flag, default=False, help="even out input channels")
    more.add_argument("--rounding", choices=("nearest", "gptq"), default="nearest", help="weights")
    p.machine.add_argument("--batch-size", type=int, default=8, help="rows of a unit's own passes")
    p.machine.add_argument(
        "--memory-limit", type=float, help="MiB a search may take, weights apart: 512, on a CPU 12"
    )
    p.machine.add_argument("--compile", action="store_true", help="fuse passes; meant for CUDA")
    p.set_defaults(**PRESETS[p.parse_known_args()[0].preset])  # other flags win over the preset
    return p.parse_args()


def changed(args, **changes):
    return Namespace(**vars(args) | changes)


def check(args):
    optional = [flag for flag in ("edge_bits", "cond_bits") if getattr(args, flag) is not None]
    check_bits(args, "wbits", "abits", *optional)
    at_least_one(args, "rounds", "rows", "batch_size")
    if args.memory_limit is not None and not 0 < args.memory_limit < math.inf:
        raise InputError(f"--memory-limit {args.memory_limit}: not above 0, or not finite")
    if args.cond_bits and args.layers == "all":
        raise InputError("--cond-bits is for --layers released: all quantizes those layers too")


# ------------------------------------------------------------------------------------------------
# A layer's calibration data: chunks [grad, y, *inputs, group] on the host, rows first


def load_grads(name, calib, args):
    """What Phase 2 wrote of a unit; InputError if it did so for another calib.pt."""
    unit = load_artifact(args.run / "grads" / f"{name}.pt", "grads", "02_grad_cache.py")
    if unit["inputs"]["calib"] != calib["sha256"]:
        raise InputError(f"{args.run}/grads is of another calib.pt: run 02_grad_cache.py --force")
    return unit


class Unit(NamedTuple):
    """A unit's inputs and dL/d(outputs), lists of tensors, and the time group, of every row."""

    name: str
    inputs: list
    grads: list
    groups: torch.Tensor


def load_units(names, model, calib, args):
    """Lines 11-12: yields the `Unit` of every name, in the network's order, of all rows or --rows.

    Phase 2 keeps gradients; inputs are made again by one forward pass over the rows.
    """
    rows = calib["calibration"]
    wanted = torch.arange(len(rows["t"]))
    if args.rows:
        wanted = spread_rows(rows["t"], rows["group"], args.rows)
    inputs = [x[wanted] for x in load_grads("embed", calib, args)["unit_inputs"]]
    left = set(names)
    for name in units(model):
        if name in left:
            grads = load_grads(name, calib, args)["unit_grads"]
            grads = [pinned(x[wanted], args) for x in grads]
            yield Unit(name, [pinned(x, args) for x in inputs], grads, rows["group"][wanted])
        left.discard(name)
        if not left:
            return
        inputs = next_inputs(model, name, inputs, args)


def spread_rows(t, groups, count):
    """Indices of about `count` of the rows, as many from each time group, spread over its
    timesteps from the first to the last: the ends are where values are largest."""
    found = []
    for i in range(int(groups.max()) + 1):
        rows = (groups == i).nonzero()[:, 0]
        rows = rows[t[rows].argsort(stable=True)]
        each = min(len(rows), -(-count // (int(groups.max()) + 1)))
        found.append(rows[torch.linspace(0, len(rows) - 1, each).round().long()])
    return torch.cat(found)


def capture(function, layer, unit, args):
    """Alg. 1 lines 11-12 for one layer: its inputs, output and dL/d(output), by a unit-local pass.

    The layer's output becomes a leaf of the graph and the unit runs on; the gradient with respect
    to that leaf is the layer's.
    """
    kept, columns, done = [], None, 0

    def hook(module, layer_inputs, output):
        leaf = output.detach().requires_grad_()
        kept[:] = [leaf, *(x for x in layer_inputs if x is not None)]
        return leaf

    handle = layer.register_forward_hook(hook)
    try:
        batches = [x.split(args.batch_size) for x in (*unit.inputs, *unit.grads, unit.groups)]
        for *batch, group in zip(*batches, strict=True):
            batch = [x.to(args.device, non_blocking=True) for x in batch]
            given, ends_grad = batch[: len(unit.inputs)], batch[len(unit.inputs) :]
            outputs = zip(function(*given), ends_grad, strict=True)
            ends, ends_grad = zip(*(pair for pair in outputs if pair[0].requires_grad), strict=True)
            (grad,) = torch.autograd.grad(ends, kept[0], ends_grad)
            found = [x.detach() for x in (grad, *kept, group)]
            columns = columns or [host_column(x, len(unit.groups), args) for x in found]
            for column, x in zip(columns, found, strict=True):
                column[done : done + len(x)] = x
            done += len(group)
    finally:
        handle.remove()
    return split(columns, args)


def pinned(x, args):
    """The same on the host, from where CUDA copies without waiting."""
    return x.pin_memory() if args.device.type == "cuda" else x


def host_column(like, rows, args):
    """Room on the host for these rows, pinned as above."""
    on_cuda = args.device.type == "cuda"
    return torch.empty(rows, *like.shape[1:], dtype=like.dtype, pin_memory=on_cuda)


def split(columns, args):
    """Columns cut into even chunks, of as many rows as --memory-limit has room for."""
    limit = args.memory_limit or (512 if args.device.type == "cuda" else 12)
    row = sum(x[:1].nbytes for x in columns)
    rows = max(1, int(limit * 2**20 / (COPIES * row)))
    count = -(-len(columns[0]) // rows)
    return [list(chunk) for chunk in zip(*(x.tensor_split(count) for x in columns), strict=True)]


def patch_dead(chunks, groups, channel=-1, device="cpu"):
    """Where the loss has no gradient, an output channel or a whole time group falls back to plain
    squared error (Deviation D2), weighted like the rest of the layer. Chunks without such stay."""
    others = [d for d in range(chunks[0][0].ndim) if d != channel % chunks[0][0].ndim]
    largest, energy, channels = [], [], []
    for grad, *_ in chunks:
        size = grad.to(device).abs()
        channels.append(size.amax(others, keepdim=True))
        largest.append(size.flatten(1).amax(dim=1).cpu())
        energy.append(size.flatten(1).square_().sum(dim=1).cpu())
    largest, energy = torch.cat(largest), torch.cat(energy)  # (R,)
    by_group = torch.stack([largest[groups == i].max() for i in range(int(groups.max()) + 1)])
    dead_row = (by_group <= 1e-4 * largest.max())[groups]
    dead_channel = (torch.stack(channels).amax(dim=0) == 0).cpu()
    if not dead_row.any() and not dead_channel.any():
        return chunks
    alive = (~dead_row).sum() * (~dead_channel).sum() * (size[0].numel() // dead_channel.numel())
    rms = (energy[~dead_row].sum() / alive).sqrt() if alive else torch.ones(())
    dead_rows = dead_row.view(-1, *[1] * (size.ndim - 1)).split([len(grad) for grad, *_ in chunks])
    return [
        [torch.where(rows | dead_channel, rms.to(grad.dtype), grad), *rest]
        for rows, (grad, *rest) in zip(dead_rows, chunks, strict=True)
    ]


def as_matrices(layer, grad, y, x, group):
    """A convolution's or linear layer's chunk, a row for each token: grad and y (R, O), x (R, I),
    group (R,)."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        y, grad = y.flatten(2).transpose(1, 2), grad.flatten(2).transpose(1, 2)
    grad, y, x = (v.flatten(0, -2) for v in (grad, y, x))
    return grad, y, x, group.repeat_interleave(len(x) // len(group))


# ------------------------------------------------------------------------------------------------
# Alg. 1 lines 15-33: the alternating search of one layer


def stream(chunks, args, bias=None, balance=None):
    """Chunks on the device, y less the bias and inputs divided by `balance`. Where the metric is
    plain MSE the gradient becomes 1 (D11)."""
    for grad, y, x, *rest in on_device(chunks, args.device):
        weight = torch.ones_like(grad) if args.metric == "mse" else grad
        y = y if bias is None else y - bias
        yield [weight, y, x if balance is None else x / balance, *rest]


def value_range(tensors, args, groups=None, balance=None):
    """Least and greatest value, () each; given the rows' time groups, those of each, (G,)."""
    tensors = (x.to(args.device) for x in tensors)
    tensors = tensors if balance is None else (x / balance for x in tensors)
    ends = [torch.stack(x.flatten(1).aminmax(dim=1)) for x in tensors]
    low, high = torch.cat(ends, dim=1).cpu()
    if groups is None:
        return low.amin().to(args.device), high.amax().to(args.device)
    mine = [groups == i for i in range(int(groups.max()) + 1)]
    ends = [low[rows].min() for rows in mine], [high[rows].max() for rows in mine]
    return [torch.stack(end).to(args.device) for end in ends]


def per_group(loss, group, count):
    """Losses of rows (R,), summed within each time group, (G,)."""
    return F.one_hot(group, count).to(loss).T @ loss


def product_for(weight, chunks, kind, args):
    """How candidates are multiplied: on integers where there is a unit for them that takes these
    shapes."""
    odd = min(len(x) for _, _, x, _ in chunks) <= 16 or any(n % 8 for n in weight.shape)
    if kind == "fp" or not has_int_unit(args.device) or odd and args.device.type == "cuda":
        return FloatProduct
    return IntProduct


def quantize_linear(weight, chunks, kind, args, bias=None, product=FloatProduct, balance=None):
    """Lines 15-22: alternate Delta_W and Delta_X for R rounds. `weight` (O, I) is multiplied by
    `balance` (I,) already, by which the inputs are to be divided; `kind` says what they are.
    Returns the rounded weight, its step and zero point, and the input quantizer."""
    source = partial(stream, chunks, args, bias, balance)
    alphas = step_grid().to(args.device)
    low, high = weight.aminmax(dim=1, keepdim=True)  # (O, 1)
    if args.weight_granularity == "tensor":
        low, high = low.amin(), high.amax()
    step0, zero = qparams_from_range(low, high, args.wbits)
    groups = torch.cat([group for *_, group in chunks]) if args.tgq_inputs else None
    count = None if groups is None else int(groups.max()) + 1
    act, searches = FullPrecision(), []
    if kind != "fp":
        make = gelu_candidates if kind == "gelu" and args.mrq else uniform_candidates
        inputs = [x for _, _, x, _ in chunks]
        act, searches = make(*value_range(inputs, args, groups, balance), args.abits)

    def weight_loss(chunk, alpha):
        grad, y, x, _ = chunk  # x is quantized
        w = product.quantize_weight(weight, alpha * step0, zero, args.wbits)
        loss = hessian_loss(product.error(x, w, y), grad, dim=0)  # (O,)
        return loss[:, None] if step0.ndim else loss.sum()

    def input_loss(chunk, value):
        grad, y, x, group = chunk
        delta = product.error(product.quantize_input(vary(act, value), x, group), w, y)
        if groups is None:
            return hessian_loss(delta, grad)
        return per_group(hessian_loss(delta, grad, dim=1), group, count)

    weight_loss, input_loss = compiled(args, weight_loss, input_loss)
    per_channel = loss = None  # the least so far
    for _ in range(args.rounds if searches else 1):  # line 17
        quantized = partial(quantized_inputs, act, source, product)
        best, per_channel = search(weight_loss, alphas, quantized, per_channel)
        step = alphas[best] * step0  # line 18
        w = product.quantize_weight(weight, step, zero, args.wbits)
        loss = per_channel.sum() if groups is None else loss
        for vary, values in searches:
            best, loss = search(input_loss, values, source, loss)
            act = vary(act, values[best])  # line 20 (MRQ) or line 22
    if args.rounding == "gptq":
        rounded = compensated_rounding(weight, step, zero, args.wbits, gram(weight, act, source))
        return rounded, step, zero, act
    return fake_quant(weight, step, zero, args.wbits), step, zero, act


def compiled(args, *functions):
    """The functions as they are or, with --compile, each made into few passes over memory."""
    return [torch.compile(f, dynamic=True) if args.compile else f for f in functions]


def quantized_inputs(act, source, product=FloatProduct):
    for grad, y, x, group in source():
        yield grad, y, product.quantize_input(act, x, group), group


def gram(weight, act, source):
    """Sum of x x^T over the quantized inputs x of the weight (O, I), weighted by the mean squared
    gradient, (I, I)."""
    total = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for grad, _, x, _ in quantized_inputs(act, source):
        total += (x * grad.square().mean(dim=1, keepdim=True)).T @ x
    return total


def linear_state(layer, chunks, kind, strength, args):
    """The state of a convolution or linear layer, its input channels balanced unless strength is
    None (the product stays: inputs are divided by what the weight is multiplied by)."""
    chunks = [as_matrices(layer, *chunk) for chunk in chunks]
    weight, balance = layer.weight.detach().flatten(1), None
    if strength is not None:
        largest = [x.to(args.device).abs().amax(dim=0) for _, _, x, _ in chunks]
        balance = balance_factors(torch.stack(largest).amax(dim=0), weight, strength)
        weight = weight * balance
    product = product_for(weight, chunks, kind, args)
    w, step, zero, act = quantize_linear(weight, chunks, kind, args, layer.bias, product, balance)
    packed = pack_weight(w.view(layer.weight.shape).cpu(), step.cpu(), zero.cpu(), args.wbits)
    act, bias = quantizer_state(act), layer.bias.detach().cpu()
    kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
    balance = balance if balance is None else balance.cpu()
    return dict(type=kind, weight=packed, bias=bias, act=act, balance=balance)


def quantize_matmul(chunks, post_softmax, groups, args):
    """Lines 23-33: alternate Delta_A, per time group after softmax, and Delta_B for R rounds."""
    by_group, count = post_softmax and args.tgq, int(groups.max()) + 1
    _, _, a_all, b_all, _ = zip(*chunks, strict=True)
    if post_softmax and args.mrq:
        qa, [(vary_a, values_a)] = softmax_candidates(args.abits, args.device)
    else:
        low_high = value_range(a_all, args, groups if by_group else None)
        qa, [(vary_a, values_a)] = uniform_candidates(*low_high, args.abits)
    qb, [(vary_b, values_b)] = uniform_candidates(*value_range(b_all, args), args.abits)

    def a_loss(chunk, value):
        grad, y, a, b, group = chunk  # b is quantized
        delta = (vary_a(qa, value)(a, group) @ b).sub_(y)
        loss = hessian_loss(delta, grad, dim=(1, 2, 3))  # (rows,)
        return per_group(loss, group, count) if by_group else loss.sum()

    def b_loss(chunk, value):
        grad, y, a, b, _ = chunk  # a is quantized
        return hessian_loss((a @ vary_b(qb, value)(b)).sub_(y), grad)

    def fixed_a(qa):
        return ((grad, y, qa(a, i), b, i) for grad, y, a, b, i in stream(chunks, args))

    def fixed_b(qb):
        return ((grad, y, a, qb(b), i) for grad, y, a, b, i in stream(chunks, args))

    a_loss, b_loss = compiled(args, a_loss, b_loss)
    loss = None  # the least so far, one for each group where a_loss has one
    for _ in range(args.rounds):  # line 25
        best, loss = search(a_loss, values_a, partial(fixed_b, qb), loss)
        qa = vary_a(qa, values_a[best])  # line 30, all groups at once, or line 32
        best, _ = search(b_loss, values_b, partial(fixed_a, qa), loss.sum())
        qb = vary_b(qb, values_b[best])  # line 33
    return dict(type="matmul", a=quantizer_state(qa), b=quantizer_state(qb))


# ------------------------------------------------------------------------------------------------
# Units, the model, and the report at the end


@torch.no_grad()
def layer_cost(state, chunks, args):
    """The finished layer's error, Eq. (16), and its output's energy."""
    layer, cost, energy = LAYERS[state["type"]](state).to(args.device), 0.0, 0.0
    for grad, y, *inputs, group in stream(chunks, args):
        cost += hessian_loss(layer(*inputs, group) - y, grad).item()
        energy += hessian_loss(y, grad).item()
    return dict(cost=cost, energy=energy)


def settings_of(child, kind, layer, args):
    """The flags as they hold for this layer."""
    own = {} if isinstance(layer, Linear) else dict(tgq_inputs=False)  # it is told no time group
    if child in EXTRA[kind] and args.cond_bits:
        own |= dict(wbits=args.cond_bits, rounding="nearest")
    elif kind != "block" and child in RELEASED[kind] and args.edge_bits:
        own |= dict(wbits=args.edge_bits, abits=args.edge_bits)
    return changed(args, **own)


def quantize_layer(child, kind, layer, chunks, groups, args):
    """Lines 15-33 for one layer: its state. With --balance the best of several strengths."""
    if isinstance(layer, MatMul):  # line 23
        return quantize_matmul(chunks, child == "attn.av", groups, args)
    conv = isinstance(layer, nn.Conv2d)  # D6: of the patch embedding only the weight
    fp = conv and args.layers == "released" or child in EXTRA[kind] and args.cond_bits
    inputs = "fp" if fp else "gelu" if child == "mlp.fc2" else "uniform"
    strengths = BALANCE if args.balance and not fp else (None,)
    states = [linear_state(layer, chunks, inputs, strength, args) for strength in strengths]
    costs = [layer_cost(state, chunks, args)["cost"] for state in states]
    return states[costs.index(min(costs))]


def unit_layers(unit, model, args):
    """Lines 14-15 for one unit: yields (layer's name, chunks, a function that searches its steps).
    """
    kind, prefix = unit.name.split("_")[0], units(model)[unit.name]
    extra = EXTRA[kind] if args.layers == "all" or args.cond_bits else ()
    with unit_on(model, unit.name, args.device) as function:
        for child in RELEASED[kind] + extra:
            layer = model.get_submodule(prefix + child)
            chunks = capture(function, layer, unit, args)
            channel = 1 if isinstance(layer, nn.Conv2d) else -1
            chunks = patch_dead(chunks, unit.groups, channel, args.device)
            own = settings_of(child, kind, layer, args)
            yield prefix + child, chunks, partial(
                quantize_layer, child, kind, layer, chunks, unit.groups, own
            )
            del chunks  # their memory is the next layer's


def quantize_unit(unit, model, args):
    """Lines 14-33 for the layers of one unit: their states and costs, by layer name.

    Costs are weighted by the gradient (or D2's stand-in), whatever --metric is: runs compare.
    """
    done, plain = {}, changed(args, metric="hessian")
    for layer, chunks, find_steps in unit_layers(unit, model, args):
        state = find_steps()
        done[layer] = dict(state=state, **layer_cost(state, chunks, plain))
        del chunks, find_steps  # their memory is the next layer's
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
    check(args)
    world, calib = World(), load_calib(args.run)
    knobs = "wbits abits metric mrq tgq rounds layers weight_granularity rows tag edge_bits "
    knobs += "cond_bits tgq_inputs balance rounding"
    settings = {key: getattr(args, key) for key in knobs.split()}
    settings |= load_grads("embed", calib, args)["settings"]  # written last: all are there
    knobs = "steps groups cfg_scale cfg_channels vae"  # all that 04 needs to know of Phase 1
    settings["sampling"] = {key: calib["settings"][key] for key in knobs.split()}
    inputs = {"calib": calib["sha256"], **calib["inputs"]}
    inputs["grads"] = sha256_of(args.run / "grads" / "embed.pt")
    head = header("quant", settings, inputs, args.device)
    path = args.run / f"quant_{model_name(args)}.pt"
    parts, done = Parts(path, head), {}
    if already_made(path, head, args.force):
        return parts.clear()  # a run killed after its last write left them
    model = explicit_products(load_calibrated(calib))
    names = list(units(model))
    mine = world.share(parts, names)
    found = load_units(mine, model, calib, args)
    for unit in world.bar(found, total=len(mine), desc=f"03 {path.stem}", unit="unit"):
        parts.save(unit.name, quantize_unit(unit, model, args))
    world.wait()
    if world.rank == 0:
        for name in names:
            done |= parts.load(name)
        head |= assemble(model, calib["settings"]["config"], done, calib)
        quantized = build_quantized(head, "this run")
        with streamed(model, args.device), streamed(quantized, args.device):
            head["report"] = signal_to_noise(model, quantized, calib, args)
        keys = ("cost", "energy")
        head["report"]["layers"] = {n: {k: d[k] for k in keys} for n, d in done.items()}
        print_report(head["report"])
        wrote = save_artifact(path, head)
        parts.clear()
        flags = f"--wbits {args.wbits} --abits {args.abits}{' --tag ' * bool(args.tag)}{args.tag}"
        print(f"{wrote}.  Next: python 04_sample.py --run {args.run} {flags}")
    print_peak(args.device)


if __name__ == "__main__":
    run_script(main, parse_args)
