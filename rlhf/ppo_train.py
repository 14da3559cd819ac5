"""PPO: sample answers, score them with the reward model, and move the policy by a clipped step to what scored well.

    python rlhf/ppo_train.py                                  # needs models/reward (python rlhf/train_reward_model.py)
    accelerate launch --num_processes 2 rlhf/ppo_train.py     # the same run on two processes

Four models: the policy, its value head, the reference (the KL to it is part of the reward) and the reward model. With
LoRA they share one backbone: the reference is the base with adapters off, the reward model a second adapter.
Schulman et al. 2017 (the clipped objective), Schulman et al. 2016 (GAE), Ziegler et al. 2019 (KL in the reward,
adaptive coefficient), Ouyang et al. 2022 (the whole). Left out: a separate value network, mixing in pretraining text.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from peft import LoraConfig, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.config import UserError, option, refuse_unused
from models.device import autocast, pick_device, pick_precision
from models.fast.lora import lean_adapters
from models.loader import same_tokens
from rlhf.packing import answer_logprobs, answer_scores
from rlhf.policy import as_reference, load_policy, save_policy
from rlhf.reward_model import ADAPTER, RewardModel, find_reward_model, last_token
from rlhf.rollouts import PromptStream, Sampler, check_room, gold_scores
from rlhf.steps import Meter, in_words, measure_kl, optimizer_step, sum_over_ranks
from rlhf.utils import kl_estimate, masked_mean, masked_whiten
from runtime.checkpoint import Checkpoints, Saving
from runtime.cli import cli
from runtime.console import quiet_libraries, say
from runtime.files import read_json, shown
from runtime.run import Run
from train.updates import lr_at, make_optimizer


@dataclass
class Config(Saving):
    CONFIG: ClassVar[str] = "configs/ppo.yaml"
    model_name: str = option("smollm2-135m", "the policy at the start, and the reference")
    reward_model: str = option("models/reward", "folder of the reward model")
    prompts: str = option("data/prompts.json", "prompts; their checks give the gold score, which is only logged")
    steps: int = option(20, "rollouts; each is followed by inner_epochs * minibatches optimizer steps", at_least=1)
    prompts_per_step: int = option(16, "prompts a rollout, over all processes", at_least=1)
    samples_per_prompt: int = option(4, "answers a prompt; they share the prompt's computation", at_least=1)
    max_new_tokens: int = option(48, "longest answer, in tokens", at_least=1)
    temperature: float = option(1.0, "of sampling and of the log-probs", above=0)
    missing_end_penalty: float = option(1.0, "subtracted from the score of an answer cut by its length", at_least=0)
    bootstrap_cut: bool = option(False, "an answer cut by its length goes on at its last value instead of ending there")
    lr: float = option(1e-4, "peak learning rate", above=0)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", at_least=0)
    min_lr_ratio: float = option(0.1, "the cosine ends at lr times this", at_least=0, at_most=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    gamma: float = option(1.0, "discount", above=0, at_most=1)
    lam: float = option(0.95, "lambda of GAE", at_least=0, at_most=1)
    clip_eps: float = option(0.2, "the ratio is clipped to 1 +- this, the values to the old ones +- this", above=0)
    vf_coef: float = option(0.1, "weight of the value loss", at_least=0)
    kl_coef: float = option(0.02, "weight of the KL to the reference in the reward, at the start", at_least=0)
    kl_controller: Literal["fixed", "adaptive"] = option("fixed", "keep kl_coef, or steer it towards kl_target")
    kl_target: float | None = option(None, "adaptive: nats an answer", above=0)
    kl_horizon: int = option(2000, "adaptive: answers over which the coefficient may change by its factor", at_least=1)
    inner_epochs: int = option(2, "passes over each rollout", at_least=1)
    minibatches: int = option(2, "optimizer steps a pass", at_least=1)
    micro_batch_size: int = option(16, "answers in one forward and backward pass", at_least=1)
    rollout_batch_size: int = option(64, "answers sampled at once", at_least=1)
    lora_r: int = option(16, "rank of the adapter; 0 trains all weights", at_least=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the forward and backward passes")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "of the order, the samples and the adapter", at_least=0)
    log_every: int = option(1, "rollouts between log lines", at_least=1)
    out: str = option("models/ppo", "the run's folder")
    overwrite: bool = option(False, "replace the run that the folder holds")

    def check(self):
        if self.kl_controller == "adaptive" and self.kl_target is None:
            raise UserError("kl_controller = adaptive needs kl_target, in nats an answer (6, say)")
        if self.kl_controller == "fixed" and self.kl_target is not None:
            raise UserError("kl_target has no effect with kl_controller = fixed")
        if self.kl_controller == "fixed":
            refuse_unused(self, ["kl_horizon"], "kl_controller = fixed")
        pieces = math.ceil(self.prompts_per_step / max(1, self.micro_batch_size // self.samples_per_prompt))
        if self.minibatches > pieces:
            raise UserError(
                f"minibatches = {self.minibatches}: a rollout makes {pieces} micro-batches of micro_batch_size = "
                f"{self.micro_batch_size} answers, the answers to a prompt together; lower one of them"
            )


def gae(rewards, values, mask, gamma=1.0, lam=0.95, last_values=None):
    """(advantages, returns), each (B, T-1): generalised advantage estimation, eq. 16 of Schulman et al. 2016.

    mask: 1 on the response, one run of ones a row, with zeros before and after; masked entries come out 0, whatever
    they held. last_values: (B,), the value after the last token of a response that was cut and not ended; default 0.
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
    """Clipped surrogate, eq. 7 of Schulman et al. 2017, as a loss: the mean over counted tokens of the larger of both.

    All (B, T-1). normalizer: number of counted tokens in the whole optimizer step; default: those of this batch.
    """
    counted = mask.bool()
    ratio = torch.where(counted, logprobs - old_logprobs, 0.0).exp()  # masked before exp
    advantages = torch.where(counted, advantages, 0.0)
    losses = torch.maximum(-ratio * advantages, -ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages)
    return torch.where(counted, losses, 0.0).sum() / (normalizer or counted.sum().clamp(min=1))


def value_loss(values, old_values, returns, mask, clip_eps=0.2, normalizer=None):
    """0.5 * mean over counted tokens of the larger squared error: of the value, and of the one kept near the old."""
    counted = mask.bool()
    values, old_values, returns = (torch.where(counted, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * errors.sum() / (normalizer or counted.sum().clamp(min=1))


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """Rewards (B, T-1): -kl_coef * k1 on each token of the response, and the score (B,) on its last one."""
    counted = mask.bool()
    rewards = torch.where(counted, -kl_coef * kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last_token(mask)] += scores
    return rewards


def adapt_kl_coef(kl_coef, kl, target, answers, horizon):
    """The next coefficient: proportional control towards `target` nats an answer (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * answers / horizon)


def main(config):
    quiet_libraries()
    device = pick_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    reward_folder = find_reward_model(config.reward_model)
    run = Run(config, config.out, total_steps=config.steps)
    model, reference, tokenizer, parameters = load_policy(config, device, precision, config.out)
    reward_scores = place_reward_model(model, config, reward_folder, device)
    value_head = torch.nn.Linear(model.config.hidden_size, 1).to(device)
    torch.nn.init.zeros_(value_head.weight)  # values start at 0, so the first advantages are the returns
    torch.nn.init.zeros_(value_head.bias)
    parameters = [*parameters, *value_head.parameters()]
    same_tokens(tokenizer, config.reward_model)
    stream = PromptStream(config.prompts, tokenizer, config.prompts_per_step, config.seed, accelerator, False)
    check_room(stream, model, config.max_new_tokens)
    sampler = Sampler(model, config, precision)
    optimizer = make_optimizer(parameters, config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    updates_per_step = config.inner_epochs * config.minibatches
    total_updates = config.steps * updates_per_step
    checkpoints = Checkpoints(run, model=model, value_head=value_head, optimizer=optimizer, scaler=scaler)
    done, kept = checkpoints.load()  # (0, {}) unless this run was interrupted
    updates = kept.get("updates", 0)  # optimizer steps taken; with fp16 some are skipped
    kl_coef = kept.get("kl_coef", config.kl_coef)
    means = kept.get("means")  # of the last rollout
    run.begin_steps(done)

    for step in range(done + 1, config.steps + 1):
        # 1. answers to the prompts of this step
        with autocast(device, precision):
            rollout = sampler.sample(tokenizer, stream, step, config, config.samples_per_prompt)

        # 2. what the four models say of the answers, in the very micro-batches that will be trained on
        batches = []
        for rows in rollout.micro_batches(range(len(rollout.prompts)), config.micro_batch_size):
            packed = rollout.pack(rows, tokenizer.pad_token_id, device)
            run.count_tokens(packed.tokens)
            with autocast(device, precision), torch.no_grad():
                scores = reward_scores(packed)
                old_logprobs, values, last_values = answer_logprobs(
                    model, packed, config.temperature, value_head=value_head
                )
                with as_reference(model, reference) as ref:
                    ref_logprobs = answer_logprobs(ref, packed, config.temperature)

            # 3. the reward of each token, and how much better than expected it went
            cut = torch.tensor([not rollout.stopped[i] for i in rows], device=device)
            penalised = scores - config.missing_end_penalty * cut
            rewards = token_rewards(penalised, old_logprobs, ref_logprobs, packed.mask, kl_coef)
            last_values = last_values * cut if config.bootstrap_cut else None
            advantages, returns = gae(rewards, values, packed.mask, config.gamma, config.lam, last_values)
            batches.append(
                {"packed": packed, "mask": packed.mask, "rows": rows, "scores": scores, "values": values,
                 "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "advantages": advantages,
                 "returns": returns}
            )  # fmt: skip
        whiten_advantages(batches, accelerator)

        # 4. clipped steps on minibatches, each made of whole micro-batches; the losses of these add up
        meter, where = Meter(), in_words(rollout.questions)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for _ in range(config.inner_epochs):
            order = torch.randperm(len(batches), generator=generator).tolist()
            for minibatch in range(config.minibatches):
                share = [batches[i] for i in order[minibatch :: config.minibatches]]
                tokens = torch.tensor(float(sum(batch["mask"].sum() for batch in share)), device=device)
                tokens = sum_over_ranks(accelerator, tokens).item()
                for batch in share:
                    with autocast(device, precision):
                        logprobs, entropy, values, _ = answer_logprobs(
                            model, batch["packed"], config.temperature, entropy=True, value_head=value_head
                        )
                    pg_loss = policy_loss(
                        logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"], config.clip_eps, tokens
                    )
                    vf_loss = value_loss(
                        values, batch["values"], batch["returns"], batch["mask"], config.clip_eps, tokens
                    )
                    loss = pg_loss + config.vf_coef * vf_loss
                    scaler.scale(loss).backward()
                    meter.sum(loss=loss.item() / updates_per_step, value_loss=vf_loss.item() / updates_per_step)
                    measure(meter, batch, logprobs.detach(), entropy, config)
                lr = lr_at(updates + 1, total_updates, config.lr, config.warmup_steps, config.min_lr_ratio)
                grad_norm, taken = optimizer_step(run, step, where, accelerator, optimizer, scaler, parameters, lr)
                updates += taken

        # 5. what happened, and the KL coefficient of the next rollout
        scores = [0.0] * len(rollout.prompts)
        for batch in batches:
            for i, score in zip(batch["rows"], batch["scores"].tolist()):
                scores[i] = score
            measure_kl(meter, batch["old_logprobs"], batch["ref_logprobs"], batch["mask"])
        rollout.measure(meter, scores, gold_scores(rollout))
        means = meter.collect(accelerator)
        if step % config.log_every == 0 or step in (1, config.steps):
            run.log(step, **means, kl_coef=kl_coef, lr=lr, grad_norm=grad_norm)
            rollout.show(scores)
        if config.kl_controller == "adaptive":
            answers = config.prompts_per_step * config.samples_per_prompt
            kl_coef = adapt_kl_coef(kl_coef, means["kl"], config.kl_target, answers, config.kl_horizon)
        if checkpoints.due(step):
            checkpoints.save(step, {"updates": updates, "kl_coef": kl_coef, "means": means})

    save_policy(model, tokenizer, run.folder)
    if accelerator.is_main_process:
        save_file(value_head.state_dict(), run.folder / "value_head.safetensors")
    reached = {key: means[key] for key in ("reward", "gold", "kl") if key in means}
    inputs = {config.prompts: stream.sha256, config.reward_model: run.files.get("reward_model")}
    run.finish({"steps": config.steps, **reached}, inputs, next_command="python inference/ppo_inference.py")


def place_reward_model(model, config, folder, device):
    """A function packed -> scores (N,): the reward model as a second adapter on the policy's backbone
    where it was trained with LoRA on the same base, else as a model of its own."""
    adapter = folder / ADAPTER
    base = model.peft_config["default"].base_model_name_or_path if config.lora_r else None
    if not (config.lora_r and adapter.is_dir()):
        shared = False
    else:
        settings = read_json(adapter / "adapter_config.json")
        shared = settings.get("base_model_name_or_path") == base
    if not shared:
        say(f"reward model {shown(folder)}: a model of its own")
        reward_model = RewardModel.load(config.reward_model, device=device)
        return lambda packed: answer_scores(reward_model.model, packed, reward_model.head)

    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        score = weights.pop("base_model.model.score.weight")
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the adapter of the reward model in {shown(adapter)} is damaged: {error}") from None
    head = torch.nn.Linear(model.config.hidden_size, 1, bias=False).to(device)
    head.weight.data.copy_(score)
    targets = settings["target_modules"]
    lora = LoraConfig(r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=targets, task_type="CAUSAL_LM")
    model.add_adapter("reward", lora)
    lean_adapters(model)
    missing = set_peft_model_state_dict(model, weights, adapter_name="reward")
    assert not missing.unexpected_keys, missing.unexpected_keys
    model.set_adapter("default")
    say(f"reward model {shown(folder)}: an adapter on the policy's backbone")

    def scores(packed):
        with adapter_in_use(model, "reward"):
            return answer_scores(model, packed, head)

    return scores


@contextlib.contextmanager
def adapter_in_use(model, name):
    """The model with another of its adapters active; eval mode, and the policy's adapter again afterwards."""
    was_training = model.training
    model.eval()
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter("default")
        model.train(was_training)


def whiten_advantages(batches, accelerator):
    """Advantages of mean 0 and variance 1 over all counted tokens of the rollout, on all ranks together."""
    flat = torch.cat([batch["advantages"][batch["mask"].bool()] for batch in batches])
    white = masked_whiten(flat, torch.ones_like(flat), reduce=lambda x: sum_over_ranks(accelerator, x))
    for batch, piece in zip(batches, white.split([int(batch["mask"].sum()) for batch in batches])):
        batch["advantages"] = torch.zeros_like(batch["advantages"]).masked_scatter(batch["mask"].bool(), piece)


def measure(meter, batch, logprobs, entropy, config):
    """Per-token means of one micro-batch of one update."""
    mask = batch["mask"]
    log_ratio = torch.where(mask.bool(), logprobs - batch["old_logprobs"], 0.0)
    clipped = (log_ratio.exp() - 1).abs() > config.clip_eps
    meter.mean(
        mask.sum(),
        approx_kl=masked_mean(log_ratio.exp() - 1 - log_ratio, mask),
        entropy=masked_mean(entropy, mask),
        clip_fraction=masked_mean(clipped.float(), mask),
        advantage=masked_mean(batch["advantages"].abs(), mask),
    )


if __name__ == "__main__":
    cli(main, Config)
