"""The plain way to do Phases 2 and 3 at W8A8: as slow as it is short.

For every layer one pass through the whole network and back, then `quant_ops.search`: one candidate
after the other over all rows at once. Nothing is kept, split up or shared between layers. Says how
many of the scales in RUN/quant_w8a8.pt, which 03 chose, it chooses too; `calibration.py
--reference` compares the times.
"""

import torch

import processes  # noqa: F401  puts the repository root on the path
from random_run import released_layers

from common.checkpoints import load_calib, load_calibrated
from common.cli import Parser, run_script, whole_number
from common.layer_data import layer_data
from common.offload import in_batches, units
from common.unit_data import Unit
from common.quant_file import load_quant
from models_dit import Diffusion, MatMul, explicit_products
from quant_ops import (
    FullPrecision, InputLoss, LossOfA, LossOfB, WeightLoss, gelu_candidates, join_groups, search,
    softmax_candidates, uniform_candidates,
)  # fmt: skip

BITS = 8
ONE_CHUNK = 2**20  # MiB of memory: all rows at once


def parse_args():
    p = Parser(__doc__)
    p.machine.add_argument("--batch-size", type=whole_number, default=8, help="rows of a pass")
    return p.parse_args()


def whole_network(model, calib, batch_size, device):
    """The network as a function, and as one unit: its inputs, and dL/d(eps_theta) of Eq. (11)."""
    rows, diffusion = calib["calibration"], Diffusion(calib["settings"]["steps"])
    inputs = [rows["x"], diffusion.timestep_map[rows["t"]], rows["y"]]

    def eps_theta(x, t, y):
        return (model(x, t, y)[:, : model.in_channels],)

    (out,) = in_batches(eps_theta, inputs, batch_size, device)
    eps = diffusion.implied_eps(rows["x"], rows["x_0"], rows["t"])
    return eps_theta, Unit("network", inputs, [2 * (out - eps)], rows["group"])


def search_linear(weight, spec, data, rounds, search):
    """Alg. 1 lines 15-22 of a weight (O, I): Q_W."""
    Q_W, weights = uniform_candidates(*weight.aminmax(dim=1, keepdim=True), BITS)
    if spec.reads_image:  # D6
        return search(weights, data, WeightLoss(weight, FullPrecision()))
    if spec.post_gelu:
        Q_X, grids = gelu_candidates(*data.range("x"), BITS)
    else:
        Q_X, inputs = uniform_candidates(*data.range("x"), BITS)
        grids = [lambda _: inputs]
    for _ in range(rounds):
        Q_W = search(weights, data, WeightLoss(weight, Q_X))
        for around in grids:
            Q_X = search(around(Q_X), data, InputLoss(weight, Q_W))
    return Q_W


def search_matmul(spec, data, rounds, search):
    """Lines 23-33: Q_A."""
    Q_B, B = uniform_candidates(*data.range("b"), BITS)
    parts, A = [data], uniform_candidates(*data.range("a"), BITS)[1]
    if spec.post_softmax:
        parts = [data.of_group(i) for i in range(data.num_groups)]
        A = softmax_candidates(BITS, data.device)
    for _ in range(rounds):
        found = [search(A, rows, LossOfA(Q_B)) for rows in parts]
        Q_A = join_groups(found) if spec.post_softmax else found[0]
        Q_B = search(B, data, LossOfB(Q_A))
    return Q_A


def search_layer(layer, spec, data, rounds, search):
    """The paper's method for one layer: Q_W or Q_A."""
    if isinstance(layer, MatMul):
        return search_matmul(spec, data, rounds, search)
    return search_linear(layer.weight.detach().flatten(1), spec, data, rounds, search)


def same_scales(quantizer, state):
    """Which scales of Q_W or Q_A are those of a layer's state."""
    stored = state["a"] if state["type"] == "matmul" else state["weight"]
    scale = quantizer.scale1 if "scale1" in stored else quantizer.scale
    return torch.isclose(scale.cpu(), stored.get("scale1", stored.get("scale")), 1e-5).flatten()


def main(args):
    calib, quant = load_calib(args.run), load_quant(args.run / "quant_w8a8.pt")
    model = explicit_products(load_calibrated(calib)).to(args.device)
    function, network = whole_network(model, calib, args.batch_size, args.device)
    same = []
    for unit in units(model):
        for name, spec in released_layers(model, unit).items():
            layer, where = model.get_submodule(name), (args.batch_size, ONE_CHUNK, args.device)
            data = layer_data(function, layer, network, *where)
            found = search_layer(layer, spec, data, quant["settings"]["rounds"], search)
            same.append(same_scales(found, quant["layers"][name]))
    print(f"of 03's scales, {torch.cat(same).double().mean():.2%} are the plain way's")


if __name__ == "__main__":
    run_script(main, parse_args)
