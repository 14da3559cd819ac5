"""Ask a model: one prompt, a file of them, standard input, or a chat.

    python inference/inference.py                                            # a few prompts, answered in one batch
    python inference/inference.py --model_name models/dpo --prompt "Why is the sky blue?"
    python inference/inference.py --prompts questions.txt --out completions.jsonl
    echo "Name three fruits." | python inference/inference.py
    python inference/inference.py --chat true

model_name is an embedded model, a hub id, or the folder of a run with a full model or an adapter. The base of an
adapter is found automatically. The prompts of a batch are padded on the left, so that each row continues from its own
last token.
"""

from __future__ import annotations

import os
import select
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from configs.config import UserError, option, refuse_unused
from data.prompts import PromptConfig, parse_prompts, read_prompts
from data.rows import text_of
from models.completions import (
    TextStream,
    acquire_out,
    check_out,
    keep_for,
    rate,
    sample_completions,
    sampling,
    synchronize,
    write_rows,
)
from models.device import frozen_dtype, pick_device, pick_precision
from models.generation import generate
from models.loader import context_length, load_model, load_tokenizer, resolve_model
from models.options import ModelOptions, QuantisationOptions, check_quantisation, quantisation
from models.tokens import never_sampled, prompt_ids, stop_ids
from runtime.cli import cli
from runtime.console import fold, quiet_libraries, say

EXAMPLES = (
    "What is gravity?",
    "Describe honey bees to a child. Write only in lowercase letters.",
    "Name three fruits that are red.",
    "Write a short notice about a lost umbrella.",
)


@dataclass
class Config(PromptConfig, ModelOptions, QuantisationOptions):
    CONFIG: ClassVar[str] = "configs/inference.yaml"
    RENAMED: ClassVar[dict] = {"batch_size": "sampling_batch_size"}
    model_name: str = option("smollm2-135m", "an embedded name, a folder (full model or adapter), or a hub id")
    merge: bool = option(False, "fold the adapter into its base: the same completions, faster")
    prompt: str | None = option(None, "one prompt")
    prompts: str | None = option(None, "prompts: .txt one a line, .jsonl, .json, .csv, ...; - is standard input")
    chat: bool = option(False, "talk with the model, its completions streamed")
    max_new_tokens: int = option(96, "longest completion, in tokens", at_least=1)
    temperature: float = option(0.7, "of the sampling; 0 takes the most probable token each time", at_least=0)
    top_k: int = option(0, "sample among the k most probable tokens; 0: all", at_least=0)
    top_p: float = option(0.95, "sample among the tokens that hold this share of the probability", above=0, at_most=1)
    sampling_batch_size: int = option(64, "completions sampled at once", at_least=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the weights")
    seed: int = option(0, "of the sampling", at_least=0)
    out: str | None = option(None, "JSONL file to write prompts and completions to")

    def check(self):
        if (self.prompt is not None) + (self.prompts is not None) + self.chat > 1:
            raise UserError("prompt, prompts and chat exclude each other: give one of them")
        if self.chat and self.out:
            raise UserError("out: a chat is not written to a file")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt is empty")
        if self.prompt is not None or self.chat:
            refuse_unused(self, ["prompt_column"], "prompt or chat: it is of a file")
        if self.temperature == 0:
            refuse_unused(self, ["top_k"], "temperature = 0, which takes the most probable token")
        check_quantisation(self)
        if self.merge:
            refuse_unused(self, ["load_in_4bit", "load_in_8bit"], "merge = true, which makes plain weights")
        check_out(self.out, self.prompts)


def main(config):
    rows = None if config.chat else asked(config)
    acquire_out(config.out)
    quiet_libraries()
    device = pick_device()
    precision = pick_precision(config.precision, device)
    adapter = is_adapter(config.model_name)
    if config.merge and not adapter:
        raise UserError(f"merge = true: {config.model_name} holds no adapter, there is nothing to merge")
    dtype = frozen_dtype(precision)
    model = load_model(
        config.model_name, dtype, device, merge_adapter=config.merge, quantisation=quantisation(config, dtype)
    )
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    kind = "adapter, merged" if config.merge else "adapter" if adapter else "full model"
    how = f"temperature {config.temperature:g}" if config.temperature else "greedy"
    words = f"{config.model_name} ({kind}, {precision}, {device}), {how}, at most {config.max_new_tokens} tokens"
    say(fold(words))
    if config.chat:
        chat(config, model, tokenizer)
    else:
        batch(config, model, tokenizer, rows)


def batch(config, model, tokenizer, rows):
    """Sample a completion of each prompt, print them, and write them to config.out."""
    kept = keep_for(config.out, model)
    started = time.time()
    prompts = [row["prompt"] for row in rows]
    groups = sample_completions(model, tokenizer, prompts, config.max_new_tokens, kept=kept, **sampling(config))
    synchronize(model.device)
    seconds = time.time() - started + (kept.seconds if kept else 0)
    for number, (row, [answer]) in enumerate(zip(rows, groups), 1):
        say("\n" + fold(f"{number}. {text_of(row['prompt'])}"))
        for line in answer.text.splitlines() or [""]:
            say(fold(f"   {line}", "   "))
        say(
            f"   ({len(answer.ids)} tokens, "
            f"{'ended by itself' if answer.finish_reason == 'stop' else 'cut at its length'})"
        )
    say(f"\n{len(rows)} completions, {rate(groups, seconds)}")
    write_rows(
        config.out,
        [
            {
                "prompt": row["prompt"],
                "completion": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.ids),
                "model": config.model_name,
            }
            for row, [answer] in zip(rows, groups)
        ],
    )


def chat(config, model, tokenizer):
    """Read lines and stream completions until /quit or the end of the input. The prompt is the whole conversation."""
    say("/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    sys.stdin.reconfigure(errors="replace")
    history, turn = [], 0
    while True:
        try:
            line = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("\nbye")
            return
        if line == "/quit":
            say("bye")
            return
        if line == "/reset":
            history = []
            say("(a new conversation)")
            continue
        if line.startswith("/"):
            say("(the commands are /reset and /quit)")
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        history, ids = fit(model, tokenizer, history, config.max_new_tokens)
        if not history:
            say(f"(this is too long for the model's context with {config.max_new_tokens} new tokens; say it shorter)")
            continue
        say("model> ", end="")
        text = stream(config, model, tokenizer, ids, config.seed + turn)
        history.append({"role": "assistant", "content": text})
        turn += 1


def fit(model, tokenizer, history, max_new_tokens):
    """(history, prompt ids), without the oldest turns if a completion does not fit; ([], []) if no turn is left."""
    room = context_length(model) or float("inf")
    while history:
        ids = prompt_ids(tokenizer, history)
        if len(ids) + max_new_tokens <= room:
            return history, ids
        history = history[2:]
        if history:
            say("(the oldest question and answer no longer fit and are forgotten)")
    return [], []


def stream(config, model, tokenizer, ids, seed):
    """Sample one completion, print it token by token, and return its text. Ctrl-C ends it early."""
    pieces, printed = TextStream(tokenizer), []

    def show(_, token):
        printed.append(pieces.add(token))
        say(printed[-1], end="")

    settings = {**sampling(config), "seed": seed}
    try:
        generate(
            model,
            [ids],
            config.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            never=never_sampled(tokenizer),
            on_token=show,
            **settings,
        )
    except KeyboardInterrupt:
        say(" (stopped)", end="")
    printed.append(pieces.end())
    say(printed[-1])
    return "".join(printed).strip()


def asked(config):
    """The prompts of this run: from the option, the file, or a pipe; else a few examples."""
    if config.prompt is not None:
        return [{"prompt": config.prompt}]
    if config.prompts is not None:
        return read_prompts(config.prompts, split=None, column=config.prompt_column)
    piped = piped_bytes()
    if piped.strip():
        return parse_prompts(piped, "standard input", column=config.prompt_column)
    return [{"prompt": text} for text in EXAMPLES]


def piped_bytes(wait=1.0):
    """The bytes that are piped or redirected into this process. Empty if nothing comes within `wait` seconds.

    The wait is limited, because schedulers and notebooks leave a silent pipe open as standard input. `--prompts -`
    waits without a limit.
    """
    if sys.stdin is None or sys.stdin.closed:
        return b""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) and not select.select([sys.stdin], [], [], wait)[0]:
        return b""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return b""
    return sys.stdin.buffer.read()


def is_adapter(name):
    path = resolve_model(name)
    return isinstance(path, Path) and (path / "adapter_config.json").is_file()


if __name__ == "__main__":
    cli(main, Config)
