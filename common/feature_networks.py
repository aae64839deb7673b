"""The networks whose features 05_eval_fid.py scores: Inception, or the demo's own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.artifacts import load_tensors
from common.checkpoints import download
from common.errors import InputError
from common.inception import INCEPTION, INCEPTION_SHA, INCEPTION_URL, Inception
from common.mnist_classifier import FeatureNet


class Network(NamedTuple):
    """A feature network on its device."""

    features: Callable  # of uint8 (N, H, W, C): pooled (N, D), spatial (N, S), logits (N, K)
    channels: tuple  # that its images may have
    path: Path  # of its weights
    device: torch.device


def load_network(features, inception, device):
    """The demo's network with weights at the path `features`; of "inception" the file `inception`,
    without one downloaded."""
    if features == "inception":
        path = inception or download(INCEPTION_URL, INCEPTION, INCEPTION_SHA)
        net = fill(Inception, load_tensors(path, "weights of Inception"), path)
        return Network(net.to(device), (1, 3), Path(path), device)
    state = load_tensors(features, "weights of the demo's feature network")
    if not isinstance(state, dict):
        raise InputError(f"{features} is a {type(state).__name__}, not a dict of weights")

    def build():
        width, channels = state["convs.0.weight"].shape[:2]
        return FeatureNet(channels, width, len(state["fc.weight"]))

    net = fill(build, state, features).to(device)

    def scaled(images):
        return net(images.permute(0, 3, 1, 2) / 127.5 - 1)

    return Network(scaled, (net.convs[0].in_channels,), Path(features), device)


def fill(build, state, path):
    """The network `build()` with these weights; InputError unless they are its own, and finite."""
    try:
        with torch.device("meta"):
            net = build()
        net.load_state_dict(dict(state), assign=True)
        good = all(
            (v.is_floating_point() or name.endswith("num_batches_tracked")) and v.isfinite().all()
            for name, v in state.items()
        )
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds other weights: {str(error)[:200]}") from error
    if not good:
        raise InputError(f"{path}: some weights are NaN, infinite or no real numbers")
    return net.float().eval()


@torch.no_grad()
def run_network(network, images, name):
    """Pooled, spatial, logits of images (N, H, W, C) that have passed `check_fit`."""
    try:
        return network.features(torch.tensor(images, device=network.device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the images fit: it is the machine; a CPU's memory ends so
        reason = str(error)[:200]
        raise InputError(f"{name}: {reason}; a smaller --batch-size may help") from error


def check_fit(network, images, name, wanted):
    """Sizes of the features of such images, {mu: D, mu_s: S}; InputError if the network takes no
    such images, or a size is not the `wanted` one."""
    if images.shape[3] not in network.channels:
        takes = " or ".join(map(str, network.channels))
        found = f"{name} has images of {images.shape[3]} channels"
        raise InputError(f"{found}, {network.path} takes {takes}: give other --features")
    pooled, spatial, _ = run_network(network, np.zeros_like(images[:1]), name)
    sizes = {"mu": pooled.shape[1], "mu_s": spatial.shape[1]}
    for key, size in wanted.items():
        if sizes[key] != size:
            differ = f"{key} of the reference has {size} numbers, of {name} {sizes[key]}"
            raise InputError(f"{differ}: make it with these --features and this image size")
    return sizes
