"""Q-DiT's search for the group size of every layer (arXiv 2406.17343): evolution, and its fitness.

The authors' script stops after its first generation, for want of a function that keeps the best
candidates: it is read as keeping the best of all so far.
"""

import random
from copy import deepcopy
from typing import NamedTuple

from common.offload import offloaded
from common.quant_file import swap_layer
from common.report import signal_to_noise
from common.unit_data import rows_to_search

TRIES = 10  # times as many draws as candidates wanted; small spaces run out of new ones


class Evolution(NamedTuple):
    """Sizes of the search, those of the authors' script."""

    generations: int = 10
    population: int = 50
    parents: int = 10  # the best so far, kept
    mutants: int = 25
    crossovers: int = 25
    mutation: float = 0.1  # how likely a layer's choice is drawn anew

    def search(self, space, start, allowed, fitness, draw):
        """The candidate of greatest fitness, of those that are `allowed`; a tuple, whose entry i is
        from space[i]. The first generation is `start` and random ones; every other is mutants and
        crossovers of the best so far, filled up with random ones. `draw` is a random.Random.
        """
        found = {start: fitness(start)}

        def grow(count, new):
            """Candidates not seen yet, so many if they turn up."""
            target = len(found) + count
            for _ in range(TRIES * count):
                if len(found) >= target:
                    break
                candidate = new()
                if candidate not in found and allowed(candidate):
                    found[candidate] = fitness(candidate)

        def random_one():
            return tuple(map(draw.choice, space))

        grow(self.population - 1, random_one)
        for _ in range(self.generations):
            best, before = sorted(found, key=found.get, reverse=True)[: self.parents], len(found)
            grow(self.mutants, lambda best=best: self.mutant(draw.choice(best), space, draw))
            grow(self.crossovers, lambda best=best: self.cross(best, draw))
            grow(self.population - (len(found) - before), random_one)
        return max(found, key=found.get)

    def mutant(self, parent, space, draw):
        """A candidate with some choices drawn anew."""
        pairs = zip(parent, space, strict=True)
        return tuple(draw.choice(of) if draw.random() < self.mutation else x for x, of in pairs)

    def cross(self, best, draw):
        """A candidate with every choice from one of two of the best."""
        return tuple(map(draw.choice, zip(draw.choice(best), draw.choice(best), strict=True)))


# ------------------------------------------------------------------------------------------------
# Group sizes


class Fitness:
    """SNR of eps, as the report has it, of the model with these layers in these group sizes, on so
    many calibration rows. `make(layer, size)` is a layer's quantized twin. What is known is kept
    with the run's parts."""

    def __init__(self, phase3, layers, rows, make, bar):
        self.phase3, self.layers, self.make, self.bar = phase3, layers, make, bar
        self.quantized, self.sizes = deepcopy(phase3.model), [None] * len(layers)
        self.known = phase3.parts.load("sizes") if phase3.parts.has("sizes") else {}
        calib = phase3.calib
        wanted = rows_to_search(calib, rows)
        rows = {k: calib["calibration"][k][wanted] for k in ("x", "t", "y", "group")}
        self.calib = dict(settings=calib["settings"], validation=rows)

    def __call__(self, sizes):
        key = " ".join(map(str, sizes))
        if key not in self.known:
            self.set(sizes)
            self.known[key] = self.measure()
            self.phase3.parts.save("sizes", self.known)
        self.bar.update()
        return self.known[key]

    def set(self, sizes):
        """Quantize the layers whose size is another than before."""
        for layer, size, before in zip(self.layers, sizes, self.sizes, strict=True):
            if size != before:
                swap_layer(self.quantized, layer.name, self.make(layer, size))
        self.sizes = sizes

    def measure(self):
        model, machine = self.phase3.model, self.phase3.machine
        with offloaded(model, machine.device), offloaded(self.quantized, machine.device):
            models = model, self.quantized, self.calib
            return signal_to_noise(*models, machine.batch_size, machine.device)["snr_weighted"]


def search_sizes(phase3, layers, space, start, how, rows, make):
    """The group size of each of these layers, of those in space[i]; the mean size shall not be less
    than that of `start`. `how` is an Evolution, the rest is of `Fitness`."""
    total = how.population * (how.generations + 1)
    with phase3.group.bar(desc="group sizes", total=total, unit="candidate") as bar:
        fitness = Fitness(phase3, layers, rows, make, bar)
        allowed = lambda sizes: sum(sizes) >= sum(start)  # noqa: E731
        best = how.search(space, start, allowed, fitness, random.Random(0))
    first, last = (fitness.known[" ".join(map(str, sizes))] for sizes in (start, best))
    print(
        f"group sizes: SNR of eps {last:.2f} dB on calibration rows, {first:.2f} dB with one size"
    )
    return best
