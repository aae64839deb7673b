"""Scores of the demo's samples and of its models' eps, with paired bootstrap intervals."""

import numpy as np
import torch

from processes import ROOT

from common.artifacts import load_tensors
from common.checkpoints import load_calib, load_calibrated
from common.errors import InputError
from common.metrics import coverage, frechet_distance, inception_score, moments, psnr
from common.mnist_classifier import FeatureNet
from common.quant_file import build_quantized, load_quant
from models_dit import Diffusion

DRAWS = 400  # bootstrap resamples of the images, or of the validation rows
BATCH = 500  # images at a time


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_feature_network():
    """The demo's."""
    weights = load_tensors(ROOT / "demo" / "features_mnist.pt", "feature network")
    width, channels = weights["convs.0.weight"].shape[:2]
    network = FeatureNet(channels, width, len(weights["fc.weight"]))
    network.load_state_dict(weights)
    return network.eval()


class Scores:
    """Features, PSNR and bootstrap intervals of the first `num_images` samples of each file, which
    is looked at only once."""

    def __init__(self, num_images):
        self.device, self.num_images = pick_device(), num_images
        self.network = load_feature_network().to(self.device)
        with np.load(ROOT / "demo" / "reference_mnist.npz") as reference:
            self.reference = {key: reference[key] for key in reference}
        self.draws = np.random.default_rng(0).integers(num_images, size=(DRAWS, num_images))
        self.files, self.energies = {}, {}

    @torch.no_grad()
    def of(self, path):
        """Images and features of a file of samples, and its metrics."""
        if path not in self.files:
            with np.load(path) as file:
                images = file["arr_0"][: self.num_images]  # (N, H, W, C)
            if len(images) < self.num_images:
                raise InputError(f"{path} has {len(images)} images, not {self.num_images}")
            batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH)
            outputs = [self.network(x.to(self.device) / 127.5 - 1) for x in batches]
            features, spatial, logits = (torch.cat(x) for x in zip(*outputs, strict=True))
            real = torch.as_tensor(self.reference["features"]).to(self.device)
            self.files[path] = dict(
                images=images,
                features=features,
                fd=self.frechet(moments(features)),
                sfd=self.frechet(moments(spatial), "_s"),
                inception=inception_score(logits),
                precision=coverage(features, real),
                recall=coverage(real, features),
            )
        return self.files[path]

    def frechet(self, statistics, which=""):
        reference = self.reference[f"mu{which}"], self.reference[f"sigma{which}"]
        return frechet_distance(*statistics, *reference)

    def metrics(self, path):
        file = self.of(path)
        return {key: file[key] for key in ("fd", "sfd", "inception", "precision", "recall")}

    def drawn_fd(self, path):
        """(DRAWS,) Frechet distances of the resampled images; the same draws for every file."""
        file = self.of(path)
        if "drawn" not in file:
            found = (moments(file["features"][draw]) for draw in self.draws)
            file["drawn"] = np.array([self.frechet(statistics) for statistics in found])
        return file["drawn"]

    def fd_ratio(self, path, other):
        """Frechet distance of one file over that of another, and its 95 % bootstrap interval."""
        ratio = self.of(path)["fd"] / self.of(other)["fd"]
        drawn = np.log(self.drawn_fd(path) / self.drawn_fd(other))
        return ratio, np.exp(centred(np.log(ratio), drawn)).tolist()

    def psnr(self, path, twin):
        """(N,) PSNR of each image against its full-precision twin, dB."""
        pairs = zip(self.of(path)["images"], self.of(twin)["images"], strict=True)
        return np.array([psnr([image], [other]) for image, other in pairs])

    def psnr_gain(self, path, other, twin):
        """Mean PSNR of one file less that of another, dB, and its 95 % bootstrap interval."""
        gain = self.psnr(path, twin) - self.psnr(other, twin)
        return gain.mean(), self.interval(gain)

    def against(self, path, twin):
        """What is known of a file beside its full-precision twin; for results.json."""
        psnrs, (ratio, interval) = self.psnr(path, twin), self.fd_ratio(path, twin)
        found = dict(psnr=psnrs.mean(), psnr_interval=self.interval(psnrs))
        return self.metrics(path) | found | dict(fd_ratio=ratio, fd_ratio_interval=interval)

    def interval(self, values):
        """95 % bootstrap interval of the mean of values (N,), by the same draws."""
        return np.quantile(values[self.draws].mean(axis=1), [0.025, 0.975]).tolist()

    def energy(self, path):
        """(2, R) of eps on the validation rows: signal and noise of the quant file at `path`, each
        row weighted by the sampler's sensitivity, as in the report of 03."""
        if path not in self.energies:
            calib = load_calib(path.parent)
            quantized = build_quantized(load_quant(path), path)
            full, found = (eps(m, calib) for m in (load_calibrated(calib), quantized))
            energy = torch.stack([full, found - full]).square().sum((2, 3, 4))  # (2, R)
            weight = Diffusion(calib["settings"]["steps"]).sensitivity()
            self.energies[path] = (energy * weight[calib["validation"]["t"]]).numpy()
        return self.energies[path]

    def snr_change(self, path, other):
        """SNR of eps of one quant file less that of another, dB, and its 95 % bootstrap interval
        over the validation rows: the signal is the same."""
        noise, other_noise = self.energy(path)[1], self.energy(other)[1]  # (R,)
        change = 10 * np.log10(other_noise.sum() / noise.sum())
        draws = np.random.default_rng(0).integers(len(noise), size=(DRAWS, len(noise)))
        drawn = 10 * np.log10(other_noise[draws].sum(axis=1) / noise[draws].sum(axis=1))
        return float(change), np.quantile(drawn, [0.025, 0.975]).tolist()


@torch.no_grad()
def eps(model, calib):
    """The network's eps on the validation rows, (R, C, H, W)."""
    rows, timestep_map = calib["validation"], Diffusion(calib["settings"]["steps"]).timestep_map
    out = model(rows["x"], timestep_map[rows["t"]], rows["y"])
    return out[:, : model.in_channels].double()


def centred(value, drawn):
    """95 % interval around `value` as wide as that of the resampled values `drawn`. Resampling
    repeats images, which moves a Frechet distance: its draws tell the spread, not the place."""
    return value + np.quantile(drawn - drawn.mean(), [0.025, 0.975])
