"""A quant file as a model that computes on its codes: `04_sample.py --engine int8`."""

from collections import Counter

from common import quant_file
from engine.int8_linear import Int8Linear, PackedLinear, signed_weight, why_not
from quant_ops import FullPrecision

BEYOND = dict(  # what layers of other methods have that this engine has not
    view="scales within a row of the weight", shift="shifted inputs", low_rank="a low-rank branch"
)  # fmt: skip


def build(artifact, source, engine, device):
    """The quantized model, its linear layers in floating point or, where they can be, on integer
    codes; one printed line says which."""
    if engine == "float":
        return quant_file.build_quantized(artifact, source)
    if device.type != "cpu":
        print("engine int8: not on CUDA yet; all layers in floating point")
        return quant_file.build_quantized(artifact, source)
    int8 = Int8Engine()
    model = quant_file.build_quantized(artifact, source, int8.make_layer)
    print(int8.describe())
    return model


class Int8Engine:
    """Makes the layers of one model, and counts those on integers and why the others are not."""

    def __init__(self):
        self.on_integers, self.reasons = 0, Counter()

    def make_layer(self, state):
        """The layer of a state on integers, or where that cannot be exact in floating point."""
        if state["type"] != "linear":
            what = "convolution" if state["type"] == "conv" else "products of activations"
            return self.float_layer(state, what)
        beyond = [what for key, what in BEYOND.items() if key in state or key in state["weight"]]
        if state["act"]["type"] == "dynamic":
            beyond.append("dynamic scales of inputs")
        if beyond:
            return self.float_layer(state, beyond[0])
        act, packed = quant_file.make_quantizer(state["act"]), state["weight"]
        codes = quant_file.unpack_codes(packed["codes"], packed["bits"], packed["shape"])
        v, correction = signed_weight(codes, packed["zero_point"], packed["bits"])
        if isinstance(act, FullPrecision):
            self.reasons["weights packed, inputs in full precision"] += 1
            return PackedLinear(v, correction, packed["scale"], state["bias"])
        reason = why_not(v, act)
        if reason:
            return self.float_layer(state, reason)
        self.on_integers += 1
        smooth = state.get("smooth")
        return Int8Linear(v, correction, packed["scale"], state["bias"], act, smooth)

    def float_layer(self, state, reason):
        self.reasons[reason] += 1
        return quant_file.make_layer(state)

    def describe(self):
        """One line: how many layers are on integers, and why the others are not."""
        others = ", ".join(f"{count} ({reason})" for reason, count in self.reasons.items())
        line = f"engine int8: {self.on_integers} layers on integer codes"
        return line + (f"; in floating point {others}" if others else "")
