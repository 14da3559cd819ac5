"""Threads that wait for each other let other programs run when there are not enough cores for all.

torch divides an operation among threads. A thread that is done early waits for the others. GNU's OpenMP (libgomp) lets
it wait in a loop for some milliseconds, which is fast on a quiet machine. But if another program has taken a core, the
waiting thread takes the core away from the thread that it waits for. On two cores that others used, too, a training
step took nine times as long, and sampling four times (benchmarks/notes.md).

OMP_WAIT_POLICY=passive ends this, but it costs a sixth of the speed on a quiet machine, and libgomp reads it only once,
when torch is imported. However, libgomp waits only 100 turns while it has more threads than there are cores. So
`watch_cores` looks twice a second at what other programs take. If that and torch's threads are more than the cores, it
starts an idle thread with a team of OpenMP. It ends this thread when there is room again. The number of threads that
compute stays the same, and so does every result.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

STAT = Path("/proc/stat")
USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # who sets one of these has decided
PAUSE = 0.5  # seconds
MORE, LESS = 0.25, 0.15  # cores that are too few: from where on threads wait shortly, and until where


def watch_cores() -> Watch | None:
    """Start to watch the cores. Returns the `Watch`; None without /proc (not Linux), or if the user has decided."""
    if not STAT.is_file() or any(name in os.environ for name in USERS_OWN):
        return None
    found = Watch()
    found.look()
    return found


class Watch:
    """Looks at the cores every PAUSE seconds. `idle`: the event that ends the idle thread; None if there is none."""

    def __init__(self):
        self.idle, self.cores = None, os.sched_getaffinity(0)
        self.before = self.seconds()

    def look(self):
        """Look once, and again after PAUSE: in a new thread each time, because a thread keeps its number of threads."""
        now = self.seconds()
        if "torch" in sys.modules and now[0] > self.before[0]:
            import torch

            others = (now[1] - self.before[1]) / (now[0] - self.before[0])
            self.decide(others + torch.get_num_threads() - len(self.cores))
        self.before = now
        timer = threading.Timer(PAUSE, self.look)
        timer.daemon = True
        timer.start()

    def seconds(self):
        """(time, CPU seconds of all other processes on the cores of this one)."""
        lines = [line.split() for line in STAT.read_text().splitlines()]
        mine = [line for line in lines if line[0].startswith("cpu") and line[0][3:].isdigit()]
        # user, nice, system, (idle, iowait,) irq, softirq, steal
        used = sum(sum(map(int, line[1:4] + line[6:9])) for line in mine if int(line[0][3:]) in self.cores)
        return time.monotonic(), used / os.sysconf("SC_CLK_TCK") - time.process_time()

    def decide(self, lacking):
        """Start or end the idle thread. lacking: cores that are too few."""
        if self.idle is None and lacking > MORE:
            self.idle, ready = threading.Event(), threading.Event()
            threading.Thread(target=idle_thread, args=(self.idle, ready), name="idle", daemon=True).start()
            ready.wait()
        elif self.idle and lacking < LESS:
            self.idle.set()
            self.idle = None


def idle_thread(end, ready):
    """Let OpenMP start threads for this thread, which wait until it ends."""
    import torch

    torch.zeros(1 << 20).add_(1)  # large enough to be divided among threads
    ready.set()
    end.wait()
