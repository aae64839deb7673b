"""k-bit codes in bytes, without a gap."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integer codes 0..2^k - 1 of any shape -> uint8 bytes, k bits each, low bit first."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.uint8)
    stream = (codes.to(torch.uint8).flatten()[:, None] >> shifts[:bits]) & 1
    stream = F.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, shape) -> Tensor:
    """Inverse of `pack_codes`: uint8 codes of the given shape. ValueError if too short or long."""
    count = torch.Size(shape).numel()
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed[:, None] >> shifts) & 1).flatten()[: count * bits].view(count, bits)
    return (stream << shifts[:bits]).sum(dim=1, dtype=torch.uint8).view(shape)
