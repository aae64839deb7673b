"""The README's commands, 01 to 05, on DiT-XL/2 and the SD-VAE of full size, with random weights.

A server on this machine stands for the public ones ($TQ_DIT_MIRROR): 01 and 04 download the files
as they would the real ones, which they are but for the numbers in them. 05 is given Inception's
file, random too, as its download is checked; the reference holds noise. T, G, n and R are the
smallest there are. Scores of such a run mean nothing. Killed, the same command continues.

Times are CPU times over that of a forward pass of one image (forward_pass.py), and wall seconds.

    nice python benchmarks/full_size.py --out docs/speed.md       # 8 GB in runs/full_size
    python benchmarks/full_size.py --model DiT-S/8
"""

import argparse
import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from jobs import Job
from memory import CPU, DEFAULTS, in_new_process
from page import publish, table
from processes import machine, timed
from random_run import lively

from common.artifacts import atomic_write
from common.checkpoints import DIT_URL, MIRROR, load_calib
from common.cli import run_script
from common.errors import InputError
from common.inception import INCEPTION, SPATIAL_CHANNELS, Inception
from common.trajectories import HELD_OUT
from common.vae import MidBlock, ResnetBlock, Upsampler, VAEDecoder, group_norm
from models_dit import DiT_models

CHECKPOINT, VAE = DIT_URL.format(256).rpartition("/")[2], "sd-vae-ft-mse.bin"
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
INTRODUCTION = """## All five scripts at full size

Random weights under the names and in the shapes of the public files, which 01 and 04 download from
a server on the same machine (`TQ_DIT_MIRROR` gives its address). 05 gets Inception by its flag, for
the sha256 of its download is checked, and a reference of four images of noise. The smallest T, G,
n, R: that all runs is the result, its scores mean nothing. A pass is the network on one image; how
many there are is told where a script does little else. A script's CPU time holds its start, reading
files and their sha256. Wall seconds are those of a machine with other work.
"""

# ------------------------------------------------------------------------------------------------
# The public files, with random numbers in them


def autoencoder():
    """The SD-VAE: names and shapes of diffusion_pytorch_model.bin, 83,653,863 parameters."""
    vae, widths = VAEDecoder(), (128, 256, 512, 512)
    vae.quant_conv, vae.encoder = nn.Conv2d(8, 8, 1), nn.Module()
    vae.encoder.conv_in = nn.Conv2d(3, widths[0], 3)
    vae.encoder.down_blocks = nn.ModuleList()
    for i, (inputs, outputs) in enumerate(pairwise([widths[0], *widths])):
        block, last = nn.Module(), i == len(widths) - 1
        block.resnets = nn.ModuleList([ResnetBlock(inputs, outputs), ResnetBlock(outputs, outputs)])
        block.downsamplers = nn.ModuleList([] if last else [Upsampler(outputs)])  # the same conv
        vae.encoder.down_blocks.append(block)
    vae.encoder.mid_block = MidBlock(widths[-1])
    vae.encoder.conv_norm_out = group_norm(widths[-1])
    vae.encoder.conv_out = nn.Conv2d(widths[-1], 8, 3)
    return dict(map(old_name, vae.state_dict().items()))


def old_name(item):
    """A parameter under the name that the public file has for it."""
    name, value = item
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        name = name.replace(f".{new}.", f".{old}.")
    return name.replace(".to_out.0.", ".proj_attn."), value


def reference(size):
    """What ADM's file holds: images, of which it has 10,000, and statistics of their features."""
    rng = np.random.default_rng(0)
    images, spatial = rng.integers(256, size=(4, size, size, 3), dtype=np.uint8), 17 * 17
    arrays = dict(arr_0=images)
    for key, width in ("", 2048), ("_s", spatial * SPATIAL_CHANNELS):
        arrays |= {f"mu{key}": rng.random(width), f"sigma{key}": np.eye(width)}
    return arrays


def write_files(folder, config):
    """All four files, each unless it is there."""
    torch.manual_seed(0)
    tensors = {
        CHECKPOINT: lambda: lively(config, CPU).state_dict(),
        VAE: autoencoder,
        INCEPTION: lambda: Inception().state_dict(),
    }
    for name, make in tensors.items():
        if not (folder / name).exists():
            with atomic_write(folder / name) as file:
                torch.save(make(), file)
    if not (folder / REFERENCE).exists():
        with atomic_write(folder / REFERENCE) as file:
            np.savez(file, **reference(8 * config["input_size"]))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def serving(folder):
    """The address of a server of this folder's files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


# ------------------------------------------------------------------------------------------------
# The commands


class Phase(NamedTuple):
    """A command of the README; how often the network sees an image in it, where that is all that
    it does; the files that it writes."""

    command: str
    passes: int | None
    files: str

    @property
    def name(self):
        return self.command.split(".")[0].rpartition("/")[2] + " --fp" * ("--fp" in self.command)


UNIT = Phase("benchmarks/forward_pass.py", None, "")
T, IMAGES = 2, 2
SAMPLE = f"04_sample.py --num-images {IMAGES}"
PHASES = [
    Phase(
        f"01_collect_calib.py --steps {T} --groups 2 --per-group 1 --trajectories 1",
        (1 + HELD_OUT) * T * 2,  # trajectories; guidance doubles
        "calib.pt",
    ),
    Phase("02_grad_cache.py", None, "grads/*.pt"),
    Phase("03_quantize.py --wbits 8 --abits 8 --rounds 1", None, "quant_w8a8.pt"),
    Phase(f"{SAMPLE} --fp", IMAGES * T * 2, "samples_fp.*"),
    Phase(f"{SAMPLE} --wbits 8 --abits 8", IMAGES * T * 2, "samples_w8a8.*"),
    Phase(f"05_eval_fid.py --reference {REFERENCE} --inception {INCEPTION}", None, "metrics.json"),
]


def perform(phase, folder, mirror):
    """Run it, unless that is done; what it took, as kept in a file beside its log."""
    files = {name: folder / "files" / name for name in (REFERENCE, INCEPTION)}
    words = [str(files.get(word, word)) for word in phase.command.split()]
    job = Job(folder / "run", phase.name, [*words, "--run", str(folder / "run")], None)
    if not job.is_done():
        started = job.path("log").exists()
        job.path("log").parent.mkdir(parents=True, exist_ok=True)
        environment = {MIRROR: mirror, "XDG_CACHE_HOME": str(folder / "cache"), "no_proxy": "*"}
        with open(job.path("log"), "wb") as log:
            used = timed(job.command, log, **environment)
        if used.status:
            raise InputError(f"{phase.command} failed: see {job.path('log')}")
        with atomic_write(job.path("json")) as file:
            found = used._asdict() | dict(command=" ".join(job.command), resumed=started)
            file.write(json.dumps(found).encode())
    return json.loads(job.path("json").read_text())


def mib(folder, pattern):
    return sum(file.stat().st_size for file in folder.glob(pattern)) / 2**20


# ------------------------------------------------------------------------------------------------
# The table

HEADER = ["command", "network's passes", "CPU time / a pass", "wall, s", "peak, MiB", "writes, MiB"]


def line(phase, folder, used, unit):
    """A row of HEADER; `unit` are the CPU seconds of a pass."""
    again = ", resumed" if used["resumed"] else ""
    writes = f"`{phase.files}` {mib(folder / 'run', phase.files):.1f}"
    passes, seconds = str(phase.passes or ""), f"{used['seconds']:.0f}{again}"
    cells = passes, f"{used['cpu_seconds'] / unit:.0f}", seconds, f"{used['peak_mib']:.0f}"
    return [f"`{phase.command}`", *cells, writes]


def perform_all(folder):
    """Rows of the table."""
    found = {}
    with serving(folder / "files") as mirror:
        for phase in [*PHASES[:1], UNIT, *PHASES[1:]]:
            found[phase] = used = perform(phase, folder, mirror)
            print(f"{phase.name}: {used['seconds']:.0f} s, peak {used['peak_mib']:.0f} MiB")
    rows = len(load_calib(folder / "run")["calibration"]["t"])
    unit = float((folder / "run" / "jobs" / f"{UNIT.name}.log").read_text().split()[-1]) / rows
    return [line(phase, folder, found[phase], unit) for phase in PHASES]


def main(args):
    config = DEFAULTS | DiT_models[args.model]
    config |= {"depth": args.depth or config["depth"], "input_size": args.input_size}
    shape = f"{args.model.replace('/', '-')}_{config['depth']}_{args.input_size}"
    folder = args.runs / shape
    (folder / "files").mkdir(parents=True, exist_ok=True)
    in_new_process(write_files, folder / "files", config)
    rows = table(HEADER, perform_all(folder.resolve()))
    sizes = [f"{name} {mib(folder / 'files', name):.0f} MiB" for name in (CHECKPOINT, VAE)]
    what = f"{args.model}, {config['depth']} blocks, x of {args.input_size} x {args.input_size}"
    text = f"{what}. {machine(CPU)}. Downloads: {', '.join(sizes)}.\n\n{rows}"
    publish(args.out, "full size", INTRODUCTION, text)


def parse_args():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = sorted(set(DiT_models) - {"DiT-Demo/4"})
    p.add_argument("--model", choices=models, default="DiT-XL/2")
    p.add_argument("--depth", type=int, help="blocks, if not all")
    p.add_argument("--input-size", type=int, default=32, help="of x, 32 for 256 px")
    p.add_argument("--runs", type=Path, default=Path("runs/full_size"), help="where there is space")
    p.add_argument("--out", type=Path, help="the page that gets a section")
    return p.parse_args()


if __name__ == "__main__":
    run_script(main, parse_args)
