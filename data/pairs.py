"""Preference data from JSONL or a hub dataset: read it, check it, and turn it into token ids.

Prompts and completions are plain texts or lists of messages.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.config import UserError
from data.corpus import FINISH_REASONS, finish_reason_of
from data.encoding import encode
from data.order import in_batches
from data.rows import in_one_form, read_rows, text_of
from models.tokens import completion_ids, prompt_ids
from runtime.console import fold, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def split_prompt(row: dict) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a pairwise row; without a `prompt`, it is what both sides begin with."""
    row = in_one_form(row)
    for key in ("chosen", "rejected"):
        if key not in row:
            raise UserError(f"{row['where']}: has no {key!r}. A row is prompt, chosen, rejected; it has {_keys(row)}")
    if "prompt" not in row:
        raise UserError(
            f"{row['where']}: has no 'prompt', and chosen and rejected begin differently. A row is prompt, chosen, "
            f"rejected; it has {_keys(row)}"
        )
    return row["prompt"], row["chosen"], row["rejected"]


def _keys(row):
    return ", ".join(k for k in row if k != "where")


def load_pairs(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int, truncation: str = "left"
) -> tuple[list[dict], dict[str, int], str]:
    """(pairs, counts, hash of the data).

    counts: {"dropped": rows dropped as too long, "cut": prompts cut, "equal": rows whose completions are equal}.
    A pair is a dict {prompt, chosen, rejected: token ids, margin, text, where}. Both completions have the same prompt
    ids. A completion whose `chosen_finish_reason` or `rejected_finish_reason` is "length" has no stop token.
    Raises UserError for a bad row, and if no row is left.
    """
    rows, digest = read_rows(source, made_by="python data/generate_preferences.py")
    pairs, counts = [], {"dropped": 0, "cut": 0, "equal": 0}
    for row in rows:
        prompt, chosen, rejected = split_prompt(row)
        where = row["where"]
        a, b = (
            encode(tokenizer, prompt, row_answer, max_length, where, truncation, finish_reason_of(row, key, where))
            for key, row_answer in (("chosen", chosen), ("rejected", rejected))
        )
        if a is None or b is None:
            counts["dropped"] += 1
            continue
        if a.completion == b.completion:  # nothing can be preferred: the loss would stay at ln 2
            counts["equal"] += 1
            continue
        prompt_tokens = min(a.prompt, b.prompt, key=len)
        counts["cut"] += a.cut or b.cut
        margin = _margin(row)
        text = {"prompt": text_of(prompt), "chosen": text_of(chosen), "rejected": text_of(rejected)}
        ids = {"prompt": prompt_tokens, "chosen": a.completion, "rejected": b.completion}
        pairs.append(ids | {"margin": margin, "text": text, "where": where})
    if not pairs:
        raise UserError(
            f"{source}: no row is left: of {len(rows)} rows {counts['dropped']} are longer than max_length = "
            f"{max_length}, and in {counts['equal']} chosen and rejected are equal"
        )
    return pairs, counts, digest


def _margin(row):
    scores = row.get("chosen_score"), row.get("rejected_score")
    if None in scores:
        return None
    if not all(map(_is_number, scores)):
        raise UserError(f"{row['where']}: chosen_score and rejected_score must be finite numbers, not {scores}")
    return float(scores[0]) - float(scores[1])


def _is_number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def count_steps(config: Any, pairs: list[dict]) -> int:
    """The number of optimizer steps of a run on `pairs` pairs. Raises UserError if batch_size is larger than that."""
    if config.batch_size > pairs:
        raise UserError(f"batch_size = {config.batch_size}: there are only {pairs} pairs to train on; set at most that")
    steps = pairs * config.epochs // config.batch_size
    return min(steps, config.max_steps or steps)


def split_by_prompt(rows: list[dict], fraction: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, heldout). Rows of the same prompt stay on one side; a hash of the prompt and the seed decides.

    If this leaves one side empty (few prompts), one prompt goes there. If all rows have one prompt, they are split by
    their completions. Raises UserError if one side stays empty and `fraction` is not 0: all rows are equal.
    """
    import hashlib

    def place(row, keys=("prompt",)):
        key = ":".join([str(seed), *(row["text"][name] for name in keys)]).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64

    places = [place(row) for row in rows]
    if fraction and len(set(places)) == 1:
        places = [place(row, ("prompt", "chosen", "rejected")) for row in rows]
    limit = fraction
    if fraction and len(set(places)) > 1:  # at least the smallest is held out, and never the largest
        second, largest = sorted(set(places))[1], max(places)
        limit = min(fraction, largest) if min(places) < fraction else second
    train = [row for row, at in zip(rows, places) if at >= limit]
    heldout = [row for row, at in zip(rows, places) if at < limit]
    if fraction and (not train or not heldout):
        raise UserError(
            f"heldout_fraction = {fraction}: leaves {len(train)} training and {len(heldout)} held-out rows, because "
            "there is one row, or all are equal. --heldout_fraction 0 trains on all where the script takes it"
        )
    return train, heldout


def load_groups(source: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[dict], str]:
    """(groups, hash of the data). The chosen completion comes first in its group, then the rejected ones.

    A group is a dict {prompt: ids, completions: list of ids, logprobs: list of lists in nats or None, scores,
    finish_reasons, temperature, policy, text, where}. A row with `completion_ids` and `logprobs` gives exactly the
    sampled ids. A row without them is tokenised from its texts, and its logprobs are None; a completion that the row's
    `finish_reasons` call "length" then has no stop token. finish_reasons: a list of "stop" and "length", or None.
    Raises UserError for a bad row, and if only some rows have logprobs.
    """
    rows, digest = read_rows(source, made_by="python data/generate_preferences_multi.py")
    groups = []
    for row in rows:
        where = row["where"]
        prompt, chosen, rejected = split_prompt(row)
        if not isinstance(rejected, list) or not rejected or any(isinstance(a, dict) for a in rejected):
            raise UserError(f"{where}: 'rejected' must be a list of completions, as in groups.jsonl; pairs are for DPO")
        answers = [chosen, *rejected]
        scores = row.get("scores", [1.0] + [0.0] * len(rejected))
        if not isinstance(scores, list) or not all(map(_is_number, scores)):
            raise UserError(f"{where}: scores must be a list of finite numbers, not {scores}")
        if len(scores) != len(answers):
            raise UserError(
                f"{where}: {len(scores)} scores for {len(answers)} completions (chosen first, then rejected)"
            )
        reasons = row.get("finish_reasons")
        if reasons is not None and not (
            isinstance(reasons, list) and len(reasons) == len(answers) and all(x in FINISH_REASONS for x in reasons)
        ):
            raise UserError(
                f"{where}: finish_reasons must be a list with stop or length for each of {len(answers)} completions"
            )
        temperature = row.get("temperature", 1.0)
        if not _is_number(temperature) or temperature <= 0:
            raise UserError(f"{where}: temperature must be a number above 0, not {temperature!r}")
        try:
            p, encoded = prompt_ids(tokenizer, prompt), [completion_ids(tokenizer, a) for a in answers]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        ids, logprobs = row.get("completion_ids"), row.get("logprobs")
        if ids is None:
            cut = [reason == "length" for reason in reasons or ["stop"] * len(answers)]
            ids, logprobs = [c[:-1] if is_cut else c for c, is_cut in zip(encoded, cut)], None
        if not _lists_of(ids, lambda i: isinstance(i, int) and i >= 0):
            raise UserError(f"{where}: completion_ids must be lists of token ids, whole numbers from 0 on")
        if logprobs is not None and not _lists_of(logprobs, _is_number):
            raise UserError(f"{where}: logprobs must be lists of finite numbers, one for each of completion_ids")
        if len(ids) != len(answers) or (logprobs is not None and [len(x) for x in logprobs] != [len(x) for x in ids]):
            raise UserError(f"{where}: completion_ids and logprobs must have one list a completion, of equal lengths")
        if any(not c for c in ids):
            raise UserError(f"{where}: a completion has no tokens")
        if max(max(c) for c in ids) >= len(tokenizer):
            raise UserError(
                f"{where}: completion_ids hold {max(max(c) for c in ids)}, and the tokenizer has {len(tokenizer)} ids: "
                "another model sampled them"
            )
        if len(p) + max(map(len, ids)) > max_length:
            raise UserError(f"{where}: {len(p) + max(map(len, ids))} tokens do not fit into max_length = {max_length}")
        groups.append(
            {
                "prompt": p,
                "completions": ids,
                "logprobs": logprobs,
                "scores": [float(s) for s in scores],
                "finish_reasons": reasons,
                "temperature": float(temperature),
                "policy": row.get("policy"),
                "text": {"prompt": text_of(prompt), "completions": [text_of(a) for a in answers]},
                "where": where,
            }
        )
    lacking = [group for group in groups if group["logprobs"] is None]
    if 0 < len(lacking) < len(groups):
        raise UserError(f"{lacking[0]['where']}: has no logprobs, and other rows have them; a file holds one kind")
    return groups, digest


def _lists_of(value, good):
    return isinstance(value, list) and all(isinstance(x, list) and all(map(good, x)) for x in value)


def describe_pairs(train: list[dict], heldout: list[dict], counts: dict[str, int]) -> None:
    """Print the numbers of pairs, their lengths in tokens, and how often the chosen completion is longer."""
    lengths = sorted(len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in train)
    longer = sum(len(p["chosen"]) > len(p["rejected"]) for p in train) / len(train)
    words = (
        f"{len(train)} pairs to train on, {len(heldout)} held out by prompt; {counts['dropped']} dropped as too long, "
        f"{counts['equal']} because both sides are equal, {counts['cut']} prompts cut; "
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]} tokens; "
        f"the chosen completion is the longer one in {longer:.0%}"
    )
    say(fold(words))


def pair_length(pair: dict) -> int:
    """The number of tokens computed for a pair: its prompt once, and both completions."""
    return len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"])


def batches_by_length(pairs: list[dict], size: int) -> list[list[dict]]:
    """Lists of `size` pairs, sorted by length, so that a batch has little padding."""
    return in_batches(sorted(pairs, key=pair_length), size)
