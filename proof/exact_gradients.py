"""Expected gradients against exact ones: the KL estimators, the aggregations of GRPO, the values of PPO."""

from __future__ import annotations

import itertools
import math

import torch
from torch.func import vmap

from proof.exact_bed import (
    UNCLIPPED,
    ZERO,
    exact_values,
    expected_grpo,
    expected_ppo,
    gradient,
    kl,
    objective,
    optimum,
    prefix_logits,
    probabilities,
    random_logits,
    tabular,
    tiny_transformer,
    token_kl,
    transformer_table,
)
from rlhf.grpo_train import group_advantages
from rlhf.ppo_train import gae, policy_loss
from rlhf.utils import kl_estimate

AGGREGATES = ("constant", "sequence", "token")


def compare(found, exact):
    """How a gradient differs from the exact one, as a dict: cosine, ratio of norms, and relative error."""
    return {
        "cosine": torch.cosine_similarity(found, exact, 0).item(),
        "norm": (found.norm() / exact.norm()).item(),
        "error": ((found - exact).norm() / exact.norm()).item(),
    }


def some_policies(bed, seed):
    """(policies, sampler): {name: (parameters, table)} of a tabular policy and a transformer; the table of another."""
    generator = torch.Generator().manual_seed(seed + 1)
    logits = (prefix_logits(bed, bed.ref) + random_logits(bed, 0.7, generator)).requires_grad_()
    sampler = tabular(bed, logits.detach() + random_logits(bed, 0.4, generator))
    model = tiny_transformer(bed, seed + 1)
    policies = {
        "tabular": ([logits], tabular(bed, logits)),
        "transformer": (list(model.parameters()), transformer_table(bed, model)),
    }
    return policies, sampler


# KL estimators


def estimate(bed, table, sampler, kind, ratio, unit):
    """(loss, reward_loss): the estimator's expectation, and a loss whose gradient is that of the estimator as a reward.

    The completions come from `sampler`, a constant. ratio: times pi / sampler, which is differentiated, too. unit:
    "token" sums the estimates of a completion's tokens, as training does; "sequence" takes a whole completion as one
    choice. The reward is -estimate at the time of sampling, as in PPO: reward_loss then descends on the KL where the
    estimator is unbiased.
    """
    p, mask = probabilities(sampler.detach()), bed.mask
    rows = table, sampler.detach(), bed.ref
    if unit == "sequence":
        rows, mask = [x.sum(-1, keepdim=True) for x in rows], bed.mask[:, :1]
    logprobs, old, ref = rows
    weight = (logprobs - old).exp() if ratio else 1.0
    loss = (p[..., None] * weight * kl_estimate(logprobs, ref, kind)).sum((1, 2)).mean()

    mask = mask.repeat(len(p), 1)
    rewards = -kl_estimate(old, ref, kind).flatten(0, 1)
    advantages = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)[0]
    logprobs = logprobs.flatten(0, 1)
    old = old.flatten(0, 1) if ratio else logprobs.detach()

    def one_completion(*row):
        return policy_loss(*(x[None] for x in row), clip_eps=UNCLIPPED, normalizer=1)

    return loss, p.flatten() @ vmap(one_completion)(logprobs, old, advantages, mask) / len(p)


def kl_gradients(bed, parameters, table, sampler, unit):
    """{name: gradient}: that of the exact KL, and the others that an estimator's gradient may be equal to."""
    exact = {"∇KL(π‖ref)": kl(table, bed.ref), "∇KL(ref‖π)": kl(bed.ref, table)}
    exact["-∇KL(μ‖π)"] = -kl(sampler, table)
    exact["∇KL(π‖ref) - ∇KL(π‖μ)"] = kl(table, bed.ref) - kl(table, sampler)
    if unit == "token":
        exact["∇ token KL(π‖ref)"] = token_kl(table, bed.ref, sampler)
        exact["∇ token KL(ref‖π)"] = token_kl(table, bed.ref, sampler, forward=True)
    return {name: gradient(value.mean(), parameters) for name, value in exact.items()}


def identify(found, candidates):
    """The name of the candidate that this gradient equals; "0" for no gradient, and "" for none of them."""
    scale = candidates["∇KL(π‖ref)"].norm()
    if found.norm() < ZERO * scale:
        return "0"
    return next((name for name, g in candidates.items() if (found - g).norm() < ZERO * scale), "")


def measure_estimators(bed, parameters, table, sampler):
    """A dict for each unit, estimator and sampler: errors of the value, and of the gradient in loss and in reward."""
    rows = []
    for unit, kind, off, ratio in itertools.product(("token", "sequence"), ("k1", "k2", "k3"), (0, 1), (0, 1)):
        source = sampler if off else table.detach()
        candidates = kl_gradients(bed, parameters, table, source, unit)
        loss, reward_loss = estimate(bed, table, source, kind, ratio, unit)
        exact = kl(table, bed.ref).mean().item()
        row = {"unit": unit, "kind": kind, "off": bool(off), "ratio": bool(ratio), "value": loss.item() / exact - 1}
        for place, found in (("loss", loss), ("reward", reward_loss)):
            g = gradient(found, parameters)
            row[place] = {**compare(g, candidates["∇KL(π‖ref)"]), "is": identify(g, candidates)}
        rows.append(row)
    return rows


def bias_along_a_path(bed, on_policy, points=13):
    """[(distance, {estimator: relative error of its gradient})] as the policy goes from the reference past pi*.

    on_policy: the policy samples, and distance = KL(policy || reference). Else a policy on the way samples, ratios are
    used where an estimator has one, and distance = KL(sampler || policy). Distances are in nats per sequence, and
    estimates are summed over tokens.
    """
    start, end = prefix_logits(bed, bed.ref), prefix_logits(bed, optimum(bed))
    early = tabular(bed, torch.lerp(start, end, 0.5))
    wanted = {  # kind, with a ratio, in the loss (0) or in the reward (1)
        "k1 in the reward": ("k1", not on_policy, 1),
        "k3 in the reward": ("k3", not on_policy, 1),
        "ratio · k3 in the loss": ("k3", True, 0),
        "k2 in the loss": ("k2", False, 0),
        "k3 in the loss": ("k3", False, 0),
    }
    path = []
    for share in torch.linspace(0.1 if on_policy else 0.52, 1.3, points).tolist():
        logits = torch.lerp(start, end, share).requires_grad_()
        table = tabular(bed, logits)
        exact = gradient(kl(table, bed.ref).mean(), [logits])
        sampler = table.detach() if on_policy else early
        errors = {}
        for name, (kind, ratio, place) in wanted.items():
            found = gradient(estimate(bed, table, sampler, kind, ratio, "token")[place], [logits])
            errors[name] = compare(found, exact)["error"]
        distance = kl(table, bed.ref) if on_policy else kl(early, table)
        path.append((distance.mean().item(), errors))
    return path


# policy gradients


def effective_advantages(bed, table, loss, tokens):
    """The advantage w (P, S) that the expected gradient gives each completion: the gradient is E[w grad log pi].

    Mean over prompts. loss: a function of the table. tokens: what it divides by, so that w has the units of the reward.
    """
    leaf = table.detach().requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf)[0][:, :, 0]  # all tokens of a completion share its advantage
    return -len(leaf) * tokens * slope / probabilities(leaf.detach())


def measure_aggregations(bed, policies, group_size):
    """(rows, completions): each aggregation of GRPO, with and without the group's std, against grad E[reward].

    One step holds a group of each prompt; there is no KL. Each row is a dict. tabular, transformer: `compare`, with the
    loss in units of tokens. hard: how much the hard prompt counts, over how much the graded one does. short: the same
    for completions of one token and the longest; slopes: these two by themselves. advantages: `effective_advantages` of
    the tabular policy.
    completions is a dict: their exact advantages (P, S), their lengths (S,), and the standard deviation of the rewards
    of each prompt.
    """
    rows = []
    table = policies["tabular"][1].detach()
    p = probabilities(table)
    exact = bed.rewards - (p * bed.rewards).sum(1, keepdim=True)
    for aggregate, scale_std in itertools.product(AGGREGATES, (False, True)):

        def loss(table, sampler=None, aggregate=aggregate, scale_std=scale_std):
            sampler = table if sampler is None else sampler
            together = aggregate == "token"  # the others are sums over groups: one group at a time is the same
            return expected_grpo(bed, table, sampler, group_size, together, scale_std=scale_std, aggregate=aggregate)

        row = {"aggregate": aggregate, "scale_std": scale_std}
        for name, (parameters, policy) in policies.items():
            mean_length = (probabilities(policy.detach()) * bed.lengths).sum(1).mean()
            tokens = bed.max_tokens if aggregate == "constant" else mean_length
            found = -tokens * gradient(loss(policy), parameters)
            row[name] = compare(found, gradient(objective(bed, policy, beta=0.0), parameters))
            if name == "tabular":
                w = effective_advantages(bed, policy, loss, tokens)
        product, square = p * w * exact, p * exact * exact  # their ratio of sums: the slope of w against `exact`
        prompt = product.sum(1) / square.sum(1)
        short, long = (product[:, at].sum() / square[:, at].sum() for at in (bed.lengths == 1, bed.mask[:, -1] == 1))
        row |= {"hard": (prompt[1] / prompt[0]).item(), "short": (short / long).item(), "advantages": w.tolist()}
        row["slopes"] = short.item(), long.item()
        rows.append(row)
    spread = dict(zip(("graded", "hard"), (p * exact.square()).sum(1).sqrt().tolist()))
    return rows, {"exact": exact.tolist(), "lengths": bed.lengths.tolist(), "spread": spread}


def success_weight(rate, group_size, scale_std):
    """How much the gradient of a prompt's success rate counts, a float, for rewards 0 and 1: E[A | 1] - E[A | 0].

    Without a group's mean and deviation it would be 1. The number of successes among the others is enumerated.
    """
    count = torch.arange(group_size, dtype=torch.float64)  # of successes among the other completions
    others = torch.arange(group_size - 1) < count[:, None]  # (G, G-1), in one of their orders

    def mean_advantage(reward):
        groups = torch.cat([torch.full((group_size, 1), reward), others], 1).double()
        return p @ group_advantages(groups, scale_std)[:, 0]

    orders = torch.tensor([math.comb(group_size - 1, k) for k in range(group_size)])
    p = orders * rate**count * (1 - rate) ** (group_size - 1 - count)
    return (mean_advantage(1.0) - mean_advantage(0.0)).item()


def measure_critics(bed, parameters, table):
    """A dict for each kind of values, lambda and divisor: PPO's expected gradient against that of the objective.

    The KL is in the reward. divide: what the summed loss is divided by, a constant or the tokens of a batch of two
    completions to each prompt.
    """
    exact = gradient(objective(bed, table), parameters)
    right = exact_values(bed, table, bed.beta)
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(len(right), bed.prefixes, generator=generator, dtype=right.dtype)
    all_values = {
        "none (0)": torch.zeros_like(right),
        "exact": right,
        "exact + noise": (right + noise[:, bed.prefix]) * bed.mask,
    }
    mean_length = (probabilities(table.detach()) * bed.lengths).sum(1).mean()
    rows = []
    for (name, values), lam in itertools.product(all_values.items(), (1.0, 0.95, 0.0)):
        loss = expected_ppo(bed, table, values, lam, size=1, constant=True)
        rows.append({"values": name, "lam": lam, "divide": "constant"})
        rows[-1] |= compare(-bed.max_tokens * gradient(loss, parameters), exact)
    for name, whiten in itertools.product(("none (0)", "exact"), (False, True)):
        loss = expected_ppo(bed, table, all_values[name], 1.0, 2, True, whiten)
        rows.append({"values": name, "lam": 1.0, "divide": "tokens, whitened" if whiten else "tokens"})
        rows[-1] |= compare(-mean_length * gradient(loss, parameters), exact)
    return rows


def measure_old_samples(bed, parameters, table, sampler, group_size):
    """GRPO (constant, no std) on samples of another policy, against grad E[reward]: a dict for each kind of ratio."""
    exact = gradient(objective(bed, table, beta=0.0), parameters)
    factor = bed.max_tokens * group_size / (group_size - 1)
    rows = []
    for name, old, clip in (
        ("ratio, not clipped", sampler, UNCLIPPED),
        ("ratio, clipped at 0.2", sampler, 0.2),
        ("no ratio", table, 0.2),
    ):
        loss = expected_grpo(
            bed, table, sampler, group_size, old=old, scale_std=False, aggregate="constant", clip_low=clip,
            clip_high=clip,
        )  # fmt: skip
        rows.append({"name": name, **compare(-factor * gradient(loss, parameters), exact)})
    return rows
