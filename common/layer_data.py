"""What the search of a layer runs on: its inputs, output, gradient and time group, chunk by chunk.

Alg. 1 lines 11-12 inside a unit: Phase 2 keeps gradients at the borders of units (D14), and a
layer's own data is made again by a pass through its unit, forward and back.
"""

from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.offload import prefetch
from models_dit import MatMul
from quant_ops import without_gradient

COPIES = 5  # a search holds a little less than so many times its chunk


class LinearChunk(NamedTuple):
    """Rows of a linear layer, a row for each token; of a convolution, a row for each patch."""

    grad: torch.Tensor  # (R, O), dL/d(out)
    out: torch.Tensor  # (R, O)
    x: torch.Tensor  # (R, I)
    group: torch.Tensor  # (R,)


class MatMulChunk(NamedTuple):
    """Rows of a product of two activations, a row for each calibration tuple."""

    grad: torch.Tensor  # (R, H, S, S')
    out: torch.Tensor  # (R, H, S, S')
    a: torch.Tensor  # (R, H, S, K)
    b: torch.Tensor  # (R, H, K, S')
    group: torch.Tensor  # (R,)


@dataclass
class LayerData:
    """A layer's chunks on the host; iterating brings them to the device, `out` less the bias."""

    chunks: list
    device: torch.device
    num_groups: int
    group: int | None = None  # where all rows are of one time group
    bias: torch.Tensor | None = None
    change: object = None  # a function that x goes through first
    weighted: bool = True
    note: str = ""  # where D2's fallback fired

    def __iter__(self):
        for chunk in prefetch(self.chunks, self.device):
            if not self.weighted:
                chunk = chunk._replace(grad=torch.ones_like(chunk.grad))
            if self.bias is not None:
                chunk = chunk._replace(out=chunk.out - self.bias)
            if self.change is not None:
                chunk = chunk._replace(x=self.change(chunk.x))
            yield chunk

    def unweighted(self):
        """The same with G^(l) = 1, which makes Eq. (16) the plain squared error (D11)."""
        return replace(self, weighted=False)

    def smoothed(self, factors):
        """The same with x divided by these factors (I,)."""
        return replace(self, change=lambda x: x / factors)

    def of_group(self, i):
        """The rows of time group i alone."""
        mine = [chunk.group == i for chunk in self.chunks]
        chunks = zip(self.chunks, mine, strict=True)
        kept = [type(c)(*(_rows(x, rows) for x in c)) for c, rows in chunks if rows.any()]
        return replace(self, chunks=kept, group=i)

    def ends(self, name):
        """Least and greatest value of every row of x, a or b, (2, R), on the host."""
        tensors = (getattr(chunk, name).to(self.device) for chunk in self.chunks)
        tensors = tensors if self.change is None else map(self.change, tensors)
        return torch.cat([torch.stack(x.flatten(1).aminmax(dim=1)).cpu() for x in tensors], dim=1)

    def range(self, name):
        """Least and greatest value of x, a or b, () each."""
        low, high = self.ends(name)
        return low.amin().to(self.device), high.amax().to(self.device)


def _rows(x, mask):
    """The rows of a mask; a view where they are neighbours, as sorted time groups are."""
    first, count = int(mask.byte().argmax()), int(mask.sum())
    return x[first : first + count] if mask[first : first + count].all() else x[mask]


# ------------------------------------------------------------------------------------------------
# One layer


def layer_data(function, layer, unit, batch_size, memory_limit, device):
    """The LayerData of a layer of the unit, which is on the device as `function`."""
    columns = capture(function, layer, unit, batch_size, device)
    chunks, note = split(columns, memory_limit, device), ""
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    if unit.grads:
        chunks, note = fall_back(chunks, unit.groups, channel, device)
    matmul, num_groups = isinstance(layer, MatMul), int(unit.groups.max()) + 1
    chunks = [MatMulChunk(*c) if matmul else as_matrices(layer, *c) for c in chunks]
    return LayerData(chunks, device, num_groups, bias=getattr(layer, "bias", None), note=note)


def capture(function, layer, unit, batch_size, device):
    """Lines 11-12 for one layer: dL/d(output), output, inputs and group, rows first on the host.

    The layer's output becomes a leaf of the graph, whose gradient is the layer's, and the unit runs
    on. Without gradients at the unit's outputs it is 1.
    """
    kept, columns, done = [], None, 0

    def hook(module, layer_inputs, output):
        leaf = output.detach().requires_grad_()
        kept[:] = [leaf, *(x for x in layer_inputs if x is not None)]
        return leaf

    handle = layer.register_forward_hook(hook)
    try:
        batches = [x.split(batch_size) for x in (*unit.inputs, *unit.grads, unit.groups)]
        for *batch, group in zip(*batches, strict=True):
            batch = [x.to(device, non_blocking=True) for x in batch]
            given, ends_grad = batch[: len(unit.inputs)], batch[len(unit.inputs) :]
            outputs, leaf = function(*given), kept[0]
            grad = gradient(outputs, leaf, ends_grad) if ends_grad else torch.ones_like(leaf)
            found = [x.detach() for x in (grad, *kept, group)]
            columns = columns or [host_column(x, len(unit.groups), device) for x in found]
            for column, x in zip(columns, found, strict=True):
                column[done : done + len(x)] = x
            done += len(group)
    finally:
        handle.remove()
    return columns


def gradient(outputs, leaf, ends_grad):
    """dL/d(leaf), given dL/d(outputs), of which some may not depend on it."""
    ends = [x.requires_grad for x in outputs]
    outputs, ends_grad = (list(compress(x, ends)) for x in (outputs, ends_grad))
    return torch.autograd.grad(outputs, leaf, ends_grad)[0]


def host_column(like, rows, device):
    """Room on the host for these rows, from where CUDA copies without waiting."""
    on_cuda = device.type == "cuda"
    return torch.empty(rows, *like.shape[1:], dtype=like.dtype, pin_memory=on_cuda)


def split(columns, memory_limit, device):
    """Columns cut into even chunks, of as many rows as the limit, in MiB, has room for."""
    limit = memory_limit or (512 if device.type == "cuda" else 12)
    row = sum(x[:1].nbytes for x in columns)
    rows = max(1, int(limit * 2**20 / (COPIES * row)))
    count = -(-len(columns[0]) // rows)
    return [list(chunk) for chunk in zip(*(x.tensor_split(count) for x in columns), strict=True)]


def fall_back(chunks, groups, channel, device):
    """Deviation D2: where there is no gradient, the layer's mean weight. The chunks, and a note."""
    others = [d for d in range(chunks[0][0].ndim) if d != channel % chunks[0][0].ndim]
    largest, energy, channels = [], [], []
    for grad, *_ in chunks:
        size = grad.to(device).abs()
        channels.append(size.amax(others, keepdim=True))
        largest.append(size.flatten(1).amax(dim=1).cpu())
        energy.append(size.flatten(1).square_().sum(dim=1).cpu())
    largest, energy = torch.cat(largest), torch.cat(energy)  # (R,)
    channels = torch.stack(channels).amax(dim=0).cpu()  # (1, ..., O, ...)
    dead_group, dead_channel = without_gradient(largest, channels, groups)
    if not dead_group.any() and not dead_channel.any():
        return chunks, ""
    dead_row = dead_group[groups]
    alive = (~dead_row).sum() * (~dead_channel).sum() * (size[0].numel() // dead_channel.numel())
    rms = (energy[~dead_row].sum() / alive).sqrt() if alive else torch.ones(())
    rows = dead_row.view(-1, *[1] * (size.ndim - 1)).split([len(grad) for grad, *_ in chunks])
    counts = (dead_group, "time groups"), (dead_channel, "output channels")
    where = [f"{int(x.sum())} of {x.numel()} {what}" for x, what in counts if x.any()]
    note = f"no gradient in {' and '.join(where)}: plain MSE there (D2)"
    patched = [
        [torch.where(dead | dead_channel, rms.to(grad.dtype), grad), *rest]
        for dead, (grad, *rest) in zip(rows, chunks, strict=True)
    ]
    return patched, note


def as_matrices(layer, grad, out, x, group):
    """A convolution's or linear layer's chunk as a LinearChunk."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        out, grad = out.flatten(2).transpose(1, 2), grad.flatten(2).transpose(1, 2)
    grad, out, x = (v.flatten(0, -2).contiguous() for v in (grad, out, x))
    return LinearChunk(grad, out, x, group.repeat_interleave(len(x) // len(group)))
