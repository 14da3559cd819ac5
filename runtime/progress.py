"""How far a long command is: the parts that are done, the time that has passed, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from statistics import fmean

from runtime.console import duration, say


class Progress:
    """Counts the parts of a long command and estimates the time that is left.

    parts: how many there are of each kind, {kind: number}. expected: how long one of a kind took before, in any unit,
    {kind: time}; kinds that are not in it count as the mean of the others. name: what the parts are called.
    """

    def __init__(
        self, parts: Mapping[Hashable, int], expected: Mapping[Hashable, float] | None = None, name: str = "runs"
    ):
        self.left, self.expected, self.name = dict(parts), expected or {}, name
        self.total = sum(parts.values())
        self.spent: dict[Hashable, tuple[float, int]] = {}  # {kind: (seconds, number) of the parts that are done}
        self.began = self.last = self.told = time.time()

    def count(self, kind: Hashable, seconds: float | None = None) -> None:
        """Count one part of this kind. seconds: what it took; by default, the time since the part before it."""
        now = time.time()
        before, number = self.spent.get(kind, (0.0, 0))
        self.spent[kind] = (before + (now - self.last if seconds is None else seconds), number + 1)
        self.left[kind] -= 1
        self.last = now

    def done(self, kind: Hashable, seconds: float | None = None) -> str:
        """`count`, and return a text: '3/10 runs | 2m05s | eta 4m52s'."""
        self.count(kind, seconds)
        number = self.total - sum(self.left.values())
        return f"{number}/{self.total} {self.name} | {duration(self.last - self.began)} | eta {duration(self.eta())}"

    def tell(self, kind: Hashable, seconds: float | None = None, every: float = 5.0) -> None:
        """`count`, and print the text of `done` if `every` seconds have passed since the last."""
        if time.time() - self.told < every:
            self.count(kind, seconds)
            return
        say(f"  {self.done(kind, seconds)}")
        self.told = self.last

    def eta(self) -> float:
        """Seconds that are left.

        A kind of which a part is done takes the mean of its parts. Another kind takes what was expected, times how much
        longer than expected the parts took until now.
        """
        means = {kind: seconds / number for kind, (seconds, number) in self.spent.items()}
        usual = fmean(self.expected.values()) if self.expected else 1.0
        expected = {kind: self.expected.get(kind, usual) for kind in self.left}
        factor = sum(means.values()) / sum(expected[kind] for kind in means)
        return sum(count * means.get(kind, factor * expected[kind]) for kind, count in self.left.items())
