"""Folders that one run at a time holds. The kernel keeps track: a killed run holds nothing."""

import fcntl
import os
from contextlib import suppress

TRIES = 100


def take(folder, wait=False):
    """An open handle, which holds this folder until it is closed or the process ends; None if
    another run holds it and we do not `wait`. On a file system without locks it holds nothing.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass
    return handle


def make(folder):
    """The folder made, if it is not there, and taken; again if another run removes it just then.
    OSError if it cannot be made."""
    for _ in range(TRIES):
        with suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = take(folder)
            if handle is None or is_at(handle, folder):
                return handle
            os.close(handle)
    folder.mkdir(parents=True, exist_ok=True)
    return take(folder)


def is_at(handle, folder):
    """Whether the folder that is open is still the one at this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(folder))


def is_held(folder):
    """Whether a run holds it; no if it is gone."""
    with suppress(FileNotFoundError):
        handle = take(folder)
        if handle is None:
            return True
        os.close(handle)
    return False
