"""A prompt and a completion as token ids that fit into a row: for language-model training and for preferences alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from configs.config import UserError
from models.tokens import completion_ids, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    prompt: list[int]
    completion: list[int]  # with the stop token, if the completion ended by itself
    cut: bool  # whether the beginning of the prompt is missing


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[dict],
    completion: str | list[dict],
    max_length: int,
    where: str,
    truncation: str = "left",
    finish_reason: str = "stop",
) -> Encoded | None:
    """The ids of a prompt and a completion, at most max_length tokens together. None if the row is dropped.

    finish_reason: "length" for a completion that was cut at a length limit. It gets no stop token, because the model
    would learn to stop in the middle of a text.
    truncation: if both do not fit, "left" cuts the prompt from the left, and "drop" drops the row. A completion is
    never cut: if it is longer than max_length - 1, the row is dropped in both cases.
    Raises UserError, naming `where`, for an empty prompt or completion, and for one of the wrong form.
    """
    try:
        p, c = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not p:
        raise UserError(f"{where}: the prompt is empty")
    if len(c) < 2:
        raise UserError(f"{where}: a completion is empty: nothing of this row would be learned")
    c = c if finish_reason == "stop" else c[:-1]
    cut = len(p) + len(c) > max_length
    if cut:
        if truncation == "drop" or len(c) >= max_length:
            return None
        p = p[len(p) + len(c) - max_length :]
    return Encoded(p, c, cut)
