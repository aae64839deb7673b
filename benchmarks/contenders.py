"""What compare.py compares: methods, widths, the jobs that make each model, what is measured."""

import json
from functools import partial
from typing import NamedTuple

import torch
from tqdm import tqdm

from jobs import Jobs, one_core, perform, sampling_flags
from measurements import common_columns
from more_images import check_samples, load
from processes import ROOT
from random_run import run_phase
from sweep import PLUS, TQDIT

from common.errors import InputError
from common.quant_file import load_quant

WIDTHS = {"8/8": (8, 8), "6/6": (6, 6), "4/8": (4, 8), "4/4": (4, 4)}
MAIN = ((6, 6), (4, 8))  # more images of the same layers, and a table of each method's own
LAYERS = "released", "own"


SAME = "--layers", "released"


class Method(NamedTuple):
    """A Phase 3. `released`: its flags for the released layers, {abits} being their bits. `own`:
    those for its own choice of layers; None if that is the released one. `iterations`: flags that
    say how long, and the paper's numbers, for networks like XL/2. A `variant` is one above it with
    other settings, and left out where each has its own layers.
    """

    label: str
    script: str
    released: tuple = SAME
    own: tuple | None = ("--layers", "own")
    iterations: dict = {}
    variant: bool = False


SOFTMAX = *SAME, "--softmax-bits", "{abits}"  # 8 in these papers, whatever k
EVEN = "--cond-bits", "none", "--edge-bits", "none"
BY_TOKEN = "--input-group", "token", "--weight-group", "none", "--no-hadamard"  # for the engine
LEARNED = {"--weight-iterations": 20000, "--scale-iterations": 5000}
PTQD = {"--weight-iterations": 10000, "--scale-iterations": 5000, "--trajectories": 1024}
METHODS = {
    "tqdit": Method("TQ-DiT", TQDIT, own=None),
    "plus": Method("TQ-DiT plus", PLUS, EVEN[:2], own=()),
    "plus_even": Method("TQ-DiT plus, ends at k bits", PLUS, EVEN, variant=True),
    "plus_token": Method("TQ-DiT plus, by token", PLUS, (*EVEN[:2], *BY_TOKEN), variant=True),
    "qdiffusion": Method("Q-Diffusion", "methods/qdiffusion.py", SOFTMAX, iterations=LEARNED),
    "ptqd": Method("PTQD", "methods/ptqd.py", (*SOFTMAX, *EVEN[2:]), iterations=PTQD),
    "ptq4dit": Method("PTQ4DiT", "methods/ptq4dit.py", SOFTMAX, iterations={"--iterations": 20000}),
    "htg": Method("HTG", "methods/htg.py"),
    "qdit": Method("Q-DiT", "methods/qdit.py"),  # the demo is as wide as one of its groups of 128
    "qdit_16": Method(
        "Q-DiT, groups of 16", "methods/qdit.py", (*SAME, "--group-size", "16"), variant=True
    ),
    "ditas": Method("DiTAS", "methods/ditas.py"),
    "tcaqdm": Method("TCAQ-DM", "methods/tcaqdm.py", SOFTMAX, iterations=LEARNED),
}


class Model(NamedTuple):
    """A method at a width, and which layers it quantizes."""

    method: str
    bits: tuple
    layers: str = "released"

    @property
    def tag(self):
        return self.method + "_own" * (self.layers == "own")

    @property
    def name(self):
        """Its name in files."""
        return f"w{self.bits[0]}a{self.bits[1]}_{self.tag}"

    @property
    def label(self):
        return METHODS[self.method].label


def own_model(method, bits):
    """The model of a method's own choice of layers."""
    return Model(method, bits, "released" if METHODS[method].own is None else "own")


class Comparison(Jobs):
    """One run of the demo, from whose calib.pt every method starts."""

    def __init__(self, args):
        super().__init__(args)
        self.run, self.failed = args.runs / args.name, []
        self.calibrate(self.run, args.steps)
        self.add(1, self.run, "forward", ["benchmarks/forward_pass.py"], 4 * 320)

    def num_images(self, bits, layers="released"):
        """N of a table's models of a width."""
        main = bits in MAIN and layers == "released"
        return self.args.num_images_main if main else self.args.num_images

    def iterations(self, method):
        """Flags and numbers of iterations: the paper's, scaled by --iterations."""
        scale = self.args.iterations
        return {k: max(1, round(scale * n)) for k, n in METHODS[method].iterations.items()}

    def model(self, model, num_images):
        """Quantize and sample a model."""
        method, (weights, activations) = METHODS[model.method], model.bits
        name = ["--wbits", weights, "--abits", activations, "--tag", model.tag]
        flags = [flag.format(abits=activations) for flag in getattr(method, model.layers)]
        flags += ["--rows", self.args.rows] if self.args.rows else []
        iterations = self.iterations(model.method)
        flags += [x for pair in iterations.items() for x in pair]
        if iterations and self.args.iterations < 1:  # the papers' rates are 0.001, and 4e-4 or 4e-5
            flags += ["--weight-lr", min(0.01, 0.001 / self.args.iterations)]  # each goes further
            flags += ["--scale-lr", 4e-5]  # 4e-4 takes thousands of iterations to settle
        cost = 150 * (self.args.rows or 320) + 100 * sum(iterations.values())
        self.add(2, self.run, f"03 {model.name}", [method.script, *name, *flags], cost)
        self.sample(model.name, name, num_images)

    def sample(self, name, flags, count):
        command = ["benchmarks/more_images.py", *flags, "--num-images", count]
        command += sampling_flags(self.args)
        self.add(3, self.run, f"04 {name} {count}", command, 2.6 * count * self.args.steps)

    def perform(self, job):
        """A method is timed in forward passes. One that fails is left out, the others go on."""
        phase, _, rest = job.name.partition(" ")
        name = rest.partition(" ")[0]
        if name in self.failed:
            return job
        try:
            if phase != "03":
                return perform(job)
            begun = any(self.run.glob(f".quant_{name}.pt.*"))  # before a kill, or ended since
            begun = begun or (self.run / f"quant_{name}.pt").exists()
            return perform(job, partial(forward_seconds, self.run), resumed=begun)
        except InputError as error:
            if name in ("", "fp"):
                raise
            self.failed.append(name)
            tqdm.write(f"left out: {error}")
            return job


def forward_seconds(run):
    """Of a full-precision forward pass over all calibration rows, on this thread's core."""
    *_, text = run_phase("benchmarks/forward_pass", "--run", run, **one_core())
    return float(text.split()[-1])


# ------------------------------------------------------------------------------------------------
# What is known of a model, for the page and for results.json


def record(run, job):
    return json.loads((run / "jobs" / f"{job}.json").read_text())


def full_precision(comparison, scores):
    """The full-precision model by so many images as `scores` looks at."""
    args, size = comparison.args, (ROOT / "demo" / "dit_mnist.pt").stat().st_size / 2**20
    common = common_columns(args.name, args.steps, scores.num_images)
    metrics = scores.metrics(comparison.run / "samples_fp.npz")
    return common | dict(model="fp", mib=size) | metrics


def measure(comparison, scores, model):
    """Everything known of one model. InputError if its samples are of another quant file."""
    run, args = comparison.run, comparison.args
    path, samples = run / f"quant_{model.name}.pt", run / f"samples_{model.name}.npz"
    check_samples(samples, load(samples)[2], path)
    quant, job = load_quant(path), record(run, f"03 {model.name}")
    used = job["seconds" if torch.cuda.is_available() else "cpu_seconds"]
    return common_columns(args.name, args.steps, scores.num_images) | dict(
        model=model.name,
        method=model.method,
        bits=model.bits,
        layers=model.layers,
        rows=quant["settings"]["rows"] or 320,
        iterations=comparison.iterations(model.method),
        gradients="grads" in quant["inputs"],
        command=job["command"],
        snr=quant["report"]["snr_weighted"],
        snr_per_group=quant["report"]["snr_per_group"],
        mib=path.stat().st_size / 2**20,
        passes=used / job["unit_seconds"],
        **{key: job[key] for key in ("seconds", "cpu_seconds", "unit_seconds", "resumed")},
        peak_mib=job["peak_mib"],
        **scores.against(samples, run / "samples_fp.npz"),
    )
