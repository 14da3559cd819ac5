"""Signals that ask a process to end."""

from __future__ import annotations

import contextlib
import signal
import threading

# what asks a run to save and stop: a scheduler, a terminal that closes; on Windows there is SIGTERM alone
WISHES = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if name in dir(signal)]


@contextlib.contextmanager
def undisturbed():
    """A context in which Ctrl-C and WISHES wait: the first that came takes effect when the context is left."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WISHES)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
