"""The command line of every script: flags, devices, and how a script fails."""

import argparse
import os
import re
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import InputError, memory_errors


class Parser(argparse.ArgumentParser):
    """Shows the script's docstring and every default; a wrong flag is one line, exit status 2.

    Flags stand in three groups: `paper`, the knobs that the paper names, with its values; `ours`,
    choices where the paper is silent; `machine`, which must not change a result.
    """

    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Help)
        self.paper = self.add_argument_group("paper (inputs, and what the method's paper decides)")
        self.ours = self.add_argument_group("ours (where the paper is silent: D1.. in README.md)")
        self.machine = self.add_argument_group("machine (must not change results)")
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.machine.add_argument("--run", type=Path, default=Path("runs/demo"), help="its folder")
        self.machine.add_argument("--device", default=default, help="cpu, cuda or cuda:N")
        self.machine.add_argument("--force", action="store_true", help="replace what is there")
        self.machine.add_argument("--traceback", action="store_true", help="show where it failed")

    def add_unit_flags(self):
        """The machine flags of every Phase 3."""
        add, limit = self.machine.add_argument, "MiB a search may take, weights apart: 512, CPU 12"
        add("--batch-size", type=whole_number, default=8, help="rows of a unit's own passes")
        add("--memory-limit", type=float, help=limit)

    def add_method_flags(self, tag, own):
        """The flags that the rivals in methods/ share; `own` tells which layers are a method's own
        choice."""
        paper, ours = self.paper.add_argument, self.ours.add_argument
        paper("--wbits", type=whole_number, required=True, help="k of weights, 2..8")
        paper("--abits", type=whole_number, required=True, help="k of activations, 2..8")
        layers = f"own: {own}; released: those of 03_quantize.py (D6)"
        ours("--layers", choices=("own", "released"), default="own", help=layers)
        ours("--rows", type=whole_number, help="calibrate on about so many, spread over t")
        ours("--tag", default=tag, help="names the file quant_wXaY_TAG.pt")
        self.add_unit_flags()

    def add_search_flags(self):
        """The machine flags of a Phase 3 that searches by Eq. (16)."""
        add = self.machine.add_argument
        add("--search", choices=("fast", "plain"), default="fast", help="the same, but for ties")
        self.add_unit_flags()
        add("--compile", action="store_true", help="fuse passes; meant for CUDA")

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        parsed.device = pick_device(parsed.device)
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help explains the flags\n")


def whole_number(text):
    """An int that 64 bits hold; the type of every whole-numbered flag."""
    number = int(text)
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is beyond 64 bits")
    return number


def run_script(main, parse_args):
    """Run a phase. Bad input becomes one line on stderr and exit status 2, never a traceback.

    TF32 is off from here on: the same seed gives the same result.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    script = Path(sys.argv[0]).name
    try:
        with memory_errors():
            main(parse_args())
    except InputError as error:
        sys.exit(_fail(script, error))
    except torch.OutOfMemoryError:
        sys.exit(_fail(script, "out of GPU memory: smaller --batch-size, --memory-limit?"))
    except MemoryError as error:
        sys.exit(_fail(script, f"out of memory ({error}): smaller --batch-size?"))
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().splitlines()[0]
        sys.exit(_fail(script, f"--compile: {reason}; without it the same, slower"))
    except KeyboardInterrupt:
        who = "stopped, as another process was" if dist.is_initialized() else "interrupted"
        sys.exit(_fail(script, f"{who}; the same command again continues", status=130))


def _fail(script, message, status=2):
    """One line on stderr, with --traceback where it was raised before that; returns the status."""
    if "--traceback" in sys.argv:
        traceback.print_exc()
    if dist.is_initialized():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, now that this process ends
        script = f"\n{script} (rank {dist.get_rank()} of {dist.get_world_size()})"  # off the bar
    sys.stderr.write(f"{script}: {' '.join(str(message).split())}\n")  # at once: no line is torn
    return status


def number_or_none(text):
    """A flag's whole number, or None for `none`."""
    return None if text == "none" else whole_number(text)


def pick_device(name):
    """`cpu`, `cuda` (under torchrun the one of this process) or `cuda:N` as a torch.device."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise InputError(f"--device {name}: use cpu, cuda or cuda:N")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no CUDA device is available; use --device cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()}")
    return device


def settings_of(Settings, args):
    """This NamedTuple of what decides a result, as the flags have it."""
    return Settings(**{key: getattr(args, key) for key in Settings._fields})


def at_least(least, args, *flags):
    """InputError unless each of these flags, if given, is that or more."""
    for flag in flags:
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least {least}")


def check_bits(args, *flags):
    """InputError unless each of these flags is there and 2..8."""
    for flag in flags:
        name, bits = f"--{flag.replace('_', '-')}", getattr(args, flag)
        if bits is None:
            raise InputError(f"{name} is required: a bit width of 2..8")
        if not 2 <= bits <= 8:
            raise InputError(f"{name} {bits}: must be 2..8")


def check_unit_flags(args):
    """InputError unless the flags of `Parser.add_unit_flags`, or `add_search_flags`, make sense."""
    at_least(1, args, "batch_size")
    if getattr(args, "search", "fast") == "plain" and args.compile:
        raise InputError("--compile is for --search fast")
    limit = args.memory_limit
    if limit is not None and not 0 < limit < 1e12:
        raise InputError(f"--memory-limit {limit}: not above 0, not finite or too large")


def check_method_flags(args):
    """InputError unless the flags of `Parser.add_method_flags` make sense."""
    check_bits(args, "wbits", "abits")
    check_tag(args)
    at_least(1, args, "rows")
    check_unit_flags(args)


def check_tag(args):
    """InputError unless the tag can be part of a file's name."""
    if not re.fullmatch(r"[\w.+-]{0,100}", args.tag):
        raise InputError(f"--tag {args.tag!r}: use letters, digits and . _ + -, 100 at most")


def model_name(args):
    """`fp`, or `wXaY` with its tag: the part of a file's name that says which model."""
    if getattr(args, "fp", False):
        return "fp"
    return f"w{args.wbits}a{args.abits}" + (f"_{args.tag}" if args.tag else "")
