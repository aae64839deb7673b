"""The units of the network for a Phase 3, each with the data of its calibration rows."""

from typing import NamedTuple

import torch

from common import artifacts
from common.errors import InputError
from common.offload import next_inputs, pinned, units
from common.schemas import sizes_of
from models_dit import Diffusion


class Unit(NamedTuple):
    """A unit's inputs and dL/d(outputs), lists of tensors, and the time group, of every row. A
    method without gradients has none."""

    name: str
    inputs: list
    grads: list
    groups: torch.Tensor


def load_grads(run, name, calib, settings=None):
    """What Phase 2 wrote of a unit; InputError if it did so for another calib.pt, or with other
    settings than these."""
    path, made_by = run / "grads" / f"{name}.pt", "02_grad_cache.py"
    unit = artifacts.load_artifact(path, "grads", made_by, sizes_of(calib))
    if unit["inputs"]["calib"] != calib["sha256"]:
        raise InputError(f"{run}/grads is of another calib.pt: run {made_by} --force")
    if settings and unit["settings"] != settings:
        raise InputError(f"{run}/grads were replaced meanwhile: run again")
    if unit["unit"] != name:
        raise InputError(f"{path} is damaged: it is of {unit['unit']}; run {made_by} --force")
    return unit


def first_inputs(calib, wanted):
    """The embedder's inputs x_t, the timesteps that the network is told, and y, of these rows."""
    rows, diffusion = calib["calibration"], Diffusion(calib["settings"]["steps"])
    return [x[wanted] for x in (rows["x"], diffusion.timestep_map[rows["t"]], rows["y"])]


def load_units(run, names, model, calib, rows, batch_size, device, gradients=True):
    """Line 11: yields the `Unit` of every name, in the network's order, of all rows or so many.

    Phase 2 keeps gradients; inputs are made again by one forward pass over the rows.
    """
    tuples = calib["calibration"]
    wanted, settings = rows_to_search(calib, rows), None
    if gradients:
        first = load_grads(run, "embed", calib)
        inputs, settings = [x[wanted] for x in first["unit_inputs"]], first["settings"]
        del first  # with its gradients, which are as large as a block's
    else:
        inputs = first_inputs(calib, wanted)
    left = set(names)
    for name in units(model):
        if name in left:
            grads = load_grads(run, name, calib, settings)["unit_grads"] if gradients else []
            grads = [pinned(x[wanted], device) for x in grads]
            here = [pinned(x, device) for x in inputs]
            yield Unit(name, here, grads, tuples["group"][wanted])
        left.discard(name)
        if not left:
            return
        inputs = next_inputs(model, name, inputs, batch_size, device)


def rows_to_search(calib, count):
    """Indices of all calibration rows, or of about so many."""
    tuples = calib["calibration"]
    return (
        spread_rows(tuples["t"], tuples["group"], count)
        if count
        else torch.arange(len(tuples["t"]))
    )


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
