"""Every method on the same footing: the demo, its calibration rows, its sampler, its scores.

Runs 03_quantize.py and the scripts of methods/ on one calib.pt, samples every model and writes what
it found into results.json, a section of methods.md and a picture, in --out; other sections stay.
Progress is kept in --runs: a stopped sweep goes on where it was, a larger N adds images to those
that are there. On a CPU each core works on a job of its own.

    make compare             # N = 200; 800 of the same layers at W6A6 and W4A8: half a day or more
    make compare QUICK=1     # 20 images, 40 rows, few iterations: it shows that all scripts work
    python benchmarks/compare.py --compile             # the same, sampling faster
    python benchmarks/compare.py --only qdit ptqd 4/8 --from runs/tables/full/T100_seed0

To do a method again, delete what is left of it, RUN/*NAME* and RUN/jobs/*NAME*.
"""

import argparse
import shutil
from pathlib import Path

from tqdm import tqdm

from compare_page import INTRODUCTION, draw, picture_name, render
from contenders import (
    LAYERS, MAIN, METHODS, WIDTHS, Comparison, Model, full_precision, measure, own_model,
)  # fmt: skip
from jobs import add_sampling_flags
from layer_error import save
from page import write_results, write_section
from scores import Scores

from common.cli import at_least, run_script, whole_number
from common.errors import InputError


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="20 images, 40 rows, 1/200 iterations")
    p.add_argument("--num-images", type=whole_number, help="N")
    p.add_argument(
        "--num-images-main", type=whole_number, help="N of the same layers at W6A6 and W4A8"
    )
    p.add_argument("--steps", type=whole_number, default=100, help="T")
    p.add_argument("--rows", type=whole_number, help="calibration rows of a search; default: all")
    scale = "of the papers' numbers of iterations (PTQD: trajectories too), for larger networks"
    p.add_argument("--iterations", type=float, help=scale)
    add_sampling_flags(p)
    choices = [*METHODS, *WIDTHS, *LAYERS]
    only = (
        "these methods, widths, tables; default: all. released: the same layers; own: each its own"
    )
    p.add_argument("--only", nargs="+", choices=choices, default=[], metavar="NAME", help=only)
    p.add_argument(
        "--from", dest="source", type=Path, help="a run whose calib.pt and grads to take"
    )
    p.add_argument("--name", help="of the run, and of the section")
    p.add_argument("--runs", type=Path, default=Path("runs"))
    p.add_argument("--out", type=Path, default=Path("docs"))
    defaults = dict(num_images=200, num_images_main=800, iterations=0.1, name="compare")
    if p.parse_known_args()[0].quick:
        defaults = dict(num_images=20, num_images_main=20, iterations=0.005, rows=40)
        defaults["name"] = "compare_quick"
    p.set_defaults(**defaults)
    args = p.parse_args()
    at_least(1, args, "num_images", "num_images_main", "steps", "rows", "batch_size", "jobs")
    if not 0 < args.iterations <= 1:
        raise InputError(f"--iterations {args.iterations}: above 0, 1 at most")
    return args


def plan(args):
    """The comparison, with all its jobs, and what its tables hold: (layers, model, N) each."""

    def named(choices):
        return [name for name in choices if name in args.only] or list(choices)

    methods, widths = named(METHODS), [WIDTHS[name] for name in named(WIDTHS)]
    own = [method for method in methods if not METHODS[method].variant]
    tables = dict(
        released=[Model(method, bits) for bits in widths for method in methods],
        own=[own_model(method, bits) for bits in widths if bits in MAIN for method in own],
    )
    comparison, counts = Comparison(args), {}
    entries = [
        (layers, model, comparison.num_images(model.bits, layers))
        for layers in named(LAYERS) for model in tables[layers]
    ]  # fmt: skip
    for _, model, count in entries:  # it may be in both tables
        counts[model] = max(count, counts.get(model, 0))
    comparison.sample("fp", ["--fp"], max(counts.values(), default=args.num_images))
    for model, count in counts.items():
        comparison.model(model, count)
    return comparison, entries


def start_from(source, run):
    """Copy calib.pt and grads/ of another run, if there are none yet. The jobs of Phases 1 and 2
    then find theirs up to date, or say what differs."""
    for name in ("grads", "calib.pt"):  # the second last: it says that all is there
        if not (source / name).exists():
            raise InputError(f"--from {source}: it has no {name}")
    if (run / "calib.pt").exists():
        return
    shutil.rmtree(run / "grads", ignore_errors=True)
    shutil.copytree(source / "grads", run / "grads")
    shutil.copy(source / "calib.pt", run / "calib.pt.tmp")
    (run / "calib.pt.tmp").replace(run / "calib.pt")


def main(args):
    comparison, entries = plan(args)
    if args.source:
        start_from(args.source, comparison.run)
    comparison.go("compare")
    entries = [entry for entry in entries if entry[1].name not in comparison.failed]
    scores, found = {count: Scores(count) for count in {n for *_, n in entries}}, {}
    for layers, model, count in tqdm(entries, desc="scores", unit="model"):
        found.setdefault(layers, {})[model] = measure(comparison, scores[count], model)
    if found:
        text, values = render(comparison, scores, found)
        rows = [full_precision(comparison, scores[count]) for count in sorted(scores)]
        rows += [of_it for table in found.values() for of_it in table.values()]
        write_results(args.out / "results.json", args.name, dict(rows=rows) | values)
        write_section(args.out / "methods.md", args.name, text, INTRODUCTION)
        if "released" in found:
            save(args.out / picture_name(comparison), draw(found["released"]))
        print(f"wrote {args.out}/methods.md and results.json: {len(entries)} models")
    if comparison.failed:
        raise InputError(f"failed: {', '.join(comparison.failed)}; RUN/jobs/*.log say why")


if __name__ == "__main__":
    run_script(main, parse_args)
