"""The sentences of the report, computed from its numbers."""

from __future__ import annotations

import math
import statistics

from report.intervals import pair_accuracy, plus_minus, prompt_means
from runtime.means import interval


def gain(row, base, value=lambda a: a["gold"]):
    """The `interval` of the difference to the base, prompt by prompt (paired).

    It is narrower than the difference of two intervals, because prompts differ.
    """
    theirs, mine = prompt_means(base.answers(), value), prompt_means(row.answers(), value)
    return interval([mine[key] - theirs[key] for key in mine if key in theirs])


def sure(difference):
    """1 if the interval of a difference is above 0, -1 if it is below 0, else 0."""
    if difference["half"] is None or abs(difference["mean"]) <= difference["half"]:
        return 0
    return 1 if difference["mean"] > 0 else -1


def overlap(a, b):
    """Whether two 95 % intervals overlap."""
    return abs(a["mean"] - b["mean"]) <= (a["half"] or 0.0) + (b["half"] or 0.0)


def listed(names):
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "none"


def split_base(rows):
    base = next(row for row in rows if row.key == "base")
    return base, [row for row in rows if row is not base]


def headline(rows):
    """The best method, and the methods whose intervals overlap or do not overlap with that of the base."""
    base, others = split_base(rows)
    if not others:
        return f"Only the base was measured: gold score {plus_minus(base.gold)}."
    best = max(others, key=lambda row: row.gold["mean"])
    times = f", {best.gold['mean'] / base.gold['mean']:.1f} times the base's" if base.gold["mean"] else ""
    if best.gold["mean"] > base.gold["mean"]:
        first = f"{best.label} has the highest gold score, {plus_minus(best.gold)}{times} {plus_minus(base.gold)}."
    else:
        first = f"No method scores above the base, whose gold score is {plus_minus(base.gold)}."
    above = [r.label for r in others if r.gold["mean"] > base.gold["mean"] and not overlap(r.gold, base.gold)]
    below = [r.label for r in others if r.gold["mean"] < base.gold["mean"] and not overlap(r.gold, base.gold)]
    rest = [r.label for r in others if overlap(r.gold, base.gold)]
    parts = [f"95 % intervals above the base's, without overlap: {listed(above)}"]
    parts.append(f"overlapping with it: {listed(rest)}")
    if below:
        parts.append(f"below it, without overlap: {listed(below)}")
    return f"{first} {'; '.join(parts)}."


def greedy_sentence(rows):
    """The greedy score of the best method and of the base, and how often sampled completions end by themselves."""
    base, others = split_base(rows)
    others = [row for row in others if row.greedy]
    if not others or not base.greedy:
        return ""
    best = max(others, key=lambda row: row.greedy["mean"])
    if best.greedy["mean"] <= base.greedy["mean"]:
        return f"Greedy, no method scores above the base, {plus_minus(base.greedy)}."
    times = f", {best.greedy['mean'] / base.greedy['mean']:.1f} times" if base.greedy["mean"] else ", against"
    return (
        f"Greedy, {best.label} is the best: {plus_minus(best.greedy)}{times} the base's {plus_minus(base.greedy)}. "
        f"Of its sampled completions {best.measured['finish_stop']:.0%} end by themselves, of the base's "
        f"{base.measured['finish_stop']:.0%}."
    )


def kl_sentence(rows):
    """The gold score and the KL to the base of the best, the most efficient and the furthest method."""
    base, others = split_base(rows)
    far = [r for r in others if r.measured["kl"] and r.measured["kl"]["mean"] > 0.01]
    better = [r for r in far if r.gold["mean"] > base.gold["mean"]]
    if not better:
        return "None of the methods that moved away from the base scores above it."
    best = max(better, key=lambda r: r.gold["mean"])
    thrifty = max(better, key=lambda r: (r.gold["mean"] - base.gold["mean"]) / r.measured["kl"]["mean"])
    rate = (thrifty.gold["mean"] - base.gold["mean"]) / thrifty.measured["kl"]["mean"]
    furthest = max(far, key=lambda r: r.measured["kl"]["mean"])
    return (
        f"{best.label} reaches the highest gold score of those that moved, {best.gold['mean']:.3f}, at "
        f"{best.measured['kl']['mean']:.1f} nats per sequence; {thrifty.label} gains most a nat ({rate:+.3f}), and "
        f"{furthest.label} went furthest from the base ({furthest.measured['kl']['mean']:.1f} nats)."
    )


def proxy_sentence(rows):
    """The methods whose gold score rose, and those whose proxy alone rose, by the intervals of paired differences."""
    base, others = split_base(rows)
    if any(row.measured["proxy"] is None for row in rows):
        return "There was no reward model: the proxy was not measured."
    kinds = {"both": [], "proxy": [], "gold": [], "neither": []}
    for row in others:
        gold, proxy = sure(gain(row, base)) > 0, sure(gain(row, base, lambda a: a["proxy"])) > 0
        kinds["both" if gold and proxy else "gold" if gold else "proxy" if proxy else "neither"].append(row.label)
    words = {
        "both": "gold and proxy both rose: {}",
        "proxy": "only the proxy rose: {}",
        "gold": "only the gold score rose: {}",
        "neither": "neither rose: {}",
    }
    parts = [words[kind].format(listed(names)) for kind, names in kinds.items() if names]
    text = "; ".join(parts) or "no method to compare"
    return f"Beyond the 95 % interval of the difference to the base, prompt by prompt, {text}."


def reward_sentence(rows):
    """How often the reward model is right on the held-out prompts. None of its training pairs come from them."""
    base, _ = split_base(rows)
    if any(answer["proxy"] is None for answer in base.answers()):
        return ""
    unseen = base.runs[0]["unseen_types"]
    seen = [a for a in base.answers() if not any(name in unseen for name, _ in a["checks"])]
    everywhere, familiar = pair_accuracy(base.answers()), pair_accuracy(seen)
    if not everywhere:
        return "No two completions of the base to one held-out prompt differ in gold: the reward model was not tested."
    half, count = everywhere["half"] or 0, f"{everywhere['pairs']} pairs of {everywhere['n']} prompts"
    text = (
        "Of two completions of the base to one held-out prompt that differ in gold, the reward model prefers the "
        f"better in {everywhere['mean']:.0%} +- {half:.0%} ({count})"
    )
    if not familiar or familiar["pairs"] == everywhere["pairs"]:
        return f"{text}."
    half = familiar["half"] or 0
    return f"{text}; on prompts of types that it was trained on, in {familiar['mean']:.0%} +- {half:.0%}."


def curves_sentence(rows):
    """The scores in the first and in the last fifth of the log lines of each run."""
    found = []
    for row in rows:
        for key, name in (("gold", "gold score"), ("reward", "reward-model score"), ("accuracy", "accuracy on pairs")):
            values = [line[key] for line in row.curves or () if key in line]
            if len(values) < 2 or (key == "reward" and row.key != "ppo"):
                continue
            fifth = max(1, len(values) // 5)
            first, last = statistics.fmean(values[:fifth]), statistics.fmean(values[-fifth:])
            found.append(f"{row.label}'s {name} {'rose' if last > first else 'fell'} from {first:.2f} to {last:.2f}")
    if not found:
        return "No run left a log of its scores."
    return "From the first to the last fifth of its training, on training prompts, " + "; ".join(found) + "."


def checks_sentence(rows):
    """The types on which the best method gained most and least, and the scores on the unseen types."""
    base, others = split_base(rows)
    if not others:
        return "Only the base was measured."
    best = max(others, key=lambda row: row.gold["mean"])
    before, after = base.measured["checks"], best.measured["checks"]
    unseen = base.runs[0]["unseen_types"]
    change = {name: after[name]["mean"] - before[name]["mean"] for name in before if name not in unseen}
    text = "No type of these prompts is in the training prompts."
    if change:
        most, least = max(change, key=change.get), min(change, key=change.get)
        verb = "gains" if change[most] > 0 else "changes"
        text = f"{best.label} {verb} most on {most} ({change[most]:+.2f}) and least on {least} ({change[least]:+.2f})."
    if not base.measured["unseen"]:
        return text + " No type occurs only held-out."
    transfers = [r.label for r in others if sure(unseen_gain(r, base)) > 0]
    start = base.measured["unseen"]["mean"]
    reached = max(others, key=lambda r: r.measured["unseen"]["mean"])
    return (
        f"{text} On the types that occur only held-out ({', '.join(unseen)}) the base passes {start:.2f} and "
        f"{reached.label}, the best there, {reached.measured['unseen']['mean']:.2f}; risen beyond the interval: "
        f"{listed(transfers)}."
    )


def unseen_gain(row, base):
    """`gain` on the types that no training prompt has."""
    return type_gain(row, base, base.runs[0]["unseen_types"])


def type_gain(row, base, types):
    """`gain` of the share of completions that pass, on these types."""

    def asked(answers):
        return [{"id": a["id"], "good": good} for a in answers for name, good in a["checks"] if name in types]

    theirs, mine = (prompt_means(asked(r.answers()), lambda c: c["good"]) for r in (base, row))
    return interval([mine[key] - theirs[key] for key in mine if key in theirs])


def cost_sentence(rows):
    """The cost of alignment: loss on held-out text, and variety (distinct-2)."""
    base, others = split_base(rows)
    moved = [row for row in others if row.key != "best_of"]
    if not moved:
        return "No trained method was measured."
    worst = max(moved, key=lambda row: row.text())
    difference = worst.text() - base.text()
    share = math.exp(difference) - 1
    narrow = min(moved, key=lambda row: row.measured["distinct_2"])
    return (
        f"Held-out text costs the base {base.text():.3f} nats per token and {worst.label}, the highest, "
        f"{worst.text():.3f} ({difference:+.3f}; perplexity {share:+.1%}). The fewest different word pairs are "
        f"{narrow.label}'s: distinct-2 {narrow.measured['distinct_2']:.3f}, the base's "
        f"{base.measured['distinct_2']:.3f}."
    )


def fluency_sentence(rows):
    """How natural the completions are to the base, in nats per token: of the base, the least and the most natural."""
    base, others = split_base(rows)
    if not others:
        return ""
    start = base.measured["fluency"]
    odd, plain = (pick(others, key=lambda row: row.measured["fluency"]) for pick in (max, min))
    return (
        f"To the base its own completions cost {start:.2f} nats per token; the least natural are {odd.label}'s "
        f"({odd.measured['fluency']:.2f}), the most natural {plain.label}'s ({plain.measured['fluency']:.2f})."
    )


def learned_sentence(rows):
    """For each method, the types on which it gained beyond the interval of the difference; unseen types have a star."""
    base, others = split_base(rows)
    unseen, said = base.runs[0]["unseen_types"], []
    for row in others:
        signs = {name: sure(type_gain(row, base, [name])) for name in base.measured["checks"]}
        rose, fell = (listed(name + "*" * (name in unseen) for name in signs if signs[name] == k) for k in (1, -1))
        said.append(f"{row.label}: {rose}" + (f" (fell: {fell})" if fell != "none" else ""))
    what = "Types that rose beyond the 95 % interval of the difference to the base (*: in no training prompt)"
    return f"{what}: {'; '.join(said) or 'no method was measured'}."


def minutes_sentence(rows):
    """What each trained method took in all, and which gained most a minute."""
    base, others = split_base(rows)
    trained = [row for row in others if row.seconds]
    if not trained:
        return "No trained method was measured."
    minutes = {row.label: (row.seconds + (row.seconds_before or 0)) / 60 for row in trained}
    cheap, dear = min(minutes, key=minutes.get), max(minutes, key=minutes.get)
    rate = {row.label: (row.gold["mean"] - base.gold["mean"]) / minutes[row.label] for row in trained}
    best, most = max(rate, key=rate.get), max(trained, key=lambda row: row.memory)
    return (
        f"From the base, with the data and models that it needs, {cheap} took least, {minutes[cheap]:.1f} minutes, and "
        f"{dear} most, {minutes[dear]:.1f}. {best} gained most a minute ({rate[best]:+.3f} of gold score). "
        f"{most.label} took the most memory: {most.memory:.2f} GB."
    )
