"""GRPO: sample a group of completions for each prompt, and make the completions above the group's mean more probable.

    python rlhf/grpo_train.py                                       # online: sample, score by the checks, learn
    python rlhf/grpo_train.py --config configs/grpo_offline.yaml    # offline: learn from stored groups
    torchrun --nproc_per_node=2 rlhf/grpo_train.py                  # the same run on two processes

GRPO needs no value model: the group's mean is the baseline. With checks or a reward function it needs no reward model.
Shao et al. 2024, "DeepSeekMath", eq. 3 and 4; clipping with two bounds from Yu et al. 2025 (DAPO); the `constant`
aggregation and scale_std=false from Liu et al. 2025 ("Dr. GRPO"). Left out: an iteratively updated reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from configs.config import UserError, option, refuse_unused
from rlhf.policy import Policy
from rlhf.rollouts import RolloutConfig, SampledRollouts, StoredRollouts, all_batches, inference_command, plan_stored
from rlhf.scoring import Scorer
from rlhf.stage import Stage
from rlhf.steps import Meter, cut_by_clipping, measure_kl, measure_router, measure_sampler, measure_updates
from rlhf.token_records import RolloutRecords
from rlhf.utils import kl_estimate, masked_mean
from runtime.cli import cli
from train.updates import Updates


@dataclass
class Config(RolloutConfig):
    CONFIG: ClassVar[str] = "configs/grpo.yaml"
    mode: Literal["online", "offline"] = option("online", "sample groups at each step, or learn from stored ones")
    groups: str = option("data/groups.jsonl", "offline: stored groups", reads=True)
    max_length: int = option(512, "offline: longest prompt and completion together, in tokens", at_least=8)
    samples_per_prompt: int = option(8, "online: completions per prompt (the size of a group)", at_least=2)
    missing_eos_penalty: float = option(0.0, "subtracted from the reward of a completion cut by its length", at_least=0)
    kl_coef: float = option(0.02, "weight of the KL to the reference in the loss", at_least=0)
    kl_kind: Literal["ratio_k3", "k2", "k3"] = option("ratio_k3", "which estimator of the KL")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this", above=0, at_most=1)
    clip_high: float = option(0.2, "and above 1 + this", above=0)
    aggregate: Literal["token", "sequence", "constant"] = option("token", "how token losses become one number")
    scale_std: bool = option(True, "divide advantages by the group's standard deviation")
    out: str = "models/grpo"

    def check(self):
        if self.mode == "offline" and (self.reward or self.reward_model):
            raise UserError("mode = offline takes the stored scores: reward and reward_model have no effect")
        super().check()
        online_only = ("prompts", "prompt_column", "samples_per_prompt", "sampling_batch_size")
        unused = online_only if self.mode == "offline" else ("groups", "max_length")
        refuse_unused(self, unused, f"mode = {self.mode}")
        if not self.kl_coef:
            refuse_unused(self, ["kl_kind"], "kl_coef = 0")

    def plan(self, data=None):
        return super().plan(data) if self.mode == "online" else plan_stored(self, data)


def group_advantages(rewards, scale_std=True):
    """Advantages (N, G) from the rewards (N, G) of N groups: (reward - mean) / (sample standard deviation + 1e-4).

    Mean and deviation are those of the group; eq. 3 of Shao et al. 2024. scale_std=False only subtracts the mean,
    because the division favours prompts whose completions hardly differ (Liu et al. 2025). Raises UserError for groups
    of one completion: their advantage would always be 0.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise UserError(f"rewards of shape {tuple(rewards.shape)}: a group needs at least two completions")
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)  # their mean may be off by a rounding
    advantages = torch.where(equal, 0.0, rewards - rewards.mean(1, keepdim=True))
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if scale_std else advantages


def advantages_of_step(groups, config):
    """The advantages of all groups of a step, over all processes: one tensor (G,) for the rewards (G,) of each group.

    The baseline of a group is its own mean. A method whose advantage depends on the whole step changes only this
    function.
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
    """The loss of one (micro-)batch, a scalar. Eq. 3 of Shao et al. 2024; clipping with two bounds: Yu et al. 2025.

    logprobs, old_logprobs, ref_logprobs: (B, T-1), nats. mask: (B, T-1). advantages: (B,), one per sequence.
    ref_logprobs may be None if kl_coef is 0. Masked entries may have any value.
    aggregate: "token": sum over the counted tokens / their number in the whole step; "sequence": mean over the
    sequences of the mean over their tokens; "constant": sum / (B * max_tokens) (Liu et al. 2025).
    kl_kind: "k2" or "k3" of `kl_estimate`, or "ratio_k3": ratio * k3 with gradients through both factors. The expected
    gradient of ratio_k3 is that of the reverse KL of each token. "k1" raises UserError, because its expected gradient
    as a loss is 0.
    tokens, sequences: their numbers in the whole optimizer step, over all micro-batches and processes; default: those
    of this batch. With them, the losses of the micro-batches add up to the loss of the step.
    Raises UserError for another kl_kind or aggregate, and for "constant" without max_tokens.
    """
    if kl_kind not in ("ratio_k3", "k2", "k3"):
        raise UserError(f"kl_kind = {kl_kind!r}: must be ratio_k3, k2 or k3 (k1 as a loss has expected gradient 0)")
    counted = mask.bool()
    log_ratio = torch.where(counted, logprobs - old_logprobs, 0.0)  # masked before exp, so padding gives no inf or NaN
    ratio = log_ratio.exp()
    a = advantages[:, None]
    losses = -torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    if kl_coef:
        losses = losses + kl_coef * kl_in_loss(logprobs, old_logprobs, ref_logprobs, counted, kl_kind, log_ratio, ratio)
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


def kl_in_loss(logprobs, old_logprobs, ref_logprobs, counted, kl_kind, log_ratio, ratio):
    """The KL of each token in `grpo_loss`, (B, T-1), in nats; 0 where `counted` (B, T-1) is False.

    log_ratio: logprobs - old_logprobs, 0 where not counted. ratio: its exp. The other arguments: see `grpo_loss`.
    """
    d = torch.where(counted, logprobs - ref_logprobs, 0.0)
    if kl_kind == "ratio_k3":  # ratio * k3 without the difference of two huge numbers far from the reference
        return torch.where(counted, ref_logprobs - old_logprobs, 0.0).expm1() + ratio * d - log_ratio.expm1()
    return kl_estimate(d, torch.zeros_like(d), kl_kind)


def main(config):
    stage = Stage(config, total_steps=config.steps)  # device, precision, processes, seed, the run's folder
    policy = Policy(config, stage)  # the model that trains, its reference, its tokenizer
    rollouts = (online if config.mode == "online" else StoredRollouts)(config, stage, policy)
    updates = Updates(
        policy.parameters, config, stage.run, stage.processes, stage.precision, config.inner_epochs * config.minibatches
    )
    checkpoints = stage.checkpoints(model=policy.model, updates=updates, left_out=rollouts.left_out)
    records = RolloutRecords(stage.run, policy.tokenizer)  # with --keep_tokens, for report/token_view.py

    for step in checkpoints.remaining():
        # 1. a group of completions for each prompt, and their rewards
        with checkpoints.saved_before(step):
            rollout = rollouts.at(step)
        rollout.penalise_cut(config.missing_eos_penalty)

        # 2. the advantage of each completion over the mean of its group
        advantages = rollout.map_groups(lambda groups: advantages_of_step(groups, config), stage.processes)

        # 3. minibatches of whole groups. A completion with advantage 0 has a gradient only from the KL and a router
        always = bool(config.kl_coef or policy.router.coefficient)
        minibatches = policy.minibatches(rollout, learn=[always or bool(a) for a in advantages.tolist()])

        # 4. values that stay fixed while the policy changes
        for batch in all_batches(minibatches):
            batch.advantages = advantages[batch.rows].to(stage.device)  # (N,)
            batch.old_logprobs = old_logprobs(batch, config, policy)
            batch.ref_logprobs = policy.ref_logprobs(batch) if config.kl_coef else None

        # 5. updates on the clipped objective; the losses of the batches of a minibatch are summed
        meter = Meter()
        for number, minibatch in enumerate(minibatches * config.inner_epochs):
            for batch in minibatch.batches:
                logprobs, entropy = policy.logprobs(batch, entropy=True)  # (N, L)
                old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
                loss = grpo_loss(
                    logprobs, old, batch.ref_logprobs, batch.advantages, batch.mask, config.clip_low, config.clip_high,
                    config.kl_coef, config.kl_kind, config.aggregate, config.max_new_tokens,
                    minibatch.tokens, minibatch.sequences,
                )  # fmt: skip
                updates.backward(loss + policy.router.term / minibatch.sequences)
                measure(meter, batch, loss.item(), logprobs.detach(), old, entropy, config, number == 0)
                measure_router(meter, policy.router, len(batch.mask))
                records.add(step, batch, logprobs=logprobs.detach(), old_logprobs=old, entropy=entropy)
            if minibatch.sequences:  # 0 if all its completions were left out
                updates.step(step, rollout.where)

        # 6. logging
        measure_rollout(meter, rollout)
        records.write(step, rollout, lambda batch, **seen: measure_tokens(batch, config, **seen))
        if stage.log_due(step):
            left_out = rollouts.left_out.collect_and_reset()
            stage.log(step, meter.collect(stage.processes), updates, rollout.samples(), **left_out)
            rollout.show()
        checkpoints.save_if_due(step)

    policy.save(stage.run.folder)
    stage.finish(stage.reached("reward", "gold", "kl"), rollouts.inputs, inference_command(config, "grpo"))


def online(config, stage, policy):
    """The `SampledRollouts` of the policy, scored by reward functions, the reward model, or the checks."""
    need_checks = config.reward is None and config.reward_model is None
    scorer = Scorer(config, policy.tokenizer, stage.device)
    return SampledRollouts(config, stage, policy, config.samples_per_prompt, scorer, need_checks)


def old_logprobs(batch, config, policy):
    """Log-probs (N, L), nats, of the sampling policy, for the ratio. None: use those of the current policy (ratio 1).

    Offline they are the stored log-probs; None for a file without them. Online, with one update per rollout, the policy
    has not changed since it sampled, so the update's own forward pass gives them (None). With several updates they are
    computed before the first one. They are not those of the sampler: the sampler rounds differently from training
    (`sampler_kl` in the log), and the ratio would treat the difference as a change of the policy.
    """
    if config.mode == "offline":
        return batch.sampler_logprobs
    if config.inner_epochs * config.minibatches == 1:
        return None
    with torch.no_grad():
        return policy.logprobs(batch)


def measure(meter, batch, loss, logprobs, old_logprobs, entropy, config, first=False):
    """Add the means of one batch over its completions to the meter. The KL is measured only if it is in the loss.

    first: whether no update has been made since the rollout: then, online, the ratio is 1.
    """
    mask, online = batch.mask, config.mode == "online"
    meter.sum(loss=loss / (config.inner_epochs * config.minibatches))
    measure_updates(
        meter, logprobs, old_logprobs, batch.advantages[:, None], mask, config.clip_low, config.clip_high,
        first and online,
    )  # fmt: skip
    meter.mean(mask.sum(), entropy=masked_mean(entropy, mask))
    meter.mean(len(mask), advantage=batch.advantages.abs().mean())
    if batch.ref_logprobs is not None:
        measure_kl(meter, logprobs, batch.ref_logprobs, mask)
    if online:
        measure_sampler(meter, batch.sampler_logprobs, old_logprobs, mask)


def measure_tokens(batch, config, logprobs, old_logprobs, entropy):
    """What report/token_view.py shows of a batch: ({name: (N, L)} of each token, {name: (N,)} of each completion)."""
    counted = batch.mask.bool()
    log_ratio = torch.where(counted, logprobs - old_logprobs, 0.0)
    ratio, a = log_ratio.exp(), batch.advantages[:, None].expand_as(logprobs)
    found = {"logprob": logprobs, "old_logprob": old_logprobs, "entropy": entropy, "ratio": ratio, "advantage": a}
    found["clipped"] = cut_by_clipping(ratio, a, config.clip_low, config.clip_high).int()
    if batch.ref_logprobs is not None:
        found["ref_logprob"], kind = batch.ref_logprobs, config.kl_kind
        found["kl"] = kl_in_loss(logprobs, old_logprobs, batch.ref_logprobs, counted, kind, log_ratio, ratio)
    return found, {"advantage": batch.advantages}


def measure_rollout(meter, rollout):
    """Add means over all completions of the rollout, and the share of groups whose rewards are all equal."""
    rollout.measure(meter)
    for rewards in filter(None, rollout.grouped(rollout.rewards)):
        meter.mean(frac_reward_zero_std=float(max(rewards) == min(rewards)))


if __name__ == "__main__":
    cli(main, Config, several=True)
