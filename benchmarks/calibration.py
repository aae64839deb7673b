"""Phases 2 and 3 against all their candidates' matrix products alone.

The model has random weights, all gates open, in a named shape; its calibration rows are noise. For
each kind of layer the table counts the candidates' products of Phase 3 and their bytes (both
factors read, the result written, once each), and shows four times of this one run: the least that
the machine's own rate of products and bandwidth allow, the products alone in fp32 and in the
numbers that 03 takes (codes where it runs on integers), and the layer's whole search; last, the
share of losses that 03 computes, for candidates that cannot win any more sit out. Every 10th
product is timed, in 03's chunks. Before it 02 and 03 themselves, as processes: time, memory, disk.

    python benchmarks/calibration.py --model DiT-S/8
    python benchmarks/calibration.py --model DiT-S/8 --depth 1 --rows 40 --reference --scaling
    python benchmarks/calibration.py --model DiT-XL/2 --no-layers --compile
    python benchmarks/calibration.py --model DiT-XL/2 --depth 1 --rounds 1 --stand-in
    python benchmarks/calibration.py --model DiT-XL/2 --paper

--stand-in counts the GPU memory of 02 and 03 without a GPU; --paper only counts operations.
--reference does the same searches the plain way: for every layer a pass through the whole network
and back, then one candidate at a time over all rows. --scaling doubles rows, depth and width.
"""

import argparse
import contextlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from plain_way import plain_way
from random_run import flags_of, load_script, run_phase, write_run
from sampling import ROOT, dit, hardware, q

BASE = "--wbits 8 --abits 8"
COLUMNS = ["layer", "products, TFLOP", "TB", "by count, s", "fp32 products, s", "products, s"]
COLUMNS += ["search, s", "search / fp32 products", "search / products", "losses computed"]
STAND_IN = ROOT / "tests" / "stand_in_cuda.py"
PHASE2, PHASE3 = load_script("02_grad_cache"), load_script("03_quantize")


def seconds(function, device):
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


def machine(device):
    """Its rates: operations/s of large products, in fp32 and on codes, and bytes/s of a copy."""
    size = 8192 if device.type == "cuda" else 1536
    a, big = torch.randn(size, size, device=device), torch.empty(2**26, device=device)
    other = torch.empty_like(big)
    rates = []
    for integers in (False, q.has_int_unit(device)):
        product = product_of(a, a, integers)
        rates.append(2 * size**3 / min(seconds(product, device) for _ in range(4)))
    return rates, 2 * 4 * 2**26 / min(seconds(lambda: other.copy_(big), device) for _ in range(4))


def count_candidates(name, args):
    """How many products the search of one layer takes for each row."""
    if name.endswith("x_embedder.proj"):  # D6: of the convolution only the weight, once
        return 100
    sides = (20, 100) if name.endswith("attn.av") else (100, 100)
    if name.endswith("mlp.fc2"):  # MRQ has two steps to search
        sides = (100, 100, 100)
    return args.rounds * sum(sides)


def on_paper(config, args):
    """The blocks' candidate products by their shapes alone: operations, and results of 4 bytes."""
    width, heads = config["hidden_size"], config["num_heads"]
    tokens = ((args.input_size or config.get("input_size", 32)) // config["patch_size"]) ** 2
    shapes = {  # length of the sums, results for one row
        "attn.qkv": (width, 3 * tokens * width),
        "attn.qk": (width // heads, heads * tokens**2),
        "attn.av": (tokens, tokens * width),
        "attn.proj": (width, tokens * width),
        "mlp.fc1": (width, 4 * tokens * width),
        "mlp.fc2": (4 * width, tokens * width),
    }
    print("| layer | candidates | products, PFLOP | results, TB |\n|---|---|---|---|")
    total = torch.zeros(2, dtype=torch.float64)
    for kind, (length, results) in shapes.items():
        count = count_candidates(kind, args)
        results *= count * args.rows * config["depth"]
        both = torch.tensor([2 * length * results / 1e15, 4 * results / 1e12], dtype=total.dtype)
        print(f"| {kind} | {count} | {both[0]:.3g} | {both[1]:.3g} |")
        total += both
    print(f"| all | | {total[0]:.3g} | {total[1]:.3g} |")


def on_integers(name, layer, chunks, args):
    """Whether 03 multiplies this layer's candidates as codes."""
    if isinstance(layer, dit.MatMul):
        return False
    chunks = [PHASE3.as_matrices(layer, *chunk) for chunk in chunks]
    kind = "fp" if name.endswith("x_embedder.proj") else "uniform"  # D6
    return PHASE3.product_for(layer.weight.flatten(1), chunks, kind, args) is q.IntProduct


def operands(chunk, layer, args):
    """The two factors of a layer's product for one chunk."""
    if isinstance(layer, dit.MatMul):
        _, _, a, b, _ = chunk
        return a.to(args.device), b.to(args.device)
    _, _, x, _ = PHASE3.as_matrices(layer, *chunk)
    return x.to(args.device), layer.weight.flatten(1).T


def alone(chunks, layer, candidates, integers, args):
    """Operations and bytes of a layer's candidate products, and seconds of them and nothing else,
    in fp32 and in the numbers that 03 takes."""
    work, moved, spent, some = 0, 0, [0.0, 0.0], range(candidates // 10)
    for chunk in chunks:
        a, b = operands(chunk, layer, args)
        results = a.numel() // a.shape[-1] * b.shape[-1]
        work += 2 * results * a.shape[-1] * candidates
        size = 1 if integers else 4  # bytes of a factor's number
        moved += (size * (a.numel() + b.numel()) + 4 * results) * candidates
        for i in range(1 + integers):
            product = product_of(a, b, integers=i == 1)
            product()  # the first call sets things up
            spent[i] += 10 * seconds(lambda p=product: [p() for _ in some], args.device)
    return work, moved, spent[0], spent[integers]


@contextlib.contextmanager
def losses_counted():
    """A list whose one number tells how many losses 03's searches have computed meanwhile."""
    found, search = [0], PHASE3.search

    def counting(loss_of, *rest):
        def counted(*chunk_and_candidate):
            found[0] += 1
            return loss_of(*chunk_and_candidate)

        return search(counted, *rest)

    PHASE3.search = counting
    try:
        yield found
    finally:
        PHASE3.search = search


def measure(run, rates, bandwidth, args):
    """Kind of layer -> [operations, bytes, seconds by count, of products in fp32 and as 03 makes
    them, of the search; losses of all candidates and chunks, and those computed]."""
    calib, table = dit.load_calib(run), {}
    model = dit.explicit_products(dit.load_calibrated(calib))
    for unit in PHASE3.load_units(dit.units(model), model, calib, args):
        for name, chunks, find_steps in PHASE3.unit_layers(unit, model, args):
            with losses_counted() as computed:
                whole = seconds(find_steps, args.device)
            layer = model.get_submodule(name)
            integers, count = on_integers(name, layer, chunks, args), count_candidates(name, args)
            work, moved, *products = alone(chunks, layer, count, integers, args)
            floor = max(work / rates[integers], moved / bandwidth)
            found = work, moved, floor, *products, whole, count * len(chunks), *computed
            kind = name.partition(".")[2].lstrip("0123456789.") if "blocks" in name else name
            before = table.get(kind, [0] * len(found))
            table[kind] = [a + b for a, b in zip(before, found, strict=True)]
    return table


def print_table(table):
    """Prints it; returns the seconds of all products, in fp32 and as 03 makes them."""
    table = table | {"all": [sum(column) for column in zip(*table.values(), strict=True)]}
    print(f"\n| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
    for kind, (work, moved, floor, fp32, products, whole, losses, computed) in table.items():
        numbers = [work / 1e12, moved / 1e12, floor, fp32, products, whole]
        ratios = f"{whole / fp32:.2f} | {whole / products:.2f} | {computed / losses:.2f}"
        print(" | ".join([f"| {kind}", *(f"{x:.3g}" for x in numbers), f"{ratios} |"]))
    return table["all"][3:5]


def scripts(run, flags, base, launcher=()):
    """02 and 03 as processes: seconds of both."""
    total = 0
    for name, own in (("02_grad_cache", []), ("03_quantize", base)):
        spent, peak, text = run_phase(name, *flags, "--force", *own, launcher=launcher)
        gpu = [line for line in text.splitlines() if line.startswith("peak GPU")]
        print(f"{name}: {spent:.1f} s", f"peak host memory {peak:.0f} MiB", *gpu, sep=", ")
        total += spent
    disk = sum(file.stat().st_size for file in (run / "grads").glob("*.pt"))
    print(f"grads/: {disk / 2**20:.0f} MiB")
    return total


def quietly(phase, args):
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        phase.main(args)


def side_by_side(run, args):
    """Blocks by Phases 2 and 3, and by the plain way: ratio of times, share of equal steps."""
    calib, ours, plain = dit.load_calib(run), {}, {}
    model = dit.explicit_products(dit.load_calibrated(calib))
    phase2 = flags_of(PHASE2, "--run", run, "--device", args.device, "--force")

    def both_phases():
        quietly(PHASE2, phase2)
        blocks = [name for name in dit.units(model) if name.startswith("block")]
        for unit in PHASE3.load_units(blocks, model, calib, args):
            ours.update(PHASE3.quantize_unit(unit, model, args))

    fast = seconds(both_phases, args.device)
    model.to(args.device)
    layers = PHASE3.RELEASED["block"]
    slow = seconds(lambda: plain.update(plain_way(model, layers, calib, args)), args.device)
    equal = []
    for name, step in plain.items():
        found = ours[name]["state"].get("weight") or ours[name]["state"]["a"]
        mine = found["step1"] if "step1" in found else found["step"]
        equal.append(torch.isclose(mine, step.cpu(), rtol=1e-5).float().flatten())
    print(f"\nthe plain way takes {slow / fast:.2f} x the time of Phases 2 and 3 here, ", end="")
    print(f"and chooses {torch.cat(equal).mean():.2%} of the same steps")


def scaling(folder, config, base, args):
    """Time of Phases 2 and 3 with rows, depth or width doubled, over the time without."""
    wide = {key: 2 * config[key] for key in ("hidden_size", "num_heads")}
    deep = dict(depth=2 * config["depth"])
    cases = dict(base=(config, args.rows), rows=(config, 2 * args.rows))
    cases |= dict(depth=(config | deep, args.rows), width=(config | wide, args.rows))
    times = {}
    for name, (shape, rows) in cases.items():
        run = folder / name
        write_run(run, shape, args, rows)
        common = ["--run", run, "--device", args.device]
        both = flags_of(PHASE2, *common), flags_of(PHASE3, *common, *base)
        phases = zip((PHASE2, PHASE3), both, strict=True)
        times[name] = sum(seconds(lambda c=c: quietly(*c), args.device) for c in phases)
    print("\n| doubled | time of Phases 2 and 3, x |\n|---|---|")
    for name in ("rows", "depth", "width"):
        print(f"| {name} | {times[name] / times['base']:.2f} |")


def main(args):
    own = ["--preset", args.preset, *(["--rounds", args.rounds] if args.rounds else [])]
    args.rounds = flags_of(PHASE3, "--run", ".", *BASE.split(), *own).rounds
    config = dit.DiT_models[args.model] | ({"depth": args.depth} if args.depth else {})
    if args.paper:
        return on_paper(config, args)
    if args.preset != "paper" and (args.layers or args.reference) and not args.stand_in:
        raise dit.InputError(f"--preset {args.preset}: products are counted for the paper's method "
                             "only; give --no-layers or --stand-in")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        write_run(run, config, args, args.rows)
        flags = ["--run", run, "--device", args.device]
        base = [*BASE.split(), "--preset", args.preset, "--rounds", args.rounds]
        base += ["--compile"] * args.compile
        base += ["--memory-limit", args.memory_limit] if args.memory_limit else []
        what = f"{args.model}, depth {config['depth']}, {args.rows} rows, R = {args.rounds}"
        what += f", {args.preset} preset" * (args.preset != "paper")
        print(f"\n{what}: {hardware(args.device)}; torch {torch.__version__}")
        if args.stand_in:
            return scripts(run, ["--run", run, "--device", "cuda"], base, [STAND_IN])
        rates, bandwidth = machine(args.device)
        in_tops = " and ".join(f"{rate / 1e12:.3g}" for rate in rates)
        print(f"fp32 and 03's products at {in_tops} TOP/s, copies at {bandwidth / 1e9:.3g} GB/s")
        both = scripts(run, flags, base)
        phase3 = flags_of(PHASE3, *flags, *base)
        if args.layers:
            ratios = [both / x for x in print_table(measure(run, rates, bandwidth, phase3))]
            print("\n02 and 03 / products in fp32, / 03's own: {:.2f}, {:.2f}".format(*ratios))
        if args.reference:
            side_by_side(run, phase3)
        if args.scaling:
            scaling(Path(folder), config, base, args)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=sorted(dit.DiT_models), default="DiT-S/8")
    p.add_argument("--depth", type=int, help="blocks, if not all")
    p.add_argument("--rows", type=int, default=320, help="n G")
    p.add_argument("--groups", type=int, default=10)
    p.add_argument("--rounds", type=int, help="of 03, whose default holds if not given")
    p.add_argument("--preset", choices=tuple(PHASE3.PRESETS), default="paper", help="of 03")
    p.add_argument("--memory-limit", type=int, help="of 03")
    p.add_argument("--compile", action="store_true", help="of 03")
    layers = "measure layer by layer too, not only 02 and 03 as processes"
    p.add_argument("--layers", action=argparse.BooleanOptionalAction, default=True, help=layers)
    p.add_argument("--reference", action="store_true", help="time the plain way as well")
    p.add_argument("--scaling", action="store_true", help="double rows, depth, width")
    stand_in = "02 and 03 on a CUDA device that the CPU plays: memory, and no time of meaning"
    p.add_argument("--stand-in", action="store_true", help=stand_in)
    p.add_argument("--paper", action="store_true", help="count the blocks' products, run nothing")
    p.add_argument("--input-size", type=int, help="for --paper: of x, 64 at 512 px")
    p.add_argument("--folder", type=Path, help="where there is space for the run")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=dit.pick_device, default=device)
    return p.parse_args()


if __name__ == "__main__":
    dit.run_script(main, parse_args)
