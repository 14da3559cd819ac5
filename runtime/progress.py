"""How far a long command is: the parts that are done, the time that has passed, and the time that is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Hashable, Mapping

from runtime.console import duration, say


class Progress:
    """Counts the parts of a long command and estimates the time that is left.

    parts: how many there are of each kind, {kind: number}. expected: how long one of a kind took before, in any unit,
    {kind: time}; kinds that are not in it count as the mean of the others. name: what a part is called.
    """

    def __init__(
        self, parts: Mapping[Hashable, int], expected: Mapping[Hashable, float] | None = None, name: str = "runs"
    ):
        self.left, self.expected, self.name = dict(parts), expected or {}, name
        self.total = sum(parts.values())
        self.seconds: dict[Hashable, list[float]] = {}  # {kind: seconds of each part that is done}
        self.began = self.last = self.told = time.time()

    def done(self, kind: Hashable, seconds: float | None = None) -> str:
        """Count one part of this kind. Returns a text: '3/10 runs | 2m05s | eta 4m52s'.

        seconds: what it took; by default, the time since the part before it was done.
        """
        now = time.time()
        self.seconds.setdefault(kind, []).append(now - self.last if seconds is None else seconds)
        self.last = now
        self.left[kind] -= 1
        count = self.total - sum(self.left.values())
        return f"{count}/{self.total} {self.name} | {duration(now - self.began)} | eta {duration(self.eta())}"

    def tell(self, kind: Hashable, seconds: float | None = None, every: float = 5.0) -> None:
        """Count one part of this kind, and print the text of `done` if `every` seconds have passed since the last."""
        text, now = self.done(kind, seconds), time.time()
        if now - self.told >= every:
            self.told = now
            say(f"  {text}")

    def eta(self) -> float:
        """Seconds that are left.

        A kind of which a part is done takes the mean of its parts. Another kind takes what was expected, times how much
        longer than expected the parts took until now.
        """
        means = {kind: statistics.mean(seconds) for kind, seconds in self.seconds.items()}
        usual = statistics.mean(self.expected.values()) if self.expected else 1.0
        expected = {kind: self.expected.get(kind, usual) for kind in self.left}
        factor = sum(means.values()) / sum(expected[kind] for kind in means)
        return sum(count * means.get(kind, factor * expected[kind]) for kind, count in self.left.items())
