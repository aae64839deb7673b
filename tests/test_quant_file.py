"""common/quant_file.py: packed codes, the states of layers, and the time group of a timestep."""

import math

import pytest
import torch

import quant_ops as q
from common import packing
from common import quant_file as f

BITS = range(2, 9)


@pytest.mark.parametrize("count", [1, 7, 8, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_pack_codes_round_trip(bits, count):
    """Codes of every width come back, in ceil(count * k / 8) bytes."""
    codes = torch.randint(0, 2**bits, (count,))
    codes[0] = 2**bits - 1
    packed = packing.pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(packing.unpack_codes(packed, bits, (count,)).long(), codes)


def test_unpack_codes_refuses_a_wrong_length():
    """A cut-off stream raises instead of giving wrong weights."""
    with pytest.raises(ValueError, match="cannot hold"):
        packing.unpack_codes(torch.zeros(3, dtype=torch.uint8), 6, (5,))


def per_channel(weight, bits):
    """The min-max quantizer of every row of a weight (O, ...)."""
    ends = weight.detach().flatten(1).aminmax(dim=1, keepdim=True)
    return q.uniform_candidates(*ends, bits)[0]


@pytest.mark.parametrize("bits", BITS)
def test_linear_layer_comes_back_from_its_codes(bits):
    """The layer of a state is x through its quantizer, times the rounded weight, plus the bias."""
    layer, x = torch.nn.Linear(4, 6), torch.randn(3, 5, 4)
    Q_W, Q_X = per_channel(layer.weight, bits), q.uniform_candidates(*x.aminmax(), bits)[0]
    W_hat = Q_W(layer.weight.detach())
    found = f.make_layer(f.linear_state(layer, W_hat, Q_W, Q_X))(x)
    assert (W_hat != layer.weight).any()
    torch.testing.assert_close(found, Q_X(x) @ W_hat.T + layer.bias)


def test_convolution_comes_back_from_its_codes():
    """The state of a convolution keeps its shape, and makes a convolution."""
    layer, x = torch.nn.Conv2d(3, 6, 2, stride=2), torch.randn(2, 3, 8, 8)
    Q_W = per_channel(layer.weight, 8)
    state = f.linear_state(layer, Q_W(layer.weight.detach().flatten(1)), Q_W, q.FullPrecision())
    error = f.make_layer(state)(x) - layer(x)
    assert 0 < error.abs().max() < 0.02


def test_inputs_are_divided_by_smooth_before_they_are_quantized():
    """SmoothQuant's factors stand in the state, and divide the inputs of its layer."""
    layer, x, smooth = torch.nn.Linear(4, 6), torch.randn(3, 5, 4), torch.rand(4) + 0.5
    Q_X = q.uniform_candidates(*(x / smooth).aminmax(), 4)[0]
    Q_W = per_channel(layer.weight, 4)
    state = f.linear_state(layer, Q_W(layer.weight.detach()), Q_W, Q_X, smooth)
    expected = Q_X(x / smooth) @ f.unpack_weight(state["weight"]).T + layer.bias
    torch.testing.assert_close(f.make_layer(state)(x), expected)


@pytest.mark.parametrize("quantizer", [
    q.UniformQuantizer(5, torch.tensor([0.01, 0.03]), torch.tensor([0.0, 2.0])),
    q.SoftmaxQuantizer(5, torch.tensor([0.01, 0.03])),
    q.GeluQuantizer(5, torch.tensor([0.01, 0.03]), torch.tensor([0.02, 0.05])),
    q.FullPrecision(),
])  # fmt: skip
def test_quantizer_state_round_trips(quantizer):
    """What a quant file says of a quantizer makes the same quantizer again."""
    x, group = torch.rand(2, 3, 4), torch.tensor([0, 1])
    again = f.make_quantizer(f.quantizer_state(quantizer))
    assert type(again) is type(quantizer) and torch.equal(again(x, group), quantizer(x, group))


@pytest.mark.parametrize("bits, share", [(8, 0.26), (6, 0.20), (4, 0.14)])
def test_packed_weight_of_dit_xl_is_small(bits, share):
    """Of DiT-XL/2's shortest rows, 1152, codes, scales and zero points take this share of fp32."""
    weight = torch.zeros(1152, 1152)
    packed = f.pack_weight(weight, per_channel(weight, bits))
    stored = sum(x.nbytes for x in packed.values() if isinstance(x, torch.Tensor))
    assert stored <= share * weight.nbytes


def test_group_table_answers_in_network_timesteps():
    """Eq. (9): the network is told timesteps 0..999; the table gives the sampling index's group."""
    timestep_map = torch.tensor([round(i * 999 / 49) for i in range(50)])
    table = f.group_table(timestep_map, 10)
    assert table[timestep_map].tolist() == [t * 10 // 50 for t in range(50)]
    assert table.shape == (1000,) and (table.diff() >= 0).all()
