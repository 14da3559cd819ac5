"""CPU memory of a process: keep the freed memory of a tensor for the next tensor.

The C library returns the memory of a large tensor to the system as soon as the tensor is freed. For the next tensor the
system maps and clears new pages. A training step allocates and frees some gigabytes. In a virtual machine these page
faults took a tenth of the time of our steps, and a third of that of other libraries (benchmarks/notes.md). Keeping the
memory raises the peak of a process by 1 to 2 %.

The C library also keeps freed pieces under a kilobyte in a separate cache. The free memory next to them cannot be
merged, so tensors do not fit into it and take new memory. Without this cache the peak of LM training was an eighth
lower, and that of other jobs up to a twelfth lower. The cache can only be turned off by the environment in which a
process starts.

Where the sizes of tensors differ all the time, as in sampling, whose rows end at different times, kept pieces are
seldom used again: a process grew by 0.4 GB with every 240 completions. So they are given back once they are many.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's settings; mallopt(3)
GROWTH = 10**9  # bytes that a process may grow until `bound_freed_memory` gives freed memory back
# environment of the processes that we start (stages of the demo, benchmarks); the user's own settings override it
AT_START = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def keep_freed_memory():
    """Keep freed memory in this process, and let torch use pages of 2 MB. Call it before the first large tensor.

    The environment variable THP_MEM_ALLOC_ENABLE=0 keeps the normal page size. Returns whether freed memory is kept: it
    is not with a C library other than glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large tensor
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    no_mappings, no_trimming = mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)
    global _kept
    _kept = bool(no_mappings and no_trimming)
    return _kept


_kept = False  # whether this process keeps freed memory
_level = 0  # its bytes in memory when freed memory was given back the last time


def bound_freed_memory() -> None:
    """Give freed memory back to the system if this process has grown by GROWTH bytes since that was done last.

    Call it where tensors of many sizes have been freed. Without `keep_freed_memory` it does nothing. 0.05 s for 1 GB.
    """
    global _level
    now = resident_memory() if _kept else None
    if now is not None and now - _level >= GROWTH:
        ctypes.CDLL(None).malloc_trim(0)
        _level = resident_memory() or 0


def memory_of_machine() -> tuple[int, int] | None:
    """(available, total) memory of this machine in bytes; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    numbers = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available, total = (int(numbers[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available, total


def available_memory(kind: str) -> int | None:
    """Bytes that are free on this process's device, "cpu" or "cuda"; None where the system does not say."""
    if kind == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    machine = memory_of_machine()
    return machine and machine[0]


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
