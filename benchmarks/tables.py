"""Tables I to IV of the paper on the demo model, and the rows that go beyond them.

Runs the numbered scripts from nothing, then writes what it found into results.json and into its
own section of RESULTS.md, in --out; other sections are kept. Progress is kept in --runs: a stopped
sweep goes on where it was. On a CPU each core works on a job of its own.

    make tables              # N = 10,000 images, for a GPU
    make tables QUICK=1      # half an hour on 2 cores; every row says that it is the quick one
    python benchmarks/tables.py --name n800 --num-images 800 --steps 100 --only models --bits 6/6
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import models_dit as dit  # noqa: E402

SCORE = ["--reference", "demo/reference_mnist.npz", "--features", "demo/features_mnist.pt"]
DEMO = "--ckpt demo/dit_mnist.pt --model DiT-Demo/4 --vae none --cfg-scale 2".split()
RUNGS = {  # Table III, in its order; "full" is the paper's method, without a tag
    "base": ["--metric", "mse", "--no-mrq", "--no-tgq"],
    "ho": ["--no-mrq", "--no-tgq"],
    "ho_mrq": ["--no-tgq"],
    "full": [],
}
LEADS = {  # what --preset best is made of, one after the other
    "edge": ["--edge-bits", "8"],
    "inputs": ["--edge-bits", "8", "--tgq-inputs"],
    "balance": ["--edge-bits", "8", "--tgq-inputs", "--balance"],
    "gptq": ["--edge-bits", "8", "--tgq-inputs", "--balance", "--rounding", "gptq"],
    "best": ["--preset", "best"],
}
FLAGS = RUNGS | LEADS | {"all": ["--layers", "all"]}
FLAGS |= {"best_mse": ["--preset", "best", "--metric", "mse"], "renoise": []}
BITS = ((6, 6), (4, 8))  # of Table III, and of the steps beyond it
SEEDS = (0, 1, 2)  # of the calibration set, in Table III
DRAWS = 400  # bootstrap resamples of the images
TABLES = ("models", "ablation", "layers", "leads")  # I and II, III, deviation D6, beyond the paper


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="20 images, 40 rows, R = 1")
    p.add_argument("--num-images", type=int, help="N")
    p.add_argument("--rows", type=int, help="calibration rows of each search; default: all")
    p.add_argument("--rounds", type=int, help="R")
    p.add_argument("--steps", type=int, nargs="+", default=[250, 100], help="T of Tables I and II")
    p.add_argument("--ablation-steps", type=int, help="T of Table III and of all that follows it")
    widths = ["8/8", "6/6", "4/8", "4/4"]
    p.add_argument("--bits", nargs="+", choices=widths, default=widths, help="of Tables I and II")
    p.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="some of the tables")
    p.add_argument("--name", help="what every row calls this sweep")
    p.add_argument("--runs", type=Path, default=Path("runs/tables"))
    p.add_argument("--out", type=Path, default=Path("demo"))
    defaults = dict(num_images=10000, rows=None, rounds=3, ablation_steps=250, name="full")
    if p.parse_known_args()[0].quick:
        defaults = dict(num_images=20, rows=40, rounds=1, ablation_steps=100, name="quick")
    p.set_defaults(**defaults)
    return p.parse_args()


# ------------------------------------------------------------------------------------------------
# Jobs: one command each, with its time and peak memory kept beside what it writes


class Sweep:
    """The jobs of a sweep in stages; those of one stage do not depend on each other.

    A job is (folder, name, command, cost); cost is in forward passes of one row, and only serves
    the progress bar.
    """

    def __init__(self, args):
        self.args, self.stages = args, [[] for _ in range(4)]
        self.cuda = torch.cuda.is_available()
        self.folder = args.runs / args.name

    def run(self, steps, seed=0, tag=""):
        """The run's folder; gradients of another eps need one of their own."""
        return self.folder / f"T{steps}_seed{seed}{'_renoise' * (tag == 'renoise')}"

    def calibrate(self, steps, seed, tag):
        run, eps = self.run(steps, seed, tag), "renoise" if tag == "renoise" else "implied"
        flags = [*DEMO, "--steps", steps, "--seed", seed]
        self.add(0, run, "01", ["01_collect_calib.py", *flags], 2 * 80 * steps)
        self.add(1, run, "02", ["02_grad_cache.py", "--eps", eps], 4 * 320)

    def model(self, steps, bits, tag, seed=0):
        """Quantize and sample a variant; `tag` names its flags."""
        run, (weights, activations) = self.run(steps, seed, tag), bits
        name = ["--wbits", weights, "--abits", activations]
        name += [] if tag == "full" else ["--tag", tag]
        rows, rounds = self.args.rows or 320, self.args.rounds
        search = ["--rounds", rounds, *(["--rows", rows] if self.args.rows else [])]
        several = 3 if {"--balance", "best"} & {*FLAGS[tag]} else 1
        cost = 300 * rounds * rows * several + 4000
        flags = ["03_quantize.py", *name, *search, *FLAGS[tag]]
        self.add(2, run, f"03 {label(bits, tag)}", flags, cost)
        self.sample(run, label(bits, tag), steps, name)

    def sample(self, run, name, steps, flags):
        images = ["--num-images", self.args.num_images]
        cost = 2.6 * self.args.num_images * steps
        self.add(3, run, f"04 {name}", ["04_sample.py", *flags, *images], cost)

    def add(self, stage, run, name, command, cost):
        job = (run, name, [*map(str, command), "--run", str(run)], cost)
        if job not in self.stages[stage]:
            self.stages[stage].append(job)

    def go(self):
        workers = 1 if self.cuda else os.cpu_count()
        todo = [job for stage in self.stages for job in stage if not kept(job).exists()]
        rate = 1 / seconds_per_row(self.cuda) * workers
        total = sum(cost for *_, cost in todo)
        print(f"{len(todo)} jobs, {workers} at a time, about {total / rate / 60:.0f} minutes")
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        with tqdm(total=total, desc="tables", bar_format=bar_format) as bar:
            for stage in self.stages:
                jobs = [job for job in stage if job in todo]
                with ThreadPoolExecutor(workers) as pool:
                    for job in pool.map(perform, jobs):
                        bar.update(job[3])


def label(bits, tag="full"):
    return f"w{bits[0]}a{bits[1]}" + ("" if tag == "full" else f"_{tag}")


def kept(job):
    run, name, *_ = job
    return run / "jobs" / f"{name}.json"


def perform(job):
    """Run a job's command; keep its wall time and peak memory. Stops the sweep if it fails."""
    run, name, command, _ = job
    log = run / "jobs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=os.environ | threads, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise dit.InputError(f"{' '.join(command)} failed: see {log}; the same command continues")
    found = dict(command=" ".join(command), seconds=time.monotonic() - start)
    found["peak_mib"] = usage.ru_maxrss / 1024  # Linux counts KiB
    dit.write_atomic(kept(job), lambda file: file.write(json.dumps(found).encode()))
    return job


@torch.no_grad()
def seconds_per_row(cuda):
    """One forward pass of the demo model, per row, measured now; for the estimate only."""
    device, threads = "cuda" if cuda else "cpu", torch.get_num_threads()
    torch.set_num_threads(threads if cuda else 1)
    model = dit.load_dit(ROOT / "demo/dit_mnist.pt")[0].to(device)
    batch = torch.zeros(64, 1, 28, 28, device=device), torch.zeros(64, device=device).long()
    model(*batch, batch[1])
    start = time.monotonic()
    model(*batch, batch[1]).cpu()
    torch.set_num_threads(threads)
    return (time.monotonic() - start) / 64


def kind_of(key):
    return key if key in TABLES else "models"


def plan(args):
    """The sweep, and its rows for each table: (steps, bits, tag, seed)."""
    sweep, tables = Sweep(args), {}
    for steps in args.steps:
        widths = [tuple(map(int, bits.split("/"))) for bits in args.bits]
        tables[steps] = [(steps, bits, tag, 0) for tag in ("full", "best") for bits in widths]
    at, leads = args.ablation_steps, ("full", "renoise", *LEADS, "best_mse")
    tables["ablation"] = [(at, b, rung, seed) for b in BITS for rung in RUNGS for seed in SEEDS]
    tables["layers"] = [(at, b, tag, 0) for b in ((8, 8), (6, 6)) for tag in ("full", "all")]
    tables["leads"] = [(at, b, lead, 0) for b in BITS for lead in leads]
    tables = {key: rows for key, rows in tables.items() if kind_of(key) in args.only}
    rows = {row for table in tables.values() for row in table}
    for steps, _, tag, seed in sorted(rows, key=str):
        sweep.calibrate(steps, seed, tag)
    for steps in sorted({row[0] for row in rows}):
        sweep.sample(sweep.run(steps), "fp", steps, ["--fp"])
    for row in sorted(rows, key=str):
        sweep.model(*row)
    return sweep, tables


# ------------------------------------------------------------------------------------------------
# Measurements


def load_scoring():
    """05_eval_fid.py as a module, for its definitions of the metrics."""
    spec = importlib.util.spec_from_file_location("scoring", ROOT / "05_eval_fid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Scores:
    """Features, PSNR and bootstrap intervals of samples; each file's features only once."""

    def __init__(self, args):
        self.scoring, self.args = load_scoring(), args
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        features = argparse.Namespace(features=str(ROOT / SCORE[3]), batch_size=500, device=device)
        self.network, _ = self.scoring.load_network(features, device)
        with np.load(ROOT / SCORE[1]) as reference:
            self.reference = {key: reference[key] for key in reference}
        draws = np.random.default_rng(0).integers(args.num_images, size=(DRAWS, args.num_images))
        self.draws, self.device, self.files = draws, device, {}

    @torch.no_grad()
    def of(self, path):
        """Images, features and logits of a file of samples, and its metrics."""
        if path not in self.files:
            images = self.scoring.read(path)["arr_0"]
            parts = torch.tensor(images).split(500)
            outputs = [self.network(part.to(self.device)) for part in parts]
            features, spatial, logits = (torch.cat(x) for x in zip(*outputs, strict=True))
            real = torch.as_tensor(self.reference["features"]).to(self.device)
            sfid = self.frechet(self.scoring.moments(spatial), "_s")
            self.files[path] = dict(
                images=images.astype(np.float64),
                features=features,
                fd=self.frechet(self.scoring.moments(features)),
                sfd=sfid,
                inception=self.scoring.inception_score(logits),
                precision=self.scoring.coverage(features, real),
                recall=self.scoring.coverage(real, features),
            )
        return self.files[path]

    def frechet(self, statistics, which=""):
        reference = self.reference[f"mu{which}"], self.reference[f"sigma{which}"]
        return self.scoring.frechet_distance(*statistics, *reference)

    def drawn_fd(self, file):
        """(DRAWS,) Frechet distances of the resampled images; the same draws for every file."""
        if "drawn" not in file:
            moments = (self.scoring.moments(file["features"][draw]) for draw in self.draws)
            file["drawn"] = np.array([self.frechet(found) for found in moments])
        return file["drawn"]

    def psnr(self, path, twin):
        """(N,) PSNR of each image against its full-precision twin, dB."""
        a, b = self.of(path)["images"], self.of(twin)["images"]
        error = ((a - b) ** 2).mean(axis=(1, 2, 3))
        return 10 * np.log10(255**2 / error.clip(min=1 / 12))

    def interval(self, values):
        """95 % bootstrap interval of the mean of values (N,), by the same draws."""
        return np.quantile(values[self.draws].mean(axis=1), [0.025, 0.975]).tolist()


def measure(sweep, scores, row):
    """Everything known of one model, for results.json."""
    steps, bits, tag, seed = row
    run, name = sweep.run(steps, seed, tag), label(bits, tag)
    artifact = dit.load_artifact(run / f"quant_{name}.pt", "quant", "make tables")
    samples, twin = run / f"samples_{name}.npz", sweep.run(steps) / "samples_fp.npz"
    found = dict(
        model=name,
        sweep=sweep.args.name,
        steps=steps,
        calibration_seed=seed,
        num_images=None,
        image_seed=0,
        rows=sweep.args.rows or 320,
        rounds=sweep.args.rounds,
        hardware=hardware(),
        commands=[json.loads(path.read_text())["command"] for path in commands(run, name)],
        snr=artifact["report"]["snr_weighted"],
        snr_per_group=artifact["report"]["snr_per_group"],
        mib=(run / f"quant_{name}.pt").stat().st_size / 2**20,
    )
    if samples.exists():
        found["num_images"] = sweep.args.num_images
        found |= image_metrics(scores, samples)
        psnr = scores.psnr(samples, twin)
        found |= dict(psnr=psnr.mean(), psnr_interval=scores.interval(psnr))
        ratio = scores.drawn_fd(scores.of(samples)) / scores.drawn_fd(scores.of(twin))
        found["fd_ratio"] = found["fd"] / scores.of(twin)["fd"]
        interval = centred(np.log(found["fd_ratio"]), np.log(ratio))
        found["fd_ratio_interval"] = np.exp(interval).tolist()
    return found


def centred(value, drawn):
    """95 % interval around `value` as wide as that of the resampled values `drawn`. Resampling
    repeats images, which moves a Frechet distance: its draws tell the spread, not the place."""
    return value + np.quantile(drawn - drawn.mean(), [0.025, 0.975])


def image_metrics(scores, path):
    file = scores.of(path)
    return {key: file[key] for key in ("fd", "sfd", "inception", "precision", "recall")}


def commands(run, name):
    """The records of the jobs that made a model and its samples."""
    files = [run / "jobs" / f"{job}.json" for job in ("01", "02", f"03 {name}", f"04 {name}")]
    return [file for file in files if file.exists()]


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
    return f"{os.cpu_count()} cores, {model}"


def gradient_shares(sweep):
    """Share of the squared gradient, Eq. (11), in each time group: at the first, the middle and the
    last unit's outputs; and the share of the sampler's sensitivity. Name -> (G,)."""
    run = sweep.run(sweep.args.ablation_steps)
    calib = dit.load_calib(run)
    groups, count = calib["calibration"]["group"], calib["settings"]["groups"]
    depth = calib["settings"]["config"]["depth"]
    shares = {}
    for name in ("block_00", f"block_{depth // 2:02d}", "final"):
        unit = dit.load_artifact(run / "grads" / f"{name}.pt", "grads", "make tables")
        energy = unit["unit_grads"][0].double().square().flatten(1).sum(1)
        shares[f"gradient, {name}"] = torch.zeros(count).double().index_add_(0, groups, energy)
    diffusion = dit.Diffusion(calib["settings"]["steps"])
    at = torch.arange(diffusion.steps) * count // diffusion.steps
    listens = torch.zeros(count).index_add_(0, at, diffusion.sensitivity())
    shares["sampler's sensitivity"] = listens
    return {name: (share / share.sum()).tolist() for name, share in shares.items()}


def load_quant(sweep, row):
    steps, bits, tag, seed = row
    path = sweep.run(steps, seed, tag) / f"quant_{label(bits, tag)}.pt"
    return dit.load_artifact(path, "quant", "make tables")


def softmax_steps(sweep, bits):
    """Block -> (G,) i of the chosen s_1 = 2^-i / 2^(k-1), one for each time group."""
    layers = load_quant(sweep, (sweep.args.ablation_steps, bits, "full", 0))["layers"]
    states = {name: state["a"] for name, state in layers.items() if name.endswith("attn.av")}
    top = 2 ** (bits[1] - 1)
    return {
        name.split(".")[1]: (-(state["step1"] * top).log2()).round().int().tolist()
        for name, state in states.items()
    }


def cost_by_kind(sweep, row):
    """Weighted output error, Eq. (16), summed over the layers of each kind."""
    kinds = defaultdict(float)
    for name, layer in load_quant(sweep, row)["report"]["layers"].items():
        kinds[".".join(name.split(".")[-2:])] += layer["cost"]
    return kinds


def phases(sweep):
    """Wall seconds and peak host memory of each kind of job, medians over the sweep."""
    found = defaultdict(list)
    for file in sweep.folder.glob("*/jobs/*.json"):
        job, steps = json.loads(file.read_text()), file.parents[1].name.split("_")[0]
        phase, _, name = file.stem.partition(" ")
        kind = "--preset best" if name.endswith("best") else "FP" if name == "fp" else ""
        if not name or kind or "_" not in name:
            found[steps, " ".join(filter(None, [phase, kind]))].append(job)
    columns = ("seconds", "peak_mib")
    return {
        key: {column: float(np.median([job[column] for job in jobs])) for column in columns}
        for key, jobs in sorted(found.items())
    }


# ------------------------------------------------------------------------------------------------
# RESULTS.md


INTRODUCTION = """# The paper's tables on the demo model

`make tables` writes this page, a section for each sweep; the commands behind every row are in
`results.json`. Guidance 2. FD(demo) is a Frechet distance of the demo's own features: no FID.
Brackets are 95 % bootstrap intervals over the images, the same draws for every model: models are
compared image by image, from the same seeds. SNR of eps is against full precision, on 80 validation
rows, weighted by the sampler's sensitivity. `best` is `--preset best`.

## Figures

`make figures` draws these from the sweep: values after softmax and GELU with the regions of MRQ
(Fig. 2 of the paper), channel maxima after softmax over the timesteps with the step of every time
group (Fig. 3), samples (Fig. 6), and where each idea changes the weighted output error.

![Values after softmax and GELU](fig2_histograms.png)
![Channel maxima after softmax over the timesteps](fig3_softmax_over_time.png)
![Samples of several models from the same seeds](fig6_samples.png)
![Weighted output error by kind of layer, and what each idea changes](layer_error.png)

"""


def table(header, rows):
    lines = [" | ".join(header), "|".join(["---"] * len(header))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def ranged(value, interval, digits=2):
    if value is None:
        return ""
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def origin(row):
    """What a row was measured with."""
    images = f"N = {row['num_images']}, " if row["num_images"] else ""
    seeds = f"seeds {row['calibration_seed']}, {row['image_seed']}"
    return f"{row['sweep']}: {images}T = {row['steps']}, {seeds}, {row['rows']} rows"


MODEL_COLUMNS = ["model", "FD(demo)", "x FP", "sFD", "IS", "precision", "recall", "PSNR, dB"]
SWEEP_COLUMN = "sweep: N, T, seeds (calibration, images)"
MODEL_COLUMNS += ["SNR of eps, dB", "MiB", SWEEP_COLUMN]


def model_row(row):
    return [
        row["model"].upper().replace("_", " + "),
        number(row.get("fd"), 3),
        ranged(row.get("fd_ratio"), row.get("fd_ratio_interval", [0, 0]), 3),
        *(number(row.get(key), 2) for key in ("sfd", "inception", "precision", "recall")),
        ranged(row.get("psnr"), row.get("psnr_interval", [0, 0])),
        number(row.get("snr")),
        number(row["mib"]),
        origin(row),
    ]


def fp_row(sweep, scores, steps):
    name = sweep.run(steps) / "samples_fp.npz"
    size = (ROOT / "demo/dit_mnist.pt").stat().st_size / 2**20
    common = dict(model="fp", sweep=sweep.args.name, steps=steps, num_images=sweep.args.num_images)
    common |= dict(calibration_seed="-", image_seed=0, rows="no", mib=size, hardware=hardware())
    command = json.loads((sweep.run(steps) / "jobs" / "04 fp.json").read_text())["command"]
    return common | image_metrics(scores, name) | dict(commands=[command])


def spread(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def rung_rows(sweep, scores, found, bits):
    """Table III: SNR, PSNR and FD over the calibration seeds, and the gain over the rung before,
    image by image, averaged over the seeds."""
    lines, before, at = [], None, sweep.args.ablation_steps
    twin = sweep.run(at) / "samples_fp.npz"
    for rung in RUNGS:
        rows = [found[at, bits, rung, seed] for seed in SEEDS]
        paths = [sweep.run(at, seed) / f"samples_{label(bits, rung)}.npz" for seed in SEEDS]
        psnr = np.mean([scores.psnr(path, twin) for path in paths], axis=0)
        drawn = np.mean([scores.drawn_fd(scores.of(path)) for path in paths], axis=0)
        gain = fd_gain = ""
        if before:
            gain = ranged((psnr - before[0]).mean(), scores.interval(psnr - before[0]))
            change = drawn - before[1]
            mean = np.mean([row["fd"] for row in rows]) - before[2]
            fd_gain = ranged(mean, centred(mean, change), 3)
        before = psnr, drawn, np.mean([row["fd"] for row in rows])
        columns = (spread([row[key] for row in rows]) for key in ("snr", "psnr", "fd"))
        flags = " ".join(FLAGS[rung]) or "none"
        seeds = origin(rows[0]).replace("seeds 0, 0", "seeds 0 to 2, 0")
        lines.append([rung, f"`{flags}`", *columns, gain, fd_gain, seeds])
    return lines


def error_rows(sweep, bits, rungs):
    at = sweep.args.ablation_steps
    base = cost_by_kind(sweep, (at, bits, "base", 0))
    rows = [cost_by_kind(sweep, (at, bits, rung, 0)) for rung in rungs]
    total = sum(base.values())
    lines = [["share in base", *(f"{base[kind] / total:.0%}" for kind in base)]]
    for rung, row in zip(rungs, rows, strict=True):
        lines.append([rung, *(number(row[kind] / base[kind]) for kind in base)])
    return ["weighted error / base", *base], lines


def models_section(sweep, scores, tables, found):
    for steps in sweep.args.steps:
        title = {250: "Table I", 100: "Table II"}.get(steps, "As in Table I")
        rows = [model_row(fp_row(sweep, scores, steps))]
        rows += [model_row(found[row]) for row in tables[steps]]
        yield f"### {title}: T = {steps}\n\n" + table(MODEL_COLUMNS, rows)


def ablation_section(sweep, scores, tables, found):
    at, leads = sweep.args.ablation_steps, LEADS if "leads" in tables else ()
    yield f"### Table III: what HO, MRQ and TGQ add, T = {at}, three calibration sets\n"
    columns = ["rung", "03_quantize.py", "SNR of eps, dB", "PSNR, dB", "FD(demo)"]
    columns += ["PSNR gain over the rung before, dB", "FD change", SWEEP_COLUMN]
    for bits in BITS:
        yield f"{label(bits).upper()}:\n\n" + table(columns, rung_rows(sweep, scores, found, bits))
        yield table(*error_rows(sweep, bits, [*RUNGS, *leads]))


def gradient_section(sweep):
    shares = gradient_shares(sweep)
    groups = [str(i + 1) for i in range(len(next(iter(shares.values()))))]
    lines = [[name, *(number(x, 3) for x in share)] for name, share in shares.items()]
    yield "### Where the gradient of Eq. (11) lies, and where the sampler listens\n"
    yield table(["share of time group", *groups], lines)
    yield "Softmax step of each time group, i of s_1 = 2^-i / 2^(k-1), W6A6:\n"
    lines = [[block, *map(str, row)] for block, row in softmax_steps(sweep, (6, 6)).items()]
    yield table(["block", *groups], lines)


def phase_section(sweep):
    found = phases(sweep)
    unit = next(job["seconds"] for (_, phase), job in found.items() if phase == "02")
    scale, name = (1, "seconds") if sweep.cuda else (unit, "time / phase 2")
    lines = [
        [steps[1:], phase, number(job["seconds"] / scale, 1), number(job["peak_mib"], 0)]
        for (steps, phase), job in found.items()
    ]
    jobs = "one job at a time" if sweep.cuda else "one core for each job"
    yield f"### Table IV: what each phase costs (medians over the sweep, {jobs}, with start-up)\n"
    yield table(["T", "phase", name, "peak host memory, MiB"], lines)


def render(sweep, scores, tables, found):
    """This sweep's section of RESULTS.md."""
    args, titles = sweep.args, dict(leads="Beyond the paper, one thing added at a time")
    titles["layers"] = "`--layers released` against `all`"
    size = f"N = {args.num_images}, {args.rows or 320} of 320 calibration rows, R = {args.rounds}"
    text = [f"## Sweep \"{args.name}\"\n", f"{size}. {hardware()}; torch {torch.__version__}.\n"]
    text += [f"    {command_line()}\n"]
    if "models" in args.only:
        text += models_section(sweep, scores, tables, found)
    if "ablation" in tables:
        text += ablation_section(sweep, scores, tables, found)
    for key in titles.keys() & tables.keys():
        rows = [model_row(found[row]) for row in tables[key]]
        text += [f"### {titles[key]}\n", table(MODEL_COLUMNS, rows)]
    text += phase_section(sweep)
    if "ablation" in tables:
        text += gradient_section(sweep)
    return "\n".join(text)


def command_line():
    """How to run this sweep again; where it writes is the reader's choice."""
    flags = " ".join(["python benchmarks/tables.py", *sys.argv[1:]])
    return re.sub(r" --(out|runs) \S+", "", flags)


def write_section(path, name, text):
    """Put a sweep's section in its place in RESULTS.md, or, if it is new, at the end."""
    begin, end = f"<!-- sweep {name} -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else INTRODUCTION
    before, found, after = old.partition(begin)
    after = after.partition(end)[2] if found else "\n"
    new = f"{before}{begin}\n\n{text}\n{end}{after}"
    dit.write_atomic(path, lambda file: file.write(new.encode()))


def main():
    args = parse_args()
    sweep, tables = plan(args)
    sweep.go()
    scores = Scores(args)
    rows = {row for group in tables.values() for row in group}
    bar = tqdm(sorted(rows, key=str), desc="scores", unit="model")
    found = {row: measure(sweep, scores, row) for row in bar}
    at = {row[0] for row in rows}
    everything = [fp_row(sweep, scores, steps) for steps in sorted(at)] + list(found.values())
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[args.name] = dict(command=command_line(), torch=str(torch.__version__), rows=everything)
    text = json.dumps(results, indent=1)
    dit.write_atomic(path, lambda file: file.write(text.encode()))
    write_section(args.out / "RESULTS.md", args.name, render(sweep, scores, tables, found))
    print(f"wrote {args.out}/RESULTS.md and results.json: {len(everything)} rows")


if __name__ == "__main__":
    dit.run_script(lambda _: main(), lambda: None)
