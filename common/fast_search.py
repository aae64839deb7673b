"""`quant_ops.search`, faster: the same signature, the same choice.

Candidates that cannot win any more are pruned, and those of linear layers are multiplied as integer
codes where the device has a unit for that. Chunks are outside and candidates inside, so that a
chunk stays in cache.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from engine import cpu_products, int_products
from engine.int_products import MAX_INPUTS, has_int_unit, takes_shapes
from quant_ops import GeluQuantizer, InputLoss, UniformQuantizer, WeightLoss, hessian_loss, search

SLACK = 1.1  # of the least loss expected: candidates above are pruned at first


class FastSearch:
    """The searches of one layer, called as `quant_ops.search` is; remembers what loss to expect.

    Losses are sums of squares, so they only grow from chunk to chunk: a candidate that has come to
    more than another's whole sum cannot win, and need not see the chunks that are left. Candidates
    are pruned above a bar: SLACK times the loss of the layer's last search or, in its first, the
    better of two candidates near the usual minimum. Then the least whole sum is the bar, and
    whoever was pruned below it goes on, until nobody is left.
    """

    def __init__(self, compile_losses=False):
        self.expected, self.compile_losses = {}, compile_losses

    def __call__(self, candidates, data, loss):
        key = isinstance(loss, WeightLoss), data.group
        expected = self.expected.get(key)
        twin = on_integers(loss, candidates, data)
        compiles = getattr(twin, "product", INT_MM) is INT_MM  # others are no torch code
        self.evaluate = _compiled() if self.compile_losses and compiles else _evaluate
        total = self.sums(candidates, data, twin, expected)
        least = total.amin(dim=0)
        self.expected[key] = least
        self.expected[False, data.group] = least.sum()
        return candidates[total.argmin(dim=0)]

    def sums(self, candidates, data, loss, expected):
        """(C, ...) losses of candidates over all chunks; of pruned ones so far, above the least."""
        count, total = len(candidates), None
        seen, left = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
        bar = torch.inf if expected is None else SLACK * expected
        if expected is None:
            left &= torch.isin(torch.arange(count), torch.tensor([6, 8]) * count // 10)
        while left.any():
            for k, chunk in enumerate(data):
                now = (left & (seen == k)).nonzero()[:, 0].tolist()
                if now:
                    losses = self.losses(candidates, now, chunk, loss)
                    total = losses.new_zeros(count, *losses.shape[1:]) if total is None else total
                    total[now] += losses
                    seen[now] += 1
                    left &= _not_above(total, bar)
            whole = seen == k + 1
            bar = total[whole].amin(dim=0) if whole.any() else torch.inf
            left = ~whole & _not_above(total, bar)
        return total

    def losses(self, candidates, now, chunk, loss):
        """Losses of some candidates on one chunk, in float64; NaN is the worst of all."""
        shared = loss.prepare(chunk)
        found = [self.evaluate(loss, chunk, shared, candidates[i]) for i in now]
        return torch.stack(found).double().nan_to_num_(torch.inf, torch.inf)


def make_search(name, compile_losses):
    """The search of one layer that --search names: `plain`, the definition, or `fast`."""
    return search if name == "plain" else FastSearch(compile_losses)


def _evaluate(loss, chunk, shared, quantizer):
    return loss(chunk, shared, quantizer)


@cache
def _compiled():
    """`_evaluate`, compiled once for all layers: few passes over memory instead of many."""
    return torch.compile(_evaluate, dynamic=True)


def _not_above(total, bar):
    """Which candidates are in some element not above the bar, (candidates,) on the host."""
    return (~(total > bar)).view(len(total), -1).any(dim=1).cpu()


# ------------------------------------------------------------------------------------------------
# Losses of linear layers on integer codes: exact products, and a fast unit for them


class Product(NamedTuple):
    """How a unit multiplies: inputs and weight as its codes; Eq. (16) of both and of a chunk, of
    each output channel if `dim` is 0."""

    inputs: Callable
    weight: Callable
    loss: Callable


def _of_error(error, inputs, weight, chunk, dim=None):
    """`error` is z less the product."""
    return hessian_loss(error(inputs, weight, chunk.out), chunk.grad, dim)


def _by_triton(inputs, weight, chunk, dim=None):
    column_loss = int_products.column_loss(chunk.out.device)
    of_channels = column_loss(inputs, weight, chunk.out, chunk.grad)
    return of_channels if dim == 0 else of_channels.sum()


CODES = int_products.input_codes, int_products.weight_codes
INT_MM = Product(*CODES, partial(_of_error, int_products.int_error))
TRITON = Product(*CODES, _by_triton)


def _u8s8(Q_X):
    """The product of uint8 by int8 codes, for inputs of this quantizer's bits."""
    weight_codes = partial(cpu_products.weight_codes, highest=2**Q_X.bits - 1)
    return Product(cpu_products.input_codes, weight_codes, partial(_of_error, cpu_products.error))


def on_integers(loss, candidates, data):
    """The twin of a linear layer's loss on integer codes where it can be had, else the loss."""
    if isinstance(loss, WeightLoss):
        twin, bits, Q_X = IntWeightLoss, candidates[0].bits, loss.Q_X
    elif isinstance(loss, InputLoss):
        twin, bits, Q_X = IntInputLoss, loss.Q_W.bits, candidates[0]
    else:
        return loss
    W, device, rows = loss.weight, data.device, min(len(chunk.x) for chunk in data.chunks)
    if not isinstance(Q_X, UniformQuantizer | GeluQuantizer) or W.shape[1] >= MAX_INPUTS:
        return loss
    if int_products.column_loss(device) and W.shape[1] % 16 == 0:
        return twin(*loss, TRITON)
    if has_int_unit(device):
        return twin(*loss, INT_MM) if takes_shapes(rows, W, device) else loss
    if device.type == "cpu" and cpu_products.pays(W, bits, Q_X):
        return twin(*loss, _u8s8(Q_X))
    return loss


class IntWeightLoss(NamedTuple):
    """`WeightLoss` on codes."""

    weight: torch.Tensor
    Q_X: torch.nn.Module
    product: Product

    def prepare(self, chunk):
        return self.product.inputs(self.Q_X, chunk.x, chunk.group)

    def __call__(self, chunk, X_codes, Q_W):
        loss = self.product.loss(X_codes, self.product.weight(Q_W, self.weight), chunk, dim=0)
        return loss[:, None] if Q_W.scale.ndim else loss.sum()


class IntInputLoss(NamedTuple):
    """`InputLoss` on codes."""

    weight: torch.Tensor
    Q_W: torch.nn.Module
    product: Product

    def prepare(self, chunk):
        return self.product.weight(self.Q_W, self.weight)

    def __call__(self, chunk, W_codes, Q_X):
        return self.product.loss(self.product.inputs(Q_X, chunk.x, chunk.group), W_codes, chunk)
