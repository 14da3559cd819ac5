"""Means with 95 % intervals, clustered by prompt, and the summary of a list of completions."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np

from data.checks import is_degenerate, words
from runtime.means import interval


def share(values):
    """{"mean", "se", "low", "high", "n"} of independent yes-or-no values: the share of yes and Wilson's 95 % interval.

    Unlike Student's interval, it has a width where all values are equal: none of 50 is 0 to 0.071 (Wilson 1927).
    """
    n, mean, z = len(values), statistics.fmean(values), 1.959964
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = centre - half if mean > 0 else 0.0, centre + half if mean < 1 else 1.0  # exact at the ends
    return {"mean": mean, "se": math.sqrt(mean * (1 - mean) / n), "low": low, "high": high, "n": n}


def share_text(x, digits=3):
    """A `share` as a text, `0.120 (0.056 to 0.238)`; a dash for None."""
    return "-" if x is None else f"{x['mean']:.{digits}f} ({x['low']:.{digits}f} to {x['high']:.{digits}f})"


def prompt_means(answers, value):
    """{prompt id: mean of value(completion) over the completions of the prompt whose value is not None}."""
    groups = {}
    for answer in answers:
        if value(answer) is not None:
            groups.setdefault(answer["id"], []).append(value(answer))
    return {key: statistics.fmean(group) for key, group in groups.items()}


def clustered(answers, value):
    """`interval` of value(completion), clustered by prompt: the interval of the means of the prompts."""
    return interval(list(prompt_means(answers, value).values()))


def distinct(texts, n):
    """Distinct-n (Li et al. 2016): different word n-grams / all word n-grams, over all texts; 0 if there are none.

    It falls with longer texts and with more texts. Compare models only at similar lengths.
    """
    grams = []
    for text in texts:
        found = words(text)
        grams += zip(*(found[i:] for i in range(n)))
    return len(set(grams)) / len(grams) if grams else 0.0


def best_of_kl(n):
    """Upper bound of the KL of best-of-n to its base, nats per sequence: log n - (n - 1) / n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def keep_best(answers, n):
    """For each n consecutive completions of one prompt, the completion that the reward model scores highest."""
    groups = [answers[i : i + n] for i in range(0, len(answers), n)]
    return [{**max(group, key=lambda answer: answer["proxy"]), "kl": None} for group in groups]


def best_of_measured(result, n):
    """The measurement of best-of-n, from a measurement of the model with a multiple of n completions per prompt."""
    answers = keep_best(result["answers"], n)
    return result | {"answers": answers, "greedy": [], "measured": summarise(answers, result["unseen_types"], n)}


def summarise(answers, unseen, best_of=1, greedy=()):
    """The summary of a list of completions, as a dict of numbers and of `interval`s.

    answers: completions as dicts {"id" (of the prompt), "text", "gold" or None, "proxy" or None, "kl" or None (nats),
    "base_nats" (of the completion under the base), "tokens", "finish_reason", "checks" (a list of [type, passed])}.
    unseen: types that occur in no training prompt.
    best_of: each completion is the best of so many; if it is above 1, "kl" is the upper bound `best_of_kl`.
    greedy: the greedy completions; their gold score is "greedy", None without them.
    Gold, proxy and KL are means per completion with intervals; kl_per_token is in nats per token. So is "fluency": the
    completions under the base.
    """
    by_check = {}
    for answer in answers:
        for name, good in answer["checks"]:
            by_check.setdefault(name, []).append({"id": answer["id"], "good": good})
    asked = [{"id": a["id"], "good": good} for a in answers for name, good in a["checks"] if name in unseen]
    have_proxy = all(a["proxy"] is not None for a in answers)
    have_kl = all(a["kl"] is not None for a in answers)
    texts = [a["text"] for a in answers]
    kl = clustered(answers, lambda a: a["kl"]) if have_kl else None
    if best_of > 1:
        kl = {"mean": best_of_kl(best_of), "se": None, "half": None, "n": 0}
    return {
        "answers": len(answers),
        "gold": clustered(answers, lambda a: a["gold"]),
        "greedy": clustered(greedy, lambda a: a["gold"]) if greedy else None,
        "unseen": clustered(asked, lambda c: c["good"]) if asked else None,
        "checks": {name: clustered(by_check[name], lambda c: c["good"]) for name in sorted(by_check)},
        "proxy": clustered(answers, lambda a: a["proxy"]) if have_proxy else None,
        "kl": kl,
        "kl_per_token": sum(a["kl"] for a in answers) / sum(a["tokens"] for a in answers) if have_kl else None,
        "fluency": sum(a["base_nats"] for a in answers) / sum(a["tokens"] for a in answers),
        "finish_stop": statistics.fmean(a["finish_reason"] == "stop" for a in answers),
        "tokens": statistics.fmean(a["tokens"] for a in answers),
        "looping": statistics.fmean(is_degenerate(text) for text in texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def bootstrap_means(by_seed, draws=2000, seed=0):
    """{method: (draws,) means} of bootstrap draws over seeds and prompts, for the order of methods.

    by_seed: {method: [{prompt id: mean score} of each seed]}. A draw takes the same prompts, with replacement, for all
    methods, and for each method as many of its seeds as there are, with replacement.
    """
    rng = np.random.default_rng(seed)
    names = sorted(set.intersection(*(set(means) for runs in by_seed.values() for means in runs)))
    counts = rng.multinomial(len(names), [1 / len(names)] * len(names), size=draws) / len(names)  # (draws, prompts)
    found = {}
    for method, runs in by_seed.items():
        scores = np.array([[means[name] for name in names] for means in runs])  # (seeds, prompts)
        weights = rng.multinomial(len(runs), [1 / len(runs)] * len(runs), size=draws) / len(runs)  # (draws, seeds)
        found[method] = (counts @ scores.T * weights).sum(1)
    return found


def share_above(a, b):
    """The share of draws in which a is above b; equal ones count half."""
    return float(np.mean(a > b) + np.mean(a == b) / 2)


def parts(points, count=12):
    """[(mean of x, `interval` of y)] of (x, y) points in `count` equal parts by x; of fewer if there are few points."""
    points = sorted(points)
    many = min(count, max(1, len(points) // 2))
    cuts = [len(points) * i // many for i in range(many + 1)]
    found = (points[a:b] for a, b in zip(cuts, cuts[1:]))
    return [(statistics.fmean(x for x, _ in part), interval([y for _, y in part])) for part in found if part]


def pair_accuracy(answers):
    """How often the proxy prefers the better of two completions of one prompt, over all pairs that differ in gold.

    Returns the interval of `clustered` with the number of `pairs`, or None if there are no such pairs. Equal proxies
    count half.
    """
    groups, pairs = {}, []
    for answer in (answer for answer in answers if answer["gold"] is not None):
        groups.setdefault(answer["id"], []).append(answer)
    for key, group in groups.items():
        for a, b in itertools.combinations(group, 2):
            if a["gold"] != b["gold"]:
                agree = (a["gold"] - b["gold"]) * (a["proxy"] - b["proxy"])
                pairs.append({"id": key, "right": 1.0 if agree > 0 else 0.5 if agree == 0 else 0.0})
    return clustered(pairs, lambda pair: pair["right"]) | {"pairs": len(pairs)} if pairs else None


def plus_minus(x, digits=3):
    """An interval as a text, `0.412 +- 0.051`; a dash for None."""
    if x is None:
        return "-"
    return f"{x['mean']:.{digits}f}" + (f" +- {x['half']:.{digits}f}" if x["half"] is not None else "")


def number_or_dash(value):
    """A number with two decimals, a dash for None."""
    return "-" if value is None else f"{value:.2f}"
