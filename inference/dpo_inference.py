"""Compare a DPO model with its base: one completion of each, and the implicit rewards of both completions.

    python inference/dpo_inference.py                                       # models/dpo on held-out prompts
    python inference/dpo_inference.py --prompt "Why is the sky blue?"

A DPO model is also a reward model (Rafailov et al. 2023, eq. 5, up to a constant per prompt). The implicit reward of
completion y of prompt x is beta * (log pi(y|x) - log pi_ref(y|x)), the sum over the tokens of y (for IPO: their mean).
It shows which completions training made more probable, and by how much. The expected implicit reward of the model's own
completions is beta * KL(pi || pi_ref), which is never negative. For completions of the base it is never positive.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.config import option
from data.rows import text_of
from models.completions import lengths, mean, show_completion, show_table, write_rows
from rlhf.side_by_side import CompareConfig, SideBySide, run_value
from runtime.cli import cli
from runtime.console import fold, say


@dataclass
class Config(CompareConfig):
    model_name: str = option("models/dpo", "the folder of a DPO run")
    beta: float | None = option(None, "of the implicit reward; none: the run's own", above=0)


def implicit_reward(logprobs, ref_logprobs, beta, per_token=False):
    """beta * log(pi / pi_ref) of one completion. logprobs, ref_logprobs: lists of nats, one per token.

    per_token: the mean over the tokens instead of the sum.
    """
    total = sum(logprobs) - sum(ref_logprobs)
    return beta * (total / len(logprobs) if per_token else total)


def main(config):
    both = SideBySide(config, made_by="python rlhf/dpo_train.py")
    beta = config.beta or run_value(both.folder, "beta")
    per_token = run_value(both.folder, "loss_type", "sigmoid") == "ipo"

    # 1. a completion of each model for each prompt
    own, base = both.answers()

    # 2. the implicit reward of each completion
    rewards = []
    for groups in (own, base):
        rewards.append([implicit_reward(a, b, beta, per_token) for a, b in zip(*both.logprobs(groups))])

    rows = []
    for number, (prompt, [a], [b], reward, base_reward) in enumerate(zip(both.prompts, own, base, *rewards), 1):
        say("\n" + fold(f"{number}. {text_of(prompt)}"))
        show_completion(both.name, a, f"implicit reward {reward:+.2f}")
        show_completion(both.base, b, f"implicit reward {base_reward:+.2f}")
        rows.append(
            {
                "prompt": prompt,
                "completion": a.text,
                "implicit_reward": reward,
                "base_completion": b.text,
                "base_implicit_reward": base_reward,
            }
        )
    say(f"\nmeans over {len(rows)} completions each; beta {beta:g}{', per token (IPO)' if per_token else ''}")
    show_table(
        ["completions of", "implicit reward", "tokens", "ended"],
        [[both.name, mean(rewards[0]), *lengths(own)], [both.base, mean(rewards[1]), *lengths(base)]],
    )
    write_rows(config.out, rows)


if __name__ == "__main__":
    cli(main, Config)
