"""Layers of integer codes for CUDA, of sizes that are no whole number of tiles, for the tests of
engine/. Without a GPU Triton's kernels run in its interpreter.
"""

import os

import torch

import quant_ops as q
from engine.int8_cuda import Int8LinearCUDA
from engine.int8_linear import folded, signed_weight
from engine.token_quantizer import TokenQuantizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
ROWS, TOKENS, INPUTS, OUTPUTS = 6, 12, 80, 144  # none a whole number of tiles
GROUPS = {
    "none": (torch.tensor(1.0), None),
    "one table": (torch.tensor(1.0), torch.tensor([2, 0, 1, 1, 2, 0])),
    "mixed": (torch.tensor([1.0, 1.5, 0.7]), torch.tensor([2, 0, 1, 1, 2, 0])),
}


def quantizer(kind, bits, factor):
    """A quantizer of inputs in about [-3, 3] whose ranges are `factor` times that, () or (G,)."""
    if kind == "uniform":
        return q.uniform_candidates(-3 * factor, 2 * factor, bits)[0]
    if kind == "token":
        return TokenQuantizer(bits)
    half = 2 ** (bits - 1)
    act = q.GeluQuantizer(bits, 0.17 * factor / half, 3 * factor / half)
    return folded(act) if kind == "folded" else act


def layer_of(bits, kind, factor, triton, outputs=OUTPUTS, inputs=INPUTS, smooth=None):
    """A layer of codes, and its weight and bias on the quant file's grid."""
    torch.manual_seed(bits[0])
    weight, bias = torch.randn(outputs, inputs) + 0.2, torch.arange(outputs) / 7
    Q_W = q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), bits[0])[0]
    codes = q.quantize(weight, Q_W.scale, Q_W.zero_point, bits[0]).to(torch.uint8)
    v, correction = signed_weight(codes, Q_W.zero_point, bits[0])
    act = quantizer(kind, bits[1], factor)
    made = Int8LinearCUDA(v, correction, Q_W.scale, bias, act, smooth, triton)
    return made.to(DEVICE), Q_W(weight).to(DEVICE)
