"""Run a script on a simulated CUDA device: `fake_cuda.py SCRIPT FLAGS --device cuda`.

Its tensors hold ordinary ones, on which the CPU does their work, so results are the CPU's, and what
goes wrong only on a GPU is seen without one: an operation on tensors of both devices fails, as do
shapes that `_int_mm` does not take there, and a copy on another stream arrives as late as it may,
when that stream is waited for. Memory is counted as CUDA's allocator counts it, so
`max_memory_allocated` tells what a GPU would need, but for what its own kernels use. At the end a
line says how often the host read from the device, and so waited for it, or copied to it from memory
that is not pinned.

Needs a C++ compiler and a torch without CUDA. torch.compile and autocast are not simulated.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import runpy
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from pathlib import Path


def load_device():
    """The device as torch's C++ side sees it, which must be there before torch is."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    headers = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    with tempfile.TemporaryDirectory() as folder:
        library, source = f"{folder}/fake_cuda.so", Path(__file__).with_suffix(".cpp")
        compiler = ["g++", "-std=c++20", "-shared", "-fPIC", *headers, source, "-o", library]
        subprocess.run([*compiler, f"-L{torch}/lib", "-ltorch_cpu", "-lc10"], check=True)
        for needed in (f"{torch}/lib/libc10.so", f"{torch}/lib/libtorch_cpu.so", library):
            ctypes.CDLL(needed, ctypes.RTLD_GLOBAL)


load_device()
import torch  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by host tensors
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default}
BLOCK = 512  # bytes that CUDA's allocator rounds up to


class Memory:
    """Bytes of the device in use, by the storage of the host tensors that hold it."""

    def __init__(self):
        self.users, self.now, self.peak = Counter(), 0, 0

    def hold(self, host):
        storage = host.untyped_storage()
        key, size = storage.data_ptr(), -(-storage.nbytes() // BLOCK) * BLOCK
        self.users[key] += 1
        if self.users[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(host, self.release, key, size)

    def release(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size


class Stream:
    """The default one does things at once; copies on another wait until it is waited for."""

    def __init__(self, *_):
        self.pending = []

    def wait_stream(self, other):
        for target, source in other.pending:
            target.copy_(source)
        other.pending.clear()


MEMORY, EVENTS, PINNED, DEFAULT = Memory(), Counter(), {}, Stream()
current = [DEFAULT]  # the last is


@contextlib.contextmanager
def stream(chosen):
    current.append(chosen)
    yield
    current.pop()


class OnDevice(torch.Tensor):
    """Says that it is on cuda:0; `host` is where its values are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=torch.device("cuda", 0),
        )  # fmt: skip
        self.host = host
        MEMORY.hold(host)
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __repr__(self, **_):
        return f"OnDevice({self.host})"

    def tolist(self):
        EVENTS["reads"] += 1
        return self.host.tolist()


class Mode(TorchDispatchMode):
    """Sees what begins without a tensor of the device: new ones, and copies to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def pin_down(tensor):
    storage = tensor.untyped_storage()
    PINNED[storage.data_ptr()] = StorageWeakRef(storage)


def pinned(tensor):
    held = PINNED.get(tensor.untyped_storage().data_ptr())
    return held is not None and not held.expired()


def dispatch(function, args, kwargs):
    """One operation: checked, counted, done on the host, its result where CUDA would have it."""
    tensors = [x for x in leaves((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, OnDevice)]
    to_device, kwargs = bool(on_device), dict(kwargs)
    if kwargs.get("device") is not None:
        to_device = kwargs["device"].type == "cuda"
        kwargs["device"] = torch.device("cpu") if to_device else kwargs["device"]
    pin = kwargs.pop("pin_memory", False)
    if function is aten._pin_memory.default:
        function, args, kwargs, pin = aten.clone.default, args[:1], {}, True
    if function is aten.is_pinned.default:
        return pinned(args[0])
    if function in COPIES:
        if copy_is_late(function, args, kwargs, to_device):
            return args[0]
    else:
        check(function, args, tensors, on_device)
    with _disable_current_modes():
        out = function(*change(args, to_host), **{k: to_host(x) for k, x in kwargs.items()})
        if torch.Tag.inplace_view in function.tags and on_device:
            with no_dispatch():
                function(*args, **kwargs)  # the shape that the tensor says it has, too
        if to_device != bool(on_device) and any(out is x for x in tensors):
            out = out.clone()
    if pin:
        pin_down(out)
    known = {id(x.host): x for x in on_device} | {id(x): x for x in tensors}
    return change(out, lambda x: place(x, known, to_device))


def leaves(x):
    """What a nest of lists and tuples holds."""
    for item in x:
        yield from leaves(item) if isinstance(item, list | tuple) else [item]


def change(x, function):
    """A nest of lists and tuples with each of its items changed."""
    return type(x)(change(i, function) for i in x) if isinstance(x, list | tuple) else function(x)


def to_host(x):
    return x.host if isinstance(x, OnDevice) else x


def place(x, known, to_device):
    """A result: the argument it is, if it is one, or a new tensor."""
    if not isinstance(x, torch.Tensor) or id(x) in known:
        return known.get(id(x), x)
    return OnDevice(x) if to_device else x


def check(function, args, tensors, on_device):
    """Raise what CUDA would raise; count what makes the host wait."""
    for x in tensors if on_device and function not in INDEXED else ():
        if not isinstance(x, OnDevice) and x.ndim:
            raise RuntimeError(f"{function}: tensors on both devices")
    if function in READS and on_device:
        EVENTS["reads"] += 1
    if function is aten._int_mm.default and on_device:
        (rows, inner), (_, columns) = (x.shape for x in args)
        if rows <= 16 or inner % 8 or columns % 8:
            raise RuntimeError(f"_int_mm on CUDA does not take {rows} x {inner} x {columns}")


def copy_is_late(function, args, kwargs, to_device):
    """Count a copy between the devices; True if it is on another stream, and left to it."""
    target, source = args[:2] if function is aten.copy_.default else (None, args[0])
    if target is not None:
        to_device = isinstance(target, OnDevice)
    if isinstance(source, OnDevice) and not to_device:
        EVENTS["reads"] += 1
    if isinstance(source, OnDevice) or not to_device or not source.ndim:
        return False
    free = kwargs.get("non_blocking") or target is not None and len(args) > 2 and args[2]
    EVENTS["copies from pageable memory"] += not (free and pinned(source))
    late = target is not None and current[-1] is not DEFAULT
    if late:
        current[-1].pending.append((target.host, source))
    return late


def set_data(tensor, value, plain=torch._C.TensorBase.data):
    """`tensor.data = value`, where torch itself would not turn one kind into the other."""
    if isinstance(tensor, OnDevice) == isinstance(value, OnDevice):
        return plain.__set__(tensor, value)
    value = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)


def install():
    """From here on torch has one CUDA device."""
    fakes = dict(is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0)
    fakes |= dict(get_device_name=lambda *_: "simulated", get_device_capability=lambda *_: (9, 0))
    fakes |= dict(_lazy_init=lambda: None, synchronize=lambda *_: None, stream=stream)
    fakes |= dict(current_stream=lambda *_: DEFAULT, Stream=Stream)
    fakes |= dict(max_memory_allocated=lambda *_: MEMORY.peak)
    for name, value in fakes.items():
        setattr(torch.cuda, name, value)
    plain = torch._C.TensorBase.data
    torch.Tensor.data = property(plain.__get__, set_data)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") too
    mode = Mode()
    mode.__enter__()
    atexit.register(mode.__exit__, None, None, None)


def report():
    counts = ", ".join(f"{EVENTS[key]} {key}" for key in ("reads", "copies from pageable memory"))
    print(
        f"simulated CUDA device: {counts}, {MEMORY.now} bytes left, {MEMORY.peak} bytes at the peak"
    )


if __name__ == "__main__":
    install()
    atexit.register(report)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
