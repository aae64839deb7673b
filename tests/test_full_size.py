"""benchmarks/full_size.py: its files are what the public ones are, its commands are accepted."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script

from common import checkpoints
from common.checkpoints import MIRROR, download
from common.score_files import read_reference
from common.vae import VAEDecoder, convert_vae

sys.path.insert(0, str(ROOT / "benchmarks"))
import full_size  # noqa: E402


def test_autoencoder_is_the_public_one():
    """Names of the public file, attention's old ones; all of its 83,653,863 parameters; a decoder
    that loads strictly."""
    with torch.device("meta"):
        state, decoder = full_size.autoencoder(), VAEDecoder()
        assert sum(x.numel() for x in state.values()) == 83_653_863
        decoder.load_state_dict(convert_vae(state), assign=True)
    for name in (
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down_blocks.2.downsamplers.0.conv.bias",
        "encoder.mid_block.attentions.0.proj_attn.weight",
        "decoder.mid_block.attentions.0.query.bias",
        "quant_conv.weight",
    ):
        assert name in state


def test_reference_is_one_that_05_reads(tmp_path):
    """Images, and statistics of 2048 and of 2023 features."""
    np.savez(tmp_path / "a.npz", **full_size.reference(16))
    found = read_reference(tmp_path / "a.npz")
    assert found["arr_0"].shape == (4, 16, 16, 3)
    assert found["mu"].shape == (2048,) and found["sigma_s"].shape == (2023, 2023)


def test_downloads_come_from_the_mirror(tmp_path, monkeypatch):
    """$TQ_DIT_MIRROR: the file of that name there, and not the address it has."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "weights.pt").write_bytes(b"weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with full_size.serving(served) as address:
        monkeypatch.setenv(MIRROR, address + "/")
        path = download("https://nowhere.invalid/other-name.pt", "weights.pt")
        assert path.read_bytes() == b"weights"
        with pytest.raises(checkpoints.InputError, match=f"{address}/missing.pt"):
            download("https://nowhere.invalid/missing.pt", "missing.pt")


@pytest.mark.parametrize("phase", full_size.PHASES, ids=lambda phase: phase.name)
def test_every_command_is_one_its_script_accepts(monkeypatch, phase):
    """Parsed and checked by the scripts themselves."""
    name, *flags = phase.command.split()
    monkeypatch.setattr(sys, "argv", [name, *flags])
    script = load_script(name.removesuffix(".py"))
    getattr(script, "check", lambda _: None)(script.parse_args())


@pytest.mark.slow
def test_all_five_scripts_run_once(tmp_path):
    """A block of DiT-S/8 on 64 px. The same command again does nothing but write the page."""
    page = tmp_path / "speed.md"
    flags = "--model DiT-S/8 --depth 1 --input-size 8 --runs".split()
    command = [sys.executable, ROOT / "benchmarks" / "full_size.py", *flags, tmp_path / "runs"]
    subprocess.run([*command, "--out", page], check=True)
    jobs = tmp_path / "runs" / "DiT-S-8_1_8" / "run" / "jobs"
    before = {path: path.stat().st_mtime_ns for path in jobs.iterdir()}
    assert sorted(path.stem for path in before if path.suffix == ".json") == sorted(
        phase.name for phase in [*full_size.PHASES, full_size.UNIT]
    )
    text = page.read_text()
    subprocess.run([*command, "--out", page], check=True)
    assert page.read_text() == text
    assert before == {path: path.stat().st_mtime_ns for path in jobs.iterdir()}
    rows = re.findall(r"^\| `(\d\d_\w+\.py)[^|]*`( \| [^|]*){4} \| `[^`]*` [\d.]+ \|$", text, re.M)
    assert len(rows) == len(full_size.PHASES)
