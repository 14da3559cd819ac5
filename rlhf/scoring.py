"""Scores of completions: by the checks of their prompts, by a reward model, or by a reward function of the user."""

from __future__ import annotations

from data.checks import score
from data.rewards import reward_functions
from models.loader import same_tokens
from rlhf.reward_model import RewardModel, find_reward_model
from rlhf.utils import score_completions


def gold_scores(rollout):
    """The gold score of each completion: the share of checks it passes. None if the prompts have no checks."""
    if rollout.checks is None:
        return None
    return [score(*each) for each in zip(rollout.texts, rollout.checks, rollout.asked)]


class Scorer:
    """The rewards of a rollout, by reward functions, by a reward model, or by the checks."""

    def __init__(self, config, tokenizer, device):
        """config: with the options `reward`, `reward_model` and those beside them."""
        self.reward = reward_functions(config)
        self.reward_model = None
        if config.reward_model:
            self.reward_model = RewardModel.load(find_reward_model(config.reward_model), device=device)
            same_tokens(tokenizer, config.reward_model)
        self.pad_id = tokenizer.pad_token_id

    def check_columns(self, rows):
        """Raise UserError if a reward function needs a column that no row has."""
        if self.reward:
            self.reward.check_columns(rows)

    def __call__(self, rollout):
        """One reward (a float) for each row of the rollout; None for a row that is to be left out.

        With reward functions, this also sets `left_out` and `by_function` of the rollout.
        """
        if self.reward:
            scores = self.reward(rollout.asked, rollout.texts, rollout.columns, rollout.completions)
            rollout.left_out = {why: number for why, number in scores.left_out.items() if number}
            rollout.by_function = scores.by_function if len(scores.by_function) > 1 else {}
            return scores.values
        if self.reward_model:
            return score_completions(self.reward_model, rollout.prompts, rollout.completions, self.pad_id)
        return rollout.gold
