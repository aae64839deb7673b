"""Finished pieces of a long job, kept until the whole is written, so that a killed run resumes."""

import hashlib
import json
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

import torch

from common.artifacts import atomic_write, cannot_write, load_tensors
from common.errors import InputError
from common.locks import is_held, make, take
from common.source import source_digest


class Parts:
    """The pieces of the file, or folder, at `path`, in a hidden folder beside it.

    The folder's name carries a hash of the settings, of `cut`, how the job is cut up, and of the
    source: pieces of another run, or made before an edit, are never mixed in.
    """

    def __init__(self, path, head, cut=None):
        key = [head["settings"], head["inputs"], cut, source_digest()]
        key = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.whole, self.release = Path(path), None
        self.folder = self.whole.parent / f".{self.whole.name}.{digest}"

    def path(self, name):
        return self.folder / f"{name}.pt"

    def has(self, name):
        return self.path(name).exists()

    def save(self, name, payload):
        with atomic_write(self.path(name)) as file:
            torch.save(payload, file)

    def load(self, name):
        return load_tensors(self.path(name), "a kept part of this run; delete its folder")

    def remove(self, name):
        self.path(name).unlink(missing_ok=True)

    def claim(self):
        """From here on, until they are cleared or this process ends, other runs leave these pieces
        alone, and none may make the same whole; InputError if one is at it, with these settings or
        others."""
        if self.release:
            return
        try:
            handle = make(self.folder)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        if handle is None or any(is_held(x) for x in self.folders() if x != self.folder):
            if handle is not None:
                give_back(handle, self.folder)
            raise InputError(f"another run is making {self.whole}: let it finish, or stop it")
        self.release = weakref.finalize(self, give_back, handle, self.folder)

    def clear(self, others_only=False):
        """Remove the pieces of the whole, now written, and those of runs given up before, but not
        those of a run that is at work."""
        if self.release and not others_only:
            self.release()
            self.release = None
        for folder in self.folders():
            if not (others_only and folder == self.folder):
                remove_unless_held(folder)

    def folders(self):
        """Those of all runs that make, or have made, the same whole."""
        return sorted(self.whole.parent.glob(f".{self.whole.name}.*"))


def remove_unless_held(folder):
    """Remove a folder of parts that no run holds; another process may be at it too."""
    with suppress(OSError):
        handle = take(folder)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def give_back(handle, folder):
    """Hold this folder no more; it goes if nothing is in it."""
    with suppress(OSError):
        folder.rmdir()
    os.close(handle)
