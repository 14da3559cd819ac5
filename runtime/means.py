"""Means and their 95 % intervals."""

from __future__ import annotations

import math
import statistics


def t975(df):
    """The 97.5 % quantile of Student's t: Abramowitz & Stegun 26.7.5. The error is below 1 % for df >= 3."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**k for k, term in enumerate(terms, start=1))


def interval(values):
    """{"mean", "se", "half", "n"} of independent values: mean, standard error, half of the 95 % interval, number.

    se and half are None for fewer than two values.
    """
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return {"mean": mean, "se": None, "half": None, "n": n}
    se = statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "se": se, "half": t975(n - 1) * se, "n": n}
