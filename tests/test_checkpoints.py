"""Checkpoints of DiT in and out of common/checkpoints.py, and downloads that break off."""

import argparse
import http.server
import threading

import pytest
import torch
from conftest import LIVELY, lively_dit

from common import checkpoints as c
from common.errors import InputError
from common.weight_files import load_weights


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, dict(in_channels=1, learn_sigma=False), dict(mlp_ratio=61 / 24)]
)
def test_load_dit_reads_the_shape_off_the_checkpoint(tmp_path, changes):
    """Plain state dict: width, depth, patch, channels, classes and input size need no flag."""
    model = lively_dit(**changes)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded, config = c.load_dit(tmp_path / "a.pt", num_heads=3)
    assert config == LIVELY | dict(mlp_ratio=4.0, learn_sigma=True) | changes
    x = torch.randn(2, config["in_channels"], 8, 8)
    t = y = torch.tensor([1, 2])
    assert torch.equal(loaded(x, t, y), model(x, t, y))


def test_load_dit_takes_the_ema_of_a_training_checkpoint(tmp_path):
    """As DiT's train.py saves it, with an argparse.Namespace inside."""
    model = lively_dit()
    other = {k: v + 1 for k, v in model.state_dict().items()}
    saved = dict(model=other, ema=model.state_dict(), opt={}, args=argparse.Namespace(lr=1))
    torch.save(saved, tmp_path / "a.pt")
    loaded, _ = c.load_dit(tmp_path / "a.pt", num_heads=3)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_load_dit_asks_for_heads_and_names_what_does_not_fit(tmp_path):
    """An unknown width needs --num-heads; a missing or odd tensor is named."""
    state = lively_dit().state_dict()
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match="--num-heads"):
        c.load_dit(tmp_path / "a.pt")
    del state["blocks.1.attn.proj.bias"]
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(InputError, match="blocks.1.attn.proj.bias"):
        c.load_dit(tmp_path / "b.pt", num_heads=3)


def test_official_widths_know_their_heads():
    """XL 16, L 16, B 12, S 6."""
    assert [c.HEADS[w] for w in (1152, 1024, 768, 384)] == [16, 16, 12, 6]


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
    with pytest.raises(InputError, match="resume"):
        c.download(url, "weights.pt")
    path = c.download(url, "weights.pt")
    assert path.read_bytes() == Ranges.CONTENT and Ranges.asked == [0, 4999]
    with pytest.raises(InputError, match="sha256"):
        c.download(url, "other.pt", sha256_prefix="00")
    threads = [threading.Thread(target=c.download, args=(url, "third.pt")) for _ in range(3)]
    for do in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            do(thread)
    assert (path.parent / "third.pt").read_bytes() == Ranges.CONTENT and len(Ranges.asked) == 4
    server.shutdown()


@pytest.mark.parametrize("key, value", [
    ("TQ_DIT_MIRROR", "host/dit"), ("TQ_DIT_MIRROR", "http://localhost:80a"),
    ("XDG_CACHE_HOME", "/proc/none"),
])  # fmt: skip
def test_what_keeps_a_download_from_coming_is_told(key, value, tmp_path, monkeypatch):
    """An address that is none, a cache that cannot be made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match="cannot download"):
        c.download("http://localhost/weights", "weights.pt")


class Whole(http.server.BaseHTTPRequestHandler):
    """Sends all of it whatever part was asked for, or, under /end, says that there is no more."""

    def do_GET(self):
        self.send_response(416 if self.path == "/end" else 200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 100)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Its address."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Whole)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_download_begins_again_where_a_part_is_of_no_use(server, tmp_path, monkeypatch):
    """The server sends the whole; another file came; the part is longer than the whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    part = tmp_path / "tq-dit" / "w.pt.part"
    part.parent.mkdir()
    for address, prefix, fault in (("w", "00", "wrong sha256"), ("end", "", "run again")):
        part.write_bytes(b"y" * 40)
        with pytest.raises(InputError, match=fault):
            c.download(f"{server}/{address}", "w.pt", sha256_prefix=prefix)
        assert not part.exists()
    part.write_bytes(b"y" * 40)
    assert c.download(f"{server}/w", "w.pt").read_bytes() == b"x" * 100


def test_a_cache_that_cannot_be_is_told(monkeypatch):
    """Its name is too long for the system."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/" + "x" * 300)
    with pytest.raises(InputError, match="too long"):
        c.download("http://127.0.0.1:1/w", "w.pt")


def test_dit_of_the_image_size_is_downloaded(monkeypatch):
    """Of XL/2 alone there are weights; a --ckpt without a name is no reason to fetch them."""
    monkeypatch.setattr(c, "download", lambda url, name: f"{url} {name}")
    for size in (256, 512):
        name = f"DiT-XL-2-{size}x{size}.pt"
        assert c.find_checkpoint(None, None, size).endswith(f"/{name} {name}")
    with pytest.raises(InputError, match="DiT-S/2 has no public weights"):
        c.find_checkpoint(None, "DiT-S/2", 256)
    with pytest.raises(InputError, match="--ckpt names no file"):
        c.find_checkpoint("", None, 256)


def test_a_folder_s_weights_are_taken_in_this_order(tmp_path):
    """transformer/ first, safetensors before .bin, full precision before half."""
    endings = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")
    names = [f"{x}diffusion_pytorch_model{end}" for x in ("transformer/", "") for end in endings]
    (tmp_path / "transformer").mkdir()
    for name in reversed(names):
        (tmp_path / name).touch()
        assert c.find_checkpoint(tmp_path, None, 256) == str(tmp_path / name)


@pytest.mark.parametrize("wrapper", ["ema", "state_dict"])
def test_weights_are_unwrapped(tmp_path, wrapper):
    torch.save({wrapper: {"a": torch.ones(2)}, "step": 1}, tmp_path / "a.ckpt")
    assert load_weights(tmp_path / "a.ckpt", "weights").keys() == {"a"}
