"""engine/int8_linear.py, common/int8_engine.py: codes of a quant file, multiplied as they are."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load_script, refused, run_in_process

import engine.int8_linear as e
import quant_ops as q
from common import quant_file
from common.distributed import ProcessGroup
from common.int8_engine import Int8Engine
from common.quantizers import DynamicQuantizer
from engine import cpu_products

needs_product = pytest.mark.skipif(
    cpu_products.pair_limit() == 0, reason="no u8 x s8 product on this CPU"
)
WIDTHS = [(2, 2), (4, 4), (4, 8), (6, 6), (6, 8), (7, 7), (8, 6), (8, 8)]


def weight_and_grid(bits):
    """A weight (48, 200) off centre, so that no zero point is in the middle, and its quantizer."""
    torch.manual_seed(bits)
    weight = torch.randn(48, 200) + 0.2
    return weight, q.uniform_candidates(*weight.aminmax(dim=1, keepdim=True), bits)[0]


def quantizer(kind, bits, factor):
    """A quantizer of inputs in about [-3, 3] whose ranges are `factor` times that, () or (G,)."""
    if kind == "uniform":
        return q.uniform_candidates(-3 * factor, 2 * factor, bits)[0]
    half = 2 ** (bits - 1)
    return q.GeluQuantizer(bits, 0.17 * factor / half, 3 * factor / half)


def state_of(weight, Q_W, act, **more):
    packed, bias = quant_file.pack_weight(weight, Q_W), torch.arange(len(weight)) / 7
    act = quant_file.quantizer_state(act)
    return dict(type="linear", weight=packed, bias=bias, act=act, **more)


@needs_product
@pytest.mark.parametrize("groups", ["none", "alike", "mixed"])
@pytest.mark.parametrize("kind", ["uniform", "gelu"])
@pytest.mark.parametrize("w_bits, a_bits", WIDTHS)
def test_layer_equals_fake_quantization_to_float_rounding(w_bits, a_bits, kind, groups):
    """Eq. (5), MRQ, TGQ: against the product of fake-quantized operands in float64. Widths this CPU
    cannot multiply are left in floating point, and equal too."""
    weight, Q_W = weight_and_grid(w_bits)
    factor = torch.tensor(1.0) if groups == "none" else torch.tensor([1.0, 1.5, 0.7])
    group = dict(none=None, alike=torch.tensor([1] * 6), mixed=torch.tensor([2, 0, 1, 1, 2, 0]))
    act, x, smooth = quantizer(kind, a_bits, factor), torch.randn(6, 10, 200), torch.rand(200) + 1
    engine = Int8Engine()
    layer = engine.make_layer(state_of(weight, Q_W, act, smooth=smooth))
    exact = isinstance(layer, e.Int8Linear)
    assert exact == (engine.on_integers == 1) and (exact or w_bits + a_bits > 14)
    x_hat = act(x / smooth, group[groups]).double()
    expected = F.linear(x_hat, Q_W(weight).double(), layer.bias.double())
    error = (layer(x, group[groups]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-6


@needs_product
@pytest.mark.parametrize("channels", [None, 200])
@pytest.mark.parametrize("w_bits, a_bits", WIDTHS)
def test_a_scale_for_each_token_equals_fake_quantization(w_bits, a_bits, channels):
    """Scales found at run time, of tokens of every size, of one sign too: against the product of
    fake-quantized operands in float64, relative to each token's largest output."""
    weight, Q_W = weight_and_grid(w_bits)
    act, smooth = DynamicQuantizer(a_bits, "token", channels), torch.rand(200) + 1
    x = torch.randn(6, 10, 200) * torch.logspace(-3, 3, 10)[:, None]
    x[0] = x[0].abs()
    engine = Int8Engine()
    layer = engine.make_layer(state_of(weight, Q_W, act, smooth=smooth))
    assert engine.on_integers == 1 or w_bits + a_bits > 14
    layer.bias.zero_()
    expected = F.linear(act(x / smooth).double(), Q_W(weight).double())
    found, largest = layer(x), expected.abs().amax(dim=-1, keepdim=True)
    assert ((found - expected).abs() / largest).max() < 2e-6


@pytest.mark.parametrize("per, channels", [("token", 50), ("sample", None)])
def test_other_scales_of_inputs_stay_in_floating_point(per, channels):
    """One for some channels is no product of codes; one for a sample is not made here."""
    weight, Q_W = weight_and_grid(4)
    engine = Int8Engine()
    layer = engine.make_layer(state_of(weight, Q_W, DynamicQuantizer(8, per, channels)))
    assert type(layer) is q.QuantLinear and "channels or samples" in engine.describe()


@needs_product
def test_plus_with_a_scale_for_each_token_runs_on_integers(tiny_run, tmp_path):
    """methods/tqdit_plus.py --input-group token: all nine linear layers but the last, of 8 bits,
    which not every CPU multiplies; and near fake quantization of the same file."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    flags = "--wbits 6 --abits 6 --input-group token --weight-group none --no-hadamard".split()
    made = run_in_process("methods/tqdit_plus", "--run", run, *flags)
    assert made.returncode == 0, made.stderr
    artifact, engine = quant_file.load_quant(run / "quant_w6a6_plus.pt"), Int8Engine()
    integers = quant_file.build_quantized(artifact, "test", engine.make_layer)
    assert engine.on_integers == 2 * 4 + (cpu_products.pair_limit() == cpu_products.EXACT)
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([999, 999, 0, 400]), torch.arange(4)
    with torch.no_grad():
        expected = quant_file.build_quantized(artifact, "test")(x, t, y)
        assert (integers(x, t, y) - expected).norm() < 0.05 * expected.norm()


@needs_product
def test_a_saturating_product_is_never_taken():
    """Where pairs are added in 16 bits, 8-bit weights and inputs stay in floating point; where they
    are not, the same layer is on integers. The self-test knows which CPU this is."""
    weight, Q_W = weight_and_grid(8)
    state = state_of(weight, Q_W, quantizer("uniform", 8, torch.tensor(1.0)))
    codes = torch.full((32, 64), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    one = torch.ones(16)
    found = cpu_products.u8s8(codes, one[0], torch.tensor(0), packed, 0, one, None)
    saturates = bool((found != 64 * 255 * 127).any())
    assert saturates == (cpu_products.pair_limit() == cpu_products.SATURATING)
    engine = Int8Engine()
    engine.make_layer(state)
    assert (engine.on_integers == 0) == saturates
    assert ("saturate" in engine.describe()) == saturates


@pytest.mark.parametrize(
    "limit, on_integers", [(0, 0), (cpu_products.SATURATING, 0), (cpu_products.EXACT, 1)]
)
def test_pair_limit_decides(monkeypatch, limit, on_integers):
    """An older torch or another processor has no product: everything is in floating point."""
    monkeypatch.setattr(e, "pair_limit", lambda: limit)
    if limit == cpu_products.EXACT and not hasattr(torch.ops.onednn, "qlinear_prepack"):
        pytest.skip("no u8 x s8 product in this torch")
    weight, Q_W = weight_and_grid(8)
    engine = Int8Engine()
    engine.make_layer(state_of(weight, Q_W, quantizer("uniform", 8, torch.tensor(1.0))))
    assert engine.on_integers == on_integers


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weight_is_the_dequantized_one(bits):
    """adaLN's layers: int8 in memory, and the weight of the quant file when they are called."""
    weight, Q_W = weight_and_grid(bits)
    state, x = state_of(weight, Q_W, q.FullPrecision()), torch.randn(3, 200)
    layer = Int8Engine().make_layer(state)
    assert isinstance(layer, e.PackedLinear) and layer.weight.dtype == torch.int8
    expected = F.linear(x, quant_file.unpack_weight(state["weight"]), state["bias"])
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_gelu_is_the_network_s(compiled):
    """Compiled or not, far from zero too: DiT's tanh form, to rounding in float32."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 0, 1e4])])
    gelu = torch.compile(e.Gelu(), backend="aot_eager") if compiled else e.Gelu()
    expected = F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu(x).double(), expected, rtol=1e-5, atol=1e-6)


@needs_product
@torch.no_grad()
def test_model_of_a_quant_file_runs_on_integers(tiny_run):
    """The tiny W6A6 model: nine linear layers of two blocks and the final one, close to the fake
    quantization of the same file; compiled or not."""
    artifact = quant_file.load_quant(tiny_run / "quant_w6a6.pt")
    engine = Int8Engine()
    integers = quant_file.build_quantized(artifact, "test", engine.make_layer)
    floats = quant_file.build_quantized(artifact, "test")
    assert engine.on_integers == 2 * 4 + 1 and "1 (convolution)" in engine.describe()
    assert "9 layers on integer codes by" in engine.describe()
    assert sum(engine.products.values()) == 9 and {*engine.products} & {
        "oneDNN",
        cpu_products.whose(),
    }
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([999, 999, 0, 400]), torch.arange(4)
    expected, found = floats(x, t, y), integers(x, t, y)
    assert (found - expected).norm() < 0.05 * expected.norm()  # codes at ties may differ
    compiled = torch.compile(integers, backend="aot_eager")  # the op can be traced
    torch.testing.assert_close(compiled(x, t, y), found)


def test_line_on_a_cpu_says_whose_product_it_is(monkeypatch):
    """A layer without a run is oneDNN's, and why all are is said where avx2.c could be taken."""
    monkeypatch.setattr(cpu_products, "whose", lambda: cpu_products.AVX2)
    assert [cpu_products.whose_is(run) for run in (0, 8)] == ["oneDNN", cpu_products.AVX2]
    monkeypatch.setattr(cpu_products, "whose", lambda: "oneDNN (no C compiler)")
    assert cpu_products.whose_is(0) == "oneDNN (no C compiler)"


# ------------------------------------------------------------------------------------------------
# --engine int8-folded


@pytest.mark.parametrize("bits", [8, 7, 6])
def test_folded_grid_covers_both_regions(bits):
    """Both ends of MRQ's range, for each time group, to half a step of the grid; and 0."""
    act = quantizer("gelu", 6, torch.tensor([1.0, 1.5, 0.7]))
    ends = torch.stack([-32 * act.scale1, 31 * act.scale2])
    whole, group = e.folded(act, bits), torch.arange(3)
    assert whole.bits == bits and torch.equal(whole.zero_point, (-ends[0] / whole.scale).round())
    torch.testing.assert_close(whole.scale, (ends[1] - ends[0]) / (2**bits - 1))
    for x in ends:
        assert ((whole(2 * x, group) - x).abs() <= 0.501 * whole.scale).all()
    assert (whole(torch.zeros(3), group) == 0).all()


@needs_product
@pytest.mark.parametrize("groups", [None, torch.tensor([2, 0, 1, 1, 2, 0])])
@pytest.mark.parametrize("w_bits, a_bits", [(4, 8), (6, 6)])
def test_folded_layer_is_one_product_on_that_grid(w_bits, a_bits, groups, monkeypatch):
    """Against fake quantization on the folded grid in float64; one call of the product."""
    weight, Q_W = weight_and_grid(w_bits)
    factor = torch.tensor(1.0) if groups is None else torch.tensor([1.0, 1.5, 0.7])
    act, x, smooth = quantizer("gelu", a_bits, factor), torch.randn(6, 10, 200), torch.rand(200) + 1
    engine, calls, product = Int8Engine("int8-folded"), [], e.int8_product
    layer = engine.make_layer(state_of(weight, Q_W, act, smooth=smooth))
    monkeypatch.setattr(e, "int8_product", lambda *args: calls.append(1) or product(*args))
    found = layer(x, groups)
    grid = e.folded(act, layer.act.bits)
    expected = F.linear(grid(x / smooth, groups).double(), Q_W(weight).double())
    expected += layer.bias.double()
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max() and len(calls) == 1
    assert "1 of them after GELU (MRQ folded" in engine.describe()


@needs_product
@pytest.mark.parametrize(
    "limit, how", [(cpu_products.SATURATING, "exact"), (cpu_products.EXACT, "folded")]
)
def test_what_cannot_be_folded_exactly_stays_mrq(monkeypatch, limit, how):
    """7-bit weights by 8-bit codes would saturate without VNNI, where MRQ's two products do not."""
    monkeypatch.setattr(e, "pair_limit", lambda: limit)
    weight, Q_W = weight_and_grid(7)
    engine = Int8Engine("int8-folded")
    state = state_of(weight, Q_W, quantizer("gelu", 7, torch.tensor(1.0)))
    layer = engine.make_layer(state)
    assert type(layer.act) is (q.GeluQuantizer if how == "exact" else q.UniformQuantizer)
    assert engine.on_integers == 1 and f"1 of them after GELU (MRQ {how}" in engine.describe()


@needs_product
@pytest.mark.parametrize("code, a_bits, by_avx2", [(7, 8, 8), (15, 6, 7), (31, 6, 6), (64, 6, 8)])
def test_codes_after_gelu_have_bits_that_the_product_is_fast_at(monkeypatch, code, a_bits, by_avx2):
    """By avx2.c the most that leave runs of eight sums of two products, MRQ's at the least: 2 x 15
    x 127 x 8 < 2^15 < 2 x 15 x 255 x 8. Where none do, and by oneDNN, 8."""
    act = quantizer("gelu", a_bits, torch.tensor(1.0))
    weight = torch.full((32, 64), code, dtype=torch.int8)
    for whose, bits in (cpu_products.AVX2, by_avx2), ("oneDNN", 8):
        monkeypatch.setattr(cpu_products, "whose", lambda whose=whose: whose)
        grid, how = Int8Engine("int8-folded").fold(weight, act)
        assert grid.bits == bits and how == f"folded to {bits} bits, one product"


@needs_product
def test_sample_names_the_folded_mode(tiny_run, tmp_path, run_here):
    """04 --engine int8-folded: one line, and images that are not taken for the exact mode's."""
    (tmp_path / "quant_w6a6.pt").symlink_to(tiny_run / "quant_w6a6.pt")
    flags = "--run", tmp_path, *"--wbits 6 --abits 6 --num-images 2 --engine".split()
    for engine in ("int8", "int8-folded"):
        result = run_here("04_sample", *flags, engine, "--force")
        assert result.returncode == 0, result.stderr
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"engine {engine}:"))
        assert ("MRQ folded" in line) == (engine == "int8-folded")
    result = run_here("04_sample", *flags, "int8")
    assert result.returncode == 2 and "--force" in result.stderr


@needs_product
def test_images_of_a_folded_model_say_how_many_bits_it_has(
    tiny_run, tmp_path, monkeypatch, run_here
):
    """It depends on the CPU and its compiler, so what was sampled with others is another result;
    nothing is said where nothing is folded."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    flags = f"--run {tmp_path} --wbits 6 --abits 6 --num-images 2 --engine".split()
    for bits in 8, 7:
        monkeypatch.setattr(cpu_products, "input_bits", lambda *_, bits=bits: bits)
        result = run_here("04_sample", *flags, "int8-folded")
        assert (result.returncode, "folded_bits = [8, 8]" in result.stderr) == (
            (0, False) if bits == 8 else (2, True)
        )
    assert run_here("04_sample", *flags, "int8", "--force").returncode == 0
    with np.load(tmp_path / "samples_w6a6.npz") as file:
        assert "folded_bits" not in str(file["meta"])


def test_processes_that_fold_to_other_bits_are_refused(tiny_run, tmp_path, monkeypatch, run_here):
    """Their images would be of two models."""
    shutil.copy(tiny_run / "quant_w6a6.pt", tmp_path)
    group = ProcessGroup(0, 1)
    group.agree = lambda settings: settings | dict(folded_bits=[1])
    monkeypatch.setattr(load_script("04_sample"), "join_process_group", lambda: group)
    flags = f"--run {tmp_path} --wbits 6 --abits 6 --num-images 2 --engine int8-folded".split()
    refused(run_here("04_sample", *flags), "machines that fold MRQ to other bits")


@pytest.mark.parametrize("key", ["view", "shift", "low_rank", "regroup", "hadamard"])
def test_what_the_engine_has_not_stays_in_floating_point(key):
    """A layer of another method is never multiplied without what its state asks for."""
    weight, Q_W = weight_and_grid(4)
    state = state_of(weight, Q_W, quantizer("uniform", 4, torch.tensor(1.0)))
    assert not Int8Engine().beyond(state)
    (state["weight"] if key == "view" else state)[key] = None
    assert Int8Engine().beyond(state)


def test_a_bias_for_each_time_group_stays_in_floating_point():
    """A bias (G, O) has no place in the product."""
    weight, Q_W = weight_and_grid(4)
    state = state_of(weight, Q_W, quantizer("uniform", 4, torch.tensor(1.0)))
    assert "bias" in Int8Engine().beyond(state | dict(bias=torch.zeros(3, 48)))


@needs_product
def test_time_groups_have_zero_points_of_their_own():
    """Ranges of one sign, of the other and of both; a batch of mixed groups and one of a group."""
    weight, Q_W = weight_and_grid(4)
    low, high = torch.tensor([0.0, -3.0, -1.0]), torch.tensor([3.0, 0.0, 2.0])
    act, x = q.uniform_candidates(low, high, 6)[0], torch.randn(6, 10, 200)
    layer = Int8Engine().make_layer(state_of(weight, Q_W, act))
    for group in (torch.tensor([2, 0, 1, 1, 2, 0]), torch.tensor([1] * 6)):
        expected = F.linear(act(x, group).double(), Q_W(weight).double(), layer.bias.double())
        assert (layer(x, group) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind, a_bits, largest, taken", [
    ("uniform", 8, 64, True), ("uniform", 8, -64, True),  # 2 * 64 * 255 fits in 16 bits
    ("uniform", 8, 65, False), ("uniform", 8, -65, False), ("uniform", 8, -128, False),
    ("uniform", 7, -128, True), ("gelu", 8, 127, True), ("gelu", 8, -128, False),
])  # fmt: skip
def test_largest_codes_of_either_sign_decide(monkeypatch, kind, a_bits, largest, taken):
    """Where pairs are added in 16 bits, a layer is on integers just as far as a pair fits."""
    monkeypatch.setattr(e, "pair_limit", lambda: cpu_products.SATURATING)
    v = torch.zeros(16, 64, dtype=torch.int8)
    v[3, 5] = largest
    assert (e.why_not(v, quantizer(kind, a_bits, torch.tensor(1.0))) == "") is taken


@pytest.mark.parametrize("zero_point", [126, 127, 128, 129])
def test_weight_codes_less_their_zero_point_are_held(zero_point):
    """v less its correction is q - z for every code 0..255; 128 is no int8."""
    codes = torch.arange(256, dtype=torch.uint8)[None]
    v, correction = e.signed_weight(codes, torch.tensor([[zero_point]], dtype=torch.uint8), 8)
    found = v.float() - (0 if correction is None else correction[:, None])
    assert torch.equal(found, codes.float() - zero_point)


def test_too_many_inputs_for_int32_stay_in_floating_point(monkeypatch):
    """The printed line says so."""
    monkeypatch.setattr(e, "MAX_INPUTS", 200)
    weight, Q_W = weight_and_grid(4)
    engine = Int8Engine()
    engine.make_layer(state_of(weight, Q_W, quantizer("uniform", 4, torch.tensor(1.0))))
    assert engine.on_integers == 0 and "too many inputs" in engine.describe()
