"""The quant file: packed codes <-> a quantized model.

It holds `config`, `state` (the parameters left in full precision), `layers` (the state of every
quantized layer, by name: k-bit codes, scales and zero points) and `group_table`, the (1000,) time
group of every timestep. It alone is enough to sample.
"""

import torch
import torch.nn as nn
from torch import Tensor

import quant_ops as q
from common.artifacts import load_artifact
from common.errors import InputError, memory_errors
from common.offload import give_back_memory
from common.packing import pack_codes, unpack_codes
from common.quantizers import (
    AdaptiveQuantizer,
    DynamicQuantizer,
    GroupBiasLinear,
    RegroupedLinear,
    ScaledInput,
)  # fmt: skip
from models_dit import TRAIN_TIMESTEPS, Diffusion, DiT

QUANTIZERS = {
    "uniform": q.UniformQuantizer,
    "softmax": q.SoftmaxQuantizer,
    "gelu": q.GeluQuantizer,
    "none": q.FullPrecision,
    "dynamic": DynamicQuantizer,
    "adaptive": AdaptiveQuantizer,
}
LINEAR = {"linear": q.QuantLinear, "conv": q.QuantConv2d}

# ------------------------------------------------------------------------------------------------
# States of layers


def pack_weight(weight: Tensor, Q_W: q.UniformQuantizer, view=None) -> dict:
    """The stored form of a weight (O, ...): k-bit codes, scales and zero points, its shape. With a
    `view`, such as (O, I / g, g), the scales are for the weight in that shape."""
    codes = q.quantize(as_viewed(weight, view), Q_W.scale, Q_W.zero_point, Q_W.bits)
    return dict(
        codes=pack_codes(codes, Q_W.bits).cpu(),
        shape=list(weight.shape),
        bits=Q_W.bits,
        scale=Q_W.scale.cpu(),
        zero_point=Q_W.zero_point.to(torch.uint8).cpu(),
    ) | ({} if view is None else dict(view=list(view)))


def as_viewed(weight: Tensor, view) -> Tensor:
    """A weight (O, ...) in the shape that its scales are for: (O, I), or that of the view."""
    return weight.flatten(1) if view is None else weight.reshape(view)


def unpack_weight(state: dict) -> Tensor:
    """The dequantized weight of `pack_weight`, in float32; ValueError if the state is damaged."""
    codes = unpack_codes(state["codes"], state["bits"], state["shape"]).float()
    codes = as_viewed(codes, state.get("view"))
    weight = q.dequantize(codes, state["scale"], state["zero_point"].float())
    return weight.view(state["shape"])


def quantizer_state(quantizer: nn.Module) -> dict:
    """A quantizer's type, bits and Delta, on the host."""
    name = next(k for k, v in QUANTIZERS.items() if type(quantizer) is v)
    if name == "none":
        return dict(type=name)
    values = {key: getattr(quantizer, key) for key in quantizer.names}
    values = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in values.items()}
    return dict(type=name, bits=quantizer.bits, **values)


def make_quantizer(state: dict) -> nn.Module:
    """Inverse of `quantizer_state`."""
    make = QUANTIZERS[state["type"]]
    return make() if make is q.FullPrecision else make(state["bits"], *map(state.get, make.names))


def linear_state(layer: nn.Module, weight: Tensor, Q_W, Q_X, smooth=None, view=None, **more):
    """The state of a convolution or linear layer, of this weight in place of its own.

    Beyond the paper: `smooth` (I,), what inputs are divided by; `view`, see `pack_weight`; `shift`
    (I,) or (G, I), what is taken off inputs first; `hadamard`, the size of the blocks of channels
    that inputs and weight are rotated in; `bias`, (O,) or (G, O), in place of the layer's;
    `low_rank`, dict(left (O, r), right (r, I)), whose product is added to the quantized weight;
    `regroup` (T,), groups of the layer's own, where the file's `group_table` has the T timesteps.
    """
    kind = "conv" if isinstance(layer, nn.Conv2d) else "linear"
    packed = pack_weight(weight.view(layer.weight.shape), Q_W, view)
    more = dict(bias=layer.bias.detach(), smooth=smooth) | more
    more = {key: on_host(value) for key, value in more.items() if value is not None}
    return dict(type=kind, weight=packed, act=quantizer_state(Q_X), **more)


def on_host(value):
    """A tensor, or a dict of tensors, on the host; a number as it is."""
    if isinstance(value, dict):
        return {k: x.cpu() for k, x in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def matmul_state(Q_A, Q_B) -> dict:
    """The state of a product of two activations."""
    return dict(type="matmul", a=quantizer_state(Q_A), b=quantizer_state(Q_B))


def make_layer(state: dict) -> nn.Module:
    """The quantized layer of a state. Weights are dequantized once, here."""
    if state["type"] == "matmul":
        return q.QuantMatMul(make_quantizer(state["a"]), make_quantizer(state["b"]))
    act, weight = make_quantizer(state["act"]), unpack_weight(state["weight"])
    before = [state.get(key) for key in ("smooth", "shift", "hadamard")]
    if any(value is not None for value in before):
        act = ScaledInput(act, *before)
    if "low_rank" in state:
        weight = weight + state["low_rank"]["left"] @ state["low_rank"]["right"]
    if "regroup" in state:
        return RegroupedLinear(weight, state["bias"], act, state["regroup"])
    make = GroupBiasLinear if state["bias"].ndim > 1 else LINEAR[state["type"]]
    return make(weight, state["bias"], act)


# ------------------------------------------------------------------------------------------------
# Models


def quantized_parts(model, config, layers, num_timesteps, num_groups) -> dict:
    """What a quant file holds of a model whose layers have these states, by name."""
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in layers}
    table = group_table(Diffusion(num_timesteps).timestep_map, num_groups)
    return dict(config=config, state=state, layers=layers, group_table=table)


def group_table(timestep_map: Tensor, num_groups: int) -> Tensor:
    """(1000,) group of every timestep the network can be told, for sampling at these T timesteps.

    A timestep that this sampler skips belongs with the last visited one below it.
    """
    T = len(timestep_map)
    visited = torch.searchsorted(timestep_map, torch.arange(TRAIN_TIMESTEPS), right=True) - 1
    return q.time_group(visited.clamp(0, T - 1), T, num_groups)  # Eq. (9)


def table_at(artifact: dict, num_timesteps: int) -> Tensor:
    """The (1000,) table of a quant file for sampling at another T: the fraction t / T decides (D4);
    one that tells layers the timestep itself stays."""
    groups = artifact["settings"]["sampling"]["groups"]
    if int(artifact["group_table"].max()) >= groups:
        return artifact["group_table"]
    return group_table(Diffusion(num_timesteps).timestep_map, groups)


def load_quant(path) -> dict:
    """A quant file, of any method."""
    return load_artifact(path, "quant", "03_quantize.py")


def build_quantized(artifact: dict, source, make=make_layer, keep=True) -> nn.Module:
    """The quantized DiT of a quant file, its layers made by `make(state)`. InputError if its parts
    do not make up the whole model. Without `keep` every state leaves the artifact's `layers` once
    it is used, so that no two forms of all weights are held."""
    try:
        with memory_errors():
            return assembled(artifact, source, make, keep)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source} is damaged: {reason}; run 03 again") from error


def assembled(artifact, source, make, keep):
    """`build_quantized`, whatever it may raise."""
    with torch.device("meta"):
        model = DiT(**artifact["config"])
    model.group_table = artifact["group_table"]
    _, unexpected = model.load_state_dict(artifact["state"], strict=False, assign=True)
    layers = artifact["layers"]
    for name in [*layers]:
        swap_layer(model, name, make(layers[name] if keep else layers.pop(name)))
        if not keep:
            give_back_memory()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing or unexpected:
        raise InputError(f"{source} is damaged: {(missing + unexpected)[0]}; run 03 again")
    return model.eval().requires_grad_(False)


def swap_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a quantized layer in place of the one it stands for; ValueError if it does not fit."""
    parent, _, child = name.rpartition(".")
    parent, old = model.get_submodule(parent), model.get_submodule(name)
    if isinstance(layer, q.QuantMatMul):
        parent.fused = False  # the products must be explicit
    elif layer.bias.shape[-1:] != old.bias.shape or layer.weight.numel() != old.weight.numel():
        raise ValueError(f"{name} has another shape")
    setattr(parent, child, layer)
