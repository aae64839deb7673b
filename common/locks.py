"""Folders that one run at a time holds. The kernel keeps track: a killed run holds nothing."""

import fcntl
import os


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
