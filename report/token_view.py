"""The token view: one HTML page on the sequences that a run kept, token by token. It opens without a network.

    python rlhf/grpo_train.py --keep_tokens 4       # a training script keeps some sequences in tokens.jsonl
    python report/token_view.py models/grpo         # the page: models/grpo/tokens.html

The completions of a prompt, and both sides of a pair, stand side by side. Each token has its text, its id, and the
numbers from which the loss was computed; a colour shows one of them. docs/token-view.md explains the page.
"""

from __future__ import annotations

import html
import json
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from configs.config import UserError, option, read_yaml, shown
from runtime.cli import cli
from runtime.console import say
from runtime.files import in_root, read_lines, write_atomically
from runtime.run import TOKENS
from runtime.run_folder import check_place

TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass
class Config:
    WORDS: ClassVar[str] = "run"
    run: tuple[str, ...] = option((), "the folder of a run that kept tokens; also as a word without a key")
    out: str | None = option(None, "the page; none: tokens.html in the run's folder")

    def check(self):
        if len(self.run) != 1:
            raise UserError("give the folder of one run: python report/token_view.py models/grpo")


@dataclass(frozen=True)
class Quantity:
    """A number that tokens have. The page shows it if a token of the run has it.

    key: in tokens.jsonl. scale: how colours show it: "diverging" from `center`, "sequential" from 0, "log" (whole
    numbers from 1), or "flag" (0 or 1). family: quantities of one family share a scale, so that they can be compared.
    """

    key: str
    label: str
    unit: str
    scale: str
    meaning: str
    center: float = 0.0
    family: str = ""


QUANTITIES = (
    Quantity(
        "change", "policy − reference", "nats", "diverging",
        "The log-prob under the policy minus that under the reference: what training has made more or less probable.",
    ),
    Quantity(
        "score", "score", "", "diverging",
        "What the reward model would give to a completion that ends here. It learns from the score of the last token.",
    ),
    Quantity(
        "logprob", "log-prob, policy", "nats", "sequential",
        "The log-prob of the token under the model that trains, before the update. 0 is certain.", family="logprob",
    ),
    Quantity(
        "loss", "loss", "nats", "sequential", "Minus the log-prob: what the token adds to the loss, if it is counted.",
    ),
    Quantity("rank", "rank", "", "log", "1: no other token was more probable. 2: one was, and so on."),
    Quantity(
        "entropy", "entropy", "nats", "sequential",
        "How undecided the policy was before this token. 0: it knew what comes.",
    ),
    Quantity(
        "advantage", "advantage", "", "diverging",
        "How much better than expected. The update makes tokens with a positive one more probable.",
    ),
    Quantity(
        "ratio", "ratio", "", "diverging",
        "The probability under the policy divided by that under the old policy. In the first update it is 1.", 1.0,
    ),
    Quantity(
        "clipped", "clipped", "", "flag",
        "1: the ratio has left its bounds in the direction of the advantage, so the token has no policy gradient.",
    ),
    Quantity(
        "kl", "KL", "nats", "diverging",
        "The estimate of the KL to the reference that is in the loss (GRPO) or in the reward (PPO).",
    ),
    Quantity(
        "reward", "reward", "", "diverging",
        "The reward of the token in PPO: minus the KL times its coefficient; the last token also gets the score.",
    ),
    Quantity("value", "value", "", "diverging", "What the value head expected of the rest, before the update."),
    Quantity(
        "return", "return", "", "diverging",
        "What the value learns: the value before the update plus the advantage before whitening.",
    ),
    Quantity(
        "old_logprob", "log-prob, old policy", "nats", "sequential",
        "Under the policy before the updates of this step.", family="logprob",
    ),
    Quantity(
        "ref_logprob", "log-prob, reference", "nats", "sequential", "Under the model that training started from.",
        family="logprob",
    ),
    Quantity(
        "sampler_logprob", "log-prob, sampler", "nats", "sequential",
        "As the sampler had it, which rounds otherwise than training.", family="logprob",
    ),
    Quantity("mask", "counted", "", "flag", "1: the token counts in the loss."),
)  # fmt: skip

SCORES = {  # of sequences and of pairs: {key in tokens.jsonl: label}
    "reward": "reward", "gold": "gold score", "advantage": "advantage", "kl": "KL, nats", "score": "score",
    "logps": "log-prob, nats", "implicit_reward": "implicit reward", "loss": "loss, nats", "margin": "margin",
    "probability_chosen": "probability that chosen wins",
}  # fmt: skip

MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of Unicode: controls, formats, separators


def read_tokens(folder):
    """The groups of RUN/tokens.jsonl. Raises UserError if `folder` is no run, or a run that kept nothing."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{shown(folder)} is not the folder of a run: it has no config.yaml")
    groups = read_lines(folder / TOKENS)
    if not groups:
        raise UserError(
            f"{shown(folder)} kept no tokens: train with --keep_tokens 4. A run that is not finished keeps them "
            "from where it goes on; a finished one also needs --overwrite true, or another --out"
        )
    return groups


def visible(text):
    """The text of a token as [text, whether it is a mark], so that nothing of it is invisible.

    Spaces, line breaks and tabs become marks, other characters without a glyph their code (⟨U+200B⟩). text: that of
    `token_texts`; the bytes of a part of a character become ⟨e2 98⟩, letters among them stay.
    """
    if isinstance(text, dict):
        parts = [
            [chr(b), False] if 32 < b < 127 else [MARKS.get(chr(b), f"⟨{b:02x}⟩"), True]
            for b in bytes.fromhex(text["bytes"])
        ]
    elif not text:
        parts = [["⟨empty⟩", True]]
    else:
        parts = []
        for letter in text:
            coded = unicodedata.category(letter) in INVISIBLE
            mark = MARKS.get(letter) or (f"⟨U+{ord(letter):04X}⟩" if coded else None)
            parts.append([mark or letter, mark is not None])
    joined = []
    for part, is_mark in parts:
        if joined and joined[-1][1] == is_mark:
            joined[-1][0] += part
        else:
            joined.append([part, is_mark])
    return joined


def with_derived(numbers):
    """The numbers of a sequence, {key: list}, with those that follow from them: `change` and `loss`."""
    found = dict(numbers)
    if "logprob" in numbers and "ref_logprob" in numbers:
        pairs = zip(numbers["logprob"], numbers["ref_logprob"])
        found["change"] = [None if None in pair else round(pair[0] - pair[1], 6) for pair in pairs]
    if "rank" in numbers:  # of a language model
        found["loss"] = [None if x is None else -x for x in numbers["logprob"]]
    return found


def page_data(groups, title, subtitle):
    """What the page shows, as a dict for JSON."""
    shown_groups, keys = [], set()
    for group in groups:
        sequences = []
        for sequence in group["sequences"]:
            numbers = with_derived(sequence["numbers"])
            keys |= {key for key, values in numbers.items() if any(x is not None for x in values)}
            sequences.append(
                {
                    **_tokens(sequence),
                    "name": sequence["name"],
                    "numbers": numbers,
                    "scores": _scores(sequence["scores"]),
                    "finish": sequence.get("finish_reason"),
                    "first": sequence.get("first", []),
                }
            )
        shown_groups.append(
            {
                "step": group["step"],
                "epoch": group.get("inner_epoch", 1),
                "size": group.get("group_size"),
                "source": group.get("source"),
                "scores": _scores(group.get("scores", {})),
                "prompt": _tokens(group["prompt"]) if "prompt" in group else None,
                "sequences": sequences,
            }
        )
    quantities = [asdict(quantity) for quantity in QUANTITIES if quantity.key in keys]
    return {"title": title, "subtitle": subtitle, "quantities": quantities, "groups": shown_groups}


def _tokens(part):
    texts = [visible(text) for text in part["texts"]]
    breaks = [i for i, text in enumerate(part["texts"]) if isinstance(text, str) and text.endswith("\n")]
    return {"ids": part["ids"], "texts": texts, "breaks": breaks, "special": part["special"], "length": part["length"]}


def _scores(scores):
    return [[SCORES[key], x] for key, x in scores.items()]


def page(data):
    """The page as a text. The data lie in it as JSON without `<`, `>` and `&`, so that no text of a token ends it."""
    content = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("@TITLE@", html.escape(data["title"])).replace("@DATA@", content)


def main(config):
    folder = in_root(config.run[0])
    out = in_root(config.out) if config.out else folder / "tokens.html"
    groups = read_tokens(folder)
    check_place(out)
    options = read_yaml(folder / "config.yaml")
    steps = sorted({group["step"] for group in groups})
    subtitle = f"{options.get('model_name')}, seed {options.get('seed')}"
    write_atomically(out, page(page_data(groups, f"Tokens of {shown(folder)}", subtitle)))
    number = sum(len(group["sequences"]) for group in groups if group.get("inner_epoch", 1) == 1)
    say(f"{number} sequences of steps {', '.join(map(str, steps))}: {shown(out)}")


if __name__ == "__main__":
    cli(main, Config)
