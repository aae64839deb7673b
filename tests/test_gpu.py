"""Every quantizer and search on CUDA equals the CPU's: `pytest -m gpu`."""

from argparse import Namespace

import pytest
import torch
from conftest import load_script

import quant_ops as q

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def both(function, *tensors):
    """The function's result on the CPU, and on CUDA brought back."""
    return function(*tensors), function(*(x.cuda() for x in tensors)).cpu()


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizers_equal_the_cpu(bits):
    """Same codes on both devices, but for ties that the last bit of a division decides."""
    x, s1, s2 = torch.randn(10000), torch.tensor(2.0**-bits / 4), torch.tensor(2.0**-bits)
    step, zero = q.qparams_from_range(x.min(), x.max(), bits)
    cases = [
        both(lambda x, s, z: q.fake_quant(x, s, z, bits), x, step, zero),
        both(lambda x, s: q.mrq_softmax(x, s, bits), x.sigmoid(), s1),
        both(lambda x, a, b: q.mrq_gelu(x, a, b, bits), x, s1, s2),
    ]
    for cpu, cuda in cases:
        assert (cpu != cuda).float().mean() < 1e-3
    codes = torch.randint(0, 2**bits, (999,))
    cpu, cuda = both(lambda c: q.unpack_codes(q.pack_codes(c, bits), bits, (999,)), codes)
    assert torch.equal(cpu, cuda)


@pytest.mark.parametrize("post_gelu", [False, True])
def test_linear_search_equals_the_cpu(post_gelu):
    """Phase 3 on CUDA chooses the CPU's step sizes (to one grid place in a near-tie)."""
    torch.manual_seed(0)
    script, layer = load_script("03_quantize"), torch.nn.Linear(64, 48).requires_grad_(False)
    x, grad = torch.randn(512, 64), torch.randn(512, 48)
    y = x @ layer.weight.T
    options = dict(wbits=6, abits=6, metric="hessian", mrq=True, tgq=True, rounds=3)
    options |= dict(layers="released", weight_granularity="channel")
    steps = []
    for device in ("cpu", "cuda"):
        args = Namespace(**options, device=device)
        state = script.quantize_linear(layer.to(device), [(grad, y, x)], post_gelu, args)
        steps.append(state["weight"]["step"])
    assert ((steps[0] - steps[1]).abs() <= 0.03 * steps[0]).all()
