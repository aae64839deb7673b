"""The quantizers of TQ-DiT (arXiv 2502.04056) and the search for their step sizes.

Pure functions first, thin modules after. Everything runs where its arguments lie.

    paper        here              shape and meaning
    s            step              step size: () per tensor, (O, 1, ...) per output channel,
                                   (G,) per time group
    z            zero              zero point, an integer held in a float tensor, shaped like s
    k            bits              bit width, 2..8
    s_1, s_2     step1, step2      step sizes of the two regions of MRQ, Sec. III-C
    G_i          group             time group of a sample, 0..G-1, Eq. (9)
    Delta eps    delta             layer output, quantized minus full precision
    dL/d eps     grad              gradient of Eq. (11) at the layer output; G^(l) is its square

    Eq. (5)  qparams_from_range, quantize, dequantize, fake_quant    Eq. (9)        time_group
    Eq. (6)  the grid: dequantize(0..2^k - 1)                        Eq. (15)-(16)  hessian_loss
    Eq. (8), (12), (17)  search, over step_grid or softmax_grid
    Sec. III-C  mrq_softmax, mrq_gelu and their codes
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models_dit import DiT, InputError

# ------------------------------------------------------------------------------------------------
# Uniform quantization


def qparams_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of the range [low, high], which is widened to hold 0 (so 0 is exact).

    # Eq. (5): s = (max - min) / (2^k - 1), z = -round(min / s)
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / (2**bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))  # an all-zero tensor
    return step, -torch.round(low / step)


def quantize(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes 0..2^k - 1, as floats.  # Eq. (5): clip(round(x / s) + z, 0, 2^k - 1)"""
    return (x / step).round_().add_(zero).clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Values of the grid of Eq. (6).  # Deviation D1: s * (q - z), as printed s * q - z"""
    return step * (codes - zero)


def fake_quant(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Tensor:
    """x rounded to its grid, Eq. (5): |error| <= step / 2 inside the range; 0 stays 0."""
    return quantize(x, step, zero, bits).sub_(zero).mul_(step)


# ------------------------------------------------------------------------------------------------
# Multi-region quantization (MRQ), Sec. III-C


def _softmax_regions(x: Tensor, step1: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Level in R1, level in R2, and which elements lie in R2. The regions are disjoint.

    R1 holds the levels 0..2^(k-1) - 1 of s_1 and reaches half a step past the last of them; R2
    holds 1..2^(k-1) of s_2 = 1 / 2^(k-1) and begins no lower than s_2 / 2 (Deviation D8).
    """
    levels, step2 = 2 ** (bits - 1), 2.0 ** (1 - bits)
    border = torch.clamp((levels - 0.5) * step1, min=step2 / 2)
    low = (x / step1).round_().clamp_(max=levels - 1)
    high = (x / step2).round_().clamp_(1, levels)
    return low, high, x >= border


def mrq_softmax(x: Tensor, step1: Tensor, bits: int) -> Tensor:
    """x in [0, 1] on the two-region grid of softmax outputs; 0.0 and 1.0 stay exact."""
    low, high, upper = _softmax_regions(x, step1, bits)
    return torch.where(upper, high.mul_(2.0 ** (1 - bits)), low.mul_(step1))


def mrq_softmax_codes(x: Tensor, step1: Tensor, bits: int) -> Tensor:
    """k-bit codes of `mrq_softmax`, as floats: the top bit names the region."""
    low, high, upper = _softmax_regions(x, step1, bits)
    return torch.where(upper, high - 1 + 2 ** (bits - 1), low)


def mrq_softmax_values(codes: Tensor, step1: Tensor, bits: int) -> Tensor:
    """Values of `mrq_softmax_codes`."""
    half = 2 ** (bits - 1)
    return torch.where(codes >= half, (codes + 1 - half) / half, codes * step1)


def mrq_gelu(x: Tensor, step1: Tensor, step2: Tensor, bits: int) -> Tensor:
    """x on the two-region grid of GELU outputs: step1 below zero, step2 above; 0 stays 0.

    R1 holds the levels -2^(k-1)..-1 and R2 holds 0..2^(k-1) - 1 (D8, D9).
    """
    half = 2 ** (bits - 1)
    low, high = (x / step1).round_().clamp_(-half, 0), (x / step2).round_().clamp_(0, half - 1)
    return low.mul_(step1).add_(high.mul_(step2))  # each is 0 in the other's region


# ------------------------------------------------------------------------------------------------
# Time groups


def time_group(t: Tensor | int, steps: int, groups: int) -> Tensor | int:
    """Group 0..G-1 of sampling index t in 0..T-1.

    # Eq. (9): t in G_i iff (i-1) T / G <= t <= i T / G - 1; Deviation D4 when G does not divide T
    """
    return t * groups // steps


def group_table(timestep_map: Tensor, groups: int) -> Tensor:
    """(1000,) group of every timestep the network can be told, for sampling at these T timesteps.

    A timestep that this sampler skips belongs with the last visited one below it.
    """
    steps = len(timestep_map)
    visited = torch.searchsorted(timestep_map, torch.arange(1000), right=True) - 1
    return time_group(visited.clamp(0, steps - 1), steps, groups)


# ------------------------------------------------------------------------------------------------
# Hessian-guided optimization (HO): objective and search


def hessian_loss(delta: Tensor, grad: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Output error weighted by the diagonal Fisher information, summed over `dim` (default all).

    # Eq. (16): delta^T G delta with G = diag(grad^2); grad = 1 makes it the plain squared error
    """
    return (delta * grad).square_().sum(dim)  # vector_norm is slower than a product on a CPU


def step_grid(count: int = 100, low: float = 0.01, high: float = 1.2) -> Tensor:
    """(count,) factors alpha of the min-max step, both ends included (Deviation D7)."""
    return torch.linspace(low, high, count)


def softmax_grid(bits: int, count: int = 20) -> Tensor:
    """(count,) candidates of s_1 = 2^-i / 2^(k-1), i = 0, 1, ... (Deviation D8)."""
    return 2.0 ** -torch.arange(count) / 2 ** (bits - 1)


def search(loss_of, candidates: Tensor, chunks, expected=None) -> tuple[Tensor, Tensor]:
    """What an exhaustive search finds, Eq. (17): argmin over candidates of the loss summed over
    chunks.

    `loss_of(chunk, candidate)` gives losses, 0 or more, of any one shape (one per channel, per
    group, or a single one); `chunks()` begins the chunks anew. Returns the best index and the least
    sum, both of that shape. Ties: the first.

    Sums only grow: a candidate that has come to more than another's whole sum cannot win and need
    not see the chunks that are left. So candidates stop above a bar, 1.1 times the `expected` least
    sum; where none is given, two candidates near the usual minimum go first, and the better of them
    is the bar. Then the least whole sum is, and whoever stopped below it goes on, until nobody has.
    Chunks are outside and candidates inside, so that a chunk stays in cache.
    """
    count, total = len(candidates), None
    seen, left = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
    bar = torch.inf if expected is None else 1.1 * expected
    if expected is None:
        left &= torch.isin(torch.arange(count), torch.tensor([6, 8]) * count // 10)
    while left.any():
        for k, chunk in enumerate(chunks()):
            now = (left & (seen == k)).nonzero()[:, 0]
            if len(now):
                losses = torch.stack([loss_of(chunk, c) for c in candidates[now]]).double()
                total = losses.new_zeros(count, *losses.shape[1:]) if total is None else total
                total[now] += losses
                seen[now] += 1
                left &= _not_above(total, bar)
        whole = seen == k + 1
        bar = total[whole].amin(dim=0) if whole.any() else torch.inf
        left = ~whole & _not_above(total, bar)
    return total.argmin(dim=0), total.amin(dim=0)


def _not_above(total, bar):
    """Which candidates are in some element not above the bar, (candidates,) on the host."""
    return (~(total > bar)).view(len(total), -1).any(dim=1).cpu()


# ------------------------------------------------------------------------------------------------
# Beyond the paper: channel balancing and error-compensated rounding


def balance_factors(x_max: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(I,) factors s: dividing input channels by s and multiplying the weight's columns by s leaves
    the product as it is and evens out the channels (SmoothQuant, arXiv 2211.10438, Eq. 4).

    `x_max` (I,) is the largest magnitude of each input channel, `weight` is (O, I); at strength 1
    all input channels become equal, at 0 all columns of the weight.
    """
    w_max = weight.abs().amax(dim=0).clamp(min=1e-5)
    return x_max.clamp(min=1e-5) ** strength / w_max ** (1 - strength)


def compensated_rounding(
    weight: Tensor, step: Tensor, zero: Tensor, bits: int, gram: Tensor, damp: float = 0.01
) -> Tensor:
    """The weight (O, I) rounded column by column, each column's error made up for by the columns
    still to come (GPTQ, arXiv 2210.17323, Alg. 1, in the order of falling input energy).

    `gram` (I, I) is the weighted sum of x x^T over the layer's inputs x. Returns grid values.
    """
    order = gram.diagonal().argsort(descending=True)
    upper = gram[order[:, None], order].double()
    del gram  # frees as much memory as each of the following matrices takes
    upper /= upper.diagonal().mean().clamp(min=1e-30)
    upper.diagonal().add_(damp)
    upper = torch.cholesky_inverse(torch.linalg.cholesky(upper))
    upper = torch.linalg.cholesky(upper, upper=True)
    left, rounded = weight[:, order].double(), torch.empty_like(weight)
    for j, column in enumerate(order.tolist()):
        rounded[:, column] = fake_quant(left[:, j : j + 1].float(), step, zero, bits)[:, 0]
        error = (left[:, j] - rounded[:, column]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return rounded


# ------------------------------------------------------------------------------------------------
# Bit packing


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integer codes 0..2^k - 1 of any shape -> uint8 bytes, k bits each, low bit first."""
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = (codes.to(torch.uint8).flatten()[:, None] >> shifts) & 1
    stream = F.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, device=codes.device)
    return (stream * weights).sum(dim=1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, shape) -> Tensor:
    """Inverse of `pack_codes`: uint8 codes of the given shape. Raises ValueError if too short."""
    count = torch.Size(shape).numel()
    if packed.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed[:, None] >> shifts) & 1).flatten()[: count * bits].view(count, bits)
    weights = 2 ** torch.arange(bits, device=packed.device)
    return (stream * weights).sum(dim=1).to(torch.uint8).view(shape)


# ------------------------------------------------------------------------------------------------
# Products of quantized matrices, inputs (R, I) by weights (O, I): in floating point, or on codes


class Codes(NamedTuple):
    """The values step * (codes - zero), held as int8 codes (R, I). `step` and `zero` are (), or a
    column for one of each row; zero is None where it is 0 in all of them. `total` (R, 1) sums the
    codes of each row."""

    codes: Tensor
    step: Tensor
    zero: Tensor | None
    total: Tensor


def in_int8(codes: Tensor, step: Tensor, zero: Tensor | None) -> Codes:
    """Codes -128..127, given as floats. Float sums of so few are exact: they stay below 2^24."""
    return Codes(codes.to(torch.int8), step, zero, codes.sum(dim=1, keepdim=True).int())


def signed_codes(x: Tensor, step: Tensor, zero: Tensor, bits: int) -> Codes:
    """Eq. (5) in int8: codes and zero point are both shifted by 2^(k-1)."""
    half = 2 ** (bits - 1)
    return in_int8(quantize(x, step, zero, bits).sub_(half), step, (zero - half).int())


def int_error(terms: list[Codes], weight: Codes, y: Tensor) -> Tensor:
    """y (R, O) less the product of the inputs, a sum of `terms`, and the weight's transpose.

    # sum (a - z_a) (b - z_b) = sum a b - z_b sum a - z_a (sum b - I z_b), exact in int32: below
    # 2^29 for the 4608 inputs of DiT-XL/2's widest layer
    On CUDA `_int_mm` needs R > 16 and I, O that 8 divides.
    """
    zero_b = weight.zero.view(1, -1)
    sum_b = weight.total.view(1, -1) - weight.codes.shape[1] * zero_b  # (1, O)
    for a in terms:
        product = torch._int_mm(a.codes, weight.codes.T)
        product.addcmul_(a.total, zero_b, value=-1)
        if a.zero is not None:
            product.addcmul_(a.zero, sum_b, value=-1)
        y = torch.addcmul(y, product, a.step * weight.step.view(1, -1), value=-1)
    return y


def has_int_unit(device: torch.device) -> bool:
    """Whether int8 products run on a unit of their own: on GPUs since Turing, and on a CPU with
    AVX-512 VNNI. Other CPUs take plain loops (github.com/pytorch/pytorch/pull/136942); an older
    torch cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_vnni", False)


class FloatProduct:
    """Quantized matrices as the floats they stand for, on any device and of any shape."""

    quantize_weight = staticmethod(fake_quant)

    @staticmethod
    def quantize_input(act, x, group):
        return act(x, group)

    @staticmethod
    def error(x, weight, y):
        """Delta eps of Eq. (16) but for its sign: y less the quantized output, (R, O)."""
        return torch.addmm(y, x, weight.T, alpha=-1)


class IntProduct:
    """The same on integer codes: the fast unit of a GPU, and no rounding within the sums."""

    quantize_weight = staticmethod(signed_codes)

    @staticmethod
    def quantize_input(act, x, group):
        return act.codes(x, group)

    @staticmethod
    def error(x, weight, y):
        return int_error(x, weight, y)


# ------------------------------------------------------------------------------------------------
# Activation quantizers: buffers and a forward, one type per kind of range


def _per_sample(value: Tensor, group: Tensor | None, x: Tensor) -> Tensor:
    """A scalar as it is; of one value per group, each sample's own, shaped to broadcast over x."""
    if value.ndim == 0:
        return value
    return value[group].view(-1, *[1] * (x.ndim - 1))


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least: rounding in half precision would misplace codes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class UniformQuantizer(nn.Module):
    """Eq. (5); `step` and `zero` are () or, with time groups, (G,)."""

    def __init__(self, bits, step, zero):
        super().__init__()
        self.bits = bits
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)

    def forward(self, x, group=None):
        step, zero = (_per_sample(v, group, x) for v in (self.step, self.zero))
        return fake_quant(_wide(x), step, zero, self.bits)

    def codes(self, x, group=None):
        """x (R, I) as `Codes`, a list of one."""
        step, zero = (_per_sample(v, group, x) for v in (self.step, self.zero))
        return [signed_codes(x, step, zero, self.bits)]


class SoftmaxQuantizer(nn.Module):
    """MRQ of softmax outputs; `step1` is () or, with time groups (Eq. 17), (G,)."""

    def __init__(self, bits, step1):
        super().__init__()
        self.bits = bits
        self.register_buffer("step1", step1)

    def forward(self, x, group=None):
        return mrq_softmax(_wide(x), _per_sample(self.step1, group, x), self.bits)


class GeluQuantizer(nn.Module):
    """MRQ of GELU outputs; `step1` and `step2` are () or, with time groups, (G,)."""

    def __init__(self, bits, step1, step2):
        super().__init__()
        self.bits = bits
        self.register_buffer("step1", step1)
        self.register_buffer("step2", step2)

    def forward(self, x, group=None):
        steps = (_per_sample(v, group, x) for v in (self.step1, self.step2))
        return mrq_gelu(_wide(x), *steps, self.bits)

    def codes(self, x, group=None):
        """x (R, I) as the sum of two `Codes`: R1, below zero, and R2. Each is 0 in the other."""
        step1, step2 = (_per_sample(v, group, x) for v in (self.step1, self.step2))
        half = 2 ** (self.bits - 1)
        low = (x / step1).round_().clamp_(-half, 0)
        high = (x / step2).round_().clamp_(0, half - 1)
        return [in_int8(low, step1, None), in_int8(high, step2, None)]


class FullPrecision(nn.Module):
    """No quantization, where Algorithm 1's released variant leaves an input alone (D6)."""

    def forward(self, x, group=None):
        return x


QUANTIZERS = {
    "uniform": UniformQuantizer,
    "softmax": SoftmaxQuantizer,
    "gelu": GeluQuantizer,
    "none": FullPrecision,
}


def make_quantizer(state: dict) -> nn.Module:
    """The quantizer that `state` describes: its type, its bits, its step sizes."""
    return QUANTIZERS[state["type"]](**{k: v for k, v in state.items() if k != "type"})


def quantizer_state(quantizer: nn.Module) -> dict:
    """Inverse of `make_quantizer`, on the host."""
    name = next(k for k, v in QUANTIZERS.items() if type(quantizer) is v)
    bits = {} if name == "none" else dict(bits=quantizer.bits)
    return dict(type=name, **bits, **{k: v.cpu() for k, v in quantizer.named_buffers()})


# ------------------------------------------------------------------------------------------------
# Candidates, Alg. 1 lines 16 and 24: the min-max quantizer and a list of searches (vary, values),
# where vary(quantizer, value) is the quantizer that a candidate value stands for


def uniform_candidates(low: Tensor, high: Tensor, bits: int):
    """Uniform, Eq. (5): the step is alpha times the min-max one (D7). Ranges are () or (G,)."""
    step, zero = qparams_from_range(low, high, bits)

    def vary(_, alpha):
        return UniformQuantizer(bits, alpha * step, zero)

    return UniformQuantizer(bits, step, zero), [(vary, step_grid().to(step))]


def gelu_candidates(low: Tensor, high: Tensor, bits: int):
    """MRQ after GELU: two steps, searched in turn, each on its own grid (D9). Ranges () or (G,)."""
    step1 = -low.clamp(max=-1e-6) / 2 ** (bits - 1)
    step2 = high.clamp(min=1e-6) / (2 ** (bits - 1) - 1)

    def vary_step1(act, alpha):
        return GeluQuantizer(bits, alpha * step1, act.step2)

    def vary_step2(act, alpha):
        return GeluQuantizer(bits, act.step1, alpha * step2)

    grid = step_grid().to(step1)
    return GeluQuantizer(bits, step1, step2), [(vary_step1, grid), (vary_step2, grid)]


def softmax_candidates(bits: int, device):
    """MRQ after softmax: s_1 from `softmax_grid` (D8)."""
    grid = softmax_grid(bits).to(device)

    def vary(_, step1):
        return SoftmaxQuantizer(bits, step1)

    return SoftmaxQuantizer(bits, grid[0]), [(vary, grid)]


# ------------------------------------------------------------------------------------------------
# Quantized layers. A state is what a quant file holds: packed codes, step sizes, zero points


def pack_weight(weight: Tensor, step: Tensor, zero: Tensor, bits: int) -> dict:
    """The stored form of a weight (O, ...): k-bit codes, steps and zero points, its shape.

    `step` and `zero` are () or (O, 1).
    """
    codes = quantize(weight.flatten(1), step, zero, bits)
    return dict(
        codes=pack_codes(codes, bits),
        shape=list(weight.shape),
        bits=bits,
        step=step,
        zero=zero.to(torch.uint8),
    )


def unpack_weight(state: dict) -> Tensor:
    """The dequantized weight of `pack_weight`, in float32; ValueError if the state is damaged."""
    shape = state["shape"]
    codes = unpack_codes(state["codes"], state["bits"], shape).float().flatten(1)
    return dequantize(codes, state["step"], state["zero"].float()).view(shape)


class QuantLinear(nn.Module):
    """A linear layer on quantized weights and inputs. Weights are dequantized once, here.

    `balance` is None or (I,): what inputs are divided by, and weights were multiplied by.
    """

    def __init__(self, state):
        super().__init__()
        self.register_buffer("weight", unpack_weight(state["weight"]))
        self.register_buffer("bias", state["bias"])
        self.register_buffer("balance", state["balance"])
        self.act = make_quantizer(state["act"])

    def forward(self, x, group=None):
        x = x if self.balance is None else x / self.balance
        return F.linear(self.act(x, group), self.weight, self.bias)


class QuantConv2d(QuantLinear):
    """The patch embedding: a convolution whose stride is its kernel size."""

    def forward(self, x, group=None):
        return F.conv2d(self.act(x), self.weight, self.bias, stride=self.weight.shape[2:])


class QuantMatMul(nn.Module):
    """A product of two activations, each with its quantizer; softmax uses the time group."""

    def __init__(self, state):
        super().__init__()
        self.a, self.b = make_quantizer(state["a"]), make_quantizer(state["b"])

    def forward(self, a, b, group=None):
        return self.a(a, group) @ self.b(b, group)


LAYERS = {"linear": QuantLinear, "conv": QuantConv2d, "matmul": QuantMatMul}


def build_quantized(artifact: dict, source) -> nn.Module:
    """The quantized DiT of a quant file. InputError if its parts do not make up the whole model.

    The file holds `config`, `state` (the parameters left in full precision), `layers` (the state
    of every quantized layer, by name) and `group_table`, the (1000,) time group of every timestep.
    """
    try:
        with torch.device("meta"):
            model = DiT(**artifact["config"])
        model.group_table = artifact["group_table"]
        _, unexpected = model.load_state_dict(artifact["state"], strict=False, assign=True)
        for name, state in artifact["layers"].items():
            swap_layer(model, name, LAYERS[state["type"]](state))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{source} is damaged: {reason}; run 03 again") from error
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing or unexpected:
        raise InputError(f"{source} is damaged: {(missing + unexpected)[0]}; run 03 again")
    return model.eval().requires_grad_(False)


def swap_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a quantized layer in place of the one it stands for; ValueError if it does not fit."""
    parent, _, child = name.rpartition(".")
    parent, old = model.get_submodule(parent), model.get_submodule(name)
    if isinstance(layer, QuantMatMul):
        parent.fused = False  # the products must be explicit
    elif layer.weight.shape != old.weight.shape:
        raise ValueError(f"{name} has shape {tuple(layer.weight.shape)}")
    setattr(parent, child, layer)
