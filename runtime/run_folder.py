"""The folder of a run that is about to begin: nothing is lost, and nothing is left, if the run is then refused.

Most mistakes in data and models are found after the folder was claimed. Until the run has logged its first line, what
an earlier run left there is only moved aside, and a UserError puts everything back as it was.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

from configs.config import UserError, shown
from runtime.console import say

REPLACED = ".replaced"  # the subfolder that keeps an earlier run until the new one has begun


def refuse_other_use(folder, inputs):
    """Raise UserError if a run in `folder` would mix with files that are no run's, or replace what it reads.

    inputs: {key: path} of what the configuration names as data and models.
    """
    for key, path in inputs.items():
        if path.exists() and (path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents):
            raise UserError(f"out = {folder} is where {key} = {path} lies, which the run reads: give another --out")
    if folder.is_dir() and not (folder / "config.yaml").is_file():
        strays = sorted(p.name for p in folder.iterdir() if p.name not in (REPLACED, "config.yaml.tmp"))
        if strays:
            names = ", ".join(strays[:5]) + (", ..." if len(strays) > 5 else "")
            raise UserError(f"out = {folder} holds files of something else than a run ({names}): give another --out")


def check_place(path):
    """Raise UserError unless the file `path` can be written: a mistake to find before the work, not after it."""
    path = Path(path).absolute()
    above = next(p for p in path.parents if p.exists())
    if path.is_dir():
        raise UserError(f"out = {path} is a folder: give a file name")
    if not (above.is_dir() and os.access(above, os.W_OK)):
        why = "permission denied" if above.is_dir() else f"{above} is a file"
        raise UserError(f"cannot write to {path.parent}: {why}")


def acquire(folder, clear, lock):
    """Make and lock `folder`, and empty it if `clear`. Returns a function to call when the run has begun.

    Until then, `configs.config.cli` takes everything back if the run ends in a UserError.
    Raises OSError if the folder cannot be made.
    """
    first_new = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    replaced = folder / REPLACED
    if clear and not replaced.exists():
        earlier = list(folder.iterdir())
        replaced.mkdir()
        for path in earlier:
            os.replace(path, replaced / path.name)
    elif clear:  # a run that replaces another was killed before it began: the other one is still the earlier run
        _empty(folder)

    def roll_back():
        if first_new:
            shutil.rmtree(first_new)
        elif clear:
            _empty(folder)
            for path in replaced.iterdir():
                os.replace(path, folder / path.name)
            replaced.rmdir()

    def begin():
        if roll_back in on_refusal:
            on_refusal.remove(roll_back)
        if replaced.exists():
            shutil.rmtree(replaced)

    if first_new or clear:
        on_refusal.append(roll_back)
    return begin


def _empty(folder):
    for path in folder.iterdir():
        if path.name != REPLACED:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


on_refusal = []  # functions that `cli` calls when a run ends in a UserError: they take back what was begun


LOCK_SECONDS = 60  # to wait for the last process of the same run to end


def hold(folder):
    """Make this process the only one that writes to `folder`, until it ends or `release`s it.

    Waits a little for another one, which may be saving what it did before it was stopped; then raises UserError.
    """
    if folder in _held:
        return
    descriptor, waited = os.open(folder, os.O_RDONLY), 0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waited == LOCK_SECONDS:
                os.close(descriptor)
                raise UserError(f"another process writes to {shown(folder)}: end it, or give another --out") from None
            if waited == 1:
                say(f"waiting for another process that writes to {shown(folder)}")
            waited += 1
            time.sleep(1)
        except OSError:  # a file system without locks
            break
        else:
            break
    _held[folder] = descriptor


def release(folder):
    if folder in _held:
        os.close(_held.pop(folder))


_held = {}  # folder: the descriptor that locks it; locks end with the process
