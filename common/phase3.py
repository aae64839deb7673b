"""What every Phase 3 does around the search of a layer, 03_quantize.py's and those of methods/.

It hands out the units of the network, each with the data of its layers, keeps what is finished so
that a killed run resumes, shares the units among torchrun's processes, and writes the quant file.
"""

from copy import deepcopy
from typing import NamedTuple

import torch
from tqdm import tqdm

from common import artifacts
from common.checkpoints import load_calib, load_calibrated
from common.distributed import join_process_group
from common.errors import InputError
from common.layer_data import layer_data
from common.offload import next_inputs, offloaded, unit_on, units
from common.parts import Parts
from common.quant_file import build_quantized, make_layer, quantized_parts, swap_layer
from common.report import print_peak, print_report, signal_to_noise
from common.unit_data import first_inputs, load_grads, load_units, rows_to_search
from models_dit import LAYERS, Diffusion, LayerSpec, explicit_products

SAMPLING = ("steps", "groups", "cfg_scale", "cfg_channels", "vae")  # what 04 needs to know of 01


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

    @classmethod
    def of(cls, args):
        """As the flags have it."""
        return cls(args.device, args.batch_size, args.memory_limit, args.force)


class Phase3:
    """One run of a method: reads RUN/calib.pt and grads/, writes RUN/quant_MODEL.pt.

    `settings` decide the result; their `rows` says on how many calibration rows it searches.
    Without `gradients` Phase 2 is not needed, and G^(l) = 1. A method that works `in_order` gives
    each unit the inputs that the quantized units before it make, so one process does all.
    """

    def __init__(self, run, model_name, method, settings, machine, gradients=True, in_order=False):
        self.run, self.rows, self.machine = run, settings["rows"], machine
        self.group, self.calib = join_process_group(), load_calib(run)
        if in_order and self.group.size > 1:
            raise InputError(f"{method} works through the network in order: run one process")
        settings = settings | {"sampling": {key: self.calib["settings"][key] for key in SAMPLING}}
        inputs = {"calib": self.calib["sha256"], **self.calib["inputs"]}
        if gradients:
            unit, inputs["grads"] = artifacts.load_hashed(
                run / "grads" / "embed.pt",  # which is written last
                lambda _: load_grads(run, "embed", self.calib),
            )
            settings |= unit["settings"]
        self.gradients, self.quantized = gradients, None
        head = artifacts.provenance("quant", settings, inputs, machine.device)
        self.head = head | dict(method=method)
        self.path = run / f"quant_{model_name}.pt"
        self.parts = Parts(self.path, self.head)

    def is_done(self):
        """Whether the file is there already, and says so; InputError if it is another's."""
        done = artifacts.is_up_to_date(self.path, self.head, self.machine.force)
        if done:
            self.parts.clear()  # a run killed after its last write left them
        else:
            self.claim()
            self.model = explicit_products(load_calibrated(self.calib))
        return done

    def claim(self):
        """From here on no other run makes this file."""
        if self.group.rank == 0:
            self.parts.claim()

    def units(self, names=None):
        """Yields this process's share of all units, or of these, each on the device meanwhile, once
        every process is done with those of an earlier call."""
        self.group.wait()
        mine = self.group.share(self.parts, names or list(units(self.model)))
        for name in mine if self.gradients else ():
            load_grads(self.run, name, self.calib)  # a bad file is told before any work
        where = self.machine.batch_size, self.machine.device, self.gradients
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

    def timesteps(self):
        """Sampling indices t in 0..T-1 of the calibration rows it searches on, (N,)."""
        return self.calib["calibration"]["t"][rows_to_search(self.calib, self.rows)]

    def sensitivity(self):
        """How much an error of eps at each of these rows moves the sample, (N,)."""
        return Diffusion(self.calib["settings"]["steps"]).sensitivity()[self.timesteps()]

    def quantized_inputs(self, make=make_layer):
        """The present unit's inputs as the units before it, all quantized by now, make them; a list
        of tensors, of every row, on the host. `make(state)` makes their layers, always the same."""
        if self.quantized is None:
            self.quantized = deepcopy(self.model)
            self.left = iter(units(self.model))
            self.reached = next(self.left)
            self.stream = first_inputs(self.calib, rows_to_search(self.calib, self.rows))
        where = self.machine.batch_size, self.machine.device
        while self.reached != self.unit.name:
            for name, layer in self.parts.load(self.reached).items():
                swap_layer(self.quantized, name, make(layer["state"]))
            stream = self.stream, *where, self.unit.groups
            self.stream = next_inputs(self.quantized, self.reached, *stream)
            self.reached = next(self.left)
        return self.stream

    def data(self, layer, inputs=None):
        """The LayerData of a layer of the present unit, on other `inputs` of the unit if they are
        given; tells where D2's fallback fires."""
        machine = self.machine
        where = machine.batch_size, machine.memory_limit, machine.device
        unit = self.unit if inputs is None else self.unit._replace(inputs=inputs)
        data = layer_data(self.function, layer.module, unit, *where)
        if data.note and inputs is None:
            tqdm.write(f"{layer.name}: {data.note}")
        return data

    def start_over(self, round_number):
        """Go through all units once more, for a method of several rounds; each keeps parts of its
        own, and its `quantized_inputs` are its own units'."""
        self.parts = Parts(self.path, self.head, round_number)
        self.claim()
        self.quantized = None

    def save(self, unit, done):
        """Keep a unit's layers: name -> dict(state, cost)."""
        self.parts.save(unit, done)

    def finish(self, edit=None):
        """Rank 0 joins all parts, reports, and writes the quant file; `edit` changes what it is
        to hold, its entries `state`, `layers` and so on, in place."""
        self.group.wait()
        self.quantized = self.stream = None  # memory that writing may need
        if self.group.rank == 0:
            done = {}
            for unit in units(self.model):
                done |= self.parts.load(unit)
            wrote = self.write(done, edit)
            self.parts.clear()
            print(f"{wrote}.  Next: python 04_sample.py --run {self.run} {self.flags()}")
        print_peak(self.machine.device)

    def flags(self):
        """Those by which 04 finds the file."""
        settings = self.head["settings"]
        flags = f"--wbits {settings['wbits']} --abits {settings['abits']}"
        return flags + (f" --tag {settings['tag']}" if settings["tag"] else "")

    def write(self, done, edit=None):
        """The file of all layers, with the report; returns the sentence that says so."""
        settings, device = self.calib["settings"], self.machine.device
        states = {name: layer["state"] for name, layer in done.items()}
        shape = settings["config"], states, settings["steps"], settings["groups"]
        file = self.head | quantized_parts(self.model, *shape)
        if edit:
            edit(file)
        quantized = build_quantized(file, "this run")
        with offloaded(self.model, device), offloaded(quantized, device):
            models = self.model, quantized, self.calib
            report = signal_to_noise(*models, self.machine.batch_size, device)
        report["costs"] = {name: layer["cost"] for name, layer in done.items()}
        print_report(report)
        return artifacts.save_artifact(self.path, file | dict(report=report))
