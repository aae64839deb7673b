"""engine/avx2.py: the product of codes by avx2.c, against exact integers."""

import pytest
import torch
import torch.nn.functional as F

from engine import avx2, cpu_products
from engine.int8_linear import Int8Linear
from quant_ops import GeluQuantizer, UniformQuantizer

needs_it = pytest.mark.skipif(bool(avx2.why_not()), reason=avx2.why_not())


def operands(rows, channels, inputs, largest, highest, seed=0):
    """Codes (rows, inputs) to `highest`, v (channels, inputs) to `largest`; scales, a bias."""
    torch.manual_seed(seed)
    codes = torch.randint(highest + 1, (rows, inputs)).to(torch.uint8)
    v = torch.randint(-largest, largest + 1, (channels, inputs)).to(torch.int8)
    return codes, v, torch.rand(channels) + 0.1, torch.randn(channels)


def product(codes, v, w_scale, bias, run, zero_point=3):
    scale, zero_point = torch.tensor(0.02), torch.tensor(zero_point, dtype=torch.int32)
    return avx2.u8s8(codes, scale, zero_point, avx2.pack(v), run, w_scale, bias)


def run_of(largest, highest):
    """Of weights with one code."""
    return avx2.quick_run(torch.full((16, 4), largest, dtype=torch.int8), highest)


@pytest.fixture(params=[1, 3])
def threads(request):
    """So many, while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@needs_it
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("largest, highest", [(64, 255), (127, 128), (15, 255), (40, 63), (8, 15)])
@pytest.mark.parametrize("rows, channels, inputs", [
    (1, 16, 4), (3, 16, 12), (5, 48, 200), (97, 304, 36), (200, 32, 1156),
])  # fmt: skip
def test_product_is_that_of_integers(rows, channels, inputs, largest, highest):
    """Bit for bit (float)(sum (q - z) v) (s_x s_w) + bias, for rows that fill no tile or block,
    channels that fill no thread's piece, with and without a bias."""
    codes, v, w_scale, bias = operands(rows, channels, inputs, largest, highest)
    exact = ((codes.double() - 3) @ v.double().T).float() * (torch.tensor(0.02) * w_scale)
    run = run_of(largest, highest)
    assert torch.equal(product(codes, v, w_scale, None, run), exact)
    assert torch.equal(product(codes, v, w_scale, bias, run), exact + bias)


@needs_it
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("largest, highest", [(64, 255), (127, 129), (63, 63), (31, 33), (1, 1)])
def test_a_run_is_as_long_as_16_bits_hold(largest, highest, sign):
    """All codes the largest: right with `quick_run`'s run, and wrong with one more, but where the
    run is longer than the inputs are."""
    codes = torch.full((4, 4096), highest, dtype=torch.uint8)
    v, one = torch.full((16, 4096), sign * largest, dtype=torch.int8), torch.ones(16)
    exact = 4096.0 * highest * sign * largest * torch.tensor(0.02)
    run = run_of(largest, highest)
    assert (product(codes, v, one, None, run, zero_point=0) == exact).all()
    if run < 1024:
        assert (product(codes, v, one, None, run + 1, zero_point=0) != exact).all()


@needs_it
@pytest.mark.parametrize("signs", ["both", "above", "below"])
@pytest.mark.parametrize("largest, highest", [(36, 63), (36, 255), (8, 255), (64, 255)])
def test_a_run_of_these_weights_is_the_longest(largest, highest, signs):
    """Two rows for each channel, the highest code where its weights are above zero, or below: right
    with `longest_run`'s run, and wrong with twice that; of weights of both signs or of one."""
    v = operands(1, 16, 1020, largest, highest)[1]
    v, one = (v * torch.rand(v.shape)).to(torch.int8), torch.ones(16)  # few are large
    v = dict(both=v, above=v.abs(), below=-v.abs())[signs]
    codes = highest * torch.cat([v > 0, v < 0]).to(torch.uint8)
    exact = (codes.double() @ v.double().T).float() * torch.tensor(0.02)
    run = avx2.longest_run(v, highest)
    assert 2 * run > avx2.quick_run(v, highest) > 0
    assert torch.equal(product(codes, v, one, None, run, zero_point=0), exact)
    assert not torch.equal(product(codes, v, one, None, 2 * run, zero_point=0), exact)


def test_codes_that_would_saturate_are_refused():
    """8-bit weights by 8-bit inputs have no run, and the product does not take them."""
    assert run_of(-128, 255) == 0 and run_of(64, 255) == 1 and run_of(0, 255) > 0
    codes, v, w_scale, bias = operands(4, 16, 64, 127, 255)
    with pytest.raises(ValueError, match="16 bits"):
        product(codes, v, w_scale, bias, 0)


@pytest.mark.parametrize("wrong", ["inputs", "channels", "dtype"])
def test_what_does_not_fit_is_refused(wrong):
    """C code takes addresses: nothing beyond a tensor is read."""
    codes, v, w_scale, bias = operands(4, 16, 64, 8, 15)
    codes = codes[:, 4:] if wrong == "inputs" else codes
    codes = codes.float() if wrong == "dtype" else codes
    with pytest.raises(ValueError, match="a weight"):
        product(codes, v, w_scale[wrong == "channels" :], bias, 1)


@needs_it
def test_it_is_told_whether_the_result_is_right(monkeypatch):
    """The trial finds a product that saturates, as one of longer runs would."""
    assert avx2._is_exact()
    monkeypatch.setattr(avx2, "LARGEST", 2**16)
    assert not avx2._is_exact()


@needs_it
@pytest.mark.parametrize("kind", ["uniform", "gelu"])
@pytest.mark.parametrize("largest, inputs, bits, panels", [
    (32, 64, 6, True), (8, 64, 8, True), (64, 64, 8, False), (32, 66, 6, False),
])  # fmt: skip
def test_a_layer_takes_it_where_runs_are_longer_than_one(
    monkeypatch, kind, largest, inputs, bits, panels
):
    """Where it is this CPU's: sizes it does not take, and single sums, are left to oneDNN. Either
    way the layer is the product of fake-quantized operands."""
    if cpu_products.pair_limit() == 0:
        pytest.skip("no u8 x s8 product on this CPU")
    monkeypatch.setattr(cpu_products, "whose", lambda: cpu_products.AVX2)
    scale, zero_point = torch.tensor([0.1, 0.2]), torch.full((2,), 2.0 ** (bits - 1))
    act = UniformQuantizer(bits, scale, zero_point)
    act = act if kind == "uniform" else GeluQuantizer(bits, scale / 9, scale)
    v = (largest - torch.arange(16)[:, None]).expand(16, inputs).to(torch.int8)
    layer = Int8Linear(v, None, torch.tensor(0.01), torch.arange(16.0), act)
    assert layer.weight.is_mkldnn != panels
    torch.manual_seed(0)
    x, group = 9 * torch.randn(4, 5, inputs), torch.tensor([1, 0, 0, 1])
    expected = F.linear(act(x, group).double(), 0.01 * v.double(), layer.bias.double())
    assert (layer(x, group) - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("found, reason", [(None, "no C compiler"), ("false", "does not compile")])
def test_without_a_compiler_onednn_multiplies(monkeypatch, found, reason):
    """What the engine's line says of the product, and why."""
    monkeypatch.setattr(avx2.shutil, "which", lambda name: found)
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(cpu_products, "pair_limit", lambda: cpu_products.SATURATING)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    caches = avx2.compiled, avx2.why_not, cpu_products.whose
    for cached in caches:
        cached.cache_clear()
    try:
        assert reason in cpu_products.whose() and cpu_products.whose().startswith("oneDNN (")
    finally:
        for cached in caches:
            cached.cache_clear()


@needs_it
@pytest.mark.parametrize("limit, capability, own", [
    (cpu_products.SATURATING, "AVX2", True), (cpu_products.EXACT, "AVX2", False),
    (cpu_products.SATURATING, "AVX512", False), (0, "DEFAULT", False),
])  # fmt: skip
def test_it_is_for_cpus_with_avx2_alone(monkeypatch, limit, capability, own):
    """With VNNI oneDNN's is faster; what AVX-512 without VNNI gains has not been measured."""
    assert avx2.why_not() == ""  # known before the capability is changed
    monkeypatch.setattr(cpu_products, "pair_limit", lambda: limit)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu_products.whose.cache_clear()
    try:
        assert (cpu_products.whose() == cpu_products.AVX2) == own
    finally:
        cpu_products.whose.cache_clear()
