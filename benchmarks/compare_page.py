"""The section of methods.md that compare.py writes, and the pictures of FD ratios by width."""

import textwrap

import numpy as np
import torch

from contenders import MAIN, METHODS, WIDTHS, Model, own_model, record
from layer_error import INK, canvas
from page import command_line, machines, number, ranged, table

INTRODUCTION = "# Every method on the same footing\n\n"
EXPLANATION = """T = {steps}, {rows} of 320 calibration rows, seed 0, guidance 2. {machine}.

    {command}

Time: {kind} seconds of Phase 3 alone, from the start of its process to its report, over those of
one full-precision forward pass of the 320 calibration rows, timed on the same core just before and
just after. About {start:.0f} passes of it are Python's start and reading files. Not in it: Phase 1,
{phase1} passes' worth for every method; Phase 2, about 4, for those that use gradients ({users}).
"≥": the process was killed and resumed. Peak: host memory of that process; one that makes the
forward pass alone takes {peak:.0f} MiB.

{iterations}"""
COLUMNS = ["FD(demo), x FP", "PSNR, dB", "SNR of eps, dB", "MiB", "time, passes", "peak, MiB"]
TICKS = 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 10, 20, 50, 100, 200
STYLES = {  # method: color, marker, line; this repository's two are thicker
    "tqdit": ("#0072b2", "o", "-"),
    "plus": ("#d55e00", "s", "-"),
    "plus_even": ("#d55e00", "s", ":"),
    "plus_token": ("#d55e00", "s", "--"),
    "qdiffusion": ("#009e73", "^", "--"),
    "ptqd": ("#009e73", "v", ":"),
    "ptq4dit": ("#cc79a7", "D", "--"),
    "htg": ("#56b4e9", "P", "-."),
    "qdit": ("#000000", "X", "--"),
    "qdit_16": ("#000000", "X", ":"),
    "ditas": ("#8a8a8a", "*", "-."),
    "tcaqdm": ("#b8860b", "p", "--"),
}


def picture_name(comparison):
    return f"methods_{comparison.args.name}.png"


def width(bits):
    return f"W{bits[0]}A{bits[1]}"


def columns(found):
    """A model's COLUMNS; time is at least so long if an earlier attempt was cut off."""
    return [
        ranged(found["fd_ratio"], found["fd_ratio_interval"], 3),
        ranged(found["psnr"], found["psnr_interval"]),
        number(found["snr"]),
        number(found["mib"]),
        "≥ " * found["resumed"] + number(found["passes"], 0),
        number(found["peak_mib"], 0),
    ]


# ------------------------------------------------------------------------------------------------
# Tables. `scores` are by number of images, `found` by Model, for each table


def widths_of(found):
    """Widths, widest first, that models of a table have."""
    return [bits for bits in WIDTHS.values() if any(model.bits == bits for model in found)]


def released_section(comparison, scores, found):
    """A table for each width."""
    yield "### The same layers\n"
    for bits in widths_of(found):
        count = comparison.num_images(bits)
        fd = scores[count].of(comparison.run / "samples_fp.npz")["fd"]
        yield f"{width(bits)}, N = {count}; full precision has FD(demo) {fd:.3f} there:\n"
        models = [Model(method, bits) for method in METHODS]
        yield table(
            ["method", *COLUMNS], [[m.label, *columns(found[m])] for m in models if m in found]
        )


def paired(comparison, scores, model, other):
    """PSNR gain, and ratio of Frechet distances, of one model against another, with intervals."""
    paths = [comparison.run / f"samples_{m.name}.npz" for m in (model, other)]
    gain, gain_interval = scores.psnr_gain(*paths, comparison.run / "samples_fp.npz")
    ratio, ratio_interval = scores.fd_ratio(*paths)
    return dict(
        models=[model.name, other.name],
        num_images=scores.num_images,
        psnr_gain=gain,
        psnr_gain_interval=gain_interval,
        fd_ratio=ratio,
        fd_ratio_interval=ratio_interval,
    )


def pairs(comparison, scores, found, base):
    """`paired` of every model of the same layers against the one of method `base`; by model."""
    others = {m: m._replace(method=base) for m in found if m.method != base}
    return {
        m: paired(comparison, scores[comparison.num_images(m.bits)], m, other)
        for m, other in others.items() if other in found
    }  # fmt: skip


def pairs_section(values, base):
    """Methods down, widths across."""
    yield f"### Against {METHODS[base].label}, image by image\n"
    yield "Gain of PSNR, and ratio of Frechet distances: below 1 is better.\n"
    widths, lines = widths_of(values), []
    for method in (m for m in METHODS if any(model.method == m for model in values)):
        lines.append([METHODS[method].label])
        for pair in (values.get(Model(method, bits)) for bits in widths):
            gain = ranged(pair["psnr_gain"], pair["psnr_gain_interval"]) if pair else ""
            ratio = ranged(pair["fd_ratio"], pair["fd_ratio_interval"], 3) if pair else ""
            lines[-1] += [gain, ratio]
    heads = [head for bits in widths for head in (f"{width(bits)}: PSNR, dB", "FD(demo), x")]
    yield table(["method", *heads], lines)


def own_section(comparison, scores, found, released):
    """A table for each width of MAIN, with the change from the same method on the same layers, if
    these are compared too."""
    yield "### Each method's own choice of layers\n"
    for bits in (b for b in MAIN if b in widths_of(found)):
        count, lines = comparison.num_images(bits, "own"), []
        yield f"{width(bits)}, N = {count}:\n"
        for model in (own_model(name, bits) for name in METHODS if not METHODS[name].variant):
            other, change = model._replace(layers="released"), ""
            if model != other and model in found and other in released:
                pair = paired(comparison, scores[count], model, other)
                change = ranged(pair["psnr_gain"], pair["psnr_gain_interval"])
            if model in found:
                lines.append([model.label, *columns(found[model]), change])
        head = ["method", *COLUMNS, "PSNR, from the same layers, dB"]
        last = len(head) if any(change for *_, change in lines) else -1
        yield table(head[:last], [line[:last] for line in lines])


# ------------------------------------------------------------------------------------------------
# What the columns are


def iterations_text(comparison, models):
    """How many iterations the methods that learn had, and of how many in their papers."""
    used = {}
    for method in dict.fromkeys(model.method for model in models):
        flags = comparison.iterations(method)
        if flags:
            paper = METHODS[method].iterations
            each = (f"`{flag} {n}` of {paper[flag]}" for flag, n in flags.items())
            used[method] = f"{METHODS[method].label} {', '.join(each)}"
    if not used:
        return ""
    scale = f"`--iterations {comparison.args.iterations:g}`"
    text = f"Shortened ({scale} of the papers' numbers): {'; '.join(used.values())}."
    return textwrap.fill(text, 100, break_on_hyphens=False) + "\n"


def explanation(comparison, found):
    """What was run on what, and what time and memory hold."""
    found = {model: of_it for table in found.values() for model, of_it in table.items()}
    args, of_forward = comparison.args, record(comparison.run, "forward")
    users = [name for name in METHODS if not METHODS[name].variant]
    users = [
        name for name in users if any(found[m]["gradients"] for m in found if m.method == name)
    ]
    unit = np.median([of_it["unit_seconds"] for of_it in found.values()])
    text = EXPLANATION.format(
        steps=args.steps,
        rows=args.rows or 320,
        machine=machines(comparison.run / "samples_fp.npz"),
        command=command_line(),
        kind="wall" if torch.cuda.is_available() else "processor",
        start=max(of_forward["cpu_seconds"] / unit - 4, 0),  # it makes four passes
        phase1=2 * 80 * args.steps // 320,
        users=", ".join(METHODS[name].label for name in users) or "none here",
        peak=of_forward["peak_mib"],
        iterations=iterations_text(comparison, found),
    )
    return text.rstrip() + "\n"


def render(comparison, scores, found):
    """The section, and what results.json holds beside the rows."""
    text = [f'## Comparison "{comparison.args.name}"\n', explanation(comparison, found)]
    released, own = found.get("released", {}), found.get("own", {})
    bases = {base: pairs(comparison, scores, released, base) for base in ("tqdit", "plus")}
    if released:
        text += [f"![FD(demo) over full precision's, by width]({picture_name(comparison)})\n"]
        text += released_section(comparison, scores, released)
    for base, values in bases.items():
        text += pairs_section(values, base) if values else []
    if own:
        text += own_section(comparison, scores, own, released)
    return "\n".join(text), {f"against_{k}": [*v.values()] for k, v in bases.items()}


# ------------------------------------------------------------------------------------------------
# The picture


def height(ratio):
    """Where a ratio stands: linear within some 20 % of 1, logarithmic beyond."""
    return np.arcsinh(np.log(np.maximum(ratio, 1e-9)) / 0.2)


def ratio_at(height):
    return np.exp(0.2 * np.sinh(height))


def spread_out(places, gap):
    """Places (n,) moved up, in their order, until they are `gap` apart; then all of them down by
    half of the largest move."""
    order, moved = np.argsort(places), np.array(places, float)
    for low, high in zip(order, order[1:], strict=False):
        moved[high] = max(moved[high], moved[low] + gap)
    return moved - (moved - places).max() / 2


def draw_line(ax, method, at, found):
    """A method's ratios and intervals at these places; returns its last point."""
    color, marker, line = STYLES[method]
    y = np.array([of_it["fd_ratio"] for of_it in found])
    low, high = np.array([of_it["fd_ratio_interval"] for of_it in found]).T
    bold = method in ("tqdit", "plus")
    style = dict(color=color, marker=marker, ls=line, lw=2.6 if bold else 1.5, ms=6, capsize=2)
    error = np.maximum([y - low, high - y], 0)
    ax.errorbar(at, y, error, elinewidth=1, zorder=3 if bold else 2, **style)
    return at[-1], y[-1]


def name_lines(ax, ends, at, gap):
    """The names of lines that end at these points, from `at` on, where none hides another; a gap
    before each."""
    bottom, top = height(ax.get_ylim())
    places = height([y for _, y in ends.values()])
    places = spread_out(places, 0.05 * (top - bottom))
    places -= max(places.max() - top, 0)
    places = ratio_at(places + max(bottom + 0.02 * (top - bottom) - places.min(), 0))
    for (method, (x, y)), place in zip(ends.items(), places, strict=True):
        color = STYLES[method][0]
        ax.plot([x, at - gap], [y, place], color=color, lw=0.8, clip_on=False)
        ax.text(at, place, METHODS[method].label, va="center", size=9.5)


def draw(found):
    """FD ratio by width, a line a method, with intervals; each line's name stands at its end."""
    widths, ends = widths_of(found), {}
    counts = {model.bits: of_it["num_images"] for model, of_it in found.items()}
    steps = next(iter(found.values()))["steps"]
    info = f"the same layers, T = {steps}; bars: 95 % intervals over the images; "
    info += "axis: linear near 1, logarithmic far from it"
    fig = canvas(5.2, "FD(demo) over full precision's, by bits of weights and activations", info)
    ax = fig.subplots()
    ax.set_yscale("function", functions=(height, ratio_at))
    for i, method in enumerate(STYLES):
        here = {x: Model(method, b) for x, b in enumerate(widths) if Model(method, b) in found}
        if here:
            at = np.array([*here]) + 0.03 * (i - (len(STYLES) - 1) / 2)  # bars beside each other
            ends[method] = draw_line(ax, method, at, [found[m] for m in here.values()])
    left, names_at = -0.3, len(widths) - 0.68
    right = left + (names_at - left) / 0.79  # a fifth is for the names
    gap = 0.007 * (right - left)
    ax.hlines(1, left, names_at - gap, color=INK, lw=0.8, zorder=1)
    low, high = ax.get_ylim()
    ax.set(xlim=(left, right), ylim=(low, high), ylabel="FD(demo) / full precision's")
    ax.set_yticks([tick for tick in TICKS if low <= tick <= high])
    ax.yaxis.set_major_formatter("{x:g}")
    names = [f"{width(b)}\nN = {counts[b]}" for b in widths]
    ax.set_xticks(range(len(widths)), names)
    name_lines(ax, ends, names_at, gap)
    return fig
