"""Tables I to IV of the paper on the demo model, and the rows that go beyond them.

Runs the scripts from nothing, then writes what it found into results.json and into its own section
of results.md, in --out; other sections are kept. Progress is kept in --runs: a stopped sweep goes
on where it was. On a CPU each core works on a job of its own.

    make tables              # N = 10,000 images, for a GPU
    make tables QUICK=1      # an hour on 2 cores; every row says that it is the quick one
    python benchmarks/tables.py --name mine --num-images 100 --ablation-steps 100 --only pairs
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from jobs import add_sampling_flags
from sweep import LADDER, PAIRS, RUNGS, Row, Sweep
from measurements import full_precision_row, measure
from page import render, write_results, write_section
from scores import Scores

from common.cli import at_least, run_script, whole_number

BITS = ((6, 6), (4, 8))  # of Table III, and of the ladder beyond it, those of --bits
SEEDS = (0, 1, 2)  # of the calibration set, in Table III
TABLES = {
    "models": "Tables I and II",
    "ablation": "Table III",
    "layers": "deviation D6",
    "plus": "what methods/tqdit_plus.py adds, one thing after the other",
    "pairs": "two models that differ in one thing",
    "gradient": "where the gradient of Eq. (11) lies",
}


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="20 images, 40 rows, R = 1")
    p.add_argument("--num-images", type=whole_number, help="N")
    p.add_argument("--rows", type=whole_number, help="calibration rows of a search; default: all")
    p.add_argument("--rounds", type=whole_number, help="R of the paper's method")
    p.add_argument(
        "--steps", type=whole_number, nargs="+", default=[250, 100], help="T, Tables I, II"
    )
    p.add_argument("--ablation-steps", type=whole_number, help="T of all other tables")
    widths = ["8/8", "6/6", "4/8", "4/4"]
    p.add_argument("--bits", nargs="+", choices=widths, default=widths, help="of Tables I to III")
    add_sampling_flags(p)
    contents = "; ".join(f"{name}: {what}" for name, what in TABLES.items())
    p.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES), help=contents)
    p.add_argument("--name", help="what every row calls this sweep")
    p.add_argument("--runs", type=Path, default=Path("runs/tables"))
    p.add_argument("--out", type=Path, default=Path("docs"))
    defaults = dict(num_images=10000, rows=None, rounds=3, ablation_steps=250, name="full")
    if p.parse_known_args()[0].quick:
        defaults = dict(num_images=20, rows=40, rounds=1, ablation_steps=100, name="quick")
    p.set_defaults(**defaults)
    args = p.parse_args()
    at_least(1, args, "num_images", "rows", "rounds", "ablation_steps", "batch_size", "jobs")
    return args


def plan(args):
    """The sweep, and the rows of each of its tables."""
    widths = [tuple(map(int, bits.split("/"))) for bits in args.bits]
    at, beyond = args.ablation_steps, ("full", "renoise", *LADDER, "plus_mse")
    narrow = [bits for bits in BITS if bits in widths]
    rows = dict(
        models=[
            Row(steps, bits, tag)
            for steps in args.steps for tag in ("full", "plus") for bits in widths
        ],
        ablation=[Row(at, bits, rung, seed) for bits in narrow for rung in RUNGS for seed in SEEDS],
        layers=[Row(at, bits, tag) for bits in ((8, 8), (6, 6)) for tag in ("full", "all")],
        plus=[Row(at, bits, tag) for bits in narrow for tag in beyond],
        pairs=[Row(at, pair.bits, tag) for pair in PAIRS for tag in (pair.tag, pair.other)],
        gradient=[],
    )  # fmt: skip
    tables = {key: rows[key] for key in TABLES if key in args.only}
    every = sorted({row for table in tables.values() for row in table}, key=str)
    sweep = Sweep(args)
    of_gradient = [Row(at, (), "full")] if "gradient" in tables else []
    for row in every + of_gradient:
        sweep.calibrate(row)
    for steps in sorted({row.steps for row in every}):
        sweep.sample(sweep.run(steps), "fp", steps, ["--fp"])
    for row in every:
        sweep.model(row)
    return sweep, tables


def main(args):
    sweep, tables = plan(args)
    sweep.go("tables")
    rows = sorted({row for table in tables.values() for row in table}, key=str)
    scores = Scores(args.num_images)
    bar = tqdm(rows, desc="scores", unit="model")
    found = {row: measure(sweep, scores, row) for row in bar}
    at = sorted({row.steps for row in rows})
    everything = [full_precision_row(sweep, scores, steps) for steps in at] + list(found.values())
    text, values = render(sweep, scores, tables, found)
    write_results(args.out / "results.json", args.name, dict(rows=everything) | values)
    write_section(args.out / "results.md", args.name, text)
    print(f"wrote {args.out}/results.md and results.json: {len(everything)} rows")


if __name__ == "__main__":
    run_script(main, parse_args)
