"""Dynamic quantization of activations, ranges taken as they come: what methods share."""

import torch.nn as nn

from common.cli import number_or_none
from common.quantizers import DynamicQuantizer
from methods.balancing import tokens_of
from methods.rounding import divisor


def channels_or_token(text):
    """A flag's number of channels, "token" for all that a token has, or None for `none`."""
    return text if text == "token" else number_or_none(text)


def group_size(wanted, channels):
    """How many of a token's channels share a scale: all ("token"), or about so many."""
    return channels if wanted == "token" else divisor(channels, wanted)


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
