"""Token records: a few sequences of a training step, token by token, in tokens.jsonl for report/token_view.py.

With `--keep_tokens N` a script keeps N sequences at STEPS steps of the run, evenly spaced from the first to the last
one. Which steps these are depends on the length of the run alone, so a resumed run keeps the same ones. Without the
option nothing is computed. With it, nothing changes in a run: what is computed here has no gradient and draws no random
numbers. Under torchrun, process 0 keeps sequences of its own share of the step; the others are not asked.
"""

from __future__ import annotations

import torch

from models.fast.head import output_head
from models.tokens import special_ids, token_texts
from train.packed import block_states

STEPS = 5  # steps of a run
LONGEST = 512  # tokens of a prompt (its end), and of a sequence (its beginning)


def kept_steps(total_steps):
    """The steps of which tokens are kept, as a set: `STEPS` of them, or all if there are fewer."""
    gaps = min(STEPS, total_steps) - 1
    return {1 + round(i * (total_steps - 1) / max(gaps, 1)) for i in range(gaps + 1)}


class TokenRecords:
    """What a run keeps of its tokens. `count` is the number of sequences (LM, PPO, GRPO) or pairs of a kept step."""

    def __init__(self, run, tokenizer):
        self.run, self.tokenizer, self.count = run, tokenizer, run.config.keep_tokens

    def due(self, step):
        """Whether this process keeps tokens of `step`. Once a step: one that overflowed in fp16 comes again."""
        if not self.count or not self.run.is_main:
            return False
        return step > self.run.kept_step and step in kept_steps(self.run.total_steps)

    def prompt(self, ids):
        """The last `LONGEST` tokens of a prompt."""
        return self._tokens(ids[-LONGEST:], len(ids))

    def sequence(self, name, ids, numbers, scores, **more):
        """The first `LONGEST` tokens of a sequence, as a dict.

        numbers: {name: a number per token}. scores: {name: a number of the whole sequence}.
        """
        numbers = {key: [rounded(x) for x in values[:LONGEST]] for key, values in numbers.items()}
        scores = {key: rounded(x) for key, x in scores.items()}
        return {"name": name, **self._tokens(ids[:LONGEST], len(ids)), "numbers": numbers, "scores": scores, **more}

    def _tokens(self, ids, length):
        special = special_ids(self.tokenizer)
        places = [place for place, i in enumerate(ids) if i in special]
        return {"ids": ids, "texts": token_texts(self.tokenizer, ids), "special": places, "length": length}


def rounded(x):
    """A number with six digits after the point; bools and whole numbers as they are, None for one that is not finite.

    JSON knows no inf and no NaN.
    """
    if not isinstance(x, float):
        return x
    return round(x, 6) if abs(x) < float("inf") else None


@torch.no_grad()
def keep_rows(step, start, micro_batches, updates):
    """Keep the first blocks of a step of language-model training, before the update. start: the run's `Start`.

    The loss of a batch is one number, so their tokens are computed here once more: with the weights, the precision and
    the head of the loss, but without dropout. A token has `logprob` in nats, `rank` (1: no other token was more
    probable) and `entropy` of the distribution in nats; the first token of each packed sample has none.
    """
    records = TokenRecords(updates.run, start.tokenizer)
    if not records.due(step):
        return
    model, rows = start.model, [row for rows in micro_batches for row in rows][: records.count]
    was_training = model.training
    model.eval()
    groups = []
    for row in rows:
        batch = start.blocks.batch([row], next(model.parameters()).device)
        length = int(start.blocks.tokens[row])
        ids, positions = batch["input_ids"][0], batch["position_ids"][0]
        head = output_head(model)
        with updates.forward():
            hidden = block_states(model, batch["input_ids"], batch["position_ids"])[0, :-1][: LONGEST - 1]
            log_p = head.logits(hidden).log_softmax(-1)  # (T-1, V)
        logprobs = log_p.gather(-1, ids[1 : len(log_p) + 1, None])
        found = {
            "logprob": logprobs[:, 0],
            "rank": (log_p > logprobs).sum(-1) + 1,
            "entropy": -(log_p.exp() * log_p).sum(-1),
        }
        inside = (positions[1:] > 0).tolist()
        numbers = {
            key: [None, *(x if seen else None for x, seen in zip(values.tolist(), inside))]
            for key, values in found.items()
        }
        mask = [0, *batch["mask"][0].int().tolist()][:length]
        counted = [x for x, counts in zip(numbers["logprob"], mask) if counts]
        scores = {"loss": -sum(counted) / len(counted)} if counted else {}
        first = [place for place in range(min(length, LONGEST)) if positions[place] == 0]
        numbers = {"mask": mask, **{key: values[:length] for key, values in numbers.items()}}
        sequence = records.sequence(f"block {row}", ids[:length].tolist(), numbers, scores, first=first)
        groups.append({"sequences": [sequence]})
    model.train(was_training)
    updates.run.keep_tokens(step, groups)
