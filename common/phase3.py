"""What every Phase 3 does around the search of a layer, 03_quantize.py's and those of methods/.

It hands out the units of the network, each with the data of its layers, keeps what is finished so
that a killed run resumes, shares the units among torchrun's processes, and writes the quant file.
"""

from typing import NamedTuple

import torch
from tqdm import tqdm

from common import artifacts
from common.checkpoints import load_calib, load_calibrated
from common.cli import InputError, print_peak
from common.distributed import join_process_group
from common.layer_data import layer_data
from common.offload import next_inputs, offloaded, pinned, unit_on, units
from common.quant_file import build_quantized, quantized_parts
from common.report import print_report, signal_to_noise
from common.schemas import sizes_of
from models_dit import LAYERS, LayerSpec, explicit_products

SAMPLING = ("steps", "groups", "cfg_scale", "cfg_channels", "vae")  # what 04 needs to know of 01


class Unit(NamedTuple):
    """A unit's inputs and dL/d(outputs), lists of tensors, and the time group, of every row."""

    name: str
    inputs: list
    grads: list
    groups: torch.Tensor


class Layer(NamedTuple):
    """Layer l of Algorithm 1: its name in the network, the module, and what it is."""

    name: str
    module: torch.nn.Module
    spec: LayerSpec


class Machine(NamedTuple):
    """Flags that change no result."""

    device: torch.device
    batch_size: int  # rows of a unit's own passes
    memory_limit: float | None  # MiB
    force: bool


class Phase3:
    """One run of a method: reads RUN/calib.pt and grads/, writes RUN/quant_MODEL.pt.

    `settings` decide the result; their `rows` says on how many calibration rows it searches.
    """

    def __init__(self, run, model_name, method, settings, machine):
        self.run, self.rows, self.machine = run, settings["rows"], machine
        self.group, self.calib = join_process_group(), load_calib(run)
        settings = settings | load_grads(run, "embed", self.calib)["settings"]  # written last
        settings["sampling"] = {key: self.calib["settings"][key] for key in SAMPLING}
        inputs = {"calib": self.calib["sha256"], **self.calib["inputs"]}
        inputs["grads"] = artifacts.sha256_of(run / "grads" / "embed.pt")
        head = artifacts.provenance("quant", settings, inputs, machine.device)
        self.head = head | dict(method=method)
        self.path = run / f"quant_{model_name}.pt"
        self.parts = artifacts.Parts(self.path, self.head)

    def is_done(self):
        """Whether the file is there already, and says so; InputError if it is another's."""
        done = artifacts.is_up_to_date(self.path, self.head, self.machine.force)
        if done:
            self.parts.clear()  # a run killed after its last write left them
        else:
            self.model = explicit_products(load_calibrated(self.calib))
        return done

    def units(self):
        """Yields this process's share of the units, each on the device meanwhile."""
        mine = self.group.share(self.parts, list(units(self.model)))
        for name in mine:
            load_grads(self.run, name, self.calib)  # a bad file is told before any work
        where = self.machine.batch_size, self.machine.device
        found = load_units(self.run, mine, self.model, self.calib, self.rows, *where)
        desc = f"03 {self.path.stem}"
        for unit in self.group.bar(found, total=len(mine), desc=desc, unit="unit"):
            with unit_on(self.model, unit.name, self.machine.device) as function:
                self.unit, self.function = unit, function
                yield unit.name

    def layers(self, unit, conditioning):
        """The `Layer`s of a unit, those that work on t and y only if they are wanted too."""
        prefix, kind = units(self.model)[unit], unit.split("_")[0]
        for spec in LAYERS:
            if spec.unit == kind and (conditioning or not spec.conditioning):
                name = prefix + spec.name
                yield Layer(name, self.model.get_submodule(name), spec)

    def data(self, layer):
        """The LayerData of a layer of the present unit; tells where D2's fallback fires."""
        machine = self.machine
        where = machine.batch_size, machine.memory_limit, machine.device
        data = layer_data(self.function, layer.module, self.unit, *where)
        if data.note:
            tqdm.write(f"{layer.name}: {data.note}")
        return data

    def save(self, unit, done):
        """Keep a unit's layers: name -> dict(state, cost)."""
        self.parts.save(unit, done)

    def finish(self, next_flags):
        """Rank 0 joins all parts, reports, and writes the quant file."""
        self.group.wait()
        if self.group.rank == 0:
            done = {}
            for unit in units(self.model):
                done |= self.parts.load(unit)
            wrote = self.write(done)
            self.parts.clear()
            print(f"{wrote}.  Next: python 04_sample.py --run {self.run} {next_flags}")
        print_peak(self.machine.device)

    def write(self, done):
        """The file of all layers, with the report; returns the sentence that says so."""
        settings, device = self.calib["settings"], self.machine.device
        states = {name: layer["state"] for name, layer in done.items()}
        shape = settings["config"], states, settings["steps"], settings["groups"]
        file = self.head | quantized_parts(self.model, *shape)
        quantized = build_quantized(file, "this run")
        with offloaded(self.model, device), offloaded(quantized, device):
            models = self.model, quantized, self.calib
            report = signal_to_noise(*models, self.machine.batch_size, device)
        report["costs"] = {name: layer["cost"] for name, layer in done.items()}
        print_report(report)
        return artifacts.save_artifact(self.path, file | dict(report=report))


# ------------------------------------------------------------------------------------------------
# Units


def load_grads(run, name, calib):
    """What Phase 2 wrote of a unit; InputError if it did so for another calib.pt."""
    path, made_by = run / "grads" / f"{name}.pt", "02_grad_cache.py"
    unit = artifacts.load_artifact(path, "grads", made_by, sizes_of(calib))
    if unit["inputs"]["calib"] != calib["sha256"]:
        raise InputError(f"{run}/grads is of another calib.pt: run {made_by} --force")
    if unit["unit"] != name:
        raise InputError(f"{path} is damaged: it is of {unit['unit']}; run {made_by} --force")
    return unit


def load_units(run, names, model, calib, rows, batch_size, device):
    """Line 11: yields the `Unit` of every name, in the network's order, of all rows or so many.

    Phase 2 keeps gradients; inputs are made again by one forward pass over the rows.
    """
    tuples = calib["calibration"]
    wanted = torch.arange(len(tuples["t"]))
    if rows:
        wanted = spread_rows(tuples["t"], tuples["group"], rows)
    inputs = [x[wanted] for x in load_grads(run, "embed", calib)["unit_inputs"]]
    left = set(names)
    for name in units(model):
        if name in left:
            grads = [pinned(x[wanted], device) for x in load_grads(run, name, calib)["unit_grads"]]
            here = [pinned(x, device) for x in inputs]
            yield Unit(name, here, grads, tuples["group"][wanted])
        left.discard(name)
        if not left:
            return
        inputs = next_inputs(model, name, inputs, batch_size, device)


def spread_rows(t, groups, count):
    """Indices of about `count` of the rows, as many from each time group, spread over its
    timesteps from the first to the last: the ends are where values are largest."""
    found = []
    for i in range(int(groups.max()) + 1):
        rows = (groups == i).nonzero()[:, 0]
        rows = rows[t[rows].argsort(stable=True)]
        each = min(len(rows), -(-count // (int(groups.max()) + 1)))
        found.append(rows[torch.linspace(0, len(rows) - 1, each).round().long()])
    return torch.cat(found)
