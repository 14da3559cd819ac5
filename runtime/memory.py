"""How a process holds its memory on a CPU: what a tensor leaves behind is there for the next one.

The C library hands the memory of a large tensor back to the system as soon as nobody needs it, and for the next one the
system maps and clears new pages. A training step makes and drops some gigabytes; in a virtual machine these page faults
were a tenth of our steps and a third of the steps of others (benchmarks/notes.md). The peak of what a process holds
rose by one to two hundredths.

Pieces under a kilobyte that are freed the C library keeps in a cache of their own, wherever they lie, and the free
memory at their sides cannot grow together: tensors find no place in it and take new memory. Without this cache LM
training held an eighth less at its peak, other jobs up to a twelfth. Only the environment in which a process starts
turns it off.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's settings; mallopt(3)
# The environment of processes that we start (the demo's stages, the benchmarks); what the user has set comes first
AT_START = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


def keep_freed_memory():
    """Let this process keep what is freed, and torch take pages of 2 MB; before the first large tensor is made.

    The environment variable THP_MEM_ALLOC_ENABLE=0 leaves the pages as they are. Returns whether freed memory is kept:
    with another C library than glibc it is not.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large tensor
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    no_mappings, no_trimming = mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1)
    return bool(no_mappings and no_trimming)
