"""engine/int8_blocks.py, triton_norm.py, triton_attention.py: what one kernel does is what parts
of a block do one after the other; models that are made of such blocks; the trial.

Without a GPU the kernels run in Triton's interpreter, if Triton is installed.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from int8_layers import DEVICE, GROUPS, INPUTS, OUTPUTS, ROWS, TOKENS, layer_of, quantizer

import quant_ops as q
from common import int8_engine, quant_file
from common.quantizers import DynamicQuantizer
from engine import cuda_trial
from engine import int8_blocks as b
from engine import int8_cuda as e
from models_dit import Attention, DiTBlock, MatMul

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu(monkeypatch):
    """gpu(triton): from here on CUDA is what DEVICE is, with Triton or without."""
    monkeypatch.setattr(e, "has_int_unit", lambda device: True)

    def has(triton):
        kernels = cuda_trial.Kernels("" if triton else "Triton is missing", None, None)
        monkeypatch.setattr(cuda_trial, "kernels_of", lambda device: kernels)

    return has


def group_of(groups):
    """A factor of scales, and time groups (N,) on the device, of `GROUPS`."""
    factor, group = GROUPS[groups]
    return factor, None if group is None else group.to(DEVICE)


def same_codes(found, expected):
    """Codes that are equal but for ties."""
    differ = (found.int() - expected.int()).abs()
    assert found.dtype == torch.int8 and expected.unique().numel() > 30
    assert differ.max() <= 1 and (differ > 0).float().mean() < 1e-3


@pytest.mark.parametrize("of_fc1, of_fc2", [
    ("uniform", "gelu"), ("uniform", "token"), ("token", "gelu"), ("token", "token"),
])  # fmt: skip
def test_fc1_ends_with_fc2_s_inputs_unless_each_token_finds_its_scale(of_fc1, of_fc2):
    """That needs all outputs of GELU at once, of which the kernel has a tile."""
    engine, one = int8_engine.Int8Engine(), torch.tensor(1.0)
    engine.no_triton = ""
    fc1, fc2 = (layer_of((4, 8), kind, one, True)[0] for kind in (of_fc1, of_fc2))
    attn = Attention(32, 2)  # not quantized, so left alone
    block = SimpleNamespace(mlp=SimpleNamespace(fc1=fc1, fc2=fc2), attn=attn)
    engine.fuse(SimpleNamespace(blocks=[block]))
    assert isinstance(block.mlp, b.Int8Mlp) == ("token" not in (of_fc1, of_fc2))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["gelu", "folded"])
def test_gelu_and_codes_at_the_end_of_fc1(kind, groups):
    """The codes of fc2's inputs, but for ties that GELU's last bits decide, and its output."""
    pytest.importorskip("triton")
    factor, group = group_of(groups)
    fc1, _ = layer_of((8, 8), "uniform", torch.tensor(1.0), True)
    smooth = torch.rand(OUTPUTS) + 1
    fc2, _ = layer_of((6, 6), kind, factor, True, INPUTS, OUTPUTS, smooth)
    x = torch.randn(ROWS, TOKENS, INPUTS, device=DEVICE)
    hidden = F.gelu(fc1(x, group) / 8, approximate="tanh")
    fc1.w_scale /= 8
    fc1.bias /= 8
    found, _ = fc1.before_gelu(fc1.inputs(x, group), group, fc2)
    expected = fc2.inputs(hidden, group)
    same_codes(found, expected)
    out = b.Int8Mlp(fc1, fc2)(x, group)
    assert torch.equal(out, fc2.product(found, fc2.grid(), group))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("width", [64, 80, 112])  # one part, two, two of which one is not full
def test_norm_modulation_and_codes_in_one_kernel(groups, added, width):
    """The codes of qkv's and fc1's inputs but for ties, their sums, and what goes on as x."""
    pytest.importorskip("triton")
    factor, group = group_of(groups)
    layer, _ = layer_of((8, 8), "uniform", factor, True, OUTPUTS, width, torch.rand(width) + 1)
    x, h = 5 * torch.randn(2, ROWS, width, TOKENS, device=DEVICE).transpose(-1, -2) + 2
    gate, shift, scale = torch.randn(ROWS, 3 * width, device=DEVICE).chunk(3, dim=1)
    h, of_gate = (h, gate) if added else (None, None)
    expected = x + gate[:, None] * h if added else x
    summed, found, sums = layer.of_norm(x, h, of_gate, shift, scale, group)
    if added:
        torch.testing.assert_close(summed, expected)
    normed = F.layer_norm(expected, [width], eps=1e-6)
    codes = layer.inputs(normed * (1 + scale[:, None]) + shift[:, None], group)
    same_codes(found, codes)
    assert torch.equal(sums.long(), found.sum(dim=-1))


def attention_of(heads, width, factor, bits=(8, 8, 8, 8), scale1=2.0**-10, smooth=True):
    """An attention of a quant file: `bits` of q, k and v, of softmax, and of the layers' weights
    and inputs. Weights of 8 bits have a correction."""
    D = heads * width
    attn = Attention(D, heads)
    attn.fused = False
    smooth = torch.rand(D) + 1 if smooth else None
    attn.qkv = layer_of(bits[2:], "uniform", factor, True, 3 * D, D, smooth)[0]
    attn.proj = layer_of(bits[2:], "uniform", 0.5319 * factor, True, D, D, smooth)[0]
    attn.qkv.w_scale /= D**0.5
    attn.qkv.bias, attn.proj.bias = torch.randn(3 * D), torch.randn(D)
    spread = torch.tensor(2.5)
    of_q = q.uniform_candidates(-spread * width**-0.5, 2 * spread * width**-0.5, bits[0])[0]
    of_k, of_v = (q.uniform_candidates(-a * spread, spread, bits[0])[0] for a in (1.2, 0.8))
    softmax = q.SoftmaxQuantizer(bits[1], torch.tensor(scale1) * factor.ceil())
    attn.qk, attn.av = q.QuantMatMul(of_q, of_k), q.QuantMatMul(softmax, of_v)
    return attn.to(DEVICE)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(
    "tokens, heads, width, bits, scale1, smooth",
    [
        (64, 2, 24, (8, 8, 8, 8), 2.0**-10, True),
        (20, 1, 16, (6, 6, 8, 6), 2.0**-9, True),
        (70, 2, 72, (5, 8, 8, 6), 2.0**-18, True),
        (256, 2, 8, (8, 3, 6, 8), 2.0**-4, False),
        (130, 1, 32, (4, 2, 4, 8), 2.0**-2, False),
        (64, 2, 72, (8, 8, 8, 8), 2.0**-10, True),  # of one tile: heads in one part
        (16, 2, 40, (6, 6, 6, 6), 2.0**-9, False),
    ],
)
@torch.no_grad()
def test_attention_in_one_kernel(tokens, heads, width, bits, scale1, smooth, groups):
    """Both products, softmax with MRQ, proj's codes: the same outputs but for ties. Sizes are a
    whole number of tiles or not, one or several; R1 reaches R2 or not."""
    pytest.importorskip("triton")
    factor, group = group_of(groups)
    attn = attention_of(heads, width, factor, bits, scale1, smooth)
    assert (attn.proj.correction is None) == (bits[2] < 8)
    assert b.Int8Attention.takes(attn)
    x = torch.randn(ROWS, tokens, heads * width, device=DEVICE)
    seen, plain = [], attn.proj.forward
    attn.proj.forward = lambda x, group: seen.append(attn.proj.inputs(x, group)) or plain(x, group)
    expected = attn(x, group)
    one = b.Int8Attention(attn).to(DEVICE)
    found = one(x, group)
    assert ((found - expected).norm() < 2e-3 * expected.norm()).all()
    codes = one.proj_codes(one.qkv.inputs(x, group), None, group)[0]
    same_codes(codes, seen[0])


@torch.no_grad()
def test_softmax_on_the_border_of_its_regions():
    """All keys alike, 2^k of them: p lies half-way to R2's first level, which it gets."""
    pytest.importorskip("triton")
    steps = torch.full((1, 64, 3 * 16), 3.0, device=DEVICE)
    steps = steps.bfloat16() if DEVICE.type == "cuda" else steps
    one, zero = torch.ones((), device=DEVICE), torch.zeros((), dtype=torch.int32, device=DEVICE)
    p = q.mrq_softmax(torch.full((64,), 1 / 64), torch.tensor(2.0**-20), 6)
    codes, _ = b.attention(
        steps, None, 1, [one] * 3, 2.0**-20 * one, 32.0, [one, zero, None], 32, False, False
    )
    assert (codes == round(3 * p.sum().item())).all() and codes.unique().tolist() == [6]


@pytest.mark.parametrize("tokens, width, dtype, taken", [
    (256, 72, "bfloat16", True), (128, 96, "bfloat16", True), (64, 72, "bfloat16", False),
    (1024, 72, "bfloat16", False), (256, 76, "bfloat16", False), (256, 104, "bfloat16", False),
    (256, 72, "float32", False),
])  # fmt: skip
def test_heads_that_hopper_s_attention_takes(tokens, width, dtype, taken):
    """Whose scores fit in registers, and whose columns the copy engine and shared memory take."""
    kernel = pytest.importorskip("engine.triton_hopper_attention", exc_type=ImportError)
    qkv = torch.empty(2, tokens, 3 * 2 * width, dtype=getattr(torch, dtype))
    assert kernel.takes(qkv, 2) == taken


@pytest.mark.parametrize("change", [
    lambda attn: setattr(attn.av.a, "scale1", torch.tensor(3.0)),
    lambda attn: setattr(attn.qk, "a", q.FullPrecision()),
    lambda attn: setattr(attn, "av", MatMul()),
    lambda attn: setattr(attn, "num_heads", 1 / 4),  # a head of 192
    lambda attn: setattr(attn.av, "a", DynamicQuantizer(8, "token")),
    lambda attn: setattr(attn.qk.b, "scale", torch.ones(3)),
    lambda attn: setattr(attn.proj, "triton", False),
    lambda attn: setattr(attn.qkv, "act", q.GeluQuantizer(8, *torch.ones(2))),
])  # fmt: skip
def test_attention_that_the_kernel_does_not_know(change):
    """Steps that are no powers of two, other quantizers, time groups of q, k, v: left alone."""
    attn = attention_of(2, 24, torch.tensor(1.0))
    change(attn)
    assert not b.Int8Attention.takes(attn)


@pytest.mark.parametrize("engine", ["int8", "int8-folded"])
@torch.no_grad()
def test_model_of_a_quant_file_runs_on_integers(tiny_run, gpu, triton, engine, capsys):
    """The tiny W6A6 model, time groups mixed in a batch: close to fake quantization, compiled or
    not; one line says what runs on what."""
    gpu(triton)
    artifact = quant_file.load_quant(tiny_run / "quant_w6a6.pt")
    floats = quant_file.build_quantized(artifact, "test").to(DEVICE)
    integers = int8_engine.build(artifact, "test", engine, torch.device("cuda")).to(DEVICE)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and f"engine {engine}: 9 layers on integer codes" in line
    assert ("by Triton" if triton else "torch._int_mm (Triton is missing)") in line
    assert ("2 of them after GELU (MRQ folded" in line) == (engine == "int8-folded")
    fused = "2 attentions in one kernel each, LayerNorm with the codes that follow it"
    assert (fused in line) == triton and ("4 (products" in line) != triton
    assert isinstance(integers.blocks[0], b.Int8Blocks) == triton
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8).to(DEVICE), torch.arange(4, device=DEVICE)
    t = torch.tensor([999, 999, 0, 400], device=DEVICE)
    expected, found = floats(x, t, y), integers(x, t, y)
    assert (found - expected).norm() < 0.05 * expected.norm()  # codes at ties may differ
    if engine == "int8":
        compiled = torch.compile(integers, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, y), found)


def test_triton_that_fails_or_errs_is_not_taken(monkeypatch):
    """The trial: what it raises, or a wrong sum, is the reason that is printed."""
    kernels = pytest.importorskip("engine.triton_kernels", exc_type=ImportError)
    ask = cuda_trial.trial
    found = cuda_trial.kernels_of.__wrapped__(DEVICE)  # first where a fault does no harm
    assert found == ("", *["" if cuda_trial.on_hopper(DEVICE) else None] * 2)
    assert ask(DEVICE) == ""
    for name in "norm_codes", "attention":  # each returns codes, among others
        with monkeypatch.context() as patch:
            plain = getattr(cuda_trial, name)
            patch.setattr(cuda_trial, name, lambda *args, f=plain: [part + 1 for part in f(*args)])
            assert "wrong" in ask(DEVICE)
    plain = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args: plain(*args) + 1)
    assert "wrong" in ask(DEVICE)
    monkeypatch.setattr(kernels, "linear", lambda *args: 1 / 0)
    assert "ZeroDivisionError" in ask(DEVICE)


@pytest.mark.parametrize("command, kernels", [
    ("os.abort()", ("Triton failed", None, None)),
    ("print('noise: 1'); print('triton: why')", ("why", None, None)),
    ("print('triton: \\nhopper: no', flush=True); os.abort()", ("", "no", None)),
    ("print('triton: \\nhopper: no', flush=True); time.sleep(60)", ("", "no", None)),
    ("print('triton: \\nhopper: no\\nhopper: \\nattention: no')", ("", "", "no")),
])  # fmt: skip
def test_trial_is_a_process_of_its_own(monkeypatch, command, kernels):
    """What it says counts; one that dies, or never ends, takes nothing along."""
    run = cuda_trial.subprocess.run
    monkeypatch.setattr(cuda_trial, "LIMIT", 10 if "sleep" in command else 60)

    def instead(command_line, **how):
        assert command_line[1:] == ["-m", "engine.cuda_trial", "cuda:7"]
        return run([command_line[0], "-c", f"import os, time; {command}"], **how)

    monkeypatch.setattr(cuda_trial.subprocess, "run", instead)
    assert cuda_trial.kernels_of.__wrapped__(torch.device("cuda:7")) == kernels


@pytest.mark.parametrize("no_hopper, no_attention, whose, why", [
    (None, None, "Triton", ""), ("", "", "Triton for Hopper", ""),
    ("it failed", "", "Triton", " (it failed)"), ("", "no", "Triton for Hopper", " (no)"),
])  # fmt: skip
def test_line_says_whose_kernels_they_are(monkeypatch, no_hopper, no_attention, whose, why):
    """Of layers with sizes that 16 divides, and of others."""
    kernels = cuda_trial.Kernels("", no_hopper, no_attention)
    monkeypatch.setattr(cuda_trial, "kernels_of", lambda device: kernels)
    monkeypatch.setattr(e, "has_int_unit", lambda device: True)
    engine = int8_engine.Int8Engine("int8", torch.device("cuda"))
    engine.reasons["convolution"] = 1
    act = quant_file.quantizer_state(quantizer("uniform", 8, torch.tensor(1.0)))
    for outputs, others in (32, ""), (24, " and torch._int_mm"):
        weight = torch.randn(outputs, 64)
        packed = quant_file.pack_weight(weight, q.uniform_candidates(*weight.aminmax(), 8)[0])
        engine.make_layer(dict(type="linear", weight=packed, act=act, bias=torch.zeros(outputs)))
        assert f"by {whose}{others}{why};" in engine.describe()
    assert engine.linear.keywords == dict(triton=True, hopper=no_hopper == "")


@pytest.mark.parametrize("of_fc1", ["uniform", "gelu"])
def test_blocks_of_which_one_stays_as_it_is(of_fc1):
    """They are not taken as a whole; what can be fused of them is."""
    blocks = torch.nn.ModuleList(DiTBlock(48, 2, 3) for _ in range(2))
    for block, kind in zip(blocks, ("uniform", of_fc1), strict=True):
        one = torch.tensor(1.0)
        block.attn = attention_of(2, 24, one)
        block.mlp.fc1 = layer_of((8, 8), kind, one, True, OUTPUTS, 48)[0]
        block.mlp.fc2 = layer_of((8, 8), "gelu", one, True, 48, OUTPUTS)[0]
    model = SimpleNamespace(blocks=blocks)
    assert b.fuse(model) == (2, of_fc1 == "uniform")
    assert isinstance(model.blocks[0], DiTBlock) == (of_fc1 == "gelu")
    assert isinstance(blocks[1].mlp, b.Int8Mlp) == (of_fc1 == "uniform")


def test_layer_norm_s_epsilon_is_the_model_s():
    norm = pytest.importorskip("engine.triton_norm", exc_type=ImportError)
    block = DiTBlock(16, 1, 4)
    assert norm.EPS.value == block.norm1.eps == block.norm2.eps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@torch.no_grad()
def test_graphs_of_a_model_give_what_it_gives(tiny_run):
    """Other inputs, a smaller batch, and the first size again; as `04 --compile` on a GPU."""
    artifact = quant_file.load_quant(tiny_run / "quant_w6a6.pt")
    model = int8_engine.build(artifact, "test", "int8", DEVICE).to(DEVICE)
    graphs = torch.compile(model, mode="reduce-overhead")
    for seed, count in enumerate((4, 4, 3, 4)):
        torch.manual_seed(seed)
        x, y = torch.randn(count, 3, 8, 8, device=DEVICE), torch.arange(count, device=DEVICE)
        t = torch.full_like(y, 400)
        found, expected = graphs(x, t, y).clone(), model(x, t, y)
        assert (found - expected).norm() < 0.05 * expected.norm()  # codes at ties may differ
