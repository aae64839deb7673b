"""Static scales of a linear layer, searched as in 03_quantize.py, and TGQ for its inputs if wanted,
which the paper has after softmax alone."""

from quant_ops import InputLoss, WeightLoss, gelu_candidates, join_groups, uniform_candidates


def input_candidates(rows, post_gelu, bits):
    """Line 16: Q_X at min-max, and functions of Q_X that give the candidates to try in turn."""
    if post_gelu:
        return gelu_candidates(*rows.range("x"), bits)
    Q_X, candidates = uniform_candidates(*rows.range("x"), bits)
    return Q_X, [lambda Q_X: candidates]


def search_input(Q_X, fit, grids, loss, search):
    """Lines 20 and 22: each of the input's scales in turn."""
    for around in grids:
        Q_X = search(around(Q_X), fit, loss)
    return Q_X


def search_static(weight, weights, fit, bits, post_gelu, by_group, rounds, search):
    """Alg. 1 lines 16-22: Q_W, of these candidates, and Q_X, of so many bits, of a weight (O, I).
    `by_group`: Q_X has a scale for each time group."""
    parts = [fit.of_group(i) for i in range(fit.num_groups)] if by_group else [fit]
    starts, grids = zip(*(input_candidates(p, post_gelu, bits) for p in parts), strict=True)
    Q_X = list(starts)  # one for each time group, or the only one
    for _ in range(rounds):
        Q_W = search(weights, fit, WeightLoss(weight, joined(Q_X)))
        loss = InputLoss(weight, Q_W)
        Q_X = [search_input(*one, loss, search) for one in zip(Q_X, parts, grids, strict=True)]
    return Q_W, joined(Q_X)


def joined(quantizers):
    """One quantizer of those of all groups; the only one as it is."""
    return join_groups(quantizers) if len(quantizers) > 1 else quantizers[0]
