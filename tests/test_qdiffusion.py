"""methods/qdiffusion.py: phases W and A of a unit, and the script on the tiny DiT."""

import pytest
import torch
from conftest import load_script, quant_file_of, refused, run_in_process, snapshot

from common.artifacts import load_artifact
from common.phase3 import Phase3
from common.quant_file import load_quant, unpack_weight
from methods.ranges import weight_by_shrinking
from methods.reconstruction import Recipe, weights_only

SCRIPT = "methods/qdiffusion"
QD = load_script(SCRIPT)
FLAGS = "--wbits 4 --abits 5 --weight-iterations 3 --scale-iterations 3 --weight-batch 4".split()


def made(run, *flags):
    return quant_file_of(SCRIPT, run, *FLAGS, *flags)


def test_own_layers_are_all_that_multiply(run):
    """Embedders, adaLN and final layer too, inputs and weights; softmax keeps 8 bits."""
    file, printed = made(run)
    layers = file["layers"]
    assert len(layers) == 3 + 2 * 7 + 2 and "eps, signal to noise" in printed
    assert {x["weight"]["bits"] for x in layers.values() if "weight" in x} == {4}
    assert {x["act"]["bits"] for x in layers.values() if "act" in x} == {5}
    assert {layers[f"blocks.{i}.attn.av"]["a"]["bits"] for i in (0, 1)} == {8}
    assert layers["blocks.0.attn.av"]["b"]["bits"] == layers["blocks.0.attn.qk"]["a"]["bits"] == 5


def test_released_layers_are_those_of_03(run, tiny_run):
    """Conditioning and the image itself stay in full precision (D6)."""
    file, _ = made(run, "--layers", "released", "--softmax-bits", "5")
    assert file["layers"].keys() == load_quant(tiny_run / "quant_w6a6.pt")["layers"].keys()
    assert file["layers"]["x_embedder.proj"]["act"] == dict(type="none")
    assert file["layers"]["blocks.0.attn.av"]["a"]["bits"] == 5


def test_without_iterations_weights_are_rounded_to_nearest(run):
    """Ranges of least |error|^2.4, and nothing learned; phase A alone changes scales of inputs."""
    none = "--weight-iterations", "0", "--scale-iterations", "0"
    plain, _ = made(run, *none)
    learned, _ = made(run, *none[:2], "--scale-iterations", "20", "--force")
    weight = torch.load(run / "calib.pt", weights_only=True)["settings"]["ckpt"]
    weight = torch.load(weight, weights_only=True)["blocks.1.mlp.fc1.weight"]
    name = "blocks.1.mlp.fc1"
    for file in (plain, learned):
        found = unpack_weight(file["layers"][name]["weight"])
        torch.testing.assert_close(found, weight_by_shrinking(weight, 4)(weight))
    was, now = (file["layers"][name]["act"]["scale"] for file in (plain, learned))
    assert was != now and abs(now / was - 1) < 0.2
    slow, _ = made(run, *none[:2], "--scale-iterations", "20", "--scale-lr", "1e-6", "--force")
    assert 0 < abs(slow["layers"][name]["act"]["scale"] - was) < 0.1 * abs(now - was)


def test_rounding_learns_with_the_units_before_quantized(run):
    """Some weights of every block are no longer rounded to nearest."""
    plain, _ = made(run, "--weight-iterations", "0", "--weight-batch", "8")
    learned, _ = made(run, "--weight-iterations", "40", "--force")
    for i in (0, 1):
        codes = [f["layers"][f"blocks.{i}.mlp.fc1"]["weight"]["codes"] for f in (plain, learned)]
        assert not torch.equal(*codes)


def test_phases_w_and_a_have_the_inputs_and_recipes_of_the_paper(run, monkeypatch):
    """W: from quantized weights alone (BRECQ, Eq. 7 and 8); A: in full precision, |error|^2.4."""
    seen, made, inputs_of = [], [], Phase3.quantized_inputs

    def watched(self, *make):
        made.append(make)
        return inputs_of(self, *make)

    monkeypatch.setattr(QD, "reconstruct", lambda *args: seen.append(args))
    monkeypatch.setattr(Phase3, "quantized_inputs", watched)
    flags = "--wbits 4 --abits 5 --weight-batch 4 --scale-batch 3 --weight-lr 0.1 --scale-lr 0.2"
    quant_file_of(SCRIPT, run, *flags.split())
    assert made == 4 * [(weights_only,)]
    for w, a in zip(seen[::2], seen[1::2], strict=True):
        assert w[3] == Recipe(20000, 4, weight_lr=0.1)
        assert a[3] == Recipe(5000, 3, scale_lr=0.2, power=2.4)
    full = seen[-1][0].unit.inputs
    assert all(torch.equal(x, y) for x, y in zip(seen[-1][2], full, strict=True))
    assert not torch.equal(seen[-2][2][0], full[0])


@pytest.mark.parametrize("flags, words", [
    (["--softmax-bits", "9"], "--softmax-bits 9: must be 2..8"),
    (["--scale-iterations", "-1"], "--scale-iterations -1: at least 0"),
    (["--weight-batch", "0"], "--weight-batch 0: at least 1"),
    (["--weight-lr", "1"], "--weight-lr 1.0: above 0, below 1"),
    (["--scale-lr", "0"], "--scale-lr 0.0: above 0, below 1"),
])  # fmt: skip
def test_bad_flags_are_refused(run, flags, words):
    """One line, status 2, nothing written."""
    before = snapshot(run)
    refused(run_in_process(SCRIPT, "--run", run, *FLAGS, *flags), words)
    assert snapshot(run) == before


def test_file_names_its_method(run):
    """`method` and every setting stand in the file."""
    made(run)
    file = load_artifact(run / "quant_w4a5_qdiffusion.pt", "quant", "")
    assert file["method"] == "qdiffusion"
    assert file["settings"].keys() >= set(QD.Settings._fields)
