"""DiT, its DDPM sampler, the SD-VAE decoder, and checkpoint and artifact I/O.

The network is the diffusion transformer of Peebles and Xie (arXiv 2212.09748), with the parameter
names and constructor keywords of the public checkpoints, so those load with `strict=True`. Two
things differ inside, neither changes a number: the attention products are child modules `qk` and
`av`, so quantizing swaps children and patches no `forward`; and `DiT.forward` looks up each
sample's time group (Eq. 9) once and hands it down as an argument.

Shapes: N samples, C channels, S tokens, D width, H heads.
"""

import argparse
import atexit
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Embedders


class PatchEmbed(nn.Module):
    """(N, C, H, W) image -> (N, S, D) tokens, one per patch, rows first."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, S, D)


class TimestepEmbedder(nn.Module):
    """(N,) timesteps in 0..999 -> (N, D)."""

    def __init__(self, hidden_size, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequencies = frequencies

    def forward(self, t):
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(10000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """(N,) labels -> (N, D); label `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        # nn.Embedding's own normal_ imports the compiler on the meta device: a second of each start
        table = torch.rand(num_classes + 1, hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, y):
        return self.embedding_table(y)


def sincos_pos_embed(hidden_size, grid):
    """Fixed 2-D sine-cosine position embedding, (1, grid * grid, D); column half first."""
    omega = 10000.0 ** -(np.arange(hidden_size // 4) / (hidden_size / 4))
    angles = np.outer(np.arange(grid), omega)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, D / 2)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    table = np.concatenate([axis[columns], axis[rows]], axis=1)
    return torch.from_numpy(table).float()[None]


# ------------------------------------------------------------------------------------------------
# Attention, MLP, blocks


class MatMul(nn.Module):
    """A plain product; its quantized twin `QuantMatMul` uses the time group."""

    def forward(self, a, b, group=None):
        return a @ b


class Linear(nn.Linear):
    """A linear layer on tokens; its quantized twin `QuantLinear` may use the time group."""

    def forward(self, x, group=None):
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention. `fused` takes PyTorch's fused kernel, which hides `qk`, `av`."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.fused = True
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.qk = MatMul()
        self.av = MatMul()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x, group=None):
        N, S, D = x.shape
        qkv = self.qkv(x, group).reshape(N, S, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, H, S, D / H)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = self.qk(q * q.shape[-1] ** -0.5, k.transpose(-2, -1), group)  # (N, H, S, S)
            out = self.av(scores.softmax(dim=-1), v, group)
        return self.proj(out.transpose(1, 2).reshape(N, S, D), group)


class Mlp(nn.Module):
    """Pointwise feed-forward: fc1, GELU (tanh form), fc2."""

    def __init__(self, hidden_size, mlp_hidden):
        super().__init__()
        self.fc1 = Linear(hidden_size, mlp_hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = Linear(mlp_hidden, hidden_size)

    def forward(self, x, group=None):
        return self.fc2(self.act(self.fc1(x, group)), group)


def modulate(x, shift, scale):
    """adaLN: (N, S, D) tokens with one (N, D) shift and scale per sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, round(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, group=None):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # each (N, D)
        h = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), group)
        x = x + gate_msa[:, None] * h
        h = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), group)
        return x + gate_mlp[:, None] * h


class FinalLayer(nn.Module):
    """(N, S, D) -> (N, S, patch * patch * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c, group=None):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale), group)


# ------------------------------------------------------------------------------------------------
# DiT


class DiT(nn.Module):
    """The network eps_theta. Its output is eps, then the learned variance if `learn_sigma`."""

    def __init__(
        self,
        input_size=32,  # height and width of x
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        pos_embed = sincos_pos_embed(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        blocks = [DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.register_buffer("group_table", None, persistent=False)  # (1000,), once quantized

    def embed(self, x, t, y):
        """Tokens (N, S, D) and the conditioning vector c (N, D)."""
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def unpatchify(self, x):
        """(N, S, patch * patch * C) -> (N, C, H, W)."""
        p, grid = self.patch_size, self.input_size // self.patch_size
        x = x.reshape(-1, grid, grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid * p, grid * p)

    def forward(self, x, t, y):
        """x (N, C, H, W), t (N,) in 0..999, y (N,) in 0..num_classes -> (N, out_channels, H, W)."""
        group = None if self.group_table is None else self.group_table[t]  # (N,), Eq. (9)
        x, c = self.embed(x, t, y)
        for block in self.blocks:
            x = block(x, c, group)
        return self.unpatchify(self.final_layer(x, c, group))

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Classifier-free guidance. The second half of the batch repeats the first under the null
        label. As in the public DiT code only the first three channels of eps are guided."""
        half = len(x) // 2
        out = self(torch.cat([x[:half], x[:half]]), t, y).float()
        guided = min(cfg_channels, self.in_channels)
        eps, rest = out[:, :guided], out[:, guided:]
        cond, uncond = eps[:half], eps[half:]
        eps = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)


WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DiT_models = {
    f"DiT-{size}/{patch}": dict(
        hidden_size=width, depth=depth, num_heads=heads, patch_size=patch
    )
    for size, (width, depth, heads) in WIDTHS.items()
    for patch in (2, 4, 8)
}
DiT_models["DiT-Demo/4"] = dict(hidden_size=128, depth=6, num_heads=4, patch_size=4) | dict(
    input_size=28, in_channels=1, num_classes=10
)

# ------------------------------------------------------------------------------------------------
# DDPM: linear schedule, learned range, respaced to any T

TRAIN_STEPS = 1000


def respaced_timesteps(steps):
    """The `steps` of 0..999 that sampling visits, evenly spread, both ends included."""
    if not 1 <= steps <= TRAIN_STEPS:
        raise InputError(f"T = {steps} sampling steps: must be 1..{TRAIN_STEPS}")
    stride = (TRAIN_STEPS - 1) / (steps - 1) if steps > 1 else 1
    position, timesteps = 0.0, []
    for _ in range(steps):  # accumulated, not multiplied: rounds as the public code does
        timesteps.append(round(position))
        position += stride
    return timesteps


class Diffusion:
    """The sampler's tables for T steps; index t in 0..T-1 is the paper's timestep.

    `timestep_map[t]` is what the network is told. All tables are (T,) float32 on `device`,
    computed in float64.
    """

    def __init__(self, steps, device="cpu"):
        self.steps = steps
        timesteps = respaced_timesteps(steps)
        train_betas = np.linspace(1e-4, 0.02, TRAIN_STEPS, dtype=np.float64)
        abar = np.cumprod(1 - train_betas)[timesteps]
        abar_prev = np.append(1.0, abar[:-1])
        betas = 1 - abar / abar_prev
        posterior = betas * (1 - abar_prev) / (1 - abar)
        clipped = np.append(posterior[1] if steps > 1 else betas[0], posterior[1:])
        self.timestep_map = torch.tensor(timesteps, device=device)
        tables = dict(
            betas=betas,
            abar=abar,
            sqrt_abar=np.sqrt(abar),
            sqrt_one_minus_abar=np.sqrt(1 - abar),
            recip_sqrt_abar=np.sqrt(1 / abar),
            recipm1_sqrt_abar=np.sqrt(1 / abar - 1),
            mean_x0=betas * np.sqrt(abar_prev) / (1 - abar),
            mean_xt=(1 - abar_prev) * np.sqrt(1 - betas) / (1 - abar),
            log_var_min=np.log(clipped),
            log_var_max=np.log(betas),
            log_var_fixed=np.log(np.append(clipped[0], betas[1:])),
        )
        for name, table in tables.items():
            setattr(self, name, torch.tensor(table, dtype=torch.float32, device=device))

    def at(self, name, t):
        """Entries t (N,) of a table, shaped (N, 1, 1, 1)."""
        return getattr(self, name)[t][:, None, None, None]

    def q_sample(self, x_0, t, eps):
        """x_t ~ q(x_t | x_0), the closed form of Eq. (1)."""
        return self.at("sqrt_abar", t) * x_0 + self.at("sqrt_one_minus_abar", t) * eps

    def implied_eps(self, x_t, x_0, t):
        """The noise that separates x_t from x_0 (deviation D2): `q_sample` solved for eps."""
        return (x_t - self.at("sqrt_abar", t) * x_0) / self.at("sqrt_one_minus_abar", t)

    def predict_x0(self, x_t, t, eps):
        return self.at("recip_sqrt_abar", t) * x_t - self.at("recipm1_sqrt_abar", t) * eps

    def posterior_mean(self, x_0, x_t, t):
        """Mean of q(x_{t-1} | x_t, x_0); with the predicted x_0 this is mu_theta of Eq. (3)."""
        return self.at("mean_x0", t) * x_0 + self.at("mean_xt", t) * x_t

    def p_mean_log_var(self, out, x_t, t):
        """Mean and log variance of p(x_{t-1} | x_t), Eq. (2), from the network's output."""
        eps, var = out[:, : x_t.shape[1]], out[:, x_t.shape[1] :]
        mean = self.posterior_mean(self.predict_x0(x_t, t, eps), x_t, t)
        if not var.shape[1]:
            return mean, self.at("log_var_fixed", t)
        share = (var + 1) / 2  # learned range: -1 is the smallest variance, 1 the largest
        return mean, share * self.at("log_var_max", t) + (1 - share) * self.at("log_var_min", t)

    def p_sample(self, out, x_t, t, noise):
        """One step of Eq. (4): x_{t-1}. The last step, t = 0, adds no noise."""
        mean, log_var = self.p_mean_log_var(out, x_t, t)
        keep = (t > 0).float()[:, None, None, None]
        return mean + keep * torch.exp(0.5 * log_var) * noise

    def sensitivity(self):
        """(d x_{t-1} / d eps)^2 per step, (T,): how much an error of eps moves the sample."""
        return self.betas**2 / ((1 - self.betas) * (1 - self.abar))


def image_generators(seed, indices, stream=0):
    """One CPU random generator per image, keyed by (stream, seed, image index), nothing else."""
    sequences = [np.random.SeedSequence([stream, seed, i]) for i in indices]
    keys = [sequence.generate_state(1, np.uint64)[0] for sequence in sequences]
    return [torch.Generator().manual_seed(int(key)) for key in keys]


def draw_noise(generators, shape, device):
    """(N, *shape) standard normal noise, row i from generator i, the same on every device."""
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    if torch.device(device).type == "cuda":
        noise = noise.pin_memory()  # a copy of other memory waits until the GPU is idle
    return noise.to(device, non_blocking=True)


def trajectory(model, diffusion, y, generators, cfg_scale, cfg_channels=3):
    """Yield (t, x_t) for t = T-1..0, then (-1, x_0). x_t is (N, C, H, W); y is (N,) labels.

    `model` is a DiT, quantized or not.
    """
    shape, device = (model.in_channels, model.input_size, model.input_size), y.device
    x = draw_noise(generators, shape, device)
    null = torch.full_like(y, model.num_classes)
    for t in reversed(range(diffusion.steps)):
        yield t, x
        index = torch.full_like(y, t)
        told = diffusion.timestep_map[index]
        if cfg_scale == 1:
            out = model(x, told, y)
        else:
            pair = torch.cat([x, x]), torch.cat([told, told]), torch.cat([y, null])
            out = model.forward_with_cfg(*pair, cfg_scale, cfg_channels)[: len(x)]
        x = diffusion.p_sample(out.float(), x, index, draw_noise(generators, shape, device))
    yield -1, x


# ------------------------------------------------------------------------------------------------
# The SD-VAE decoder: latents (N, 4, h, w) -> images (N, 3, 8h, 8w), under the public files' names

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


RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def convert_vae(state):
    """A public autoencoder's state dict as `VAEDecoder` names it: no encoder, attention renamed."""
    decoder = {}
    for name, tensor in state.items():
        if name.startswith(("encoder.", "quant_conv.")):
            continue
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        conv = ".attentions." in name and tensor.ndim == 4  # some files hold (C, C, 1, 1) weights
        decoder[name] = tensor.flatten(1) if conv else tensor
    return decoder


def load_vae(kind):
    """The `mse` or `ema` fine-tuned decoder of Stable Diffusion, downloaded once."""
    path = download(VAE_URL.format(kind), f"sd-vae-ft-{kind}.bin")
    vae = VAEDecoder()
    try:
        vae.load_state_dict(convert_vae(load_state(path, "the SD-VAE")), strict=True)
    except RuntimeError as error:
        raise InputError(f"{path} is not the SD-VAE: {str(error).splitlines()[-1]}") from error
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------
# The demo's feature network: a small classifier that stands in for Inception


class FeatureNet(nn.Module):
    """Classifier whose pooled features, mid-level map and logits score the demo's samples."""

    def __init__(self, in_channels, width, num_classes):
        super().__init__()
        plan = [(in_channels, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        plan += [(2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=s, padding=1, bias=False) for i, o, s in plan
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in plan)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        """x (N, C, H, W) in [-1, 1] -> pooled (N, 4 width), spatial (N, h * w * 7), logits."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 3:
                spatial = x[:, :7].flatten(1)
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, self.fc(pooled)


# ------------------------------------------------------------------------------------------------
# Artifacts: what passes between the phases, and from whom it is accepted


class InputError(Exception):
    """Bad input; its one-line message says what is wrong and what to do. Exit status 2."""


FORMAT = 1


class Parser(argparse.ArgumentParser):
    """Shows the script's docstring and every default; a wrong flag is one line, exit status 2."""

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Help)
        self.paper = self.add_argument_group("paper (defaults reproduce it)")
        self.machine = self.add_argument_group("machine (must not change results)")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.machine.add_argument("--run", type=Path, default=Path("runs/demo"), help="its folder")
        self.machine.add_argument("--device", type=pick_device, default=default, help="cpu, cuda..")
        self.machine.add_argument("--force", action="store_true", help="replace what is there")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help explains the flags\n")


def run_script(main, parse_args):
    """Run a phase. Bad input becomes one line on stderr and exit status 2, never a traceback."""
    script = Path(sys.argv[0]).name
    try:
        main(parse_args())
    except InputError as error:
        sys.exit(_fail(script, error))
    except torch.OutOfMemoryError:
        sys.exit(_fail(script, "out of GPU memory: smaller --batch-size, --memory-limit?"))
    except KeyboardInterrupt:
        who = "stopped, as another process was" if dist.is_initialized() else "interrupted"
        sys.exit(_fail(script, f"{who}; the same command again continues", status=130))


def _fail(script, message, status=2):
    if dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, now that this process ends
        script = f"\n{script} (rank {dist.get_rank()} of {dist.get_world_size()})"  # off the bar
    sys.stderr.write(f"{script}: {' '.join(str(message).split())}\n")  # at once: no line is torn
    return status


def pick_device(name):
    """`cuda`, `cuda:1` or `cpu` as a torch.device, with TF32 off: same seed, same result."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA device is available; use --device cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()}")
    return device


def print_peak(device):
    """On CUDA, the most memory that tensors of this process have taken there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        print(f"peak GPU memory {peak:.0f} MiB")


def at_least_one(args, *flags):
    for flag in flags:
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")


def check_bits(args, *flags):
    for flag in flags:
        bits = getattr(args, flag)
        if bits is None or not 2 <= bits <= 8:
            raise InputError(f"--{flag.replace('_', '-')} {bits}: must be 2..8")


def model_name(args):
    """`fp`, or `wXaY` with its tag: the part of a file's name that says which model."""
    if getattr(args, "fp", False):
        return "fp"
    return f"w{args.wbits}a{args.abits}" + (f"_{args.tag}" if args.tag else "")


class World:
    """This process among those torchrun started: `rank` of `size`. Alone: 0 of 1.

    Rank 0 joins what all have made; it alone prints and shows a bar. If a process dies, the others
    stop: torchrun sends SIGTERM to those on its own node, the rest find out as they next meet.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self._meet(dist.init_process_group, "gloo", timeout=timedelta(days=7))  # the slowest unit
        if self.size > 1:
            atexit.register(dist.destroy_process_group)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def _meet(self, function, *args, **kwargs):
        """Call a function of torch.distributed; InputError if another process is gone."""
        try:
            if self.size > 1:
                function(*args, **kwargs)
        except RuntimeError as error:
            raise InputError("another process died; the same command again continues") from error

    def wait(self):
        """Until every process is here."""
        self._meet(dist.barrier)

    def agree(self, value):
        """Rank 0's value, in every process."""
        box = [value]
        self._meet(dist.broadcast_object_list, box)
        return box[0]

    def share(self, parts, names):
        """This process's share of those `names` whose part is missing, even when a run resumes."""
        return self.agree([x for x in names if not parts.has(x)])[self.rank :: self.size]

    def bar(self, items=None, **kwargs):
        """A progress bar that counts for all processes as rank 0 goes; their shares are equal."""
        scale = self.size > 1 and self.size
        return tqdm(items, disable=self.rank > 0, unit_scale=scale, **kwargs)


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path, write):
    """Call `write(file)` on a temporary file in the same folder, then rename it to `path`."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC or "write" in str(error)
        advice = "; free some disk space and run again" if full else ""
        raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}{advice}") from error


def load_state(path, what, allowed=()):
    """`torch.load` that runs no code: tensors and plain containers, and classes `allowed` only.

    Raises InputError if the file is missing, truncated, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file ({what})")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or hostile file
        kind = "holds pickled objects, refused" if "nsupported" in str(error) else "is damaged"
        raise InputError(f"{path} {kind} ({what}); make or download it again") from error


def git_commit():
    """The commit of this source tree, `+dirty` if files differ from it; for provenance only."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+dirty"]
    try:
        run = subprocess.run([*command, "--abbrev=12"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def header(kind, settings, inputs, device):
    """What every artifact says of itself. `inputs` maps a name to the sha256 it was made from."""
    return dict(
        kind=kind,
        format=FORMAT,
        settings=settings,
        inputs=inputs,
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        git=git_commit(),
    )


def load_artifact(path, kind, made_by):
    """An artifact of the given kind; InputError names both kinds and the command to run."""
    artifact = load_state(path, f"made by {made_by}")
    found = artifact.get("kind") if isinstance(artifact, dict) else None
    if found != kind:
        raise InputError(f"{path} is {found or 'no artifact'}, not {kind}: run {made_by} first")
    if not {"format", "settings", "inputs"} <= artifact.keys():
        raise InputError(f"{path} is damaged: parts are missing; run {made_by} again")
    if artifact["format"] != FORMAT:
        found = artifact["format"]
        raise InputError(f"{path} has format {found}, not {FORMAT}: run {made_by} again")
    return artifact


def save_artifact(path, artifact):
    """Write it, and return the sentence that says so."""
    write_atomic(path, lambda file: torch.save(artifact, file))
    size = os.path.getsize(path) / 2**20
    return f"wrote {path}, {size:.2f} MiB, sha256 {sha256_of(path)[:12]}"


def already_made(path, head, force):
    """True if `path` holds this very result. InputError if it holds another, unless `force`."""
    if force or not Path(path).exists():
        return False
    old = load_artifact(path, head["kind"], "this script with --force")
    return same_result(path, old, head)


def same_result(path, old, head):
    for part in ("settings", "inputs"):
        for key in old[part].keys() | head[part].keys():
            if old[part].get(key) != head[part].get(key):
                was, now = old[part].get(key), head[part].get(key)
                raise InputError(
                    f"{path} exists, made with {key} = {was}, not {now}; --force replaces it"
                )
    print(f"{path} is up to date")
    return True


class Parts:
    """Finished pieces of a long job, kept until the whole is written, so a killed run resumes.

    The folder's name carries a hash of the settings, and of `cut`, how the job is cut up: pieces
    of another run are never mixed in.
    """

    def __init__(self, path, head, cut=None):
        key = json.dumps([head["settings"], head["inputs"], cut], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.folder = Path(path).parent / f".{Path(path).name}.{digest}"

    def path(self, name):
        return self.folder / f"{name}.pt"

    def has(self, name):
        return self.path(name).exists()

    def save(self, name, payload):
        write_atomic(self.path(name), lambda file: torch.save(payload, file))

    def load(self, name):
        return load_state(self.path(name), "a kept part of this run; delete its folder")

    def remove(self, name):
        self.path(name).unlink(missing_ok=True)

    def clear(self, others_only=False):
        """Remove the pieces of the whole, now written, and those of runs given up before."""
        for folder in self.folder.parent.glob(f"{self.folder.stem}.*"):
            if not (others_only and folder == self.folder):
                shutil.rmtree(folder, ignore_errors=True)  # another process may be at it too


def download(url, name, sha256_prefix=""):
    """Fetch a public file into the cache ($XDG_CACHE_HOME/tq-dit), resuming a partial download."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tq-dit"
    target, partial = cache / name, cache / (name + ".part")
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / (name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process downloads, the others wait for it
        if target.exists():
            return target
        try:
            _download_to(partial, url, name)
        except OSError as error:
            raise InputError(f"cannot download {url}: {error}; run again to resume") from error
        if not sha256_of(partial).startswith(sha256_prefix):
            partial.unlink()
            raise InputError(f"{url}: wrong sha256, download discarded; run again")
        os.replace(partial, target)
    return target


def _download_to(partial, url, name):
    have = partial.stat().st_size - 1 if partial.exists() else 0  # one byte again: never none
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have > 0 else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if reply.status != 206:  # the whole file is coming
            have = 0
        total = have + int(reply.headers.get("Content-Length", 0))
        bar = tqdm(desc=name, initial=have, total=total or None, unit="B", unit_scale=True)
        with open(partial, "r+b" if have else "wb") as file, bar:
            file.seek(have)
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if total and bar.n < total:
            raise OSError(f"connection closed after {bar.n} of {total} bytes")


# ------------------------------------------------------------------------------------------------
# Loading a DiT

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{0}x{0}.pt"
HEADS = {spec["hidden_size"]: spec["num_heads"] for spec in DiT_models.values()}


def read_config(state, num_heads=None):
    """The DiT constructor's keywords, read off a checkpoint's shapes.

    Only the number of heads leaves no trace; known widths know theirs, others need `num_heads`.
    """
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        outputs = state["final_layer.linear.weight"].shape[0] // patch**2
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"not a DiT checkpoint: it has no usable {error}") from error
    heads = HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise InputError(f"width {width} is none of the known DiTs: give --num-heads")
    if heads < 1 or width % heads:
        raise InputError(f"--num-heads {heads} does not divide the width {width}")
    return dict(
        input_size=math.isqrt(tokens) * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        num_classes=classes,
        learn_sigma=outputs == 2 * channels,
    )


def build_dit(config, state, source):
    """A DiT in eval mode with these weights; InputError names the first thing that does not fit."""
    with torch.device("meta"):
        model = DiT(**config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{source} does not fit this DiT: {reason}") from error
    return model.float().eval().requires_grad_(False)


def load_dit(ckpt, num_heads=None):
    """(model, config) of a checkpoint, plain or with an `ema` entry as DiT's train.py saves it."""
    state = load_state(ckpt, "a DiT checkpoint", [argparse.Namespace])  # train.py saves one
    state = state.get("ema", state) if isinstance(state, dict) else state
    config = read_config(state, num_heads)
    return build_dit(config, state, ckpt), config


def check_labels(y, num_classes, what):
    """Labels must be 0..num_classes - 1; `num_classes` itself is the null label."""
    if y.numel() and (y.min() < 0 or y.max() >= num_classes):
        bad = y.min() if y.min() < 0 else y.max()
        raise InputError(f"{what}: label {int(bad)} is outside 0..{num_classes - 1}")


def load_calib(run):
    """RUN/calib.pt, checked: finite, timesteps and labels in range; and its own sha256."""
    path = Path(run) / "calib.pt"
    calib = load_artifact(path, "calib", "01_collect_calib.py") | dict(sha256=sha256_of(path))
    settings = calib["settings"]
    for part in ("calibration", "validation"):
        rows = calib.get(part, {})
        if not {"x", "x_0", "t", "y", "group"} <= rows.keys():
            raise InputError(f"{path} is damaged: parts are missing; run 01 --force")
        if not all(torch.isfinite(rows[key]).all() for key in ("x", "x_0")):
            raise InputError(f"{path}: NaN or infinity in its {part} rows; run 01 --force")
        check_labels(rows["y"], settings["config"]["num_classes"] + 1, f"{path} {part}")
        check_labels(rows["t"], settings["steps"], f"{path} {part} timesteps")
    return calib


def load_calibrated(calib):
    """The full-precision DiT that `calib` was collected from, and no other."""
    ckpt, want = calib["settings"]["ckpt"], calib["inputs"]["checkpoint"]
    if not Path(ckpt).is_file():
        raise InputError(f"{ckpt}: no such file, yet calib.pt was collected from it")
    if sha256_of(ckpt) != want:
        raise InputError(
            f"calib.pt was collected from a checkpoint with sha256 {want[:12]}; {ckpt} is now "
            f"{sha256_of(ckpt)[:12]}: run 01_collect_calib.py --force"
        )
    return load_dit(ckpt, calib["settings"]["config"]["num_heads"])[0]


# ------------------------------------------------------------------------------------------------
# Units: the pieces of the network that Phases 2 and 3 take one at a time


def units(model):
    """Name -> prefix of its parameters: the embedder, every block, and the final layer.

    Everything inside a unit follows from its inputs and the gradient at its outputs.
    """
    blocks = {f"block_{i:02d}": f"blocks.{i}." for i in range(len(model.blocks))}
    return {"embed": ""} | blocks | {"final": "final_layer."}


@contextmanager
def unit_on(model, name, device):
    """The unit as a function, on `device` meanwhile and on the host before and after.

    The embedder maps (x, t, y) to (tokens, c), every other unit (tokens, c) to (tokens,).
    """
    prefix = units(model)[name]
    module = model.get_submodule(prefix.rstrip(".")) if prefix else None
    parts = [module] if prefix else [model.x_embedder, model.t_embedder, model.y_embedder]
    for part in parts:
        part.to(device)
    model.pos_embed.data = model.pos_embed.data.to(device)
    try:
        yield (lambda x, c: (module(x, c),)) if prefix else model.embed
    finally:
        model.pos_embed.data = model.pos_embed.data.cpu()
        for part in parts:
            part.cpu()


def in_batches(function, columns, args):
    """function(*batch) over batches of the rows of these columns, each on the device for its own
    time; what it returns, a list of tensors, joined on the host."""
    batches = zip(*(column.split(args.batch_size) for column in columns), strict=True)
    results = ([x.cpu() for x in function(*(x.to(args.device) for x in b))] for b in batches)
    return [torch.cat(column) for column in zip(*results, strict=True)]


@torch.no_grad()
def next_inputs(model, name, inputs, args):
    """The inputs (tokens, c) of the unit that follows this one."""
    with unit_on(model, name, args.device) as function:
        outputs = in_batches(function, inputs, args)
    return outputs if name == "embed" else [*outputs, inputs[1]]


def on_device(chunks, device):
    """Chunks, lists of tensors, in turn on the device. On CUDA the next one is copied while one is
    worked on, into the other of two buffers: a chunk holds until the next is asked for."""
    if device.type != "cuda":
        yield from chunks
        return
    buffers = [[torch.empty_like(x, device=device) for x in chunks[0]] for _ in range(2)]
    work, copies = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def fetch(i):
        copies.wait_stream(work)  # chunk i - 2, which had this buffer, is done with
        here = [buffer[: len(x)] for buffer, x in zip(buffers[i % 2], chunks[i], strict=True)]
        with torch.cuda.stream(copies):
            for x, source in zip(here, chunks[i], strict=True):
                x.copy_(source, non_blocking=True)
        return here

    following = fetch(0)
    for i in range(len(chunks)):
        here = following
        work.wait_stream(copies)
        following = fetch(i + 1) if i + 1 < len(chunks) else None
        yield here


@contextmanager
def streamed(model, device):
    """On CUDA every unit comes to the device for its own forward pass and leaves it again."""
    own = [model.x_embedder, model.t_embedder, model.y_embedder, *model.blocks, model.final_layer]
    hosts, handles = {}, []

    def arrive(module, _):
        for tensor in (*module.parameters(), *module.buffers()):
            hosts[tensor], tensor.data = tensor.data, tensor.data.to(device)

    def leave(module, *_):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = hosts.pop(tensor)

    if device.type == "cuda":
        handles = [part.register_forward_pre_hook(arrive) for part in own]
        handles += [part.register_forward_hook(leave) for part in own]
    rest = [x for x in (model.pos_embed, model.group_table) if x is not None]
    for tensor in rest:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor in rest:
            tensor.data = tensor.data.cpu()


def explicit_products(model):
    """Let every attention compute its two products with `qk` and `av`, which hooks can see."""
    for block in model.blocks:
        block.attn.fused = False
    return model
