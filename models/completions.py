"""Completions of a model: sample them in batches, stream them, print them and write them to a file.

The preference generators and the inference scripts share this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.config import UserError
from models.generation import generate
from models.loader import weights_hash
from models.resumable import Kept, acquire_output, discard, generate_resumable, partial_path
from models.tokens import completion_text, never_sampled, prompt_ids, stop_ids
from runtime.console import duration, fold, say
from runtime.files import as_lines, in_root, write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from models.generation import Generation


PARTS = ("", ".base")  # what a command samples: the completions of its model, and those of the base


@dataclass
class Completion:
    text: str
    ids: list[int]  # as sampled, the stop id included when it was sampled
    logprobs: list[float]  # of each id, in nats, under the distribution it was drawn from
    finish_reason: str  # "stop": the model sampled the stop token; "length": it was cut at max_new_tokens
    score: float = 0.0


def sample_completions(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    max_new_tokens: int,
    samples_per_prompt: int = 1,
    kept: Kept | None = None,
    **sampling,
) -> list[list[Completion]]:
    """Sample `samples_per_prompt` completions of each prompt. Returns a list of Completions for each prompt.

    prompts: texts, or lists of messages. sampling: options of `generate` (temperature, top_k, top_p, seed, batch_size).
    kept: where finished batches are kept, so that an interrupted command goes on; see `keep_for`.
    Prints the progress and the time left every few seconds. Raises UserError for a prompt that is empty or too long.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    options = {"samples_per_prompt": samples_per_prompt, "never": never_sampled(tokenizer), **sampling}
    if kept is None:
        generation = generate(
            model, ids, max_new_tokens, stop_ids=stop_ids(tokenizer), progress=progress_line(), **options
        )
    else:
        generation, kept.seconds = generate_resumable(
            kept.path, kept.identity, model, ids, max_new_tokens, stop_ids=list(stop_ids(tokenizer)),
            show=progress_line(), **options,
        )  # fmt: skip
    return as_completions(tokenizer, generation, samples_per_prompt)


def as_completions(
    tokenizer: PreTrainedTokenizerBase, generation: Generation, samples_per_prompt: int
) -> list[list[Completion]]:
    """Turn the `Generation` of `generate` into a list of Completions for each prompt."""
    rows = zip(generation.completions, generation.logprobs, generation.finish_reasons)
    answers = [Completion(completion_text(tokenizer, ids), ids, logprobs, finish) for ids, logprobs, finish in rows]
    return [answers[i : i + samples_per_prompt] for i in range(0, len(answers), samples_per_prompt)]


def progress_line(every: float = 5.0, what: str = "completions") -> Callable:
    """A `progress` function for `generate`. It prints the completions done, the time passed and the time left.

    every: the least number of seconds between two lines. what: is counted.
    The returned function also takes `kept`: how many of the completions done were read from a file and took no time.
    """
    started = last = time.time()

    def show(done, of, kept=0):
        nonlocal last
        now = time.time()
        if now - last >= every:
            last = now
            left = (now - started) / (done - kept) * (of - done)
            say(f"{what} {done:>6,}/{of:,} | {duration(now - started)} | eta {duration(left)}")

    return show


class TextStream:
    """Turns the token ids of one completion, one by one, into pieces of text that can be printed at once.

    A character may span several tokens. Bytes that are not yet a whole character wait for the next token.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, token: int) -> str:
        """Add a token and return the new text: often one word, sometimes nothing."""
        self.ids.append(token)
        return self._new(self._text().rstrip("\ufffd"))

    def end(self) -> str:
        """Return the rest of the text when no token follows. Bytes that are no character become U+FFFD."""
        return self._new(self._text())

    def _text(self):
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()

    def _new(self, text):
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


def sampling(config: Any) -> dict[str, Any]:
    """The sampling options of a configuration as keyword arguments of `sample_completions`."""
    found = {k: v for k, v in vars(config).items() if k in ("temperature", "top_k", "top_p", "seed")}
    return found | {"batch_size": config.sampling_batch_size}


def show_completion(name: str, answer: Completion, note: str) -> None:
    """Print one completion: the model's name, a note with numbers, the length in tokens, and the indented text."""
    say(f"  {name} | {note} | {len(answer.ids)} tokens{', cut' if answer.finish_reason == 'length' else ''}")
    for line in answer.text.splitlines() or [""]:
        say(fold(f"      {line}", "      "))


def show_table(header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Print rows of cells under their headers. Numbers get two decimals; the first column is aligned left."""
    cells = [header, *([c if isinstance(c, str) else f"{c:.2f}" for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for first, *others in cells:
        say("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:]))]))


def check_out(out: str | Path | None, prompts: str | Path | None = None) -> None:
    """Raise UserError if the file `out` cannot be written, or is the file of the prompts. Call it before the work."""
    if out is None:
        return
    path = in_root(out)
    if path.is_dir() or not path.absolute().parent.is_dir() or path.suffix != ".jsonl":
        raise UserError(f"out = {out!r}: must be a file in a folder that is there, with a name that ends in .jsonl")
    if prompts is not None and path.resolve() == in_root(prompts).resolve():
        raise UserError(f"out = {out!r} is the file of the prompts: give another one")


def keep_for(out: str | Path | None, model: torch.nn.Module, part: str = "") -> Kept | None:
    """Where completions of `model` for the file `out` are kept until `write_rows`. None if `out` is None.

    part: one of PARTS, for a command that samples twice.
    """
    if out is None:
        return None
    identity = {"model": weights_hash(model), "device": next(model.parameters()).device.type}
    return Kept(_partial(out, part), identity)


def acquire_out(out: str | Path | None) -> None:
    """Let no other process write to the file `out`. Raises UserError if one does. Does nothing if `out` is None."""
    if out is not None:
        acquire_output(in_root(out), seconds=0)


def write_rows(out: str | Path | None, rows: Sequence[dict]) -> None:
    """Write all rows to the JSONL file `out` atomically, and print it. Does nothing if `out` is None."""
    if out is None:
        return
    write_atomically(in_root(out), as_lines(rows))
    for part in PARTS:
        discard(_partial(out, part))
    say(f"written to {out}: {len(rows)} rows")


def _partial(out, part):
    path = in_root(out)
    return partial_path(path.with_name(path.name + part))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def lengths(groups: Iterable[list[Completion]]) -> tuple[float, float]:
    """(mean length in tokens, share with finish_reason "stop") over lists of completions."""
    answers = [answer for group in groups for answer in group]
    return mean(len(a.ids) for a in answers), mean(a.finish_reason == "stop" for a in answers)


def rate(groups: Iterable[list[Completion]], seconds: float) -> str:
    """A text with the number of generated tokens, the seconds, and the tokens per second."""
    tokens = sum(len(answer.ids) for group in groups for answer in group)
    return f"{tokens:,} tokens in {seconds:.1f}s, {tokens / max(seconds, 1e-9):,.0f} tok/s"


def synchronize(device: torch.device) -> None:
    """Wait until the GPU is idle, so that the next clock reading includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
