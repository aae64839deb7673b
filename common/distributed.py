"""One script in many processes: what torchrun starts, and how they share the work."""

import atexit
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

from common.errors import InputError
from common.locks import take


class ProcessGroup:
    """This process among those torchrun started: `rank` of `size`. Alone: 0 of 1.

    Rank 0 joins what all have made; it alone prints and shows a bar. If a process dies, the others
    stop: torchrun sends SIGTERM to those on its own node, the rest find out as they next meet.
    """

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def _meet(self, function, *args, **kwargs):
        """Call a function of torch.distributed; InputError if another process is gone."""
        try:
            if self.size > 1:
                function(*args, **kwargs)
        except RuntimeError as error:
            raise InputError("another process died; the same command again continues") from error

    def wait(self):
        """Until every process is here."""
        self._meet(dist.barrier)

    def agree(self, value):
        """Rank 0's value, in every process."""
        box = [value]
        self._meet(dist.broadcast_object_list, box)
        return box[0]

    @contextmanager
    def alone_in(self, folder):
        """Meanwhile no other run is at work in this folder; where one is, waits and says so."""
        handle = None
        if self.rank == 0:
            handle = take(folder)
            if handle is None:
                print(f"another run is at work in {folder}: waiting for it", flush=True)
                handle = take(folder, wait=True)
        try:
            self.wait()
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def share(self, parts, names):
        """This process's share of those `names` whose part is missing, even when a run resumes.
        InputError if another run is making the same."""
        if self.rank == 0:
            parts.claim()
        return self.agree([x for x in names if not parts.has(x)])[self.rank :: self.size]

    def bar(self, items=None, **kwargs):
        """A progress bar that counts for all processes as rank 0 goes; their shares are equal."""
        scale = self.size > 1 and self.size
        return tqdm(items, disable=self.rank > 0, unit_scale=scale, **kwargs)


def join_process_group():
    """The ProcessGroup that torchrun's environment describes, joined with the gloo backend.

    Where there are several, SIGTERM (torchrun's, when one of them dies) becomes KeyboardInterrupt,
    and every process but rank 0 prints nothing from here on.
    """
    group = ProcessGroup(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if group.size > 1:
        weeks = timedelta(weeks=1)  # the longest wait for another's unit
        group._meet(dist.init_process_group, "gloo", timeout=weeks)
        atexit.register(dist.destroy_process_group)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if group.rank:
        sys.stdout = open(os.devnull, "w")
    return group
