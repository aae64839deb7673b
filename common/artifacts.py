"""The files that pass between the phases: what they say of themselves, which of them are accepted.

Every file is loaded with `weights_only=True`: a stranger's file runs no code. Every file is written
beside its place and renamed, so nothing is ever half written.
"""

import errno
import hashlib
import io
import os
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from common.errors import InputError, memory_errors, reading
from common.schemas import FORMAT, check_artifact
from common.source import git_commit


def sha256_of(path):
    """The file's sha256 in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _RawFile(io.FileIO):
    """Remembers why a write failed: what torch raises in its place has no errno."""

    failure = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def atomic_write(path):
    """A binary file to write, in `path`'s folder, which becomes `path` if all goes well.

    InputError if it cannot be written; `path` is then as it was.
    """
    path = Path(path)
    temporary, raw = path.with_name(path.name + ".tmp"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _RawFile(temporary, "w")
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = raw.failure if raw is not None and raw.failure else error
        if not isinstance(cause, OSError):
            raise
        raise cannot_write(path, cause) from error


def cannot_write(path, error):
    """The InputError that tells of this OSError."""
    advice = "; free some disk space and run again" if error.errno == errno.ENOSPC else ""
    return InputError(f"cannot write {path}: {error.strerror}{advice}")


def load_hashed(path, load):
    """(What `load` makes of a file, the file's sha256 before that): of a file replaced meanwhile
    it is the old one's, so what comes of it is never taken for the new one's."""
    digest = None
    with suppress(OSError):  # `load` tells
        digest = sha256_of(path)
    return load(path), digest


def load_tensors(path, what, allowed=()):
    """`torch.load` that runs no code: tensors and plain containers, and classes `allowed` only.

    InputError if the file is missing, cut off, or holds anything else.
    """
    path = Path(path)
    with reading(path):
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "no such file"
            raise InputError(f"{path}: {found} ({what})")
    try:
        with memory_errors(), torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror} ({what})") from error
    except Exception as error:  # a dozen kinds: of the file, of its zip, of the pickle in that
        broken = isinstance(error, RuntimeError | OSError | EOFError)
        refused = zipfile.is_zipfile(path) and not broken
        fault = "holds pickled objects, refused" if refused else "is damaged"
        raise InputError(f"{path} {fault} ({what}); make or download it again") from error


def provenance(kind, settings, inputs, device):
    """What every artifact says of itself. `inputs` maps a name to the sha256 it was made from."""
    return dict(
        kind=kind,
        format=FORMAT,
        settings=settings,
        inputs=inputs,
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        git=git_commit(),
    )


def load_artifact(path, kind, made_by, sizes=None):
    """An artifact of the given kind, checked; InputError says what is wrong and what to run.

    `sizes` are those that common/schemas.py knows of another file, which this one must agree with.
    """
    with reading(path):
        artifact = load_tensors(path, f"made by {made_by}")
        check_artifact(artifact, kind, path, made_by, sizes)
    return artifact


def save_artifact(path, artifact):
    """Write it, and return the sentence that says so."""
    with atomic_write(path) as file:
        torch.save(artifact, file)
    size = os.path.getsize(path) / 2**20
    return f"wrote {path}, {size:.2f} MiB, sha256 {sha256_of(path)[:12]}"


def is_up_to_date(path, head, force):
    """True if `path` holds this very result. InputError if it holds another, unless `force`, or if
    nothing can be written there."""
    check_place(path)
    if force or not Path(path).exists():
        return False
    old = load_artifact(path, head["kind"], "this script")
    return is_same_result(path, old, head)


def check_place(path):
    """InputError if there is a folder at `path`, or a file where its folder belongs, or if nothing
    can be written there."""
    path = Path(path)
    with reading(path):
        if path.is_dir():
            raise InputError(f"{path} is a folder, where a file belongs: move it away")
        above = next(folder for folder in path.parents if folder.exists())
        if not above.is_dir():
            raise InputError(f"{above} is a file, where a folder belongs: move it away")
        if not os.access(above, os.W_OK):
            raise InputError(f"cannot write {path}: no permission to write in {above}")


def is_same_result(path, old, head):
    """True, saying so, if both have the same settings and inputs; InputError names what differs."""
    for part in ("settings", "inputs"):
        for key in old[part].keys() | head[part].keys():
            was, now = old[part].get(key), head[part].get(key)
            if was != now:
                was, now = str(was)[:100], str(now)[:100]
                raise InputError(
                    f"{path} exists, made with {key} = {was}, not {now}; --force replaces it"
                )
    print(f"{path} is up to date")
    return True
