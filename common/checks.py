"""A small vocabulary to say what a file must hold; common/schemas.py says it with these words.

A spec is a dict of specs, with these keys and no others, or a function of a value, its name and
the sizes known so far, which raises Fault. A shape is a text of sizes, "R 3*D": a name stands for
the number that another shape or an `Int` of the same file gave it, or else takes it from here.
"""

import math
import re
import sys
from typing import NamedTuple

import torch

BIG, HUGE = 2**63 - 1, sys.float_info.max


class Fault(Exception):
    """What is wrong with a value; whoever knows the file puts its name before."""


def need(condition, message):
    """Fault with this message unless the condition holds."""
    if not condition:
        raise Fault(message)


def check(value, spec, name, sizes):
    """Fault unless the value is as the spec says; `sizes` grows by what it tells."""
    if not isinstance(spec, dict):
        return spec(value, name, sizes)
    need(isinstance(value, dict), f"{name or 'it'} is {told(value)}, not a dict")
    prefix = name and name + "."
    for key, inner in spec.items():
        if key in value:
            check(value[key], inner, prefix + key, sizes)
        else:
            need(isinstance(inner, Optional), f"{prefix}{key} is missing")
    unknown = [key for key in value if key not in spec]
    need(not unknown, f"{prefix}{told(unknown[0]) if unknown else ''} is unknown")


def told(value):
    """A value in a few words, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) is str:
        return repr(value[:60])
    if value is None or type(value) in (bool, float) or small(value):
        return repr(value)
    return "beyond 64 bits" if type(value) is int else f"a {type(value).__name__}"


def small(value):
    """Whether it is an int that 64 bits hold."""
    return type(value) is int and abs(value) <= BIG


def agree(sizes, **found):
    """Fault if a size that is known already has another value; else it is known from here on."""
    for key, value in found.items():
        known = sizes.setdefault(key, value)
        need(known == value, f"its parts disagree: {key} is {known}, elsewhere {value}")


def product(text, sizes):
    """The number of "3*D", or the text itself where that is not known yet."""
    factors = [int(x) if x.isdigit() else sizes.get(x) for x in text.split("*")]
    return text if None in factors else math.prod(factors)


# ------------------------------------------------------------------------------------------------
# Leaves of a spec


class Optional(NamedTuple):
    """A key that may be absent."""

    spec: object

    def __call__(self, value, name, sizes):
        check(value, self.spec, name, sizes)


class OneOf:
    """One of these values."""

    def __init__(self, *values):
        self.values = values

    def __call__(self, value, name, sizes):
        found = any(type(value) is type(x) and value == x for x in self.values)
        need(found, f"{name} is {told(value)}, not {' or '.join(map(repr, self.values))}")


class Text(NamedTuple):
    """A text that this expression matches."""

    pattern: str = "[^\0]{0,4096}"

    def __call__(self, value, name, sizes):
        fits = type(value) is str and re.fullmatch(self.pattern, value)
        need(fits, f"{name} is {told(value)}, not a text of {self.pattern!r}")


class Int(NamedTuple):
    """A whole number; with a name, a size."""

    low: int
    high: int = BIG
    size: str = ""

    def __call__(self, value, name, sizes):
        fits = type(value) is int and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a whole number of {self.low}..{self.high}")
        if self.size:
            agree(sizes, **{self.size: value})


class Float(NamedTuple):
    """A number, never NaN."""

    low: float = -HUGE
    high: float = HUGE

    def __call__(self, value, name, sizes):
        fits = type(value) is float and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a number of {self.low:g}..{self.high:g}")


class ListOf(NamedTuple):
    """A list of so many."""

    spec: object
    size: str

    def __call__(self, value, name, sizes):
        wanted = sizes[self.size]
        fits = type(value) is list and len(value) == wanted
        need(fits, f"{name} is {told(value)}, not a list of {wanted}")
        for x in value:
            check(x, self.spec, name, sizes)


class TensorOf(NamedTuple):
    """Finite values strictly between two bounds, of which the upper one may be a size."""

    dtypes: tuple
    shape: str
    above: float = -math.inf
    below: float | str = math.inf

    def __call__(self, x, name, sizes):
        wanted = [product(text, sizes) for text in self.shape.split()]
        fits = isinstance(x, torch.Tensor) and x.dtype in self.dtypes and x.ndim == len(wanted)
        pairs = list(zip(wanted, x.shape, strict=True)) if fits else []
        fits = fits and all(type(want) is str or want == size for want, size in pairs)
        dtype, shape = told_dtype(self.dtypes), ", ".join(map(str, wanted))
        need(fits, f"{name} is {told(x)}, not {dtype} ({shape})")
        there = x.device.type == "cpu" and x.layout is torch.strided and x.numel() > 0
        there = there and x.nbytes <= x.untyped_storage().nbytes()  # not one value said to be many
        need(there, f"{name} {tuple(x.shape)} has no values")
        agree(sizes, **{want: size for want, size in pairs if type(want) is str})
        self.check_values(x, name, sizes)

    def check_values(self, x, name, sizes):
        low, high = (end.item() for end in x.aminmax())  # NaN if any is; far sooner than isfinite
        need(math.isfinite(low + high), f"{name} holds NaN or infinity")
        ...
