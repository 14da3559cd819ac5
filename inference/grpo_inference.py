"""Compare a GRPO model with its base: a group of completions per prompt, their rewards, mean@k and best@k.

    python inference/grpo_inference.py                                      # models/grpo, 8 completions a prompt
    python inference/grpo_inference.py --prompt "Tell me a joke." --reward my_reward:reward

mean@k is the mean reward of k sampled completions; GRPO maximises it. best@k is the reward of the best of them. If
mean@k rises and best@k does not, training made completions more likely that the base can already sample (Shao et al.
2024, "DeepSeekMath", section 5.2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.config import UserError, option
from data.preferences import score_answers
from data.rewards import RewardConfig, in_numbers, reward_functions
from data.rows import text_of
from models.completions import lengths, mean, show_table, write_rows
from rlhf.side_by_side import CompareConfig, SideBySide
from runtime.cli import cli
from runtime.console import clip, fold, say


@dataclass
class Config(RewardConfig, CompareConfig):
    model_name: str = option("models/grpo", "the folder of a GRPO run")
    limit: int = option(6, "how many of the file's prompts", at_least=1)
    samples_per_prompt: int = option(8, "completions to each prompt: the k of mean@k and best@k", at_least=2)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the weights")

    def check(self):
        RewardConfig.check(self)
        CompareConfig.check(self)


def mean_at_k(group):
    return mean(answer.score for answer in group)


def best_at_k(group):
    return max(answer.score for answer in group)


def main(config):
    reward = reward_functions(config)
    both = SideBySide(config, made_by="python rlhf/grpo_train.py", need_checks=reward is None, reward=reward)
    k = config.samples_per_prompt

    # 1. a group of completions of each model for each prompt
    own, base = both.answers(k)

    # 2. the reward of each completion
    (own, left_out), (base, base_left_out) = (score_answers(both.rows, groups, reward) for groups in (own, base))

    rows = []
    for number, (prompt, group, base_group) in enumerate(zip(both.prompts, own, base), 1):
        say("\n" + fold(f"{number}. {text_of(prompt)}"))
        for a in group:
            text = " ".join(a.text.split())
            say(f"  {a.score:.2f} | {clip(text, 71)}")
        for name, g in ((both.name, group), (both.base, base_group)):
            if g:  # else no completion has a reward
                say(f"  {name}: mean@{k} {mean_at_k(g):.2f}, best@{k} {best_at_k(g):.2f}")
        rows.append(
            {
                "prompt": prompt,
                "completions": [a.text for a in group],
                "rewards": [a.score for a in group],
                "base_completions": [a.text for a in base_group],
                "base_rewards": [a.score for a in base_group],
            }
        )

    # 3. mean@k and best@k over the prompts
    for name, numbers in ((both.name, left_out), (both.base, base_left_out)):
        if any(numbers.values()):
            say(f"\n{name}: {in_numbers(numbers)} have no reward and are left out")
    own, base = ([group for group in groups if group] for groups in (own, base))
    for name, groups in ((both.name, own), (both.base, base)):
        if not groups:
            raise UserError(f"no reward function gave a reward to a completion of {name}: all returned None")
    say(f"\nmeans over {len(rows)} prompts")
    show_table(
        ["completions of", f"mean@{k}", f"best@{k}", "tokens", "ended"],
        [
            [name, mean(map(mean_at_k, groups)), mean(map(best_at_k, groups)), *lengths(groups)]
            for name, groups in ((both.name, own), (both.base, base))
        ],
    )
    write_rows(config.out, rows)


if __name__ == "__main__":
    cli(main, Config)
