"""What images are scored by: pure functions of features, logits and pixels.

Frechet distance, inception score, precision and recall as in the ADM evaluator
(openai/guided-diffusion), and PSNR of images that pair up.
"""

import numpy as np
import torch
from scipy.linalg import eigvals


def moments(features, rows=4096):
    """mu (D,) and unbiased sigma (D, D) of features (N, D), summed in float64 block by block."""
    mu = sum(part.double().sum(0) for part in features.split(rows)) / len(features)
    centred = (part.double() - mu for part in features.split(rows))
    sigma = sum(part.T @ part for part in centred) / (len(features) - 1)
    return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))  (Heusel et al., 2017); the
    root's trace is the sum of the roots of the eigenvalues, which are >= 0 but for rounding."""
    roots = np.sqrt(eigvals(sigma1 @ sigma2).real.clip(min=0))
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * roots.sum())


def inception_score(logits, split=5000):
    """Mean over splits of exp(E_x KL(p(y|x) || p(y)))  (Salimans et al., 2016; splits as ADM)."""
    log_ps = [part.log_softmax(1) for part in logits.double().split(split)]  # (split, K)
    kl = [(p.exp() * (p - p.logsumexp(0) + np.log(len(p)))).sum(1).mean() for p in log_ps]
    return torch.stack(kl).exp().mean().item()


def coverage(points, centres, k=3, rows=1024):
    """Share of points no further from some centre than its k-th neighbour, itself not counted
    (Kynkaanniemi et al., 2019). In float64; the float16 distances of ADM are coarser."""
    if min(len(points), len(centres)) <= k:
        return None
    points, centres = points.double(), centres.double()  # (N, D), (M, D)
    near = [torch.cdist(part, centres).kthvalue(k + 1).values for part in centres.split(rows)]
    inside = [(torch.cdist(part, centres) <= torch.cat(near)).any(1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def psnr(images, twins):
    """Mean of 10 log10(255^2 / max(mse, 1/12)); 1/12 is 8-bit rounding, so 58.9 dB is equal."""
    pairs = zip(images, twins, strict=True)
    mse = np.array([np.square(a.astype(np.float64) - b).mean() for a, b in pairs])
    return float((10 * np.log10(255**2 / mse.clip(min=1 / 12))).mean())
