"""Losses of Phase 3's candidates of linear layers, on integer codes: products are exact, and the
device may have a fast unit for them. Where it has none, the loss of quant_ops.py stays.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine import cpu_products, int_products
from engine.int_products import MAX_INPUTS, has_int_unit, takes_shapes
from quant_ops import GeluQuantizer, InputLoss, UniformQuantizer, WeightLoss, hessian_loss


class Product(NamedTuple):
    """How a unit multiplies: codes of inputs, of one region of them after GELU (MRQ), of a weight;
    z less the product of such codes; Eq. (16) of that, of each output channel if `dim` is 0."""

    inputs: Callable
    region: Callable
    weight: Callable
    error: Callable
    loss: Callable


def _of_error(error, inputs, weight, chunk, dim=None):
    return hessian_loss(error(inputs, weight, chunk.out), chunk.grad, dim)


def _by_triton(inputs, weight, chunk, dim=None):
    column_loss = int_products.column_loss(chunk.out.device)
    of_channels = column_loss(inputs, weight, chunk.out, chunk.grad)
    return of_channels if dim == 0 else of_channels.sum()


SIGNED = int_products.input_codes, int_products.region_codes, int_products.weight_codes
INT_MM = Product(*SIGNED, int_products.int_error, partial(_of_error, int_products.int_error))
TRITON = INT_MM._replace(loss=_by_triton)


def _u8s8(highest):
    """The product of uint8 by int8 codes, for inputs whose codes reach `highest`."""
    weight_codes = partial(cpu_products.weight_codes, highest=highest)
    codes = cpu_products.input_codes, cpu_products.region_codes, weight_codes
    return Product(*codes, cpu_products.error, partial(_of_error, cpu_products.error))


def on_integers(loss, candidates, data):
    """The twin of a linear layer's loss on integer codes where it can be had, else the loss."""
    if isinstance(loss, WeightLoss):
        twin, bits, Q_X, region = IntWeightLoss, candidates[0].bits, loss.Q_X, None
    elif isinstance(loss, InputLoss):
        twin, bits, Q_X = IntInputLoss, loss.Q_W.bits, candidates[0]
        region = _moving_region(candidates)
    else:
        return loss
    rows = min(len(chunk.x) for chunk in data.chunks)
    fits = takes_shapes(rows, loss.weight, data.device)
    product = _product(loss.weight, bits, Q_X, region, fits, data.device)
    if product is None:
        return loss
    return IntRegionLoss(*loss, product, Q_X, region) if region and fits else twin(*loss, product)


def _moving_region(candidates):
    """Which region's scale differs among these candidates of MRQ after GELU: 1, 2; None for others
    and if both do."""
    first, last = candidates[0], candidates[len(candidates) - 1]
    if isinstance(first, GeluQuantizer):
        if torch.equal(first.scale2, last.scale2):
            return 1
        if torch.equal(first.scale1, last.scale1):
            return 2
    return None


def _product(W, bits, Q_X, region, fits, device):
    """The `Product` for these inputs, or one `region` of them, and a weight (O, I) of so many bits;
    None where floating point is faster or nothing else is exact. `fits`: see `takes_shapes`."""
    if not isinstance(Q_X, UniformQuantizer | GeluQuantizer) or W.shape[1] >= MAX_INPUTS:
        return None
    if int_products.column_loss(device) and W.shape[1] % 16 == 0:
        return TRITON
    if has_int_unit(device):
        return INT_MM if fits else None
    if device.type == "cpu" and (region or isinstance(Q_X, UniformQuantizer)):  # no two products
        highest = 2 ** (Q_X.bits - 1) if region else 2**Q_X.bits - 1
        return _u8s8(highest) if cpu_products.pays(W, bits, highest) else None
    return None


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


class IntRegionLoss(NamedTuple):
    """`InputLoss` on codes of candidates that differ in the scale of one `region` after GELU, 1 or
    2: the product of the other one, of `Q_X`, is taken off z once for all of them."""

    weight: torch.Tensor
    Q_W: torch.nn.Module
    product: Product
    Q_X: GeluQuantizer
    region: int

    def prepare(self, chunk):
        W_codes = self.product.weight(self.Q_W, self.weight)
        fixed = self.product.region(self.Q_X, chunk.x, chunk.group, 3 - self.region)
        return W_codes, self.product.error(fixed, W_codes, chunk.out)

    def __call__(self, chunk, shared, Q_X):
        W_codes, left = shared
        moving = self.product.region(Q_X, chunk.x, chunk.group, self.region)
        return self.product.loss(moving, W_codes, chunk._replace(out=left))
