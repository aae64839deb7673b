"""The SD-VAE decoder against formulas written out here, on a tiny decoder with random weights."""

import pytest
import torch
import torch.nn.functional as F

from common import vae
from common.errors import InputError
from common.images import to_uint8
from common.vae import VAE_SCALE, PixelAttention, ResnetBlock, VAEDecoder, convert_vae

TINY = dict(widths=(32, 64), layers=2)
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return scramble(VAEDecoder(**TINY))


def scramble(module):
    """Every parameter random, so that none sits at a value (0 or 1) that hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def as_published(state, conv_weights):
    """`state` under the attention names of the older public files, with an encoder beside it."""
    old = {"encoder.conv_in.weight": torch.zeros(1), "quant_conv.bias": torch.zeros(8)}
    for name, tensor in state.items():
        for new_part, old_part in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new_part}.", f"attentions.0.{old_part}.")
        conv = conv_weights and ".attentions." in name and tensor.ndim == 2
        old[name] = tensor[:, :, None, None] if conv else tensor
    return old


def norm(x, group_norm):
    """Group norm written out: 32 groups, biased variance, eps 1e-6."""
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weight, bias = group_norm.weight[:, None, None], group_norm.bias[:, None, None]
    return scaled.reshape(x.shape) * weight + bias


@pytest.mark.parametrize("conv_weights", [False, True])
def test_convert_vae_accepts_both_namings(decoder, conv_weights):
    """Old names, new names, and 1x1-conv weights load strictly and decode to the same image."""
    z, state = torch.randn(2, 4, 3, 3), decoder.state_dict()
    published = as_published(state, conv_weights)
    assert any(".query." in name for name in published)
    for source in (published, {**state, "encoder.conv_in.bias": torch.zeros(1)}):
        loaded = VAEDecoder(**TINY)
        loaded.load_state_dict(convert_vae(source), strict=True)
        assert torch.equal(loaded(z), decoder(z))


def test_convert_vae_keeps_unknown_keys_so_strict_loading_raises(decoder):
    """A file of another architecture is refused, not half loaded."""
    state = {**decoder.state_dict(), "decoder.extra.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="decoder.extra.weight"):
        VAEDecoder(**TINY).load_state_dict(convert_vae(state), strict=True)


def test_full_decoder_has_the_published_shape():
    """140 tensors, 49,490,199 parameters; three doublings take (h, w) to (8h, 8w)."""
    with torch.device("meta"):
        full = VAEDecoder()
        assert full(torch.empty(2, 4, 4, 5)).shape == (2, 3, 32, 40)
    assert sum(p.numel() for p in full.parameters()) == 49_490_199
    assert len(full.state_dict()) == 140


def test_attention_is_softmax_over_all_positions():
    """Attention equals softmax(q k^T / sqrt(C)) v over the h * w positions, plus its input."""
    torch.manual_seed(0)
    attention, x = scramble(PixelAttention(32)), torch.randn(2, 32, 3, 4)
    tokens = norm(x, attention.group_norm).reshape(2, 32, 12).mT
    parts = (attention.to_q, attention.to_k, attention.to_v)
    q, k, v = (tokens @ part.weight.T + part.bias for part in parts)
    scores = torch.exp(q @ k.mT / 32**0.5)
    mixed = scores / scores.sum(-1, keepdim=True) @ v
    out = mixed @ attention.to_out[0].weight.T + attention.to_out[0].bias
    assert torch.allclose(attention(x), x + out.mT.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("width_out", [32, 64])
def test_resnet_block_equals_its_formula(width_out):
    """conv2(silu(norm2(conv1(silu(norm1 x))))) + shortcut, which is 1x1 where widths differ."""
    torch.manual_seed(0)
    block, x = scramble(ResnetBlock(32, width_out)), torch.randn(2, 32, 5, 4)
    h = norm(x, block.norm1)
    h = F.conv2d(h * h.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1)
    h = norm(h, block.norm2)
    h = F.conv2d(h * h.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = x
    if width_out != 32:
        mix, bias = block.conv_shortcut.weight[:, :, 0, 0], block.conv_shortcut.bias
        shortcut = torch.einsum("oi,nihw->nohw", mix, x) + bias[:, None, None]
    assert torch.allclose(block(x), shortcut + h, atol=1e-4)


def test_latents_are_divided_by_their_scale_before_they_are_decoded():
    """Six of them, more than are decoded at a time, by a decoder that changes nothing."""
    z, seen = torch.linspace(-1.4, 1.4, 6 * 3 * 2 * 5).view(6, 3, 2, 5), []
    images = to_uint8(VAE_SCALE * z, lambda x: seen.append(x) or x)
    torch.testing.assert_close(torch.cat(seen), z)
    assert torch.equal(images, to_uint8(torch.cat(seen), None))


def test_the_autoencoder_that_was_asked_for_is_downloaded(monkeypatch):
    """Each from its own address, under a name of its own."""
    asked = []
    monkeypatch.setattr(vae, "download", lambda *how: asked.append(how) or "none.bin")
    for kind in ("mse", "ema"):
        with pytest.raises(InputError, match="no such file"):
            vae.load_vae(kind)
        assert f"sd-vae-ft-{kind}/" in asked[-1][0] and asked[-1][1] == f"sd-vae-ft-{kind}.bin"


def test_pixels_need_no_autoencoder(tmp_path):
    assert vae.local_vae("none", None) == {} == vae.local_vae("mse", None)
    with pytest.raises(InputError, match="samples are pixels"):
        vae.local_vae("none", tmp_path)
