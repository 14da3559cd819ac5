"""Messages for errors of the machine: not enough memory, a full disk, a lost process.

`cli` in runtime/cli.py calls `explain` for exceptions that no script handles. Unknown errors stay a traceback.
"""

from __future__ import annotations

import errno
import linecache
import math
import os
import traceback
from pathlib import Path

from configs.config import ROOT, shown
from runtime.console import command
from runtime.files import in_root
from runtime.memory import memory_of_machine

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "failed to allocate")
LOST = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "nccl", "timed out")


def no_memory(error):
    """Whether an exception says that memory is full."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in OUT_OF_MEMORY)


def explain(error, config):
    """A message for an error of the machine, with the command that continues. None for any other error (a bug)."""
    said = str(error).lower()
    if no_memory(error):
        return out_of_memory(error, config)
    if isinstance(error, OSError) and (error.errno in DISK or _below(error.filename, config)):
        return disk(error.filename, reason(error), config)
    if type(error).__name__ == "SafetensorError" and "os error" in said:
        return disk(None, reason(error), config)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and isinstance(error, RuntimeError) and any(words in said for words in LOST):
        why = _first_sentence(error)
        return f"another process of this run ended or cannot be reached ({why}). To go on: {command()}"
    return None


def reason(error):
    """The reason of the system why a file could not be written; for safetensors, it is taken from the message."""
    return getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]


def disk(path, why, config):
    """A message for a failed write: where, why, what stays, and how to continue."""
    where = shown(path) if path else shown(in_root(config.out))
    return f"{where}: {why}. What was written before stays. When that is solved, go on with: {command()}"


def out_of_memory(error, config):
    """A message for too little memory: the line of code, the free memory, and options that need less memory."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _ours(f.filename)]
    doing = "loading libraries"
    if frames:
        line = linecache.getline(frames[-1].filename, frames[-1].lineno).strip()
        doing = f"{shown(frames[-1].filename)} line {frames[-1].lineno}, `{line}`"
    sampling = any(Path(f.filename).name == "generation.py" for f in frames)
    advice = "".join(f"\n  {option}" for option in savers(config, sampling)) or "\n  a smaller --model_name"
    return f"out of memory in {doing}; {free_memory()}. What needs less, the most first:{advice}"


def savers(config, sampling=False):
    """The options of `lighter` as they are typed on the command line, each with its meaning."""
    found = []
    for key, value, meaning in lighter(config, sampling):
        words = f"--{key} {str(value).lower() if isinstance(value, bool) else value}"
        found.append(f"{words}: {meaning}" if meaning else words)
    return found


def lighter(config, sampling=False):
    """(option, value, meaning): values that need less memory than the configuration's. The largest saving comes first.

    sampling: the memory ran out while completions were sampled, so there are no gradients.
    """
    key = vars(config)
    found = []
    if sampling:
        at_once = min(key["sampling_batch_size"], completions_here(key))
        if at_once > 1:
            found.append(("sampling_batch_size", at_once // 2, ""))
        return [*found, ("max_new_tokens", key["max_new_tokens"] // 2, "")]
    if key.get("lora_r") == 0:
        found.append(("lora_r", 16, "an adapter in place of all weights needs no optimizer state for them"))
    if key.get("gradient_checkpointing") is False:
        found.append(("gradient_checkpointing", True, "the same steps, activations computed twice"))
    in_a_step = key.get("batch_size") or completions_here(key, key.get("minibatches", 1))
    one_pass = min(key.get("micro_batch_size", 1), in_a_step)
    if one_pass > 1:
        found.append(("micro_batch_size", one_pass // 2, "the same steps"))
    if key.get("precision") == "fp32":
        found.append(("precision", "bf16", ""))
    unused = {"online": "max_length", "offline": "max_new_tokens"}.get(key.get("mode"))
    for name in ("max_length", "max_new_tokens"):
        if key.get(name, 0) > 8 and name != unused:
            found.append((name, key[name] // 2, ""))
    return found


def completions_here(key, minibatches=1):
    """The completions of one minibatch of a rollout in this process. Infinity where the options do not say it."""
    if "prompts_per_step" not in key or key.get("mode") == "offline":
        return math.inf
    parts = minibatches * int(os.environ.get("WORLD_SIZE", 1))
    return math.ceil(key["prompts_per_step"] / parts) * key["samples_per_prompt"]


def free_memory():
    """'1.2 of 15.0 GB free': on the GPU if one is used, else on the machine."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free on the GPU"
    machine = memory_of_machine()
    if machine is None:
        return "how much is free is not known here"
    free, total = (size / 1e9 for size in machine)
    return f"{free:.1f} of {total:.1f} GB free"


def _below(path, config):
    """Whether a path is inside the run's folder."""
    return bool(path) and "out" in vars(config) and in_root(config.out).absolute() in [*Path(path).absolute().parents]


def _ours(path):
    return Path(path).is_relative_to(ROOT) and ".venv" not in Path(path).parts


def _first_sentence(error):
    return str(error).strip().splitlines()[0].split(". ")[0]
