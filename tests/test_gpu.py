"""Every quantizer and search on CUDA equals the CPU's: `pytest -m gpu`."""

import os
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import FLAGS, load_script, run_script

import models_dit as m
import quant_ops as q

PHASE3 = load_script("03_quantize")

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
    step, zero = q.qparams_from_range(x.min(), x.max(), bits)
    cases = [
        both(lambda x, s, z: q.fake_quant(x, s, z, bits), x, step, zero),
        both(lambda x, s: q.mrq_softmax(x, s, bits), x.sigmoid(), s1),
        both(lambda x, a, b: q.mrq_gelu(x, a, b, bits), x, s1, s2),
    ]
    for cpu, cuda in cases:
        assert (cpu != cuda).float().mean() < 1e-3
    codes = torch.randint(0, 2**bits, (999,))
    cpu, cuda = both(lambda c: q.unpack_codes(q.pack_codes(c, bits), bits, (999,)), codes)
    assert torch.equal(cpu, cuda)


OPTIONS = dict(
    wbits=6, abits=6, metric="hessian", mrq=True, rounds=2, weight_granularity="channel",
    tgq_inputs=False, rounding="nearest", compile=False,
)  # fmt: skip
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def near(a, b):
    """Step sizes that differ by one place of the grid of alphas at most: near-ties."""
    return ((a.cpu() - b.cpu()).abs() <= 0.03 * a.cpu().abs()).all()


def linear_chunks(rows=512, chunk=200):
    """A layer (48, 64) and its chunks (grad, y less bias, x, group)."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48).requires_grad_(False)
    x = torch.nn.functional.gelu(2 * torch.randn(rows, 64))
    columns = torch.randn(rows, 48), x @ layer.weight.T, x, torch.arange(rows) * 4 // rows
    return layer, list(zip(*(column.split(chunk) for column in columns), strict=True))


@pytest.mark.parametrize("tgq_inputs", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "gelu"])
def test_linear_search_on_integers_equals_the_cpu_s(kind, tgq_inputs):
    """Phase 3 takes the integer unit on CUDA and chooses the CPU's step sizes."""
    layer, chunks = linear_chunks()
    found = []
    for device in (CPU, CUDA):
        args = Namespace(**OPTIONS | dict(tgq_inputs=tgq_inputs), device=device)
        weight = layer.weight.to(device)
        product = q.FloatProduct
        if device == CUDA:
            product = PHASE3.product_for(weight, chunks, kind, args)
            assert product is q.IntProduct
        _, step, _, act = PHASE3.quantize_linear(weight, chunks, kind, args, None, product)
        found.append([step, *act.buffers()])
    assert all(near(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_int_error_equals_the_cpu_s(bits):
    """Integers do not round: only the last multiplication and subtraction do."""
    x, w = torch.randn(64, 32), torch.randn(16, 32)
    act, _ = q.uniform_candidates(*x.aminmax(), bits)
    terms, step_zero = act.codes(x), q.qparams_from_range(*w.aminmax(dim=1, keepdim=True), bits)
    weight = q.signed_codes(w, *step_zero, bits)
    y, on_gpu = torch.randn(64, 16), [q.Codes(*(v.cuda() for v in c)) for c in (*terms, weight)]
    cuda = q.int_error(on_gpu[:1], on_gpu[1], y.cuda())
    torch.testing.assert_close(q.int_error(terms, weight, y), cuda.cpu(), rtol=1e-6, atol=1e-5)


def test_chunks_arrive_in_order_while_others_are_worked_on():
    """Every chunk is the host's, the shorter last one too, though only two buffers exist."""
    columns = torch.randn(1000, 300).pin_memory(), torch.arange(1000).pin_memory()
    chunks = list(zip(*(column.split(64) for column in columns), strict=True))
    heavy = torch.randn(2000, 2000, device="cuda")
    sums = []
    for x, i in m.on_device(chunks, CUDA):
        for _ in range(20):
            heavy = heavy @ heavy * 1e-3
        sums.append(torch.stack([x.sum(), i.sum().float()]))
    expected = torch.stack([torch.stack([x.sum(), i.sum().float()]) for x, i in chunks])
    torch.testing.assert_close(torch.stack(sums).cpu(), expected, rtol=1e-4, atol=1e-2)


def test_phases_2_and_3_equal_the_cpu_s(tiny_run, tmp_path):
    """The scripts on CUDA: gradients to 1e-4, steps to a near-tie, and the peak is printed."""
    shutil.copy(tiny_run / "calib.pt", tmp_path / "calib.pt")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    wide = {"02_grad_cache": [], "03_quantize": ["--memory-limit", "64"]}  # or rows are too few
    for name, own in wide.items():
        flags = ["--run", tmp_path, "--device", "cuda", *FLAGS[name].split(), *own]
        result = run_script(name, *flags, env={"CUDA_VISIBLE_DEVICES": visible})
        assert result.returncode == 0, result.stderr
        assert "peak GPU memory" in result.stdout
    for unit in ("embed", "block_00", "final"):
        files = [m.load_state(run / "grads" / f"{unit}.pt", "") for run in (tiny_run, tmp_path)]
        for cpu, cuda in zip(*(file["unit_grads"] for file in files), strict=True):
            assert (cpu - cuda).norm() <= 1e-4 * cpu.norm()
    cpu, cuda = (m.load_state(run / "quant_w6a6.pt", "") for run in (tiny_run, tmp_path))
    assert abs(cpu["report"]["snr_weighted"] - cuda["report"]["snr_weighted"]) < 0.5
    for name, layer in cpu["layers"].items():
        if "weight" in layer:
            same = (layer["weight"]["step"] - cuda["layers"][name]["weight"]["step"]).abs()
            assert (same <= 0.03 * layer["weight"]["step"]).float().mean() > 0.95, name
