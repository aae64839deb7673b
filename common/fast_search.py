"""`quant_ops.search`, faster: the same signature, the same choice but for near-ties.

Candidates that cannot win any more are pruned, and those of linear layers are multiplied as integer
codes (int_losses.py) where the device has a unit for that. Chunks are outside and candidates
inside, so that a chunk stays in cache.
"""

from functools import cache

import torch

from common.int_losses import INT_MM, on_integers
from quant_ops import WeightLoss, search

SLACK = 1.1  # of the least loss expected: candidates above are pruned at first


class FastSearch:
    """The searches of one layer, called as `quant_ops.search` is; remembers what loss to expect.

    Losses are sums of squares, so they only grow from chunk to chunk: a candidate that has come to
    more than another's whole sum cannot win, and need not see the chunks that are left. Candidates
    are pruned above a bar: SLACK times the loss of the layer's last search or, in its first, the
    better of two candidates near the usual minimum. Then the least whole sum is the bar, and
    whoever was pruned below it goes on, until nobody is left.
    """

    def __init__(self, compile_losses=False):
        self.expected, self.compile_losses = {}, compile_losses

    def __call__(self, candidates, data, loss):
        key = isinstance(loss, WeightLoss), data.group
        expected = self.expected.get(key)
        twin = on_integers(loss, candidates, data)
        compiles = getattr(twin, "product", INT_MM) is INT_MM  # others are no torch code
        self.evaluate = _compiled() if self.compile_losses and compiles else _evaluate
        total = self.sums(candidates, data, twin, expected)
        least = total.amin(dim=0)
        self.expected[key] = least
        self.expected[False, data.group] = least.sum()
        return candidates[total.argmin(dim=0)]

    def sums(self, candidates, data, loss, expected):
        """(C, ...) losses of candidates over all chunks; of pruned ones so far, above the least."""
        count, total = len(candidates), None
        seen, left = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool)
        bar = torch.inf if expected is None else SLACK * expected
        if expected is None:
            left &= torch.isin(torch.arange(count), torch.tensor([6, 8]) * count // 10)
        while left.any():
            for k, chunk in enumerate(data):
                now = (left & (seen == k)).nonzero()[:, 0].tolist()
                if now:
                    losses = self.losses(candidates, now, chunk, loss)
                    total = losses.new_zeros(count, *losses.shape[1:]) if total is None else total
                    total[now] += losses
                    seen[now] += 1
                    left &= _not_above(total, bar)
            whole = seen == k + 1
            bar = total[whole].amin(dim=0) if whole.any() else torch.inf
            left = ~whole & _not_above(total, bar)
        return total

    def losses(self, candidates, now, chunk, loss):
        """Losses of some candidates on one chunk, in float64; NaN is the worst of all."""
        shared = loss.prepare(chunk)
        found = [self.evaluate(loss, chunk, shared, candidates[i]) for i in now]
        return torch.stack(found).double().nan_to_num_(torch.inf, torch.inf)


def make_search(name, compile_losses):
    """The search of one layer that --search names: `plain`, the definition, or `fast`."""
    return search if name == "plain" else FastSearch(compile_losses)


def _evaluate(loss, chunk, shared, quantizer):
    return loss(chunk, shared, quantizer)


@cache
def _compiled():
    """`_evaluate`, compiled once for all layers: few passes over memory instead of many."""
    return torch.compile(_evaluate, dynamic=True)


def _not_above(total, bar):
    """Which candidates are in some element not above the bar, (candidates,) on the host."""
    return (~(total > bar)).view(len(total), -1).any(dim=1).cpu()
