"""The plain way to do the searches of Phase 3, for comparison: as slow as it is short.

For every layer one pass through the whole network and back, then one candidate at a time over all
rows at once. Nothing is cached, split up, or shared between layers; W8A8, per channel.
"""

import torch
from sampling import dit, q

BITS = 8


def whole_network(model, layer, calib, args):
    """A layer's inputs, output and dL/d(output) by a pass through all of the network and back."""
    rows, diffusion = calib["calibration"], dit.Diffusion(calib["settings"]["steps"])
    eps, kept, columns = diffusion.implied_eps(rows["x"], rows["x_0"], rows["t"]), {}, []

    def hook(_, inputs, output):
        kept["zero"] = torch.zeros_like(output, requires_grad=True)
        kept["data"] = [output, *(x for x in inputs if x is not None)]
        return output + kept["zero"]

    handle = layer.register_forward_hook(hook)
    batch = [rows["x"], diffusion.timestep_map[rows["t"]], rows["y"], eps]
    for chunk in zip(*(v.split(args.batch_size) for v in batch), strict=True):
        x, t, y, noise = (v.to(args.device) for v in chunk)
        loss = (noise - model(x, t, y)[:, : model.in_channels]).square().sum()
        (grad,) = torch.autograd.grad(loss, kept["zero"])
        columns.append([grad, *(x.detach() for x in kept["data"])])
    handle.remove()
    return [torch.cat(column) for column in zip(*columns, strict=True)]


def least(values, losses):
    """The value, for each element of the losses' shape, whose loss is least."""
    return values[torch.stack(losses).argmin(0)]


def plain_linear(layer, gelu, x, y, grad, rounds):
    """Alg. 1 lines 15-22: the weight's steps (O, 1)."""
    weight, grad, y = layer.weight, grad.flatten(0, -2), (y - layer.bias).flatten(0, -2)
    x, alphas = x.flatten(0, -2), q.step_grid().to(x)
    step0, zero = q.qparams_from_range(*weight.aminmax(dim=1, keepdim=True), BITS)
    act, searches = (q.gelu_candidates if gelu else q.uniform_candidates)(*x.aminmax(), BITS)

    def loss(act, step, dim=None):
        return q.hessian_loss(act(x) @ q.fake_quant(weight, step, zero, BITS).T - y, grad, dim)

    for _ in range(rounds):
        step = least(alphas, [loss(act, alpha * step0, 0) for alpha in alphas])[:, None] * step0
        for vary, values in searches:
            act = vary(act, least(values, [loss(vary(act, v), step) for v in values]))
    return step


def plain_matmul(softmax, a, b, y, grad, groups, rounds):
    """Lines 23-33: the first factor's step (), or after softmax (G,)."""
    make = q.softmax_candidates(BITS, a.device), q.uniform_candidates(*a.aminmax(), BITS)
    qa, ((vary_a, values_a),) = make[0 if softmax else 1]
    qb, ((vary_b, values_b),) = q.uniform_candidates(*b.aminmax(), BITS)

    def loss(qa, qb, by_group=False):
        rows = q.hessian_loss(qa(a, groups) @ qb(b) - y, grad, (1, 2, 3))
        mine = [rows[groups == i].sum() for i in range(int(groups.max()) + 1)]
        return torch.stack(mine) if by_group else rows.sum()

    for _ in range(rounds):
        qa = vary_a(qa, least(values_a, [loss(vary_a(qa, v), qb, softmax) for v in values_a]))
        qb = vary_b(qb, least(values_b, [loss(qa, vary_b(qb, v)) for v in values_b]))
    return qa.step1 if softmax else qa.step


def plain_way(model, children, calib, args):
    """The steps of these layers of every block, by name; `model` has explicit products."""
    groups, steps = calib["calibration"]["group"].to(args.device), {}
    for name in [f"blocks.{i}.{child}" for i in range(len(model.blocks)) for child in children]:
        layer = model.get_submodule(name)
        grad, y, *inputs = whole_network(model, layer, calib, args)
        if isinstance(layer, dit.MatMul):
            after_softmax = name.endswith("attn.av")
            steps[name] = plain_matmul(after_softmax, *inputs, y, grad, groups, args.rounds)
        else:
            gelu = name.endswith("mlp.fc2")
            steps[name] = plain_linear(layer, gelu, *inputs, y, grad, args.rounds)
    return steps
