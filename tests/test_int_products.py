"""engine/int_products.py: products of int8 codes equal those of fake-quantized values."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT

import quant_ops as q
from engine import int_products as p

RANGES = {"both signs": (-1.0, 2.0), "no negative": (0.0, 3.0), "no positive": (-2.5, 0.0)}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_exact_product = pytest.mark.skipif(
    not p.int_mm_is_exact(), reason="oneDNN is told to do without VNNI, and saturates"
)


def product(terms, weight):
    """The product alone: what is left of nothing, with the other sign."""
    return -p.int_error(terms, weight, torch.zeros(len(terms[0].codes), len(weight.codes)))


def drawn(bits, x_range="both signs", w_range="both signs"):
    """Inputs (40, 24) and weights (16, 24) in these ranges."""
    torch.manual_seed(bits)
    return (torch.empty(n, 24).uniform_(*RANGES[r]) for n, r in ((40, x_range), (16, w_range)))


def min_max(x, bits, **dim):
    """The quantizer of x's range; with `dim` of every row's."""
    return q.uniform_candidates(*x.aminmax(**dim), bits)[0]


@needs_exact_product
@pytest.mark.parametrize("w_range", RANGES)
@pytest.mark.parametrize("x_range", RANGES)
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_product_equals_that_of_fake_quantized(bits, x_range, w_range):
    """Eq. (5): zero points folded into sums of rows and columns, wherever the ranges lie."""
    x, w = drawn(bits, x_range, w_range)
    Q_X = min_max(x, bits)
    for Q_W in (min_max(w, bits, dim=1, keepdim=True), min_max(w, bits)):
        found = product(p.input_codes(Q_X, x, None), p.weight_codes(Q_W, w))
        expected = Q_X(x).double() @ Q_W(w).double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@needs_exact_product
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_product_takes_a_scale_for_each_time_group(bits):
    """TGQ of inputs: every row has its own scale and zero point."""
    x, w = drawn(bits)
    group = torch.arange(40) // 10
    Q_X = q.uniform_candidates(*x.view(4, -1).aminmax(dim=1), bits)[0]
    Q_W = min_max(w, bits, dim=1, keepdim=True)
    found = product(p.input_codes(Q_X, x, group), p.weight_codes(Q_W, w))
    torch.testing.assert_close(found, Q_X(x, group) @ Q_W(w).T, rtol=1e-6, atol=1e-5)


@needs_exact_product
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_product_after_gelu_is_the_sum_of_two(bits, groups):
    """MRQ: the codes below zero with s_1, those above with s_2, also where they clip."""
    x, w = drawn(bits)
    group = None if groups is None else torch.arange(40) % groups
    size = torch.tensor(1.0) if groups is None else torch.rand(groups) + 0.5
    Q_X = q.GeluQuantizer(bits, 0.6 * size * 2.0**-bits, 3 * size * 2.0**-bits)
    Q_W = min_max(w, bits, dim=1, keepdim=True)
    found = product(p.input_codes(Q_X, x, group), p.weight_codes(Q_W, w))
    torch.testing.assert_close(found, Q_X(x, group) @ Q_W(w).T, rtol=1e-6, atol=1e-5)


@needs_exact_product
@pytest.mark.parametrize("zero_point", [0.0, 255.0])
def test_product_of_the_most_inputs_is_exact(zero_point):
    """One input below the bound, codes and zero points at opposite ends: int32 holds the sum."""
    inputs, far = p.MAX_INPUTS - 1, torch.tensor(255.0 - 2 * zero_point)
    Q = q.UniformQuantizer(8, torch.tensor(1.0), torch.tensor(zero_point))
    x, w = far.expand(20, inputs), far.expand(8, inputs)
    assert (Q(x) == far).all()
    found = product(p.input_codes(Q, x, None), p.weight_codes(Q, w))
    assert (found == torch.tensor(255 * 255 * inputs).float()).all()


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_a_unit_that_saturates_is_not_taken(isa):
    """A CPU with VNNI that oneDNN is told not to use: its product is tried, not its name read."""
    code = """
        import torch
        from engine.int_products import has_int_unit
        a = torch.full((40, 72), -128, dtype=torch.int8)
        exact = bool((torch._int_mm(a, a.T) == 72 * 128 * 128).all())
        assert exact or not has_int_unit(a.device)"""
    told = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=told, check=True)


@pytest.mark.parametrize("device, rows, shape, taken", [
    (CPU, 3, (23, 64), True),
    (CPU, 40, (8, p.MAX_INPUTS - 1), True),
    (CPU, 40, (8, p.MAX_INPUTS), False),  # a sum could leave int32
    (CUDA, 40, (8, 2 * p.MAX_INPUTS), False),
    (CUDA, 17, (24, 64), True),
    (CUDA, 16, (24, 64), False),  # what CUDA's unit does not take
    (CUDA, 40, (23, 64), False),
    (CUDA, 40, (24, 63), False),
])  # fmt: skip
def test_takes_shapes(device, rows, shape, taken):
    """Only what is exact, and what the device's unit takes."""
    assert p.takes_shapes(rows, torch.empty(shape, device="meta"), device) is taken
