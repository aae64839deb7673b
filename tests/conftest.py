"""What the tests share: a way to run the scripts, a tiny lively DiT, and one finished run of it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models_dit import Diffusion, DiT  # noqa: E402

STAND_IN = ROOT / "tests" / "stand_in_cuda.py"  # a launcher: a CUDA device that the CPU plays
needs_stand_in = pytest.mark.skipif(
    torch.version.cuda is not None or not shutil.which("g++"),
    reason="needs a torch without CUDA and a C++ compiler",
)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # the same tests on every machine
    "GIT_DIR": os.devnull,  # artifacts name the commit; a commit amid the tests changes no bytes
}
BATCH = {"01": "5", "02": "4", "03": "4", "04": "2"}  # several pieces of work in each phase
FLAGS = {  # of the tiny run, by script; --run and 01's --ckpt come on top
    "01_collect_calib": "--steps 6 --groups 3 --per-group 4 --trajectories 6 --vae none "
    "--num-heads 4",
    "02_grad_cache": "",
    "03_quantize": "--wbits 6 --abits 6 --memory-limit 0.02",
    "04_sample": "--wbits 6 --abits 6 --num-images 6",
}


def run_script(name, *args, cwd=ROOT, env=None, launcher=()):
    """Run the numbered script `name` in a process of its own; returns the CompletedProcess."""
    command = [sys.executable, *launcher, str(ROOT / f"{name}.py"), *map(str, args)]
    environment = os.environ | ENVIRONMENT | (env or {})
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def load_script(name):
    """A numbered script as a module, which `import` cannot name."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_flags(name, run, ckpt):
    """The command line of the tiny run for one script."""
    only_01 = ["--ckpt", str(ckpt)] if name.startswith("01") else []
    return ["--run", str(run), "--batch-size", BATCH[name[:2]], *only_01, *FLAGS[name].split()]


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory):
    """A DiT of 3 x 8 x 8 images, no layer zero, trained for seconds: its samples stay in range."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    diffusion = Diffusion(1000)
    model = DiT(8, 2, 3, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if "x_embedder" in name else 0.1)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(300):
        x_0, eps = 0.4 * torch.randn(32, 3, 1, 1), torch.randn(32, 3, 8, 8)  # one color an image
        t, y = torch.randint(1000, (32,)), torch.randint(6, (32,))
        optimizer.zero_grad()
        eps_theta = model(diffusion.q_sample(x_0, t, eps), t, y)[:, :3]
        torch.nn.functional.mse_loss(eps_theta, eps).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("tiny") / "dit.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_ckpt):
    """The folder of a finished run, 01 to 04 at W6A6, 04 --fp. Tests that change it copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    logs = {name: run_script(name, *tiny_flags(name, run, tiny_ckpt)) for name in FLAGS}
    fp = ["--run", run, "--fp", "--num-images", 6, "--batch-size", BATCH["04"]]
    logs["04_sample --fp"] = run_script("04_sample", *fp)
    for name, log in logs.items():
        assert log.returncode == 0, f"{name}: {log.stderr}"
        (run.parent / f"{name}.log").write_text(log.stdout)
    return run
