"""What the comparison of the shipped tasks was to show, set before it was measured, and whether it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from report.intervals import plus_minus
from report.sentences import listed, overlap, split_base

ANSWERS = 300  # held-out completions of each method, at least
ABOVE_BASE = ("dpo", "ppo", "grpo")
SAMPLED, GREEDY, ENDED = 5, 2, 0.95  # of GRPO: times the base's score, sampled and greedy; completions that end
PAIRS, RIGHT = 100, 0.80  # of the reward model: held-out pairs, and on how many of them it is right


@dataclass(frozen=True)
class Target:
    what: str
    found: str
    reached: bool


def targets(rows, reward_manifest):
    """The `Target`s of a comparison. reward_manifest: that of the reward model, or None."""
    base, _ = split_base(rows)
    by_key = {row.key: row for row in rows}
    found = []
    for key in ABOVE_BASE:
        row, name = by_key.get(key), {"dpo": "DPO", "ppo": "PPO", "grpo": "GRPO online"}[key]
        what = f"{name} above the base, 95 % intervals apart, at least {ANSWERS} held-out completions"
        if row is None:
            found.append(Target(what, "not measured", False))
            continue
        count = row.measured["answers"]
        apart = row.gold["mean"] > base.gold["mean"] and not overlap(row.gold, base.gold)
        said = f"{plus_minus(row.gold)} against {plus_minus(base.gold)}, {count} completions"
        found.append(Target(what, said, apart and count >= ANSWERS))
    grpo = by_key.get("grpo")
    for times, kind in ((SAMPLED, "gold"), (GREEDY, "greedy")):
        score = "sampled" if kind == "gold" else kind
        what = f"GRPO online at least {times} times the base's {score} score"
        if grpo is None:
            found.append(Target(what, "not measured", False))
            continue
        mine, theirs = getattr(grpo, kind)["mean"], getattr(base, kind)["mean"]
        ratio = mine / theirs if theirs else math.inf if mine else 0.0
        found.append(Target(what, f"{ratio:.2f} times: {mine:.3f} against {theirs:.3f}", ratio >= times))
    what = f"{ENDED:.0%} of GRPO online's completions end by themselves"
    ended = grpo.measured["finish_stop"] if grpo else None
    found.append(Target(what, "not measured" if ended is None else f"{ended:.1%}", (ended or 0) >= ENDED))
    what = f"the reward model right on {RIGHT:.0%} of at least {PAIRS} held-out pairs"
    result = (reward_manifest or {}).get("result", {})
    if "heldout_accuracy" in result:
        right, pairs = result["heldout_accuracy"], result["heldout_pairs"]
        found.append(Target(what, f"{right:.1%} of {pairs}", right >= RIGHT and pairs >= PAIRS))
    else:
        found.append(Target(what, "not measured", False))
    return found


def missed_sentence(found):
    """How many targets were reached, and each one that was missed with its figure."""
    missed = [f"{target.what} ({target.found})" for target in found if not target.reached]
    reached = f"{len(found) - len(missed)} of {len(found)} targets were reached."
    return f"{reached} Missed: {listed(missed)}." if missed else reached
