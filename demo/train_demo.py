"""Train the demo: a small pixel-space DiT, its feature network and its reference statistics.

In: an .npz of MNIST (train_images, train_labels) or CIFAR-10 (JPEG: train_bytes,
train_offsets, train_labels).  Out, in --out: dit_NAME.pt (EMA weights),
features_NAME.pt and reference_NAME.npz.
The loss is DiT's: squared error of eps plus the variational bound for the learned variance.
Progress is kept in --out/train_NAME.pt, so a stopped run goes on where it was.

The files in the repository: 9,000 steps of 128 images, then on to 16,000 with 64, on 2 CPU cores:

    python demo/train_demo.py --data mnist.npz --steps 9000                     # 77 minutes
    python demo/train_demo.py --data mnist.npz --steps 16000 --batch-size 64    # 29 minutes
"""

import argparse
import io
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.mnist_classifier import FeatureNet  # noqa: E402
from models_dit import Diffusion, DiT, DiT_models, image_generators, trajectory  # noqa: E402

CIFAR_DIT = dict(
    input_size=32, patch_size=4, in_channels=3, hidden_size=256, depth=8, num_heads=4
) | dict(num_classes=10)


def load_images(path, split):
    """uint8 images (N, C, H, W), int64 labels (N,)."""
    with np.load(path) as data:
        labels = torch.from_numpy(data[f"{split}_labels"].astype(np.int64))
        if f"{split}_images" in data:
            return torch.from_numpy(data[f"{split}_images"])[:, None], labels
        stream, at = data[f"{split}_bytes"], data[f"{split}_offsets"]
    pairs = zip(at[:-1], at[1:], strict=True)
    images = [np.asarray(Image.open(io.BytesIO(stream[a:b].tobytes()))) for a, b in pairs]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def initialize(model):
    """DiT's published initialization: Xavier linears, adaLN-Zero, zero output (for training)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    table, mlp = model.y_embedder.embedding_table, model.t_embedder.mlp
    for normal in (table, mlp[0], mlp[2]):
        nn.init.normal_(normal.weight, std=0.02)
    zeroed = [block.adaLN_modulation[1] for block in model.blocks]
    for linear in [*zeroed, model.final_layer.adaLN_modulation[1], model.final_layer.linear]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def to_model_range(images):
    return images.float() / 127.5 - 1


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL divergence between two diagonal Gaussians, elementwise, in nats."""
    ratio = torch.exp(log_var1 - log_var2)
    return 0.5 * (log_var2 - log_var1 + ratio + (mean1 - mean2) ** 2 * torch.exp(-log_var2) - 1)


def pixel_nll(x, mean, log_var):
    """Negative log-likelihood in nats of 8-bit pixels in [-1, 1] under a Gaussian, per element."""
    scale = torch.exp(-0.5 * log_var)
    upper = torch.special.ndtr((x + 1 / 255 - mean) * scale)
    lower = torch.special.ndtr((x - 1 / 255 - mean) * scale)
    upper = torch.where(x > 0.999, torch.ones_like(x), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(x), lower)
    return -torch.log((upper - lower).clamp_min(1e-12))


def diffusion_loss(model, diffusion, x_0, t, y, eps):
    """Mean squared error of eps, and the bound in bits per dimension (eps detached in it)."""
    x_t = diffusion.q_sample(x_0, t, eps)
    out = model(x_t, t, y).float()
    eps_out, var = out.chunk(2, dim=1)
    mse = F.mse_loss(eps_out, eps)
    frozen = torch.cat([eps_out.detach(), var], dim=1)
    mean, log_var = diffusion.p_mean_log_var(frozen, x_t, t)
    true_mean = diffusion.posterior_mean(x_0, x_t, t)
    kl = normal_kl(true_mean, diffusion.at("log_var_min", t), mean, log_var)
    bound = torch.where(t[:, None, None, None] == 0, pixel_nll(x_0, mean, log_var), kl)
    return mse, bound.mean() / np.log(2)


def random_batch(images, labels, size, generator, flip):
    index = torch.randint(len(images), (size,), generator=generator)
    x = to_model_range(images[index])
    if flip:
        mirrored = torch.rand(size, generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x, labels[index]


def save(path, payload):
    """Write beside, then rename: a stopped run never leaves half a file."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(payload, temporary)
    temporary.replace(path)


def learning_rate(step, args):
    warm = min(1.0, (step + 1) / 500)
    return args.lr * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train_dit(args, name, images, labels, config):
    """Train, resuming from the kept state if there is one; returns the EMA weights."""
    torch.manual_seed(args.seed)
    model = initialize(DiT(**config)).to(args.device)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    diffusion = Diffusion(1000, args.device)
    kept, first = args.out / f"train_{name}.pt", 0
    if kept.exists():
        state = torch.load(kept, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first = state["ema"], state["step"]
    forward = torch.compile(model) if args.compile else model
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="DiT")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # resuming repeats nothing
        x_0, y = random_batch(images, labels, args.batch_size, g, flip=name == "cifar10")
        dropped = torch.rand(len(y), generator=g) < 0.1
        y = torch.where(dropped, config["num_classes"], y).to(args.device)
        t = torch.randint(1000, (len(y),), generator=g).to(args.device)
        eps = torch.randn(x_0.shape, generator=g).to(args.device)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            mse, bound = diffusion_loss(forward, diffusion, x_0.to(args.device), t, y, eps)
        optimizer.zero_grad()
        (mse + bound).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)
        if step % 100 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}", bound=f"{bound.item():.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema)
            save(kept, state | dict(step=step + 1))
    return {k: v.cpu() for k, v in ema.items()}


def train_features(args, name, images, labels, config):
    """The trained classifier, in eval mode. One-cycle schedule, random two-pixel shifts."""
    torch.manual_seed(args.seed)
    settings = (config["in_channels"], 16 if name == "mnist" else 64, config["num_classes"])
    net = FeatureNet(*settings).to(args.device).train()
    steps = args.epochs * len(images) // 256
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="features"):
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        x, y = random_batch(images, labels, 256, g, flip=name == "cifar10")
        dy, dx = torch.randint(-2, 3, (2,), generator=g).tolist()
        x = torch.roll(x, (dy, dx), dims=(2, 3)).to(args.device)
        loss = F.cross_entropy(net(x)[2], y.to(args.device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def features_of(net, images, device):
    """Pooled and spatial features and logits of uint8 images, on the CPU."""
    parts = [net(to_model_range(x).to(device)) for x in tqdm(images.split(500), desc="statistics")]
    return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]


def reference_statistics(net, images, device):
    """Mean and covariance of the training set's features, and 5,000 rows for the manifold."""
    pooled, spatial, _ = features_of(net, images, device)
    pooled, spatial = pooled.double().numpy(), spatial.double().numpy()
    return dict(
        mu=pooled.mean(0),
        sigma=np.cov(pooled, rowvar=False),
        mu_s=spatial.mean(0),
        sigma_s=np.cov(spatial, rowvar=False),
        features=pooled[:5000].astype(np.float32),
    )


@torch.no_grad()
def sample_accuracy(weights, config, net, device, count):
    """Share of samples that the classifier gives their own label (T = 50, guidance 2)."""
    model = DiT(**config).to(device).eval()
    model.load_state_dict(weights)
    y = torch.arange(count, device=device) % config["num_classes"]
    steps = trajectory(model, Diffusion(50, device), y, image_generators(0, range(count)), 2.0)
    for _, x in tqdm(steps, total=51, desc="samples"):  # noqa: B007
        pass
    rounded = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return (net(rounded)[2].argmax(1) == y).float().mean().item()


def main(args):
    with np.load(args.data) as data:
        name = "mnist" if "train_images" in data else "cifar10"
    config = DiT_models["DiT-Demo/4"] if name == "mnist" else CIFAR_DIT
    images, labels = load_images(args.data, "train")
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    weights = train_dit(args, name, images, labels, config)
    print(f"trained in {(time.time() - start) / 60:.0f} minutes (this run)")
    save(args.out / f"dit_{name}.pt", weights)
    net = train_features(args, name, images, labels, config)
    test_images, test_labels = load_images(args.data, "test")
    logits = features_of(net, test_images, args.device)[2]
    print(f"feature network, test accuracy {(logits.argmax(1) == test_labels).float().mean():.4f}")
    save(args.out / f"features_{name}.pt", {k: v.cpu() for k, v in net.state_dict().items()})
    reference = reference_statistics(net, images, args.device)
    np.savez_compressed(args.out / f"reference_{name}.npz", **reference)
    accuracy = sample_accuracy(weights, config, net, args.device, args.samples)
    print(f"classifier on {args.samples} samples, share with their own label: {accuracy:.3f}")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, required=True, help="mnist.npz or cifar10_jpeg.npz")
    p.add_argument("--out", type=Path, default=Path(__file__).parent)
    p.add_argument("--steps", type=int, default=16000, help="optimizer steps of the DiT")
    p.add_argument("--epochs", type=int, default=4, help="epochs of the feature network")
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--ema", type=float, default=0.999)
    p.add_argument("--samples", type=int, default=500, help="sampled at the end, to be judged")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=250, help="steps between kept states")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--compile", action="store_true", help="torch.compile the DiT")
    return p.parse_args()


if __name__ == "__main__":
    main(parse_args())
