"""DiT and its sampler against formulas written out here a second time."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import LIVELY, lively_dit

import models_dit as m


def naive_dit(w, x, t, y, patch, heads):
    """DiT's forward pass from a state dict alone, sample by sample and head by head."""
    grid, width = x.shape[-1] // patch, w["pos_embed"].shape[-1]
    outputs = []
    for image, step, label in zip(x, t.tolist(), y.tolist(), strict=True):
        angles = torch.tensor([step * 10000 ** (-i / 128) for i in range(128)])
        h = torch.cat([angles.cos(), angles.sin()])
        h = F.silu(w["t_embedder.mlp.0.weight"] @ h + w["t_embedder.mlp.0.bias"])
        c = w["t_embedder.mlp.2.weight"] @ h + w["t_embedder.mlp.2.bias"]
        c = F.silu(c + w["y_embedder.embedding_table.weight"][label])
        tokens = [
            (w["x_embedder.proj.weight"] * image[:, r : r + patch, s : s + patch]).sum((1, 2, 3))
            for r in range(0, grid * patch, patch)
            for s in range(0, grid * patch, patch)
        ]
        tokens = torch.stack(tokens) + w["x_embedder.proj.bias"] + w["pos_embed"][0]

        def normed(v, shift, scale):
            v = (v - v.mean(1, keepdim=True)) / (v.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            return v * (1 + scale) + shift

        def linear(v, name):
            return v @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        for i in range(LIVELY["depth"]):
            name = f"blocks.{i}"
            mod = linear(c, f"{name}.adaLN_modulation.1").view(6, width)
            q, k, v = linear(normed(tokens, mod[0], mod[1]), f"{name}.attn.qkv").split(width, 1)
            size, mixed = width // heads, []
            for a in range(heads):
                part = slice(a * size, (a + 1) * size)
                scores = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
                mixed.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
            tokens = tokens + mod[2] * linear(torch.cat(mixed, 1), f"{name}.attn.proj")
            h = linear(normed(tokens, mod[3], mod[4]), f"{name}.mlp.fc1")
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            tokens = tokens + mod[5] * linear(h, f"{name}.mlp.fc2")
        shift, scale = linear(c, "final_layer.adaLN_modulation.1").split(width)
        out = linear(normed(tokens, shift, scale), "final_layer.linear")
        channels = out.shape[1] // patch**2
        picture = torch.empty(channels, grid * patch, grid * patch)
        for n, token in enumerate(out):
            r, s = divmod(n, grid)
            cell = token.view(patch, patch, channels).permute(2, 0, 1)
            picture[:, r * patch : (r + 1) * patch, s * patch : (s + 1) * patch] = cell
        outputs.append(picture)
    return torch.stack(outputs)


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_forward_equals_the_formulas(fused):
    """Every stage of DiT, with the fused attention and with the explicit products."""
    model = lively_dit()
    for block in model.blocks:
        block.attn.fused = fused
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    expected = naive_dit(model.state_dict(), x, t, y, patch=2, heads=3)
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-4)


def test_pos_embed_is_the_2d_sine_cosine_table():
    """First half of the width encodes the column, second half the row; sines, then cosines."""
    table = m.sincos_pos_embed(8, 3)[0]
    for n in range(9):
        row, column = divmod(n, 3)
        expected = [f(p / 10000 ** (i / 2)) for p in (column, row) for f in (math.sin, math.cos)
                    for i in range(2)]  # fmt: skip
        torch.testing.assert_close(table[n], torch.tensor(expected))


@torch.no_grad()
def test_cfg_guides_the_first_three_channels_of_eps():
    """Guided: uncond + scale (cond - uncond); channel 4 and the variance are left as they are."""
    model = lively_dit()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([7, 9]), torch.tensor([1, 2])
    null = torch.full_like(y, 5)
    pair = torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])
    out = model.forward_with_cfg(*pair, 1.5)
    cond, uncond = model(x, t, y), model(x, t, null)
    guided = uncond + 1.5 * (cond - uncond)
    torch.testing.assert_close(out[:2, :3], guided[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:2, 3:], cond[:, 3:], rtol=1e-4, atol=1e-5)
    every = model.forward_with_cfg(*pair, 1.5, cfg_channels=4)
    torch.testing.assert_close(every[:2, :4], guided[:, :4], rtol=1e-4, atol=1e-5)


def test_registry_holds_the_published_sizes():
    """DiT-XL/2 has 675,129,632 parameters, and twelve official names are there."""
    with torch.device("meta"):
        model = m.DiT(**m.DiT_models["DiT-XL/2"])
    assert sum(p.numel() for p in model.parameters()) == 675_129_632
    official = {f"DiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    assert official <= set(m.DiT_models)


# ------------------------------------------------------------------------------------------------
# Sampler


@pytest.mark.parametrize("T, head", [(250, [0, 4, 8, 12]), (100, [0, 10, 20, 30]), (1, [0])])
def test_respacing_spreads_the_timesteps(T, head):
    """T timesteps of 0..999, both ends included."""
    timesteps = m.respaced_timesteps(T)
    assert len(set(timesteps)) == T and timesteps[:4] == head
    assert timesteps[-1] == (999 if T > 1 else 0)


@pytest.mark.parametrize("T", [0, 1001])
def test_respacing_refuses_other_numbers_of_timesteps(T):
    """T is 1..1000, the timesteps that the network was trained on."""
    with pytest.raises(ValueError, match=str(T)):
        m.respaced_timesteps(T)


def schedule(T, t):
    """beta_t, abar_t and abar_(t-1) of the linear schedule respaced to T, in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)[m.respaced_timesteps(T)]
    before = abar[t - 1] if t else torch.ones(()).double()
    return 1 - abar[t] / before, abar[t], before


@pytest.mark.parametrize("t", [0, 1, 6, 9])
def test_posterior_mean_of_the_predicted_x0_is_mu_of_eq_3(t):
    """Eq. (3): mu = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t), of eps itself."""
    diffusion, at = m.Diffusion(10), torch.tensor([t])
    x_t, eps = torch.randn(2, 1, 2, 3, 3)
    beta, abar, _ = schedule(10, t)
    mu = (x_t.double() - beta / (1 - abar).sqrt() * eps.double()) / (1 - beta).sqrt()
    found = diffusion.posterior_mean(diffusion.predict_x0(x_t, at, eps), x_t, at)
    torch.testing.assert_close(found, mu.float(), rtol=1e-4, atol=1e-4)


def test_p_sample_equals_the_formulas():
    """Eq. (2)-(4): mu of Eq. (3), and a variance between posterior (-1) and beta (+1)."""
    diffusion, t = m.Diffusion(10), 6
    beta, abar, before = schedule(10, t)
    x, eps, v, noise = torch.randn(4, 1, 2, 3, 3)
    mu = (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    posterior = beta * (1 - before) / (1 - abar)
    log_var = (v + 1) / 2 * beta.log() + (1 - v) / 2 * posterior.log()
    expected = mu + (0.5 * log_var).exp() * noise
    found = diffusion.p_sample(torch.cat([eps, v], dim=1), x, torch.tensor([t]), noise)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    sensitivity = (beta / ((1 - beta) * (1 - abar)).sqrt()) ** 2
    assert diffusion.sensitivity()[t].item() == pytest.approx(sensitivity.item(), rel=1e-4)


def test_implied_eps_inverts_q_sample():
    """D2: the noise that took x_0 to x_t comes back."""
    diffusion, t = m.Diffusion(50), torch.tensor([1, 20, 49])
    x_0, eps = torch.randn(2, 3, 1, 4, 4)
    found = diffusion.implied_eps(diffusion.q_sample(x_0, t, eps), x_0, t)
    torch.testing.assert_close(found, eps, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_last_step_adds_no_noise():
    """At t = 0 the sample is the mean whatever the noise."""
    diffusion, x, out = m.Diffusion(5), torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3)
    t = torch.tensor([0])
    first, second = (diffusion.p_sample(out, x, t, torch.randn(1, 2, 3, 3)) for _ in range(2))
    assert torch.equal(first, second)


def test_noise_of_an_image_depends_on_its_seed_and_index_only():
    """Exactly: the noise of images 3..5 is the same alone and among others, step after step;
    another seed, index or stream draws another."""
    alone, among = m.image_generators(7, range(3, 6)), m.image_generators(7, range(64))
    for _ in range(3):
        noise = m.draw_noise(among, (3, 8, 8), "cpu")
        assert torch.equal(m.draw_noise(alone, (3, 8, 8), "cpu"), noise[3:6])
        assert len(noise.flatten(1).unique(dim=0)) == 64
    first = [m.image_generators(*key)[0] for key in ((7, [3]), (8, [3]), (7, [4]), (7, [3], 1))]
    assert len(m.draw_noise(first, (3,), "cpu").unique(dim=0)) == 4


@pytest.mark.parametrize("t", [1, 2, 9])
def test_variance_is_beta_where_none_is_learned(t):
    """Of a network without `learn_sigma`: the larger of its two ends."""
    out, x = torch.randn(2, 1, 2, 3, 3)
    _, log_var = m.Diffusion(10).p_mean_log_var(out, x, torch.tensor([t]))
    assert log_var.item() == pytest.approx(schedule(10, t)[0].log().item(), rel=1e-5)
