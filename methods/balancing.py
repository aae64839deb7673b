"""Evening out channels: what is divided out of a layer's inputs is multiplied into its weight."""

from torch import Tensor


def smoothquant_factors(x_max: Tensor, weight: Tensor, strength: float) -> Tensor:
    """(I,) factors s: dividing input channels by s and multiplying the weight's columns by s leaves
    the product as it is and evens out the channels (SmoothQuant, arXiv 2211.10438, Eq. 4).

    `x_max` (I,) is the largest magnitude of each input channel, `weight` is (O, I); at strength 1
    all input channels become equal, at 0 all columns of the weight.
    """
    w_max = weight.abs().amax(dim=0).clamp(min=1e-5)
    return x_max.clamp(min=1e-5) ** strength / w_max ** (1 - strength)
