"""The folder of a run that begins. If the run ends in a UserError before its first log line, nothing has changed.

Most errors in data and models are found after the run has taken its folder. Until the run has logged its first line,
the files of an earlier run are only moved aside, and a UserError moves everything back.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path

from configs.config import UserError, shown
from runtime.console import say

REPLACED = ".replaced"  # subfolder that keeps the files of an earlier run until the new run has begun


def refuse_other_use(folder, inputs):
    """Raise UserError if `folder` has files that are not those of a run, or if the run would replace its own inputs.

    inputs: {key: path} of the data and models that the configuration names.
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
    """Raise UserError unless the file `path` can be written. Call it before the work."""
    path = Path(path).absolute()
    above = next(p for p in path.parents if p.exists())
    if path.is_dir():
        raise UserError(f"out = {path} is a folder: give a file name")
    if not (above.is_dir() and os.access(above, os.W_OK)):
        why = "permission denied" if above.is_dir() else f"{above} is a file"
        raise UserError(f"cannot write to {path.parent}: {why}")


def acquire(folder, clear, lock):
    """Make and lock `folder`, and empty it if `clear`. Returns a function to call when the run has begun.

    Until then, `cli` in runtime/cli.py restores everything if the run ends in a UserError.
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
    elif clear:  # the last run was killed before it began: the earlier run is still in REPLACED
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


on_refusal = []  # functions that `cli` calls if a run ends in a UserError; they undo what was begun


LOCK_SECONDS = 60  # to wait until an earlier process of the same run has ended


def hold(folder):
    """Lock `folder`, so that only this process writes to it until it ends or calls `release`.

    Waits up to LOCK_SECONDS for another process, which may be saving a checkpoint. Then raises UserError.
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


_held = {}  # {folder: file descriptor of its lock}; locks end with the process
