"""What leads.py measures: AdaRound, a refit of weights, bias correction, and time groups of
unequal length.

`chunks` are [grad, y, x, group], a row for each token: y (R, O) is a layer's full-precision output
less its bias, grad its gradient, x (R, I) its quantized input, group (R,) the time group.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_dit as dit  # noqa: E402
import quant_ops as q  # noqa: E402


def adaround(weight, step, zero, bits, gram, iterations, rate=0.1, strength=1.0):
    """The weight (O, I), each entry rounded up or down, learned by gradient descent on the loss of
    compensated rounding (AdaRound, arXiv 2004.10568, Eq. 21-25). Returns grid values."""
    low, hessian = (weight / step).floor(), (gram / gram.diagonal().mean()).to(weight)
    share = (weight / step - low).clamp(0.01, 0.99)
    alpha = torch.logit((share + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=rate)
    for i in range(iterations):
        up = (1.2 * alpha.sigmoid() - 0.1).clamp(0, 1)
        delta = (low + up + zero).clamp(0, 2**bits - 1) - zero - weight / step
        loss = ((delta @ hessian) * delta).sum()
        progress = (i / iterations - 0.2) / 0.8
        if progress >= 0:  # after the warm-up every `up` is drawn to 0 or 1
            loss += strength * (1 - (2 * up - 1).abs() ** (20 - 18 * progress)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = (low + (alpha >= 0) + zero).clamp(0, 2**bits - 1)
    return q.dequantize(codes, step, zero).detach()


def refit(weight, gram, chunks, damp=0.01):
    """The weight (O, I) of least weighted squared error from quantized inputs to full-precision
    outputs; `damp` draws it to what it was, as in `compensated_rounding`."""
    cross = 0
    for grad, y, x, _ in chunks:
        cross = cross + ((x * grad.square().mean(dim=1, keepdim=True)).T @ y).double()  # (I, O)
    ridge = gram + damp * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return weight + torch.linalg.solve(ridge, cross - gram @ weight.T.double()).T.to(weight)


class GroupBias(q.QuantLinear):
    """A quantized linear layer whose bias, (G, O), depends on the time group."""

    def forward(self, x, group=None):
        x = x if self.balance is None else x / self.balance
        return F.linear(self.act(x, group), self.weight) + self.bias[group][:, None]


def mean_errors(weight, chunks, groups):
    """Mean of y - x w^T over the tokens of each time group, (G, O), and over all, (O,)."""
    total, tokens = 0, 0
    for _, y, x, group in chunks:
        member = F.one_hot(group, groups).to(y)
        total, tokens = total + member.T @ (y - x @ weight.T), tokens + member.sum(dim=0)
    return total / tokens[:, None], total.sum(dim=0) / tokens.sum()


def input_levels(model, calib, args):
    """Log of the RMS of every linear layer's input, (R, layers), of all calibration rows."""
    rows, levels, table = calib["calibration"], [], dit.Diffusion(calib["settings"]["steps"])
    columns = rows["x"], table.timestep_map[rows["t"]], rows["y"]

    def hook(_, inputs):
        levels.append(inputs[0].square().flatten(1).mean(dim=1).log().cpu() / 2)

    modules = model.to(args.device).modules()
    linear = [module for module in modules if isinstance(module, dit.Linear)]
    handles = [module.register_forward_pre_hook(hook) for module in linear]
    for batch in zip(*(column.split(args.batch_size) for column in columns), strict=True):
        model(*(x.to(args.device) for x in batch))
    for handle in handles:
        handle.remove()
    model.cpu()
    return torch.stack([torch.cat(levels[i :: len(linear)]) for i in range(len(linear))], dim=1)


def cluster(levels, t, searched, steps, groups, least):
    """(T,) groups of neighbouring timesteps, each with `least` or more of the rows `searched` (S,).

    Of all such splits the one whose levels (R, F), of rows at t (R,), have the least squared
    distance to their group's mean, by dynamic programming. InputError if there is none."""
    member = F.one_hot(t, steps).double()
    sums = [member.sum(0)[:, None], member.T @ levels.double(), member.T @ levels.double() ** 2]
    sums = [x.cumsum(0) for x in (*sums, F.one_hot(searched, steps).sum(0)[:, None])]
    sums = [F.pad(x, (0, 0, 1, 0)) for x in sums]
    n, s1, s2, rows = (x[None] - x[:, None] for x in sums)  # [i, j]: of timesteps i..j - 1
    cost = (s2 - s1**2 / n.clamp(min=1)).sum(dim=-1).masked_fill(rows[..., 0] < least, torch.inf)
    best, cuts, ends = cost[0], [], [steps]
    for _ in range(groups - 1):
        best, cut = (best[:, None] + cost).min(dim=0)
        cuts.append(cut)
    if not best[steps] < torch.inf:
        raise dit.InputError(f"{len(searched)} rows do not make {groups} groups of {least}")
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    return torch.bucketize(torch.arange(steps), torch.tensor(ends[:0:-1]), right=True)
