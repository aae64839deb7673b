"""What common/export.py writes for diffusers, as docs/interop.md says it: what such a file must
hold, and the quantized layers that are made of it.

Codes and zero points, 0..2^k - 1 in a quant file, are int8 here, 2^(k-1) less: s (q - z) does not
change.
"""

import torch

import quant_ops as q
from common.checks import Float, Int, OneOf, TensorOf, check, need, told
from common.model_schema import FLOAT, SAMPLING, SHA256, TEXT
from common.quant_file import QUANTIZERS
from common.quantizers import ScaledInput
from models_dit import TRAIN_TIMESTEPS

VERSION = 1
METADATA = "tqdit"  # names the JSON text among the file's metadata
OFFICIAL = dict(downscale_freq_shift=0, norm_eps=1e-6)  # diffusers has 1 and 1e-5
TYPES = "uniform", "softmax", "gelu", "none"  # that this format has
DELTA = {name: getattr(QUANTIZERS[name], "names", ()) for name in TYPES}
INT8, BITS = (torch.int8,), Int(2, 8)

# ------------------------------------------------------------------------------------------------
# The metadata


def any_dict(value, name, sizes):
    need(isinstance(value, dict), f"{name} is {told(value)}, not an object")


def quantizer(value, name, sizes):
    """The type of a quantizer, and its bits if it has any."""
    any_dict(value, name, sizes)
    OneOf(*DELTA)(value.get("type"), f"{name}.type", sizes)
    check(value, dict(type=TEXT) | (dict(bits=BITS) if DELTA[value["type"]] else {}), name, sizes)


def rising(value, name, sizes):
    """The first timestep of each time group."""
    check(value, [Int(0, TRAIN_TIMESTEPS - 1)] * sizes["groups"], name, sizes)
    need(value[0] == 0 and value == sorted(set(value)), f"{name} do not rise from 0")


ABOUT = dict(
    version=OneOf(VERSION),
    method=TEXT,
    wbits=BITS,
    abits=BITS,
    sampling=SAMPLING,
    first_timesteps=rising,
    downscale_freq_shift=OneOf(OFFICIAL["downscale_freq_shift"]),
    norm_eps=Float(0, 1),
    config=any_dict,
    layers=any_dict,
    checkpoint_sha256=SHA256,
    quant_sha256=SHA256,
)


def check_about(found, names):
    """Fault unless these metadata are as `ABOUT` says, of layers among these."""
    check(found, ABOUT, "", {})
    for name, entry in found["layers"].items():
        need(name in names, f"it has no {told(name)}")
        sides = "ab" if name.endswith((".qk", ".av")) else ("weight", "input")
        check(entry, {side: quantizer for side in sides}, f"layers.{name}", {})
        uniform = entry.get("weight", {}).get("type") in (None, "uniform")
        need(uniform, f"layers.{name}.weight is not uniform")


# ------------------------------------------------------------------------------------------------
# The tensors of a layer, named without it


def codes_spec(bits, shape):
    half = 2 ** (bits - 1)
    return TensorOf(INT8, shape, above=-half - 1, below=half)


def delta_spec(side, about, tensors, shape):
    """Spec of a quantizer's tensors: all of this shape, or one value each. What `tensors` are, is
    believed for that alone."""
    keys = {f"{side}_{key}": key for key in DELTA[about["type"]]}
    one = any(isinstance(x, torch.Tensor) and x.shape == (1,) for x in map(tensors.get, keys))
    shape = "1" if one else shape
    scale = TensorOf(FLOAT, shape, above=0)
    return {
        name: codes_spec(about["bits"], shape) if key == "zero_point" else scale
        for name, key in keys.items()
    }


def layer_spec(entry, tensors, shape):
    """Spec of the tensors of a layer whose weight has this shape, or of a product (None). The
    convolution knows no time groups, and its inputs are as they come."""
    spec, is_conv = {}, bool(shape) and len(shape) == 4
    for side, about in entry.items():
        many = f"{shape[0]} 1" if side == "weight" else "1" if is_conv else "groups"
        spec |= delta_spec(side, about, tensors, many)
    if shape:
        spec["weight"] = codes_spec(entry["weight"]["bits"], " ".join(map(str, shape)))
        spec["bias"] = TensorOf(FLOAT, str(shape[0]))
    if shape and not is_conv and "input_smooth" in tensors:
        spec["input_smooth"] = TensorOf(FLOAT, str(shape[1]), above=0)
    return spec


def make_quantizer(side, about, tensors):
    """The quantizer of activations that these tensors hold."""
    make = QUANTIZERS[about["type"]]
    if not DELTA[about["type"]]:
        return make()
    values = {key: tensors[f"{side}_{key}"].float() for key in make.names}
    if "zero_point" in values:
        values["zero_point"] += 2 ** (about["bits"] - 1)
    return make(about["bits"], *(x.squeeze() for x in values.values()))  # () if one for all groups


def make_layer(entry, tensors):
    """The quantized layer or product of these tensors; a weight is dequantized once, here."""
    if "a" in entry:
        return q.QuantMatMul(*(make_quantizer(side, entry[side], tensors) for side in "ab"))
    act = make_quantizer("input", entry["input"], tensors)
    if "input_smooth" in tensors:
        act = ScaledInput(act, tensors["input_smooth"])
    codes, zero_point = tensors["weight"], tensors["weight_zero_point"].float()
    W_hat = q.dequantize(codes.float().flatten(1), tensors["weight_scale"], zero_point)
    make = q.QuantLinear if codes.ndim == 2 else q.QuantConv2d
    return make(W_hat.view(codes.shape), tensors["bias"], act)
