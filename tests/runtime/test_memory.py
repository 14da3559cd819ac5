"""What a tensor leaves behind is used by the next one."""

import os
import platform
import subprocess
import sys

import pytest

from configs.config import ROOT
from runtime.memory import AT_START

PROGRAM = """
import ctypes, resource
from runtime.memory import keep_freed_memory
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = libc.malloc(100 << 20)
    ctypes.memset(place, 1, 100 << 20)
    libc.free(place)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call):
    """Page faults of 100 MB, 25,600 where pages have 4 KB, after 100 MB were freed."""
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    return int(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_what_is_freed_is_used_again():
    assert faults("assert keep_freed_memory()") < 10
    assert faults("") > 1000


GAPS = """
import ctypes
from runtime import memory
{call}
memory.GROWTH = 200 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
memory.bound_freed_memory()
pieces = []
for _ in range(40):  # a large piece and a small one that stays behind it
    pieces.append(libc.malloc(8 << 20))
    ctypes.memset(pieces[-1], 1, 8 << 20)
    libc.malloc(4096)
for place in pieces:
    libc.free(place)
before = memory.resident_memory()
memory.bound_freed_memory()
print(before - memory.resident_memory())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
@pytest.mark.statement("cost-follows-work")
def test_pieces_that_nothing_fits_into_are_given_back_once_they_are_many():
    def given_back(call):
        command = [sys.executable, "-c", GAPS.format(call=call)]
        return int(subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout)

    assert given_back("assert memory.keep_freed_memory()") > 300 << 20
    assert abs(given_back("pass")) < 10 << 20  # nothing is kept, so nothing is done


CACHED = """
import ctypes
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free top".split()
Found = type("Found", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallinfo2.restype = Found
before, apart = libc.mallinfo2().used, libc.malloc(1000)
libc.free(apart)
print(libc.mallinfo2().used - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_small_pieces_that_are_freed_do_not_stay_in_use():
    """What lies in the C library's cache counts as used, and its neighbours cannot grow together."""

    def kept(environment):
        command = [sys.executable, "-c", CACHED]
        return int(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)

    without = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert kept(without | AT_START) < 1000 <= kept(without)


def test_other_libraries_of_c_are_left_alone(monkeypatch):
    from runtime import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", None)  # must not be called
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert memory.keep_freed_memory() is False
    assert memory.os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_every_script_begins_with_it(monkeypatch):
    from runtime import cli

    called = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(cli, "load_config", lambda Config: called.append("read"))
    cli.cli(lambda given: called.append("run"), object)
    assert called == ["kept", "read", "run"]
