"""Measurements and runs as report/compare.py reads them, made up: what the report says must follow from them."""

import random

from report.compare import METHODS, Row
from report.intervals import summarise

CHECKS = ("lowercase", "max_words", "no_commas", "question", "quoted", "bullets", "starts_with", "includes", "numbered")
UNSEEN = ["includes", "numbered"]
LEVELS = {  # gold, proxy, nats per sequence, nats per token of text
    "base": (0.15, 0.0, 0.0, 3.80),
    "sft": (0.24, 0.9, 3.0, 3.82),
    "best_of": (0.27, 1.2, 0.64, 3.80),
    "dpo": (0.34, 1.9, 9.0, 3.85),
    "ppo": (0.30, 2.8, 12.0, 3.84),
    "grpo_offline": (0.26, 1.0, 4.0, 3.81),
    "grpo": (0.46, 1.7, 14.0, 3.88),
}


def measurement(key, gold, proxy, kl, nats, prompts=54, samples=2, seed=0):
    """One run's JSON: each check is passed with probability `gold`."""
    rng = random.Random(f"{key}{seed}")
    answers = []
    for i in range(prompts):
        for _ in range(samples):
            name = CHECKS[i % len(CHECKS)]
            good = rng.random() < min(1, gold * (0.4 + 1.2 * (i % len(CHECKS)) / (len(CHECKS) - 1)))
            answers.append(
                {"id": f"p{i}", "prompt": f"Do thing {i}.", "text": f"{key} says *word{rng.randrange(50)}* | thing {i}",
                 "gold": float(good), "proxy": proxy + rng.gauss(0, 0.5), "kl": kl and kl + rng.gauss(0, 2),
                 "base_nats": 40.0 + kl,
                 "tokens": rng.randrange(10, 48), "finish_reason": "stop" if rng.random() < 0.7 else "length",
                 "checks": [[name, good]]}
            )  # fmt: skip
    greedy = [] if key == "best_of" else answers[::samples]
    settings = {"samples_per_prompt": samples, "max_new_tokens": 48, "temperature": 1.0, "seed": seed}
    settings |= {"split": "heldout", "precision": "bf16", "text": "shakespeare"}
    hashes = dict.fromkeys(("model", "base", "reward_model", "prompts", "checks"), "0123456789abcdef")
    measured = summarise(answers, UNSEEN, greedy=greedy)
    if key == "best_of":
        measured["kl"] = {"mean": kl, "se": None, "half": None, "n": 0}
    return {
        "model_name": f"models/{key}", "identity": {"config": settings, "hashes": hashes}, "measured": measured,
        "text": {"nats_per_token": nats, "bits_per_byte": 1.0}, "unseen_types": UNSEEN, "answers": answers,
        "greedy": greedy, "seconds": {"total": 20.0},
    }  # fmt: skip


def curve(key):
    rng = random.Random(key)
    if key == "dpo":
        return [{"step": i, "loss": 0.69 - 0.012 * i, "accuracy": 0.5 + 0.015 * i} for i in range(1, 24)]
    line = {"ppo": (12, 0.15, 0.012), "grpo": (24, 0.15, 0.012)}
    if key not in line:
        return []
    steps, start, slope = line[key]
    return [
        {"step": i, "gold": start + slope * i + rng.gauss(0, 0.03), "reward": 0.2 * i, "kl": 0.8 * i}
        for i in range(1, steps + 1)
    ]


def synthetic_rows(**levels):
    """A `Row` for each method; keyword arguments replace its (gold, proxy, kl, nats), None leaves the method out."""
    found = []
    for method in METHODS:
        level = levels.get(method.key, LEVELS[method.key])
        if level is None:
            continue
        run = measurement(method.key, *level)
        row = Row(method.key, method.label.format(n=4), [run], run["measured"])
        if method.script:
            row.seconds, row.seconds_before, row.memory = 130.0, 180.0, 2.1
            row.curves = curve(method.key)
            row.settings = {"prompts_per_step": 8, "batch_size": 16}
            row.settings["samples_per_prompt"] = 8 if method.key == "grpo" else 1
        found.append(row)
    return found
