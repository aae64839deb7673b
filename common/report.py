"""What Phases 2 and 3 end with: memory; the error of the quantized model, and of each layer."""

import torch

from models_dit import Diffusion
from quant_ops import hessian_loss


@torch.no_grad()
def linear_cost(data, W_hat, Q_X):
    """Eq. (16) of a finished linear layer with this quantized weight (O, I), over all rows."""
    cost = 0.0
    for chunk in data:
        delta = torch.addmm(chunk.out, Q_X(chunk.x, chunk.group), W_hat.T, alpha=-1)
        cost += hessian_loss(delta, chunk.grad).item()
    return cost


@torch.no_grad()
def matmul_cost(data, Q_A, Q_B):
    """Eq. (16) of a finished product of activations, over all rows."""
    cost = 0.0
    for chunk in data:
        out_hat = Q_A(chunk.a, chunk.group) @ Q_B(chunk.b)
        cost += hessian_loss(out_hat - chunk.out, chunk.grad).item()
    return cost


@torch.no_grad()
def signal_to_noise(model, quantized, calib, batch_size, device):
    """SNR in dB of eps on the validation rows: (G,) per time group, and one weighted by how much
    each timestep's eps moves the sample."""
    diffusion, rows = Diffusion(calib["settings"]["steps"]), calib["validation"]
    signal, noise = [], []
    for x, t, y in zip(*(rows[k].split(batch_size) for k in ("x", "t", "y")), strict=True):
        batch = [v.to(device) for v in (x, diffusion.timestep_map[t], y)]
        out, out_q = (m(*batch)[:, : model.in_channels].cpu() for m in (model, quantized))
        signal.append(out.double().square().sum((1, 2, 3)))
        noise.append((out_q - out).double().square().sum((1, 2, 3)))
    energy = torch.stack([torch.cat(signal), torch.cat(noise)])  # (2, R)
    groups = torch.zeros(2, calib["settings"]["groups"], dtype=energy.dtype)
    groups.index_add_(1, rows["group"], energy)
    weighted = (energy * diffusion.sensitivity()[rows["t"]]).sum(1)
    ratio = torch.cat([groups, weighted[:, None]], dim=1)
    ratio = torch.where(ratio[1] == 0, torch.inf, ratio[0] / ratio[1])  # a new DiT's eps is all 0
    *per_group, weighted = (10 * torch.log10(ratio)).tolist()
    return dict(snr_per_group=per_group, snr_weighted=weighted)


def print_peak(device):
    """On CUDA, the most memory that tensors of this process have taken there."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        print(f"peak GPU memory {peak:.0f} MiB")


def print_report(report):
    """The report in three lines."""
    per_group = "  ".join(f"{snr:.1f}" for snr in report["snr_per_group"])
    print(f"eps, signal to noise on validation rows, dB per time group: {per_group}")
    print(f"weighted by the sampler's sensitivity: {report['snr_weighted']:.2f} dB")
    total = sum(report["costs"].values()) or 1  # of a network whose weights are all zero
    costliest = sorted(report["costs"].items(), key=lambda item: -item[1])[:6]
    print("layers that cost most (share of the weighted error): ", end="")
    print(", ".join(f"{name} {cost / total:.0%}" for name, cost in costliest))
