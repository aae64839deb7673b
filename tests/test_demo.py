"""demo/train_demo.py: the losses it is trained with, and that a killed training resumes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, load_script

train = load_script("demo/train_demo")


def test_normal_kl_equals_torch_distributions():
    """KL of two Gaussians, elementwise, in nats."""
    m1, v1, m2, v2 = torch.randn(4, 50)
    p = torch.distributions.Normal(m1, (0.5 * v1).exp())
    q = torch.distributions.Normal(m2, (0.5 * v2).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(train.normal_kl(m1, v1, m2, v2), expected, rtol=1e-4, atol=1e-5)


def test_pixel_nll_sums_to_one_over_all_pixel_values():
    """The 256 probabilities of a pixel are a distribution."""
    x = torch.arange(256) / 127.5 - 1
    for mean, log_var in ((0.1, -2.0), (-0.99, -4.0), (2.0, 0.0)):
        nll = train.pixel_nll(x, torch.full_like(x, mean), torch.full_like(x, log_var))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-4)


def run_training(out, data, kill_after=None):
    """Train a few steps; `kill_after` a number of renamed files, as SIGKILL would."""
    code = "import os, runpy, signal, sys\n"
    if kill_after is not None:
        code += (
            f"real, left = os.rename, [{kill_after}]\n"
            "import pathlib\n"
            "def replace(self, target):\n"
            "    os.kill(os.getpid(), signal.SIGKILL) if not left[0] else real(self, target)\n"
            "    left[0] -= 1\n"
            "pathlib.Path.replace = replace\n"
        )
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    flags = "--steps 5 --batch-size 4 --save-every 2 --epochs 1 --samples 2".split()
    command = [sys.executable, "-c", code, str(ROOT / "demo" / "train_demo.py"), *flags]
    command += ["--data", str(data), "--out", str(out), "--device", "cpu"]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_killed_training_resumes_and_ends_with_the_same_bytes(tmp_path):
    """Weights, feature network and statistics equal those of a run that nothing disturbed."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 520), ("test", 20)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_training(whole, tmp_path / "mnist.npz").returncode == 0
    assert run_training(killed, tmp_path / "mnist.npz", kill_after=1).returncode == -9
    assert not (killed / "dit_mnist.pt").exists()
    log = run_training(killed, tmp_path / "mnist.npz")
    assert log.returncode == 0, log.stderr
    for name in ("dit_mnist.pt", "features_mnist.pt", "reference_mnist.npz"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
