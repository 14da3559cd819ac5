"""What the cells of notebooks/llm-training.ipynb do that takes more than a few lines.

A script runs in a process of its own. Meanwhile its cell shows the last lines that it prints, and its curves from
metrics.jsonl. A cell that was interrupted goes on when it is run again, because the run of the script does.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time

from IPython.display import HTML, Image, Markdown, display

from configs.config import ROOT, UserError, load_config, read_yaml
from models.device import frozen_dtype, pick_device, pick_precision
from models.loader import load_tokenizer
from report.compare import Row
from report.evaluate import read_measurement
from report.methods import METHODS
from report.page import markdown_table, plain, sample_prompts, was_cut
from report.token_view import page, page_data, read_tokens
from rlhf import grpo_train, train_reward_model
from rlhf.pairs import read_pairs
from rlhf.reward_model import RewardModel
from rlhf.utils import score_completions
from runtime.curves import NORM, STYLES, Panel, draw, new_figure
from runtime.files import in_root, read_lines
from runtime.memory import AT_START
from runtime.run_folder import release, undo_all
from runtime.signals import WISHES

LINES = 12  # of a script's output, that its cell shows
LOOK = 0.3  # seconds between two looks at a script
REDRAW = 12.0  # seconds between two pictures: drawing takes half a second from the training


class Output:
    """One output of a cell: `show` replaces it."""

    def __init__(self):
        self.handle, self.shown = None, None

    def show(self, text, png=None):
        """Show a text, or a picture (PNG, bytes) that the text describes."""
        data = {"text/plain": text} | ({"image/png": base64.b64encode(png).decode()} if png else {})
        if data == self.shown:
            return
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)
        self.shown = data


class Tail(io.TextIOBase):
    """A place to print to. Its output in the cell has the last lines that begin with `start`."""

    def __init__(self, start=""):
        self.output, self.start, self.text = Output(), start, ""

    def write(self, text):
        self.text += text
        lines = [line for line in self.text.splitlines() if line.startswith(self.start)]
        self.output.show("\n".join(lines[-LINES:]))
        return len(text)


def run(command, lines=LINES):
    """Run a script: `run("data/generate_preferences.py --limit 64")`. The cell shows the last lines of what it prints.

    Raises UserError if the script fails. Ctrl-C, or the button that interrupts the kernel, goes to the script, too.
    """
    output = Output()
    follow(command, lambda printed, ended: output.show("\n".join(printed[-lines:])))


def train(command, lines=LINES):
    """`run` a training script with `--out`. Below its last lines, its curves move while it trains."""
    words = shlex.split(command)
    folder = in_root(words[words.index("--out") + 1])
    text, curves = Output(), Output()
    drawn, at = 0, time.monotonic()

    def look(printed, ended):
        nonlocal drawn, at
        text.show("\n".join(printed[-lines:]))
        logged = read_lines(folder / "metrics.jsonl")
        if len(logged) > drawn and (ended or not drawn or time.monotonic() - at > REDRAW):
            picture = io.BytesIO()
            draw(logged, folder.name, picture)
            curves.show(f"the curves of {folder.name}, up to step {logged[-1]['step']}", picture.getvalue())
            drawn, at = len(logged), time.monotonic()

    follow(command, look)


def follow(command, look):
    """Run a script, and call look(its lines so far, whether it has ended) until it has ended."""
    script, *words = shlex.split(command)
    process = subprocess.Popen(
        [sys.executable, script, *words], cwd=ROOT, env={**AT_START, **os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    printed = []

    def read():
        for line in process.stdout:
            printed.append(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            look(printed, False)
            time.sleep(LOOK)
    except KeyboardInterrupt:  # Jupyter also sends it to the script, others do not: a second one at once does no harm
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    finally:
        reader.join()
        look(printed, True)
    if process.returncode:
        said = "\n".join(printed[-LINES:])
        raise UserError(f"python {command} ended with status {process.returncode}:\n{said}")


def table(header, rows):
    """A table of texts and numbers."""
    cells = [[plain(f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row] for row in rows]
    return Markdown(markdown_table([list(header), *cells]).replace("---:", "---"))


def token_page(folder, step, height=620):
    """The page of report/token_view.py on what a run kept of one step, in a frame."""
    groups = [group for group in read_tokens(in_root(folder)) if group["step"] == step]
    model = read_yaml(in_root(folder) / "config.yaml")["model_name"]
    content = page(page_data(groups, f"Step {step} of {in_root(folder).name}", model))
    content = content.replace("&", "&amp;").replace("'", "&#39;")  # it stands between single quotes
    style = f"width: 100%; height: {height}px; border: 1px solid #ccc"
    return HTML(f"<div><iframe sandbox='allow-scripts' style='{style}' srcdoc='{content}'></iframe></div>")


def mistakes(folder):
    """(mistakes of a reward model, number of held-out pairs). The worst mistake comes first.

    A mistake is a held-out pair whose rejected completion has at least the score of the chosen one: (prompt, chosen
    completion, its score, rejected completion, its score). folder: of the run of rlhf/train_reward_model.py.
    """
    config = load_config(train_reward_model.Config, ["--config", str(in_root(folder) / "config.yaml")])
    tokenizer, device = load_tokenizer(folder, config.chat_template_kwargs), pick_device()
    _, pairs, _, _ = read_pairs(config, tokenizer)
    model = RewardModel.load(folder, dtype=frozen_dtype(pick_precision(config.precision, device)), device=device)
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    completions = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    scores = score_completions(model, prompts, completions, tokenizer.pad_token_id)
    rows = [
        (pair["text"]["prompt"], pair["text"]["chosen"], chosen, pair["text"]["rejected"], rejected)
        for pair, chosen, rejected in zip(pairs, scores[0::2], scores[1::2])
        if rejected >= chosen
    ]
    return sorted(rows, key=lambda row: row[2] - row[4]), len(pairs)


def side_by_side(folder, count=6):
    """The greedy completions of all measured methods to `count` held-out prompts, as a table.

    folder: `runs` of report/compare.py. The prompts are the first ones of the most frequent types.
    """
    rows = []
    for method in METHODS:
        path = in_root(folder) / f"{method.key}.json"
        if path.is_file():
            found = read_measurement(path)
            rows.append(Row(method.key, method.label, [found], found["measured"]))
    prompts = sample_prompts(rows, count)
    lines = [
        [prompt, *(("✓ " if answer["gold"] == 1 else "") + answer["text"] + was_cut(answer) for _, answer in answers)]
        for prompt, answers in prompts
    ]
    return table(["prompt", *(row.label for row, _ in prompts[0][1])], lines)


def train_here(advantages_of_step, options):
    """Run GRPO in this process with another `advantages_of_step`. Returns the lines of its metrics.jsonl.

    options: those of rlhf/grpo_train.py, as text. The folder of the run is a temporary one, so each call begins anew.
    """
    before = grpo_train.advantages_of_step
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *WISHES)}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(grpo_train.Config, [*shlex.split(options), "--out", folder])
        grpo_train.advantages_of_step = advantages_of_step
        try:
            with contextlib.redirect_stdout(Tail("step ")):
                grpo_train.main(config)
        except SystemExit:  # a Ctrl-C: a run saves and exits
            raise KeyboardInterrupt from None
        finally:
            grpo_train.advantages_of_step = before
            for number, handler in handlers.items():  # the run has set its own
                signal.signal(number, handler)
            undo_all()
            release(in_root(folder))
        return read_lines(in_root(folder) / "metrics.jsonl")


BESIDE = (
    Panel("Size of the advantages", "mean of |advantage|", {"advantage": ""}, limits=(0, None)),
    NORM,
    Panel("Reward", "mean over completions", {"reward": ""}),
)


def beside(runs):
    """A picture of several runs: {name: lines of metrics.jsonl}."""
    figure, axes = new_figure(11.7, 3.3, len(BESIDE))
    for ax, panel in zip(axes, BESIDE):
        [key] = panel.keys
        for style, (name, lines) in zip(STYLES, runs.items()):
            values = [line[key] for line in lines]
            ax.plot([line["step"] for line in lines], values, color=style[0], ls=style[1], lw=2, marker="o", label=name)
        ax.set_ylim(*panel.limits)
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel("rollout", fontsize=9)
        ax.set_ylabel(panel.unit, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="white")
    return Image(picture.getvalue())
