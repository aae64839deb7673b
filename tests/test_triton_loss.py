"""engine/triton_loss.py: what a candidate costs, in one kernel; and the searches that take it.

Without a GPU the kernel runs in Triton's interpreter, if Triton is installed.
"""

import os

import pytest
import torch
from conftest import alternate, search_case

import quant_ops as q
from common import int_losses
from common.fast_search import FastSearch
from engine import int_products as p

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is first imported
pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from engine import triton_loss  # noqa: E402


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many of them even of small matrices, and fast in the interpreter."""
    if DEVICE.type == "cpu":
        for name in ("TILE", "TWO_SUMS"):
            monkeypatch.setattr(triton_loss, name, (32, 32, 32, 4, 2))


def quantizer(kind, x, group, bits):
    """Of inputs (R, I), with one scale or one for each time group."""
    ends = x.aminmax() if group is None else torch.stack(x.aminmax(dim=1)).view(2, 3, -1)
    if group is not None:
        ends = ends[0].amin(dim=1), ends[1].amax(dim=1)
    return (q.gelu_candidates if kind == "gelu" else q.uniform_candidates)(*ends, bits)[0]


@pytest.mark.parametrize("kind", ["uniform", "gelu"])
@pytest.mark.parametrize("by_group", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("rows, inputs, outputs", [(3, 16, 8), (150, 80, 72), (129, 144, 129)])
def test_loss_is_that_of_the_error(kind, by_group, by_channel, rows, inputs, outputs):
    """Eq. (16) of every output channel, sizes a whole number of tiles or not; nothing beyond the
    ends is counted."""
    torch.manual_seed(rows)
    x, W = torch.randn(rows, inputs, device=DEVICE), torch.randn(outputs, inputs, device=DEVICE)
    group = torch.arange(rows, device=DEVICE) * 3 // rows if by_group else None
    Q_X = quantizer(kind, x, group, 6)
    ends = W.aminmax(dim=1, keepdim=True) if by_channel else W.aminmax()
    terms = p.input_codes(Q_X, x, group)
    weight = p.weight_codes(q.uniform_candidates(*ends, 5)[0], W)
    z, grad = x @ W.T, torch.randn(rows, outputs, device=DEVICE)
    found = triton_loss.column_loss(terms, weight, z, grad)
    error = z.double() - Q_X(x, group).double() @ values(weight).T
    expected = q.hessian_loss(error, grad.double(), dim=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def values(weight):
    """The weight that codes stand for."""
    return weight.scale.double() * (weight.codes - weight.zero_point).double()


@pytest.mark.parametrize("gelu", [False, True])
def test_search_by_triton_chooses_what_the_plain_search_chooses(monkeypatch, gelu):
    """The same scales of weights and inputs."""
    monkeypatch.setattr(p, "column_loss", lambda device: triton_loss.column_loss)
    case = search_case(6, gelu, by_group=True)
    data, loss, tried = case[-1], q.WeightLoss(case[0], case[2]), case[1][1]
    assert int_losses.on_integers(loss, tried, data).product is int_losses.TRITON
    if DEVICE.type == "cuda":
        pytest.skip("the case lies on the CPU; test_gpu.py searches on CUDA")
    found, expected = (alternate(search, case, gelu) for search in (FastSearch(), q.search))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_self_test_tries_both_forms():
    """Inputs of one term and of two; a result that is wrong for either is found out."""

    def wrong_for(count):
        def column_loss(terms, *rest):
            return triton_loss.column_loss(terms, *rest) * (1.01 if len(terms) == count else 1)

        return column_loss

    assert p.is_right(triton_loss.column_loss, DEVICE)
    assert not p.is_right(wrong_for(1), DEVICE) and not p.is_right(wrong_for(2), DEVICE)


@pytest.mark.parametrize("capability, why", [((8, 0), "ZeroDivisionError"), ((7, 5), "older")])
def test_kernel_that_fails_is_not_taken(monkeypatch, capsys, capability, why):
    """`_int_mm` and passes over its result are taken instead, and a line says why; on a CPU they
    always are."""
    monkeypatch.setattr(triton_loss, "column_loss", lambda *args: 1 / 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(p, "is_right", lambda column_loss, device: column_loss())
    assert p.column_loss.__wrapped__(torch.device("cpu")) is None and not capsys.readouterr().out
    assert p.column_loss.__wrapped__(torch.device("cuda")) is None
    assert why in capsys.readouterr().out


def test_kernel_is_launched_on_the_device_of_its_data(monkeypatch):
    """Triton takes the current one, which is cuda:0 unless it is set."""
    entered = []

    class Guard(torch.cuda.device_of):
        def __enter__(self):
            entered.append(1)
            super().__enter__()

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    assert p.is_right(triton_loss.column_loss, DEVICE) and len(entered) == 2
