"""Compare a PPO model with its base: one completion of each with the reward model's score, and the KL to the base.

    python inference/ppo_inference.py                                       # models/ppo and its reward model
    python inference/ppo_inference.py --reward_model models/reward --limit 20
    python inference/ppo_inference.py --reward my_reward:reward             # scored by a reward function

PPO maximises the score minus kl_coef * KL (Stiennon et al. 2020, section 3.4). The KL of a completion is estimated from
its own tokens, as in the training log: the sum of k3 = exp(-d) - 1 + d with d = log pi - log pi_ref, in nats.
If a prompt has checks, the script also prints the share that a completion passes (the gold score). If the score of the
reward model (the proxy) rises and the gold score does not, the policy exploits errors of the reward model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from configs.config import UserError, option, read_yaml
from data.checks import score
from data.rewards import RewardConfig, columns_of, in_numbers, reward_functions
from data.rows import text_of
from models.completions import lengths, mean, show_completion, show_table, write_rows
from models.loader import same_tokens
from rlhf.reward_model import RewardModel
from rlhf.side_by_side import CompareConfig, SideBySide, run_folder, run_value
from rlhf.utils import kl_estimate, score_completions
from runtime.cli import cli
from runtime.console import fold, say


@dataclass
class Config(RewardConfig, CompareConfig):
    ONE_OF: ClassVar[tuple] = ("reward", "reward_model")
    model_name: str = option("models/ppo", "the folder of a PPO run")
    reward_model: str | None = option(None, "folder of the reward model; none: the run's own, or its reward functions")

    def check(self):
        RewardConfig.check(self)
        CompareConfig.check(self)
        if self.reward and self.reward_model:
            raise UserError("reward and reward_model both score the completions: give one of them")


def main(config):
    both = SideBySide(config, made_by="python rlhf/ppo_train.py")
    score_all = scorer(config, both)

    # 1. a completion of each model for each prompt
    own, base = both.answers()

    # 2. the score of each completion; None where the reward functions give none
    scores, base_scores = score_all(own), score_all(base)

    # 3. the KL to the base on the model's completions
    logprobs, ref_logprobs = both.logprobs(own)
    kl = [kl_estimate(torch.tensor(a), torch.tensor(b), "k3").sum().item() for a, b in zip(logprobs, ref_logprobs)]

    rows = []
    for i, (row, [a], [b]) in enumerate(zip(both.rows, own, base)):
        say("\n" + fold(f"{i + 1}. {text_of(row['prompt'])}"))
        show_completion(both.name, a, f"score {shown_score(scores[i])} | kl {kl[i]:.2f}" + gold(row, a))
        show_completion(both.base, b, f"score {shown_score(base_scores[i])}" + gold(row, b))
        rows.append(
            {
                "prompt": row["prompt"],
                "completion": a.text,
                "score": scores[i],
                "kl": kl[i],
                "base_completion": b.text,
                "base_score": base_scores[i],
            }
        )
    say(f"\nmeans over {len(rows)} completions each; kl to the base in nats per sequence")
    show_table(
        ["completions of", "score", "kl", "tokens", "ended"],
        [
            [both.name, mean_score(scores), mean(kl), *lengths(own)],
            [both.base, mean_score(base_scores), 0.0, *lengths(base)],
        ],
    )
    write_rows(config.out, rows)


def scorer(config, both):
    """A function from the completions of a model to their scores: by what the options name, else by the run's own."""
    if not (config.reward or config.reward_model):
        path = both.folder / "config.yaml"
        run = read_yaml(path) if path.is_file() else {}
        config = replace(config, **{key: run.get(key) for key in ("reward", "reward_weights")})
    reward = reward_functions(config)
    if reward:
        reward.check_columns(both.rows)
        columns = [columns_of(row) for row in both.rows]

        def by_function(groups):
            found = reward(both.prompts, [a.text for [a] in groups], columns, [a.ids for [a] in groups])
            if any(found.left_out.values()):
                say(f"{in_numbers(found.left_out)} have no score")
            return found.values

        return by_function
    folder = run_folder(
        config.reward_model or run_value(both.folder, "reward_model"), made_by="python rlhf/train_reward_model.py"
    )
    reward_model = RewardModel.load(folder, dtype=both.dtype, device=both.device)
    same_tokens(both.tokenizer, folder)
    return lambda groups: score_completions(reward_model, *both.ids(groups), both.tokenizer.pad_token_id)


def shown_score(value):
    return "-" if value is None else f"{value:+.2f}"


def mean_score(values):
    known = [value for value in values if value is not None]
    return mean(known) if known else "-"


def gold(row, answer):
    return f" | gold {score(answer.text, row['checks'], row['prompt']):.2f}" if row.get("checks") else ""


if __name__ == "__main__":
    cli(main, Config)
