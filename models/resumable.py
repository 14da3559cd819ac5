"""Sampling that can be interrupted. Finished batches are kept in a file, and the same call continues from it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.config import shown
from models.generation import Generation, check_sampling, generate
from runtime.console import clock, say
from runtime.run_folder import hold, hold_output, release


def partial_path(out: Path) -> Path:
    """The path of the file that keeps the completions until the file `out` is written."""
    return out.with_name(out.name + ".partial")


def acquire_output(out: Path, seconds: int | None = None) -> None:
    """Let no other process sample for the file `out` until `discard`. Call it before you look at `out`.

    seconds: to wait for another process; default: LOCK_SECONDS. Raises UserError if it goes on.
    """
    path = partial_path(out)
    hold_output(path, path.touch, seconds)


@dataclass
class Kept:
    """Where the completions of one sampling are kept until the output is written.

    identity: what decides them besides prompts and options; see `generate_resumable`. seconds: spent on them before an
    interruption; set by the sampling.
    """

    path: Path
    identity: Any
    seconds: float = 0.0


def generate_resumable(
    path: Path,
    identity: Any,
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    samples_per_prompt: int,
    stop_ids: Sequence[int],
    seed: int,
    batch_size: int,
    show: Callable | None,
    never: Sequence[int] = (),
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Generation, float]:
    """Call `generate`, and keep finished batches in the file `path` until `discard(path)`.

    Returns (the Generation, seconds spent on it before an interruption). The completions are exactly those of one call
    of `generate`, because the batches and their random numbers are the same.
    path: JSONL, one line per batch. identity: everything else that decides the completions, such as the hash of the
    weights, as a value that JSON can hold; a file with another identity is thrown away.
    show: a `progress` function; its third argument is the number of completions that were read from the file.
    The other arguments are those of `generate`. Raises UserError as `generate` does.
    """
    check_sampling(model, prompts, max_new_tokens, temperature, top_k, top_p, samples_per_prompt)
    settings: dict[str, Any] = {
        "samples_per_prompt": samples_per_prompt,
        "stop_ids": stop_ids,
        "temperature": temperature,
    }
    settings |= {"never": list(never)} if never else {}
    settings |= {"top_k": top_k} if top_k else {}
    settings |= {"top_p": top_p} if top_p < 1 else {}
    text = json.dumps([identity, prompts, max_new_tokens, settings, seed, batch_size], sort_keys=True)
    header = {"answers_of": hashlib.sha256(text.encode()).hexdigest()}
    rows = len(prompts) * samples_per_prompt
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # as in `generate`
    at_once = max(1, batch_size // samples_per_prompt)
    batches = [order[i : i + at_once] for i in range(0, len(order), at_once)]

    def sample(number: int) -> dict:
        index = [i * samples_per_prompt + s for i in batches[number] for s in range(samples_per_prompt)]
        share: dict[str, Any] = {"uniforms": uniforms[index], "batch_size": batch_size}
        return vars(generate(model, [prompts[i] for i in batches[number]], max_new_tokens, **settings, **share))

    found = Generation([[]] * rows, [[]] * rows, ["length"] * rows)
    answered, kept, before = 0, 0, 0.0
    for (part, was_kept), batch in zip(batches_resumable(path, header, len(batches), sample), batches):
        index = [i * samples_per_prompt + s for i in batch for s in range(samples_per_prompt)]
        for k, row in enumerate(index):
            found.completions[row] = part["completions"][k]
            found.logprobs[row] = part["logprobs"][k]
            found.finish_reasons[row] = part["finish_reasons"][k]
        answered += len(index)
        if was_kept:
            kept, before = answered, before + part["seconds"]
        elif show:
            show(answered, rows, kept)
    return found, before


def batches_resumable(
    path: Path, header: dict, number: int, compute: Callable[[int], dict]
) -> Iterator[tuple[dict, bool]]:
    """Yield (compute(k) and its "seconds", whether it was read from the file) for k = 0, 1, ..., number - 1.

    Finished batches are kept in the file `path`, JSONL, one line per batch, until `discard(path)`. The first line is
    `header`: all that decides the batches. A file with another header is thrown away.
    compute(k) must return a dict that JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hold(path, path.touch)
    done, size = _read(path, header)
    if not size and path.stat().st_size:
        say(f"{shown(path)} holds results of another configuration, model or prompts: they are sampled anew")
    if done:
        say(f"continuing after batch {len(done)} of {number} ({shown(path)}, {clock(path.stat().st_mtime)})")
    yield from ((batch, True) for batch in done)
    with open(path, "r+", encoding="utf-8") as file:
        file.truncate(size)
        file.seek(size)
        if not size:
            file.write(json.dumps(header) + "\n")
        for k in range(len(done), number):
            began = time.time()
            batch = {**compute(k), "seconds": time.time() - began}
            file.write(json.dumps(batch) + "\n")
            file.flush()
            os.fsync(file.fileno())
            yield batch, False


def _read(path, header):
    """(finished batches of this sampling, their size in the file in bytes). An incomplete last line does not count."""
    done, size = [], 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or (number == 0 and row != header):
            break
        done += [row] if number else []
        size += len(line)
    return done, size


def discard(path: Path) -> None:
    """Remove the file of kept completions and its lock. Call it when the final file is written."""
    path.unlink(missing_ok=True)
    release(path)
