"""Scores of completions: by the checks of their prompts, by a reward model, or by a reward function of the user."""

from __future__ import annotations

from data.checks import score
from data.rewards import load_reward, reward_all
from models.loader import same_tokens
from rlhf.packing import score_completions
from rlhf.reward_model import RewardModel, find_reward_model


def gold_scores(rollout):
    """The gold score of each completion: the share of checks it passes. None if the prompts have no checks."""
    if rollout.checks is None:
        return None
    return [score(*each) for each in zip(rollout.texts, rollout.checks, rollout.asked)]


class Scorer:
    """The rewards of a rollout, by a reward function, by a reward model (given by its folder), or by the checks."""

    def __init__(self, reward, reward_model, tokenizer, device):
        self.reward = load_reward(reward) if reward else None
        self.reward_model = None
        if reward_model:
            self.reward_model = RewardModel.load(find_reward_model(reward_model), device=device)
            same_tokens(tokenizer, reward_model)
        self.pad_id = tokenizer.pad_token_id

    def __call__(self, rollout):
        """One reward (a float) for each row of the rollout."""
        if self.reward:
            return reward_all(self.reward, rollout.asked, rollout.texts, rollout.columns)
        if self.reward_model:
            return score_completions(self.reward_model, rollout.prompts, rollout.completions, self.pad_id)
        return rollout.gold
