"""Groups of completions: all completions of a prompt, their scores, and the sampler's log-prob of each token.

    python data/generate_preferences_multi.py
    python rlhf/grpo_train.py --config configs/grpo_offline.yaml     # learns from them, without a reward model

Unlike generate_preferences.py, this script keeps every completion. It writes data/groups.jsonl, one group per line:

- `prompt`, `chosen` (the best completion), `rejected` (a list of the others, from best to worst);
- `scores`, `completion_ids` (as sampled, with the stop token), `logprobs` (nats, one per id) and `finish_reasons`, each
  a list in the same order, the chosen completion first;
- `temperature`, and `policy` (the hash of the float32 weights of the sampling model).

Offline GRPO uses the stored log-probs as log pi_old (Shao et al. 2024, "DeepSeekMath", eq. 3). They belong to the
sampled ids, so the ids are stored, too: a text that is tokenised again may get other ids. If all scores of a group are
equal, every advantage is 0: the group is dropped and counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from configs.config import UserError, option
from data.preferences import (
    SamplingConfig,
    claim,
    data_option,
    load_task,
    messages,
    sample_and_score,
    save,
    show_match,
    summarise,
)
from data.rewards import in_numbers
from runtime.cli import cli
from runtime.console import say

if TYPE_CHECKING:
    from models.completions import Completion


@dataclass
class Config(SamplingConfig):
    CONFIG: ClassVar[str] = "configs/preferences_multi.yaml"
    samples_per_prompt: int = option(8, "completions sampled for each prompt: the size of a group", at_least=2)
    limit: int | None = option(240, "take only the first so many training prompts", at_least=1)
    out: str = option("data/groups.jsonl", "the file to write, one JSON object per line", identity=False)


def order_group(answers: list[Completion]) -> list[Completion]:
    """The completions from best to worst. Among equal scores: finish_reason "stop" first, then in sampling order."""
    return sorted(answers, key=lambda a: (-a.score, a.finish_reason != "stop"))


def main(config: Config) -> None:
    started = time.time()
    claim(config)

    # 1. a group of completions for each prompt, each with its score
    sampled = sample_and_score(config, load_task(config))

    # 2. keep the whole groups in which the scores differ
    rows, matches = [], []
    for prompt, answers in sampled:
        group = order_group(answers)
        if len(group) < 2:  # the others have no score
            continue
        chosen, rejected = group[0], group[1:]
        if chosen.score == rejected[-1].score:
            continue
        matches += [(prompt, chosen, r) for r in rejected if r.score < chosen.score]
        rows.append(
            {
                "prompt": messages("user", prompt["prompt"]),
                "chosen": messages("assistant", chosen.text),
                "rejected": [messages("assistant", r.text) for r in rejected],
                "scores": [a.score for a in group],
                "completion_ids": [a.ids for a in group],
                "logprobs": [[round(x, 6) for x in a.logprobs] for a in group],
                "finish_reasons": [a.finish_reason for a in group],
                "temperature": config.temperature,
                "policy": sampled.policy,
            }
        )
    if not rows:
        raise UserError(
            f"no group came out: for each of the {len(sampled.answers)} prompts all completions score the same"
            + (f", and {in_numbers(sampled.left_out)} have no score" if any(sampled.left_out.values()) else "")
        )

    # 3. numbers by which a person can judge the groups
    ties = len(sampled.answers) - len(rows)
    say(f"\n{len(rows)} groups of {len(sampled.answers)} prompts; dropped {ties} whose completions all score the same")
    say(f"the groups hold {len(matches):,} pairs of the chosen completion with one that scores less")
    summary = {"groups": len(rows), "prompts": len(sampled.answers), "ties_dropped": ties, "pairs": len(matches)}
    summary |= summarise(config, sampled, [(c, r) for _, c, r in matches])
    show_match(*matches[len(matches) // 2])
    following = "python rlhf/grpo_train.py --config configs/grpo_offline.yaml"
    following += data_option(config, "groups", Config.out)
    save(config, rows, sampled, summary, started, following)


if __name__ == "__main__":
    cli(main, Config)
