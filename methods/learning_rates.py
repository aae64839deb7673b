"""Flags of the methods that learn by gradient descent (reconstruction.py)."""

from common.errors import InputError


def add_rate_flags(p, scale_lr):
    """The learning rates, with a paper's of scales as default."""
    rate = "Adam's for rounding; fewer iterations want more"
    p.paper.add_argument("--weight-lr", type=float, default=1e-3, help=rate)
    rate = "Adam's for scales; fewer iterations, or smaller scales, want less"
    p.paper.add_argument("--scale-lr", type=float, default=scale_lr, help=rate)


def check_rates(args):
    """InputError unless --weight-lr and --scale-lr are learning rates."""
    for flag, rate in (("--weight-lr", args.weight_lr), ("--scale-lr", args.scale_lr)):
        if not 0 < rate < 1:
            raise InputError(f"{flag} {rate}: above 0, below 1")
