"""Documents packed into blocks of equal length: little padding, and no sample sees another sample.

The positions in a block restart at 0 with each sample. If a model gets such positions and no attention mask,
transformers builds the block-diagonal mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from configs.config import UserError
from data.encoding import encode
from models.tokens import readable, text_pieces
from runtime.console import fold, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Sample:
    """The tokens of one document or of one prompt and completion, as arrays of equal length."""

    ids: np.ndarray
    counts: np.ndarray  # bool: the loss counts this token
    bytes: np.ndarray  # UTF-8 bytes of the text of each counted token

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, piece):
        return Sample(self.ids[piece], self.counts[piece], self.bytes[piece])


@dataclass
class Blocks:
    """N packed rows of T tokens, on the CPU."""

    input_ids: torch.Tensor  # (N, T)
    position_ids: torch.Tensor  # (N, T)
    mask: torch.Tensor  # (N, T-1), aligned with input_ids[:, 1:]; 1 = counts
    bytes: torch.Tensor  # (N,) UTF-8 bytes of the counted tokens
    tokens: torch.Tensor  # (N,) tokens that are not padding

    def __len__(self):
        return len(self.input_ids)

    def pick(self, rows: Any) -> Blocks:
        """The blocks with these indices, as `Blocks`."""
        return Blocks(*(x[rows] for x in vars(self).values()))

    def batch(self, rows: Any, device: torch.device | str) -> dict[str, torch.Tensor]:
        """The blocks with these indices as a batch for `lm_loss`, on `device`."""
        return {
            "input_ids": self.input_ids[rows].long().to(device),
            "position_ids": self.position_ids[rows].long().to(device),
            "mask": self.mask[rows].to(device),
        }

    def named(self, micro_batches: Iterable[Iterable[int]]) -> str:
        """A text that names the blocks of these micro-batches, for messages."""
        return "blocks " + " + ".join(", ".join(str(row) for row in rows) for rows in micro_batches)

    def counted(self, rows: Any) -> int:
        """The number of tokens in these blocks that count in the loss."""
        return int(self.mask[rows].sum())


def make_blocks(
    documents: list[dict], kind: str, tokenizer: PreTrainedTokenizerBase, max_length: int, name: str
) -> Blocks:
    """Pack documents into blocks of `max_length` tokens.

    Text is cut where a block is full. A cut repeats one token as context, so every token except the first of a document
    is a target once. Rows with a prompt stay whole, and only the completion counts, with its stop token. If a prompt
    leaves too little room, it is cut from the left. If the completion alone is too long, the row is dropped. Both are
    counted and printed. kind: "text", "messages" or "prompt". name: of the data, for messages.
    Raises UserError if nothing is left.
    """
    dropped = cut = opened = 0
    if kind == "text":
        samples = [text_sample(tokenizer, d["text"]) for d in documents]
        rows = _fill(samples, max_length)
    else:
        samples = []
        for i, document in enumerate(documents):
            opened += _without_prompt(document)
            for prompt, completion in _turns(document):
                where = f"{name}, document {i + 1}"
                reason = document.get("finish_reason", "stop")
                sample, was_cut = completion_sample(tokenizer, prompt, completion, max_length, where, reason)
                cut += was_cut
                dropped += sample is None
                samples += [sample] if sample else []
        rows = _fit(samples, max_length)
    if not rows:
        raise UserError(
            f"{name}: nothing is left: {dropped} completions are longer than max_length = {max_length}, and {opened} "
            "messages of the assistant have nothing before them"
        )
    blocks = _stack(rows, max_length, tokenizer.pad_token_id)
    lost = f"; {dropped} dropped as too long, {cut} prompts cut" if dropped or cut else ""
    lost += f"; {opened} messages of the assistant left out, because nothing stands before them" if opened else ""
    unit = "documents" if kind == "text" else "completions"
    fill = int(blocks.tokens.sum()) / blocks.input_ids.numel()
    words = f"{name}: {len(samples):,} {unit}, {len(blocks):,} blocks of {max_length} tokens, {fill:.1%} full{lost}"
    say(fold(words))
    return blocks


def text_sample(tokenizer: PreTrainedTokenizerBase, text: str) -> Sample:
    """The `Sample` of a document with an end-of-sequence token at its end. Its bytes are the UTF-8 bytes of `text`."""
    ids: list[Any] = []
    sizes: list[Any] = []
    end = 0
    for some, spans in text_pieces(tokenizer, text):
        ends = np.maximum.accumulate(np.append(end, spans[:, 1]))  # a character of several tokens counts with the first
        codes = np.frombuffer(text[end : ends[-1]].encode("utf-32-le"), dtype=np.uint32)
        bytes_before = np.cumsum(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000))
        sizes.append(np.diff(np.append(0, bytes_before)[ends - end]).astype(np.int32))
        ids.append(np.array(readable(tokenizer, some.tolist()), dtype=np.int32))
        end = ends[-1]
    if ids[-1][-1] != tokenizer.eos_token_id:
        ids, sizes = [*ids, [tokenizer.eos_token_id]], [*sizes, [0]]
    all_ids, all_sizes = (np.concatenate(x, dtype=np.int32, casting="same_kind") for x in (ids, sizes))
    return Sample(all_ids, np.ones(len(all_ids), dtype=bool), all_sizes)


def completion_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    max_length: int,
    where: str,
    finish_reason: str = "stop",
) -> tuple[Sample | None, bool]:
    """(sample, whether the prompt was cut). (None, False) if the completion alone does not fit into max_length tokens.

    finish_reason, where, errors: see `encode`.
    """
    encoded = encode(tokenizer, prompt, completion, max_length, where, finish_reason=finish_reason)
    if encoded is None:
        return None, False
    kept, c, cut = encoded
    counts = np.array([False] * len(kept) + [True] * len(c))
    text = completion if isinstance(completion, str) else completion[0]["content"]
    sizes = np.zeros(len(counts), dtype=np.int64)
    sizes[-1] = len(text.encode())  # a row is never split: only the sum matters
    return Sample(np.array(kept + c), counts, sizes), cut


def gives_samples(tokenizer: PreTrainedTokenizerBase, document: dict, max_length: int) -> bool:
    """Whether anything of a document would count: not if each of its completions is too long, or has no prompt."""
    if "text" in document:
        return True
    turns = _turns(document)
    return any(completion_sample(tokenizer, p, c, max_length, "a document")[0] is not None for p, c in turns)


def _turns(document):
    """A list of (prompt, completion). A conversation gives one pair for each message of the assistant."""
    if "prompt" in document:
        return [(document["prompt"], document["completion"])]
    messages = document["messages"]
    return [(messages[:i], [m]) for i, m in enumerate(messages) if m["role"] == "assistant" and i]


def _without_prompt(document):
    """How many messages of the assistant nothing stands before: a conversation that it opens."""
    return int(document.get("messages", [{}])[0].get("role") == "assistant")


def _fill(samples, max_length):
    """Cut documents into pieces and put them into rows, one after the other. Every row except the last is full."""
    rows, room = [], 0
    for sample in samples:
        start = 0
        while start < len(sample) - 1:
            if room < 2:
                rows.append([])
                room = max_length
            piece = sample[start : start + room]
            rows[-1].append(piece)
            room -= len(piece)
            start += len(piece) - 1
    return rows


def _fit(samples, max_length):
    """Put whole samples into rows, the longest first, each into the row where it leaves the least room (best fit)."""
    rows, by_room = [], {}
    for sample in sorted(samples, key=len, reverse=True):
        room = next((r for r in range(len(sample), max_length) if by_room.get(r)), max_length)
        if room == max_length:
            rows.append([])
        row = by_room[room].pop() if room < max_length else rows[-1]
        row.append(sample)
        by_room.setdefault(room - len(sample), []).append(row)
    return rows


def _stack(rows, max_length, pad_id):
    shape = (len(rows), max_length)
    input_ids, position_ids = np.full(shape, pad_id, dtype=np.int32), np.zeros(shape, dtype=np.int32)
    mask, sizes, tokens = np.zeros(shape, dtype=bool), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for i, pieces in enumerate(rows):
        end = 0
        for piece in pieces:
            start, end = end, end + len(piece)
            input_ids[i, start:end] = piece.ids
            position_ids[i, start:end] = np.arange(len(piece))
            mask[i, start + 1 : end] = piece.counts[1:]  # no token before a sample's first token can predict it
            sizes[i] += piece.bytes[1:][piece.counts[1:]].sum()
        position_ids[i, end:] = np.arange(max_length - end)  # padding is a sample of its own
        tokens[i] = end
    mask = mask[:, 1:].copy()
    return Blocks(*(torch.from_numpy(x) for x in (input_ids, position_ids, mask, sizes, tokens)))
