"""The searches of Phase 3, layer by layer, beside their candidates' matrix products alone.

For each kind of layer the table counts the products and their bytes (both factors read, the result
written, once each), and shows four times of one run: the least that the machine's own rate of
products and bandwidth allow, the products alone in fp32 and in the numbers that 03 takes (codes
where it runs on integers), and the whole search; last, the share of losses that are computed, for
candidates that cannot win are pruned. Every 10th product is timed, in 03's chunks.
"""

import time
from collections import defaultdict
from functools import partial

import torch

from plain_way import search_layer
from random_run import released_layers

from common.checkpoints import load_calib, load_calibrated
from common.fast_search import FastSearch
from common.int_losses import on_integers
from common.layer_data import layer_data
from common.offload import unit_on, units
from common.unit_data import load_units
from engine.int_products import has_int_unit
from models_dit import MatMul, explicit_products
from quant_ops import FullPrecision, UniformQuantizer, WeightLoss

COLUMNS = ["layer", "products, TFLOP", "TB", "by count, s", "fp32 products, s", "products, s"]
COLUMNS += ["search, s", "search / fp32 products", "search / products", "losses computed"]
BATCH = 8  # rows of a unit's passes, 03's default


def seconds(function, device):
    """Seconds that a call takes."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def product_of(a, b, integers):
    """A function that multiplies the two once, as int8 codes or in fp32."""
    if integers:
        a, b = a.to(torch.int8), b.T.contiguous().to(torch.int8).T
        return lambda: torch._int_mm(a, b)
    out = a @ b
    return lambda: torch.matmul(a, b, out=out)


def machine_rates(device):
    """Operations/s of large products, in fp32 and in the numbers 03 takes, and bytes/s of a copy;
    printed too."""
    size = 8192 if device.type == "cuda" else 1536
    a, big = torch.randn(size, size, device=device), torch.empty(2**26, device=device)
    other, rates = torch.empty_like(big), []
    for integers in (False, has_int_unit(device)):
        product = product_of(a, a, integers)
        rates.append(2 * size**3 / min(seconds(product, device) for _ in range(4)))
    copy = min(seconds(lambda: other.copy_(big), device) for _ in range(4))
    bandwidth = 2 * 4 * 2**26 / copy
    in_tops = " and ".join(f"{rate / 1e12:.3g}" for rate in rates)
    print(f"fp32 and 03's products at {in_tops} TOP/s, copies at {bandwidth / 1e9:.3g} GB/s")
    return *rates, bandwidth


def count_candidates(spec, rounds):
    """How many products the search of one layer takes for each row."""
    if spec.reads_image:  # D6: only the weight, once
        return 100
    scales = [100, 100] + [100] * spec.post_gelu  # MRQ has two scales to search
    if spec.post_softmax:
        scales[0] = 20
    return rounds * sum(scales)


def takes_integers(layer, spec, data):
    """Whether 03 multiplies this layer's candidates as codes."""
    if isinstance(layer, MatMul):
        return False
    one = torch.ones((), device=data.device)
    Q = UniformQuantizer(8, one, one)  # MRQ's two scales change nothing here
    loss = WeightLoss(layer.weight.detach().flatten(1), FullPrecision() if spec.reads_image else Q)
    return on_integers(loss, [Q], data) is not loss


def products_alone(layer, data, candidates, integers):
    """Operations and bytes of a layer's candidate products, and seconds of them and nothing else,
    in fp32 and in the numbers that 03 takes."""
    work, moved, spent, some = 0, 0, [0.0, 0.0], range(candidates // 10)
    for chunk in data:
        matmul = isinstance(layer, MatMul)
        a, b = (chunk.a, chunk.b) if matmul else (chunk.x, layer.weight.detach().flatten(1).T)
        results = a.numel() // a.shape[-1] * b.shape[-1]
        work += 2 * results * a.shape[-1] * candidates
        size = 1 if integers else 4  # bytes of a factor's number
        moved += (size * (a.numel() + b.numel()) + 4 * results) * candidates
        for i in range(1 + integers):
            product = product_of(a, b, integers=i == 1)
            product()  # the first call sets things up
            spent[i] += 10 * seconds(lambda p=product: [p() for _ in some], data.device)
    return work, moved, spent[0], spent[integers]


class CountedSearch(FastSearch):
    """A FastSearch that counts losses: of all candidates on all chunks, and those computed."""

    possible = computed = 0

    def __call__(self, candidates, data, loss):
        self.possible += len(candidates) * len(data.chunks)
        return super().__call__(candidates, data, loss)

    def losses(self, candidates, now, chunk, loss):
        self.computed += len(now)
        return super().losses(candidates, now, chunk, loss)


def measure(layer, spec, data, rates, args):
    """Of one layer: operations, bytes, seconds by count, of products in fp32 and as 03 makes them,
    and of the search; losses of all candidates and chunks, and those computed."""
    *rates, bandwidth = rates
    search, count = CountedSearch(args.compile), count_candidates(spec, args.rounds)
    function = partial(search_layer, layer, spec, data, args.rounds, search)
    whole, integers = seconds(function, data.device), takes_integers(layer, spec, data)
    work, moved, *products = products_alone(layer, data, count, integers)
    floor = max(work / rates[integers], moved / bandwidth)
    return work, moved, floor, *products, whole, search.possible, search.computed


def layer_table(run, rates, args):
    """Kind of layer -> `measure`, summed over its layers."""
    calib, table = load_calib(run), defaultdict(int)
    model = explicit_products(load_calibrated(calib))
    where = args.memory_limit, args.device
    for unit in load_units(run, units(model), model, calib, None, BATCH, args.device):
        with unit_on(model, unit.name, args.device) as function:
            for name, spec in released_layers(model, unit.name).items():
                layer = model.get_submodule(name)
                data = layer_data(function, layer, unit, BATCH, *where)
                found = measure(layer, spec, data, rates, args)
                kind = spec.name if spec.unit == "block" else name
                table[kind] = table[kind] + torch.tensor(found, dtype=torch.float64)
    return table


def print_table(table):
    """Prints it; returns the seconds of all products, in fp32 and as 03 makes them."""
    total = sum(table.values())
    print(f"\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    for kind, row in [*table.items(), ("all", total)]:
        work, moved, floor, fp32, products, whole, possible, computed = row.tolist()
        numbers = [work / 1e12, moved / 1e12, floor, fp32, products, whole]
        ratios = f"{whole / fp32:.2f} | {whole / products:.2f} | {computed / possible:.2f}"
        print(" | ".join([f"| {kind}", *(f"{x:.3g}" for x in numbers), f"{ratios} |"]))
    return total[3:5].tolist()
