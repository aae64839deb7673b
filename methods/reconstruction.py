"""Block reconstruction (BRECQ, arXiv 2102.05426): the layers of a unit learn together.

What the quantized layers of a unit learn, by gradient descent, is how weights are rounded
(AdaRound) and the scales of activations: the unit's outputs shall come near those of full
precision. For a method that works through the network in order:

    soft = {layer.name: SoftLinear(...) or SoftMatMul(...) for each layer of the unit}
    reconstruct(phase3, soft, inputs, recipe)      # inputs: phase3.quantized_inputs(), or its own
    done = {name: layer.done(data) for each of them, `data` being the layer's

`Recipe` says what is learned and how. Each unit draws its batches from a seed of its own, so that
a run that was killed ends as one that was not.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import quant_file
from common.offload import in_batches, units
from common.report import linear_cost, matmul_cost
from methods.rounding import AdaRound
from quant_ops import UniformQuantizer


class Recipe(NamedTuple):
    """How a unit is reconstructed."""

    iterations: int
    batch_size: int
    weight_lr: float = 0.0  # of Adam for AdaRound; 0: weights stay
    scale_lr: float = 0.0  # of Adam for scales of activations, cosine to 0; 0: they stay
    power: float = 2.0  # p of the loss |out_q - out|^p
    lam: float = 0.01  # of AdaRound's regularizer
    warmup: float = 0.2  # share of the iterations without it
    beta: tuple = (20.0, 2.0)  # its exponent, at the end of the warm-up and of the iterations
    seed: int = 1


# ------------------------------------------------------------------------------------------------
# Layers while they learn


class LearnedQuantizer(nn.Module):
    """Eq. (5) with a scale that learns: rounding passes the gradient on (straight-through)."""

    names = UniformQuantizer.names

    def __init__(self, Q: UniformQuantizer):
        super().__init__()
        self.bits, self.scale = Q.bits, nn.Parameter(Q.scale.clone())
        self.register_buffer("zero_point", Q.zero_point)

    def forward(self, x, group=None):
        scale, zero_point = UniformQuantizer.params_for(self, x, group)
        q = x / scale
        q = q + (q.round() - q).detach() + zero_point
        return (q.clamp(0, 2**self.bits - 1) - zero_point) * scale

    def hard(self):
        """The quantizer in the end."""
        return UniformQuantizer(self.bits, self.scale.detach(), self.zero_point)


def learned(Q):
    """A quantizer that learns its scale; others than uniform ones stay as they are."""
    return LearnedQuantizer(Q) if isinstance(Q, UniformQuantizer) else Q


def hard(Q):
    """The quantizer that a layer ends with."""
    return Q.hard() if isinstance(Q, LearnedQuantizer) else Q


class SoftLinear(nn.Module):
    """A linear layer or convolution with this weight (O, I) in place of its own, that learns its
    rounding and the scale of its inputs; those are divided by `smooth` (I,) first if it is given.
    """

    def __init__(self, layer, weight, Q_W, Q_X, smooth=None):
        super().__init__()
        self.layer = [layer]  # in a list: no child
        self.rounding, self.soft, self.rounded = AdaRound(weight, Q_W), False, Q_W(weight)
        self.act, self.smooth = learned(Q_X), smooth

    def forward(self, x, group=None):
        (layer,) = self.layer
        x = self.act(x if self.smooth is None else x / self.smooth, group)
        weight = (self.rounding() if self.soft else self.rounded).view(layer.weight.shape)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, layer.bias, stride=layer.stride)
        return F.linear(x, weight, layer.bias)

    def harden(self):
        """Round for good as was learned."""
        self.soft, self.rounded = False, self.rounding.hard()

    def state(self):
        """For the quant file."""
        how = self.rounded, self.rounding.Q_W, hard(self.act), self.smooth
        return quant_file.linear_state(self.layer[0], *how)

    def done(self, data):
        """What a Phase 3 keeps of the layer, with its cost on these LayerData."""
        data = data if self.smooth is None else data.smoothed(self.smooth)
        return dict(state=self.state(), cost=linear_cost(data, self.rounded, hard(self.act)))


class SoftMatMul(nn.Module):
    """A product of two activations whose scales learn."""

    def __init__(self, Q_A, Q_B):
        super().__init__()
        self.a, self.b = learned(Q_A), learned(Q_B)

    def forward(self, a, b, group=None):
        return self.a(a, group) @ self.b(b, group)

    def state(self):
        """For the quant file."""
        return quant_file.matmul_state(hard(self.a), hard(self.b))

    def done(self, data):
        """What a Phase 3 keeps of the layer, with its cost on these LayerData."""
        return dict(state=self.state(), cost=matmul_cost(data, hard(self.a), hard(self.b)))


def weights_only(state):
    """`quant_file.make_layer` with activations in full precision, for the weights' own phase."""
    replaced = ("a", "b") if state["type"] == "matmul" else ("act",)
    return quant_file.make_layer(state | dict.fromkeys(replaced, dict(type="none")))


# ------------------------------------------------------------------------------------------------
# Reconstruction


def reconstruct(phase3, soft, inputs, recipe, targets=None):
    """Learn what `soft`, name -> SoftLinear or SoftMatMul, has to learn, on these inputs of the
    present unit, a list of tensors of all rows. The targets are the unit's outputs in full
    precision; if not given, those on its inputs in full precision."""
    unit, device = phase3.unit, phase3.machine.device
    targets = outputs_of(phase3, unit.inputs) if targets is None else targets
    roundings, scales = what_learns(soft, recipe)
    adams = optimizers([r.alpha for r in roundings], scales, recipe)
    seed = recipe.seed * 1000 + list(units(phase3.model)).index(unit.name)
    generator = torch.Generator().manual_seed(seed)
    with in_place(phase3.model, soft):
        steps = range(1, 1 + recipe.iterations * bool(adams))
        for step in tqdm(steps, desc=f"reconstruct {unit.name}", leave=False):
            rows = torch.randperm(len(unit.groups), generator=generator)[: recipe.batch_size]
            given, wanted = ([x[rows].to(device) for x in columns] for columns in (inputs, targets))
            found = phase3.function(*given, unit.groups[rows].to(device))
            loss = output_loss(found, wanted, recipe.power) + penalty(roundings, step, recipe)
            for adam in adams:
                adam.zero_grad()
            loss.backward()
            for adam in adams:
                adam.step()
    for layer in soft.values():
        if roundings and isinstance(layer, SoftLinear):
            layer.harden()


@torch.no_grad()
def outputs_of(phase3, inputs):
    """The present unit's outputs in full precision, of all rows, on the host."""
    return in_batches(phase3.function, inputs, phase3.machine.batch_size, phase3.machine.device)


def what_learns(soft, recipe):
    """The AdaRounds and the scales that learn by this recipe; nothing else gets a gradient."""
    roundings, scales = [], []
    for layer in soft.values():
        layer.requires_grad_(False)
        if recipe.weight_lr and isinstance(layer, SoftLinear):
            layer.soft = True
            roundings.append(layer.rounding)
        if recipe.scale_lr:
            scales += [m.scale for m in layer.modules() if isinstance(m, LearnedQuantizer)]
    for parameter in [r.alpha for r in roundings] + scales:
        parameter.requires_grad_(True)
    return roundings, scales


class ScaleAdam(torch.optim.Adam):
    """Adam for scales: its learning rate falls to 0 along a cosine, in so many steps, and no scale
    below a hundredth of what it was."""

    def __init__(self, scales, lr, steps):
        super().__init__(scales, lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self, steps)
        self.scales, self.floors = scales, [scale.detach() / 100 for scale in scales]

    @torch.no_grad()
    def step(self):
        super().step()
        self.schedule.step()
        for scale, floor in zip(self.scales, self.floors, strict=True):
            scale.clamp_(min=floor)


def optimizers(alphas, scales, recipe):
    """Adam for each kind of what learns."""
    found = [torch.optim.Adam(alphas, recipe.weight_lr)] if alphas else []
    return found + ([ScaleAdam(scales, recipe.scale_lr, recipe.iterations)] if scales else [])


def output_loss(found, wanted, power):
    """|out_q - out|^p, summed over the second axis and averaged over the others, of all outputs."""
    pairs = zip(found, wanted, strict=True)
    return sum((a - b).abs().pow(power).sum(dim=1).mean() for a, b in pairs)


def penalty(roundings, step, recipe):
    """AdaRound's regularizer in step 1, 2, .., its exponent falling linearly; 0 in the warm-up."""
    start = recipe.warmup * recipe.iterations
    if step < start:
        return 0.0
    first, last = recipe.beta
    beta = first + (last - first) * (step - start) / max(1, recipe.iterations - start)
    return recipe.lam * sum(rounding.regularizer(beta) for rounding in roundings)


@contextmanager
def in_place(model, layers):
    """The model with these modules, by name, in place of its own meanwhile."""
    own = {name: model.get_submodule(name) for name in layers}
    try:
        set_children(model, layers)
        yield
    finally:
        set_children(model, own)


def set_children(model, layers):
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
