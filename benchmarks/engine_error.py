"""How well the engines of 04 keep eps: SNR on a run's validation rows, weighted by the sampler's
sensitivity as in 03's report. Last, fake quantization with MRQ folded to 8 bits, as int8-folded has
it but for CPUs with AVX2 alone, which may take fewer.

    python benchmarks/engine_error.py --run runs/demo --models w8a8 w6a6
"""

import argparse
from pathlib import Path

import torch

import processes  # noqa: F401  puts the repository root on the path

from common.checkpoints import load_calib, load_calibrated
from common.cli import pick_device, run_script
from common.int8_engine import build
from common.quant_file import load_quant
from common.report import signal_to_noise
from engine.int8_linear import folded
from quant_ops import GeluQuantizer

ENGINES = "float", "int8", "int8-folded"


def fold(model):
    """The model, every quantizer of MRQ after GELU folded."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, GeluQuantizer):
                setattr(module, name, folded(child))
    return model


def candidates(path, device):
    """The models of a quant file, as the table's columns have them."""
    for engine in ENGINES:
        yield build(load_quant(path), path, engine, device).to(device)
    yield fold(build(load_quant(path), path, "float", device)).to(device)


def main(args):
    calib, device, rows = load_calib(args.run), args.device, []
    model = load_calibrated(calib).to(device)
    for name in args.models:
        path, found = args.run / f"quant_{name}.pt", []
        for quantized in candidates(path, device):
            report = signal_to_noise(model, quantized, calib, args.batch_size, device)
            found.append(f"{report['snr_weighted']:.2f}")
        rows.append([name, *found])
    print("\nSNR of eps, dB, on the validation rows of", args.run)
    for row in (["model", *ENGINES, "float, folded"], ["---"] * 5, *rows):
        print("|", " | ".join(row), "|")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, default=Path("runs/demo"))
    p.add_argument("--models", nargs="+", default=["w8a8", "w6a6"], help="as in quant_w6a6_plus.pt")
    p.add_argument("--batch-size", type=int, default=32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=pick_device, default=device)
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
