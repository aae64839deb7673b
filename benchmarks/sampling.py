"""Time of a sampling step: the public DiT code, ours in full precision, and fake-quantized W8A8.

Every contender takes some steps in turn, in alternating order, for some rounds; guidance is on. The
ratio is the median over rounds of its time to that of full precision in the same round.
Weights: the demo's checkpoint, and random ones, all gates open, in the shape of DiT-XL/2. Steps of
the quantizers are min-max ones of a single forward pass: values do not change the time.
--official is a checkout of github.com/facebookresearch/DiT; its code imports timm.

    python benchmarks/sampling.py --official DiT
    python benchmarks/sampling.py --models xl --blocks 2 --batch-size 1 --rounds 5
"""

import argparse
import copy
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import models_dit as dit  # noqa: E402
import quant_ops as q  # noqa: E402

STEPS, GROUPS, BITS, GUIDANCE = 250, 10, 8, 1.5  # the paper's
FULL = "ours, full precision"


def lively(config, device):
    """A DiT of this shape with random weights: no gate is zero, no number explodes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = dit.DiT(**config)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 / 2)
    return model.to(device).eval().requires_grad_(False)  # positions come from numpy


def layer_state(name, layer, ranges):
    """What 03 would write of a layer, steps from min-max; `ranges` are those of its inputs."""
    uniform = [q.quantizer_state(q.uniform_candidates(*range_, BITS)[0]) for range_ in ranges]
    if isinstance(layer, dit.MatMul):
        softmax = q.SoftmaxQuantizer(BITS, q.softmax_grid(BITS)[4].repeat(GROUPS))
        a = q.quantizer_state(softmax) if name.endswith("av") else uniform[0]
        return dict(type="matmul", a=a, b=uniform[1])
    weight, act = layer.weight.flatten(1).cpu(), uniform[0]
    if name.endswith("fc2"):
        act = q.quantizer_state(q.gelu_candidates(*ranges[0], BITS)[0])
    conv = name.startswith("x_embedder")
    step_zero = q.qparams_from_range(*weight.aminmax(dim=1, keepdim=True), BITS)
    return dict(
        type="conv" if conv else "linear",
        weight=q.pack_weight(layer.weight.cpu(), *step_zero, BITS),
        bias=layer.bias.cpu(),
        act=q.quantizer_state(q.FullPrecision()) if conv else act,  # Deviation D6
        balance=None,
    )


def quantize(model, config, batch):
    """The W8A8 model that `build_quantized` makes of a file with the released layers (D6)."""
    kinds = "x_embedder.proj qkv qk av attn.proj fc1 fc2 final_layer.linear".split()
    layers = {n: m for n, m in model.named_modules() if n.endswith(tuple(kinds))}
    ranges, hooks = {}, []
    for name, layer in layers.items():
        def keep(_, inputs, name=name):
            ranges[name] = [x.cpu().aminmax() for x in inputs if x is not None]
        hooks.append(layer.register_forward_pre_hook(keep))
    dit.explicit_products(model)(*batch)
    for hook in hooks:
        hook.remove()
    for block in model.blocks:
        block.attn.fused = True
    states = {name: layer_state(name, layer, ranges[name]) for name, layer in layers.items()}
    rest = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in states}
    table = q.group_table(dit.Diffusion(STEPS).timestep_map, GROUPS)
    artifact = dict(config=config, state=rest, layers=states, group_table=table)
    return q.build_quantized(artifact, "this model").to(batch[0].device)


def load_official(path, config, model):
    """The public code's DiT and its sampler, on the same weights."""
    sys.path.insert(0, str(path))
    try:
        import diffusion
        import models
    except ImportError as error:
        raise dit.InputError(f"--official {path}: {error}") from error
    theirs = models.DiT(**config).to(model.pos_embed.device).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs, diffusion.create_diffusion(str(STEPS))


def official(theirs, sampler, x, y, null):
    """Endless sampling steps of the public code, called as its sample.py does."""
    keywords = dict(y=torch.cat([y, torch.full_like(y, null)]), cfg_scale=GUIDANCE)
    noise = torch.cat([x, x])
    while True:
        yield from sampler.p_sample_loop_progressive(
            theirs.forward_with_cfg, noise.shape, noise, clip_denoised=False,
            model_kwargs=keywords, device=y.device,
        )


def ours(model, y, compiled=False):
    """Endless sampling steps of `trajectory`."""
    model, diffusion = copy.copy(model), dit.Diffusion(STEPS, y.device)
    if compiled:
        model.compile()
    while True:
        generators = dit.image_generators(0, range(len(y)))
        yield from dit.trajectory(model, diffusion, y, generators, GUIDANCE)


def contenders(name, args):
    """Label -> endless iterator over sampling steps."""
    if name == "demo":
        model, config = dit.load_dit(ROOT / "demo" / "dit_mnist.pt")
        model = model.to(args.device)
    else:
        config = dit.DiT_models["DiT-XL/2"] | ({"depth": args.blocks} if args.blocks else {})
        model = lively(config, args.device)
    y = torch.arange(args.batch_size, device=args.device) % model.num_classes
    x = torch.randn(len(y), model.in_channels, *[model.input_size] * 2, device=args.device)
    quantized = quantize(model, config, (x, torch.full_like(y, 500), y))
    runs = {FULL: ours(model, y), "W8A8": ours(quantized, y)}
    if args.official:
        theirs = load_official(args.official, config, model)
        runs["public DiT code"] = official(*theirs, x, y, model.num_classes)
    if args.compile:
        runs[f"{FULL}, --compile"] = ours(model, y, compiled=True)
        runs["W8A8, --compile"] = ours(quantized, y, compiled=True)
    return runs


@torch.no_grad()
def seconds(run, args):
    """Seconds a sampling step takes, of `--steps` of them."""
    synchronize = torch.cuda.synchronize if args.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    half = args.dtype == "bf16"
    with torch.autocast(args.device.type, torch.bfloat16) if half else nullcontext():
        for _ in range(args.steps):
            next(run)
    synchronize()
    return (time.perf_counter() - start) / args.steps


def hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main(args):
    print(f"{hardware(args.device)}; torch {torch.__version__}; {args.dtype}, TF32 off; ", end="")
    print(f"batch {args.batch_size}, doubled by guidance; medians of {args.rounds} rounds")
    for name in args.models:
        with torch.no_grad():
            runs = contenders(name, args)
        for run in runs.values():  # the first steps compile, and take longer
            seconds(run, args)
        times = {label: [] for label in runs}
        for i in range(args.rounds):
            for label in list(runs)[:: -1 if i % 2 else 1]:
                times[label].append(seconds(runs[label], args))
        blocks = f", {args.blocks} blocks" if name == "xl" and args.blocks else ""
        bases = [label for label in times if label.startswith(FULL)]
        print(f"\n| {'DiT-XL/2' if name == 'xl' else 'demo'}{blocks} | ms per step", end=" | x ")
        print(*bases, sep=" | x ", end=" |\n" + "|---" * (2 + len(bases)) + "|\n")
        for label, found in times.items():
            pairs = [zip(found, times[base], strict=True) for base in bases]
            ratios = [f"{median(a / b for a, b in pair):.2f}" for pair in pairs]
            print(f"| {label}", f"{1000 * median(found):.2f}", *ratios, sep=" | ", end=" |\n")


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--official", type=Path, help="a checkout of the public DiT code")
    p.add_argument("--models", nargs="+", choices=("demo", "xl"), default=["demo", "xl"])
    p.add_argument("--blocks", type=int, help="of DiT-XL/2, if not all 28")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--steps", type=int, default=5, help="a round's steps of each")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of products")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p.add_argument("--device", type=dit.pick_device, default=device)
    return p.parse_args()


if __name__ == "__main__":
    dit.run_script(main, parse_args)
