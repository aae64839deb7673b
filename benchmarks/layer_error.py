"""The picture that the paper lacks, where HO, MRQ and TGQ act; and the canvas of all pictures.

The error is Eq. (16), a layer's squared output error weighted by the squared gradient of Eq. (11)
and summed over the calibration rows, as 03_quantize.py reports it. figures.py is the script.
"""

import numpy as np

import processes  # noqa: F401  puts the repository root on the path

from common.artifacts import atomic_write
from common.errors import InputError
from common.quant_file import load_quant

try:
    from matplotlib import rcParams
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # canvas says so

INK, GRAY, BLUE, DPI = "#222222", "#666666", "#0072b2", 160
RUNGS = {  # tag: name and color, the same in every panel
    "base": ("baseline", "#7a7a7a"),
    "ho": ("+ HO", BLUE),
    "ho_mrq": ("+ MRQ", "#d55e00"),
    "full": ("+ TGQ", "#009e73"),
    "plus": ("TQ-DiT plus", "#aa4499"),
}


def need(path, command):
    """`path`, if it is a file; InputError with the command that makes it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with `{command}`")
    return path


def canvas(height, title, info, width=9):
    """A figure of this size in inches with title and settings; the axes go below them.
    InputError without matplotlib."""
    if Figure is None:
        raise InputError("matplotlib is missing: pip install -r requirements-dev.txt")
    rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "text.color": INK})
    fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    fig.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.62 / height), w_pad=0.08)
    fig.text(0.07 / width, 1 - 0.09 / height, title, size=12.5, weight="bold", va="top")
    fig.text(0.07 / width, 1 - 0.36 / height, info, size=9.5, color=GRAY, va="top")
    return fig


def save(path, fig):
    with atomic_write(path) as file:
        fig.savefig(file, format="png")
    print(f"wrote {path}, {path.stat().st_size / 2**10:.0f} KiB")


def load_rungs(run, bits):
    """Quant files by tag; InputError if one is missing or they do not compare. `plus` is drawn if
    it is there and compares."""
    command, quants = "make tables", {}
    paths = {tag: run / f"quant_{bits}_{tag}.pt" for tag in RUNGS}
    if not paths["full"].is_file():
        paths["full"] = run / f"quant_{bits}.pt"
    for tag, path in paths.items():
        if tag != "plus" or path.is_file():
            quants[tag] = load_quant(need(path, command))
    terms = {tag: compared(quant) for tag, quant in quants.items()}
    if terms.get("plus") != terms["base"]:
        quants.pop("plus", None)
    if any(terms[tag] != terms["base"] for tag in quants):
        raise InputError(f"{run}: rungs of other rows or gradients; run `{command}`")
    return quants


def compared(quant):
    """What two quant files must share for their errors to compare."""
    settings, inputs = quant["settings"], quant["inputs"]
    layers = settings.get("layers", "released")  # methods/tqdit_plus.py has no such choice
    return settings["rows"], layers, inputs["calib"], inputs["grads"]


def cost_table(costs):
    """Kinds of layers, and their cost (rungs, kinds, blocks), of costs by name, one dict for each
    rung, of the layers that the first has; NaN where a block has no such layer.
    The embedder stands in the first column, the final layer in the last."""
    depth = 1 + max(int(name.split(".")[1]) for name in costs[0] if name.startswith("blocks."))
    cells = {}
    for name in costs[0]:
        block, kind = depth - 1 if name.startswith("final") else 0, name
        if name.startswith("blocks."):
            _, block, _, kind = name.split(".", 3)
        cells[name] = kind.replace("final_layer.linear", "final"), int(block)
    kinds = list(dict.fromkeys(kind for kind, _ in cells.values()))
    table = np.full((len(costs), len(kinds), depth), np.nan)
    for name, (kind, block) in cells.items():
        table[:, kinds.index(kind), block] = [rung[name] for rung in costs]
    return kinds, table


def signed(ratio):
    """A ratio as the change in percent; nothing below half a percent."""
    change = 100 * (ratio - 1)
    return f"{change:+.0f}".replace("-", "\N{MINUS SIGN}") if abs(change) >= 0.5 else ""


def draw_bars(ax, kinds, shares, tags):
    """Shares (rungs, kinds), percent; in the bars the baseline's share, then each change."""
    width = 0.86 / len(tags)
    for i, tag in enumerate(tags):
        name, color = RUNGS[tag]
        x = np.arange(len(kinds)) + (i - (len(tags) - 1) / 2) * width
        ax.bar(x, shares[i], 0.94 * width, color=color, label=f"{name} {shares[i].sum():.0f} %")
        ratios = shares[i] / shares[i - 1]
        for j, share in enumerate(shares[i]):
            text = signed(ratios[j]) if i else f"{share:.2g} %"
            style = dict(color="white", rotation=90, ha="center", va="top", size=8.5)
            ax.text(x[j], 0.93 * share, text, **style)
    ax.set(yscale="log", ylabel="% of the baseline's total", ylim=(shares.min() / 4, None))
    ax.set_xticks(range(len(kinds)), kinds)
    ax.yaxis.set_major_formatter("{x:g}")
    style = dict(frameon=False, handlelength=1, columnspacing=1.5)
    ax.legend(ncols=len(tags), loc="lower left", bbox_to_anchor=(0, 0.99), **style)


def draw_map(ax, kinds, ratio):
    """Error ratios (kinds, blocks) as colors, with the change in percent where cells have room."""
    depth = ratio.shape[1]
    ax.imshow(np.log2(ratio), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set(xlabel="block", xticks=range(0, depth, 1 + depth // 8))
    for (row, block), value in np.ndenumerate(ratio):
        if depth <= 8 and np.isfinite(value):
            style = dict(ha="center", va="center", size=8)
            style["color"] = "white" if abs(np.log2(value)) > 0.6 else INK
            ax.text(block, row, signed(value), **style)


def draw_error(kinds, table, tags, info):
    """Bars: error by kind of layer. Maps: change against the rung before, block by block."""
    fig = canvas(6.8, "Weighted output error by layer, and what each idea changes", info)
    top, bottom = fig.subfigures(2, 1)
    shares = 100 * np.nansum(table, axis=2) / np.nansum(table[0])
    draw_bars(top.subplots(), kinds, shares, tags)
    axes = bottom.subplots(1, len(tags) - 1, sharey=True, squeeze=False)[0]
    for i, (ax, tag) in enumerate(zip(axes, tags[1:], strict=True)):
        draw_map(ax, kinds, table[i + 1] / table[i])
        ax.set_title(RUNGS[tag][0], color=RUNGS[tag][1], weight="bold", size=11)
    bar = bottom.colorbar(ax.images[0], ax=axes, ticks=[-1, 0, 1], aspect=30)
    bar.ax.set_yticklabels(["halved", "same", "doubled"])
    return fig


def layer_error(run, bits, name):
    """The picture of a run at these bits, as a figure; `name` leads its line of settings."""
    quants = load_rungs(run, bits)
    kinds, table = cost_table([quant["report"]["costs"] for quant in quants.values()])
    rows = quants["base"]["settings"]["rows"] or "all"
    info = f"{name}, {rows} calibration rows; Eq. (16), baseline: uniform, MSE; "
    return draw_error(kinds, table, list(quants), info + "numbers: change from rung to rung, %")
