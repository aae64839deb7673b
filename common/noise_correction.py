"""PTQD's correction of quantization noise in the sampler (arXiv 2305.10657).

The error of the quantized network's eps, after guidance, is taken to be Delta = k eps + r: a part
along eps, and a rest. Both are measured at every t where a full-precision trajectory passes:

    slope   (T,)     k: regression of Delta on eps over all elements and samples; 0 if below
    bias    (T, C)   mean of r in each channel
    std     (T,)     mean over samples of the standard deviation of r

`CorrectedDiffusion` undoes k and the bias, and takes what r adds off the variance of its own noise.
"""

import torch

from models_dit import Diffusion, image_generators, respaced_timesteps, trajectory

STREAM = 2  # of random numbers; 0: 04, 1: 01; 02 --eps renoise has 2 too, and is not used here
TINY = 1e-20  # the least variance, whose logarithm is finite


class Compared:
    """The full-precision network for `trajectory`, which keeps how the other's eps differs from its
    own, as guided, on the same inputs."""

    def __init__(self, model, quantized):
        self.models, self.moments = (model, quantized), []
        self.in_channels, self.input_size = model.in_channels, model.input_size
        self.num_classes = model.num_classes

    def __call__(self, x, t, y):
        return self.keep(*(model(x, t, y) for model in self.models), len(x))

    def forward_with_cfg(self, x, *rest):
        both = (model.forward_with_cfg(x, *rest) for model in self.models)
        return self.keep(*both, len(x) // 2)

    def keep(self, out, out_q, count):
        eps, eps_q = (x[:count, : self.in_channels].double() for x in (out, out_q))
        self.moments.append(moments_of(eps, eps_q - eps).cpu())
        return out


def moments_of(eps, delta):
    """Means of eps, Delta, eps Delta, eps^2 and Delta^2 over (N, C, H, W), (N, C, 5)."""
    products = eps, delta, eps * delta, eps * eps, delta * delta
    return torch.stack([x.mean(dim=(2, 3)) for x in products], dim=-1)


@torch.no_grad()
def measure(model, quantized, diffusion, indices, settings, bar):
    """The moments (T, N, C, 5) on the trajectories with these indices; labels take turns."""
    both = Compared(model, quantized)
    y = torch.tensor(indices, device=diffusion.timestep_map.device) % model.num_classes
    generators = image_generators(settings["seed"], indices, STREAM)
    guidance = settings["cfg_scale"], settings["cfg_channels"]
    for _ in trajectory(both, diffusion, y, generators, *guidance):
        bar.update()
    return torch.stack(both.moments[::-1])  # trajectories run from T-1 to 0


def noise_of(moments):
    """slope, bias and std of moments (T, N, C, 5)."""
    eps, delta, product, square, _ = moments.mean(dim=(1, 2)).unbind(-1)  # (T,)
    slope = (product - eps * delta) / (square - eps**2).clamp(min=TINY)
    slope = slope.clamp(min=0)
    eps, delta = moments[..., :2].mean(dim=1).unbind(-1)  # (T, C)
    bias = delta - slope[:, None] * eps
    eps, delta, product, square, error = moments.mean(dim=2).unbind(-1)  # (T, N)
    k = slope[:, None]
    variance = error - delta**2 - 2 * k * (product - eps * delta) + k**2 * (square - eps**2)
    found = dict(slope=slope, bias=bias, std=variance.clamp(min=0).sqrt().mean(dim=1))
    return {key: x.float() for key, x in found.items()}


def error_energy(moments, noise):
    """Mean squared error of eps at every t, (T,), as it is and once corrected."""
    k, bias = noise["slope"].double()[:, None], noise["bias"].double()
    eps, delta, product, square, error = moments.mean(dim=1).unbind(-1)  # (T, C)
    rest = error - 2 * k * product + k**2 * square - 2 * bias * (delta - k * eps) + bias**2
    return error.mean(dim=1), (rest / (1 + k) ** 2).mean(dim=1)


class CorrectedDiffusion(Diffusion):
    """The sampler that corrects eps, and its own noise by what the rest of the error adds.

    At other T than measured a step takes what was measured at the nearest timestep of 0..999.
    """

    def __init__(self, noise, num_timesteps, device="cpu"):
        super().__init__(num_timesteps, device)
        measured = torch.tensor(respaced_timesteps(len(noise["slope"])), device=device)
        nearest = (self.timestep_map[:, None] - measured).abs().argmin(dim=1)
        slope, bias, std = (noise[key].to(device)[nearest] for key in ("slope", "bias", "std"))
        self.divisor, self.bias = 1 + slope, bias
        self.absorbed = self.sensitivity() * (std / self.divisor) ** 2

    def p_mean_log_var(self, out, x_t, t):
        """Mean and log variance of p(x_{t-1} | x_t), of the corrected eps."""
        channels = x_t.shape[1]
        eps = (out[:, :channels] - self.bias[t][:, :, None, None]) / self.at("divisor", t)
        out = torch.cat([eps, out[:, channels:]], dim=1)
        mean, log_var = super().p_mean_log_var(out, x_t, t)
        # r moves the mean by r times the root of the sensitivity: noise that is there already
        return mean, (log_var.exp() - self.at("absorbed", t)).clamp(min=TINY).log()


def make_diffusion(noise, num_timesteps, device):
    """The sampler for this `noise` of a quant file, which most have not."""
    if noise is None:
        return Diffusion(num_timesteps, device)
    if num_timesteps != len(noise["slope"]):
        measured = f"noise correction: measured at T = {len(noise['slope'])}"
        print(f"{measured}; at T = {num_timesteps} a step takes that of the nearest timestep")
    return CorrectedDiffusion(noise, num_timesteps, device)
