"""Where DPO, IPO, PPO and GRPO end when their exact expected loss is followed until nothing moves."""

from __future__ import annotations

import torch

from proof.exact_bed import (
    UNCLIPPED,
    exact_values,
    expected_dpo,
    expected_grpo,
    expected_ppo,
    improved,
    ipo_optimum,
    kl,
    make_bed,
    optimum,
    prefix_logits,
    probabilities,
    tabular,
    tiny_transformer,
    transformer_table,
    visits,
)
from runtime.console import say
from train.updates import lr_at


def methods(bed, group_size):
    """{name: (loss, rate, options, closed form)}: the methods that run to their fixed points.

    loss: a function of the table. rate: the step size of `descend`, options: its other options. closed form: the table
    at which the method ends, or None where it is not known.
    """
    beta = bed.beta
    # a group's mean holds the completion itself: E[A | y] = kept * (reward - mean)
    kept = (group_size - 1) / group_size
    rate = 0.5 * len(bed.rewards) / beta
    plain = {"scale_std": False, "aggregate": "constant"}
    unclipped = {"clip_low": UNCLIPPED, "clip_high": UNCLIPPED}

    def ppo(table, values, lam=0.95, vf_coef=1.0):
        return expected_ppo(bed, table, values, lam, group_size, vf_coef=vf_coef)

    def grpo(**options):
        return lambda table: expected_grpo(bed, table, table, group_size, **{"kl_coef": beta, **options})

    def offline(stored=True, **options):
        return lambda table: expected_grpo(
            bed, table, bed.ref, group_size, old=None if stored else table, kl_coef=beta, **options
        )

    myopic, corrected = bed.ref, bed.ref
    for _ in range(bed.max_tokens):
        myopic, corrected = improved(bed, myopic, kept), improved(bed, corrected)
    best = optimum(bed)
    return {
        "DPO": (lambda table: expected_dpo(bed, table) / beta, rate, {}, best),
        "IPO": (lambda table: expected_dpo(bed, table, "ipo", True), 0.5, {}, ipo_optimum(bed, True)),
        "IPO, sums": (lambda table: expected_dpo(bed, table, "ipo"), 0.25, {}, ipo_optimum(bed)),
        "PPO": (ppo, 2.0, {"critic": True}, best),
        "PPO, no values": (lambda table: ppo(table, 0 * table.detach(), 1.0, 0.0), 0.6 * rate, {}, None),
        "GRPO": (grpo(), 2 * rate, {}, None),
        "GRPO, sequence, k3": (grpo(aggregate="sequence", kl_kind="k3"), 1.0, {}, None),
        "GRPO, constant, no std": (grpo(**plain), rate * bed.max_tokens, {}, myopic),
        "GRPO, KL × (G-1)/G": (grpo(**plain, kl_coef=beta * kept), rate * bed.max_tokens, {}, corrected),
        "offline GRPO": (offline(), rate, {"offline": True, "decay": True}, None),
        "offline, constant, no std, no clip": (
            offline(**plain, **unclipped), 0.5 * rate * bed.max_tokens, {"offline": True}, improved(bed, bed.ref, kept),
        ),
        "offline, no stored log-probs": (offline(stored=False), 0.4 * rate, {"offline": True}, None),
    }  # fmt: skip


def descend(bed, loss, rate, steps, critic=False, offline=False, decay=False):
    """(table, trace, norms): where a tabular policy ends that starts at the reference and descends the expected loss.

    Natural gradient descent: the gradient of each choice is divided by how often the policy that samples makes that
    choice. So rare prefixes learn as fast as common ones, and the fixed points are those of the plain gradient.
    critic=True: loss(table, values), with values that learn, too. offline=True: the completions are the reference's.
    decay=True: the step size falls. Clipping leaves kinks, at which the policy comes to rest only so.
    trace: the exact KL(policy || pi*) before each step, in nats per sequence. norms: those of the plain gradient at
    the first and at the last step.
    """
    best = optimum(bed)
    logits = prefix_logits(bed, bed.ref).requires_grad_()
    values = torch.zeros(logits.shape[:2], dtype=logits.dtype, requires_grad=True)
    parameters = [logits, values] if critic else [logits]
    trace, norms = [], []
    for step in range(1, steps + 1):
        table = tabular(bed, logits)
        trace.append(kl(table.detach(), best).mean().item())
        now = loss(table, values[:, bed.prefix] * bed.mask) if critic else loss(table)
        gradients = torch.autograd.grad(now, parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        often = visits(bed, bed.ref if offline else table.detach())
        lr = lr_at(step, steps, rate, 0, 0.0) if decay else rate
        with torch.no_grad():
            for parameter, g, share in zip(parameters, gradients, (often, often.sum(-1))):
                parameter -= lr * g / share
    return tabular(bed, logits.detach()), trace, (norms[0], norms[-1])


def measure_fixed_points(bed, group_size, steps):
    """A dict for each of `methods`: where it ends, what that is worth, and how far from pi* and the closed form."""
    best, rows = optimum(bed), []
    for name, (loss, rate, options, closed) in methods(bed, group_size).items():
        table, trace, norms = descend(bed, loss, rate, steps, **options)
        rows.append(
            {"name": name, "trace": trace, "first_norm": norms[0], "last_norm": norms[1], **describe(bed, table),
             "to_best": kl(table, best).mean().item(), "moved": abs(trace[-1] - trace[-1 - steps // 10]),
             "to_closed": None if closed is None else kl(table, closed).mean().item()}
        )  # fmt: skip
        say(f"{name}: {max(rows[-1]['to_best'], 0):.2g} nats from pi* after {steps} steps, gradient {norms[1]:.1e}")
    return rows


def describe(bed, table):
    """A policy's reward, KL to the reference (nats per sequence) and length (tokens): means over prompts, as a dict."""
    p = probabilities(table)
    sums = {"reward": p * bed.rewards, "length": p * bed.lengths}
    return {**{k: x.sum(1).mean().item() for k, x in sums.items()}, "kl": kl(table, bed.ref).mean().item()}


def measure_one_token(beta, group_size, steps, seed):
    """KL to pi* where GRPO ends (constant, no std, KL * (G-1)/G) if every completion is one token of eight. In nats."""
    bed = make_bed(vocabulary=8, max_tokens=1, beta=beta, seed=seed)
    loss, rate, options, _ = methods(bed, group_size)["GRPO, KL × (G-1)/G"]
    return kl(descend(bed, loss, rate, steps, **options)[0], optimum(bed)).mean().item()


def train_transformer(bed, loss, steps, seed, lr=1e-2):
    """(table, norm): where a tiny transformer ends, and its gradient's norm there. By Adam, with a cosine to 0."""
    model = tiny_transformer(bed, seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(transformer_table(bed, model)).backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, lr, 0, 0.0)
        optimizer.step()
    return transformer_table(bed, model).detach(), norm


def measure_transformer(bed, group_size, steps, seed):
    """A dict each for DPO, PPO with exact values, and GRPO: how far from the closed form the transformer ends."""
    known, beta = methods(bed, group_size), bed.beta
    losses = {name: known[name][0] for name in ("DPO", "GRPO, constant, no std")}
    losses["PPO"] = lambda table: expected_ppo(bed, table, exact_values(bed, table, beta), 0.95, group_size)
    rows = []
    for name, loss in losses.items():
        table, norm = train_transformer(bed, loss, steps, seed)
        to_best, to_closed = (kl(table, x).mean().item() for x in (optimum(bed), known[name][3]))
        rows.append({"name": name, "to_best": to_best, "to_closed": to_closed, "last_norm": norm})
        say(f"transformer, {name}: KL to the closed form {max(to_closed, 0):.1e} nats, gradient norm {norm:.1e}")
    return rows
