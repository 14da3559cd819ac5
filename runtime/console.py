"""Output on the terminal."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
import warnings

WIDTH = 80  # columns of a terminal, and of what is printed
LABELS = {  # of a log line, the most important first: what a number is called, and its format
    "skipped": ("skipped", "d"),
    "reward": ("reward", ".3f"),
    "gold": ("gold", ".3f"),
    "kl": ("kl", ".2f"),
    "mean_length": ("length", ".1f"),
    "clipped_ratio": ("cut", ".0%"),
    "loss": ("loss", ".4f"),
    "nats_per_token": ("held-out loss", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "accuracy": ("accuracy", ".2f"),
    "margin": ("margin", ".3f"),
    "score": ("score", ".3f"),
    "entropy": ("entropy", ".2f"),
    "value_loss": ("value loss", ".3f"),
    "lr": ("lr", ".1e"),
    "grad_norm": ("grad", ".2f"),
    "tok/s": ("tok/s", ",.0f"),
}
CONTROL = {c: "\N{REPLACEMENT CHARACTER}" for c in [*range(32), *range(127, 160)] if chr(c) not in "\n\t"}
ETA = len(" | eta 59m59s")


def rank():
    return int(os.environ.get("RANK", 0))


def say(*words, end="\n"):
    """Print in process 0 only, and flush, because a pipe would buffer the lines.

    A terminal that cannot show a character gets a question mark in its place. Control characters are not sent to it: a
    model may write some. If nobody reads any more (a pipe that was closed), the lines are dropped and the work goes on.
    """
    if rank() != 0:
        return
    text = (" ".join(map(str, words)) + end).translate(CONTROL)
    try:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def fold(text, indent="  "):
    """A text in lines of at most 80 columns. The lines after the first begin with `indent`; no word is cut."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def beside(text, more, indent=8):
    """'text | more' as one line if it has at most 80 columns; else `more` stands in an indented line below."""
    line = f"{text} | {more}"
    return line if len(line) <= WIDTH else f"{text}\n{indent * ' '}{more}"


def clip(text, width):
    """A text as one line of at most `width` columns; what is cut ends in '...'."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def log_line(record, total=None, left=None, verbose=False):
    """The log line of one step, at most 80 columns: the numbers of `LABELS` that fit, in that order, and the time left.

    record: a line of metrics.jsonl. total: the number of steps, if known. left: seconds, if known. verbose: also
    print all other numbers, by their names in metrics.jsonl, in lines below it.
    """
    line = f"step {record['step']:>5}" + (f"/{total}" if total else "")
    seen = {"step", "seconds"}
    for key, (label, form) in LABELS.items():
        words = f" | {label} {record[key]:{form}}" if key in record else ""
        if words and len(line) + len(words) + ETA <= WIDTH:
            line, seen = line + words, seen | {key}
    line += "" if left is None else f" | eta {duration(left)}"
    rest = [f"{key} {_number(key, value)}" for key, value in record.items() if key not in seen]
    rows = [line]
    for number, words in enumerate(rest if verbose else []):
        if number and len(rows[-1]) + len(words) + 3 <= WIDTH:
            rows[-1] += f" | {words}"
        else:
            rows.append(f"        {words}")
    return "\n".join(rows)


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
    # in a notebook, tqdm asks for widgets when it is imported; its bars are turned off below
    warnings.filterwarnings("ignore", message="IProgress not found")
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
