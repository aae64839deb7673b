"""A quant file's contents in two layouts for other programs; docs/interop.md says what they are."""

import torch

from common import diffusers_file as form
from common.diffusers_names import copies_of, cut, diffusers_config, layer_names, to_diffusers
from common.errors import InputError
from common.packing import unpack_codes
from common.quant_file import unpack_weight

FILE = {
    "kind", "format", "torch", "device", "git", "settings", "inputs", "method", "config", "state",
    "layers", "group_table", "report",
}  # fmt: skip
LAYERS = dict.fromkeys(("linear", "conv"), {"type", "weight", "bias", "act", "smooth"})
LAYERS["matmul"] = {"type", "a", "b"}


def check_known(artifact, source):
    """InputError if the file holds what the layouts have no place for, as another method's may, or
    is of a network that diffusers has not."""
    if artifact["config"]["mlp_ratio"] != 4:
        raise InputError(f"{source}: a DiT of diffusers has an MLP of 4 times its width")
    unknown = artifact.keys() - FILE
    for layer, state in artifact["layers"].items():
        if state.keys() - LAYERS.get(state["type"], set()) or not has_place(state):
            unknown.add(layer)
    if unknown:
        what = f"{min(unknown)} of method {artifact['method']}"
        raise InputError(f"{source}: there is no layout yet for {what}")


def has_place(state):
    """Whether the layouts know the quantizers of a layer, a scale for each output channel."""
    if "weight" in state and ("view" in state["weight"] or state["bias"].ndim > 1):
        return False
    return all(state[key]["type"] in form.DELTA for key in ("a", "b", "act") if key in state)


# ------------------------------------------------------------------------------------------------
# Layers as tensors


def in_int8(codes, bits):
    """Codes or zero points 0..2^k - 1 of any dtype as int8, 2^(k-1) less."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def about(quantizer, kind):
    """What the metadata say of a quantizer of this type."""
    return dict(type=kind) | (dict(bits=quantizer["bits"]) if form.DELTA[kind] else {})


def delta_tensors(side, quantizer):
    """The tensors of a quantizer of activations."""
    found = {key: quantizer[key].reshape(-1) for key in form.DELTA[quantizer["type"]]}
    if "zero_point" in found:
        found["zero_point"] = in_int8(found["zero_point"], quantizer["bits"])
    return {f"{side}_{key}": x for key, x in found.items()}


def product_tensors(state):
    """The tensors of a product of activations, and what the metadata say of it."""
    tensors = delta_tensors("a", state["a"]) | delta_tensors("b", state["b"])
    return tensors, {side: about(state[side], state[side]["type"]) for side in "ab"}


def weight_tensors(state):
    """The weight and bias of a linear layer or convolution: a row for each output channel, or one
    for all."""
    weight, bits = state["weight"], state["weight"]["bits"]
    codes = unpack_codes(weight["codes"], bits, weight["shape"])
    scale, zero_point = weight["scale"], in_int8(weight["zero_point"], bits)
    if scale.numel() == 1:
        scale, zero_point = scale.reshape(1), zero_point.reshape(1)
    rows = dict(weight=in_int8(codes, bits), weight_scale=scale, weight_zero_point=zero_point)
    return rows | dict(bias=state["bias"])


def linear_tensors(layer, state, names):
    """{name: (tensors, what the metadata say)} of a layer, by diffusers' names: qkv is cut in
    three, and of the embedders' copies the first is meant."""
    rows, inputs = weight_tensors(state), delta_tensors("input", state["act"])
    inputs |= dict(input_smooth=state["smooth"]) if "smooth" in state else {}
    act = about(state["act"], state["act"]["type"])
    entry = dict(weight=about(state["weight"], "uniform"), input=act)
    count = len(cut(layer, rows["weight"]))
    parts = {key: cut(layer, x) if len(x) > 1 else [x] * count for key, x in rows.items()}
    found = ({key: part[i] for key, part in parts.items()} | inputs for i in range(count))
    return {name: (tensors, entry) for name, tensors in zip(names, found, strict=False)}


def quantized_layers(artifact):
    """The same of all quantized layers, and of attention's products."""
    names, found = layer_names(artifact["config"]["depth"]), {}
    for layer, state in artifact["layers"].items():
        if state["type"] == "matmul":
            found[names[layer][0]] = product_tensors(state)
        else:
            found |= linear_tensors(layer, state, names[layer])
    return found


def joined(layers):
    """All their tensors, by their whole names."""
    return {f"{name}.{key}": x for name, (own, _) in layers.items() for key, x in own.items()}


# ------------------------------------------------------------------------------------------------
# Our layout


def first_timesteps(group_table, source):
    """The first of 0..999 of each time group."""
    starts = torch.cat([torch.zeros(1, dtype=torch.long), group_table.diff().nonzero()[:, 0] + 1])
    if group_table[starts].tolist() != list(range(len(starts))):
        raise InputError(f"{source}: its time groups are not runs of timesteps")
    return starts.tolist()


def tqdit_layout(artifact, source, sha256):
    """All tensors of the file, and what its metadata say."""
    settings, layers = artifact["settings"], quantized_layers(artifact)
    tensors = to_diffusers(artifact["state"], artifact["config"]["depth"], copies=False)
    return tensors | joined(layers), form.OFFICIAL | dict(
        version=form.VERSION,
        method=artifact["method"],
        wbits=settings["wbits"],
        abits=settings["abits"],
        sampling=settings["sampling"],
        first_timesteps=first_timesteps(artifact["group_table"], source),
        config=diffusers_config(artifact["config"]),
        layers={name: entry for name, (_, entry) in layers.items()},
        checkpoint_sha256=artifact["inputs"]["checkpoint"],
        quant_sha256=sha256,
    )


# ------------------------------------------------------------------------------------------------
# That of the package compressed-tensors


def scheme(state):
    """How a linear layer is quantized: its weight and its inputs, in the package's words; None if
    the package has none for it."""
    act, by_channel = state["act"], state["weight"]["scale"].numel() > 1
    if act["type"] != "uniform" or act["scale"].numel() > 1 or "smooth" in state:
        return None
    static = dict(type="int", symmetric=False, dynamic=False)
    strategy = "channel" if by_channel else "tensor"
    weights = static | dict(num_bits=state["weight"]["bits"], strategy=strategy)
    inputs = static | dict(num_bits=act["bits"], strategy="tensor")
    return dict(weights=weights, input_activations=inputs)


def compressed_layout(artifact, source):
    """All tensors, and config.json. The linear layers are quantized; the convolution has its
    rounded weight in full precision, and the products of attention are as they were."""
    config, state = artifact["config"], dict(artifact["state"])
    linear = {k: v for k, v in artifact["layers"].items() if v["type"] == "linear"}
    schemes = {layer: scheme(found) for layer, found in linear.items()}
    alike = next(iter(schemes.values()), None)
    for layer, found in schemes.items():
        if found is None or found != alike:
            fault = "one static scale for its inputs: quantize with 03 --no-mrq --no-tgq"
            raise InputError(f"{source}: for compressed-tensors {layer} needs {fault}")
    for layer, found in artifact["layers"].items():
        if found["type"] == "conv":
            state[f"{layer}.weight"] = unpack_weight(found["weight"])
            state[f"{layer}.bias"] = found["bias"]
    own, depth = quantized_layers(artifact | dict(layers=linear)), config["depth"]
    layers = {copy: layer for name, layer in own.items() for copy in copies_of(name, depth)}
    whole = to_diffusers(state, depth)
    return whole | joined(layers), diffusers_config(config) | dict(
        _class_name="DiTTransformer2DModel",
        norm_eps=form.OFFICIAL["norm_eps"],
        quantization_config=dict(
            quant_method="compressed-tensors",
            format="int-quantized",
            quantization_status="compressed",
            config_groups=dict(group_0=alike | dict(targets=list(layers))),
        ),
    )
