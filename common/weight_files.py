"""Files of weights as people have them: folders of diffusers, `.bin` and `.pt`, safetensors."""

import json
import struct
from pathlib import Path

import torch

from common.artifacts import atomic_write, load_tensors
from common.errors import InputError, reading

NAMES = [
    f"diffusion_pytorch_model{variant}.{ending}"
    for variant in ("", ".fp16")
    for ending in ("safetensors", "bin")
]
WRAPPERS = "ema", "state_dict"  # of DiT's train.py, and of the first Stable Diffusion
MAX_CONFIG = 2**20  # bytes
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}  # of those we write


def find_weights(path, subfolder):
    """The file that `path` names: itself, or the weights in a diffusers folder or pipeline."""
    with reading(path):
        if not Path(path).is_dir():
            return path
        found = [folder / name for folder in (Path(path) / subfolder, Path(path)) for name in NAMES]
        found = [file for file in found if file.is_file()]
    if not found:
        raise InputError(f"{path}: neither it nor its {subfolder}/ holds {NAMES[0]} or {NAMES[1]}")
    return str(found[0])


def load_weights(path, what, allowed=()):
    """A file's tensors by name, without what such files are wrapped in."""
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path, what)[0]
    state = load_tensors(path, what, allowed)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return without_prefix(state, "module.")  # of DistributedDataParallel


def without_prefix(state, prefix):
    """The same entries, less this prefix if all names have it."""
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if named and all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def config_beside(path):
    """The config.json that diffusers keeps beside its weights, as a dict; {} if there is none."""
    path = Path(path).parent / "config.json"
    with reading(path):
        return read_json(path.read_bytes()) if path.is_file() else {}


def read_json(text):
    """A JSON object as a dict; ValueError if it is anything else, or is larger than any of ours."""
    if len(text) > MAX_CONFIG:
        raise ValueError(f"{len(text)} bytes of JSON")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, not an object")
    return found


# ------------------------------------------------------------------------------------------------
# safetensors


def safetensors_library():
    """The package, which only these files need; InputError says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError("safetensors files need a package: pip install safetensors") from error
    return safetensors


def load_safetensors(path, what):
    """(tensors by name, metadata) of a file. The library checks the header against the file's size
    before it reads a tensor: sizes, offsets, dtypes."""
    library = safetensors_library()
    with reading(path):
        if not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "no such file"
            raise InputError(f"{path}: {found} ({what})")
        try:
            with library.safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except library.SafetensorError as error:
            fault = f"{path} is damaged ({what}): {str(error)[:200]}; make or download it again"
            raise InputError(fault) from error


def save_safetensors(path, tensors, **metadata):
    """Write such a file, the same bytes each time: the library would shuffle the metadata, and
    refuses tensors that share memory."""
    tensors = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # all aligned
    header, end = dict(__metadata__=metadata | dict(format="pt")), 0
    for name, x in tensors:
        start, end = end, end + x.nbytes
        shape = list(x.shape)
        header[name] = dict(dtype=DTYPES[x.dtype], shape=shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, x in tensors:
            file.write(x.contiguous().reshape(-1).view(torch.uint8).numpy())
