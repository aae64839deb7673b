"""Jobs: commands in stages, each run once, with its time and memory. What is done stays done."""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from tqdm import tqdm

from processes import ROOT, timed

from common.artifacts import atomic_write
from common.checkpoints import load_dit
from common.cli import whole_number
from common.errors import InputError


DEMO = "--ckpt demo/dit_mnist.pt --model DiT-Demo/4 --vae none --cfg-scale 2".split()
COMPILED_BATCH = 100  # N in hundreds: another size is compiled anew


class Job(NamedTuple):
    """A command. Its cost is in forward passes of one row, and only serves the progress bar."""

    run: Path
    name: str
    command: list
    cost: float

    def path(self, suffix):
        return self.run / "jobs" / f"{self.name}.{suffix}"

    def is_done(self):
        """Whether it has been run. InputError if that was with other flags, those of the machine
        and the folder aside: its result is not this job's."""
        record = self.path("json")
        if not record.exists():
            return False
        was = json.loads(record.read_text()).get("command", "something else")
        now = " ".join(self.command)
        if asked(was) != asked(now):
            raise InputError(f"{record} is of `{was}`, not `{now}`: give another --name")
        return True


def asked(command):
    """What a command says of its result: without the folder, which stands last, and what is of the
    machine."""
    return re.sub(r" --compile\b| --batch-size \d+", "", command.partition(" --run ")[0])


def add_sampling_flags(p):
    """How 04 samples, and how many jobs share a GPU."""
    p.add_argument("--compile", action="store_true", help="sample with 04's --compile")
    batch = f"of 04, on a GPU best hundreds; default: 04's own, with --compile {COMPILED_BATCH}"
    p.add_argument("--batch-size", type=whole_number, help=batch)
    p.add_argument("--jobs", type=whole_number, default=1, help="at a time, where a GPU does them")


def sampling_flags(args):
    """Those of 04 that `args` of `add_sampling_flags` ask for."""
    batch = args.batch_size or COMPILED_BATCH * args.compile
    return ["--compile"] * args.compile + (["--batch-size", batch] if batch else [])


class Jobs:
    """Jobs in four stages: Phases 1, 2 and 3, and samples. Those of one stage do not depend on each
    other."""

    def __init__(self, args):
        self.args, self.stages = args, [[] for _ in range(4)]

    def add(self, stage, run, name, command, cost):
        job = Job(run, name, [*map(str, command), "--run", str(run)], cost)
        if job not in self.stages[stage]:
            self.stages[stage].append(job)

    def calibrate(self, run, steps, seed=0, eps="implied"):
        """Phases 1 and 2 of a run of the demo: 80 guided trajectories, 320 rows."""
        flags = [*DEMO, "--steps", steps, "--seed", seed]
        self.add(0, run, "01", ["01_collect_calib.py", *flags], 2 * 80 * steps)
        self.add(1, run, "02", ["02_grad_cache.py", "--eps", eps], 4 * 320)

    def perform(self, job):
        """What a worker does with a job; returns it."""
        return perform(job)

    def go(self, desc):
        """Every job that is not done yet; on a CPU each core works on one of its own."""
        cuda = torch.cuda.is_available()
        cores = [None] * self.args.jobs if cuda else usable_cores()
        todo = [[job for job in stage if not job.is_done()] for stage in self.stages]
        total = sum(job.cost for stage in todo for job in stage)
        minutes = total * seconds_per_row(cuda) / len(cores) / 60
        print(f"{sum(map(len, todo))} jobs, {len(cores)} at a time, about {minutes:.0f} minutes")
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=total, desc=desc, bar_format=bar_format) as bar:
            for stage in todo:
                with workers(cores) as pool:
                    for job in pool.map(self.perform, stage):
                        bar.update(job.cost)


def usable_cores():
    """The numbers of this process's cores; None for each where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return [None] * os.cpu_count()


def workers(cores):
    """A pool with a thread for each core. The thread, and so what it starts, stays there."""
    left = SimpleQueue()
    for core in cores:
        left.put(core)

    def stay():
        core = left.get()
        if core is not None:
            os.sched_setaffinity(0, [core])  # 0: this thread

    return ThreadPoolExecutor(len(cores), initializer=stay)


def one_core():
    """Environment of a process that has one core to itself; nothing where a GPU does the work."""
    return {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}


def perform(job, unit=None, **more):
    """Run a job's command; keep its times and peak memory, and `more`. InputError if it fails.

    `unit` measures, in seconds, what the time is to be told in: just before and just after.
    """
    log = job.path("log")
    log.parent.mkdir(parents=True, exist_ok=True)
    units = [unit()] if unit else []
    with open(log, "wb") as file:
        used = timed(job.command, file, **one_core())
    if used.status:
        command = " ".join(job.command)
        raise InputError(f"{command} failed: see {log}; the same command continues")
    found = dict(command=" ".join(job.command), **used._asdict(), **more)
    del found["status"]
    if unit:
        found["unit_seconds"] = (units[0] + unit()) / 2
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
