"""What is measured: a model with its tokenizer, and where results are kept until the measure is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.config import UserError
from models.completions import progress_line
from models.generation import Generation
from models.loader import context_length
from models.resumable import batches_resumable, generate_resumable, partial_path
from models.tokens import never_sampled, stop_ids
from rlhf.utils import completion_logprobs

ROWS_AT_ONCE = 16  # choices that are scored at once and kept together
SAMPLES_AT_ONCE = 100  # completions that are kept together: after a kill, so many are sampled again at most


@dataclass
class Subject:
    """A model in use, and the options of its measures.

    name: of the model, for messages. base: the name of the frozen model that gives the features of texts.
    limit: the most rows or prompts of each set; None: what the measure takes by default.
    out: the file of the measurement. who: what decides the results, as a value that JSON can hold.
    """

    model: torch.nn.Module
    tokenizer: Any
    name: str
    base: str
    dtype: torch.dtype
    limit: int | None
    batch_size: int
    seed: int
    out: Path
    who: Any
    parts: list[Path] = field(default_factory=list)  # files of finished batches; to discard when the measure is written

    def first(self, usual: int) -> int:
        """How many rows of a set are measured."""
        return usual if self.limit is None else self.limit

    def kept(self, part: str) -> Path:
        """The file that keeps the finished batches of one part of a measure."""
        self.parts.append(partial_path(self.out.with_name(f"{self.out.name}.{part}")))
        return self.parts[-1]

    def sample(
        self, part: str, prompts: list[list[int]], max_new_tokens: int, ends: bool = True, **options
    ) -> Generation:
        """Completions of prompts (token ids), kept in the file of `part` until the measure is finished.

        ends: whether a completion may stop by itself; else each has `max_new_tokens`.
        options: temperature, samples_per_prompt.
        """
        stops, never = list(stop_ids(self.tokenizer)), list(never_sampled(self.tokenizer))
        if not ends:
            stops, never = [], sorted({*never, *stops})
        settings: dict[str, Any] = {"samples_per_prompt": 1, "temperature": 1.0, **options}
        generation, _ = generate_resumable(
            self.kept(part), self.who, self.model, prompts, max_new_tokens, stop_ids=stops,
            seed=self.seed, batch_size=min(self.batch_size, SAMPLES_AT_ONCE), show=progress_line(what=part),
            never=never, **settings,
        )  # fmt: skip
        return generation

    def logprobs(self, part: str, pairs: list[list[tuple[list[int], list[int]]]]) -> list[list[list[float]]]:
        """The log-probs of the tokens of continuations, nats: one list per row, in it one per continuation.

        pairs: for each row its (ids of the context, ids of the continuation). Finished batches are kept in the file
        of `part`. Raises UserError for a row that is longer than the model reads.
        """
        context = context_length(self.model)
        longest = max(len(before) + len(ids) for row in pairs for before, ids in row)
        if context and longest > context:
            raise UserError(f"{part}: a row has {longest} tokens; {self.name} reads at most {context}")
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0][0]) + max(len(ids) for _, ids in pairs[i]))
        batches = [order[i : i + ROWS_AT_ONCE] for i in range(0, len(order), ROWS_AT_ONCE)]
        pad_id = self.tokenizer.pad_token_id

        def compute(number):
            rows = [pairs[i] for i in batches[number]]
            contexts = [before for row in rows for before, _ in row]
            continuations = [ids for row in rows for _, ids in row]
            found = iter(completion_logprobs(self.model, contexts, continuations, pad_id))
            return {"logprobs": [[next(found) for _ in row] for row in rows]}

        digest = hashlib.sha256(json.dumps([self.who, pairs]).encode()).hexdigest()
        show: Callable = progress_line(what=f"{part} rows")
        values: list[list[list[float]]] = [[]] * len(pairs)
        done = kept = 0
        header = {"logprobs_of": digest}
        for (batch, was_kept), index in zip(batches_resumable(self.kept(part), header, len(batches), compute), batches):
            for i, row in zip(index, batch["logprobs"], strict=True):
                values[i] = row
            done += len(index)
            if was_kept:
                kept = done
            else:
                show(done, len(pairs), kept)
        return values
