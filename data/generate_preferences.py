"""Preference pairs from a model's own completions: sample several per prompt, and pair the best with the worst.

    python data/generate_preferences.py
    python data/generate_preferences.py --model_name models/dpo --reward my_reward:reward --out data/mine.jsonl

Writes data/preferences.jsonl, one pair per line: `prompt`, `chosen` and `rejected` as messages, `chosen_score`,
`rejected_score`, and `chosen_finish_reason`, `rejected_finish_reason` ("stop": the model sampled the stop token;
"length": cut at max_new_tokens). rlhf/train_reward_model.py, rlhf/dpo_train.py and TRL read this file.

This is "best-of-n against worst-of-n" on-policy data (Pang et al. 2024, "Iterative Reasoning Preference Optimization",
section 2). If all completions of a prompt have the same score, the prompt is dropped and counted.
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
    CONFIG: ClassVar[str] = "configs/preferences.yaml"
    pairs_per_prompt: int = option(
        1, "pairs made of each prompt's completions, no completion in two of them", at_least=1
    )
    chosen_ended: bool = option(False, "choose only completions that ended by themselves, none that was cut")


def make_pairs(
    answers: list[Completion], pairs_per_prompt: int = 1, chosen_ended: bool = False
) -> list[tuple[Completion, Completion]]:
    """(chosen, rejected) completions: the k-th best with the k-th worst, as long as their scores differ.

    Among equal scores, completions with finish_reason "stop" come before cut completions, as chosen and as rejected. A
    trainer that adds a stop token to a cut text would teach the model to stop in the middle of a sentence. After that
    the order of sampling decides. Completions without text and copies of an earlier text are left out.
    chosen_ended: only completions with finish_reason "stop" are chosen. A cut one has no stop token, so DPO would learn
    to go on. As rejected, cut completions are as good as others then.
    """
    distinct = list({a.text: a for a in reversed(answers) if a.text}.values())[::-1]
    ended = [a for a in distinct if a.finish_reason == "stop" or not chosen_ended]
    best = sorted(ended, key=lambda a: (-a.score, a.finish_reason != "stop"))
    worst = sorted(distinct, key=lambda a: (a.score, a.finish_reason != "stop" and not chosen_ended))
    return [(c, r) for c, r in zip(best, worst) if c.score > r.score][:pairs_per_prompt]


def main(config: Config) -> None:
    started = time.time()
    claim(config)

    # 1. several completions for each prompt, each with its score
    sampled = sample_and_score(config, load_task(config))

    # 2. the best against the worst
    rows, matches = [], []
    ties = 0
    for prompt, answers in sampled:
        pairs = make_pairs(answers, config.pairs_per_prompt, config.chosen_ended)
        ties += not pairs
        for chosen, rejected in pairs:
            matches.append((prompt, chosen, rejected))
            rows.append(
                {
                    "prompt": messages("user", prompt["prompt"]),
                    "chosen": messages("assistant", chosen.text),
                    "rejected": messages("assistant", rejected.text),
                    "chosen_score": chosen.score,
                    "rejected_score": rejected.score,
                    "chosen_finish_reason": chosen.finish_reason,
                    "rejected_finish_reason": rejected.finish_reason,
                }
            )
    if not rows:
        none = ", or none with a higher score ended by itself (chosen_ended)" if config.chosen_ended else ""
        raise UserError(
            f"no pair came out: for each of the {len(sampled.answers)} prompts all completions score the same{none}"
            + (f", and {in_numbers(sampled.left_out)} have no score" if any(sampled.left_out.values()) else "")
        )

    # 3. numbers by which a person can judge the pairs
    say(f"\n{len(rows)} pairs of {len(sampled.answers)} prompts; dropped {ties} without two scores")
    summary = {"pairs": len(rows), "prompts": len(sampled.answers), "ties_dropped": ties}
    summary |= summarise(config, sampled, [(c, r) for _, c, r in matches])
    show_match(*matches[len(matches) // 2])
    following = "python rlhf/train_reward_model.py" + data_option(config, "data", Config.out)
    save(config, rows, sampled, summary, started, following)


if __name__ == "__main__":
    cli(main, Config)
