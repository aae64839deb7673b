"""DiT, its sampler and loading, against formulas written out here a second time."""

import argparse
import http.server
import math
import threading

import pytest
import torch
import torch.nn.functional as F

import models_dit as m

TINY = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=3, num_classes=5
)


def lively(**changes):
    """A tiny DiT with random weights everywhere, so that no gate is zero."""
    torch.manual_seed(0)
    model = m.DiT(**TINY | changes).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.normal_(std=0.2)
    return model


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

        for i in range(TINY["depth"]):
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
    model = lively()
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
    model = lively()
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


@pytest.mark.parametrize("steps, head", [(250, [0, 4, 8, 12]), (100, [0, 10, 20, 30]), (1, [0])])
def test_respacing_spreads_the_steps(steps, head):
    """T timesteps of 0..999, both ends included."""
    timesteps = m.respaced_timesteps(steps)
    assert len(set(timesteps)) == steps and timesteps[:4] == head
    assert timesteps[-1] == (999 if steps > 1 else 0)


def test_p_sample_equals_the_formulas():
    """Eq. (2)-(4): mu of Eq. (3), and a variance between posterior (-1) and beta (+1)."""
    steps, t = 10, 6
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, 0)[m.respaced_timesteps(steps)]
    beta = 1 - abar[t] / abar[t - 1]
    x, eps, v, noise = torch.randn(4, 1, 2, 3, 3)
    out = torch.cat([eps, v], dim=1)
    mu = (x - beta / (1 - abar[t]).sqrt() * eps) / (1 - beta).sqrt()
    posterior = beta * (1 - abar[t - 1]) / (1 - abar[t])
    log_var = (v + 1) / 2 * beta.log() + (1 - v) / 2 * posterior.log()
    expected = mu + (0.5 * log_var).exp() * noise
    found = m.Diffusion(steps).p_sample(out, x, torch.tensor([t]), noise)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    sensitivity = (beta / ((1 - beta) * (1 - abar[t])).sqrt()) ** 2
    assert m.Diffusion(steps).sensitivity()[t].item() == pytest.approx(sensitivity.item(), rel=1e-4)


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


def test_image_noise_is_keyed_by_seed_and_index():
    """Image i draws the same noise in any batch; another seed, index or stream draws another."""
    together = m.draw_noise(m.image_generators(3, range(5)), (2, 2), "cpu")
    alone = m.draw_noise(m.image_generators(3, [4]), (2, 2), "cpu")
    assert torch.equal(together[4], alone[0]) and not torch.equal(together[3], alone[0])
    others = [m.image_generators(4, [4]), m.image_generators(3, [4], stream=1)]
    assert not any(torch.equal(m.draw_noise(g, (2, 2), "cpu"), alone) for g in others)


# ------------------------------------------------------------------------------------------------
# Loading


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, dict(in_channels=1, learn_sigma=False), dict(mlp_ratio=61 / 24)]
)
def test_load_dit_reads_the_shape_off_the_checkpoint(tmp_path, changes):
    """Plain state dict: width, depth, patch, channels, classes and input size need no flag."""
    model = lively(**changes)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded, config = m.load_dit(tmp_path / "a.pt", num_heads=3)
    assert config == TINY | dict(mlp_ratio=4.0, learn_sigma=True) | changes
    x = torch.randn(2, config["in_channels"], 8, 8)
    t = y = torch.tensor([1, 2])
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_load_dit_takes_the_ema_of_a_training_checkpoint(tmp_path):
    """As DiT's train.py saves it, with an argparse.Namespace inside."""
    model = lively()
    other = {k: v + 1 for k, v in model.state_dict().items()}
    saved = dict(model=other, ema=model.state_dict(), opt={}, args=argparse.Namespace(lr=1))
    torch.save(saved, tmp_path / "a.pt")
    loaded, _ = m.load_dit(tmp_path / "a.pt", num_heads=3)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_load_dit_asks_for_heads_and_names_what_does_not_fit(tmp_path):
    """An unknown width needs --num-heads; a missing or odd tensor is named."""
    state = lively().state_dict()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(m.InputError, match="--num-heads"):
        m.load_dit(tmp_path / "a.pt")
    del state["blocks.1.attn.proj.bias"]
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(m.InputError, match="blocks.1.attn.proj.bias"):
        m.load_dit(tmp_path / "b.pt", num_heads=3)


def test_official_widths_know_their_heads():
    """XL 16, L 16, B 12, S 6."""
    assert [m.HEADS[w] for w in (1152, 1024, 768, 384)] == [16, 16, 12, 6]


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, honours Range, and cuts the first reply short."""

    CONTENT = bytes(range(256)) * 40
    cut, asked = True, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].rstrip("-"))
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.CONTENT) - start))
        self.end_headers()
        self.wfile.write(self.CONTENT[start:5000] if self.cut else self.CONTENT[start:])
        type(self).cut = False

    def log_message(self, *args):
        pass


def test_download_resumes_where_it_broke_off(tmp_path, monkeypatch):
    """A cut connection keeps what came, the next call asks for the rest; of several, one loads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = http.server.HTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/weights"
    with pytest.raises(m.InputError, match="resume"):
        m.download(url, "weights.pt")
    path = m.download(url, "weights.pt")
    assert path.read_bytes() == Ranges.CONTENT and Ranges.asked == [0, 4999]
    with pytest.raises(m.InputError, match="sha256"):
        m.download(url, "other.pt", sha256_prefix="00")
    threads = [threading.Thread(target=m.download, args=(url, "third.pt")) for _ in range(3)]
    for do in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            do(thread)
    assert (path.parent / "third.pt").read_bytes() == Ranges.CONTENT and len(Ranges.asked) == 4
    server.shutdown()
