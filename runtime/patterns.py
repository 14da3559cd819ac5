"""The table of known patterns in the metrics of a run: what is seen, what it means, whether to worry, and what to try.

A pattern is one small function. `pattern` puts it into the table `PATTERNS`, with the metrics that it needs and its
thresholds, each with its source. docs/doctor.md shows this table. Trends are differences between the means of the
thirds of a run, beyond the 95 % interval of the difference. Single steps decide nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.readings import LEAST, change, fell, number, rose


@dataclass(frozen=True)
class Finding:
    """A pattern that was found. short: for one line on the terminal. seen, means, advice: sentences."""

    level: Literal["act", "look", "normal"]
    short: str
    seen: str
    means: str
    advice: str
    pattern: str = ""


@dataclass(frozen=True)
class Pattern:
    """An entry of the table.

    needs: {metric, or `result.NAME` of the manifest: the number of lines with it that the pattern takes}.
    limits: its thresholds by name. when: what is compared with them. source: where they come from.
    """

    key: str
    title: str
    find: Callable[..., Finding | None]
    needs: dict[str, int]
    limits: dict[str, float]
    when: str
    source: str


PATTERNS: list[Pattern] = []


def pattern(title, needs, when, source, **limits):
    """A decorator that puts a function into the table. Its name is the key of the pattern.

    needs: names of metrics. `loss` takes LEAST lines with a loss, `loss:3` takes three. when: the words
    for `Pattern.when`, with the limits in braces. The function takes the `Readings` and the limits, and returns a
    `Finding` or None.
    """

    def add(find):
        counts = {name: int(count or LEAST) for name, _, count in (word.partition(":") for word in needs.split())}
        PATTERNS.append(Pattern(find.__name__, title, find, counts, limits, when.format(**limits), source))
        return find

    return add


def advice(*parts):
    """Options to try as a sentence; an option that the run had already is None."""
    return "; ".join(filter(None, parts)) + "."


# All of training


@pattern(
    "loss spikes", "loss lr",
    "a loss is more than {times:g} times the median of its ten neighbours, and {deviations:g} deviations (1.48 times "
    "the median absolute one) above it; `normal` in at most {share:.0%} of the lines. Not for PPO and GRPO",
    "Chowdhery et al. 2022 (PaLM), section 5.1: spikes that come and go; own runs: up to 7 times (DPO), 6 deviations",
    times=1.5, deviations=10, share=0.02,
)  # fmt: skip
def loss_spikes(run, times, deviations, share):
    if run.series("reward"):
        return None  # the loss of PPO and GRPO has no level of its own
    return _spikes(run, "loss", times, deviations, share)


@pattern(
    "gradient norm spikes", "grad_norm",
    "a gradient norm is more than {times:g} times the median of its ten neighbours, and {deviations:g} deviations "
    "above it; `normal` in at most {share:.0%} of the lines",
    "as for the loss; own runs: up to 7 times the median (DPO)",
    times=10, deviations=8, share=0.02,
)  # fmt: skip
def grad_norm_spikes(run, times, deviations, share):
    return _spikes(run, "grad_norm", times, deviations, share)


def _spikes(run, key, times, deviations, share):
    pairs, name = run.series(key), {"grad_norm": "gradient norm"}.get(key, key)
    values = [value for _, value in pairs]
    around = [statistics.median(values[max(i - 5, 0) : i] + values[i + 1 : i + 6]) for i in range(len(values))]
    spread = 1.4826 * statistics.median(abs(value - level) for value, level in zip(values, around))
    high = [
        (step, value, level)
        for (step, value), level in zip(pairs, around)
        if value > times * max(level, 0.0) and value - level > deviations * spread
    ]
    if not high:
        return None
    step, value, level = max(high, key=lambda spike: spike[1] - spike[2])
    rare = len(high) <= max(1, share * len(values))
    others = f" (and {len(high) - 1} more)" if len(high) > 1 else ""
    return Finding(
        "normal" if rare else "look",
        f"{name} spikes: {len(high)} of {len(values)} lines",
        f"At step {step} the {name} is {number(value)}, and {number(level)} in the lines around it{others}.",
        "One batch was unlike the others: odd data, or an extreme ratio or return. It came back to its level."
        if rare
        else "Single batches throw the weights about, again and again.",
        "Nothing: max_grad_norm limits a rare one."
        if rare
        else advice(run.scaled("lr", 0.5), run.scaled("max_grad_norm", 0.5), "read the rows of these steps"),
    )


@pattern(
    "skipped steps", "skipped:1",
    "steps whose loss or gradient was not finite were skipped; `act` from {act:g} of them",
    "every such step is lost; one may be an odd row",
    act=3,
)  # fmt: skip
def skipped_steps(run, act):
    count, steps = sum(run.values("skipped")), [step for step, number in run.series("skipped") if number]
    if not count:
        return None
    where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return Finding(
        "act" if count >= act else "look",
        f"{count:.0f} steps were skipped: not finite",
        f"{count:.0f} steps were skipped by {where}: their loss or gradient was nan or infinite.",
        "Numbers overflow: the learning rate is too high, fp16 is too narrow, or a row is odd.",
        advice(run.scaled("lr", 1 / 3), run.option("precision", "bf16"), "read the rows that the log names"),
    )


@pattern(
    "learning rate too high", "loss lr",
    "LM, DPO, reward model: the loss of the last third is above that of the first, by {share:.0%} and by {times:g} "
    "times the half interval. PPO and GRPO: the reward fell so",
    "Goodfellow et al. 2016, section 11.4.1: the training loss rises when the rate is too high; own simulation: "
    "noise alone is taken for it in under 1 % of the runs",
    share=0.05, times=1.5,
)  # fmt: skip
def rate_too_high(run, share, times):
    kind, sign = ("reward", -1) if run.series("reward") else ("loss", 1)
    if run.stored:
        return None  # stored rewards are not those of the policy
    first, _, last = run.thirds(kind)
    difference, half = change(first, last)
    if sign * difference <= max(times * half, share * abs(first.mean)):
        return None
    verb = "rises" if sign > 0 else "falls"
    return Finding(
        "act",
        f"{kind} {verb}: {number(first.mean)} to {number(last.mean)}",
        f"The {kind} {verb} from {first} ({first.steps}) to {last} ({last.steps}).",
        "Training makes the model worse. Mostly the learning rate is too high; or the data change along the way.",
        advice(run.scaled("lr", 1 / 3), run.scaled("warmup_steps", 3, at_zero=10)),
    )


@pattern(
    "a learning rate that did nothing", "lr loss",
    "in the last third. LM: the loss did not fall, and the held-out loss changed by under {text:.1%}. Reward model: "
    "the loss did not fall, and the margin is below {margin:g}. DPO: both log-ratios are below {nats:g} nats. PPO, and "
    "GRPO with a KL: KL below {kl:g} nats per token, or below twice the sampler's (rounding). GRPO without (`look`): "
    "reward, entropy and length are the same",
    "own runs with a rate of 1e-7 to 1e-9: KL 0.0018 nats per token beside a sampler_kl of 0.0016; with the rates of "
    "the YAMLs, 12 steps or more: KL 0.3 (PPO), a margin of 50 nats (DPO), a margin of 3 (reward model)",
    text=0.001, nats=0.1, margin=0.1, kl=0.001,
)  # fmt: skip
def rate_did_nothing(run, **limits):
    seen, level = _nothing_moved(run, **limits) or ("", "")
    if not seen:
        return None
    return Finding(
        level,
        f"nothing moved: {seen}",
        f"In {len(run.lines)} lines nothing moved: {seen}.",
        "The updates are too small to change the model, or nothing reaches it.",
        advice(run.scaled("lr", 3), run.scaled("lr", 10), "look for 'the step is skipped' in the log"),
    )


def _nothing_moved(run, text, nats, margin, kl):
    """(what stood still, "act" or "look"). None if something moved, or if it cannot be said."""
    if len(run.series("kl_per_token")) >= LEAST:
        reached, rounding = run.thirds("kl_per_token")[2].mean, statistics.fmean(run.values("sampler_kl") or [0])
        return (f"KL {number(reached)} nats per token", "act") if reached < max(kl, 2 * rounding) else None
    if len(run.series("reward")) >= LEAST:
        keys = [key for key in ("reward", "entropy", "mean_length") if len(run.series(key)) >= LEAST]
        still = not any(rose(a, b) or fell(a, b) for a, _, b in map(run.thirds, keys))
        return (f"{', '.join(keys)} within noise", "look") if still and not run.stored else None
    if len(run.series("chosen_reward")) >= LEAST:
        beta = run.config.get("beta", 0.1)
        size = max(abs(run.thirds(key)[2].mean) / beta for key in ("chosen_reward", "rejected_reward"))
        return (f"log-ratios of {number(size)} nats", "act") if size < nats else None
    first, _, last = run.thirds("loss")
    if fell(first, last):
        return None
    held = run.values("nats_per_token")
    if len(held) > 1 and abs(held[-1] - held[0]) < text * held[0]:
        return f"held-out loss {number(held[0])} to {number(held[-1])}", "act"
    if len(run.series("margin")) >= LEAST and abs(run.thirds("margin")[2].mean) < margin:
        return f"margin {number(run.thirds('margin')[2].mean)}", "act"
    return None


@pattern(
    "slow for this machine", "tok/s",
    "the median tok/s is below {share:.0%} of that of earlier runs beside it (same script, model, sizes, machine); "
    "without such runs, of the run's own first third (not for PPO and GRPO: their work changes with the completions)",
    "own measurement: DPO and the reward model keep their speed within a tenth over a run",
    share=0.5,
)  # fmt: skip
def slow(run, share):
    values = run.values("tok/s")
    size = len(values) // 3
    if run.earlier:
        usual, now, what = statistics.median(run.earlier), statistics.median(values), f"{len(run.earlier)} earlier runs"
    elif run.series("reward"):
        return None
    else:
        usual, now, what = statistics.median(values[:size]), statistics.median(values[-size:]), "its first third"
    if now >= share * usual:
        return None
    return Finding(
        "look",
        f"{now:,.0f} tokens a second; {what}: {usual:,.0f}",
        f"The median is {now:,.0f} tokens a second, against {usual:,.0f} of {what}.",
        "Other work shares the machine, memory is swapped, or the processor is throttled. The results are the same.",
        advice("Look at top (or nvidia-smi)", f"if memory is short: {run.scaled('micro_batch_size', 0.5)}"),
    )


# Language model


@pattern(
    "over-fitting of the language model", "nats_per_token:2 loss",
    "the last held-out loss is {share:.1%} above the lowest; the training loss fell from the first to the last third",
    "Goodfellow et al. 2016, section 7.8 (early stopping); the held-out blocks are always the same, so noise is small",
    share=0.005,
)  # fmt: skip
def overfitting(run, share):
    held = run.series("nats_per_token")
    first, _, last = run.thirds("loss")
    step, best = min(held, key=lambda pair: pair[1])
    if held[-1][1] < best * (1 + share) or not fell(first, last):
        return None
    return Finding(
        "act",
        f"over-fitting: held-out {number(best)} to {number(held[-1][1])}",
        f"Held-out loss rises from {number(best)} (step {step}) to {number(held[-1][1])} (step {held[-1][0]}), while "
        f"the training loss falls from {number(first.mean)} to {number(last.mean)}.",
        "The model learns its training text by heart.",
        advice(f"--max_steps {max(step, 1)}", "more text", run.scaled("lr", 0.5)),
    )


# Pairs: DPO and the reward model


@pattern(
    "chosen log-prob falls under DPO", "chosen_reward margin",
    "the chosen completions' log-ratio is below 0 in the last third, beyond its interval. `normal`: it fell by at most "
    "{share:g} of the margin, which grows; `look`: by more; `act`: the margin does not grow",
    "Rafailov et al. 2023 train only the difference; Pal et al. 2024 and Razin et al. 2024: displacement; own demo: "
    "the chosen fell by 8 nats, the margin grew to 47",
    share=0.5,
)  # fmt: skip
def chosen_falls(run, share):
    chosen, (start, _, margin) = run.thirds("chosen_reward")[2], run.thirds("margin")
    if chosen.mean + chosen.half >= 0:
        return None
    beta, grows = run.config.get("beta"), rose(start, margin)
    level = "act" if not grows else "normal" if -chosen.mean <= share * margin.mean else "look"
    unit = beta or 1.0
    name = "nats per token" if run.config.get("loss_type") == "ipo" else "nats" if beta else "times beta, in nats"
    means = {
        "normal": "DPO trains only the difference. A moderate fall of both is usual while the margin grows.",
        "look": "Much of the margin comes from unlearning both: probability goes to completions of no pair.",
        "act": "Both fall, and the margin does not grow: the policy only loses what it knew.",
    }
    return Finding(
        level,
        f"chosen log-probs fell by {number(-chosen.mean / unit)} {name}; margin {number(margin.mean / unit)}",
        f"In {chosen.steps} the chosen completions are {number(-chosen.mean / unit)} {name} below the reference, and "
        f"the margin is {number(margin.mean / unit)} (at first {number(start.mean / unit)}).",
        means[level],
        "Nothing."
        if level == "normal"
        else advice(
            run.scaled("lr", 1 / 3),
            run.scaled("beta", 3),
            run.option("epochs", 1),
            "SFT on the chosen completions first",
        ),
    )


@pattern(
    "a reward model that has learned length",
    "result.length_correlation result.heldout_accuracy result.heldout_pairs result.length_rule_accuracy",
    "over held-out pairs, the difference in score and the difference in length correlate by {look:g} or more, and the "
    "accuracy is not above that of the best rule by length, beyond 1.96 standard errors: `act`; by {strong:g} or more: "
    "`look` in any case",
    "Singhal et al. 2023 correlate score and length, with length alone as the baseline; own reward model, healthy: "
    "-0.72, accuracy 0.91, rule 0.72",
    look=0.5, strong=0.9,
)  # fmt: skip
def learned_length(run, look, strong):
    correlation, accuracy = run.result["length_correlation"], run.result["heldout_accuracy"]
    rule, pairs = run.result["length_rule_accuracy"], run.result["heldout_pairs"]
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / pairs)
    no_better = accuracy - margin <= rule
    if abs(correlation) < look or not (no_better or abs(correlation) >= strong):
        return None
    better = "longer" if correlation > 0 else "shorter"
    return Finding(
        "act" if no_better else "look",
        f"score follows length: correlation {correlation:+.2f}",
        f"On {pairs} held-out pairs the difference in score and in length correlate by {correlation:+.2f}; accuracy "
        f"{accuracy:.2f} +- {margin:.2f}, and that of the best rule by length {rule:.2f}.",
        f"The score may say little more than '{better} is better'. A policy that maximises it becomes {better}.",
        f"Balance the lengths of chosen and rejected in {run.config.get('data', 'the data')}; pairs of equal length.",
    )


# Rollouts: PPO and GRPO


@pattern(
    "GRPO loss near 0", "loss:3 frac_reward_zero_std:3",
    "the mean loss is at most {most:g} in size",
    "the advantages of a group add up to 0: derived in docs/methods/grpo.md; own runs: 0.007 to 0.036",
    most=0.1,
)  # fmt: skip
def grpo_loss(run, most):
    loss = run.whole("loss")
    if abs(loss.mean) > most:
        return None
    return Finding(
        "normal",
        f"loss {loss.mean:+.3f}: near 0 is normal for GRPO",
        f"The mean loss is {loss.mean:+.4f} ({loss.steps}).",
        "The advantages of a group add up to 0, so the loss is near 0 from the start. Its gradient is not 0.",
        "Nothing. Judge the run by reward.",
    )


@pattern(
    "groups without signal", "frac_reward_zero_std reward",
    "in the last third at least {share:.0%} of the groups have equal rewards. `normal` where the gold score is at "
    "least {solved:g}: the prompts are solved; `act` from {all:.0%}",
    "Yu et al. 2025 (DAPO, dynamic sampling): such groups have no gradient; own demo run: 52 % at the end",
    share=0.75, all=0.95, solved=0.9,
)  # fmt: skip
def no_signal(run, share, all, solved):
    equal, reward = run.thirds("frac_reward_zero_std")[2], run.thirds("reward")[2]
    if equal.mean < share:
        return None
    gold = run.thirds("gold")[2].mean if len(run.series("gold")) >= LEAST else None
    done = gold is not None and gold >= solved
    level = "normal" if done else "act" if equal.mean >= all else "look"
    return Finding(
        level,
        f"{equal.mean:.0%} of the groups have equal rewards",
        f"In {equal.steps} all rewards are equal in {equal.mean:.0%} of the groups; mean reward {number(reward.mean)}.",
        "Most prompts are solved: little is left to learn here."
        if done
        else "Equal rewards have no advantage: these completions were sampled for nothing.",
        "Harder prompts, or stop here."
        if done
        else advice(
            run.scaled("samples_per_prompt", 2),
            "prompts that are solved sometimes",
            "a reward with steps between 0 and 1",
        ),
    )


@pattern(
    "completions cut by length", "clipped_ratio",
    "in the last third the length limit cut {look:.0%} of the completions or more; `act` from {act:.0%}, if it does "
    "not fall",
    "Yu et al. 2025 (DAPO, overlong completions); Huang et al. 2024 (N+ details of RLHF with PPO): the EOS trick; own "
    "demo runs: 1 to 12 % at the end",
    look=0.25, act=0.5,
)  # fmt: skip
def completions_cut(run, look, act):
    first, _, cut = run.thirds("clipped_ratio")
    if cut.mean < look:
        return None
    falling = fell(first, cut)
    means = "They are scored in mid-sentence" + (", but fewer and fewer are." if falling else ".")
    ends = run.option("missing_eos_penalty", 1.0) if run.series("value_loss") else "a reward of 0 for a cut completion"
    return Finding(
        "act" if cut.mean >= act and not falling and not run.stored else "look",
        f"{cut.mean:.0%} of the completions are cut by length",
        f"In {cut.steps} the length limit cut {cut.mean:.0%} +- {cut.half:.0%} of the completions (at first "
        f"{first.mean:.0%}).",
        means,
        "Sample the groups again with twice the --max_new_tokens, by data/generate_preferences_multi.py."
        if run.stored
        else advice(run.scaled("max_new_tokens", 2), ends, "more steps" if falling else None),
    )


@pattern(
    "KL rises, score does not", "kl reward sampler_kl",
    "from the first to the last third the KL rose, beyond its interval and by {nats:g} nats per sequence, and the "
    "reward by less than one standard error",
    "Gao et al. 2022: score as a function of the KL; what KL buys in a healthy run is a higher score",
    nats=0.5,
)  # fmt: skip
def kl_without_gain(run, nats):
    (kl_first, _, kl), (first, _, last) = run.thirds("kl"), run.thirds("reward")
    gained = last.mean - first.mean >= math.hypot(first.se, last.se)
    if gained or not rose(kl_first, kl) or kl.mean - kl_first.mean < nats:
        return None
    return Finding(
        "look",
        f"KL {number(kl_first.mean)} to {number(kl.mean)} nats, reward stays {number(last.mean)}",
        f"The KL rises from {number(kl_first.mean)} ({kl_first.steps}) to {number(kl.mean)} nats per sequence "
        f"({kl.steps}); the reward is {first}, then {last}.",
        "The policy moves, but not to better completions: noise, or a reward that does not tell them apart.",
        advice(run.scaled("lr", 1 / 3), run.scaled("prompts_per_step", 2), run.scaled("kl_coef", 3, at_zero=0.02)),
    )


@pattern(
    "proxy up while gold falls", "reward gold",
    "from the best earlier third to the last, the reward rose and the gold score fell, both beyond their intervals",
    "Gao et al. 2022, figure 1: over-optimisation of a reward model",
)  # fmt: skip
def overoptimised(run):
    golds, rewards = run.thirds("gold"), run.thirds("reward")
    best = max((0, 1), key=lambda i: golds[i].mean)
    before, last = golds[best], golds[2]
    if not fell(before, last) or not rose(rewards[best], rewards[2]):
        return None
    return Finding(
        "act",
        f"reward rises, gold falls: {before.mean:.2f} to {last.mean:.2f}",
        f"From {before.steps} to {last.steps} the reward rises from {rewards[best]} to {rewards[2]}, "
        f"and the gold score falls from {before} to {last}.",
        "The policy exploits errors of the reward (over-optimisation): what is measured is no longer what is wanted.",
        advice(f"--steps {before.last}", run.scaled("kl_coef", 3, at_zero=0.02), "new pairs from this policy"),
    )


@pattern(
    "ratio away from 1 on the first inner step", "approx_kl_first:1",
    "`approx_kl` of the first update after a rollout is above {most:g} in some line",
    "Huang et al. 2022 (37 details of PPO), their debugging advice: the ratio is 1 before the first update; own "
    "measurement: exactly 0, in fp32 and in bf16",
    most=1e-6,
)  # fmt: skip
def ratio_first(run, most):
    step, value = max(run.series("approx_kl_first"), key=lambda pair: pair[1])
    if value <= most:
        return None
    return Finding(
        "act",
        f"ratio is not 1 on the first inner step (KL {number(value)})",
        f"At step {step}, before any update, the KL between old and current policy is {number(value)} nats per token.",
        "Old and new log-probs are computed differently: dropout, temperature, precision, or another batch. It is a "
        "mistake in the code, and all later numbers are wrong, too.",
        "--lr 1e-30 --steps 2 shows it alone; compare the two calls that compute the log-probs.",
    )


@pattern(
    "sampler away from the policy", "sampler_kl:3",
    "the mean of `sampler_kl` is above {look:g} nats per token, beyond its interval; `act` above {act:g}",
    "rlhf/steps.py: more than a few thousandths; own demo runs in bf16: 0.0016 (PPO), 0.0033 (GRPO); Yao et al. 2025 "
    "on samplers that differ from training",
    look=0.005, act=0.02,
)  # fmt: skip
def sampler_away(run, look, act):
    kl = run.whole("sampler_kl")
    if kl.mean - kl.half <= look:
        return None
    return Finding(
        "act" if kl.mean - kl.half > act else "look",
        f"sampler_kl {number(kl.mean)} nats per token",
        f"Over {kl.steps} the KL from sampler to policy is {kl} nats per token.",
        "The samples come from another distribution than the one that trains: the gradient is biased.",
        advice(
            run.option("precision", "fp32"), "look at what differs: a merged adapter, the temperature, the stop tokens"
        ),
    )


@pattern(
    "entropy collapse", "entropy reward",
    "the entropy of the last third is below {nats:g} nats per token and below {share:.0%} of the first. `look` while "
    "the reward still rises",
    "Cui et al. 2025 (the entropy mechanism): reward is bought with entropy until none is left; own runs end at 0.22",
    nats=0.05, share=0.2,
)  # fmt: skip
def entropy_collapse(run, nats, share):
    first, _, last = run.thirds("entropy")
    if last.mean >= nats or last.mean >= share * first.mean:
        return None
    rising = rose(*run.thirds("reward")[1:])
    return Finding(
        "look" if rising else "act",
        f"entropy {number(first.mean)} to {number(last.mean)} nats per token",
        f"The entropy falls from {first} ({first.steps}) to {last} nats per token ({last.steps}).",
        "All completions of a prompt become alike: nothing new is tried, and groups lose their signal.",
        advice(run.scaled("lr", 1 / 3), run.option("temperature", 1.0), run.scaled("kl_coef", 3, at_zero=0.02)),
    )


@pattern(
    "a value head that explains nothing", "explained_variance",
    "the 95 % interval of the explained variance in the last third ends below {most:g}; `act` if it ends below 0",
    "OpenAI Baselines, `explained_variance`: 1 is perfect, 0 as good as a constant, below 0 worse; own runs of 12 "
    "steps and 16 completions: -0.1 +- 0.4, so a mean alone says little",
    most=0.05,
)  # fmt: skip
def value_head(run, most):
    explained = run.thirds("explained_variance")[2]
    if explained.mean + explained.half >= most:
        return None
    return Finding(
        "act" if explained.mean + explained.half < 0 else "look",
        f"values explain nothing (explained variance {number(explained.mean)})",
        f"In {explained.steps} the explained variance of the values is {explained}.",
        "The values predict the returns no better than a constant: advantages are as noisy as the rewards.",
        advice(run.scaled("vf_coef", 5), run.scaled("steps", 2), "scores of size 1 around 0"),
    )


@pattern(
    "most tokens are clipped", "clipfrac",
    "the clip fraction of the last third is at least {look:.0%}; `act` from {act:.0%}",
    "Huang et al. 2022 (37 details of PPO) watch it; rule of thumb of docs/methods: below 20 %; own demo runs: 2 % "
    "(PPO), 18 % (GRPO offline)",
    look=0.3, act=0.5,
)  # fmt: skip
def clipped(run, look, act):
    share = run.thirds("clipfrac")[2]
    if share.mean < look:
        return None
    return Finding(
        "act" if share.mean >= act else "look",
        f"{share.mean:.0%} of the tokens are clipped",
        f"In {share.steps} clipping takes the gradient of {share.mean:.0%} +- {share.half:.0%} of the tokens.",
        "The policy moves far from the one that sampled: the steps are too large, or the samples too old.",
        advice(
            run.scaled("lr", 1 / 3), run.option("inner_epochs", 1), "sample the groups again" if run.stored else None
        ),
    )
