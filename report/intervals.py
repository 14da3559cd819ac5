"""Means with 95 % intervals, clustered by prompt, and the figures of a list of completions."""

from __future__ import annotations

import itertools
import math
import statistics

from data.checks import is_degenerate, words


def t975(df):
    """The 97.5 % quantile of Student's t: Abramowitz & Stegun 26.7.5, within 1 % from 3 degrees of freedom on."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**k for k, term in enumerate(terms, start=1))


def interval(values):
    """{"mean", "se", "half", "n"} of independent values: the mean, its standard error, half of its 95 % interval.

    se and half are None for fewer than two values.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "se": None, "half": None, "n": n}
    se = statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "se": se, "half": t975(n - 1) * se, "n": n}


def prompt_means(answers, value):
    """{prompt id: mean of value(completion) over its completions}."""
    groups = {}
    for answer in answers:
        groups.setdefault(answer["id"], []).append(value(answer))
    return {key: statistics.fmean(group) for key, group in groups.items()}


def clustered(answers, value):
    """`interval` of value(completion), clustered by prompt: over the prompts' means."""
    return interval(list(prompt_means(answers, value).values()))


def distinct(texts, n):
    """Distinct-n of Li et al. 2016: different word n-grams / all word n-grams, over all texts together; 0 without any.

    It falls as texts get longer or more: compare it between models only at like lengths.
    """
    grams = []
    for text in texts:
        found = words(text)
        grams += zip(*(found[i:] for i in range(n)))
    return len(set(grams)) / len(grams) if grams else 0.0


def best_of_kl(n):
    """Nats a completion by which best-of-n can differ from its base at most: log n - (n - 1) / n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def keep_best(answers, n):
    """Of each n completions that follow each other, all to one prompt, the one that the reward model scores highest."""
    groups = [answers[i : i + n] for i in range(0, len(answers), n)]
    return [{**max(group, key=lambda answer: answer["proxy"]), "kl": None} for group in groups]


def best_of_measured(result, n):
    """The measurement of best-of-n from that of the model itself, whose completions a prompt are a multiple of n."""
    answers = keep_best(result["answers"], n)
    return result | {"answers": answers, "measured": summarise(answers, result["unseen_types"], n)}


def summarise(answers, unseen, best_of=1):
    """The figures of a list of completions; `unseen`: the check types that occur in no training prompt.

    best_of: the completions are each the best of so many, whose KL has a bound alone.

    A completion is {"id", "text", "gold", "proxy" or None, "kl" or None (nats), "tokens", "finish_reason", "checks"}, the last a
    list of [name, passed]. Gold, proxy and KL are per completion, with intervals; kl_per_token is in nats.
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
        "unseen": clustered(asked, lambda c: c["good"]) if asked else None,
        "checks": {name: clustered(by_check[name], lambda c: c["good"]) for name in sorted(by_check)},
        "proxy": clustered(answers, lambda a: a["proxy"]) if have_proxy else None,
        "kl": kl,
        "kl_per_token": sum(a["kl"] for a in answers) / sum(a["tokens"] for a in answers) if have_kl else None,
        "finish_stop": statistics.fmean(a["finish_reason"] == "stop" for a in answers),
        "tokens": statistics.fmean(a["tokens"] for a in answers),
        "looping": statistics.fmean(is_degenerate(text) for text in texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
    }


def pair_accuracy(answers):
    """How often the proxy prefers the better of two completions to one prompt, over all such pairs that differ in gold.

    Returns `clustered`'s interval with the number of `pairs` beside it, or None where no two completions to one prompt
    differ. Equal proxies count half.
    """
    groups, pairs = {}, []
    for answer in answers:
        groups.setdefault(answer["id"], []).append(answer)
    for key, group in groups.items():
        for a, b in itertools.combinations(group, 2):
            if a["gold"] != b["gold"]:
                agree = (a["gold"] - b["gold"]) * (a["proxy"] - b["proxy"])
                pairs.append({"id": key, "right": 1.0 if agree > 0 else 0.5 if agree == 0 else 0.0})
    return clustered(pairs, lambda pair: pair["right"]) | {"pairs": len(pairs)} if pairs else None


def plus_minus(x, digits=3):
    """`0.412 +- 0.051`; a dash for what was not measured."""
    if x is None:
        return "-"
    return f"{x['mean']:.{digits}f}" + (f" +- {x['half']:.{digits}f}" if x["half"] is not None else "")
