"""What each kind of file must hold: keys, types, dtypes, shapes, ranges.

A spec is a dict of specs, with these keys and no others, or a function of a value, its name and
the sizes known so far, which raises Fault. A shape is a text of sizes, as "R 3*D": a name stands
for what a number in the file or another shape says it is; the first to be met decides.

    R  rows       C, H  channels and height of x    M  width of the MLP    T, G, n  of the paper
    S  tokens     D     width                       Z  outputs a token     P  patch
    K  labels, the null label among them
"""

import math
import re
import sys
from typing import NamedTuple

import torch

from models_dit import LAYERS, TRAIN_TIMESTEPS
from quant_ops import time_group

FORMAT = 2
BIG, HUGE = 2**63 - 1, sys.float_info.max
FLOAT, INT = torch.float32, torch.int64


class Fault(Exception):
    """What is wrong with a value, for whom knows the file's name."""


def need(condition, message):
    """Fault with this message unless the condition holds."""
    if not condition:
        raise Fault(message)


def told(value):
    """A value in a few words."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) is int and value.bit_length() > 64:
        return "beyond 64 bits"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value[:60] if isinstance(value, str) else value) if plain else type(value).__name__


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
    for key in value:
        need(key in spec, f"{prefix}{told(key).strip(chr(39))} is unknown")


# ------------------------------------------------------------------------------------------------
# Leaves of a spec


class Optional(NamedTuple):
    spec: object

    def __call__(self, value, name, sizes):
        check(value, self.spec, name, sizes)


class OneOf:
    def __init__(self, *values):
        self.values = values

    def __call__(self, value, name, sizes):
        found = any(type(value) is type(x) and value == x for x in self.values)
        need(found, f"{name} is {told(value)}, not {' or '.join(map(repr, self.values))}")


class Text(NamedTuple):
    pattern: str = "(?s).{0,4096}"

    def __call__(self, value, name, sizes):
        fits = isinstance(value, str) and re.fullmatch(self.pattern, value)
        need(fits, f"{name} is {told(value)}, not a text like {self.pattern}")


class Int(NamedTuple):
    low: int
    high: int = BIG
    size: str = ""  # its name, where shapes depend on it

    def __call__(self, value, name, sizes):
        fits = type(value) is int and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a whole number of {self.low}..{self.high}")
        if self.size:
            agree(sizes, {self.size: value}, name)


class Float(NamedTuple):
    """NaN never is one."""

    low: float = -HUGE
    high: float = HUGE

    def __call__(self, value, name, sizes):
        fits = type(value) is float and self.low <= value <= self.high
        need(fits, f"{name} is {told(value)}, not a number of {self.low:g}..{self.high:g}")


class ListOf(NamedTuple):
    spec: object
    size: str

    def __call__(self, value, name, sizes):
        need(type(value) is list, f"{name} is {told(value)}, not a list")
        need(len(value) == sizes[self.size], f"{name} has {len(value)} of {sizes[self.size]} items")
        for x in value:
            check(x, self.spec, name, sizes)


class Tensor(NamedTuple):
    """Finite, and strictly between two numbers, of which the upper may be a size."""

    dtypes: tuple
    shape: str
    above: float = -math.inf
    below: float | str = math.inf

    def __call__(self, x, name, sizes):
        expected = numbers(self.shape, sizes)
        fits = isinstance(x, torch.Tensor) and x.dtype in self.dtypes and x.ndim == len(expected)
        fits = fits and all(isinstance(e, str) or e == n for e, n in zip(expected, x.shape))
    ...
