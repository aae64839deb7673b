"""A process between timed() of processes.py and its command, with no memory to speak of.

A process starts as a copy of the one that started it, and Linux counts that copy as its memory's
peak: beside a parent with torch, no smaller peak could be told. Writes what the command used, as
JSON, to the open file descriptor in the first argument.
"""

import json
import os
import signal
import sys
import time

pipe, start = int(sys.argv[1]), time.perf_counter()
os.set_inheritable(pipe, False)
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[2:]])
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which says so
_, status, usage = os.wait4(pid, 0)
used = dict(
    status=os.waitstatus_to_exitcode(status),
    seconds=time.perf_counter() - start,
    cpu_seconds=usage.ru_utime + usage.ru_stime,
    peak_mib=usage.ru_maxrss / 1024,  # of KiB
)
os.write(pipe, json.dumps(used).encode())
