"""The section of results.md that a sweep of tables.py writes."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from measurements import (
    compare, cost_by_kind, full_precision_row, gradient_shares, phases, samples_path,
    softmax_scales,
)  # fmt: skip
from processes import hardware
from scores import centred, pick_device
from sweep import LADDER, PAIRS, RUNGS, Row

from common.artifacts import atomic_write

INTRODUCTION = """# Results on the demo model

`benchmarks/tables.py` writes a section here for each sweep; the commands behind every row are in
`results.json`. FD(demo) is a Frechet distance of the demo's own features: no FID. Brackets are 95 %
bootstrap intervals over the images, the same draws for every model. SNR of eps is against full
precision, on 80 validation rows, weighted by the sampler's sensitivity. Precision and recall of a
few hundred images say little.

"""


def table(header, rows):
    lines = [" | ".join(header), "|".join(["---"] * len(header))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def ranged(value, interval, digits=2):
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def label(row):
    """A model as the tables name it."""
    bits = f"W{row.bits[0]}A{row.bits[1]}"
    return bits if row.tag == "full" else f"{bits} {row.tag}"


def origin(found):
    """What a row was measured with."""
    images = f"N = {found['num_images']}, T = {found['steps']}"
    if "rows" not in found:
        return f"{images}, seed {found['image_seed']}"
    seeds = f"seeds {found['calibration_seed']}, {found['image_seed']}"
    return f"{images}, {seeds}, {found['rows']} rows, R = {found['rounds']}"


# ------------------------------------------------------------------------------------------------
# Tables of models

ORIGIN = "N, T, seeds (calibration, images), rows, R"
MODEL_COLUMNS = ["model", "FD(demo)", "x FP", "sFD", "IS", "precision", "recall", "PSNR, dB"]
MODEL_COLUMNS += ["SNR of eps, dB", "MiB", ORIGIN]


def model_line(name, found):
    """A row of MODEL_COLUMNS; full precision has no PSNR."""
    against = ["", ""]
    if "psnr" in found:
        against[0] = ranged(found["fd_ratio"], found["fd_ratio_interval"], 3)
        against[1] = ranged(found["psnr"], found["psnr_interval"])
    metrics = [number(found[key]) for key in ("sfd", "inception", "precision", "recall")]
    line = [name, number(found["fd"], 3), against[0], *metrics, against[1]]
    return [*line, number(found.get("snr")), number(found["mib"]), origin(found)]


def models_section(sweep, scores, rows, found):
    for steps in sweep.args.steps:
        title = {250: "Table I", 100: "Table II"}.get(steps, "As in Table I")
        lines = [model_line("FP", full_precision_row(sweep, scores, steps))]
        lines += [model_line(label(row), found[row]) for row in rows if row.steps == steps]
        yield f"### {title}: T = {steps}\n\n" + table(MODEL_COLUMNS, lines)


def spread(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def seeds_of(rows, bits, rung):
    return [row for row in rows if row.bits == bits and row.tag == rung]


def rung_lines(sweep, scores, rows, found, bits):
    """Table III: SNR, PSNR and FD over the calibration seeds, and the change from the row before,
    image by image, averaged over the seeds; last that of the whole method from the first row."""
    lines, made, before = [], {}, None
    twin = sweep.run(sweep.args.ablation_steps) / "samples_fp.npz"
    for rung, flags in RUNGS.items():
        seeds = seeds_of(rows, bits, rung)
        files = [samples_path(sweep, row) for row in seeds]
        psnr = np.mean([scores.psnr(file, twin) for file in files], axis=0)
        drawn = np.mean([scores.drawn_fd(file) for file in files], axis=0)
        made[rung] = psnr, drawn, np.mean([found[row]["fd"] for row in seeds])
        changes = change(made[rung], before, scores) if before else ["", ""]
        before = made[rung]
        columns = [spread([found[row][key] for row in seeds]) for key in ("snr", "psnr", "fd")]
        numbers = ", ".join(str(row.seed) for row in seeds)
        from_ = origin(found[seeds[0]]).replace("seeds 0, 0", f"seeds ({numbers}), 0")
        lines.append([rung, f"`{' '.join(flags) or 'none'}`", *columns, *changes, from_])
    whole = change(made["full"], made["base"], scores)
    return [*lines, ["full, from base", "", "", "", "", *whole, from_]]


def change(now, before, scores):
    """Of PSNR and of FD, with intervals, as the tables have them. Given of two rungs: PSNR of each
    image, drawn FD, FD."""
    gain, fd = now[0] - before[0], now[2] - before[2]
    drawn = centred(fd, now[1] - before[1])
    return [ranged(gain.mean(), scores.interval(gain)), ranged(fd, drawn, 3)]


def error_table(sweep, models):
    """Weighted error by kind of layer, over that of the first model on the same calibration set,
    averaged over the sets; `models`: name -> its rows, one for each set."""
    costs = {row: cost_by_kind(sweep, row) for rows in models.values() for row in rows}
    first, *_ = models
    base = {row.seed: costs[row] for row in models[first]}
    kinds = [*base[0]]

    def total(cost, some):
        return sum(cost[kind] for kind in some)

    def over_base(rows, some):
        return number(np.mean([total(costs[x], some) / total(base[x.seed], some) for x in rows]))

    shares = (np.mean([x[kind] / total(x, kinds) for x in base.values()]) for kind in kinds)
    lines = [[f"share in {first}", *(f"{share:.0%}" for share in shares), "100%"]]
    for name, rows in models.items():
        lines.append([name, *(over_base(rows, [kind]) for kind in kinds), over_base(rows, kinds)])
    return table([f"weighted error / {first}", *kinds, "all"], lines)


def ablation_section(sweep, scores, tables, found):
    at, rows = sweep.args.ablation_steps, tables["ablation"]
    yield f"### Table III: what HO, MRQ and TGQ add, T = {at}\n"
    columns = ["rung", "03_quantize.py", "SNR of eps, dB", "PSNR, dB", "FD(demo)"]
    columns += ["PSNR change from the row before, dB", "FD change", ORIGIN]
    for bits in dict.fromkeys(row.bits for row in rows):
        yield f"{label(Row(at, bits, 'full'))}:\n"
        yield table(columns, rung_lines(sweep, scores, rows, found, bits))
        shown = {rung: seeds_of(rows, bits, rung) for rung in RUNGS}
        shown |= {tag: [Row(at, bits, tag)] for tag in LADDER if "plus" in tables}
        yield error_table(sweep, shown)
        groups = softmax_scales(sweep, Row(at, bits, "full"))
        yield "Scale of each time group after softmax, i of s_1 = 2^-i / 2^(k-1), of the first"
        yield "calibration set:\n"
        yield table(
            ["block", *group_numbers(groups)], [[k, *map(str, v)] for k, v in groups.items()]
        )


def group_numbers(by_name):
    return [str(i + 1) for i in range(len(next(iter(by_name.values()))))]


# ------------------------------------------------------------------------------------------------
# Pairs, gradients, phases


def pairs_section(sweep, scores, found):
    """Text, and what `compare` found of each pair, for results.json."""
    at, questions, values = sweep.args.ablation_steps, {}, []
    for pair in PAIRS:
        row, other = Row(at, pair.bits, pair.tag), Row(at, pair.bits, pair.other)
        change = compare(sweep, scores, row, other)
        values.append(dict(question=pair.question) | change)
        levels = (f"{found[row][key]:.2f} / {found[other][key]:.2f}" for key in ("psnr", "snr"))
        psnr = ranged(change["psnr_gain"], change["psnr_gain_interval"])
        snr = ranged(change["snr_gain"], change["snr_gain_interval"])
        error, (psnrs, snrs) = number(change["weighted_error"]), levels
        line = [f"{label(row)} / {label(other)}", error, psnrs, psnr, snrs, snr]
        questions.setdefault(pair.question, []).append(line)
    columns = ["models", "ratio of weighted errors", "PSNR, dB", "gain, dB", "SNR of eps, dB"]
    text = ["### Two models that differ in one thing\n"]
    text += ["Gain: of the first over the second, image by image, validation row by row."]
    text += ["Errors are of layers on their own, before those of tuned learn together.\n"]
    for question, lines in questions.items():
        text += [f"{question}:\n", table([*columns, "gain, dB"], lines)]
    return text, values


def gradient_section(shares):
    yield "### Where the gradient of Eq. (11) lies, and where the sampler listens\n"
    yield "Share of the squared gradient at the outputs of each kind of layer, by time group:\n"
    lines = [[name, *(number(x, 3) for x in share)] for name, share in shares.items()]
    yield table(["outputs of", *group_numbers(shares)], lines)


def phase_section(sweep):
    found, cuda = phases(sweep), pick_device().type == "cuda"
    unit = next(job["seconds"] for (_, phase), job in found.items() if phase == "02")
    scale, name = (1, "seconds") if cuda else (unit, "time / phase 2")
    lines = [
        [str(steps), phase, number(job["seconds"] / scale, 1), number(job["peak_mib"], 0)]
        for (steps, phase), job in found.items()
    ]
    jobs = "one job at a time" if cuda else "one core for each job"
    yield f"### Table IV: what each phase costs (medians over the sweep, {jobs}, with start-up)\n"
    yield table(["T", "phase", name, "peak host memory, MiB"], lines)


# ------------------------------------------------------------------------------------------------
# The section


def render(sweep, scores, tables, found):
    """This sweep's section, and what of it results.json holds beside the rows."""
    args, values = sweep.args, {}
    titles = dict(layers="`--layers released` against `all`")
    titles["plus"] = "methods/tqdit_plus.py, one thing added at a time"
    size = f"N = {args.num_images}, {args.rows or 320} of 320 calibration rows, R = {args.rounds}"
    steps = [row.steps for table in tables.values() for row in table]
    machine = machines(sweep.run(steps[0]) / "samples_fp.npz" if steps else None)
    text = [f'## Sweep "{args.name}"\n', f"{size}. {machine}.\n", f"    {command_line()}\n"]
    if "models" in tables:
        text += models_section(sweep, scores, tables["models"], found)
    if "ablation" in tables:
        text += ablation_section(sweep, scores, tables, found)
    for key in (key for key in titles if key in tables):
        lines = [model_line(label(row), found[row]) for row in tables[key]]
        text += [f"### {titles[key]}\n", table(MODEL_COLUMNS, lines)]
    if "pairs" in tables:
        lines, values["pairs"] = pairs_section(sweep, scores, found)
        text += lines
    if "gradient" in tables:
        values["gradient_shares"] = gradient_shares(sweep.run(args.ablation_steps))
        text += gradient_section(values["gradient_shares"])
    return "\n".join([*text, *phase_section(sweep)]), values


def machines(samples):
    """This machine, and the GPU that these images, if there are any, were sampled on elsewhere."""
    text = f"{hardware(pick_device())}; torch {torch.__version__}"
    if samples is None:
        return text
    with np.load(samples) as file:
        meta = json.loads(str(file["meta"]))
    if meta["device"] == "cpu" or torch.cuda.is_available():
        return text
    return f"{text}. Images were sampled on an {meta['device']}, torch {meta['torch']}"


def command_line():
    """How to run this sweep again; where it writes is the reader's choice."""
    script = f"python benchmarks/{Path(sys.argv[0]).name}"
    return re.sub(r" --(out|runs|from) \S+", "", " ".join([script, *sys.argv[1:]]))


def write_results(path, name, values):
    """Put a sweep's values in results.json, with the command that makes them."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = dict(command=command_line(), torch=str(torch.__version__)) | values
    with atomic_write(path) as file:
        file.write(json.dumps(results, indent=1).encode())


def write_section(path, name, text, introduction=INTRODUCTION):
    """Put a sweep's section in its place on a page, or, if it is new, at the end."""
    begin, end = f"<!-- sweep {name} -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else introduction
    before, found, after = old.partition(begin)
    after = after.partition(end)[2] if found else "\n"
    new = f"{before}{begin}\n\n{text}\n{end}{after}"
    with atomic_write(path) as file:
        file.write(new.encode())


def publish(page, name, introduction, text):
    """Print what a benchmark found; put it, with its introduction and the command, into its section
    of a page, if one is given."""
    print(text)
    if page:
        command = f"```sh\n{command_line()}\n```\n"
        write_section(page, name, "\n".join([introduction, command, text]))
