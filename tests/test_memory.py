"""benchmarks/memory.py, and that a quantized model holds no more than it must."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, lively_dit

from common import int8_engine, quant_file
from common.offload import give_back_memory
from engine import int8_linear

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory  # noqa: E402

SMALL = dict(hidden_size=384, depth=2, num_heads=6, patch_size=2, num_classes=5, input_size=8)
CONFIG = memory.DEFAULTS | SMALL
CPU = torch.device("cpu")


def held(model):
    """Bytes of all tensors of a model."""
    return sum(x.nbytes for x in [*model.parameters(), *model.buffers()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and W8A8 files of it with and without adaLN's weights in 8 bits."""
    folder = tmp_path_factory.mktemp("memory")
    memory.write_files(folder, CONFIG, [(8, 8)])
    return folder


@pytest.mark.parametrize("limit", [0, int8_linear.pair_limit()])
def test_weights_are_held_in_int8_whatever_the_cpu_can_multiply(folder, monkeypatch, limit, capsys):
    """With adaLN's in 8 bits too, at most 0.3 x full precision; without, those four bytes each."""
    monkeypatch.setattr(int8_linear, "pair_limit", lambda: limit)
    full = held(memory.load(folder / memory.CHECKPOINT, None))
    cond, released = (
        held(memory.load(memory.QuantFile((8, 8), cond).path(folder), "int8"))
        for cond in (True, False)
    )
    assert cond < 0.3 * full
    adaln = (2 * 6 + 2) * 384 * 384 + 384 * (384 + 256)  # of two blocks, the final layer, t
    assert released - cond == pytest.approx(3 * adaln, rel=0.02)


def test_layers_in_floating_point_give_fake_quantization_s_outputs(folder, monkeypatch):
    """A layer whose codes this CPU cannot multiply: int8 in memory, made fp32 a part at a time, and
    the same output but for the order of sums; in two time groups."""
    monkeypatch.setattr(int8_linear, "pair_limit", lambda: 0)
    monkeypatch.setattr(int8_linear, "AT_ONCE", 384 * 100)
    states = quant_file.load_quant(memory.QuantFile((8, 8), True).path(folder))["layers"]
    group, checked = torch.tensor([0, 7, 0]), 0
    for state in states.values():
        layer = int8_engine.Int8Engine().make_layer(state)
        if isinstance(layer, int8_linear.PackedLinear):
            x = torch.randn(3, 5, state["weight"]["shape"][1])
            torch.testing.assert_close(layer(x, group), quant_file.make_layer(state)(x, group))
            checked += 1
    assert checked == 2 * 5 + 2 + 2


def test_smooth_is_kept_where_the_product_is_in_floating_point(monkeypatch):
    """SmoothQuant's factors divide the inputs of such a layer too."""
    monkeypatch.setattr(int8_linear, "pair_limit", lambda: 0)
    layer = lively_dit().blocks[0].attn.qkv
    Q_W = memory.uniform_candidates(*layer.weight.aminmax(dim=1, keepdim=True), 8)[0]
    smooth, x = torch.rand(24) + 1, torch.randn(2, 3, 24)
    state = quant_file.linear_state(layer, layer.weight, Q_W, memory.FullPrecision(), smooth)
    found = int8_engine.Int8Engine().make_layer(state)(x)
    torch.testing.assert_close(found, quant_file.make_layer(state)(x))


@pytest.mark.parametrize("engine", ["float", "int8"])
def test_no_second_form_of_the_weights_is_held(folder, engine, capsys):
    """The codes leave the artifact as layers are made of them; Phase 3, which writes it later, has
    them still."""
    path = memory.QuantFile((8, 8), False).path(folder)
    artifact = quant_file.load_quant(path)
    quant_file.build_quantized(artifact, path)
    assert len(artifact["layers"]) == 2 + 6 * 2
    int8_engine.build(artifact, path, engine, CPU)
    assert artifact["layers"] == {}


def test_out_of_memory_is_not_called_a_damaged_file(folder):
    """torch tells it by a RuntimeError, as it does of shapes that do not fit."""
    path = memory.QuantFile((8, 8), False).path(folder)

    def make(state):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    with pytest.raises(MemoryError):
        quant_file.build_quantized(quant_file.load_quant(path), path, make)


def test_unpacking_needs_no_more_than_a_few_bytes_a_code():
    """Loading peaks at one byte for each bit, and its copies, not eight for each."""
    codes = torch.randint(64, (1024, 1024))
    packed = quant_file.pack_codes(codes, 6)
    give_back_memory()
    before = memory.resident("VmRSS")
    memory.forget_peak()
    assert torch.equal(quant_file.unpack_codes(packed, 6, codes.shape).long(), codes)
    assert memory.resident("VmHWM") - before < 40


def test_resident_tells_what_is_held_and_what_was():
    """64 MiB come and go: in VmRSS while they are held, in VmHWM until the peak is forgotten."""
    before = memory.resident("VmRSS")
    memory.forget_peak()
    held = torch.ones(2**24)
    assert 60 < memory.resident("VmRSS") - before < 80
    del held
    give_back_memory()
    assert memory.resident("VmRSS") - before < 16 and 60 < memory.resident("VmHWM") - before
    memory.forget_peak()
    assert memory.resident("VmHWM") - before < 16


@pytest.mark.slow
def test_a_process_without_compile_does_not_import_the_compiler(folder):
    """Its 70 MiB of modules are for `--compile` alone."""
    path = memory.QuantFile((8, 8), True).path(folder)
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "benchmarks")!r}]
import memory, torch
model = memory.load({str(path)!r}, "int8")
model(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.tensor([0]))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_table_has_a_row_for_each_file_and_engine(tmp_path):
    """Full precision is 1; a process for each; the page gets a section."""
    page = tmp_path / "speed.md"
    flags = "--model DiT-S/8 --depth 2 --bits 6/6 --runs".split()
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", *flags, tmp_path, "--out", page]
    subprocess.run(command, check=True)
    text = page.read_text()
    rows = re.findall(
        r"^\| (full precision|W6A6.*?) \| (?:\d+ \| ){4}[\d.]+ \| ([\d.]+) \|", text, re.M
    )
    assert [name for name, _ in rows] == ["full precision"] + [
        f"W6A6{cond}, --engine {engine}" for cond in ("", " cond") for engine in ("float", "int8")
    ]
    ratios = dict((name, float(ratio)) for name, ratio in rows)
    assert ratios["full precision"] == 1
    assert ratios["W6A6 cond, --engine int8"] < ratios["W6A6 cond, --engine float"]
    assert [path.name for path in tmp_path.iterdir()] == ["speed.md"]
