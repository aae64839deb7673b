"""Whether values follow a power law: its likelihood against that of an exponential distribution.

After Clauset, Shalizi, Newman (arXiv 0706.1062): the fit by maximum likelihood (3.1), where it
begins by the Kolmogorov-Smirnov distance (3.9), and the likelihood ratio (Sec. 5).
"""

import torch
from torch import Tensor


def exponent(tail: Tensor) -> Tensor:
    """k of the power law of most likelihood for x / x_min >= 1: 1 + n / sum ln(x / x_min)."""
    return 1 + len(tail) / tail.log().sum()


def lower_cutoff(x: Tensor) -> Tensor:
    """x_min for sorted x > 0: of the deciles, the one from which on the best law's distribution
    function is nearest to that of the values."""
    distances, starts = [], [len(x) * i // 10 for i in range(10)]
    for start in starts:
        tail = x[start:] / x[start]
        below = torch.arange(len(tail)).to(x) / len(tail)
        distances.append((below - 1 + tail ** (1 - exponent(tail))).abs().max())
    return x[starts[int(torch.stack(distances).nan_to_num(torch.inf).argmin())]]


def power_law_ratio(values: Tensor) -> float:
    """ln of the likelihood of a power law over that of an exponential distribution, each the best
    one, for those of the positive values from the cutoff on. Above 0 they follow the power law; 0
    where all are equal."""
    x = values[values > 0].double().sort().values
    if not len(x) or x[0] == x[-1]:
        return 0.0
    x_min = lower_cutoff(x)
    x = x[x >= x_min]
    k, logs, mean = exponent(x / x_min), (x / x_min).log().sum(), (x - x_min).mean()
    power_law = len(x) * ((k - 1) / x_min).log() - k * logs
    exponential = -len(x) * (mean.log() + 1)  # n ln(1 / mean) - sum(x - x_min) / mean
    return float(power_law - exponential)
