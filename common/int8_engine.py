"""A quant file as a model that computes on its codes: `04_sample.py --engine int8`.

With `int8-folded` MRQ's two regions of fc2's inputs become one grid of 8 bits or, where a CPU is
faster so, of fewer, if the product of such codes is exact: one product in place of two, and codes
that are no longer the paper's.
"""

from collections import Counter
from functools import partial

import torch

from common import quant_file
from common.packing import unpack_codes
from common.quantizers import DynamicQuantizer
from engine import cpu_products, cuda_trial, int8_blocks, int8_cuda
from engine.int8_linear import Gelu, Int8Linear, PackedLinear, folded, signed_weight, why_not
from engine.token_quantizer import TokenQuantizer
from quant_ops import GeluQuantizer

BEYOND = dict(  # what layers of other methods have that this engine has not
    view="scales within a row of the weight", shift="shifted inputs",
    low_rank="a low-rank branch", regroup="time groups of its own", hadamard="rotated inputs",
)  # fmt: skip
PRODUCTS = "products of activations"
CPU = torch.device("cpu")


def compile_mode(device):
    """What to give `torch.compile` for a network that samples: on CUDA it becomes graphs, where no
    kernel waits for Python to launch it."""
    return "reduce-overhead" if device.type == "cuda" else None


def build(artifact, source, engine, device):
    """The quantized model, its linear layers in floating point or, where they can be, on integer
    codes; one printed line says which. The artifact's layers are used up. `folded` of the model is
    what of its result the machine decides, {} if nothing."""
    int8 = Int8Engine(engine, device) if engine != "float" else None
    make_layer = int8.make_layer if int8 else quant_file.make_layer
    model = quant_file.build_quantized(artifact, source, make_layer, keep=False)
    if int8:
        model = int8.fuse(model)
        print(int8.describe())
    model.folded = dict(folded_bits=int8.folded_bits) if int8 and int8.folded_bits else {}
    return model


def of_tokens(state):
    """Whether a linear layer's inputs have one scale for all, for each time group or each token."""
    act, channels = state["act"], state["weight"]["shape"][1]
    one_group = act.get("group_size") in (None, channels)
    return act["type"] != "dynamic" or (act["per"] == "token" and one_group)


class Int8Engine:
    """Makes the layers of one model, and counts those on integers and why the others are not."""

    def __init__(self, name="int8", device=CPU):
        self.name, self.on_integers, self.reasons = name, 0, Counter()
        self.after_gelu, self.products, self.folded_bits = Counter(), Counter(), []
        self.attentions, self.whole = 0, False
        self.on_cuda = device.type == "cuda"
        self.why_not, self.linear = why_not, Int8Linear
        self.no_triton = self.no_hopper = self.no_attention = None
        if self.on_cuda:
            self.no_triton, self.no_hopper, self.no_attention = cuda_trial.kernels_of(device)
            self.why_not = partial(int8_cuda.why_not, device=device)
            by = dict(triton=not self.no_triton, hopper=self.no_hopper == "")
            self.linear = partial(int8_cuda.Int8LinearCUDA, **by)

    def make_layer(self, state):
        """The layer of a state on integers, or where that cannot be exact in floating point."""
        reason = self.beyond(state)
        if reason:
            return self.float_layer(state, reason)
        act, packed = quant_file.make_quantizer(state["act"]), state["weight"]
        if isinstance(act, DynamicQuantizer):
            act = TokenQuantizer(act.bits)
        codes = unpack_codes(packed["codes"], packed["bits"], packed["shape"])
        v, correction = signed_weight(codes, packed["zero_point"], packed["bits"])
        act, how = self.fold(v, act)
        reason, smooth = self.why_not(v, act), state.get("smooth")
        if reason:  # the product is in floating point, the weight stays int8 in memory
            self.reasons[reason] += 1
            return PackedLinear(v, correction, packed["scale"], state["bias"], act, smooth)
        self.on_integers += 1
        self.after_gelu.update([how] if how else [])
        layer = self.linear(v, correction, packed["scale"], state["bias"], act, smooth)
        self.products.update([self.whose(layer)])
        return layer

    def whose(self, layer):
        """Whose product multiplies a layer's codes."""
        if not self.on_cuda:
            return cpu_products.whose_is(layer.run)
        if not layer.triton:
            return "torch._int_mm"
        return "Triton for Hopper" if layer.hopper else "Triton"

    def beyond(self, state):
        """What a state has that is no product of codes here; "" if nothing."""
        if state["type"] != "linear":
            return "convolution" if state["type"] == "conv" else PRODUCTS
        found = [what for key, what in BEYOND.items() if key in state or key in state["weight"]]
        found += ["scales of inputs by channels or samples"] * (not of_tokens(state))
        found += ["a bias for each time group"] * (state["bias"].ndim > 1)
        return found[0] if found else ""

    def fold(self, v, act):
        """The quantizer of the inputs, after GELU folded if that is asked for and exact; how."""
        if not isinstance(act, GeluQuantizer):
            return act, ""
        if self.name == "int8-folded":
            bits = 8 if self.on_cuda else cpu_products.input_bits(v, act.bits)
            grid = folded(act, bits)
            if not self.why_not(v, grid):
                self.folded_bits.append(bits)
                return grid, f"folded to {bits} bits, one product"
        return act, "exact, two products" + ", with --dtype bf16 one of values" * self.on_cuda

    def float_layer(self, state, reason):
        self.reasons[reason] += 1
        return quant_file.make_layer(state)

    def fuse(self, model):
        """The model; on a CPU its GELU is one that compiles well, with Triton GELU and quantization
        become the end of fc1, LayerNorm and quantization one kernel, attention another."""
        for block in model.blocks if self.no_triton is None else ():
            block.mlp.act = Gelu()
        if self.no_triton == "":
            self.attentions, self.whole = int8_blocks.fuse(model, self.no_attention == "")
            self.reasons[PRODUCTS] -= 2 * self.attentions
        return model

    def describe(self):
        """One line: how many layers are on integers, whose product it is, what became of MRQ, and
        why the others are not."""
        line = f"engine {self.name}: {self.on_integers} layers on integer codes"
        line += f" by {' and '.join(self.products)}" * bool(self.products)
        missing = filter(None, (self.no_triton, self.no_hopper, self.no_attention))
        line += "".join(f" ({reason})" for reason in missing)
        for how, count in self.after_gelu.items():
            line += f"; {count} of them after GELU (MRQ {how})"
        line += f"; {self.attentions} attentions in one kernel each" * (self.attentions > 0)
        line += ", LayerNorm with the codes that follow it" * self.whole
        reasons = [(reason, count) for reason, count in self.reasons.items() if count]
        others = ", ".join(f"{count} ({reason})" for reason, count in reasons)
        return line + (f"; in floating point {others}" if others else "")
