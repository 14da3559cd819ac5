"""Output on the terminal."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings


def rank():
    return int(os.environ.get("RANK", 0))


def say(*words, end="\n"):
    """Print in process 0 only, and flush, because a pipe would buffer the lines.

    A terminal that cannot show a character gets a question mark in its place. If nobody reads any more (a pipe that was
    closed), the lines are dropped and the work goes on.
    """
    if rank() != 0:
        return
    text = " ".join(map(str, words)) + end
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def clock(moment):
    """A time as '12:03'; with the date if it is not today."""
    there, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if there[:3] == now[:3] else "%Y-%m-%d %H:%M", there)


def command():
    """The command that runs this process again, as a person would type it."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return "the same command again" if several else shlex.join(["python", *sys.argv])


def duration(seconds):
    """412 -> '6m52s'."""
    seconds = int(round(seconds))
    h, m, s = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def quiet_libraries():
    """Turn off progress bars and warnings of libraries that do not help a user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    # peft 0.21 calls a property that transformers 5.23 renamed; a user cannot change this
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # peft detects the weight layout of GPT-2's layers, and warns for each layer
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
    # peft uses these patterns for the experts of a mixture, and warns that no module has them
    warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted", category=RuntimeWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _number(key, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key == "lr":
        return f"{value:.1e}"
    if key == "tok/s":
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
