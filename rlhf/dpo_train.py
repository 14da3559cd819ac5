"""DPO: make chosen answers more probable than rejected ones, relative to a reference, without a reward model.

    python rlhf/dpo_train.py                                     # pairs of data/preferences.jsonl
    python rlhf/dpo_train.py --loss_type ipo --beta 0.2
    accelerate launch --num_processes 2 rlhf/dpo_train.py        # the same run on two processes

The model's implicit reward of an answer is beta * log(pi / pi_ref); the loss is a logistic regression on the difference
of the rewards of a pair. Rafailov et al. 2023, eq. 7; IPO: Azar et al. 2023, eq. 17; label smoothing: Mitchell 2023,
"cDPO"; hinge: Zhao et al. 2023 (SLiC). Left out: an SFT term, and references that move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from configs.config import UserError, option
from data.order import step_indices
from data.pairs import count_steps, describe_pairs, load_pairs, pair_length, split_by_prompt
from models.device import autocast, pick_device, pick_precision
from models.loader import check_length
from rlhf.packing import answer_logprobs, pack
from rlhf.policy import as_reference, load_policy, save_policy
from rlhf.steps import Meter, in_words, optimizer_step
from runtime.checkpoint import Checkpoints, Saving
from runtime.cli import cli
from runtime.console import quiet_libraries, say
from runtime.run import Run
from train.updates import lr_at, make_optimizer


@dataclass
class Config(Saving):
    CONFIG: ClassVar[str] = "configs/dpo.yaml"
    model_name: str = option("smollm2-135m", "the policy at the start, and the reference")
    data: str = option("data/preferences.jsonl", "pairs: JSONL or hub dataset with prompt, chosen, rejected")
    heldout_fraction: float = option(0.1, "share of the prompts kept for accuracy", at_least=0, below=1)
    max_length: int = option(512, "longest prompt and answer together, in tokens", at_least=8)
    truncation: Literal["left", "drop"] = option("left", "cut a long prompt from the left, or drop the row")
    beta: float = option(0.1, "strength of the pull to the reference", above=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", "which loss")
    label_smoothing: float = option(0.0, "sigmoid: share of pairs taken to be mislabelled", at_least=0, below=0.5)
    precompute_reference: bool = option(True, "reference log-probs once, before training, or in each step")
    lr: float = option(1e-4, "peak learning rate", above=0)
    epochs: int = option(1, "passes over the pairs", at_least=1)
    max_steps: int = option(0, "stop after this many optimizer steps; 0 takes all", at_least=0)
    batch_size: int = option(16, "pairs an optimizer step, over all processes", at_least=1)
    micro_batch_size: int = option(8, "pairs in one forward and backward pass", at_least=1)
    warmup_steps: int = option(3, "optimizer steps of linear warm-up", at_least=0)
    min_lr_ratio: float = option(0.1, "the cosine ends at lr times this", at_least=0, at_most=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    lora_r: int = option(16, "rank of the adapter; 0 trains all weights", at_least=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the forward and backward passes")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "of the order and the adapter", at_least=0)
    log_every: int = option(1, "optimizer steps between log lines", at_least=1)
    out: str = option("models/dpo", "the run's folder")
    overwrite: bool = option(False, "replace the run that the folder holds")

    def check(self):
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError(f"label_smoothing = {self.label_smoothing} has no effect with loss_type = {self.loss_type}")


def dpo_loss(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    loss_type="sigmoid",
    label_smoothing=0.0,
):
    """(losses, chosen_rewards, rejected_rewards), each (B,). The log-probs are those of whole answers, (B,) in nats.

    With h = log(pi/ref)(chosen) - log(pi/ref)(rejected):
    "sigmoid": -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing (Rafailov et al. 2023, eq. 7)
    "hinge":   max(0, 1 - beta h)                                   (Zhao et al. 2023)
    "ipo":     (h - 1 / (2 beta))^2                                 (Azar et al. 2023, eq. 17)
    Sums over the tokens of an answer, except for IPO, which takes means over its tokens: its authors corrected their
    implementation to that. The rewards are beta * log(pi/ref), without gradient.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    h = chosen - rejected
    if label_smoothing and loss_type != "sigmoid":
        raise UserError(f"label_smoothing = {label_smoothing} has no effect with loss_type = {loss_type}")
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    else:
        raise UserError(f"loss_type = {loss_type!r}: must be sigmoid, ipo or hinge")
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def answer_logps(model, pairs, tokenizer, device, per_token):
    """Log-probs of both answers of each pair, (B,) and (B,): sums over the answer's tokens, or means with `per_token`.

    One forward pass for both, in which the prompt that they share is computed once.
    """
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    completions = [answer for pair in pairs for answer in (pair["chosen"], pair["rejected"])]
    packed = pack(prompts, completions, tokenizer.pad_token_id, device)
    logps = answer_logprobs(model, packed).sum(1)
    if per_token:
        logps = logps / packed.mask.sum(1)
    return logps[0::2], logps[1::2]


def main(config):
    quiet_libraries()
    device = pick_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    precision = pick_precision(config.precision, device)
    per_token = config.loss_type == "ipo"
    torch.manual_seed(config.seed)
    run = Run(config, config.out)
    model, reference, tokenizer, parameters = load_policy(config, device, precision, config.out)

    # 1. pairs as token ids; some prompts are held out
    pairs, counts, sha256 = load_pairs(config.data, tokenizer, config.max_length, config.truncation)
    train, heldout = split_by_prompt(pairs, config.heldout_fraction, config.seed)
    describe_pairs(train, heldout, counts)
    check_length(model, config)
    run.total_steps = steps = count_steps(config, len(train))
    optimizer = make_optimizer(parameters, config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer, scaler=scaler)
    done, kept = checkpoints.load()  # (0, {}) unless this run was interrupted

    def logps(batch, grad=True):
        with autocast(device, precision), torch.set_grad_enabled(grad):
            return answer_logps(model, batch, tokenizer, device, per_token)

    def reference_logps(batch):
        with autocast(device, precision), as_reference(model, reference) as ref:
            return answer_logps(ref, batch, tokenizer, device, per_token)

    # 2. what the reference thinks of each answer, once
    if config.precompute_reference:
        of_step = (step_indices(len(train), config.batch_size, step, config.seed) for step in range(1, steps + 1))
        used = {i for indices in of_step for i in indices}
        needed = [train[i] for i in used] + heldout
        kept["reference"] = cache_reference(reference_logps, needed, config.micro_batch_size, kept.get("reference"))
        reference = None  # its memory is free for the steps

    def pair_losses(batch, grad=True):
        chosen, rejected = logps(batch, grad)
        if config.precompute_reference:
            ref_chosen = torch.tensor([pair["ref_chosen"] for pair in batch], device=device)
            ref_rejected = torch.tensor([pair["ref_rejected"] for pair in batch], device=device)
        else:
            ref_chosen, ref_rejected = reference_logps(batch)
        losses = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected, config.beta, config.loss_type, config.label_smoothing
        )
        return *losses, chosen.detach(), rejected.detach()

    meter, updates = Meter(kept.get("meter")), kept.get("updates", 0)
    if not done:
        say(f"before: {summary(evaluate(pair_losses, heldout, config, accelerator))}")
    run.begin_steps(done)

    model.train()
    for step in range(done + 1, steps + 1):
        # 3. this step's pairs, dealt out to the ranks; pairs of like length share a micro-batch
        chosen_pairs = step_indices(len(train), config.batch_size, step, config.seed)
        mine = [train[i] for i in chosen_pairs[accelerator.process_index :: accelerator.num_processes]]
        mine.sort(key=pair_length)
        for start in range(0, len(mine), config.micro_batch_size):
            batch = mine[start : start + config.micro_batch_size]
            # 4. the loss, divided by the number of pairs in the whole step
            losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps = pair_losses(batch)
            scaler.scale(losses.sum() / config.batch_size).backward()
            run.count_tokens(sum(map(pair_length, batch)))
            measure(meter, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps)
        lr = lr_at(updates + 1, steps, config.lr, config.warmup_steps, config.min_lr_ratio)
        where = in_words(train[i]["where"] for i in chosen_pairs)
        grad_norm, taken = optimizer_step(run, step, where, accelerator, optimizer, scaler, parameters, lr)
        updates += taken

        # 5. what happened
        if step % config.log_every == 0 or step in (1, steps):
            run.log(step, **meter.collect(accelerator), lr=lr, grad_norm=grad_norm)
            meter = Meter()
        if checkpoints.due(step):
            checkpoints.save(step, kept | {"updates": updates, "meter": meter.over_ranks(accelerator)})

    result = evaluate(pair_losses, heldout, config, accelerator)
    say(f"after: {summary(result)}")
    save_policy(model, tokenizer, run.folder)
    result = {f"heldout_{key}": value for key, value in result.items()}
    run.finish({"steps": steps, **result}, {config.data: sha256}, next_command="python inference/dpo_inference.py")


def cache_reference(reference_logps, pairs, batch_size, known=None):
    """Store the reference's log-probs of both answers in each pair; returns all, (pairs, 2).

    known: what was returned before an interruption, to be stored again.
    """
    in_order = sorted(pairs, key=pair_length) if known is None else []
    for start in range(0, len(in_order), batch_size):
        batch = in_order[start : start + batch_size]
        for pair, chosen, rejected in zip(batch, *(x.tolist() for x in reference_logps(batch))):
            pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
        done = start + len(batch)
        if start // batch_size % 10 == 9 or done == len(pairs):
            say(f"reference log-probs: {done}/{len(pairs)} pairs")
    if known is not None:
        for pair, (chosen, rejected) in zip(pairs, known.tolist()):
            pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
    return torch.tensor([[pair["ref_chosen"], pair["ref_rejected"]] for pair in pairs], dtype=torch.float64)


def measure(meter, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """Means over pairs; the log-probs of chosen and rejected apart, since both falling is DPO's known failure."""
    meter.mean(
        len(losses),
        loss=losses.mean().item(),
        accuracy=(chosen_rewards > rejected_rewards).float().mean(),
        margin=(chosen_rewards - rejected_rewards).mean(),
        chosen_reward=chosen_rewards.mean(),
        rejected_reward=rejected_rewards.mean(),
        chosen_logps=chosen_logps.mean(),
        rejected_logps=rejected_logps.mean(),
    )


def evaluate(pair_losses, pairs, config, accelerator):
    """The same means on held-out pairs, each counted once over the ranks."""
    meter = Meter()
    mine = sorted(pairs, key=pair_length)[accelerator.process_index :: accelerator.num_processes]
    for start in range(0, len(mine), config.micro_batch_size):
        measure(meter, *pair_losses(mine[start : start + config.micro_batch_size], grad=False))
    return meter.collect(accelerator) if pairs else {}


def summary(means):
    return ", ".join(f"{key} {value:.4f}" for key, value in means.items()) or "no held-out pairs"


if __name__ == "__main__":
    cli(main, Config)
