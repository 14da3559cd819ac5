"""Token records of rollouts and of pairs, for report/token_view.py. See train/token_records.py."""

from __future__ import annotations

import torch

from train.token_records import TokenRecords


def chosen_rows(rollout, count):
    """The rows of a rollout to keep, at most `count`: a list of (all rows of a group, those to keep).

    Groups whose rewards differ come first, because only they say which completion is better. Of a group with more rows
    than there is room for, those with the highest and the lowest rewards are kept.
    """
    groups = [rows for rows in rollout.grouped(list(range(len(rollout.prompts)))) if rows]
    found, room = [], count
    for rows in sorted(groups, key=lambda rows: len({rollout.rewards[i] for i in rows}) == 1):
        best_first = sorted(rows, key=lambda i: -rollout.rewards[i])
        high, low = (room + 1) // 2, room // 2
        kept = sorted(rows if len(rows) <= room else best_first[:high] + best_first[len(rows) - low :])
        room -= len(kept)
        if kept:
            found.append((rows, kept))
    return found


class RolloutRecords:
    """The token records of PPO and GRPO: `add` after each loss, `write` at the end of a step."""

    def __init__(self, run, tokenizer):
        self.records, self.run = TokenRecords(run, tokenizer), run
        self.seen = []  # of the step: (batch, {name: (N, L)}), in the order of the losses

    def add(self, step, batch, **numbers):
        """Remember what the loss of a batch was computed from: tensors (N, L). Only if tokens of `step` are kept."""
        if self.records.due(step):
            self.seen.append((batch, numbers))

    def write(self, step, rollout, measure):
        """Keep the first and the last pass over some completions of the step.

        measure: a function of a batch and its numbers, which returns ({name: (N, L)}, {name: (N,)}): what is kept of
        each token and of each completion. Completions that no batch computes, because nothing would be learned from
        them, have only what the sampler knows.
        """
        if not self.records.due(step):
            return
        passes = {}  # row: [(measured, its place in the batch), ...], one for each inner epoch
        for batch, numbers in self.seen:
            measured = measure(batch, **numbers)
            for place, row in enumerate(batch.rows):
                passes.setdefault(row, []).append((measured, place))
        self.seen, kept = [], chosen_rows(rollout, self.records.count)
        last = self.run.config.inner_epochs
        groups = []
        for epoch in sorted({1, last}):
            for rows, some in kept:
                names = [f"completion {rows.index(row) + 1}" for row in some]
                sequences = [self._completion(rollout, row, passes.get(row), epoch, n) for row, n in zip(some, names)]
                group = {"inner_epoch": epoch, "group_size": len(rows)}
                prompt = self.records.prompt(rollout.prompts[rows[0]])
                groups.append({**group, "prompt": prompt, "sequences": sequences})
        self.run.keep_tokens(step, groups)

    def _completion(self, rollout, row, passes, epoch, name):
        ids = rollout.completions[row]
        scores = {"reward": rollout.rewards[row]} | ({"gold": rollout.gold[row]} if rollout.gold else {})
        numbers = {"mask": [int(bool(passes))] * len(ids)}
        if rollout.logprobs:
            numbers["sampler_logprob"] = rollout.logprobs[row]
        if passes:
            (of_tokens, of_sequences), place = passes[epoch - 1]
            numbers |= {name: values[place, : len(ids)].tolist() for name, values in of_tokens.items()}
            scores |= {name: values[place].item() for name, values in of_sequences.items()}
        return self.records.sequence(name, ids, numbers, scores, finish_reason=rollout.finish_reasons[row])


class PairRecords:
    """The token records of DPO and of the reward model."""

    def __init__(self, run, tokenizer, pairs):
        self.records, self.run, self.pairs = TokenRecords(run, tokenizer), run, pairs

    def write(self, step, measure):
        """Keep the first pairs of this process's share of the step, before its update.

        A loss takes one number of each completion, so the pairs are computed here once more, on the same weights.
        measure: a function of a list of pairs, which returns ({name: (2B, L)}, {name: (2B,)}, {name: (B,)}): what is
        kept of each token, each completion (chosen, rejected, chosen, ...) and each pair.
        """
        if not self.records.due(step):
            return
        pairs = self.pairs.mine(step)[: self.records.count]
        with torch.no_grad():
            of_tokens, of_sequences, of_pairs = measure(pairs)
        groups = []
        for i, pair in enumerate(pairs):
            sequences = []
            for place, name in ((2 * i, "chosen"), (2 * i + 1, "rejected")):
                ids = pair[name]
                numbers = {key: values[place, : len(ids)].tolist() for key, values in of_tokens.items()}
                scores = {key: values[place].item() for key, values in of_sequences.items()}
                sequences.append(self.records.sequence(name, ids, {"mask": [1] * len(ids), **numbers}, scores))
            scores = {key: values[i].item() for key, values in of_pairs.items()}
            prompt = self.records.prompt(pair["prompt"])
            groups.append({"prompt": prompt, "source": pair["where"], "scores": scores, "sequences": sequences})
        self.run.keep_tokens(step, groups)
