"""GRPO: sample a group of answers for each prompt and make those more probable that scored above their group's mean.

    python rlhf/grpo_train.py                                       # online: sample, score by the checks, learn
    python rlhf/grpo_train.py --config configs/grpo_offline.yaml    # offline: learn from stored groups
    accelerate launch --num_processes 2 rlhf/grpo_train.py          # the same run on two processes

No value model and, with the checks or a judge, no reward model: the group's mean is the baseline.
Shao et al. 2024, "DeepSeekMath", eq. 3 and 4; clipping with two bounds from Yu et al. 2025 (DAPO); the `constant`
aggregation and scale_std=false from Liu et al. 2025 ("Dr. GRPO"). Left out: an iteratively updated reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator

from configs.config import UserError, option, refuse_unused
from data.order import step_indices
from data.pairs import load_groups
from models.device import autocast, pick_device, pick_precision
from models.loader import check_length
from rlhf.packing import answer_logprobs
from rlhf.policy import as_reference, load_policy, save_policy
from rlhf.rollouts import PromptStream, Rollout, Sampler, Scorer, check_room
from rlhf.steps import Meter, in_words, measure_kl, optimizer_step, sum_over_ranks
from rlhf.utils import kl_estimate, masked_mean
from runtime.checkpoint import Checkpoints, Saving
from runtime.cli import cli
from runtime.console import quiet_libraries, say
from runtime.run import Run
from train.updates import lr_at, make_optimizer


@dataclass
class Config(Saving):
    CONFIG: ClassVar[str] = "configs/grpo.yaml"
    model_name: str = option("smollm2-135m", "the policy at the start, and the reference")
    mode: Literal["online", "offline"] = option("online", "sample groups at each step, or learn from stored ones")
    prompts: str = option("data/prompts.json", "online: prompts with their checks")
    groups: str = option("data/groups.jsonl", "offline: stored groups")
    judge: str | None = option(None, "online: module:function that scores an answer in place of the checks")
    reward_model: str | None = option(None, "online: folder of a reward model that scores in place of the checks")
    steps: int = option(30, "rollouts; each is followed by inner_epochs * minibatches optimizer steps", at_least=1)
    prompts_per_step: int = option(8, "prompts a rollout, over all processes", at_least=1)
    group_size: int = option(8, "online: answers a prompt", at_least=2)
    max_new_tokens: int = option(48, "online: longest answer, in tokens", at_least=1)
    max_length: int = option(512, "offline: longest prompt and answer together, in tokens", at_least=8)
    temperature: float = option(1.0, "online: of sampling and of the log-probs", above=0)
    lr: float = option(1e-4, "peak learning rate", above=0)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", at_least=0)
    min_lr_ratio: float = option(0.1, "the cosine ends at lr times this", at_least=0, at_most=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    kl_coef: float = option(0.02, "weight of the KL to the reference in the loss", at_least=0)
    kl_kind: Literal["ratio_k3", "k2", "k3"] = option("ratio_k3", "which estimator of it")
    clip_low: float = option(0.2, "the ratio is clipped below 1 - this", above=0, at_most=1)
    clip_high: float = option(0.2, "and above 1 + this", above=0)
    aggregate: Literal["token", "sequence", "constant"] = option("token", "how token losses become one number")
    scale_std: bool = option(True, "divide advantages by the group's standard deviation")
    inner_epochs: int = option(1, "passes over each rollout", at_least=1)
    minibatches: int = option(1, "optimizer steps a pass", at_least=1)
    micro_batch_size: int = option(16, "answers in one forward and backward pass", at_least=1)
    rollout_batch_size: int = option(64, "online: answers sampled at once", at_least=1)
    lora_r: int = option(16, "rank of the adapter; 0 trains all weights", at_least=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the forward and backward passes")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "of the order, the samples and the adapter", at_least=0)
    log_every: int = option(1, "rollouts between log lines", at_least=1)
    out: str = option("models/grpo", "the run's folder")
    overwrite: bool = option(False, "replace the run that the folder holds")

    def check(self):
        if self.mode == "offline" and (self.judge or self.reward_model):
            raise UserError("mode = offline takes the stored scores: judge and reward_model have no effect")
        unused = ("prompts", "group_size", "rollout_batch_size") if self.mode == "offline" else ("groups", "max_length")
        refuse_unused(self, unused, f"mode = {self.mode}")
        if not self.kl_coef:
            refuse_unused(self, ["kl_kind"], "kl_coef = 0")
        if self.judge and self.reward_model:
            raise UserError("judge and reward_model both score the answers: give one of them")
        if self.minibatches > self.prompts_per_step:
            raise UserError(f"minibatches = {self.minibatches}: at most prompts_per_step = {self.prompts_per_step}")


def group_advantages(rewards, scale_std=True):
    """Advantages (N, G) of N groups' rewards (N, G): minus the group's mean, over its sample standard deviation + 1e-4.

    Eq. 3 of Shao et al. 2024. scale_std=False only subtracts the mean (Liu et al. 2025: dividing favours prompts whose
    answers hardly differ). Raises UserError for groups of one, whose advantage would always be 0.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise UserError(f"rewards of shape {tuple(rewards.shape)}: a group needs at least two answers")
    advantages = rewards - rewards.mean(1, keepdim=True)
    return advantages / (rewards.std(1, keepdim=True) + 1e-4) if scale_std else advantages


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
    normalizer=None,
):
    """The loss of one (micro-)batch: a scalar. Eq. 3 of Shao et al. 2024, with the aggregation by name.

    logprobs, old_logprobs, ref_logprobs, mask: (B, T-1); advantages: (B,), one a sequence. ref_logprobs may be None
    when kl_coef is 0. Masked entries may hold anything.
    aggregate: "token": sum over counted tokens / their number in the whole step; "sequence": mean over sequences of
    their own means; "constant": sum / (B * max_tokens) (Liu et al. 2025).
    kl_kind: "k2" or "k3" of `kl_estimate`, or "ratio_k3", ratio * k3 with gradients through both, whose expected
    gradient is that of each token's reverse KL. "k1" is refused: as a loss its expected gradient is 0.
    normalizer: number of counted tokens ("token") or of sequences (the other two) in the whole optimizer step over all
    micro-batches and ranks; default: those of this batch. Losses of micro-batches then add up to the step's loss.
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
        return losses.sum() / (normalizer or counted.sum().clamp(min=1))
    rows = normalizer or len(losses)
    if aggregate == "sequence":
        return (losses.sum(1) / counted.sum(1).clamp(min=1)).sum() / rows
    if aggregate == "constant":
        if not max_tokens:
            raise UserError("aggregate = constant needs max_tokens, the constant that stands for every answer's length")
        return losses.sum() / (rows * max_tokens)
    raise UserError(f"aggregate = {aggregate!r}: must be token, sequence or constant")


def main(config):
    quiet_libraries()
    device = pick_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    run = Run(config, config.out, total_steps=config.steps)
    model, reference, tokenizer, parameters = load_policy(config, device, precision, config.out)
    next_groups, inputs = (online if config.mode == "online" else offline)(
        config, model, tokenizer, accelerator, precision
    )
    optimizer = make_optimizer(parameters, config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    updates_per_step = config.inner_epochs * config.minibatches
    total_updates = config.steps * updates_per_step
    temperature = config.temperature
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer, scaler=scaler)
    done, kept = checkpoints.load()  # (0, {}) unless this run was interrupted
    updates = kept.get("updates", 0)  # optimizer steps taken; with fp16 some are skipped
    means = kept.get("means")  # of the last rollout
    run.begin_steps(done)

    for step in range(done + 1, config.steps + 1):
        # 1. a group of answers for each prompt, and what each answer is worth
        with autocast(device, precision):
            rollout, rewards, gold = next_groups(step)
        groups = [torch.tensor(group) for group in rollout.grouped(rewards)]

        # 2. advantages: how much better than the mean of its group
        advantages = torch.cat([group_advantages(group[None], config.scale_std)[0] for group in groups]).to(device)

        # 3. what each update trains on: whole groups, dealt out to the minibatches. An answer whose advantage is 0 has
        #    no gradient unless the KL pulls at it, and is not computed; it still counts in the mean
        minibatches = []
        for part in rollout.split_groups(config.minibatches):
            size = sum(len(rollout.completions[i]) for i in part) if config.aggregate == "token" else len(part)
            size = sum_over_ranks(accelerator, torch.tensor(float(size), device=device)).item()
            learn = [i for i in part if config.kl_coef or advantages[i] != 0]
            batches = []
            for rows in rollout.micro_batches(learn, config.micro_batch_size):
                packed = rollout.pack(rows, tokenizer.pad_token_id, device)
                batches.append({"packed": packed, "rows": rows, "advantages": advantages[rows]})
                run.count_tokens(packed.tokens)
            minibatches.append((size, batches))

        # 4. log-probs of the policy that sampled: stored ones, or the current policy's before the first of several
        #    updates (with a single update they are the current ones and need no pass of their own); and the reference's
        for batch in (batch for _, batches in minibatches for batch in batches):
            packed = batch["packed"]
            with autocast(device, precision), torch.no_grad():
                if config.mode == "offline" and rollout.logprobs:
                    batch["old"] = packed.align([rollout.logprobs[i] for i in batch["rows"]])
                elif config.mode == "online" and updates_per_step > 1:
                    batch["old"] = answer_logprobs(model, packed, temperature)
                if config.kl_coef:
                    with as_reference(model, reference) as ref:
                        batch["ref"] = answer_logprobs(ref, packed, temperature)

        # 5. optimizer steps on the clipped objective; the losses of a step's micro-batches add up
        meter, where = Meter(), in_words(rollout.questions)
        for update in range(updates_per_step):
            size, batches = minibatches[update % config.minibatches]
            for batch in batches:
                packed, a = batch["packed"], batch["advantages"]
                with autocast(device, precision):
                    logprobs, entropy = answer_logprobs(model, packed, temperature, entropy=True)
                old, ref = batch.get("old", logprobs.detach()), batch.get("ref")
                loss = grpo_loss(
                    logprobs, old, ref, a, packed.mask, config.clip_low, config.clip_high, config.kl_coef,
                    config.kl_kind, config.aggregate, max_tokens=config.max_new_tokens, normalizer=size,
                )  # fmt: skip
                scaler.scale(loss).backward()
                meter.sum(loss=loss.item() / updates_per_step)
                measure(meter, logprobs.detach(), old, ref, entropy, a, packed.mask, config)
            lr = lr_at(updates + 1, total_updates, config.lr, config.warmup_steps, config.min_lr_ratio)
            grad_norm, taken = optimizer_step(run, step, where, accelerator, optimizer, scaler, parameters, lr)
            updates += taken

        # 6. what happened
        rollout.measure(meter, rewards, gold)
        for group in groups:
            meter.mean(no_signal=float(group.max() == group.min()))
        means = meter.collect(accelerator)
        if step % config.log_every == 0 or step in (1, config.steps):
            run.log(step, **means, lr=lr, grad_norm=grad_norm)
            rollout.show(rewards)
        if checkpoints.due(step):
            checkpoints.save(step, {"updates": updates, "means": means})

    save_policy(model, tokenizer, run.folder)
    reached = {key: means[key] for key in ("reward", "gold", "kl") if key in means}
    run.finish({"steps": config.steps, **reached}, inputs, next_command="python inference/grpo_inference.py")


def online(config, model, tokenizer, accelerator, precision):
    """A function step -> (rollout, rewards, gold) that samples groups from the policy; and the inputs' hashes."""
    checked = config.judge is None
    stream = PromptStream(config.prompts, tokenizer, config.prompts_per_step, config.seed, accelerator, checked)
    check_room(stream, model, config.max_new_tokens)
    scorer = Scorer(config.judge, config.reward_model, tokenizer, accelerator.device)
    sampler = Sampler(model, config, precision)

    def next_groups(step):
        rollout = sampler.sample(tokenizer, stream, step, config, config.group_size)
        return rollout, *scorer(rollout)

    return next_groups, {config.prompts: stream.sha256}


def offline(config, model, tokenizer, accelerator, precision):
    """A function step -> (rollout, rewards, gold) that takes stored groups, each once an epoch; and the hash."""
    check_length(model, config)
    groups, sha256 = load_groups(config.groups, tokenizer, config.max_length)
    if len(groups) < config.prompts_per_step:
        raise UserError(f"prompts_per_step = {config.prompts_per_step}: {config.groups} has only {len(groups)} groups")
    odd = next((g for g in groups if g["temperature"] != config.temperature), None)
    if odd:
        raise UserError(
            f"{odd['where']} was sampled at temperature {odd['temperature']}: set temperature to that, or the stored "
            "log-probs do not compare with the policy's"
        )
    stored = all(g["logprobs"] for g in groups)
    what = "ratios to the stored log-probs" if stored else "no stored log-probs: this is advantage-weighted fine-tuning"
    say(f"{len(groups)} groups, {sum(len(g['completions']) for g in groups)} answers; {what}")

    def next_groups(step):
        chosen = step_indices(len(groups), config.prompts_per_step, step, config.seed)
        mine = [groups[i] for k, i in enumerate(chosen) if k % accelerator.num_processes == accelerator.process_index]
        rollout = Rollout(
            prompts=[g["prompt"] for g in mine for _ in g["completions"]],
            completions=[c for g in mine for c in g["completions"]],
            logprobs=[x for g in mine for x in g["logprobs"]] if stored else None,
            stopped=[c[-1] == tokenizer.eos_token_id for g in mine for c in g["completions"]],
            texts=[t for g in mine for t in g["text"]["answers"]],
            questions=[g["text"]["prompt"] for g in mine for _ in g["completions"]],
            group_sizes=[len(g["completions"]) for g in mine],
        )
        scores = [s for g in mine for s in g["scores"]]
        return rollout, scores, None

    return next_groups, {config.groups: sha256}


def measure(meter, logprobs, old_logprobs, ref_logprobs, entropy, advantages, mask, config):
    """Means of one micro-batch over the answers that it trains on; the KL is measured where it is in the loss."""
    tokens, rows = mask.sum(), len(mask)
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    a = advantages[:, None]
    clipped = ((log_ratio.exp() > 1 + config.clip_high) & (a > 0)) | ((log_ratio.exp() < 1 - config.clip_low) & (a < 0))
    meter.mean(
        tokens,
        approx_kl=masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
        entropy=masked_mean(entropy, mask),
        clip_fraction=masked_mean(clipped.float(), mask),
    )
    meter.mean(rows, advantage=advantages.abs().mean())
    if ref_logprobs is not None:
        measure_kl(meter, logprobs, ref_logprobs, mask)


if __name__ == "__main__":
    cli(main, Config)
