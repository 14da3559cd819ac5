"""Threads wait shortly while other programs need the cores, and as long as they like when there is room again."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from runtime import spinning
from runtime.spinning import Watch, watch_cores

BUSY = [sys.executable, "-c", "while True: pass"]


@pytest.fixture
def free(monkeypatch):
    """An environment in which the user has not decided."""
    for name in spinning.USERS_OWN:
        monkeypatch.delenv(name, raising=False)


def idle_threads():
    return sum(thread.name == "idle" for thread in threading.enumerate())


def until(condition, seconds=20):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.statement("shared-cores")
def test_an_idle_thread_is_there_while_cores_are_too_few():
    watch, threads = Watch(), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)
    try:
        decisions(watch)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def decisions(watch):
    own = len(os.listdir("/proc/self/task"))
    for lacking, there in ((0.2, 0), (0.3, 1), (1.0, 1), (0.2, 1), (0.1, 0), (-1.0, 0), (0.3, 1), (0.0, 0)):
        watch.decide(lacking)
        until(lambda there=there: idle_threads() == there)
        # with it comes a thread of OpenMP, which makes more threads than cores, and goes with it
        until(lambda there=there: len(os.listdir("/proc/self/task")) == own + 2 * there)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_a_users_own_setting_wins(free, monkeypatch, name):
    monkeypatch.setenv(name, "active" if name == "OMP_WAIT_POLICY" else "5000")
    assert watch_cores() is None


def test_without_proc_nothing_is_watched(free, monkeypatch, tmp_path):
    monkeypatch.setattr(spinning, "STAT", tmp_path / "none")
    assert watch_cores() is None


@pytest.mark.statement("shared-cores")
def test_only_what_others_take_counts():
    """A process that works for 0.3 s: its own seconds do not count, those of a busy neighbour do."""
    watch = Watch()
    before = watch.seconds()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    busy = subprocess.Popen(BUSY)
    time.sleep(1)
    busy.kill()
    busy.wait()
    after = watch.seconds()
    total = len(watch.cores) * (after[0] - before[0])
    assert 0.1 < after[1] - before[1] <= total - 0.3 + 0.05  # the clock of /proc/stat ticks every 0.01 s


def test_it_looks_again_and_again_and_at_the_threads_of_now(free, monkeypatch):
    seen = []
    monkeypatch.setattr(spinning, "PAUSE", 0.02)
    monkeypatch.setattr(Watch, "seconds", lambda self: (time.monotonic(), 0.0))
    monkeypatch.setattr(Watch, "decide", lambda self, lacking: seen.append(lacking))
    before, cores = torch.get_num_threads(), len(Watch().cores)
    watch_cores()
    try:
        torch.set_num_threads(cores + 3)
        until(lambda: seen[-1:] == [3])
        torch.set_num_threads(cores)
        until(lambda: seen[-1:] == [0])
    finally:
        torch.set_num_threads(before)
        monkeypatch.setattr(Watch, "look", lambda self: None)  # the last look
