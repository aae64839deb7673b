"""Evening out channels: what is divided out of a layer's inputs is multiplied into its weight."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from common.quantizers import ScaledInput, hadamard_matrix, rotate
from quant_ops import FullPrecision


def smoothquant_factors(x_max: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(I,) factors s: dividing input channels by s and multiplying the weight's columns by s leaves
    the product as it is and evens out the channels (SmoothQuant, arXiv 2211.10438, Eq. 4).

    `x_max` (I,) is the largest magnitude of each input channel, `weight` is (O, I); at strength 1
    all input channels become equal, at 0 all columns of the weight.
    """
    w_max = weight.abs().amax(dim=0).clamp(min=1e-5)
    return x_max.clamp(min=1e-5) ** strength / w_max ** (1 - strength)


def channel_peaks(data) -> Tensor:
    """The largest magnitude of each input channel of a linear layer, (I,)."""
    return torch.stack([chunk.x.abs().amax(dim=0) for chunk in data]).amax(dim=0)


class Way(NamedTuple):
    """What is done to a layer's input channels before all else."""

    strength: float | None  # of SmoothQuant
    block: int | None  # size of the Hadamard matrix


def transformed(weight, data, way):
    """A weight (O, I) and its layer's data once the input channels went this way, and their
    `smooth` and `hadamard` for the quant file."""
    smooth = None
    if way == Way(None, None):
        return weight, data, {}
    if way.strength is not None:
        smooth = smoothquant_factors(channel_peaks(data), weight, way.strength)
        weight = weight * smooth
    if way.block is not None:
        weight = rotate(weight, hadamard_matrix(way.block).to(weight))
    change = ScaledInput(FullPrecision(), smooth, hadamard=way.block).to(weight.device)
    return weight, replace(data, change=change), dict(smooth=smooth, hadamard=way.block)


# ------------------------------------------------------------------------------------------------
# Channels over timesteps


def tokens_of(data, samples: int) -> int:
    """How many tokens each of so many samples has in a linear layer's data."""
    return sum(len(chunk.x) for chunk in data.chunks) // samples


def channel_ends(data, samples: int) -> tuple[Tensor, Tensor]:
    """Least and greatest value of each input channel of a linear layer, in each of so many
    samples: (N, I) twice."""
    tokens = tokens_of(data, samples)
    ends = [chunk.x.unflatten(0, (-1, tokens)).aminmax(dim=1) for chunk in data]
    low, high = zip(*ends, strict=True)
    return torch.cat(low), torch.cat(high)


def by_timestep(low: Tensor, high: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of each timestep that samples of timesteps t (N,) visit: those (V,), rising, and
    ends (V, I) twice."""
    visited = t.unique()
    rows = [(t == i).to(low.device) for i in visited]
    lows = torch.stack([low[mine].amin(dim=0) for mine in rows])
    return visited, lows, torch.stack([high[mine].amax(dim=0) for mine in rows])


def ranks(x: Tensor) -> Tensor:
    """0, 1, .. along the last axis, in order of size."""
    return x.argsort(dim=-1).argsort(dim=-1).double()


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of a (V, I) with b (I,), (V,)."""
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (ranks(a), ranks(b)))
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-12)


def salience_factors(x_max: Tensor, weight: Tensor, by_rank: bool) -> Tensor:
    """(I,) factors of PTQ4DiT (arXiv 2405.16005): the geometric mean of both saliences is left on
    either side of the product. `x_max` (V, I) holds the largest magnitude of each input channel in
    each timestep, weight is (O, I).

    # Eq. (6)-(8): a_j = sum_t eta_t a_j^(t), eta_t = exp(-rho_t) / sum exp(-rho); s = sqrt(a / w).
    # Without `by_rank` (SSC) all timesteps count alike
    """
    w_max = weight.abs().amax(dim=0)
    eta = torch.full_like(x_max[:, 0], 1 / len(x_max))
    if by_rank:
        eta = (-spearman(x_max, w_max)).softmax(dim=0).to(x_max)
    salience = (eta[:, None] * x_max).sum(dim=0).clamp(min=1e-5)
    return (salience / w_max.clamp(min=1e-5)).sqrt().clamp(min=1e-5)


# ------------------------------------------------------------------------------------------------
# Folding

ADALN = "adaLN_modulation.1"
AFTER_ADALN = (  # unit's prefix, a layer that reads what adaLN modulates, chunks of shift and scale
    ("blocks.{}.", "attn.qkv", 0, 1),
    ("blocks.{}.", "mlp.fc1", 3, 4),
    ("final_layer.", "linear", 0, 1),
)


def fold_into_adaln(file: dict) -> None:
    """Move what the inputs of qkv, fc1 and the final layer are divided by into the rows of adaLN
    that make them, in a quant file's `state` or `layers`: exact, and nothing is left to divide.

    modulate: x (1 + scale) + shift; so over s it has (1 + scale) / s - 1 and shift / s. A quantized
    adaLN takes it in the scales of its rows, where it has one for each; else the layer keeps it.
    """
    for prefix, name, shift, scale in AFTER_ADALN:
        for i in range(file["config"]["depth"] if "{" in prefix else 1):
            unit = prefix.format(i)
            layer = file["layers"].get(unit + name, {})
            if "smooth" in layer and has_rows(file, unit + ADALN):
                smooth = layer.pop("smooth")
                if "shift" in layer:
                    layer["shift"] = layer["shift"] / smooth
                divide_rows(file, unit + ADALN, shift, scale, smooth)


def has_rows(file, name):
    """Whether rows of this layer can be divided: it is in full precision, or its weight has a scale
    for each row."""
    weight = file["layers"].get(name, {}).get("weight")
    return weight is None or (weight["scale"].ndim == 2 and "view" not in weight)


def divide_rows(file, name, shift, scale, smooth):
    """Divide the rows of adaLN's chunks `shift` and `scale` by factors (D,)."""
    layer, width = file["layers"].get(name), len(smooth)
    if layer is None:
        weights, key, biases, bias = file["state"], f"{name}.weight", file["state"], f"{name}.bias"
    else:
        weights, key, biases, bias = layer["weight"], "scale", layer, "bias"
    rows, offset = weights[key].clone(), biases[bias].clone()
    for chunk, one in ((shift, 0.0), (scale, 1.0)):
        mine = slice(chunk * width, (chunk + 1) * width)
        rows[mine] /= smooth[:, None]
        offset[mine] = (offset[mine] + one) / smooth - one
    weights[key], biases[bias] = rows, offset
