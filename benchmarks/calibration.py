"""Phases 2 and 3 against their floor, the candidates' matrix products alone.

The model has random weights, all gates open, in a named shape; its calibration rows are noise. For
each kind of layer the table counts the candidates' products of Phase 3 and their bytes (both
factors read, the result written, once each), and shows three times of this one run: the least that
the machine's own rate of products and bandwidth allow, the products alone (every 10th is timed, in
the chunks that 03 takes and in the numbers it takes: codes where it runs on integers), and the
layer's whole search. Below it 02 and 03 themselves, as processes: time, memory, disk.

    python benchmarks/calibration.py --model DiT-S/8
    python benchmarks/calibration.py --model DiT-S/8 --depth 1 --rows 40 --reference --scaling
    python benchmarks/calibration.py --model DiT-XL/2 --paper

--paper only counts. --reference does the same searches the plain way: for every layer a pass
through the whole network and back, then one candidate at a time over all rows. --scaling doubles
rows, depth and width.
"""

import argparse
import contextlib
import os
import tempfile
import time
from pathlib import Path

import torch
from plain_way import plain_way
from random_run import flags_of, load_script, run_phase, write_run
from sampling import dit, hardware

BASE = "--wbits 8 --abits 8"
HEADER = "| layer | products, TFLOP | TB | by count, s | products alone, s | search, s | ratio |"
PHASE2, PHASE3 = load_script("02_grad_cache"), load_script("03_quantize")


def seconds(function, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def product_of(a, b):
    """A function that multiplies the two once: codes on CUDA where they are matrices, as 03."""
    if a.is_cuda and a.ndim == 2 and a.shape[0] > 16 and not any(n % 8 for n in b.shape):
        a, b = a.to(torch.int8), b.T.contiguous().to(torch.int8).T
        return lambda: torch._int_mm(a, b)
    out = a @ b
    return lambda: torch.matmul(a, b, out=out)


def machine(device):
    """Its rates: operations/s of the best of three large products, bytes/s of a large copy."""
    size = 8192 if device.type == "cuda" else 1536
    a, big = torch.randn(size, size, device=device), torch.empty(2**26, device=device)
    other = torch.empty_like(big)
    product = product_of(a, a)
    rate = 2 * size**3 / min(seconds(product, device) for _ in range(4))
    return rate, 2 * 4 * 2**26 / min(seconds(lambda: other.copy_(big), device) for _ in range(4))


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
    tokens = (args.input_size // config["patch_size"]) ** 2
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


def operands(chunk, layer, args):
    """The two factors of a layer's product for one chunk, and what is to be computed of them."""
    if isinstance(layer, dit.MatMul):
        _, _, a, b, _ = chunk
        return a.to(args.device), b.to(args.device)
    _, _, x, _ = PHASE3.as_matrices(layer, *chunk)
    return x.to(args.device), layer.weight.flatten(1).T


def alone(chunks, layer, candidates, args):
    """Operations, bytes, and seconds of a layer's candidate products and nothing else."""
    work, moved, spent = 0, 0, 0.0
    for chunk in chunks:
        a, b = operands(chunk, layer, args)
        out = a @ b
        work += 2 * out.numel() * a.shape[-1] * candidates
        moved += 4 * (a.numel() + b.numel() + out.numel()) * candidates
        product, some = product_of(a, b), range(candidates // 10)
        product()  # the first call sets things up
        spent += 10 * seconds(lambda p=product, some=some: [p() for _ in some], args.device)
    return work, moved, spent


def measure(run, args):
    """Kind of layer -> [operations, bytes, seconds of products, seconds of the search]."""
    calib, table = dit.load_calib(run), {}
    model = dit.explicit_products(dit.load_calibrated(calib))
    for unit in PHASE3.load_units(dit.units(model), model, calib, args):
        for name, chunks, find_steps in PHASE3.unit_layers(unit, model, args):
            whole = seconds(find_steps, args.device)
            count = count_candidates(name, args)
            found = *alone(chunks, model.get_submodule(name), count, args), whole
            kind = name.partition(".")[2].lstrip("0123456789.") if "blocks" in name else name
            table[kind] = [a + b for a, b in zip(table.get(kind, [0] * 4), found, strict=True)]
    return table


def print_table(table, rate, bandwidth):
    table = table | {"all": [sum(column) for column in zip(*table.values(), strict=True)]}
    print(f"\n{HEADER}\n" + "|---" * 7 + "|")
    for kind, (work, moved, products, whole) in table.items():
        floor = max(work / rate, moved / bandwidth)
        numbers = f"{work / 1e12:.3g} | {moved / 1e12:.3g} | {floor:.3g} | {products:.3g}"
        print(f"| {kind} | {numbers} | {whole:.3g} | {whole / products:.2f} |")
    return table["all"][2]


def scripts(run, flags, base):
    """02 and 03 as processes, against the seconds of the products alone."""
    total = 0
    for name, own in (("02_grad_cache", []), ("03_quantize", base)):
        spent, peak, text = run_phase(name, *flags, "--force", *own)
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


def scaling(folder, config, args):
    """Time of Phases 2 and 3 with rows, depth or width doubled, over the time without."""
    wide = {key: 2 * config[key] for key in ("hidden_size", "num_heads")}
    deep = dict(depth=2 * config["depth"])
    cases = dict(base=(config, args.rows), rows=(config, 2 * args.rows))
    cases |= dict(depth=(config | deep, args.rows), width=(config | wide, args.rows))
    times = {}
    for name, (shape, rows) in cases.items():
        run = folder / name
        write_run(run, shape, args, rows)
        common = ["--run", run, "--device", args.device, "--rounds", args.rounds]
        both = flags_of(PHASE2, *common[:4]), flags_of(PHASE3, *common, *BASE.split())
        phases = zip((PHASE2, PHASE3), both, strict=True)
        times[name] = sum(seconds(lambda c=c: quietly(*c), args.device) for c in phases)
    print("\n| doubled | time of Phases 2 and 3, x |\n|---|---|")
    for name in ("rows", "depth", "width"):
        print(f"| {name} | {times[name] / times['base']:.2f} |")


def main(args):
    config = dit.DiT_models[args.model] | ({"depth": args.depth} if args.depth else {})
    if args.paper:
        return on_paper(config, args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        write_run(run, config, args, args.rows)
        flags = ["--run", run, "--device", args.device]
        limit = ["--memory-limit", args.memory_limit] if args.memory_limit else []
        base = [*BASE.split(), "--rounds", args.rounds, *limit]
        what = f"{args.model}, depth {config['depth']}, {args.rows} rows, R = {args.rounds}"
        print(f"\n{what}: {hardware(args.device)}; torch {torch.__version__}")
        rate, bandwidth = machine(args.device)
        print(f"products at {rate / 1e12:.3g} TOP/s, copies at {bandwidth / 1e9:.3g} GB/s")
        both = scripts(run, flags, base)
        phase3 = flags_of(PHASE3, *flags, *base)
        products = print_table(measure(run, phase3), rate, bandwidth)
        print(f"\n02 and 03 take {both / products:.2f} x the time of the products alone")
        if args.reference:
            side_by_side(run, phase3)
        if args.scaling:
            scaling(Path(folder), config, args)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=sorted(dit.DiT_models), default="DiT-S/8")
    p.add_argument("--depth", type=int, help="blocks, if not all")
    p.add_argument("--rows", type=int, default=320, help="n G")
    p.add_argument("--groups", type=int, default=10)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--memory-limit", type=int, help="of 03")
    p.add_argument("--reference", action="store_true", help="time the plain way as well")
    p.add_argument("--scaling", action="store_true", help="double rows, depth, width")
    p.add_argument("--paper", action="store_true", help="count the blocks' products, run nothing")
    p.add_argument("--input-size", type=int, default=32, help="for --paper: of x, 64 at 512 px")
    p.add_argument("--folder", type=Path, help="where there is space for the run")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=dit.pick_device, default=device)
    return p.parse_args()


if __name__ == "__main__":
    dit.run_script(main, parse_args)
