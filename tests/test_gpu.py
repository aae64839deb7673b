"""Every quantizer and search on CUDA equals the CPU's: `pytest -m gpu`."""

import os
import shutil

import pytest
import torch
from conftest import FLAGS, layer_of, linear_data, load_script, run_script

import quant_ops as q
from common import int_losses, offload
from common.artifacts import load_artifact
from common.fast_search import FastSearch
from common.packing import pack_codes, unpack_codes
from engine import int_products as p

PLUS = load_script("methods/tqdit_plus")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def both(function, *tensors):
    """The function's result on the CPU, and on CUDA brought back."""
    return function(*tensors), function(*(x.cuda() for x in tensors)).cpu()


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizers_equal_the_cpu(bits):
    """Same codes on both devices, but for ties that the last bit of a division decides."""
    x, s1, s2 = torch.randn(10000), torch.tensor(2.0**-bits / 4), torch.tensor(2.0**-bits)
    scale, zero_point = q.qparams_from_range(x.min(), x.max(), bits)
    cases = [
        both(lambda x, s, z: q.fake_quant(x, s, z, bits), x, scale, zero_point),
        both(lambda x, s: q.mrq_softmax(x, s, bits), x.sigmoid(), s1),
        both(lambda x, a, b: q.mrq_gelu(x, a, b, bits), x, s1, s2),
    ]
    for cpu, cuda in cases:
        assert (cpu != cuda).float().mean() < 1e-3
    codes = torch.randint(0, 2**bits, (999,))
    cpu, cuda = both(lambda c: unpack_codes(pack_codes(c, bits), bits, (999,)), codes)
    assert torch.equal(cpu, cuda)


def near(a, b):
    """Scales that differ by one place of the grid of alphas at most: near-ties."""
    return ((a.cpu() - b.cpu()).abs() <= 0.03 * a.cpu().abs()).all()


def linear_case(device, rows=512):
    """A layer (48, 64) after GELU, and its LayerData in four time groups."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48).requires_grad_(False)
    x = torch.nn.functional.gelu(2 * torch.randn(rows, 64))
    group = torch.arange(rows) * 4 // rows
    data = linear_data(torch.randn(rows, 48), x @ layer.weight.T, x, group, rows=200)
    data.device = device
    return layer.to(device), data


@pytest.mark.parametrize("tgq_inputs", [False, True])
@pytest.mark.parametrize("post_gelu", [False, True])
def test_linear_search_on_integers_equals_the_cpu_s(post_gelu, tgq_inputs):
    """Phase 3 takes the integer unit on CUDA and chooses the CPU's scales."""
    cfg = PLUS.Settings(
        wbits=6, abits=6, metric="hessian", rounds=2, edge_bits=None, cond_bits=None,
        tgq_inputs=tgq_inputs, smoothquant=False, rounding="nearest", input_group=None,
        dynamic_products=False, weight_group=None, hadamard=False, rank=None, rows=None,
        fit_last=False, tune_epochs=None, tag="plus",
    )  # fmt: skip
    found, one = [], torch.tensor(1.0)
    for device in (CPU, CUDA):
        layer, data = linear_case(device)
        of_weight = q.WeightLoss(layer.weight, q.GeluQuantizer(6, one, one))
        tried = [q.UniformQuantizer(6, one, one)]
        on_codes = int_losses.on_integers(of_weight, tried, data) is not of_weight
        assert device == CPU or on_codes
        layer = layer_of(layer, post_gelu=post_gelu)
        state = PLUS.quantize_linear(layer, data, cfg, FastSearch)["state"]
        scales = [x for key, x in state["act"].items() if key.startswith("scale")]
        found.append([state["weight"]["scale"], *scales])
    assert all(near(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_int_error_equals_the_cpu_s(bits):
    """Integers do not round: only the last multiplication and subtraction do."""
    x, w, z = torch.randn(64, 32), torch.randn(16, 32), torch.randn(64, 16)
    Q_X, _ = q.uniform_candidates(*x.aminmax(), bits)
    Q_W, _ = q.uniform_candidates(*w.aminmax(dim=1, keepdim=True), bits)
    terms, weight = p.input_codes(Q_X, x, None), p.weight_codes(Q_W, w)
    on_gpu = [p.Codes(*(v.cuda() for v in codes)) for codes in (*terms, weight)]
    cuda = p.int_error(on_gpu[:1], on_gpu[1], z.cuda())
    torch.testing.assert_close(p.int_error(terms, weight, z), cuda.cpu(), rtol=1e-6, atol=1e-5)


def test_chunks_arrive_in_order_while_others_are_worked_on():
    """Every chunk is the host's, the shorter last one too, though only two buffers exist."""
    data = linear_data(torch.randn(1000, 300), x=torch.arange(1000.0), rows=64)
    chunks = [type(chunk)(*(x.pin_memory() for x in chunk)) for chunk in data.chunks]
    heavy = torch.randn(2000, 2000, device="cuda")
    sums = []
    for chunk in offload.prefetch(chunks, CUDA):
        for _ in range(20):
            heavy = heavy @ heavy * 1e-3
        sums.append(torch.stack([chunk.grad.sum(), chunk.x.sum()]))
    expected = torch.stack([torch.stack([chunk.grad.sum(), chunk.x.sum()]) for chunk in chunks])
    torch.testing.assert_close(torch.stack(sums).cpu(), expected, rtol=1e-4, atol=1e-2)


def test_phases_2_and_3_equal_the_cpu_s(tiny_run, tmp_path):
    """The scripts on CUDA: gradients to 1e-4, scales to a near-tie, and the peak is printed."""
    shutil.copy(tiny_run / "calib.pt", tmp_path / "calib.pt")
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    wide = {"02_grad_cache": [], "03_quantize": ["--memory-limit", "64"]}  # or rows are too few
    for name, own in wide.items():
        flags = ["--run", tmp_path, "--device", "cuda", *FLAGS[name].split(), *own]
        result = run_script(name, *flags, env=visible)
        assert result.returncode == 0, result.stderr
        assert "peak GPU memory" in result.stdout
    for unit in ("embed", "block_00", "final"):
        path, made_by = f"grads/{unit}.pt", "02_grad_cache.py"
        files = [load_artifact(run / path, "grads", made_by) for run in (tiny_run, tmp_path)]
        for cpu, cuda in zip(*(file["unit_grads"] for file in files), strict=True):
            assert (cpu - cuda).norm() <= 1e-4 * cpu.norm()
    path, made_by = "quant_w6a6.pt", "03_quantize.py"
    cpu, cuda = (load_artifact(run / path, "quant", made_by) for run in (tiny_run, tmp_path))
    assert abs(cpu["report"]["snr_weighted"] - cuda["report"]["snr_weighted"]) < 0.5
    for name, layer in cpu["layers"].items():
        if "weight" in layer:
            scale, other = (x["layers"][name]["weight"]["scale"] for x in (cpu, cuda))
            assert ((scale - other).abs() <= 0.03 * scale).float().mean() > 0.95, name
