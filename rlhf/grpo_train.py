"""GRPO: sample a group of completions for each prompt, and make those more probable that scored above their group.

    python rlhf/grpo_train.py                                       # online: sample, score by the checks, learn
    python rlhf/grpo_train.py --config configs/grpo_offline.yaml    # offline: learn from stored groups
    torchrun --nproc_per_node=2 rlhf/grpo_train.py                  # the same run on two processes

No value model and, with the checks or a reward function, no reward model: the group's mean is the baseline.
Shao et al. 2024, "DeepSeekMath", eq. 3 and 4; clipping with two bounds from Yu et al. 2025 (DAPO); the `constant`
aggregation and scale_std=false from Liu et al. 2025 ("Dr. GRPO"). Left out: an iteratively updated reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from configs.config import UserError, option, refuse_unused
from rlhf.policy import Policy
from rlhf.rollouts import RolloutConfig, SampledRollouts, StoredRollouts, all_batches
from rlhf.scoring import Scorer
from rlhf.stage import Stage
from rlhf.steps import Meter, measure_kl, measure_sampler
from rlhf.utils import kl_estimate, masked_mean
from runtime.cli import cli
from train.updates import Updates


@dataclass
class Config(RolloutConfig):
    CONFIG: ClassVar[str] = "configs/grpo.yaml"
    ALIASES: ClassVar[dict] = {"judge": "reward"}
    mode: Literal["online", "offline"] = option("online", "sample groups at each step, or learn from stored ones")
    groups: str = option("data/groups.jsonl", "offline: stored groups", reads=True)
    max_length: int = option(512, "offline: longest prompt and completion together, in tokens", at_least=8)
    samples_per_prompt: int = option(8, "online: completions a prompt, its group", at_least=2)
    reward: str | None = option(None, "online: module:function, a reward function in place of the checks")
    reward_model: str | None = option(None, "online: folder of a reward model in place of the checks", reads=True)
    kl_coef: float = option(0.02, "weight of the KL to the reference in the loss", at_least=0)
    kl_kind: Literal["ratio_k3", "k2", "k3"] = option("ratio_k3", "which estimator of it")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this", above=0, at_most=1)
    clip_high: float = option(0.2, "and above 1 + this", above=0)
    aggregate: Literal["token", "sequence", "constant"] = option("token", "how token losses become one number")
    scale_std: bool = option(True, "divide advantages by the group's standard deviation")
    out: str = "models/grpo"

    def check(self):
        super().check()
        if self.mode == "offline" and (self.reward or self.reward_model):
            raise UserError("mode = offline takes the stored scores: reward and reward_model have no effect")
        online_only = ("prompts", "samples_per_prompt", "sampling_batch_size")
        unused = online_only if self.mode == "offline" else ("groups", "max_length")
        refuse_unused(self, unused, f"mode = {self.mode}")
        if not self.kl_coef:
            refuse_unused(self, ["kl_kind"], "kl_coef = 0")
        if self.reward and self.reward_model:
            raise UserError("reward and reward_model both score the completions: give one of them")


def group_advantages(rewards, scale_std=True):
    """Advantages (N, G) of N groups' rewards (N, G): minus the group's mean, over its sample standard deviation + 1e-4.

    Eq. 3 of Shao et al. 2024. scale_std=False only subtracts the mean (Liu et al. 2025: dividing favours prompts whose
    completions hardly differ). Raises UserError for groups of one, whose advantage would always be 0.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise UserError(f"rewards of shape {tuple(rewards.shape)}: a group needs at least two completions")
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if scale_std else advantages


def advantages_of_step(groups, config):
    """The advantages of all groups of a step, over all processes: a tensor (G,) for the rewards (G,) of each.

    Each group is its own baseline. A method whose advantage looks at the whole step changes this function alone.
    """
    return [group_advantages(rewards[None], config.scale_std)[0] for rewards in groups]


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.0,
    kl_kind="ratio_k3",
    aggregate="token",
    max_tokens=None,
    tokens=None,
    sequences=None,
):
    """The loss of one (micro-)batch: a scalar. Eq. 3 of Shao et al. 2024, with the aggregation by name.

    logprobs, old_logprobs, ref_logprobs, mask: (B, T-1), nats; advantages: (B,), one a sequence. ref_logprobs may be
    None when kl_coef is 0. Masked entries may hold anything.
    aggregate: "token": sum over counted tokens / their number in the whole step; "sequence": mean over sequences of
    their own means; "constant": sum / (B * max_tokens) (Liu et al. 2025).
    kl_kind: "k2" or "k3" of `kl_estimate`, or "ratio_k3", ratio * k3 with gradients through both, whose expected
    gradient is that of each token's reverse KL. "k1" is refused: as a loss its expected gradient is 0.
    tokens, sequences: how many there are in the whole optimizer step, over all micro-batches and processes; default:
    those of this batch. The losses of micro-batches then add up to the step's loss.
    Raises UserError for another kl_kind or aggregate.
    """
    if kl_kind not in ("ratio_k3", "k2", "k3"):
        raise UserError(f"kl_kind = {kl_kind!r}: must be ratio_k3, k2 or k3 (k1 as a loss has expected gradient 0)")
    counted = mask.bool()
    log_ratio = torch.where(counted, logprobs - old_logprobs, 0.0)  # masked before exp, so that padding cannot poison
    ratio = log_ratio.exp()
    a = advantages[:, None]
    losses = -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    if kl_coef:
        d = torch.where(counted, logprobs - ref_logprobs, 0.0)
        kl = kl_estimate(d, torch.zeros_like(d), "k2" if kl_kind == "k2" else "k3")
        losses = losses + kl_coef * (ratio * kl if kl_kind == "ratio_k3" else kl)
    losses = torch.where(counted, losses, 0.0)
    if aggregate == "token":
        return losses.sum() / (tokens or counted.sum().clamp(min=1))
    rows = sequences or len(losses)
    if aggregate == "sequence":
        return (losses.sum(1) / counted.sum(1).clamp(min=1)).sum() / rows
    if aggregate == "constant":
        if not max_tokens:
            raise UserError(
                "aggregate = constant needs max_tokens, the constant that stands for every completion's length"
            )
        return losses.sum() / (rows * max_tokens)
    raise UserError(f"aggregate = {aggregate!r}: must be token, sequence or constant")


def main(config):
    stage = Stage(config, total_steps=config.steps)  # device, precision, processes, seed, the run's folder
    policy = Policy(config, stage)  # the model that trains, its reference, its tokenizer
    rollouts = (online if config.mode == "online" else StoredRollouts)(config, stage, policy)
    updates = Updates(
        policy.parameters, config, stage.run, stage.processes, stage.precision, config.inner_epochs * config.minibatches
    )
    checkpoints = stage.checkpoints(model=policy.model, updates=updates)

    for step in checkpoints.remaining():
        # 1. a group of completions for each prompt, and their rewards
        rollout = rollouts.at(step)

        # 2. advantages: how much better than the mean of its group each completion is
        advantages = rollout.map_groups(lambda groups: advantages_of_step(groups, config), stage.processes)

        # 3. what each update trains on: whole groups. Where the advantage is 0 only the KL has a gradient
        minibatches = policy.minibatches(rollout, learn=[bool(config.kl_coef or a) for a in advantages.tolist()])

        # 4. what stays fixed while the policy moves
        for batch in all_batches(minibatches):
            batch.advantages = advantages[batch.rows].to(stage.device)  # (N,)
            batch.old_logprobs = old_logprobs(batch, config, policy)
            batch.ref_logprobs = policy.ref_logprobs(batch) if config.kl_coef else None

        # 5. updates on the clipped objective; the losses of a minibatch add up
        meter = Meter()
        for minibatch in minibatches * config.inner_epochs:
            for batch in minibatch.batches:
                logprobs, entropy = policy.logprobs(batch, entropy=True)  # (N, L)
                old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
                loss = grpo_loss(
                    logprobs, old, batch.ref_logprobs, batch.advantages, batch.mask, config.clip_low, config.clip_high,
                    config.kl_coef, config.kl_kind, config.aggregate, config.max_new_tokens,
                    minibatch.tokens, minibatch.sequences,
                )  # fmt: skip
                updates.backward(loss)
                measure(meter, batch, loss.item(), logprobs.detach(), old, entropy, config)
            updates.step(step, rollout.where)

        # 6. what happened
        measure_rollout(meter, rollout)
        if stage.log_due(step):
            stage.log(step, meter.collect(stage.processes), updates)
            rollout.show()
        checkpoints.save_if_due(step)

    policy.save(stage.run.folder)
    stage.finish(stage.reached("reward", "gold", "kl"), rollouts.inputs, "python inference/grpo_inference.py")


def online(config, stage, policy):
    """Rollouts that the policy samples, scored by the reward function, the reward model, or the checks."""
    need_checks = config.reward is None
    scorer = Scorer(config.reward, config.reward_model, policy.tokenizer, stage.device)
    return SampledRollouts(config, stage, policy, config.samples_per_prompt, scorer, need_checks)


def old_logprobs(batch, config, policy):
    """Log-probs (N, L) of the policy that sampled, for the ratio; None: the current policy's, at every update.

    Offline they are the stored ones; a file without them is learned from with ratio 1. Online the policy has not moved
    since it sampled: with one update a rollout its log-probs are those of the update's own pass. With several they are
    computed before the first, and not taken from the sampler: the sampler rounds otherwise than training does
    (`sampler_kl` in the log), and the ratio would take that for a step of the policy.
    """
    if config.mode == "offline":
        return batch.sampler_logprobs
    if config.inner_epochs * config.minibatches == 1:
        return None
    with torch.no_grad():
        return policy.logprobs(batch)


def measure(meter, batch, loss, logprobs, old_logprobs, entropy, config):
    """Means of one batch over the completions that it trains on; the KL is measured where it is in the loss."""
    mask, tokens = batch.mask, batch.mask.sum()
    ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0).exp()
    a = batch.advantages[:, None]
    clipped = ((ratio > 1 + config.clip_high) & (a > 0)) | ((ratio < 1 - config.clip_low) & (a < 0))
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    meter.sum(loss=loss / (config.inner_epochs * config.minibatches))
    meter.mean(
        tokens,
        approx_kl=masked_mean(ratio - 1 - log_ratio, mask),
        entropy=masked_mean(entropy, mask),
        clipfrac=masked_mean(clipped.float(), mask),
    )
    meter.mean(len(mask), advantage=batch.advantages.abs().mean())
    if batch.ref_logprobs is not None:
        measure_kl(meter, logprobs, batch.ref_logprobs, mask)
    if config.mode == "online":
        measure_sampler(meter, batch.sampler_logprobs, old_logprobs, mask)


def measure_rollout(meter, rollout):
    """Means over all completions of the rollout, and the share of groups that teach nothing: all rewards are equal."""
    rollout.measure(meter)
    for rewards in rollout.grouped(rollout.rewards):
        meter.mean(frac_reward_zero_std=float(max(rewards) == min(rewards)))


if __name__ == "__main__":
    cli(main, Config)
