"""Completions from a model: how they are sampled in batches, how they stream, how they are shown and written.

What the preference generators and the inference scripts share.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import torch

from configs.config import UserError
from models.generation import generate
from models.tokens import completion_text, prompt_ids
from runtime.console import duration, say
from runtime.files import in_root, write_atomically


@dataclass
class Completion:
    text: str
    ids: list[int]  # as sampled, the stop id included when it was sampled
    logprobs: list[float]  # of each id, in nats, under the distribution it was drawn from
    finish_reason: str  # "stop": it ended by itself; "length": it was cut at max_new_tokens
    score: float = 0.0


def sample_completions(model, tokenizer, prompts, max_new_tokens, samples_per_prompt=1, **sampling):
    """Complete each prompt (a text, or a list of messages) `samples_per_prompt` times: a list of Completions for each prompt.

    sampling: what `generate` takes (temperature, top_k, top_p, seed, batch_size). How far it is and how long it will
    take is printed every few seconds. Raises UserError for a prompt that is empty or too long.
    """
    generation = generate(
        model,
        [prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_new_tokens,
        samples_per_prompt=samples_per_prompt,
        stop_ids=[tokenizer.eos_token_id],
        progress=progress_line(),
        **sampling,
    )
    return as_completions(tokenizer, generation, samples_per_prompt)


def as_completions(tokenizer, generation, samples_per_prompt):
    """What `generate` returns as a list of Completions for each prompt."""
    rows = zip(generation.completions, generation.logprobs, generation.finish_reasons)
    answers = [Completion(completion_text(tokenizer, ids), ids, logprobs, finish) for ids, logprobs, finish in rows]
    return [answers[i : i + samples_per_prompt] for i in range(0, len(answers), samples_per_prompt)]


def progress_line(every=5.0):
    """A `progress` for `generate`: prints completions done, seconds passed and left, at most every `every` seconds.

    kept: how many of the completions done were there before, and took none of the time.
    """
    started = last = time.time()

    def show(done, of, kept=0):
        nonlocal last
        now = time.time()
        if now - last >= every:
            last = now
            left = (now - started) / (done - kept) * (of - done)
            say(f"completions {done:>6,}/{of:,} | {duration(now - started)} | eta {duration(left)}")

    return show


class TextStream:
    """Token ids of one completion, as they come, to pieces of text that can be shown at once.

    A character may span several tokens: what does not yet decode to whole characters waits for the next token.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def add(self, token):
        """The text that this token completes, often one word, sometimes nothing."""
        self.ids.append(token)
        return self._new(self._text().rstrip("\ufffd"))

    def end(self):
        """What is left when no token will follow; bytes that make no character come out as U+FFFD."""
        return self._new(self._text())

    def _text(self):
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()

    def _new(self, text):
        new = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return new


def sampling(config):
    """What a configuration says about sampling, by the names that `sample_completions` takes."""
    found = {k: v for k, v in vars(config).items() if k in ("temperature", "top_k", "top_p", "seed")}
    return found | {"batch_size": config.sampling_batch_size}


def show_completion(name, answer, note):
    """Print one completion: whose it is, a note with its numbers, how long it is, and its text, indented."""
    say(f"  {name} | {note} | {len(answer.ids)} tokens{', cut' if answer.finish_reason == 'length' else ''}")
    for line in answer.text.splitlines() or [""]:
        say(f"      {line}")


def show_table(header, rows):
    """Print rows of cells (texts, or numbers with two decimals) under their headers, the first column to the left."""
    cells = [header, *([c if isinstance(c, str) else f"{c:.2f}" for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for first, *others in cells:
        say("  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:]))]))


def check_out(out, prompts=None):
    """Raise UserError before the work begins if the file `out` cannot be written, or is the file of the prompts."""
    if out is None:
        return
    path = in_root(out)
    if path.is_dir() or not path.absolute().parent.is_dir() or path.suffix != ".jsonl":
        raise UserError(f"out = {out!r}: must be a file in a folder that is there, with a name that ends in .jsonl")
    if prompts is not None and path.resolve() == in_root(prompts).resolve():
        raise UserError(f"out = {out!r} is the file of the prompts: give another one")


def write_rows(out, rows):
    """Write rows to the JSONL file `out`, all or none, and say so; nothing if `out` is None."""
    if out is None:
        return
    write_atomically(in_root(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    say(f"written to {out}: {len(rows)} rows")


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def lengths(groups):
    """(mean length in tokens, share that ended by themselves) of lists of completions."""
    answers = [answer for group in groups for answer in group]
    return mean(len(a.ids) for a in answers), mean(a.finish_reason == "stop" for a in answers)


def rate(groups, seconds):
    """Generated tokens per second of lists of completions, as a text."""
    tokens = sum(len(answer.ids) for group in groups for answer in group)
    return f"{tokens:,} tokens in {seconds:.1f}s, {tokens / max(seconds, 1e-9):,.0f} tok/s"


def synchronize(device):
    """Wait for the GPU, so that a clock read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
