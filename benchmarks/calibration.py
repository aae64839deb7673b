"""Phases 2 and 3 of a model with random weights in a named shape, its calibration rows noise.

First 02 and 03 as processes: time, memory, disk. Then layer_table.py: for each kind of layer the
search beside its candidates' matrix products alone. Other questions are asked with a flag:

    python benchmarks/calibration.py --model DiT-S/8
    python benchmarks/calibration.py --model DiT-S/8 --depth 1 --rows 40 --reference --scaling
    python benchmarks/calibration.py --model DiT-XL/2 --no-layers --compile
    python benchmarks/calibration.py --model DiT-XL/2 --depth 1 --rounds 1 --fake-cuda
    python benchmarks/calibration.py --model DiT-XL/2 --paper

--reference: the same searches as plain_way.py does them, and how many scales are equal. --scaling:
rows, depth and width doubled. --fake-cuda counts the GPU memory of 02 and 03 without a GPU.
--paper only counts operations. --method plus times methods/tqdit_plus.py in 03's place.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from processes import ROOT, hardware
from layer_table import count_candidates, layer_table, machine_rates, print_table
from random_run import run_phase, write_run

from common.cli import pick_device, run_script
from common.errors import InputError
from models_dit import LAYERS, DiT_models

METHODS = {"tqdit": "03_quantize", "plus": "methods/tqdit_plus"}
FAKE_CUDA = ROOT / "tests" / "fake_cuda" / "fake_cuda.py"


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
    for spec in LAYERS:
        if spec.name in shapes:
            length, results = shapes[spec.name]
            count = count_candidates(spec, args.rounds)
            results *= count * args.rows * config["depth"]
            both = torch.tensor([2 * length * results / 1e15, 4 * results / 1e12]).double()
            print(f"| {spec.name} | {count} | {both[0]:.3g} | {both[1]:.3g} |")
            total += both
    print(f"| all | | {total[0]:.3g} | {total[1]:.3g} |")


def search_flags(args):
    """What 03 is given."""
    flags = ["--wbits", 8, "--abits", 8, "--rounds", args.rounds, *["--compile"] * args.compile]
    return flags + (["--memory-limit", args.memory_limit] if args.memory_limit else [])


def both_phases(run, args, launcher=()):
    """02 and 03 as processes, one printed line each: seconds of both."""
    total, device = 0, "cuda" if launcher else args.device
    for name, own in (("02_grad_cache", []), (METHODS[args.method], search_flags(args))):
        flags = ["--run", run, "--device", device, "--force", *own]
        spent, peak, text = run_phase(name, *flags, launcher=launcher)
        gpu = [line for line in text.splitlines() if line.startswith("peak GPU")]
        print(f"{name}: {spent:.1f} s", f"peak host memory {peak:.0f} MiB", *gpu, sep=", ")
        total += spent
    disk = sum(file.stat().st_size for file in (run / "grads").glob("*.pt"))
    print(f"grads/: {disk / 2**20:.0f} MiB")
    return total


def start_up(args):
    """Seconds that 02 and 03 take before they begin."""
    return sum(run_phase(name, "--help")[0] for name in ("02_grad_cache", METHODS[args.method]))


def reference(run, ours, args):
    """The plain way as a process: its time over ours, and what it says of the scales."""
    name = "benchmarks/plain_way"
    spent, _, text = run_phase(name, "--run", run, "--device", args.device)
    print(f"\nthe plain way takes {spent / ours:.2f} x the time of 02 and 03; {text.strip()}")


def scaling(folder, config, args):
    """Time of 02 and 03 with rows, depth or width doubled, over the time without; less start-up."""
    wide = {key: 2 * config[key] for key in ("hidden_size", "num_heads")}
    cases = dict(
        base=(config, args.rows),
        rows=(config, 2 * args.rows),
        depth=(config | dict(depth=2 * config["depth"]), args.rows),
        width=(config | wide, args.rows),
    )
    times, idle = {}, start_up(args)
    for name, (shape, rows) in cases.items():
        print(f"\n{name}:")
        write_run(folder / name, shape, rows, args.groups)
        times[name] = both_phases(folder / name, args) - idle
    print("\n| doubled | time of Phases 2 and 3, x |\n|---|---|")
    for name in ("rows", "depth", "width"):
        print(f"| {name} | {times[name] / times['base']:.2f} |")


def check(args):
    """InputError if flags do not go together."""
    if args.method != "tqdit" and (args.layers or args.reference) and not args.fake_cuda:
        raise InputError(f"--method {args.method}: give --no-layers, and no --reference: the "
                         "products of the paper's method alone are counted")  # fmt: skip


def main(args):
    config = DiT_models[args.model] | ({"depth": args.depth} if args.depth else {})
    if args.paper:
        return on_paper(config, args)
    check(args)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        write_run(run, config, args.rows, args.groups)
        what = f"{args.model}, depth {config['depth']}, {args.rows} rows, R = {args.rounds}"
        threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        print(f"\n{what}, {args.method}: {hardware(args.device)}, {threads}")
        if args.fake_cuda:
            return both_phases(run, args, [FAKE_CUDA])
        seconds = both_phases(run, args)
        if args.layers:
            rates = machine_rates(args.device)
            products = print_table(layer_table(run, rates, args))
            ratios = [seconds / x for x in products]
            print("\n02 and 03 / products in fp32, / 03's own: {:.2f}, {:.2f}".format(*ratios))
        if args.reference:
            reference(run, seconds, args)
        if args.scaling:
            scaling(Path(folder), config, args)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=sorted(DiT_models), default="DiT-S/8")
    p.add_argument("--depth", type=int, help="blocks, if not all")
    p.add_argument("--rows", type=int, default=320, help="n G")
    p.add_argument("--groups", type=int, default=10, help="G")
    p.add_argument("--rounds", type=int, default=3, help="R")
    p.add_argument("--method", choices=tuple(METHODS), default="tqdit", help="which Phase 3")
    p.add_argument("--memory-limit", type=float, help="of 03")
    p.add_argument("--compile", action="store_true", help="of 03")
    layers = "measure layer by layer too, not only 02 and 03 as processes"
    p.add_argument("--layers", action=argparse.BooleanOptionalAction, default=True, help=layers)
    p.add_argument("--reference", action="store_true", help="time the plain way as well")
    p.add_argument("--scaling", action="store_true", help="double rows, depth, width")
    fake = "02 and 03 on a simulated CUDA device: memory, and no time of meaning"
    p.add_argument("--fake-cuda", action="store_true", help=fake)
    p.add_argument("--paper", action="store_true", help="count the blocks' products, run nothing")
    p.add_argument("--input-size", type=int, help="for --paper: of x, 64 at 512 px")
    p.add_argument("--folder", type=Path, help="where there is space for the run")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=pick_device, default=device)
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
