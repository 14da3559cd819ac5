"""Reward model: learn one number for an answer from pairs of a chosen and a rejected one.

    python rlhf/train_reward_model.py                   # pairs of data/preferences.jsonl
    python rlhf/train_reward_model.py --margin true --center_coef 0.01

A transformer with a linear head of one output, read at the last real token; the Bradley-Terry loss of `reward_loss`.
PPO maximises what this model says: how often it is right on held-out pairs, and whether it merely measures length, is
printed and drawn at the end. Stiennon et al. 2020, section 3.4. Left out: ensembles, and scores per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator

from configs.config import UserError, option
from data.order import step_indices
from data.pairs import count_steps, describe_pairs, load_pairs, pair_length, split_by_prompt
from models.device import autocast, frozen_dtype, pick_device, pick_precision
from models.loader import check_length, load_tokenizer, resolve_model
from rlhf.packing import answer_scores, pack
from rlhf.policy import prepare_training
from rlhf.reward_model import RewardModel, reward_loss
from rlhf.steps import Meter, in_words, optimizer_step
from runtime.checkpoint import Checkpoints, Saving
from runtime.cli import cli
from runtime.console import quiet_libraries, say
from runtime.files import shown
from runtime.run import Run
from train.updates import lr_at, make_optimizer


@dataclass
class Config(Saving):
    CONFIG: ClassVar[str] = "configs/reward.yaml"
    model_name: str = option("smollm2-135m", "the language model that gets the head")
    data: str = option("data/preferences.jsonl", "pairs: JSONL or hub dataset with prompt, chosen, rejected")
    heldout_fraction: float = option(0.15, "share of the prompts kept for accuracy", above=0, below=1)
    max_length: int = option(512, "longest prompt and answer together, in tokens", at_least=8)
    truncation: Literal["left", "drop"] = option("left", "cut a long prompt from the left, or drop the row")
    margin: bool = option(False, "ask for a difference of chosen_score - rejected_score")
    center_coef: float = option(0.01, "weight of (chosen + rejected)^2, which keeps scores around 0", at_least=0)
    lr: float = option(2e-4, "peak learning rate", above=0)
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
    seed: int = option(0, "of the order, the head and the adapter", at_least=0)
    log_every: int = option(1, "optimizer steps between log lines", at_least=1)
    out: str = option("models/reward", "the run's folder")
    overwrite: bool = option(False, "replace the run that the folder holds")


def main(config):
    quiet_libraries()
    device = pick_device()
    accelerator = Accelerator(cpu=device.type == "cpu")
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    run = Run(config, config.out)
    tokenizer = load_tokenizer(config.model_name)
    reward_model = build(config, device, precision)
    parameters = [p for p in reward_model.parameters() if p.requires_grad]

    # 1. pairs as token ids; some prompts are held out
    pairs, counts, sha256 = load_pairs(config.data, tokenizer, config.max_length, config.truncation)
    missing = next((pair for pair in pairs if pair["margin"] is None), None)
    if config.margin and missing:
        raise UserError(f"margin = true needs chosen_score and rejected_score, which {missing['where']} lacks")
    train, heldout = split_by_prompt(pairs, config.heldout_fraction, config.seed)
    describe_pairs(train, heldout, counts)
    check_length(reward_model.model, config)
    run.total_steps = steps = count_steps(config, len(train))

    def scores(batch):
        """Chosen and rejected scores, (B,) each: both answers in one pass, the prompt that they share computed once."""
        prompts = [pair["prompt"] for pair in batch for _ in range(2)]
        completions = [answer for pair in batch for answer in (pair["chosen"], pair["rejected"])]
        packed = pack(prompts, completions, tokenizer.pad_token_id, device)
        with autocast(device, precision):
            found = answer_scores(reward_model.model, packed, reward_model.head)
        return found[0::2], found[1::2]

    optimizer = make_optimizer(parameters, config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    checkpoints = Checkpoints(run, model=reward_model, optimizer=optimizer, scaler=scaler)
    done, kept = checkpoints.load()  # (0, {}) unless this run was interrupted
    meter, updates = Meter(kept.get("meter")), kept.get("updates", 0)
    run.begin_steps(done)
    reward_model.train()
    for step in range(done + 1, steps + 1):
        # 2. this step's pairs, dealt out to the ranks; pairs of like length share a micro-batch
        chosen_pairs = step_indices(len(train), config.batch_size, step, config.seed)
        mine = [train[i] for i in chosen_pairs[accelerator.process_index :: accelerator.num_processes]]
        mine.sort(key=pair_length)
        for start in range(0, len(mine), config.micro_batch_size):
            batch = mine[start : start + config.micro_batch_size]
            # 3. the loss, as its share of the mean over the pairs of the whole step
            chosen, rejected = scores(batch)
            margin = torch.tensor([pair["margin"] for pair in batch], device=device) if config.margin else None
            loss = reward_loss(chosen, rejected, margin, config.center_coef) * (len(batch) / config.batch_size)
            scaler.scale(loss).backward()
            run.count_tokens(sum(map(pair_length, batch)))
            meter.sum(loss=loss.item())
            right = (chosen > rejected).float().mean()
            meter.mean(len(batch), accuracy=right, margin=(chosen - rejected).detach().mean())
            meter.mean(len(batch), score=(chosen + rejected).detach().mean() / 2)
        lr = lr_at(updates + 1, steps, config.lr, config.warmup_steps, config.min_lr_ratio)
        where = in_words(train[i]["where"] for i in chosen_pairs)
        grad_norm, taken = optimizer_step(run, step, where, accelerator, optimizer, scaler, parameters, lr)
        updates += taken

        # 4. what happened
        if step % config.log_every == 0 or step in (1, steps):
            run.log(step, **meter.collect(accelerator), lr=lr, grad_norm=grad_norm)
            meter = Meter()
        if checkpoints.due(step):
            checkpoints.save(step, {"updates": updates, "meter": meter.over_ranks(accelerator)})

    # 5. how often it is right on pairs it has not seen, and whether it only measures length
    reward_model.eval()
    differences = []
    with torch.no_grad():
        for start in range(0, len(heldout), config.micro_batch_size):
            chosen, rejected = scores(heldout[start : start + config.micro_batch_size])
            differences += (chosen - rejected).tolist()
    result = accuracy_report(heldout, differences)
    if accelerator.is_main_process:
        reward_model.save(run.folder, tokenizer, resolve_model(config.model_name))
        calibration_figure(differences, run.folder / "calibration.png")
        say(f"calibration figure: {shown(run.folder / 'calibration.png')}")
    run.finish({"steps": steps, **result}, {config.data: sha256}, next_command="python rlhf/ppo_train.py")


def build(config, device, precision):
    """The reward model to train: a frozen base with an adapter and a trained head, or all weights in float32."""
    dtype = frozen_dtype(precision) if config.lora_r else torch.float32
    reward_model = RewardModel.load(config.model_name, dtype=dtype, device=device, new_head=True)
    reward_model.model = prepare_training(reward_model.model, config, "SEQ_CLS", modules_to_save=["score"])
    reward_model.head.float()
    trained = sum(p.numel() for p in reward_model.parameters() if p.requires_grad)
    say(f"{config.model_name} in {precision} on {device}: {trained:,} weights train")
    return reward_model


def accuracy_report(pairs, differences):
    """Print and return the accuracy on held-out pairs: in all, and where the chosen answer is shorter, like, longer."""
    right = [d > 0 for d in differences]
    gaps = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
    parts = {
        "chosen shorter by over 4 tokens": [r for r, g in zip(right, gaps) if g < -4],
        "lengths within 4 tokens": [r for r, g in zip(right, gaps) if -4 <= g <= 4],
        "chosen longer by over 4 tokens": [r for r, g in zip(right, gaps) if g > 4],
    }
    accuracy = sum(right) / len(right)
    half = 1.96 * (accuracy * (1 - accuracy) / len(right)) ** 0.5
    say(f"\nheld-out accuracy {accuracy:.3f} +- {half:.3f} on {len(right)} pairs")
    for name, part in parts.items():
        say(f"  {name}: " + (f"{sum(part) / len(part):.3f} of {len(part)}" if part else "no pairs"))
    shorter = sum(g < 0 for g in gaps) / len(gaps)
    longer = sum(g > 0 for g in gaps) / len(gaps)
    rule = max(shorter, longer)
    say(f"  the best rule by length alone ({'shorter' if shorter >= longer else 'longer'} wins): {rule:.3f}")
    return {"heldout_accuracy": accuracy, "heldout_pairs": len(right), "length_rule_accuracy": rule}


def calibration_figure(differences, path, bins=6):
    """Draw how often the higher-scored answer was the chosen one, against how sure the model was."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    d = torch.tensor(differences, dtype=torch.float64)
    sure = d.abs().sigmoid()  # the probability that the model gives to its own choice
    order = sure.argsort()
    figure, axes = plt.subplots(figsize=(4.5, 4))
    axes.plot([0.5, 1], [0.5, 1], color="0.7", label="calibrated")
    points = [(sure[part].mean().item(), (d[part] > 0).double().mean().item()) for part in order.chunk(bins)]
    axes.plot(*zip(*points), "o-", label=f"{len(d)} held-out pairs, {len(points)} equal parts")
    axes.set_xlabel("probability that the reward model gives to its choice")
    axes.set_ylabel("share in which its choice is right")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli(main, Config)
