"""Table III on the demo model: what HO, MRQ and TGQ each do, from the scripts' flags alone.

For every rung: 03_quantize.py, 04_sample.py, then the validation SNR of eps, the weighted output
error per kind of layer relative to the baseline, and PSNR against the full-precision twin.
Needs RUN/calib.pt, RUN/grads/ and RUN/samples_fp.npz (`make demo` leaves them).

    python benchmarks/ablation.py --run runs/demo --bits 6/6 4/4 --rows 80 --num-images 200
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RUNGS = {
    "base": ["--metric", "mse", "--no-mrq", "--no-tgq"],
    "ho": ["--no-mrq", "--no-tgq"],
    "ho_mrq": ["--no-tgq"],
    "full": [],
    "without_ho": ["--metric", "mse"],
    "without_mrq": ["--no-mrq"],
}


def script(name, *args):
    subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], check=True)


def psnr(run, name):
    """PSNR in dB of each image against its full-precision twin, as 05_eval_fid.py counts it."""
    with np.load(run / f"samples_{name}.npz") as ours, np.load(run / "samples_fp.npz") as twin:
        count = min(len(ours["arr_0"]), len(twin["arr_0"]))
        a, b = (file["arr_0"][:count].astype(np.float64) for file in (ours, twin))
    error = ((a - b) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1 / 12))


def cost_by_kind(report):
    """Weighted output error, Eq. (16), summed over the layers of each kind."""
    kinds = defaultdict(float)
    for name, layer in report["layers"].items():
        kinds[".".join(name.split(".")[-2:])] += layer["cost"]
    return kinds


def measure(args, bits, rung):
    weights, activations = bits.split("/")
    model = ["--run", args.run, "--wbits", weights, "--abits", activations, "--tag", rung]
    script("03_quantize.py", *model, "--rows", args.rows, *RUNGS[rung])
    script("04_sample.py", *model, "--num-images", args.num_images)
    name = f"w{weights}a{activations}_{rung}"
    file = torch.load(args.run / f"quant_{name}.pt", map_location="cpu", weights_only=True)
    return file["report"], psnr(args.run, name)


def main(args):
    for bits in args.bits:
        found = {rung: measure(args, bits, rung) for rung in RUNGS}
        base = cost_by_kind(found["base"][0])
        print(f"\n### W{bits.replace('/', 'A')}\n")
        print("| rung | SNR of eps, dB | PSNR, dB | " + " | ".join(base) + " |")
        print("|---" * (3 + len(base)) + "|")
        for rung, (report, psnrs) in found.items():
            costs = cost_by_kind(report)
            shares = " | ".join(f"{costs[kind] / base[kind]:.2f}" for kind in base)
            error = psnrs.std() / len(psnrs) ** 0.5
            row = f"{report['snr_weighted']:.2f} | {psnrs.mean():.2f} ± {error:.2f}"
            print(f"| {rung} | {row} | {shares} |")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, default=Path("runs/demo"))
    p.add_argument("--bits", nargs="+", default=["6/6", "4/4"], help="weights/activations")
    p.add_argument("--rows", type=int, default=80, help="calibration rows of every search")
    p.add_argument("--num-images", type=int, default=200)
    return p.parse_args()


if __name__ == "__main__":
    main(parse_args())
