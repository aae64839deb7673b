"""engine/triton_hopper.py: what Triton's product gives, bit for bit; triton_hopper_attention.py:
what Triton's attention gives, but for ties. They need a Hopper GPU."""

import pytest
import torch
from int8_layers import DEVICE, GROUPS, ROWS, TOKENS, layer_of

from engine import cuda_trial
from engine.cuda_products import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_trial.on_hopper(DEVICE), reason="no Hopper GPU"),
]
SIZES = {  # tokens, inputs, outputs
    "less than a tile": (TOKENS, 80, 144),
    "several tiles for each program": (3000, 1152, 1168),
    "half the slots": (300, 256, 128),
    "all slots": (300, 512, 640),
}


def case(size, groups):
    """Numbers of inputs and outputs, a factor of scales, time groups, and random inputs."""
    tokens, inputs, outputs = SIZES[size]
    factor, group = GROUPS[groups]
    x = torch.randn(ROWS, tokens, inputs, device=DEVICE)
    return inputs, outputs, factor, None if group is None else group.to(DEVICE), x


def both(layer, ask):
    """What ask(layer) gives by triton_hopper.py and by triton_kernels.py."""
    found = []
    for layer.hopper in True, False:
        found.append(ask(layer))
    return found


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("bits", [(4, 8), (6, 6), (8, 8)])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_product_is_triton_s_bit_for_bit(size, bits, groups):
    """Results in bf16, and in whole steps of what they are quantized to."""
    inputs, outputs, factor, group, x = case(size, groups)
    layer, _ = layer_of(bits, "uniform", factor, True, outputs, inputs)
    codes = layer.inputs(x, group)
    with torch.autocast("cuda", torch.bfloat16):
        hopper, triton = both(layer, lambda x: x.product(codes, x.grid(), group))
    assert hopper.dtype == torch.bfloat16 and torch.equal(hopper, triton)
    onto = [torch.full((outputs,), end, device=DEVICE) for end in (10.0, -90.0, 70.0)]
    hopper, triton = both(layer, lambda x: x.in_steps(codes, group, onto))
    assert torch.equal(hopper, triton) and hopper.unique().numel() > 30


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["gelu", "folded"])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_inputs_of_fc2_are_triton_s_bit_for_bit(size, kind, groups):
    """GELU and fc2's grid at the end of fc1: MRQ's values in bf16, codes of one grid in int8."""
    inputs, outputs, factor, group, x = case(size, groups)
    fc1, _ = layer_of((8, 8), "uniform", factor, True, outputs, inputs)
    fc2, _ = layer_of((8, 8), kind, factor, True, inputs, outputs, torch.rand(outputs) + 1)
    codes = fc1.inputs(x, group)
    with torch.autocast("cuda", torch.bfloat16):
        found = both(fc1, lambda x: x.before_gelu(codes, group, fc2))
    (hopper, sums), (triton, _) = found
    assert (sums is None) == (kind == "gelu")
    if sums is not None:
        assert torch.equal(sums[0].long(), triton.sum(dim=-1))
    assert hopper.dtype == (torch.int8 if kind == "folded" else torch.bfloat16)
    assert torch.equal(hopper, triton) and hopper.unique().numel() > 30


@torch.no_grad()
def test_scales_of_each_token():
    layer, _ = layer_of((8, 8), "token", None, True, 1168, 1152)
    x = torch.randn(ROWS, 1000, 1152, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        hopper, triton = both(layer, lambda layer: layer(x))
    assert torch.equal(hopper, triton)


@torch.no_grad()
def test_one_row():
    """Of conditioning, without tokens."""
    layer, _ = layer_of((8, 8), "uniform", torch.tensor(1.0), True, 1152, 576)
    x = torch.randn(1, 576, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        hopper, triton = both(layer, lambda layer: layer(x))
    assert torch.equal(hopper, triton)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scale1", [2.0**-8, 2.0**-11, 2.0**-18])
@pytest.mark.parametrize("tokens, heads, width", [
    (256, 48, 72), (256, 6, 64), (128, 3, 96), (128, 2, 16), (256, 2, 24), (256, 5, 88),
])  # fmt: skip
def test_attention_is_triton_s_but_for_ties(tokens, heads, width, scale1, smooth):
    """q, k and v of 8 bits, MRQ of 8 whose R1 reaches R2 or not, three time groups."""
    D, one = heads * width, torch.ones((), device=DEVICE)
    qkv = torch.randint(-128, 128, (ROWS, tokens, 3 * D), device=DEVICE).bfloat16()
    steps = torch.tensor([1.0, 1.5, 0.7], device=DEVICE)
    then = [0.15 * steps, torch.arange(3, device=DEVICE, dtype=torch.int32), None]
    then[2] = torch.rand(D, device=DEVICE) + 0.5 if smooth else None
    how = [0.02 * one, 0.01 * one, one], scale1 * steps.ceil(), 128.0, then, 128, True
    group = GROUPS["mixed"][1].to(DEVICE)
    hopper, triton = (attention(qkv, group, heads, *how, by) for by in (True, False))
    assert torch.equal(hopper[1].long(), hopper[0].sum(dim=-1))
    assert (hopper[0] != triton[0]).float().mean() < 1e-3 and hopper[0].unique().numel() > 30


@torch.no_grad()
def test_softmax_on_the_border_of_its_regions():
    """All keys alike, 2^k of them: p lies half-way to R2's first level, which it gets."""
    qkv = torch.full((1, 256, 3 * 16), 3.0, device=DEVICE).bfloat16()
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.int32, device=DEVICE)
    how = [one] * 3, 2.0**-24 * one, 128.0, [one, zero, None], 128, False, True
    assert attention(qkv, None, 1, *how)[0].unique().tolist() == [6]


def test_kernel_that_is_wrong_or_errs_is_not_taken(monkeypatch):
    from engine import triton_hopper

    assert cuda_trial.product_trial(DEVICE) == ""
    plain = triton_hopper.linear
    monkeypatch.setattr(triton_hopper, "linear", lambda *args: plain(*args) + 1)
    assert cuda_trial.product_trial(DEVICE) == "the product for Hopper is wrong here"
    monkeypatch.setattr(triton_hopper, "linear", lambda *args: 1 / 0)
    assert "ZeroDivisionError" in cuda_trial.product_trial(DEVICE)


def test_attention_that_is_wrong_is_not_taken(monkeypatch):
    from engine import triton_hopper_attention

    def of_other_tokens(*args, plain=triton_hopper_attention.attention):
        return [part.roll(1, dims=1) for part in plain(*args)]

    monkeypatch.setattr(triton_hopper_attention, "attention", of_other_tokens)
    assert cuda_trial.attention_trial(DEVICE) == "the attention for Hopper is wrong here"
    assert cuda_trial.product_trial(DEVICE) == ""
