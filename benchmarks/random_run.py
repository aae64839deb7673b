"""A run of random weights and random calibration rows, as 01 would have written it, and the
numbered scripts as modules and as processes. For calibration.py."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time

import torch
from sampling import ROOT, STEPS, dit, lively, q


def load_script(name):
    """A numbered script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_of(module, *flags):
    """What the script's parser makes of these flags."""
    sys.argv = [module.__file__, *map(str, flags)]
    return module.parse_args()


def random_rows(config, count, groups):
    """Rows of calib.pt, about as many of every time group: noise x_0, and x_t drawn from it."""
    diffusion = dit.Diffusion(STEPS)
    group = torch.arange(groups).repeat_interleave(-(-count // groups))
    t = ((group + torch.rand(len(group))) * STEPS / groups).long().clamp(max=STEPS - 1)
    x_0 = torch.randn(len(t), config["in_channels"], *[config["input_size"]] * 2)
    y = torch.randint(config["num_classes"] + 1, (len(t),))
    x = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return dict(trajectory=group, t=t, group=q.time_group(t, STEPS, groups), y=y, x=x, x_0=x_0)


def write_run(run, config, args, rows):
    """RUN/dit.pt and RUN/calib.pt as 01 writes them."""
    torch.manual_seed(0)
    run.mkdir(parents=True, exist_ok=True)
    ckpt, defaults = run / "dit.pt", dict(input_size=32, in_channels=4, num_classes=1000)
    config = defaults | dict(mlp_ratio=4.0, learn_sigma=True) | config
    torch.save(lively(config, "cpu").state_dict(), ckpt)
    knobs = dict(steps=STEPS, groups=args.groups, per_group=rows // args.groups, seed=0)
    knobs |= dict(trajectories=64, cfg_scale=1.5, cfg_channels=3, vae="mse")
    knobs |= dict(ckpt=str(ckpt), config=config)
    inputs = {"checkpoint": dit.sha256_of(ckpt)}
    head = dit.header("calib", knobs, inputs, torch.device("cpu"))
    parts = dict(calibration=rows, validation=args.groups)
    parts = {k: random_rows(config, n, args.groups) for k, n in parts.items()}
    dit.save_artifact(run / "calib.pt", head | parts)


def run_phase(name, *flags, launcher=()):
    """A numbered script as a process: seconds, peak MiB of memory, what it printed."""
    command = [sys.executable, *launcher, ROOT / f"{name}.py", *map(str, flags)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise dit.InputError(f"{name}.py failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024, text
