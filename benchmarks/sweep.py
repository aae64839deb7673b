"""The jobs of a sweep of tables.py: commands in stages, each run once, with its time and memory."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from processes import ROOT, timed

from common.artifacts import atomic_write
from common.checkpoints import load_dit
from common.cli import InputError

DEMO = "--ckpt demo/dit_mnist.pt --model DiT-Demo/4 --vae none --cfg-scale 2".split()
TQDIT, PLUS = "03_quantize.py", "methods/tqdit_plus.py"
RUNGS = {  # Table III, in its order; "full" is the paper's method, without a tag
    "base": ["--metric", "mse", "--no-mrq", "--no-tgq"],
    "ho": ["--no-mrq", "--no-tgq"],
    "ho_mrq": ["--no-tgq"],
    "full": [],
    "tensor": ["--weight-granularity", "tensor"],  # the authors' granularity, D5
}
LADDER = {  # what methods/tqdit_plus.py is made of: each rung adds one thing
    "edge": "--cond-bits none --no-tgq-inputs --no-smoothquant --rounding nearest".split(),
    "inputs": "--cond-bits none --no-smoothquant --rounding nearest".split(),
    "smoothquant": "--cond-bits none --rounding nearest".split(),
    "gptq": "--cond-bits none".split(),
    "plus": [],
}
VARIANTS = {tag: (TQDIT, flags) for tag, flags in RUNGS.items()}
VARIANTS |= {tag: (PLUS, flags) for tag, flags in LADDER.items()}
VARIANTS |= {
    "all": (TQDIT, ["--layers", "all"]),
    "renoise": (TQDIT, []),  # on gradients of its own
    "mse": (TQDIT, ["--metric", "mse"]),
    "r1": (TQDIT, ["--rounds", "1"]),
    "plus_mse": (PLUS, ["--metric", "mse"]),
    "plus_r3": (PLUS, ["--rounds", "3"]),
}


class Pair(NamedTuple):
    """Two variants that differ in one thing."""

    question: str
    bits: tuple
    tag: str
    other: str


PAIRS = (
    Pair("HO (Eq. 16) against plain MSE", (6, 6), "full", "mse"),
    Pair("HO (Eq. 16) against plain MSE", (4, 8), "full", "mse"),
    Pair("HO (Eq. 16) against plain MSE", (6, 6), "plus", "plus_mse"),
    Pair("HO (Eq. 16) against plain MSE", (4, 8), "plus", "plus_mse"),
    Pair("R = 3 against R = 1", (6, 6), "full", "r1"),
    Pair("R = 3 against R = 1", (6, 6), "plus_r3", "plus"),
    Pair("A scale per output channel against one per tensor (D5)", (6, 6), "full", "tensor"),
    Pair("methods/tqdit_plus.py against 03_quantize.py", (8, 8), "plus", "full"),
    Pair("methods/tqdit_plus.py against 03_quantize.py", (6, 6), "plus", "full"),
    Pair("methods/tqdit_plus.py against 03_quantize.py", (4, 8), "plus", "full"),
)


class Row(NamedTuple):
    """A model of the sweep: T, bits of weights and activations, which variant, and the seed of its
    calibration set."""

    steps: int
    bits: tuple
    tag: str
    seed: int = 0

    @property
    def name(self):
        """The model's name in files."""
        return f"w{self.bits[0]}a{self.bits[1]}" + f"_{self.tag}" * (self.tag != "full")


class Job(NamedTuple):
    """A command. Its cost is in forward passes of one row, and only serves the progress bar."""

    run: Path
    name: str
    command: list
    cost: float

    def path(self, suffix):
        return self.run / "jobs" / f"{self.name}.{suffix}"

    def is_done(self):
        return self.path("json").exists()


class Sweep:
    """The jobs of a sweep in stages; those of one stage do not depend on each other."""

    def __init__(self, args):
        self.args, self.stages = args, [[] for _ in range(4)]
        self.folder = args.runs / args.name

    def run(self, steps, seed=0, tag=""):
        """The run's folder; gradients of another eps need one of their own."""
        return self.folder / f"T{steps}_seed{seed}{'_renoise' * (tag == 'renoise')}"

    def run_of(self, row):
        return self.run(row.steps, row.seed, row.tag)

    def calibrate(self, row):
        """Phases 1 and 2 of a row."""
        run, eps = self.run_of(row), "renoise" if row.tag == "renoise" else "implied"
        flags = [*DEMO, "--steps", row.steps, "--seed", row.seed]
        self.add(0, run, "01", ["01_collect_calib.py", *flags], 2 * 80 * row.steps)
        self.add(1, run, "02", ["02_grad_cache.py", "--eps", eps], 4 * 320)

    def model(self, row):
        """Quantize and sample a row's model."""
        (script, flags), (weights, activations) = VARIANTS[row.tag], row.bits
        name = ["--wbits", weights, "--abits", activations]
        name += [] if row.tag == "full" else ["--tag", row.tag]
        several = 3 if script == PLUS else self.args.rounds
        if script == TQDIT and "--rounds" not in flags:
            flags = ["--rounds", self.args.rounds, *flags]
        flags = flags + (["--rows", self.args.rows] if self.args.rows else [])
        cost = 150 * several * (self.args.rows or 320) + 4000
        self.add(2, self.run_of(row), f"03 {row.name}", [script, *name, *flags], cost)
        self.sample(self.run_of(row), row.name, row.steps, name)

    def sample(self, run, name, steps, flags):
        images = ["--num-images", self.args.num_images]
        cost = 2.6 * self.args.num_images * steps
        self.add(3, run, f"04 {name}", ["04_sample.py", *flags, *images], cost)

    def add(self, stage, run, name, command, cost):
        job = Job(run, name, [*map(str, command), "--run", str(run)], cost)
        if job not in self.stages[stage]:
            self.stages[stage].append(job)

    def go(self):
        """Every job that is not done yet; on a CPU each core works on one of its own."""
        cuda = torch.cuda.is_available()
        workers = 1 if cuda else os.cpu_count()
        todo = [[job for job in stage if not job.is_done()] for stage in self.stages]
        total = sum(job.cost for stage in todo for job in stage)
        minutes = total * seconds_per_row(cuda) / workers / 60
        print(f"{sum(map(len, todo))} jobs, {workers} at a time, about {minutes:.0f} minutes")
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=total, desc="tables", bar_format=bar_format) as bar:
            for stage in todo:
                with ThreadPoolExecutor(workers) as pool:
                    for job in pool.map(perform, stage):
                        bar.update(job.cost)


def perform(job):
    """Run a job's command; keep its wall time and peak memory. Stops the sweep if it fails."""
    log = job.path("log")
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        status, seconds, peak = timed(job.command, file, **threads)
    if status:
        command = " ".join(job.command)
        raise InputError(f"{command} failed: see {log}; the same command continues")
    found = dict(command=" ".join(job.command), seconds=seconds, peak_mib=peak)
    with atomic_write(job.path("json")) as file:
        file.write(json.dumps(found).encode())
    return job


@torch.no_grad()
def seconds_per_row(cuda):
    """One forward pass of the demo model, per row, measured now; for the estimate only."""
    device, threads = "cuda" if cuda else "cpu", torch.get_num_threads()
    torch.set_num_threads(threads if cuda else 1)
    model = load_dit(ROOT / "demo" / "dit_mnist.pt")[0].to(device)
    batch = torch.zeros(64, 1, 28, 28, device=device), torch.zeros(64, device=device).long()
    model(*batch, batch[1])
    start = time.monotonic()
    model(*batch, batch[1]).cpu()
    torch.set_num_threads(threads)
    return (time.monotonic() - start) / 64
