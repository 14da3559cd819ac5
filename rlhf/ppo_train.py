"""PPO: sample completions, score them with the reward model, and make good completions more probable in clipped steps.

    python rlhf/ppo_train.py                                  # needs models/reward (python rlhf/train_reward_model.py)
    python rlhf/ppo_train.py --reward my_reward:reward        # a reward function in place of the reward model
    torchrun --nproc_per_node=2 rlhf/ppo_train.py             # the same run on two processes

There are four models: the policy, its value head, the reference (the KL to it is part of the reward) and the reward
model. With LoRA they share one backbone: the reference is the base with its adapters disabled, and the reward model is
a second adapter.
Schulman et al. 2017 (the clipped objective), Schulman et al. 2016 (GAE), Ziegler et al. 2019 (KL in the reward,
adaptive coefficient), Ouyang et al. 2022 (the whole). Left out: a separate value network, mixing in pretraining text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from safetensors.torch import save_file

from configs.config import UserError, option, refuse_unused
from models.loader import same_tokens, state_size
from rlhf.policy import Policy
from rlhf.reward_model import find_reward_model, last_token, place_reward_model
from rlhf.rollouts import RolloutConfig, SampledRollouts, all_batches, inference_command
from rlhf.scoring import Scorer
from rlhf.stage import Stage
from rlhf.steps import Meter, cut_by_clipping, measure_kl, measure_router, measure_sampler, measure_updates
from rlhf.token_records import RolloutRecords
from rlhf.utils import kl_estimate, masked_mean, masked_whiten
from runtime.cli import cli
from train.updates import Updates


@dataclass
class Config(RolloutConfig):
    CONFIG: ClassVar[str] = "configs/ppo.yaml"
    VALUES: ClassVar[bool] = True
    RENAMED: ClassVar[dict] = {"missing_end_penalty": "missing_eos_penalty"}
    reward_model: str | None = option("models/reward", "folder of the reward model; or give --reward", reads=True)
    steps: int = 20
    prompts_per_step: int = 16
    missing_eos_penalty: float = option(1.0, "subtracted from the score of a completion cut by its length", at_least=0)
    bootstrap_cut: bool = option(False, "after a completion that was cut, count the value after its last token, not 0")
    gamma: float = option(1.0, "discount", above=0, at_most=1)
    lam: float = option(0.95, "lambda of GAE", at_least=0, at_most=1)
    clip_eps: float = option(0.2, "the ratio is clipped to 1 +- this, the values to the old ones +- this", above=0)
    vf_coef: float = option(0.1, "weight of the value loss", at_least=0)
    kl_coef: float = option(0.02, "weight of the KL to the reference in the reward, at the start", at_least=0)
    kl_controller: Literal["fixed", "adaptive"] = option("fixed", "keep kl_coef, or steer it towards kl_target")
    kl_target: float | None = option(None, "adaptive: nats per sequence", above=0)
    kl_horizon: int = option(
        2000, "adaptive: completions over which the coefficient may change by its factor", at_least=1
    )
    inner_epochs: int = 2
    minibatches: int = 2
    out: str = "models/ppo"

    def check(self):
        super().check()
        if not (self.reward or self.reward_model):
            raise UserError("PPO needs a reward_model or a reward function: give exactly one of them")
        if self.kl_controller == "adaptive" and self.kl_target is None:
            raise UserError("kl_controller = adaptive needs kl_target, in nats per sequence (6, say)")
        if self.kl_controller == "fixed" and self.kl_target is not None:
            raise UserError("kl_target has no effect with kl_controller = fixed")
        if self.kl_controller == "fixed":
            refuse_unused(self, ["kl_horizon"], "kl_controller = fixed")


def gae(rewards, values, mask, gamma=1.0, lam=0.95, last_values=None):
    """(advantages, returns), each (B, T-1): generalised advantage estimation, eq. 16 of Schulman et al. 2016.

    rewards, values: (B, T-1). mask: (B, T-1), 1 on the completion; the ones of a row are consecutive. Masked entries
    may have any value and become 0. last_values: (B,), the value after the last token of a completion that was cut at
    the length limit; default 0.
    """
    counted = mask.bool()
    rewards, values = torch.where(counted, rewards, 0.0), torch.where(counted, values, 0.0)
    next_value = torch.zeros_like(values[:, 0]) if last_values is None else last_values
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(counted[:, t], values[:, t], next_value)
        next_advantage = torch.where(counted[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(counted[:, t], advantage, 0.0)
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2, normalizer=None):
    """The clipped surrogate objective, eq. 7 of Schulman et al. 2017, as a loss: a mean over the counted tokens.

    For each token it takes the larger of the unclipped and the clipped loss. All arguments are (B, T-1); log-probs in
    nats. normalizer: the number of counted tokens in the whole optimizer step; default: those of this batch.
    """
    counted = mask.bool()
    ratio = torch.where(counted, logprobs - old_logprobs, 0.0).exp()  # masked before exp
    advantages = torch.where(counted, advantages, 0.0)
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    return torch.where(counted, losses, 0.0).sum() / (normalizer or counted.sum().clamp(min=1))


def value_loss(values, old_values, returns, mask, clip_eps=0.2, normalizer=None):
    """0.5 * the mean over counted tokens of the larger of two squared errors. All arguments are (B, T-1).

    One is the error of the value, the other that of the value clipped to old value +- clip_eps.
    normalizer: the number of counted tokens in the whole optimizer step; default: those of this batch.
    """
    counted = mask.bool()
    values, old_values, returns = (torch.where(counted, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * errors.sum() / (normalizer or counted.sum().clamp(min=1))


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Rewards (B, T-1): -kl_coef * k1 on each token of the completion, plus the score (B,) on its last token.

    k1 = logprobs - ref_logprobs, in nats (Ziegler et al. 2019).
    """
    counted = mask.bool()
    rewards = torch.where(counted, -kl_coef * kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last_token(mask)] += scores
    return rewards


def adapt_kl_coef(kl_coef, kl, target, completions, horizon):
    """The next KL coefficient: proportional control towards `target`, Ziegler et al. 2019, sec. 2.2.

    kl, target: nats per sequence. completions: their number in this rollout. horizon: in completions.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


class KLController:
    """The coefficient of the KL in the reward: fixed, or adapted after each rollout so that the KL nears kl_target."""

    def __init__(self, config):
        self.config, self.coef = config, config.kl_coef

    def update(self, kl):
        """Adapt the coefficient. kl: of the rollout, in nats per sequence."""
        config = self.config
        if config.kl_controller == "adaptive":
            completions = config.prompts_per_step * config.samples_per_prompt
            self.coef = adapt_kl_coef(self.coef, kl, config.kl_target, completions, config.kl_horizon)

    def state_dict(self):
        return {"coef": self.coef}

    def load_state_dict(self, state):
        self.coef = state["coef"]


def main(config):
    if config.reward_model:
        find_reward_model(config.reward_model)  # a UserError here comes before the run changes its folder
    stage = Stage(config, total_steps=config.steps)  # device, precision, processes, seed, the run's folder
    policy = Policy(config, stage)  # the model that trains, its reference, its tokenizer
    reward_scores = scorer = None  # a reward model scores batches, reward functions score rollouts
    if config.reward_model:
        reward_scores = place_reward_model(policy.model, config.reward_model, config.lora_r, stage.device)
        same_tokens(policy.tokenizer, config.reward_model)
    else:
        scorer = Scorer(config, policy.tokenizer, stage.device)
    value_head = new_value_head(policy.model, stage.device)
    rollouts = SampledRollouts(config, stage, policy, config.samples_per_prompt, scorer, need_checks=False)
    parameters = [*policy.parameters, *value_head.parameters()]
    updates_a_step = config.inner_epochs * config.minibatches
    updates = Updates(parameters, config, stage.run, stage.processes, stage.precision, updates_a_step)
    kl = KLController(config)
    checkpoints = stage.checkpoints(
        model=policy.model, value_head=value_head, updates=updates, kl=kl, left_out=rollouts.left_out
    )
    records = RolloutRecords(stage.run, policy.tokenizer)  # with --keep_tokens, for report/token_view.py

    for step in checkpoints.remaining():
        # 1. completions of the prompts of this step
        with checkpoints.saved_before(step):
            rollout = rollouts.at(step)

        # 2. scores, log-probs, values and reference log-probs, in the batches of the updates
        minibatches = policy.minibatches(rollout)
        for batch in all_batches(minibatches):
            with torch.no_grad():
                with stage.autocast():
                    batch.scores = reward_scores(batch.packed) if reward_scores else rewards_of(batch, rollout)
                batch.old_logprobs, batch.values, last_values = policy.logprobs(batch, value_head=value_head)
                batch.ref_logprobs = policy.ref_logprobs(batch)

            # 3. the reward and the advantage of each token
            cut = torch.tensor([rollout.finish_reasons[i] == "length" for i in batch.rows], device=stage.device)
            penalised = batch.scores - config.missing_eos_penalty * cut
            batch.rewards = token_rewards(penalised, batch.old_logprobs, batch.ref_logprobs, batch.mask, kl.coef)
            last_values = last_values * cut if config.bootstrap_cut else None
            batch.advantages, batch.returns = gae(
                batch.rewards, batch.values, batch.mask, config.gamma, config.lam, last_values
            )
        explained = explained_variance(all_batches(minibatches), stage.processes)
        whiten_advantages(all_batches(minibatches), stage.processes, stage.device)

        # 4. clipped updates of policy and values; the losses of the batches of a minibatch are summed
        meter = Meter()
        for number, minibatch in enumerate(minibatches * config.inner_epochs):
            for batch in minibatch.batches:
                logprobs, entropy, values, _ = policy.logprobs(batch, entropy=True, value_head=value_head)  # (N, L)
                pg_loss = policy_loss(
                    logprobs, batch.old_logprobs, batch.advantages, batch.mask, config.clip_eps, minibatch.tokens
                )
                vf_loss = value_loss(values, batch.values, batch.returns, batch.mask, config.clip_eps, minibatch.tokens)
                loss = pg_loss + config.vf_coef * vf_loss
                updates.backward(loss + policy.router.term / minibatch.sequences)
                measure(meter, batch, loss.item(), vf_loss.item(), logprobs.detach(), entropy, config, number == 0)
                measure_router(meter, policy.router, len(batch.mask))
                records.add(step, batch, logprobs=logprobs.detach(), entropy=entropy)
            if minibatch.sequences:  # 0 if all its completions were left out
                updates.step(step, rollout.where)

        # 5. logging, and the KL coefficient of the next rollout
        measure_rollout(meter, rollout, all_batches(minibatches))
        records.write(step, rollout, lambda batch, **seen: measure_tokens(batch, config, **seen))
        means = meter.collect(stage.processes)
        if stage.log_due(step):
            left_out = rollouts.left_out.collect_and_reset()
            more = {"kl_coef": kl.coef, "explained_variance": explained, **left_out}
            stage.log(step, means, updates, rollout.samples(), **more)
            rollout.show()
        if "kl" in means:  # not if all completions were left out
            kl.update(means["kl"])
        checkpoints.save_if_due(step)

    policy.save(stage.run.folder)
    if stage.processes.is_main:
        save_file(value_head.state_dict(), stage.run.folder / "value_head.safetensors")
    inputs = rollouts.inputs
    if config.reward_model:
        inputs = inputs | {config.reward_model: stage.run.files.get("reward_model")}
    stage.finish(stage.reached("reward", "gold", "kl"), inputs, inference_command(config, "ppo"))


def rewards_of(batch, rollout):
    """The rewards (N,) of a batch's completions, float32, by the reward functions."""
    return torch.tensor([rollout.rewards[i] for i in batch.rows], dtype=torch.float32, device=batch.mask.device)


def new_value_head(model, device):
    """A zero Linear (..., H) -> (..., 1): all values start at 0, so the first advantages are the returns."""
    head = torch.nn.Linear(state_size(model), 1).to(device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def whiten_advantages(batches, processes, device):
    """Give the advantages mean 0 and variance 1 over all counted tokens of the rollout, over all processes."""
    pieces = [batch.advantages[batch.mask.bool()] for batch in batches]
    flat = torch.cat(pieces) if pieces else torch.zeros(0, device=device)  # no batch: all completions were left out
    white = masked_whiten(flat, torch.ones_like(flat), reduce=processes.sum)
    for batch, piece in zip(batches, white.split([len(piece) for piece in pieces])):
        batch.advantages = torch.zeros_like(batch.advantages).masked_scatter(batch.mask.bool(), piece)


def explained_variance(batches, processes):
    """1 - Var(return - value) / Var(return) over all counted tokens of the rollout, over all processes.

    1: the values predict the returns; 0 or less: no better than a constant. None if all returns are equal.
    """
    mine = [torch.stack((batch.returns, batch.values))[:, batch.mask.bool()].double().cpu() for batch in batches]
    everywhere = processes.gather(torch.cat([torch.zeros(2, 0, dtype=torch.float64), *mine], dim=1))
    returns, values = torch.cat(everywhere, dim=1)
    spread = returns.var(correction=0).item() if len(returns) else 0.0
    return 1 - (returns - values).var(correction=0).item() / spread if spread else None


def measure(meter, batch, loss, vf_loss, logprobs, entropy, config, first=False):
    """Add the losses and the per-token means of one batch in one update to the meter.

    first: whether no update has been made since the rollout: then the ratio is 1.
    """
    mask, updates_a_step = batch.mask, config.inner_epochs * config.minibatches
    meter.sum(loss=loss / updates_a_step, value_loss=vf_loss / updates_a_step)
    measure_updates(
        meter, logprobs, batch.old_logprobs, batch.advantages, mask, config.clip_eps, config.clip_eps, first
    )
    meter.mean(mask.sum(), entropy=masked_mean(entropy, mask), advantage=masked_mean(batch.advantages.abs(), mask))


def measure_tokens(batch, config, logprobs, entropy):
    """What report/token_view.py shows of a batch: ({name: (N, L)} of each token, {name: (N,)} of each completion)."""
    counted, old = batch.mask.bool(), batch.old_logprobs
    ratio = torch.where(counted, logprobs - old, 0.0).exp()
    found = {
        "logprob": logprobs,
        "old_logprob": old,
        "ref_logprob": batch.ref_logprobs,
        "entropy": entropy,
        "ratio": ratio,
        "clipped": cut_by_clipping(ratio, batch.advantages, config.clip_eps, config.clip_eps).int(),
        "kl": torch.where(counted, kl_estimate(old, batch.ref_logprobs, "k1"), 0.0),
        "reward": batch.rewards,
        "value": batch.values,
        "return": batch.returns,
        "advantage": batch.advantages,
    }
    return found, {"kl": found["kl"].sum(1)}


def measure_rollout(meter, rollout, batches):
    """Add means over all completions of the rollout. The logged "reward" is the score, without penalty and KL."""
    rollout.rewards = [0.0] * len(rollout.prompts)
    for batch in batches:
        for i, score in zip(batch.rows, batch.scores.tolist()):
            rollout.rewards[i] = score
        measure_kl(meter, batch.old_logprobs, batch.ref_logprobs, batch.mask)
        measure_sampler(meter, batch.sampler_logprobs, batch.old_logprobs, batch.mask)
    rollout.measure(meter)


if __name__ == "__main__":
    cli(main, Config, several=True)
