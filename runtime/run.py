"""A run and its folder: configuration, metrics, curves, manifest; and the line on the terminal at each step.

    run = Run(config, "models/dpo", total_steps=100)
    run.log(step, loss=0.69, lr=1e-4, tokens=5120)          # one line, the same keys in metrics.jsonl
    run.finish(result={"heldout_accuracy": 0.81}, inputs={"data/preferences.jsonl": sha256})

Under torchrun every process makes a Run. Only process 0 prints and writes.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

from configs.config import UserError, changed, config_to_dict, format_config, names_with, read_yaml, shown
from runtime.console import _number, duration, fold, log_line, rank, say
from runtime.curves import Curves
from runtime.doctor import closing_lines, examine
from runtime.files import as_lines, in_root, read_lines, read_manifest, write_atomically
from runtime.processes import on_main
from runtime.provenance import files_read, named_inputs, provenance
from runtime.run_folder import RunFolder, refuse_inputs, refuse_other_use, release
from runtime.tracking import Tracker

CHECKPOINTS = "checkpoints"  # subfolder of an unfinished run; see runtime/checkpoint.py
SAMPLES = "samples.jsonl"  # completions sampled along the way
TOKENS = "tokens.jsonl"  # a few sequences token by token, with --keep_tokens; see train/token_records.py


class TooManySkipped(UserError):
    """Too many steps in a row were skipped. The message names the last checkpoint of the time when it is printed."""

    def __init__(self, run, what):
        super().__init__(what)
        self.run, self.what = run, what

    def __str__(self):
        at = self.run.checkpoint
        last = f"the last good checkpoint is {shown(at)}" if at else "no checkpoint yet"
        further = ", and a higher --max_skipped goes on from the checkpoint" if at else ""
        return (
            f"{self.what}. Nothing was learnt from them; {last}. Look at these rows; a lower --lr with --overwrite "
            f"true begins again{further}"
        )


class Run:
    """One run of one script. It prints and records metrics, and writes the manifest at the end.

    out: the folder for config.yaml, metrics.jsonl, manifest.json and the weights.
    total_steps: the number of steps, for the estimate of the time left; may be set later.
    Raises UserError if the folder holds another run or other files, or cannot be written. If the folder holds this run
    and it is finished, the script exits with status 0.
    """

    def __init__(self, config, out, total_steps=None):
        self.config, self.folder, self.total_steps = config, in_root(out), total_steps
        self.script = Path(sys.argv[0]).name
        self.started = time.time()  # minus the seconds that the run took before an interruption
        self.unfinished = False  # whether the folder held this run, interrupted
        self.checkpoint = None  # the folder of the last checkpoint
        self.files = {}  # hashes of what the run reads
        self.last = {}  # the numbers of the last logged line
        self.steps_began = None  # time at which the steps began
        self.skipped = 0  # consecutive steps whose loss or gradient was not finite
        self.skips = 0  # skipped steps since the last logged line
        self.kept_step = 0  # the last step in tokens.jsonl
        self._lines, self._samples, self._kept = 0, 0, 0  # lines of metrics.jsonl, samples.jsonl, tokens.jsonl
        self._recent = None  # time of the last logged line, for rates
        self._first = None  # (time, step) at which the steps began, for the time left
        self._tokens = 0
        self._carried = (0.0, 0)  # seconds and tokens between the last logged line and the checkpoint
        self.curves = Curves(self.folder)
        self.is_main = rank() == 0
        on_main(self._claim_folder)

    def _claim_folder(self):
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"out = {shown(self.folder)} is a file; give a folder")
        held, overwrite = self.folder / "config.yaml", self.config.overwrite
        refuse_inputs(self.folder, named_inputs(self.config))
        self.files = files_read(self.config)
        try:
            self._place = RunFolder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        refuse_other_use(self.folder)
        if held.is_file():
            before = read_yaml(held)
            differences, manifest = self._differences(before), read_manifest(self.folder)
            if differences and not overwrite:
                raise UserError(
                    f"{shown(self.folder)} holds a run with another configuration:\n  "
                    + "\n  ".join(differences)
                    + "\nGive another --out, or --overwrite true to replace it"
                )
            if manifest and not overwrite:
                self.refuse_changes(manifest.get("files", {}), f"{shown(self.folder)} was finished")
                say(f"{shown(self.folder)} holds this very run, finished. --overwrite true runs it again.")
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # a kill may have come before this
                sys.exit(0)
            # an interrupted run that began with --overwrite true continues: the same command was given again
            self.unfinished = not (differences or manifest or (overwrite and not before.get("overwrite")))
        name, group = self.folder.absolute().name, self.folder.absolute().parent.name
        self.tracker = Tracker(self.config, self.folder, name, group, Path(self.script).stem)
        try:
            if self.unfinished:
                self._place.go_on()
            else:
                self._place.empty()
            write_atomically(held, format_config(self.config))
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        other = ", ".join(f"{key} {value}" for key, value in changed(self.config).items())
        words = f"{other}; the rest are defaults" if other else "all defaults"
        say(fold(f"configuration: {words} ({shown(held)})"))

    def refuse_changes(self, before, when):
        """Raise UserError if a file that the run reads has changed. before: earlier `files`. when: for the message."""
        changed = [k for k in sorted(before.keys() & self.files.keys()) if before[k] != self.files[k]]
        if changed:
            names = ", ".join(f"{key} = {vars(self.config).get(key, 'data/checks.py')}" for key in changed)
            raise UserError(f"{names}: changed since {when}. --overwrite true begins again, another --out keeps both")

    def _differences(self, before):
        now, free = config_to_dict(self.config), set(names_with(self.config, identity=False))
        different = [
            f"{key}: {before[key]!r} there, {now[key]!r} now"
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key] and key not in free
        ]
        only = {"there": before.keys() - now.keys(), "now": now.keys() - before.keys() - free}
        return different + [f"only {where}: {', '.join(sorted(keys))}" for where, keys in only.items() if keys]

    @property
    def logged(self):
        """Whether the run has logged a line, also before an interruption."""
        return self._lines > 0

    def keep(self):
        """From now on nothing is undone: what the folder held before is deleted. Call it in process 0."""
        self._place.begin()

    def restart(self):
        """Start from the first step, with an empty metrics.jsonl."""
        on_main(self._keep_lines)

    def state(self):
        """The clock and the counters, which a checkpoint keeps for `resume`."""
        now = time.time()
        since = now - self._recent if self._recent else 0.0
        counters = {
            "lines": self._lines,
            "samples": self._samples,
            "kept": self._kept,
            "tokens": self._tokens,
            "skipped": self.skipped,
            "skips": self.skips,
        }
        return {"seconds": now - self.started, "since_logged": since, **counters}

    def resume(self, state):
        """Continue from the `state` in a checkpoint: metrics.jsonl is cut to its lines, and its seconds are added.

        So are samples.jsonl and tokens.jsonl.
        """
        self.started -= state["seconds"]
        self._carried = (state["since_logged"], state["tokens"])
        self._lines, self._samples, self._kept = state["lines"], state["samples"], state.get("kept", 0)
        self.skipped, self.skips = state["skipped"], state["skips"]
        on_main(self._keep_lines)

    def _keep_lines(self):
        """Cut metrics.jsonl and the files beside it to the lines that count. The tracker begins with these lines."""
        lines = read_lines(self.folder / "metrics.jsonl")[: self._lines]
        samples = read_lines(self.folder / SAMPLES)[: self._samples]
        self.last = lines[-1] if lines else {}
        kept = read_lines(self.folder / TOKENS)[: self._kept]
        for name, rows in (("metrics.jsonl", lines), (SAMPLES, samples), (TOKENS, kept)):
            if rows or name == "metrics.jsonl" or (self.folder / name).is_file():
                write_atomically(self.folder / name, as_lines(rows))
        self.tracker.open(lines, samples)

    def begin_steps(self, step=0):
        """Start the clock of the steps, so that loading and evaluating do not count in the rates."""
        now = self.steps_began = time.time()
        since, tokens = self._carried
        self._first, self._recent, self._tokens = (now, step), now - since, tokens

    def count_tokens(self, tokens):
        """Add to the number of processed tokens since the last logged line, for tok/s."""
        self._tokens += int(tokens)

    def finite(self, step, batch, **values):
        """Whether all values are finite. If not, the caller must skip step `step`; this method prints and counts it.

        batch: a text that names the rows of the step. Raises UserError at the config.max_skipped-th skipped step in a
        row.
        """
        bad = {key: float(value) for key, value in values.items() if not math.isfinite(value)}
        if not bad:
            self.skipped = 0
            return True
        self.skipped, self.skips = self.skipped + 1, self.skips + 1
        what = f"step {step}: {', '.join(f'{key} is {value}' for key, value in bad.items())} on {batch}"
        say(f"{what}; the step is skipped ({self.skipped} in a row)")
        if self.skipped >= self.config.max_skipped:
            raise TooManySkipped(
                self,
                f"{what}. {self.skipped} steps in a row were skipped (max_skipped = {self.config.max_skipped})",
            )
        return False

    def log(self, step, samples=(), **metrics):
        """Print one line and append it to metrics.jsonl. Adds seconds, and tok/s if tokens were counted; prints eta.

        step: the optimizer step, from 1. None values are left out. Values that are not finite are only printed. Other
        floats are recorded in full precision. `skipped` is the number of skipped steps since the last line.
        samples: dicts with completions and what was measured of them, for samples.jsonl. None among them is left out.
        """
        now = time.time()
        if self._tokens:
            metrics["tok/s"] = self._tokens / max(now - self._recent, 1e-9)
        self._recent, self._tokens, self._lines = now, 0, self._lines + 1
        if self.skips:
            metrics["skipped"], self.skips = self.skips, 0
        record = {"step": step, **{k: v for k, v in metrics.items() if v is not None}}
        record["seconds"] = round(now - self.started, 3)
        self.last = record
        if not self.is_main:
            return
        self.keep()
        recorded = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        samples = [{"step": step, **sample} for sample in samples if sample]
        for name, rows in (("metrics.jsonl", [recorded]), (SAMPLES, samples)):
            if rows:
                with open(self.folder / name, "a", encoding="utf-8") as f:
                    f.write(as_lines(rows))
        self._samples += len(samples)
        self.tracker.line(self._lines - 1, recorded, samples)
        left = None
        if self.total_steps and self._first and step > self._first[1]:
            left = (now - self._first[0]) / (step - self._first[1]) * (self.total_steps - step)
        say(log_line(record, self.total_steps, left, self.config.verbose))
        self.curves.draw_if_due()

    def keep_tokens(self, step, groups):
        """Append dicts to tokens.jsonl, each with its `step`. Only process 0 calls it; see train/token_records.py."""
        with open(self.folder / TOKENS, "a", encoding="utf-8") as f:
            f.write(as_lines({"step": step, **group} for group in groups))
        self._kept, self.kept_step = self._kept + len(groups), step

    def finish(self, result, inputs=None, next_command=None, more=None):
        """Write manifest.json, which marks the run as finished. Print the result and the folder.

        result: {name: number}. inputs: {name: sha256} of the models and data files that the run read. more: entries of
        the manifest that are not printed. Removes the checkpoints.
        """
        if not self.is_main:
            return
        self.curves.draw()  # before the manifest: a run with a manifest is not run again
        manifest = {
            **(more or {}),
            "script": self.script,
            "result": result,
            "inputs": inputs or {},
            "files": self.files,
            **provenance(time.time() - self.started),
        }
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        release(self.folder)
        reached = ", ".join(f"{k} {_number(k, v)}" for k, v in result.items())
        peak = f"peak memory {manifest['peak_memory_gb']:.2f} GB"
        say("\n" + fold(f"done in {duration(manifest['seconds'])}, {peak}: {reached}"))
        say(f"written to {shown(self.folder)}/")
        if self._lines:
            say("\n".join(closing_lines(examine(self.folder), self.folder)))
        if self._kept:
            say(f"token by token: python report/token_view.py {shown(self.folder)}")
        model = [path for path in sorted(self.folder.iterdir()) if self.config.wandb_model and path.is_file()]
        self.tracker.finish(result, kind="model", files=model)
        if next_command:
            say(f"next: {next_command}")
