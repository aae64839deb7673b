"""What a quant file holds of each layer, in the words of common/checks.py.

What stands in place of a linear layer must be one, of its shape, and so on. A method with a layer
or a quantizer of a new type adds it to `layer` or `Quantizer`.
"""

import math
from typing import NamedTuple

import torch

from common.checks import Int, OneOf, Optional, TensorOf, check, need, product, told
from common.model_schema import ANY, FLOAT, INT, TEXT, WEIGHTS
from models_dit import LAYERS

BYTE = (torch.uint8,)
BITS = Int(2, 8)
PREFIXES = {"embed": "", "block": "blocks.{}.", "final": "final_layer."}


def bits(value, name, sizes):
    """A bit width, and the number of levels it has."""
    BITS(value, name, sizes)
    sizes.update(bits=value, levels=2**value)


def scale_shape(value, shape):
    """This shape if the quantizer's scale has one, or () if it has one scale for all."""
    scale = value.get("scale", value.get("scale1")) if isinstance(value, dict) else None
    return shape if getattr(scale, "ndim", 0) else ""


class Weight(NamedTuple):
    """A weight of this shape, packed, with a scale for all of it or for each output channel."""

    shape: str

    def __call__(self, value, name, sizes):
        shape = [product(text, sizes) for text in self.shape.split()]
        channels = scale_shape(value, f"{shape[0]} 1")
        view = value.get("view") if isinstance(value, dict) else None
        if view is not None:
            check_view(view, math.prod(shape), f"{name}.view")
            channels = view_scales(value, view, name)
        spec = dict(
            bits=bits,
            shape=[OneOf(size) for size in shape],
            view=Optional(ANY),
            codes=self.check_codes,
            scale=TensorOf(FLOAT, channels, above=0),
            zero_point=TensorOf(BYTE, channels, below="levels"),
        )
        check(value, spec, name, sizes)

    def check_codes(self, value, name, sizes):
        count = math.prod(product(text, sizes) for text in self.shape.split())
        TensorOf(BYTE, str(-(-count * sizes["bits"] // 8)))(value, name, sizes)


def check_view(view, count, name):
    """A weight's own shape for its scales: three sizes, for as many elements."""
    need(type(view) is list and len(view) == 3, f"{name} is not a list of three sizes")
    for i, size in enumerate(view):
        Int(1, count)(size, f"{name}[{i}]", {})
    need(math.prod(view) == count, f"{name} is of {math.prod(view)} elements, not {count}")


def view_scales(value, view, name):
    """The shape of scales for a weight in this view: along each axis one for all, or for each."""
    found = list(getattr(value.get("scale"), "shape", ()))
    fits = len(found) == 3 and all(a in (1, b) for a, b in zip(found, view, strict=True))
    need(fits, f"{name}.scale does not go with the view {view}")
    return " ".join(map(str, found))


class Quantizer(NamedTuple):
    """A quantizer of activations, with a scale for all of them or, if allowed, for each group."""

    by_group: bool
    channels: str = ""  # of what is quantized; a dynamic one's groups divide it

    def __call__(self, value, name, sizes):
        shape = scale_shape(value, "groups") if self.by_group else ""
        scale = TensorOf(FLOAT, shape, above=0)
        zero_point = TensorOf(FLOAT, shape, above=-1, below="levels", whole=True)
        parts = ["sample", "token"] + ["column"] * (not self.channels)  # as k^T has its tokens
        types = dict(
            uniform=dict(bits=bits, scale=scale, zero_point=zero_point),
            softmax=dict(bits=bits, scale1=scale),
            gelu=dict(bits=bits, scale1=scale, scale2=scale),
            adaptive=dict(bits=bits, scale=scale, log2=TensorOf((torch.bool,), shape)),
            dynamic=dict(bits=bits, per=OneOf(*parts), group_size=self.check_group),
            none={},
        )
        need(isinstance(value, dict), f"{name} is {told(value)}, not a dict")
        OneOf(*types)(value.get("type"), f"{name}.type", sizes)
        check(value, dict(type=TEXT) | types[value["type"]], name, sizes)

    def check_group(self, value, name, sizes):
        count = product(self.channels, sizes) if self.channels else 0
        fits = value is None or (type(value) is int and 0 < value <= count and count % value == 0)
        need(fits, f"{name} is {told(value)}, which does not divide {count} channels")


class Tabled(NamedTuple):
    """A vector of so many numbers or, if allowed, one for each time group."""

    size: str
    by_group: bool

    def __call__(self, value, name, sizes):
        table = self.by_group and getattr(value, "ndim", 0) > 1
        TensorOf(FLOAT, f"groups {self.size}" if table else self.size)(value, name, sizes)


class Block(NamedTuple):
    """The size of a Hadamard matrix that goes into so many channels."""

    channels: str

    def __call__(self, value, name, sizes):
        count = product(self.channels, sizes)
        Int(1, count)(value, name, sizes)
        fits = value & (value - 1) == 0 and count % value == 0
        need(fits, f"{name} is {value}: no power of two that divides {count} channels")


class Local(NamedTuple):
    """A spec whose own sizes, such as a rank, are no other layer's. A layer that has `regroup` has
    so many groups as that tells."""

    spec: dict

    def __call__(self, value, name, sizes):
        sizes = dict(sizes)
        if "regroup" in self.spec and isinstance(value, dict) and "regroup" in value:
            self.spec["regroup"](value["regroup"], f"{name}.regroup", sizes)
            sizes["groups"] = int(value["regroup"].max()) + 1
        check(value, self.spec, name, sizes)


def layer(name, about):
    """Spec of the quantized twin of this layer, a `LayerSpec` of models_dit.LAYERS."""
    if name not in WEIGHTS:
        return dict(type=OneOf("matmul"), a=Quantizer(True), b=Quantizer(True))
    outputs, *inputs = WEIGHTS[name].split()
    linear = len(inputs) == 1
    spec = dict(
        type=OneOf("linear" if linear else "conv"),
        weight=Weight(WEIGHTS[name]),
        bias=TensorOf(FLOAT, outputs),
        act=Quantizer(linear and not about.conditioning, inputs[0] if linear else ""),
    )
    if not linear:
        return spec
    low_rank = dict(left=TensorOf(FLOAT, f"{outputs} R"), right=TensorOf(FLOAT, f"R {inputs[0]}"))
    spec |= dict(
        bias=Tabled(outputs, not about.conditioning),
        smooth=Optional(TensorOf(FLOAT, *inputs, above=0)),
        shift=Optional(Tabled(*inputs, not about.conditioning)),
        hadamard=Optional(Block(*inputs)),
        low_rank=Optional(Local(low_rank)),
    )
    if about.conditioning:
        return spec
    return Local(spec | dict(regroup=Optional(TensorOf(INT, "steps", above=-1, below="steps"))))


LAYER_SPECS = {
    name: Optional(layer(name, about))
    for name, about in ((PREFIXES[about.unit] + about.name, about) for about in LAYERS)
}
