"""Seconds of one full-precision forward pass over all calibration rows of a run, batches of 64.

compare.py states calibration times in this unit. Processor seconds on a CPU, where other work may
share the core; wall seconds on a GPU. Reading files and a first pass to warm up are left out.

    OMP_NUM_THREADS=1 python benchmarks/forward_pass.py --run runs/demo
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from scores import pick_device

from common.checkpoints import load_calib, load_calibrated
from common.cli import run_script
from common.unit_data import first_inputs, rows_to_search

BATCH, PASSES = 64, 3


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, default=Path("runs/demo"))
    return p.parse_args()


def clock(device):
    """Seconds, of which only differences mean something, with all work on the device done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def main(args):
    calib, device, seconds = load_calib(args.run), pick_device(), []
    model = load_calibrated(calib).to(device)
    inputs = [x.to(device) for x in first_inputs(calib, rows_to_search(calib, None))]
    for _ in range(1 + PASSES):
        start = clock(device)
        for batch in zip(*(x.split(BATCH) for x in inputs), strict=True):
            model(*batch)
        seconds.append(clock(device) - start)
    print(statistics.median(seconds[1:]))


if __name__ == "__main__":
    run_script(main, parse_args)
