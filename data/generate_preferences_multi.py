"""Groups with several rejections: all completions to a prompt, their scores, and what the sampler knew of each token.

    python data/generate_preferences_multi.py
    python rlhf/grpo_train.py --config configs/grpo_offline.yaml     # learns from them, without a reward model

It adds to generate_preferences.py that no completion is thrown away. Writes data/groups.jsonl, one group a line: `prompt`,
`chosen` (the best), `rejected` (a list, the others from best to worst), `scores` (chosen first), and in the same order
`completion_ids` (as sampled, the stop token included), `logprobs` (nats, of each id), `finish_reasons`; `temperature`;
`policy` (the hash of the weights that answered, in float32).

Offline GRPO takes the stored log-probs as log pi_old (Shao et al. 2024, "DeepSeekMath", eq. 3): that is why the ids are
kept, and never a text that would be tokenised again. A group whose scores are all equal has no advantage to learn from:
it is dropped and counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

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
from runtime.cli import cli
from runtime.console import say


@dataclass
class Config(SamplingConfig):
    CONFIG: ClassVar[str] = "configs/preferences_multi.yaml"
    samples_per_prompt: int = option(8, "completions sampled for each prompt: the size of a group", at_least=2)
    limit: int | None = option(240, "take only the first so many training prompts", at_least=1)
    out: str = option("data/groups.jsonl", "the file to write, one JSON object a line")


def order_group(answers):
    """The completions from best to worst; among equal scores those that ended by themselves first, then as sampled."""
    return sorted(answers, key=lambda a: (-a.score, a.finish_reason != "stop"))


def main(config):
    started = time.time()
    claim(config)

    # 1. a group of completions for each prompt, each with its score
    sampled = sample_and_score(config, load_task(config))

    # 2. keep the groups in which the scores differ, whole
    rows, matches = [], []
    for prompt, answers in sampled:
        group = order_group(answers)
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
        )

    # 3. what a person needs to trust them
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
