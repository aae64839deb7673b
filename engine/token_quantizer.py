"""Inputs whose scales are found at run time, one for each token, for products of their codes."""

import torch.nn as nn
from torch import Tensor

from quant_ops import fake_quant, qparams_from_range


class TokenQuantizer(nn.Module):
    """Eq. (5) with the min-max scale and zero point of each token: the codes that a
    `DynamicQuantizer` of common/quantizers.py makes per token, all channels in one group."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits

    def params_for(self, x: Tensor, group=None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the tokens of x (..., I), both (..., 1)."""
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        return qparams_from_range(low, high, self.bits)

    def forward(self, x, group=None):
        return fake_quant(x, *self.params_for(x), self.bits)
