"""BERTScore (Zhang et al. 2020): how well the tokens of two texts match, by the states of an encoder.

Each token of one text takes the token of the other whose state has the highest cosine with its own. Precision is the
mean over the tokens of the candidate, recall over those of the reference. The marks at the ends of a text may be taken,
but do not count themselves. No weights by frequency and no rescaling; values of one encoder compare only with its own.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from models.fetch import fetch_source

AT_ONCE = 64


@torch.no_grad()
def bert_scores(candidates: list[str], references: list[str], folder: Path | None = None) -> list[tuple]:
    """(precision, recall, F1) of each candidate against its reference. A text without tokens scores 0.

    folder: of the encoder; default: MiniLM.
    """
    folder = folder or fetch_source("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found: list[tuple] = []
    for start in range(0, len(candidates), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found += _scores(tokenizer, encoder, candidates[part], references[part])
    return found


def _scores(tokenizer, encoder, candidates, references):
    rows = []
    for (mine, inner), (other, other_inner) in zip(
        states(tokenizer, encoder, candidates), states(tokenizer, encoder, references), strict=True
    ):
        if not inner.any() or not other_inner.any():
            rows.append((0.0, 0.0, 0.0))
            continue
        cosines = mine @ other.T  # (tokens of the candidate, tokens of the reference)
        precision = cosines.amax(1)[inner].mean().item()
        recall = cosines.amax(0)[other_inner].mean().item()
        rows.append((precision, recall, 2 * precision * recall / (precision + recall)))
    return rows


def states(tokenizer, encoder, texts):
    """(states (T, H) of length 1, which of them are of the text itself and not a mark (T,)) of each text."""
    batch = tokenizer(
        [text.strip() for text in texts], padding=True, truncation=True, max_length=tokenizer.model_max_length,
        return_tensors="pt", return_special_tokens_mask=True,
    )  # fmt: skip
    special = batch.pop("special_tokens_mask").bool()
    hidden = torch.nn.functional.normalize(encoder(**batch).last_hidden_state, dim=-1)
    real = batch["attention_mask"].bool()
    return [(row[there], ~marks[there]) for row, there, marks in zip(hidden, real, special)]
