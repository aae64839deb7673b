"""DiT, its registry and its DDPM sampler: the model that is quantized, and nothing else.

The network is the diffusion transformer of Peebles and Xie (arXiv 2212.09748), with the parameter
names and constructor keywords of the public checkpoints, so those load with `strict=True`. Two
things differ inside, neither changes what is computed: the attention products are child modules
`qk` and `av`, so quantizing swaps children and patches no `forward`; and `DiT.forward` looks up
each sample's time group (Eq. 9) once and hands it down as an argument. Imports torch and numpy
alone: copy it into a project of your own.

Shapes: N samples, C channels, S tokens, D width, H heads, T timesteps.

    Eq. (1), closed form   Diffusion.q_sample          Eq. (3)   Diffusion.posterior_mean
    Eq. (2)                Diffusion.p_mean_log_var    Eq. (4)   Diffusion.p_sample
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

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


def explicit_products(model):
    """The model, each attention now with its two products as `qk` and `av`, which hooks can see."""
    for block in model.blocks:
        block.attn.fused = False
    return model


# ------------------------------------------------------------------------------------------------
# The layers of a DiT that multiply, and what their inputs come out of


class LayerSpec(NamedTuple):
    """A layer of the embedder, of every block or of the final layer; `name` within that unit."""

    unit: str  # "embed", "block" or "final"
    name: str
    post_softmax: bool = False  # its first input comes out of a softmax
    post_gelu: bool = False
    reads_image: bool = False  # its input is x_t itself
    conditioning: bool = False  # it works on t and y, (N, D), not on tokens; knows no time group


LAYERS = (
    LayerSpec("embed", "x_embedder.proj", reads_image=True),  # the convolution
    LayerSpec("block", "attn.qkv"),
    LayerSpec("block", "attn.qk"),  # q k^T, a product of two activations
    LayerSpec("block", "attn.av", post_softmax=True),  # softmax(q k^T) v
    LayerSpec("block", "attn.proj"),
    LayerSpec("block", "mlp.fc1"),
    LayerSpec("block", "mlp.fc2", post_gelu=True),
    LayerSpec("final", "linear"),
    LayerSpec("embed", "t_embedder.mlp.0", conditioning=True),
    LayerSpec("embed", "t_embedder.mlp.2", conditioning=True),
    LayerSpec("block", "adaLN_modulation.1", conditioning=True),
    LayerSpec("final", "adaLN_modulation.1", conditioning=True),
)

# ------------------------------------------------------------------------------------------------
# The published sizes, and the demo's


WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DiT_models = {
    f"DiT-{size}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for size, (width, depth, heads) in WIDTHS.items()
    for patch in (2, 4, 8)
}
DiT_models["DiT-Demo/4"] = dict(hidden_size=128, depth=6, num_heads=4, patch_size=4) | dict(
    input_size=28, in_channels=1, num_classes=10
)

# ------------------------------------------------------------------------------------------------
# DDPM: linear schedule, learned range, respaced to any T

TRAIN_TIMESTEPS = 1000


def respaced_timesteps(num_timesteps):
    """The T of 0..999 that sampling visits, evenly spread, with both ends (T = 1: with 0);
    ValueError if T is not 1..1000."""
    if not 1 <= num_timesteps <= TRAIN_TIMESTEPS:
        raise ValueError(f"T = {num_timesteps} timesteps: must be 1..{TRAIN_TIMESTEPS}")
    stride = (TRAIN_TIMESTEPS - 1) / (num_timesteps - 1) if num_timesteps > 1 else 1
    position, timesteps = 0.0, []
    for _ in range(num_timesteps):  # accumulated, not multiplied: rounds as the public code does
        timesteps.append(round(position))
        position += stride
    return timesteps


class Diffusion:
    """The sampler's tables for T timesteps; index t in 0..T-1 is the paper's timestep.

    `timestep_map[t]` is what the network is told. All tables are (T,) float32 on `device`,
    computed in float64.
    """

    def __init__(self, num_timesteps, device="cpu"):
        self.num_timesteps = num_timesteps
        timesteps = respaced_timesteps(num_timesteps)
        train_betas = np.linspace(1e-4, 0.02, TRAIN_TIMESTEPS, dtype=np.float64)
        abar = np.cumprod(1 - train_betas)[timesteps]
        abar_prev = np.append(1.0, abar[:-1])
        betas = 1 - abar / abar_prev
        posterior = betas * (1 - abar_prev) / (1 - abar)
        clipped = np.append(posterior[1] if num_timesteps > 1 else betas[0], posterior[1:])
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
        """Mean of q(x_{t-1} | x_t, x_0), (N, C, H, W); with the predicted x_0, mu_theta."""
        # Eq. (3): x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) put in here gives x_t the factor
        # (beta + alpha (1 - abar_prev)) / (sqrt(alpha) (1 - abar)) = 1 / sqrt(alpha), and eps
        # the factor -beta / (sqrt(alpha) sqrt(1 - abar)), for alpha abar_prev = abar
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
    for t in reversed(range(diffusion.num_timesteps)):
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
