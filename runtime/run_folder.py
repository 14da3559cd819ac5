"""The folder of a run that begins. If the run ends before its first log line or checkpoint, nothing has changed.

Most errors in data and models are found after the run has taken its folder. Until the run has logged its first line, or
saved a checkpoint, the files of an earlier run are only moved aside, and a UserError or Ctrl-C moves everything back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

from configs.config import UserError, shown
from runtime.console import say
from runtime.signals import undisturbed

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

REPLACED = ".replaced"  # subfolder that keeps the files of an earlier run until the new run has begun


def check_system():
    """Raise UserError on a system without the file locks of POSIX."""
    if fcntl is None:
        raise UserError("this system has no POSIX file locks: on Windows, run the scripts in WSL 2")


def refuse_inputs(folder, inputs):
    """Raise UserError if a run in `folder` would replace what it reads.

    inputs: {key: path} of the data and models that the configuration names.
    """
    for key, path in inputs.items():
        if path.exists() and (path.resolve() == folder.resolve() or folder.resolve() in path.resolve().parents):
            raise UserError(f"out = {folder} is where {key} = {path} lies, which the run reads: give another --out")


def refuse_other_use(folder):
    """Raise UserError if `folder` has files that are not those of a run."""
    if not (folder / "config.yaml").is_file():
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


class RunFolder:
    """The folder of a run that begins, made if it was not there, and locked.

    Look at its content only then: before, another process may still write to it. Until `begin`, `cli` in runtime/cli.py
    calls `roll_back` if the run ends in a UserError, by Ctrl-C or by another signal.
    Raises OSError if the folder cannot be made, and UserError if another process keeps it.
    """

    def __init__(self, path):
        self.path, self.replaced = path, path / REPLACED
        self.made = [p for p in [path, *path.parents] if not p.exists()]
        self.emptied = self.begun = False
        hold(path, lambda: path.mkdir(parents=True, exist_ok=True))
        if any(path.iterdir()):  # another process made it while this one waited for the lock
            self.made = []
        on_refusal.append(self.roll_back)

    def empty(self):
        """Move aside what the folder holds, until `begin`."""
        with undisturbed():  # a signal in between would leave a half of it to `roll_back`
            self.emptied = True
            if self.replaced.exists():  # the last run was killed before it began: the earlier run is still in there
                self._remove_rest()
                return
            earlier = list(self.path.iterdir())
            self.replaced.mkdir()
            for path in earlier:
                os.replace(path, self.replaced / path.name)

    def go_on(self):
        """Go on with the run that the folder holds. If it was killed before it began, the earlier run is there, too."""
        self.emptied = self.replaced.exists()

    def begin(self):
        """Delete what was moved aside. From now on nothing is undone."""
        if self.begun:
            return
        with undisturbed():
            self.begun = True
            if self.roll_back in on_refusal:
                on_refusal.remove(self.roll_back)
            if self.replaced.exists():
                shutil.rmtree(self.replaced)

    def roll_back(self):
        """Put back what was moved aside, remove what was made, and release the lock."""
        with undisturbed():
            if self.made:
                shutil.rmtree(self.path)
                for parent in self.made[1:]:
                    with contextlib.suppress(OSError):  # by now, another run lies in it
                        parent.rmdir()
            elif self.emptied:
                self._remove_rest()
                for path in self.replaced.iterdir():
                    os.replace(path, self.path / path.name)
                self.replaced.rmdir()
            release(self.path)

    def _remove_rest(self):
        for path in self.path.iterdir():
            if path.name != REPLACED:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


on_refusal = []  # functions that `undo_all` calls if a command ends before it has begun; they undo what was done


def undo_all():
    """Undo what the command has done so far, its last deed first. A second Ctrl-C stops one of them, not the others."""
    while on_refusal:
        with contextlib.suppress(KeyboardInterrupt):
            on_refusal.pop()()


LOCK_SECONDS = 60  # to wait until an earlier process of the same run has ended


def hold_output(path, make, seconds=None, advice="end it, or give another --out"):
    """`hold`, and make the folders above. A UserError of the command releases the lock and removes what is empty.

    Call it before you look at what lies there: another process of the same command may still write to it.
    """
    above = [p for p in path.parents if not p.exists()]

    def roll_back():
        release(path)
        if path.is_file() and not path.stat().st_size:
            path.unlink()
        for folder in ([path] if path.is_dir() else []) + above:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    for folder in reversed(above):
        folder.mkdir(exist_ok=True)
    new = not path.exists()
    hold(path, make, seconds, advice)
    if new or above:
        on_refusal.append(roll_back)


def hold(path, make, seconds=None, advice="end it, or give another --out"):
    """Lock `path`, so that only this process writes to it until it ends or calls `release`.

    make: a function that makes the file or folder if it is not there. Waits up to `seconds` (default: LOCK_SECONDS) for
    another process, which may be saving a checkpoint. Then raises UserError with this advice.
    """
    if path in _held:
        return
    check_system()
    limit, waited = LOCK_SECONDS if seconds is None else seconds, 0
    while True:
        make()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # the other process has removed it between the two lines
            continue
        if not _lock(descriptor):
            os.close(descriptor)
            if waited == limit:
                raise UserError(f"another process writes to {shown(path)}: {advice}")
            if waited == 1:
                say(f"waiting for another process that writes to {shown(path)}")
            waited += 1
            time.sleep(1)
        elif path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            _held[path] = descriptor
            return
        else:  # the other process has removed what it had locked
            os.close(descriptor)


def _lock(descriptor):
    """Whether this process has the lock now; True on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def release(folder):
    if folder in _held:
        os.close(_held.pop(folder))


_held = {}  # {folder: file descriptor of its lock}; locks end with the process
