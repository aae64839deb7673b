"""A linear layer of TQ-DiT plus: of all ways that its input channels can go, that of least error.

`cfg` is tqdit_plus.Settings throughout.
"""

from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from common import quant_file
from common.layer_data import LayerData
from common.phase3 import Layer
from common.quantizers import DynamicQuantizer
from common.report import linear_cost
from methods.balancing import Way, transformed
from methods.dynamic import group_size
from methods.rounding import divisor, gram, group_grid, low_rank_part, rescaled, rounded_to
from methods.static_scales import search_static
from quant_ops import FullPrecision, UniformQuantizer, WeightLoss, uniform_candidates

STRENGTHS = (None, 0.5, 1.0)  # of SmoothQuant, tried for each layer; None: as it is
ROUNDING = ("gptq-scales", "gptq", "nearest")


class Bits(NamedTuple):
    """Bits of one layer; inputs with None stay in full precision."""

    weight: int
    inputs: int | None


class Grids(NamedTuple):
    """A layer whose input channels have gone one way, with its quantizers, to be rounded."""

    layer: Layer
    weight: Tensor  # (O, I)
    data: LayerData
    before: dict  # `smooth` and `hadamard`, for the quant file
    Q_W: UniformQuantizer
    Q_X: nn.Module


def bits_of(layer, cfg):
    """The `Bits` of a layer."""
    if layer.spec.conditioning:
        return Bits(cfg.cond_bits, None)
    edge = cfg.edge_bits if layer.spec.unit != "block" else None
    if layer.spec.reads_image:  # D6: of the patch embedding only the weight
        return Bits(edge or cfg.wbits, None)
    return Bits(edge or cfg.wbits, edge or cfg.abits)


def to_fit(data, cfg):
    """The layer's data as the search and GPTQ see it: with --metric mse, G^(l) = 1 (D11)."""
    return data if cfg.metric == "hessian" else data.unweighted()


def search_linear(weight, fit, layer, cfg, search):
    """Alg. 1 lines 16-22 with TGQ for the inputs: Q_W and Q_X of a weight (O, I)."""
    bits = bits_of(layer, cfg)
    Q_W, weights = uniform_candidates(*weight.aminmax(dim=1, keepdim=True), bits.weight)
    if bits.inputs is None:
        return search(weights, fit, WeightLoss(weight, FullPrecision())), FullPrecision()
    if cfg.input_group is not None:
        size = group_size(cfg.input_group, weight.shape[1])
        Q_X = DynamicQuantizer(bits.inputs, "token", size)
        if cfg.weight_group is None:
            Q_W = search(weights, fit, WeightLoss(weight, Q_X))
        return Q_W, Q_X
    how = bits.inputs, layer.spec.post_gelu, cfg.tgq_inputs, cfg.rounds, search
    return search_static(weight, weights, fit, *how)


def grids_by(way, layer, data, cfg, search):
    """The `Grids` of a layer, its input channels gone this way first."""
    weight, data, before = transformed(layer.module.weight.detach().flatten(1), data, way)
    if way.block is not None:  # a rotation leaves nothing of GELU's two regions
        layer = layer._replace(spec=layer.spec._replace(post_gelu=False))
    found = search_linear(weight, to_fit(data, cfg), layer, cfg, search)
    return Grids(layer, weight, data, before, *found)


def rounded_weight(grids, cfg):
    """The weight rounded, its quantizer, and for the quant file its `view` and `low_rank`."""
    layer, weight, data, _, Q_W, Q_X = grids
    if layer.spec.conditioning:
        return Q_W(weight), Q_W, {}
    H, more = gram(to_fit(data, cfg), Q_X), {}
    if cfg.weight_group is not None and not layer.spec.reads_image:  # that has few inputs
        size = divisor(weight.shape[1], cfg.weight_group)
        Q_W = group_grid(weight, size, Q_W.bits, H.diagonal())
        more["view"] = (len(weight), weight.shape[1] // size, size)
    if cfg.rounding == "gptq-scales":
        Q_W = rescaled(Q_W, weight, more.get("view"), H)
    W_hat = rounded_to(Q_W, weight, more.get("view"), None if cfg.rounding == "nearest" else H)
    if cfg.rank and layer.spec.unit == "block":
        more["low_rank"] = low_rank_part(weight - W_hat, H, cfg.rank)
    return W_hat, Q_W, more


def rounded(grids, cfg):
    """A layer's state and cost, its weight rounded, and its error as the search sees it."""
    W_hat, Q_W, more = rounded_weight(grids, cfg)
    module, quantizers, more = grids.layer.module, (Q_W, grids.Q_X), grids.before | more
    state = quant_file.linear_state(module, W_hat, *quantizers, **more)
    if "low_rank" in more:
        W_hat = W_hat + more["low_rank"]["left"] @ more["low_rank"]["right"]
    cost = error = linear_cost(grids.data, W_hat, grids.Q_X)
    if cfg.metric == "mse":
        error = linear_cost(to_fit(grids.data, cfg), W_hat, grids.Q_X)
    return dict(state=state, cost=cost), error


def quantize_linear(layer, data, cfg, search):
    """Alg. 1 lines 15-22; of all ways the one of least error, chosen before the scales are GPTQ's
    own: those take many times as long."""
    channels, quantized = layer.module.weight[0].numel(), bits_of(layer, cfg).inputs is not None
    strengths = STRENGTHS if cfg.smoothquant and quantized else STRENGTHS[:1]
    blocks = (None, channels & -channels) if cfg.hadamard and quantized else (None,)
    ways = map(Way._make, product(strengths, blocks))
    tried = [grids_by(way, layer, data, cfg, search()) for way in ways]
    plain = cfg._replace(rounding="gptq") if cfg.rounding == "gptq-scales" else cfg
    found = [rounded(grids, plain) for grids in tried]
    best = min(range(len(tried)), key=lambda i: found[i][1])
    return (found[best] if plain == cfg else rounded(tried[best], cfg))[0]
