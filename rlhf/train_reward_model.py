"""Reward model: learn a score for completions from pairs of a chosen and a rejected completion.

    python rlhf/train_reward_model.py                   # pairs of data/preferences.jsonl
    python rlhf/train_reward_model.py --margin true --center_coef 0.01
    torchrun --nproc_per_node=2 rlhf/train_reward_model.py       # the same run on two processes

The model is a transformer with a linear head of one output, read at the last real token. The loss is `reward_loss`
(Bradley-Terry). PPO maximises the score of this model. So the script prints at the end how often the score is right on
held-out pairs, and whether it only measures length, and draws a calibration figure. Stiennon et al. 2020, section 3.4.
Left out: ensembles, and scores per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from configs.config import UserError, option, shown
from models.device import frozen_dtype
from models.fast.quantised import quantise
from models.loader import load_tokenizer, resolve_model
from models.options import quantisation
from models.router import router_of
from rlhf.pairs import Pairs, PairsConfig, pack_pairs
from rlhf.policy import prepare_training
from rlhf.reward_model import RewardModel, reward_loss
from rlhf.stage import Stage
from rlhf.steps import RunningMeter, measure_router
from rlhf.token_records import PairRecords
from rlhf.utils import packed_scores, scores_so_far
from runtime.cli import cli
from runtime.console import say
from train.updates import Updates


@dataclass
class Config(PairsConfig):
    CONFIG: ClassVar[str] = "configs/reward.yaml"
    SCORE: ClassVar[bool] = True
    heldout_fraction: float = option(0.15, "share of the prompts kept for accuracy", above=0, below=1)
    margin: bool = option(False, "ask for a difference of chosen_score - rejected_score")
    center_coef: float = option(0.01, "weight of (chosen + rejected)^2, which keeps scores around 0", at_least=0)
    lr: float = 2e-4
    out: str = "models/reward"


def main(config):
    stage = Stage(config)  # device, precision, processes, seed, the run's folder
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    reward_model = build(config, stage.device, stage.precision)
    pairs = Pairs(config, stage, reward_model.model, tokenizer)  # as token ids; some prompts are held out
    check_margins(config, [*pairs.train, *pairs.heldout])
    router = router_of(reward_model.model)
    parameters = [p for p in reward_model.parameters() if p.requires_grad]
    updates = Updates(parameters, config, stage.run, stage.processes, stage.precision)
    meter = RunningMeter(stage.processes)
    checkpoints = stage.checkpoints(model=reward_model, updates=updates, meter=meter)
    records = PairRecords(stage.run, tokenizer, pairs)  # with --keep_tokens, for report/token_view.py

    for step in checkpoints.remaining():
        for batch in pairs.batches(step):
            # 1. the scores of both completions of each pair, (B,) each
            chosen, rejected = pair_scores(reward_model, batch, tokenizer, stage)

            # 2. the loss: the part of this batch in the mean over all pairs (sequences for a router) of the step
            margin = torch.tensor([pair["margin"] for pair in batch], device=stage.device) if config.margin else None
            loss = reward_loss(chosen, rejected, margin, config.center_coef)
            updates.backward(loss * (len(batch) / config.batch_size) + router.term / (2 * config.batch_size))
            measure(meter, loss.item(), chosen.detach(), rejected.detach())
            measure_router(meter, router, 2 * len(batch))
        records.write(step, lambda batch: measure_tokens(reward_model, batch, tokenizer, stage))
        updates.step(step, pairs.where(step))

        # 3. logging
        if stage.log_due(step):
            stage.log(step, meter.collect_and_reset(), updates)
        checkpoints.save_if_due(step)

    # 4. accuracy on held-out pairs, and whether the score only measures length
    differences = heldout_differences(reward_model, pairs.heldout, tokenizer, stage)
    result = accuracy_report(pairs.heldout, differences)
    if stage.processes.is_main:
        reward_model.save(stage.run.folder, tokenizer, resolve_model(config.model_name))
        calibration_figure(differences, stage.run.folder / "calibration.png")
        say(f"calibration figure: {shown(stage.run.folder / 'calibration.png')}")
    stage.finish(result, pairs.inputs, "python rlhf/ppo_train.py")


def pair_scores(reward_model, pairs, tokenizer, stage):
    """(chosen scores, rejected scores), (B,) each. One forward pass computes both, and their common prompt once."""
    packed = pack_pairs(pairs, tokenizer.pad_token_id, stage.device)
    with stage.autocast():
        found = packed_scores(reward_model.model, packed, reward_model.head)
    return found[0::2], found[1::2]


def check_margins(config, pairs):
    """Raise UserError if config.margin is set and a pair has no scores."""
    missing = next((pair for pair in pairs if pair["margin"] is None), None)
    if config.margin and missing:
        raise UserError(f"margin = true needs chosen_score and rejected_score, which {missing['where']} lacks")


def measure(meter, loss, chosen, rejected):
    """Add means over pairs: how often the chosen completion scores higher, the difference, and the mean score."""
    meter.mean(
        len(chosen),
        loss=loss,
        accuracy=(chosen > rejected).float().mean(),
        margin=(chosen - rejected).mean(),
        score=(chosen + rejected).mean() / 2,
    )


def measure_tokens(reward_model, pairs, tokenizer, stage):
    """What report/token_view.py shows of pairs: `({name: (2B, L)}, {name: (2B,)}, {name: (B,)})`.

    These are numbers of each token, of each completion (chosen, rejected, chosen, ...) and of each pair. The score of a
    token is that of a completion which ends there. The model learns from the score of the last token alone.
    """
    packed = pack_pairs(pairs, tokenizer.pad_token_id, stage.device)
    with stage.autocast():
        scores = scores_so_far(reward_model.model, packed, reward_model.head)
    ends = scores.gather(1, packed.mask.sum(1, keepdim=True) - 1)[:, 0]
    margin = ends[0::2] - ends[1::2]
    return {"score": scores}, {"score": ends}, {"margin": margin, "probability_chosen": margin.sigmoid()}


@torch.no_grad()
def heldout_differences(reward_model, pairs, tokenizer, stage):
    """Chosen score minus rejected score of each held-out pair, in their order."""
    reward_model.eval()
    found, size = [], stage.config.micro_batch_size
    for start in range(0, len(pairs), size):
        chosen, rejected = pair_scores(reward_model, pairs[start : start + size], tokenizer, stage)
        found += (chosen - rejected).tolist()
    return found


def build(config, device, precision):
    """The reward model to train: a frozen base with an adapter and a new head, or all weights in float32."""
    dtype = frozen_dtype(precision) if config.lora_r else torch.float32
    how = quantisation(config, dtype)
    reward_model = RewardModel.load(config.model_name, dtype=dtype, device=device, new_head=True)
    reward_model.model = prepare_training(
        quantise(reward_model.model, how), config, "SEQ_CLS", modules_to_save=["score"]
    )
    reward_model.head.float()
    trained = sum(p.numel() for p in reward_model.parameters() if p.requires_grad)
    say(f"{config.model_name} in {precision} on {device}: {trained:,} weights train")
    return reward_model


def accuracy_report(pairs, differences):
    """Print the accuracy on held-out pairs: over all, and by whether the chosen completion is shorter or longer.

    Returns {"heldout_accuracy", "heldout_pairs", "length_rule_accuracy", "length_correlation"}. The third is the
    accuracy of the better of the two rules "the shorter wins" and "the longer wins".
    """
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
    correlation = length_correlation(differences, gaps)
    say(f"  correlation of the difference in score with the difference in length: {correlation:+.3f}")
    found = {"heldout_accuracy": accuracy, "heldout_pairs": len(right), "length_rule_accuracy": rule}
    return {**found, "length_correlation": correlation}


def length_correlation(differences, gaps):
    """Pearson's correlation of the difference in score with the difference in length, over pairs; 0 if one is constant.

    Each pair is taken both ways round, so it does not matter which completion is the chosen one: the means are 0. 1 or
    -1: the score is a multiple of the length. Within a pair the prompt is the same; Singhal et al. 2023 correlate score
    and length over completions.
    """
    scale = math.sqrt(sum(d * d for d in differences) * sum(g * g for g in gaps))
    return sum(d * g for d, g in zip(differences, gaps)) / scale if scale else 0.0


def calibration_figure(differences, path, bins=6):
    """Draw how often the chosen completion scores higher, against the probability that the model gives its choice."""
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
    cli(main, Config, several=True)
