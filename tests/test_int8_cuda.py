"""engine/int8_cuda.py, triton_kernels.py: products of codes bit for bit, by Triton and by torch.

Without a GPU the kernel runs in Triton's interpreter, if Triton is installed, and `_int_mm` on the
CPU; `pytest -m gpu` runs both on the GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from int8_layers import DEVICE, GROUPS, INPUTS, OUTPUTS, ROWS, TOKENS, layer_of, quantizer
from torch.utils._python_dispatch import TorchDispatchMode

import quant_ops as q
from common.quantizers import DynamicQuantizer
from engine import int8_cuda as e
from engine.int8_blocks import fuses

pytestmark = pytest.mark.gpu
WIDTHS = [(2, 2), (4, 8), (6, 6), (7, 7), (8, 8)]


def definition(layer, x, group):
    """Sums in int64, then the formula of int8_cuda.py in float32."""
    low, high = layer.inputs(x, group).long(), None
    if isinstance(layer.act, q.GeluQuantizer):
        low, high = low.clamp(max=0), low.clamp(min=0)
    w = layer.weight.long() - (0 if layer.correction is None else layer.correction[:, None].long())
    params = layer.act.params_for(x, group)
    if high is None:
        zero_point = params[1].long() - 2 ** (layer.act.bits - 1)
        out = ((low - zero_point) @ w.T).float() * params[0]
    else:
        out = (low @ w.T).float() * params[0] + (high @ w.T).float() * params[1]
    return out * layer.w_scale + layer.bias


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["uniform", "gelu", "folded"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_product_is_the_integer_definition_bit_for_bit(bits, kind, groups, triton):
    """Eq. (5), MRQ, TGQ, SmoothQuant: exact sums, one formula; that is fake quantization."""
    factor, group = GROUPS[groups]
    smooth, x = torch.rand(INPUTS) + 1, torch.randn(ROWS, TOKENS, INPUTS).to(DEVICE)
    group = None if group is None else group.to(DEVICE)
    layer, weight = layer_of(bits, kind, factor, triton, smooth=smooth)
    found = layer(x, group)
    assert found.dtype == torch.float32 and layer.weight.dtype == torch.int8
    assert torch.equal(found.cpu(), definition(layer.cpu(), x.cpu(), GROUPS[groups][1]))
    x_hat = layer.act(x.cpu() / smooth, GROUPS[groups][1]).double()
    expected = F.linear(x_hat, weight.cpu().double(), layer.bias.double())
    assert (found.cpu() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_scale_for_each_token_is_the_definition_bit_for_bit(bits, triton):
    """Scales found at run time, of tokens of every size: exact sums, one formula."""
    layer, weight = layer_of(bits, "token", None, triton, smooth=torch.rand(INPUTS) + 1)
    x = torch.randn(ROWS, TOKENS, INPUTS) * torch.logspace(-3, 3, TOKENS)[:, None]
    found, (codes, grid, _) = layer(x.to(DEVICE)).cpu(), layer.of_tokens(x.to(DEVICE))
    layer, codes, scale, zero_point = layer.cpu(), codes.cpu(), grid[0].cpu(), grid[2].cpu()
    w = layer.weight.long() - (0 if layer.correction is None else layer.correction[:, None].long())
    sums = (codes.long() - zero_point.view(ROWS, TOKENS, 1)) @ w.T
    expected = sums.float() * scale.view(ROWS, TOKENS, 1) * layer.w_scale + layer.bias
    assert torch.equal(found, expected)
    x_hat = DynamicQuantizer(bits[1], "token")(x / layer.smooth).double()
    ideal = F.linear(x_hat, weight.cpu().double(), layer.bias.double())
    assert ((found - ideal).abs() / ideal.abs().amax(dim=-1, keepdim=True)).max() < 1e-6


@pytest.mark.parametrize("inputs, outputs", [(72, 144), (80, 136)])
def test_sizes_that_triton_s_tiles_do_not_take(inputs, outputs):
    """16 must divide both; other layers are multiplied by `_int_mm`."""
    one, x = torch.tensor(1.0), torch.randn(2, 20, inputs, device=DEVICE)
    layer, _ = layer_of((6, 6), "uniform", one, True, outputs, inputs)
    with RowsOfIntMM() as rows:
        found = layer(x).cpu()
    assert rows.found == [40] and not fuses(layer)
    assert torch.equal(found, definition(layer.cpu(), x.cpu(), None))


class RowsOfIntMM(TorchDispatchMode):
    """How many rows each `_int_mm` is given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._int_mm.default:
            self.found.append(len(args[0]))
        return function(*args, **kwargs or {})


def test_rows_fewer_than_int_mm_takes(triton):
    """Three rows of conditioning, without tokens: CUDA's `_int_mm` is given 17."""
    layer, _ = layer_of((8, 8), "uniform", torch.tensor(1.0), triton)
    x = torch.randn(3, INPUTS, device=DEVICE)
    with RowsOfIntMM() as rows:
        found = layer(x).cpu()
    assert torch.equal(found, definition(layer.cpu(), x.cpu(), None))
    assert rows.found == ([] if triton else [17])


def test_most_inputs_are_exact(triton):
    """One step below the bound, all codes and zero points at their ends: int32 holds the sum."""
    inputs = e.MAX_INPUTS - 8
    v, ends = torch.full((8, inputs), 127, dtype=torch.int8), torch.tensor([255.0, 1.0])
    act = q.UniformQuantizer(8, ends[1], ends[0])  # all codes are 0, so values -255
    correction = torch.full((8,), -128.0)  # q_w - z_w = 255
    args = v, correction, torch.ones(8, 1), torch.zeros(8), act
    layer = e.Int8LinearCUDA(*args, triton=triton).to(DEVICE)
    found = layer(torch.full((20, inputs), -255.0, device=DEVICE))
    assert (found == torch.tensor(-255.0 * 255 * inputs)).all()


def test_output_is_of_autocast_s_type(triton):
    """04 --dtype bf16: the float32 result, rounded once."""
    layer, _ = layer_of((6, 6), "uniform", torch.tensor(1.0), triton)
    x = torch.randn(2, 20, INPUTS, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = layer(x)
    step = 2**-7 if triton and DEVICE.type == "cpu" else 0  # the interpreter cuts bits off
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, layer(x).bfloat16(), rtol=step, atol=0)


@pytest.mark.parametrize("bits", [(6, 6), (8, 8)])
@pytest.mark.parametrize("groups", GROUPS)
def test_mrq_s_two_products_become_one_of_bf16(bits, groups, triton):
    """With autocast, which fake quantization multiplies in bf16 too: the same values, rounded."""
    factor, group = GROUPS[groups]
    group = None if group is None else group.to(DEVICE)
    fc1, _ = layer_of((8, 8), "uniform", torch.tensor(1.0), triton)
    fc2, weight = layer_of(bits, "gelu", factor, triton, INPUTS, OUTPUTS)
    x = torch.randn(ROWS, TOKENS, INPUTS, device=DEVICE)
    hidden = F.gelu(fc1(x, group), approximate="tanh")
    values = fc2.act(hidden, group)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, fake = fc2(hidden, group), q.QuantLinear(weight, fc2.bias, fc2.act)(hidden, group)
        at_once = fc1.before_gelu(fc1.inputs(x, group), group, fc2)[0] if triton else None
    assert found.dtype == fake.dtype == torch.bfloat16
    torch.testing.assert_close(found, fake, rtol=2**-7, atol=2**-7 * fake.abs().max().item())
    if triton:
        assert at_once.dtype == torch.bfloat16
        other_code = (at_once.float() - values).abs() > 2**-7 * values.abs()
        assert other_code.float().mean() < 1e-3


@pytest.mark.parametrize("shape, reason", [
    ((16, 24), ""), ((15, 24), "8 does not divide"), ((16, 23), "8 does not divide"),
    ((16, e.MAX_INPUTS), "too many inputs"),
])  # fmt: skip
def test_what_int_mm_refuses_stays_in_floating_point(monkeypatch, shape, reason):
    """Sizes of a layer, whoever multiplies."""
    monkeypatch.setattr(e, "has_int_unit", lambda device: True)
    act, v = quantizer("uniform", 8, torch.tensor(1.0)), torch.zeros(shape, dtype=torch.int8)
    why = e.why_not(v, act, torch.device("cuda"))
    assert reason in why and bool(why) == bool(reason)


def test_gpu_without_a_product_of_codes(monkeypatch):
    """Before Turing: all in floating point, and the line says so."""
    monkeypatch.setattr(e, "has_int_unit", lambda device: False)
    act, v = quantizer("uniform", 8, torch.tensor(1.0)), torch.zeros(16, 24, dtype=torch.int8)
    assert "this GPU" in e.why_not(v, act, torch.device("cuda"))
