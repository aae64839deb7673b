"""A small vocabulary to say what a file must hold; common/schemas.py says it in these words.

A spec is a dict of specs, for a dict with these keys and no others; a list of specs, for a list of
these items; or a function of a value, its name and the sizes known so far, which raises Fault. A
shape is a text of sizes, such as "R 3*D": a name stands for the number that an `Int` or another
shape of the same file gave it, or else takes it from here.
"""

import math
import re
import sys
from typing import NamedTuple

import torch

BIG, HUGE = 2**63 - 1, sys.float_info.max


class Fault(Exception):
    """What is wrong with a value; who knows the file says which file it is."""


def need(condition, message):
    """Fault with this message unless the condition holds."""
    if not condition:
        raise Fault(message)


def check(value, spec, name, sizes):
    """Fault unless the value is as the spec says; `sizes` grows by what it tells."""
    if type(spec) is list:
        return check_list(value, spec, name, sizes)
    if type(spec) is not dict:
        return spec(value, name, sizes)
    need(isinstance(value, dict), f"{name or 'it'} is {told(value)}, not a dict")
    prefix = name and name + "."
    for key, inner in spec.items():
        if key in value:
            check(value[key], inner, prefix + key, sizes)
        else:
            need(isinstance(inner, Optional), f"{prefix}{key} is missing")
    for key in value:
        need(key in spec, f"{prefix.rstrip('.') or 'it'} has an unknown entry, {told(key)}")


def check_list(value, specs, name, sizes):
    """`check` of a list, item by item."""
    need(type(value) is list, f"{name} is {told(value)}, not a list")
    need(len(value) == len(specs), f"{name} has {len(value)} items, not {len(specs)}")
    for i, (item, spec) in enumerate(zip(value, specs, strict=True)):
        check(item, spec, f"{name}[{i}]", sizes)


def agree(sizes, found):
    """Add these sizes; Fault if one is known to be another."""
    for key, value in found.items():
        known = sizes.setdefault(key, value)
        need(known == value, f"its parts disagree: {key} is {known} and {value}")


def product(text, sizes):
    """The number of "3*D"; the text itself where that is not known yet."""
    factors = [int(x) if x.isdigit() else sizes.get(x) for x in text.split("*")]
    return text if None in factors else math.prod(factors)


def told(value):
    """A value in a few words, whatever it is."""
    if isinstance(value, torch.Tensor):
        return tensor_of(value.dtype, value.shape)
    if type(value) is int and abs(value) > BIG:
        return "beyond 64 bits"
    if type(value) is str:
        return repr(value[:60])
    simple = value is None or type(value) in (bool, int, float)
    return repr(value) if simple else f"a {type(value).__name__}"


def tensor_of(dtype, shape):
    return f"{str(dtype).removeprefix('torch.')} ({', '.join(map(str, shape))})"


# ------------------------------------------------------------------------------------------------
# Leaves of a spec


class Optional(NamedTuple):
    """An entry that may be absent."""

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
    """A text that all of this pattern matches."""

    pattern: str = r"[^\0]{0,4096}"

    def __call__(self, value, name, sizes):
        fits = type(value) is str and re.fullmatch(self.pattern, value)
        need(fits, f"{name} is {told(value)}, not a text that {self.pattern} matches")


class Int(NamedTuple):
    """A whole number in low..high; with a name, a size."""

    low: int
    high: int = BIG
    size: str = ""

    def __call__(self, value, name, sizes):
        fits = type(value) is int and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a whole number in {self.low}..{self.high}")
        if self.size:
            agree(sizes, {self.size: value})


class Float(NamedTuple):
    """A float in low..high; NaN is in none."""

    low: float = -HUGE
    high: float = HUGE

    def __call__(self, value, name, sizes):
        fits = type(value) is float and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a float in {self.low:g}..{self.high:g}")


class Plain(NamedTuple):
    """Texts and numbers, in lists and dicts: so many in all, nested no deeper than this."""

    most: int = 100_000
    depth: int = 8

    def __call__(self, value, name, sizes):
        left, count = [(value, 0)], 1
        while left:
            x, depth = left.pop()
            if isinstance(x, dict | list):
                count += len(x)
                need(count <= self.most and depth < self.depth, f"{name} holds too much")
                inner = [*x.keys(), *x.values()] if isinstance(x, dict) else x
                left += [(y, depth + 1) for y in inner]
            elif type(x) is str:
                Text()(x, f"a part of {name}", sizes)
            elif type(x) is not bool and x is not None:
                (Float() if type(x) is float else Int(-BIG))(x, f"a part of {name}", sizes)


class TensorOf(NamedTuple):
    """Finite values strictly between two bounds, of which the upper one may be a size."""

    dtypes: tuple
    shape: str
    above: float = -math.inf
    below: float | str = math.inf
    whole: bool = False

    def __call__(self, x, name, sizes):
        shape = [product(text, sizes) for text in self.shape.split()]
        fits = isinstance(x, torch.Tensor) and x.dtype in self.dtypes and len(shape) == x.ndim
        pairs = list(zip(shape, x.shape, strict=True)) if fits else []
        fits = fits and all(type(wanted) is str or wanted == size for wanted, size in pairs)
        need(fits, f"{name} is {told(x)}, not {tensor_of(self.dtypes[0], shape)}")
        there = x.device.type == "cpu" and x.layout is torch.strided and x.numel() > 0
        there = there and x.nbytes <= x.untyped_storage().nbytes()  # or one value stands for many
        need(there, f"{name}, {told(x)}, does not hold so many values")
        plain = not x.requires_grad or isinstance(x, torch.nn.Parameter)  # of some checkpoints
        need(plain, f"{name} asks for its gradient")
        for wanted, size in pairs:
            if type(wanted) is str:
                agree(sizes, {wanted: size})
        self.check_values(x, name, sizes)

    def check_values(self, x, name, sizes):
        low, high = (end.item() for end in x.aminmax())  # NaN if any is; sooner than isfinite
        need(math.isfinite(low) and math.isfinite(high), f"{name} holds NaN or infinity")
        below = sizes.get(self.below, math.inf) if isinstance(self.below, str) else self.below
        bounds = f"above {self.above:g} and below {below:g}"
        need(self.above < low and high < below, f"{name} holds {low:g} to {high:g}, not {bounds}")
        need(not self.whole or torch.equal(x, x.round()), f"{name} holds fractions")
