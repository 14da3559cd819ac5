"""DPO: make chosen completions more probable than rejected ones, compared with a reference. It needs no reward model.

    python rlhf/dpo_train.py                                     # pairs of data/preferences.jsonl
    python rlhf/dpo_train.py --loss_type ipo --beta 0.2
    torchrun --nproc_per_node=2 rlhf/dpo_train.py                # the same run on two processes

The implicit reward of a completion is beta * log(pi / pi_ref). The loss is a logistic regression on the difference of
the two rewards of a pair. Rafailov et al. 2023, eq. 7; IPO: Azar et al. 2023, eq. 17; label smoothing: Mitchell 2023,
"cDPO"; hinge: Zhao et al. 2023 (SLiC). Left out: an SFT term, and a reference that changes during training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from configs.config import UserError, option
from data.pairs import batches_by_length, pair_length
from rlhf.pairs import Pairs, PairsConfig, pack_pairs
from rlhf.policy import Policy, as_reference
from rlhf.stage import Stage
from rlhf.steps import Meter, RunningMeter, measure_router
from rlhf.token_records import PairRecords
from rlhf.utils import packed_logprobs
from runtime.cli import cli
from runtime.console import fold, say
from runtime.progress import Progress
from train.updates import Updates


@dataclass
class Config(PairsConfig):
    CONFIG: ClassVar[str] = "configs/dpo.yaml"
    beta: float = option(0.1, "strength of the pull to the reference", above=0)
    loss_type: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", "which loss")
    label_smoothing: float = option(0.0, "sigmoid: share of pairs taken to be mislabelled", at_least=0, below=0.5)
    precompute_reference: bool = option(True, "reference log-probs once, before training, or in each step")
    out: str = "models/dpo"

    def check(self):
        super().check()
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
    """(losses, chosen_rewards, rejected_rewards), each (B,). The log-probs (B,) are of whole completions, in nats.

    With h = log(pi/ref)(chosen) - log(pi/ref)(rejected):
    "sigmoid": -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), e = label_smoothing (Rafailov et al. 2023, eq. 7)
    "hinge":   max(0, 1 - beta h)                                   (Zhao et al. 2023)
    "ipo":     (h - 1 / (2 beta))^2                                 (Azar et al. 2023, eq. 17)
    A log-prob is the sum over the tokens of a completion; for IPO it is their mean, as in the corrected implementation
    of its authors. The rewards are beta * log(pi/ref), without gradient.
    Raises UserError for another loss_type, and for label_smoothing with a loss_type that is not "sigmoid".
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


def main(config):
    stage = Stage(config)  # device, precision, processes, seed, the run's folder
    policy = Policy(config, stage)  # the model that trains, its reference, its tokenizer
    pairs = Pairs(config, stage, policy.model, policy.tokenizer)  # as token ids; some prompts are held out
    reference = Reference(config, stage, policy)
    updates = Updates(policy.parameters, config, stage.run, stage.processes, stage.precision)
    meter = RunningMeter(stage.processes)
    checkpoints = stage.checkpoints(model=policy.model, updates=updates, meter=meter, reference=reference)
    records = PairRecords(stage.run, policy.tokenizer, pairs)  # with --keep_tokens, for report/token_view.py

    # 1. the reference's log-probs of each completion, computed once
    if config.precompute_reference:
        reference.precompute(pairs.used())
    if not checkpoints.done:
        say(fold(f"before: {summary(evaluate(policy, reference, pairs.heldout, config, stage))}"))

    for step in checkpoints.remaining():
        for batch in pairs.batches(step):
            # 2. log-probs of both completions of each pair, under the policy and under the reference: (B,) each
            chosen, rejected = policy_logps(policy, batch, config, stage)
            ref_chosen, ref_rejected = reference.logps(batch)

            # 3. the loss, divided by the number of pairs in the whole step; with two sequences each for a router's loss
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                chosen, rejected, ref_chosen, ref_rejected, config.beta, config.loss_type, config.label_smoothing
            )
            updates.backward((losses.sum() + policy.router.term / 2) / config.batch_size)
            measure(meter, losses, chosen_rewards, rejected_rewards, chosen.detach(), rejected.detach())
            measure_router(meter, policy.router, 2 * len(batch))
        records.write(step, lambda batch: measure_tokens(batch, policy, reference, config, stage))
        updates.step(step, pairs.where(step))

        # 4. logging
        if stage.log_due(step):
            stage.log(step, meter.collect_and_reset(), updates)
        checkpoints.save_if_due(step)

    result = evaluate(policy, reference, pairs.heldout, config, stage)
    say(fold(f"after: {summary(result)}"))
    policy.save(stage.run.folder)
    result = {f"heldout_{key}": value for key, value in result.items()}
    stage.finish(result, pairs.inputs, "python inference/dpo_inference.py")


def pair_logps(model, pairs, tokenizer, device, per_token):
    """(chosen, rejected) log-probs in nats, (B,) each: sums over the tokens, or means with `per_token`.

    One forward pass computes both completions of a pair, and their common prompt once.
    """
    packed = pack_pairs(pairs, tokenizer.pad_token_id, device)
    return over_completions(packed_logprobs(model, packed), packed.mask, per_token)


def over_completions(logprobs, mask, per_token):
    """(chosen, rejected) log-probs, (B,) each, from those of the tokens (2B, L): see `pair_logps`."""
    logps = logprobs.sum(1)
    if per_token:
        logps = logps / mask.sum(1)
    return logps[0::2], logps[1::2]


def policy_logps(policy, pairs, config, stage):
    """`pair_logps` of the policy, in the run's precision: means over the tokens for IPO, else sums."""
    with stage.autocast():
        return pair_logps(policy.model, pairs, policy.tokenizer, stage.device, config.loss_type == "ipo")


class Reference:
    """The reference's log-probs of both completions of each pair: computed before training, or in each step."""

    def __init__(self, config, stage, policy):
        self.config, self.stage, self.policy = config, stage, policy
        self.known = None  # (pairs, 2), nats, for the pairs of `precompute`, in their order

    def logps(self, pairs):
        """(chosen, rejected), (B,) each, without gradients."""
        if self.known is None:
            return self.compute(pairs)
        known = ([pair[key] for pair in pairs] for key in ("ref_chosen", "ref_rejected"))
        return tuple(torch.tensor(values, device=self.stage.device) for values in known)

    def compute(self, pairs):
        policy, per_token = self.policy, self.config.loss_type == "ipo"
        with self.stage.autocast(), as_reference(policy.model, policy.reference) as model:
            return pair_logps(model, pairs, policy.tokenizer, self.stage.device, per_token)

    def precompute(self, pairs):
        """Compute the log-probs of all `pairs` once, or take them from the checkpoint. Frees the reference's memory."""
        self.known = cache_reference(self.compute, pairs, self.config.micro_batch_size, self.known)
        if not self.config.keep_tokens:  # which needs the reference's log-prob of each token
            self.policy.reference = None  # frees its memory for the steps

    def state_dict(self):
        return {"known": self.known, "precision": self.stage.precision}

    def load_state_dict(self, state):
        """Take the log-probs of a checkpoint, unless they were computed in another precision than the policy's."""
        if state.get("precision", self.stage.precision) == self.stage.precision:
            self.known = state["known"]


def cache_reference(reference_logps, pairs, batch_size, known=None):
    """Store the reference's log-probs of both completions in each pair. Returns all of them, (pairs, 2), in nats.

    known: the result from before an interruption; it is stored again without computing it.
    """
    batches = [] if known is not None else batches_by_length(pairs, batch_size)
    progress = Progress({"batch": len(batches)}, name="batches of reference log-probs")
    for batch in batches:
        for pair, chosen, rejected in zip(batch, *(x.tolist() for x in reference_logps(batch))):
            pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
        progress.tell("batch")
    if known is not None:
        for pair, (chosen, rejected) in zip(pairs, known.tolist()):
            pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected
    return torch.tensor([[pair["ref_chosen"], pair["ref_rejected"]] for pair in pairs], dtype=torch.float64)


def measure(meter, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps):
    """Add the means over pairs to the meter. Chosen and rejected log-probs are separate: DPO may lower both."""
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


def measure_tokens(pairs, policy, reference, config, stage):
    """What report/token_view.py shows of pairs: `({name: (2B, L)}, {name: (2B,)}, {name: (B,)})`.

    These are numbers of each token, of each completion (chosen, rejected, chosen, ...) and of each pair.
    """
    packed, per_token = pack_pairs(pairs, policy.tokenizer.pad_token_id, stage.device), config.loss_type == "ipo"
    with stage.autocast():
        logprobs = packed_logprobs(policy.model, packed)
        with as_reference(policy.model, policy.reference) as model:
            ref_logprobs = packed_logprobs(model, packed)
    chosen, rejected = over_completions(logprobs, packed.mask, per_token)
    losses, *rewards = dpo_loss(
        chosen, rejected, *reference.logps(pairs), config.beta, config.loss_type, config.label_smoothing
    )
    of_completions = {"logps": (chosen, rejected), "implicit_reward": rewards}
    of_completions = {name: torch.stack(tuple(both), 1).flatten() for name, both in of_completions.items()}
    of_pairs = {"margin": rewards[0] - rewards[1], "loss": losses}
    return {"logprob": logprobs, "ref_logprob": ref_logprobs}, of_completions, of_pairs


@torch.no_grad()
def evaluate(policy, reference, pairs, config, stage):
    """The same means on held-out pairs, as a dict. Each pair is read by one process. {} if there are no pairs."""
    meter = Meter()
    for batch in batches_by_length(stage.processes.share(sorted(pairs, key=pair_length)), config.micro_batch_size):
        chosen, rejected = policy_logps(policy, batch, config, stage)
        losses = dpo_loss(
            chosen, rejected, *reference.logps(batch), config.beta, config.loss_type, config.label_smoothing
        )
        measure(meter, *losses, chosen, rejected)
    return meter.collect(stage.processes) if pairs else {}


def summary(means):
    return ", ".join(f"{key} {value:.4f}" for key, value in means.items()) or "no held-out pairs"


if __name__ == "__main__":
    cli(main, Config, several=True)
