"""MAUVE, written from its paper: how far a set of generated texts is from a set of human texts, from 0 to 1.

Pillutla et al. 2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers". Texts
are features, here of the frozen base; k-means turns both sets into histograms P and Q over the same clusters; and the
value is the area under the divergence frontier of P and Q (equations 1 and 2). Equal sets give 1.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.means import t975

SCALE = 5.0  # c of the paper
POINTS = 100  # mixtures of P and Q on the frontier
VARIANCE = 0.9  # that the principal components keep
STARTS, ITERATIONS = 5, 500  # of k-means, as in the paper
SEEDS = 5
GROUPS = 10  # of the jackknife over texts
LEAST = 500  # texts of a side; with fewer the value depends on their number


def principal_components(features: np.ndarray) -> np.ndarray:
    """Features (N, D) in the fewest principal components that keep VARIANCE, each row of length 1."""
    centred = features - features.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    kept = int(np.searchsorted(np.cumsum(singular**2) / (singular**2).sum(), VARIANCE)) + 1
    projected = centred @ directions[:kept].T
    return projected / np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)


def squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N, K) squared distances of points (N, D) to centres (K, D)."""
    return np.maximum((points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1), 0)


def k_means(points: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster (N,) of each point: the best of STARTS runs of Lloyd's algorithm, each begun by k-means++."""
    rng = np.random.default_rng(seed)
    best, least = np.zeros(len(points), dtype=int), math.inf
    for _ in range(STARTS):
        centres = points[[rng.integers(len(points))]]
        while len(centres) < k:
            nearest = squared_distances(points, centres).min(1)
            total = nearest.sum()
            if total == 0:  # fewer different points than clusters
                break
            centres = np.vstack([centres, points[rng.choice(len(points), p=nearest / total)]])
        labels = None
        for _ in range(ITERATIONS):
            distances = squared_distances(points, centres)
            found = distances.argmin(1)
            if labels is not None and np.array_equal(found, labels):
                break
            labels = found
            for cluster in np.unique(labels):  # a cluster that has lost its points keeps its centre
                centres[cluster] = points[labels == cluster].mean(0)
        inertia = squared_distances(points, centres).min(1).sum()
        if inertia < least:
            best, least = labels, inertia
    return best


def kl(p: np.ndarray, r: np.ndarray) -> float:
    """KL(p || r) of histograms, in nats."""
    there = p > 0
    return float((p[there] * np.log(p[there] / r[there])).sum())


def frontier_area(p: np.ndarray, q: np.ndarray) -> float:
    """The area under {(exp(-c KL(q || r)), exp(-c KL(p || r)))} over mixtures r = w p + (1 - w) q, with its ends."""
    curve = [(1.0, 0.0)]
    for w in np.linspace(0, 1, POINTS + 2)[1:-1]:
        r = w * p + (1 - w) * q
        curve.append((math.exp(-SCALE * kl(q, r)), math.exp(-SCALE * kl(p, r))))
    x, y = np.array([*curve, (0.0, 1.0)]).T
    return float(((x[:-1] - x[1:]) * (y[:-1] + y[1:]) / 2).sum())


def mauve(human: np.ndarray, generated: np.ndarray, seed: int) -> tuple[float, list[float]]:
    """(MAUVE of two sets of features (N, D), its values without each tenth of the texts) for one seed of k-means.

    The number of clusters is a tenth of the texts of the smaller side, at least 2, as in the paper.
    """
    points = principal_components(np.concatenate([human, generated]).astype(np.float64))
    k = max(2, round(min(len(human), len(generated)) / 10))
    labels = k_means(points, k, seed)
    sides = labels[: len(human)], labels[len(human) :]

    def area(keep):
        p, q = (np.bincount(side[keep(np.arange(len(side)))], minlength=k) for side in sides)
        return frontier_area(p / p.sum(), q / q.sum())

    groups = [area(lambda i, g=g: i % GROUPS != g) for g in range(GROUPS)]
    return area(lambda i: i >= 0), groups


def mauve_interval(human: np.ndarray, generated: np.ndarray) -> dict:
    """The mean of MAUVE over SEEDS seeds of k-means, with its interval and the value of each seed.

    The variance is that of the texts (a jackknife over GROUPS groups of texts with the clusters kept) and that of the
    seeds. A bootstrap would not do: texts that are drawn twice make two sets look different.
    """
    values, variances = [], []
    for seed in range(SEEDS):
        value, left_out = mauve(human, generated, seed)
        values.append(value)
        variances.append((GROUPS - 1) * float(np.var(left_out)))
    se = math.sqrt(float(np.mean(variances)) + float(np.var(values, ddof=1)) / SEEDS)
    half = t975(GROUPS - 1) * se
    return {"mean": float(np.mean(values)), "se": se, "half": half, "n": len(generated), "seeds": values}
