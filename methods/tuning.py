"""Weight scales and biases of a quantized network, learned together; codes stay as they are.

Phase 3 quantizes every layer on its own. What all of them lose together, a scale here and a bias
there can make up for in part: they are trained through the whole network, after the last phase of
EfficientQAT (arXiv 2407.11062), which trains scales. The loss is the sum of s |out_q - out|^2 over
the calibration rows: `out` is all that the network gives in full precision, eps and the variance,
s the sampler's sensitivity to an error of eps at the row's timestep. The gradient passes through
the rounding of activations as if there were none.
"""

import math

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.errors import InputError
from common.offload import in_batches, offloaded
from common.quant_file import QUANTIZERS, as_viewed, build_quantized, on_host, unpack_weight
from common.unit_data import first_inputs, rows_to_search
from methods.reconstruction import set_children

LEARNING_RATE, BATCH_SIZE = 1e-3, 8  # Adam's, falling to 0 along a cosine; rows of a step
LEAST = 0.01  # of what a scale was, so that it stays above 0 however long it learns
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
        with torch.no_grad():
            on_grid = self.Q(x, group)
        return on_grid + (x - x.detach())


class TunedLinear(nn.Module):
    """A quantized linear layer, or convolution, whose weight scales and bias learn.

    `factor` is what each scale is multiplied by; `shift` is added to the bias, in units of the root
    mean square length of the weight's rows: about what an output is where inputs are about 1. So
    one learning rate does for layers of every kind and width.
    """

    def __init__(self, layer, state):
        super().__init__()
        self.layer, self.view = layer, state["weight"].get("view")
        self.factor = nn.Parameter(torch.ones_like(state["weight"]["scale"]))
        self.shift = nn.Parameter(torch.zeros_like(layer.bias))
        unit = layer.weight.flatten(1).square().sum(dim=1).mean().sqrt()
        self.register_buffer("unit", unit)
        branch = state.get("low_rank", {})
        for name in ("left", "right"):
            self.register_buffer(name, branch.get(name))
        if branch:
            layer.weight = unpack_weight(state["weight"])  # the scales are of this part alone

    def forward(self, x, group=None):
        weight = as_viewed(self.layer.weight, self.view) * self.factor
        weight = weight.view_as(self.layer.weight)
        if self.left is not None:
            weight = weight + self.left @ self.right
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
    calibration rows teach; what the report says of a layer alone stays what it was before.
    InputError if the device has no room for it."""
    quantized = build_quantized(file, "this run")
    tuned = learning(quantized, file["layers"])
    try:
        quantized.to(phase3.machine.device)
        learn(phase3, epochs, quantized, tuned.values())
    except torch.OutOfMemoryError as error:
        raise InputError("too little GPU memory for --tune-epochs: leave it out") from error
    for name, layer in tuned.items():
        file["layers"][name] = layer.learned(file["layers"][name])


def learn(phase3, epochs, quantized, tuned):
    """Each pass draws its batches from a seed of its own, and is kept, so that a killed run ends as
    one that was not."""
    learner = Learner([layer.factor for layer in tuned], [layer.shift for layer in tuned])
    columns = [x.to(phase3.machine.device) for x in examples(phase3)]
    starts = range(0, len(columns[0]), BATCH_SIZE)
    first = learner.resume(phase3.parts)
    bar = tqdm(range(first, epochs), initial=first, total=epochs, desc="tune", unit="epoch")
    for epoch in bar:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(columns[0]), generator=generator).to(columns[0].device)
        for i, start in enumerate(starts):
            progress = (epoch + i / len(starts)) / epochs
            batch = [x[order[start : start + BATCH_SIZE]] for x in columns]
            learner.step(output_error(quantized, *batch), progress)
        learner.keep(phase3.parts, epoch + 1)


def examples(phase3):
    """Of the calibration rows it searches on: x (N, C, H, W), timesteps (N,), labels (N,), outputs
    in full precision, and s (N,), on average 1."""
    machine, wanted = phase3.machine, rows_to_search(phase3.calib, phase3.rows)
    inputs = first_inputs(phase3.calib, wanted)
    with torch.no_grad(), offloaded(phase3.model, machine.device):
        out = in_batches(
            lambda *batch: [phase3.model(*batch)], inputs, machine.batch_size, machine.device
        )
    sensitivity = phase3.sensitivity()
    return *inputs, *out, sensitivity / sensitivity.mean()


def output_error(quantized, x, t, y, out, sensitivity):
    """The mean of s |out_q - out|^2 over the rows of a batch."""
    error = (quantized(x, t, y) - out).square().sum(dim=(1, 2, 3))
    return (sensitivity * error).mean()


class Learner:
    """Adam on the factors of scales, and on shifts, its learning rate falling along a cosine."""

    def __init__(self, factors, shifts):
        self.factors, self.parameters = factors, [*factors, *shifts]
        self.adam = torch.optim.Adam(self.parameters, eps=1e-12)  # of many, each gradient is small

    def step(self, loss, progress):
        """Descend, `progress` being the share of all steps that is done."""
        self.adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * progress)) / 2
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        for factor in self.factors:
            factor.data.clamp_(min=LEAST)

    def keep(self, parts, epoch):
        """Keep what was learned by this epoch."""
        learned, adam = [p.detach().cpu() for p in self.parameters], self.adam.state_dict()
        adam["state"] = {i: on_host(values) for i, values in adam["state"].items()}
        parts.save(PART, dict(epoch=epoch, learned=learned, adam=adam))

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
