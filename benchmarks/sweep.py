"""The models of a sweep of tables.py, and the jobs that make them."""

from typing import NamedTuple

from jobs import Jobs, sampling_flags

TQDIT, PLUS = "03_quantize.py", "methods/tqdit_plus.py"
RUNGS = {  # Table III, in its order; "full" is the paper's method, without a tag
    "base": ["--metric", "mse", "--no-mrq", "--no-tgq"],
    "ho": ["--no-mrq", "--no-tgq"],
    "ho_mrq": ["--no-tgq"],
    "full": [],
    "tensor": ["--weight-granularity", "tensor"],  # the authors' granularity, D5
}
NEAREST, SEARCHED = (["--rounding", how] for how in ("nearest", "gptq"))  # on searched scales
UNFITTED = ["--no-fit-last", *SEARCHED]
STATIC = "--input-group none --no-dynamic-products --weight-group none --no-hadamard".split()
STATIC += ["--no-fit-last"]
LADDER = {  # what methods/tqdit_plus.py is made of: each rung adds one thing
    "edge": "--cond-bits none --no-tgq-inputs --no-smoothquant".split() + STATIC + NEAREST,
    "inputs": "--cond-bits none --no-smoothquant".split() + STATIC + NEAREST,
    "smoothquant": "--cond-bits none".split() + STATIC + NEAREST,
    "gptq": "--cond-bits none".split() + STATIC + SEARCHED,
    "static": STATIC + SEARCHED,
    "dynamic": "--no-dynamic-products --weight-group none --no-hadamard".split() + UNFITTED,
    "products": "--weight-group none --no-hadamard".split() + UNFITTED,
    "hadamard": "--weight-group none".split() + UNFITTED,
    "groups": UNFITTED,
    "fitted": SEARCHED,
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
    "tuned": (PLUS, ["--tune-epochs", "20"]),
    "static_r3": (PLUS, [*STATIC, *SEARCHED, "--rounds", "3"]),
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
    Pair("R = 3 against R = 1", (6, 6), "static_r3", "static"),
    Pair("A scale per output channel against one per tensor (D5)", (6, 6), "full", "tensor"),
    Pair("The last layer fitted to quantized inputs", (6, 6), "fitted", "groups"),
    Pair("The last layer fitted to quantized inputs", (4, 8), "fitted", "groups"),
    Pair("Scales chosen by GPTQ's own error", (6, 6), "plus", "fitted"),
    Pair("Scales chosen by GPTQ's own error", (4, 8), "plus", "fitted"),
    Pair("Scales and biases learned together", (6, 6), "tuned", "plus"),
    Pair("Scales and biases learned together", (4, 8), "tuned", "plus"),
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


class Sweep(Jobs):
    """The jobs of a sweep of tables.py."""

    def __init__(self, args):
        super().__init__(args)
        self.folder = args.runs / args.name

    def run(self, steps, seed=0, tag=""):
        """The run's folder; gradients of another eps need one of their own."""
        return self.folder / f"T{steps}_seed{seed}{'_renoise' * (tag == 'renoise')}"

    def run_of(self, row):
        return self.run(row.steps, row.seed, row.tag)

    def calibrate(self, row):
        """Phases 1 and 2 of a row."""
        eps = "renoise" if row.tag == "renoise" else "implied"
        super().calibrate(self.run_of(row), row.steps, row.seed, eps)

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
        images = ["--num-images", self.args.num_images, *sampling_flags(self.args)]
        cost = 2.6 * self.args.num_images * steps
        self.add(3, run, f"04 {name}", ["04_sample.py", *flags, *images], cost)
