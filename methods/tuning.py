"""Weight scales and biases of a quantized network, learned together; codes stay as they are.

Phase 3 quantizes every layer on its own. What all of them lose together, a scale here and a bias
there can make up for in part: they are trained through the whole network, as in the last phase of
EfficientQAT (arXiv 2407.11062), for the least sum of s |out_q - out|^2 over the calibration rows.
`out` is the output in full precision, s the sampler's sensitivity to an error of eps at the row's
timestep. The gradient passes through the rounding of activations as if there were none.
"""

import math

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.offload import in_batches, offloaded
from common.quant_file import QUANTIZERS, as_viewed, build_quantized, unpack_weight
from common.unit_data import rows_to_search
from methods.reconstruction import set_children
from models_dit import Diffusion

LEARNING_RATE, BATCH_SIZE = 1e-3, 8  # Adam's, falling to 0 along a cosine; rows of a step
PART = "tuning"  # what a killed run has kept of it

# ------------------------------------------------------------------------------------------------
# The network while it learns


class StraightThrough(nn.Module):
    """A quantizer of activations that passes the gradient on as it is."""

    def __init__(self, Q):
        super().__init__()
        self.Q = Q

    def forward(self, x, group=None):
        """What `Q` makes of x, to the bit."""
        return self.Q(x, group).detach() + (x - x.detach())


class TunedLinear(nn.Module):
    """A quantized linear layer, or convolution, whose weight scales and bias learn.

    `factor` is what each scale is multiplied by; `shift` is added to the bias, in units of what an
    output is for inputs of size 1: the root mean square of the lengths of the weight's rows. So one
    learning rate does for layers of every kind and width.
    """

    def __init__(self, layer, state):
        super().__init__()
        self.layer, self.view = layer, state["weight"].get("view")
        self.factor = nn.Parameter(torch.ones_like(state["weight"]["scale"]))
        self.shift = nn.Parameter(torch.zeros_like(layer.bias))
        self.register_buffer("scaled", as_viewed(unpack_weight(state["weight"]), self.view))
        branch = state.get("low_rank")
        self.register_buffer("beside", branch["left"] @ branch["right"] if branch else None)
        unit = layer.weight.flatten(1).square().sum(dim=1).mean().sqrt()
        self.register_buffer("unit", unit)

    def forward(self, x, group=None):
        weight = (self.scaled * self.factor).view_as(self.layer.weight)
        if self.beside is not None:
            weight = weight + self.beside
        bias = self.layer.bias + self.unit * self.shift
        return functional_call(self.layer, dict(weight=weight, bias=bias), (x, group))

    @torch.no_grad()
    def learned(self, state):
        """The state of the layer as it is now; `state` is that of before."""
        factor, shift = self.factor.cpu(), (self.unit * self.shift).cpu()
        weight = state["weight"] | dict(scale=state["weight"]["scale"] * factor)
        return state | dict(weight=weight, bias=state["bias"] + shift)


class Recomputed(nn.Module):
    """A block that keeps nothing but its inputs for the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return checkpoint(self.block, *inputs, use_reentrant=False)


def learning(quantized, states):
    """Make the network learn, in place; returns its `TunedLinear`s by name."""
    for module in [*quantized.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, tuple(QUANTIZERS.values())):
                setattr(module, name, StraightThrough(child))
    tuned = {
        name: TunedLinear(quantized.get_submodule(name), state)
        for name, state in states.items() if state["type"] != "matmul"
    }  # fmt: skip
    set_children(quantized, tuned)
    quantized.blocks = nn.ModuleList(map(Recomputed, quantized.blocks))
    return tuned


# ------------------------------------------------------------------------------------------------
# Learning


def tune(phase3, epochs, file):
    """Change the layers of a quant file, still to be written, to what so many passes over the
    calibration rows teach. Each pass draws its batches from a seed of its own, and is kept, so that
    a killed run ends as one that was not."""
    device = phase3.machine.device
    quantized = build_quantized(file, "this run")
    tuned = learning(quantized, file["layers"])
    quantized.to(device)
    learner = Learner([p for layer in tuned.values() for p in (layer.factor, layer.shift)])
    columns = [x.to(device) for x in examples(phase3)]
    steps = range(0, len(columns[0]), BATCH_SIZE)
    first = learner.resume(phase3.parts)
    bar = tqdm(range(first, epochs), initial=first, total=epochs, desc="tune", unit="epoch")
    for epoch in bar:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(columns[0]), generator=generator).to(device)
        for i, start in enumerate(steps):
            progress = (epoch + i / len(steps)) / epochs
            batch = [x[order[start : start + BATCH_SIZE]] for x in columns]
            learner.step(output_error(quantized, *batch), progress)
        learner.keep(phase3.parts, epoch + 1)
    for name, layer in tuned.items():
        file["layers"][name] = layer.learned(file["layers"][name])


def examples(phase3):
    """Of the calibration rows it searches on: x (N, C, H, W), timesteps (N,), labels (N,), outputs
    in full precision, and s (N,), on average 1."""
    calib, device = phase3.calib, phase3.machine.device
    rows = rows_to_search(calib, phase3.rows)
    x, t, y = (calib["calibration"][key][rows] for key in ("x", "t", "y"))
    diffusion = Diffusion(calib["settings"]["steps"])
    inputs, sensitivity = [x, diffusion.timestep_map[t], y], diffusion.sensitivity()[t]
    with torch.no_grad(), offloaded(phase3.model, device):
        out = in_batches(
            lambda *batch: [phase3.model(*batch)], inputs, phase3.machine.batch_size, device
        )
    return *inputs, *out, sensitivity / sensitivity.mean()


def output_error(quantized, x, t, y, out, sensitivity):
    """The mean of s |out_q - out|^2 over the rows of a batch."""
    error = (quantized(x, t, y) - out).square().sum(dim=(1, 2, 3))
    return (sensitivity * error).mean()


class Learner:
    """Adam on these parameters, its learning rate falling to 0 along a cosine."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.adam = torch.optim.Adam(parameters, eps=1e-12)  # of many scales each has a small part

    def step(self, loss, progress):
        """Descend, `progress` being the share of all steps that is done."""
        self.adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * progress)) / 2
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def keep(self, parts, epoch):
        """Keep what was learned by this epoch."""
        learned = [p.detach().cpu() for p in self.parameters]
        parts.save(PART, dict(epoch=epoch, learned=learned, adam=self.adam.state_dict()))

    @torch.no_grad()
    def resume(self, parts):
        """The epoch to go on with: 0, or that of a run that was killed."""
        if not parts.has(PART):
            return 0
        kept = parts.load(PART)
        for parameter, value in zip(self.parameters, kept["learned"], strict=True):
            parameter.copy_(value)
        self.adam.load_state_dict(kept["adam"])
        return kept["epoch"]
