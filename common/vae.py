"""The SD-VAE decoder: latents (N, 4, h, w) -> images (N, 3, 8h, 8w), by the public files' names."""

import re
from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.artifacts import sha256_of
from common.checkpoints import download
from common.checks import Fault, TensorOf, check, need, told
from common.errors import InputError, reading
from common.model_schema import ANY_FLOAT
from common.weight_files import find_weights, load_weights, without_prefix

VAE_SCALE = 0.18215  # latents the DiT works on = VAE_SCALE * latents of the autoencoder
VAE_URL = "https://huggingface.co/stabilityai/sd-vae-ft-{}/resolve/main/diffusion_pytorch_model.bin"
group_norm = partial(nn.GroupNorm, 32, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two rounds of norm, SiLU, conv, around a shortcut (1x1 conv where the width changes)."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class PixelAttention(nn.Module):
    """Single-head self-attention over the h * w positions, with a residual."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, h * w, C)
        out = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(out).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """ResNet block, attention, ResNet block, all at the latents' resolution."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsampler(nn.Module):
    """Nearest-neighbour 2x, then a conv."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpBlock(nn.Module):
    """`layers` ResNet blocks, the first changing the width, then 2x up unless it is the last."""

    def __init__(self, width_in, width_out, layers, upsample):
        super().__init__()
        widths = [width_in] + [width_out] * layers
        self.resnets = nn.ModuleList(ResnetBlock(i, o) for i, o in pairwise(widths))
        self.upsamplers = nn.ModuleList([Upsampler(width_out)] if upsample else [])

    def forward(self, x):
        for module in [*self.resnets, *self.upsamplers]:
            x = module(x)
        return x


class Decoder(nn.Module):
    """Latents to images: conv, mid block, up blocks from the widest to the narrowest, conv."""

    def __init__(self, widths, layers, latents, channels):
        super().__init__()
        self.conv_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1])
        plan = enumerate(pairwise([widths[-1], *reversed(widths)]), start=1)
        blocks = [UpBlock(i, o, layers, upsample=n < len(widths)) for n, (i, o) in plan]
        self.up_blocks = nn.ModuleList(blocks)
        self.conv_norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, x):
        for module in [self.conv_in, self.mid_block, *self.up_blocks]:
            x = module(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEDecoder(nn.Module):
    """z (N, 4, h, w), already divided by `VAE_SCALE` -> images (N, 3, 8h, 8w), about [-1, 1]."""

    def __init__(self, widths=(128, 256, 512, 512), layers=3, latents=4, channels=3):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)
        self.decoder = Decoder(widths, layers, latents, channels)

    def forward(self, z):
        return self.decoder(self.post_quant_conv(z))


ATTENTION = {  # names below attentions.0 in older files -> now
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
    "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm",
}  # fmt: skip
OFFICIAL = {  # names of the official files -> those of diffusers; an up block's number apart
    r"decoder\.mid\.attn_1\.": "decoder.mid_block.attentions.0.",
    r"decoder\.mid\.block_1\.": "decoder.mid_block.resnets.0.",
    r"decoder\.mid\.block_2\.": "decoder.mid_block.resnets.1.",
    r"decoder\.norm_out\.": "decoder.conv_norm_out.",
    r"(decoder\.up_blocks\.\d\.)block\.": r"\1resnets.",
    r"(decoder\.up_blocks\.\d\.)upsample\.": r"\1upsamplers.0.",
    r"(.*)\.nin_shortcut\.": r"\1.conv_shortcut.",
    r"(.*\.attentions\.0\.)(\w+)": lambda m: m[1] + ATTENTION.get(m[2], m[2]),
}
NOT_DECODER = "encoder.", "quant_conv.", "loss.", "model_ema."


def convert_vae(state):
    """A public autoencoder's state dict as `VAEDecoder` names it: without encoder, from the names
    of diffusers, old or new, or the official ones, whose up blocks count from the narrowest."""
    state = without_prefix(state, "first_stage_model.")
    official = [name.split(".")[2] for name in state if re.match(r"decoder\.up\.\d\.", name)]
    last, decoder = int(max(official, default=0)), {}
    for name, tensor in state.items():
        if name.startswith(NOT_DECODER):
            continue
        up = r"decoder\.up\.(\d)\."
        name = re.sub(up, lambda m: f"decoder.up_blocks.{last - int(m[1])}.", name)
        for pattern, new in OFFICIAL.items():
            name = re.sub("^" + pattern, new, name)
        conv = ".attentions." in name and tensor.ndim == 4  # some files hold (C, C, 1, 1) weights
        decoder[name] = tensor.flatten(1) if conv else tensor
    return decoder


def local_vae(kind, path):
    """{"vae": sha256} of the local file that is to decode, for provenance; {} if none is named."""
    if path is None:
        return {}
    if kind == "none":
        raise InputError(f"--vae-path {path}: this network's samples are pixels")
    path = find_weights(path, "vae")
    with reading(path):
        return dict(vae=sha256_of(path))


def load_vae(kind, path=None):
    """The decoder of Stable Diffusion's autoencoder: of a local file or folder; without one, the
    `mse` or `ema` fine-tuned one, downloaded once."""
    url = VAE_URL.format(kind)
    path = find_weights(path, "vae") if path else download(url, f"sd-vae-ft-{kind}.bin")
    with torch.device("meta"):
        vae = VAEDecoder()
    shapes = {name: " ".join(map(str, x.shape)) for name, x in vae.state_dict().items()}
    state = load_weights(path, "the SD-VAE")
    with reading(path):
        try:
            need(isinstance(state, dict), f"it is {told(state)}")
            state = convert_vae(state)
            check(state, {name: TensorOf(ANY_FLOAT, x) for name, x in shapes.items()}, "", {})
        except Fault as fault:
            raise InputError(f"{path} is not the SD-VAE: {fault}") from fault
        vae.load_state_dict(state, assign=True)
    return vae.float().eval().requires_grad_(False)
