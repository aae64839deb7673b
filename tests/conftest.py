"""What the tests share: two ways to run a script, a tiny lively DiT, and one finished run of it."""

import contextlib
import functools
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GIT_DIR": os.devnull,  # artifacts name the commit; a commit amid the tests changes no bytes
}
os.environ |= ENVIRONMENT  # before torch, which reads the number of threads once

import numpy as np  # noqa: E402
import torch  # noqa: E402

import quant_ops as q  # noqa: E402
from common import cli  # noqa: E402
from common.layer_data import LayerData, LinearChunk  # noqa: E402
from common.phase3 import Layer  # noqa: E402
from common.quant_file import load_quant  # noqa: E402
from engine.int_products import int_mm_is_exact  # noqa: E402
from models_dit import Diffusion, DiT, LayerSpec  # noqa: E402

FAKE_CUDA = ROOT / "tests" / "fake_cuda" / "fake_cuda.py"  # a launcher: a simulated CUDA device
needs_fake_cuda = pytest.mark.skipif(
    torch.version.cuda is not None or not shutil.which("g++"),
    reason="needs a torch without CUDA and a C++ compiler",
)
BATCH = {"01": "5", "02": "4", "03": "4", "04": "2"}  # several pieces of work in each phase
FLAGS = {  # of the tiny run, by script; --run and 01's --ckpt come on top
    "01_collect_calib": "--steps 6 --groups 3 --per-group 4 --trajectories 6 --vae none "
    "--num-heads 4",
    "02_grad_cache": "",
    "03_quantize": "--wbits 6 --abits 6 --rounds 2 --memory-limit 0.02",
    "04_sample": "--wbits 6 --abits 6 --num-images 6",
}
LIVELY = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=3, num_classes=5
)


@functools.cache
def load_script(name):
    """A script, such as "03_quantize" or "methods/tqdit_plus", as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(monkeypatch, command):
    """What a script makes of its flags and has checked; `command` begins with its path."""
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    script = load_script(command[0].removesuffix(".py"))
    args = script.parse_args()
    getattr(script, "check", lambda _: None)(args)
    return args


def run_script(name, *args, cwd=ROOT, env=None, launcher=()):
    """Run a script in a process of its own, on the CPU; returns the CompletedProcess."""
    command = [sys.executable, *launcher, str(ROOT / f"{name}.py"), *map(str, args)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {})
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def run_in_process(name, *args):
    """`run_script` without a new process, which takes seconds: for all that needs none."""
    script, status, before = load_script(name), 0, sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"{name}.py", "--device", "cpu", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run_script(script.main, script.parse_args)
    except SystemExit as stop:
        status = stop.code
    finally:
        command, sys.argv = sys.argv, before
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


@pytest.fixture
def run_here():
    """run_here(name, *flags): a script inside this process; the CompletedProcess."""
    return run_in_process


def tiny_flags(name, run, ckpt):
    """The command line of the tiny run for one script."""
    only_01 = ["--ckpt", str(ckpt)] if name.startswith("01") else []
    return ["--run", str(run), "--batch-size", BATCH[name[:2]], *only_01, *FLAGS[name].split()]


def refused(result, words, status=2):
    """The contract for bad input: this status and one line on stderr, progress bars aside."""
    lines = [x for x in result.stderr.splitlines() if x.strip() and "%|" not in x]
    assert result.returncode == status and len(lines) == 1, result.stderr
    assert words in lines[0]


def snapshot(folder):
    """Every path under a folder, hidden ones too; of files, when they were written and what."""
    paths = sorted(folder.rglob("*"))
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else None for p in paths}


def leftovers(folder):
    """What no finished phase may leave behind: temporary files and folders of parts."""
    return [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name.startswith(".")]


def lively_dit(**changes):
    """A tiny DiT with random weights everywhere, so that no gate is zero."""
    torch.manual_seed(0)
    model = DiT(**LIVELY | changes).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.normal_(std=0.2)
    return model


# methods/tqdit_plus.py with nothing taken at run time, as the paper has it
STATIC = [
    *"--input-group none --no-dynamic-products --weight-group none --no-hadamard".split(),
    "--no-fit-last",
]


def wave(*shape):
    """Numbers that every machine makes alike, for results of other people's code. In float32 they
    would differ by 1e-4 between CPUs with AVX-512 and without."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(1, 1 + count).double() ** 1.3).float().view(shape)


def layer_of(module, **spec):
    """A Layer of a block, of this module; `spec` says what it is."""
    return Layer("blocks.0.mlp.fc2", module, LayerSpec("block", "mlp.fc2", **spec))


def linear_data(grad, out=None, x=None, group=None, rows=7):
    """The LayerData of a linear layer without bias, `rows` rows in a chunk; out and group are 0
    unless given."""
    out = torch.zeros_like(grad) if out is None else out
    group = torch.zeros(len(grad), dtype=torch.long) if group is None else group
    chunks = zip(*(column.split(rows) for column in (grad, out, x, group)), strict=True)
    num_groups = int(group.max()) + 1
    return LayerData([LinearChunk(*chunk) for chunk in chunks], torch.device("cpu"), num_groups)


def search_case(bits, gelu, by_group, shape=(24, 32), mean=0.0):
    """A layer, candidates of weight and input, their starts, and data of three groups."""
    torch.manual_seed(bits)
    W, x = torch.randn(shape) / 8 + mean, 2 * torch.randn(60, shape[1])
    group = torch.arange(60) // 20
    x = torch.nn.functional.gelu(x) if gelu else x
    data = linear_data(torch.randn(60, shape[0]), x @ W.T, x, group, rows=25)
    ends = x.aminmax() if not by_group else x.view(3, -1).aminmax(dim=1)
    Q_X, grids = (q.gelu_candidates if gelu else q.uniform_candidates)(*ends, bits)
    return W, q.uniform_candidates(*W.aminmax(dim=1, keepdim=True), bits), Q_X, grids, data


def alternate(search, case, gelu):
    """Alg. 1 lines 17-22 twice: Delta of weight and input."""
    W, (Q_W, weights), Q_X, grids, data = case
    for _ in range(2):
        Q_W = search(weights, data, q.WeightLoss(W, Q_X))
        for around in grids if gelu else [lambda _: grids]:
            Q_X = search(around(Q_X), data, q.InputLoss(W, Q_W))
    return [*Q_W.buffers(), *Q_X.buffers()]


def flat(nest):
    """The leaves of nested dicts, as tensors, text or None, by their path."""
    if not isinstance(nest, dict):
        return {"": nest if nest is None or isinstance(nest, str) else torch.as_tensor(nest)}
    return {f"{k}.{path}": x for k, value in nest.items() for path, x in flat(value).items()}


def same_leaves(a, b):
    """Whether two nests have the same leaves, bit for bit."""
    a, b = flat(a), flat(b)
    equal = (torch.equal(x, b[k]) if torch.is_tensor(x) else x == b[k] for k, x in a.items())
    return a.keys() == b.keys() and all(equal)


def same_images(found, expected, few_differ=False):
    """Whether images (N, H, W, C) agree within one of 255 levels. If `few_differ`, a minority
    need only be alike: 20 levels off on the average, where unrelated ones are 36 or more."""
    error = np.abs(found.astype(int) - expected.astype(int)).reshape(len(found), -1)
    if few_differ:
        return np.median(error.max(axis=1)) <= 1 and error.mean(axis=1).max() <= 20
    return error.max() <= 1


def trained_dit(**config):
    """A DiT, no layer zero, trained for seconds: its samples stay in range."""
    torch.manual_seed(0)
    diffusion, model = Diffusion(1000), DiT(**config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if "x_embedder" in name else 0.1)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    C, size = model.in_channels, model.input_size
    for _ in range(300):
        x_0, eps = 0.4 * torch.randn(32, C, 1, 1), torch.randn(32, C, size, size)  # of one color
        t, y = torch.randint(1000, (32,)), torch.randint(model.num_classes + 1, (32,))
        optimizer.zero_grad()
        eps_theta = model(diffusion.q_sample(x_0, t, eps), t, y)[:, :C]
        torch.nn.functional.mse_loss(eps_theta, eps).backward()
        optimizer.step()
    return model.eval()


def quant_file_of(script, run, *flags):
    """The quant file that a method writes, and what it prints; nothing is left over."""
    result = run_in_process(script, "--run", run, *flags)
    assert result.returncode == 0 and not leftovers(run), result.stderr
    return load_quant(re.search(r"wrote (\S+\.pt)", result.stdout)[1]), result.stdout


def linked(run, folder):
    """A new run with these calibration rows and gradients."""
    folder.mkdir()
    for name in ("calib.pt", "grads"):
        (folder / name).symlink_to(run / name)
    return folder


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run with a calib.pt alone, for methods without gradients; some files have their own."""
    shutil.copy(tiny_run / "calib.pt", tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_ckpt(tmp_path_factory):
    """Such a DiT of 3 x 8 x 8 images."""
    how = dict(input_size=8, patch_size=2, in_channels=3)
    model = trained_dit(**how, hidden_size=32, depth=2, num_heads=4, num_classes=5)
    path = tmp_path_factory.mktemp("tiny") / "dit.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_ckpt):
    """The folder of a finished run, 01 to 04 at W6A6, 04 --fp. Tests that change it copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    logs = {name: run_in_process(name, *tiny_flags(name, run, tiny_ckpt)) for name in FLAGS}
    fp = ["--run", run, "--fp", "--num-images", 6, "--batch-size", BATCH["04"]]
    logs["04_sample --fp"] = run_in_process("04_sample", *fp)
    for name, log in logs.items():
        assert log.returncode == 0, f"{name}: {log.stderr}"
        (run.parent / f"{name}.log").write_text(log.stdout)
    return run


@pytest.fixture(params=[True, False], ids=["triton", "int_mm"])
def triton(request):
    """Whose product it is."""
    if request.param:
        pytest.importorskip("triton")
    elif not torch.cuda.is_available() and not int_mm_is_exact():
        pytest.skip("oneDNN is told to do without VNNI, and saturates")
    return request.param
