"""How far a benchmark is: the runs that are done, the time that has passed, and the time that is left."""

from __future__ import annotations

import statistics
import time

from runtime.console import duration


class Progress:
    """Counts the runs of a benchmark and estimates the time that is left.

    runs: how many runs there are of each kind, {kind: number}. expected: how long one run of a kind took before, in
    any unit, {kind: time}; kinds that are not in it count as the mean of the others.
    """

    def __init__(self, runs, expected=None):
        self.left, self.expected = dict(runs), expected or {}
        self.total = sum(runs.values())
        self.seconds = {}  # {kind: seconds of each run that is done}
        self.began = time.time()

    def done(self, kind, seconds):
        """Count one run of this kind. Returns a text: '3/10 runs | 2m05s | eta 4m52s'."""
        self.seconds.setdefault(kind, []).append(seconds)
        self.left[kind] -= 1
        count = self.total - sum(self.left.values())
        return f"{count}/{self.total} runs | {duration(time.time() - self.began)} | eta {duration(self.eta())}"

    def eta(self):
        """Seconds that are left.

        A kind of which a run is done takes the mean of its runs. Another kind takes what was expected, times how much
        longer than expected the runs took until now.
        """
        means = {kind: statistics.mean(seconds) for kind, seconds in self.seconds.items()}
        usual = statistics.mean(self.expected.values()) if self.expected else 1.0
        expected = {kind: self.expected.get(kind, usual) for kind in self.left}
        factor = sum(means.values()) / sum(expected[kind] for kind in means)
        return sum(count * means.get(kind, factor * expected[kind]) for kind, count in self.left.items())
