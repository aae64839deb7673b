"""Dynamic quantization of activations, ranges taken as they come: what Q-DiT and DiTAS share."""

import torch.nn as nn

from common.quantizers import DynamicQuantizer
from methods.balancing import tokens_of


class OnRows(nn.Module):
    """A dynamic quantizer for a linear layer's `LayerData`, whose chunks have a row (R, I) for each
    of so many tokens of a sample."""

    def __init__(self, Q: nn.Module, tokens: int):
        super().__init__()
        self.Q, self.tokens = Q, tokens

    def forward(self, x, group=None):
        return self.Q(x.unflatten(0, (-1, self.tokens))).flatten(0, 1)


def on_rows(Q, data, rows):
    """`Q` for the data of a linear layer, of so many calibration rows."""
    return OnRows(Q, tokens_of(data, rows))


def operands(layer, bits, per):
    """The quantizers of both operands of an attention product: ranges per "sample", or per "token"
    and head, of which k^T (N, H, K, S) has one in each column."""
    is_qk = not layer.spec.post_softmax
    other = "column" if per == "token" and is_qk else per
    return DynamicQuantizer(bits, per), DynamicQuantizer(bits, other)
