"""A run and its folder: config.yaml, metrics.jsonl, manifest.json, and the line that the terminal shows at each step.

    run = Run(config, "models/dpo", total_steps=100)
    run.log(step, loss=0.69, lr=1e-4, tokens=5120)          # one line, the same keys in metrics.jsonl
    run.finish(result={"heldout_accuracy": 0.81}, inputs={"data/preferences.jsonl": sha256})

Under torchrun or accelerate every rank makes a Run; only rank 0 prints and writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from configs.config import ROOT, UserError, config_to_dict, format_config

# keys that change how a run is watched, not what it computes
NOT_IDENTITY = {"out", "overwrite", "log_every", "wandb_project", "wandb_mode", "wandb_log_model"}


def rank():
    return int(os.environ.get("RANK", 0))


def say(*words, end="\n"):
    """Print on rank 0 only, at once (a pipe would hold lines back)."""
    if rank() == 0:
        print(*words, end=end, flush=True)


def on_main(action):
    """Call `action()` on rank 0. If it ends in a UserError or an exit there, all ranks end so: none waits for ever."""
    import torch.distributed as dist

    outcome = [None]
    if rank() == 0:
        try:
            action()
        except (UserError, SystemExit) as end:
            outcome = [end]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[0]:
        raise outcome[0]


def shown(path):
    """A path as a person would type it from the repository's root."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def in_root(path):
    """A path of a configuration: absolute, or relative to the working directory if it is there, else to the root."""
    path = Path(path)
    return path if path.is_absolute() or path.exists() else ROOT / path


def duration(seconds):
    """412 -> '6m52s'."""
    seconds = int(round(seconds))
    h, m, s = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"


def quiet_libraries():
    """Turn off progress bars and advice of the libraries that a user cannot act on, by their own switches."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    # peft 0.21 calls a property that transformers 5.23 renamed; nothing a user could change
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path, text):
    """Write `text` so that `path` holds either its old content or all of the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def peak_memory_gb():
    """The most memory this process has held so far, in GB: on the GPU where one is used, else resident."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent process held when it started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine():
    """What the run ran on, in words and numbers."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()}


def versions():
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_commit():
    """The commit of this repository, with '+changes' when the tree differs from it; None outside a checkout."""
    try:
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "") if head.returncode == 0 else None


def read_manifest(folder):
    """A finished run's manifest as a dict, or None if the folder holds no finished run."""
    path = in_root(folder) / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Run:
    """One run of one script: prints, records, and says at the end what it made.

    out: the folder that receives config.yaml, metrics.jsonl, manifest.json and the weights.
    total_steps: steps the run will take, for the estimate of the time left; may be set later.
    sinks: functions called with (metrics: dict, step) at each logged step, W&B for one.
    """

    def __init__(self, config, out, total_steps=None, sinks=()):
        self.config, self.folder, self.total_steps, self.sinks = config, in_root(out), total_steps, list(sinks)
        self.script = Path(sys.argv[0]).name
        self.started = time.time()
        self._recent = None  # (time, step, tokens) at the last logged line, for rates
        self._first = None  # (time, step) when steps began, for the estimate
        self._tokens = 0
        self.is_main = rank() == 0
        on_main(self._claim_folder)

    def _claim_folder(self):
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"out = {shown(self.folder)} is a file; give a folder")
        held = self.folder / "config.yaml"
        if held.is_file() and not self.config.overwrite:
            differences = self._differences(yaml.safe_load(held.read_text(encoding="utf-8")) or {})
            if differences:
                raise UserError(
                    f"{shown(self.folder)} holds a run with another configuration:\n  "
                    + "\n  ".join(differences)
                    + "\nGive another --out, or --overwrite true to replace it"
                )
            if read_manifest(self.folder):
                say(f"{shown(self.folder)} holds this very run, finished. --overwrite true runs it again.")
                sys.exit(0)
        if self.config.overwrite and held.is_file():
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(held, format_config(self.config))
            (self.folder / "metrics.jsonl").write_text("")
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        say(f"configuration ({shown(held)}):")
        words = ", ".join(f"{key} {value}" for key, value in config_to_dict(self.config).items())
        say(textwrap.fill(words, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))

    def _differences(self, before):
        now = config_to_dict(self.config)
        return [
            f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and key not in NOT_IDENTITY
        ]

    def begin_steps(self, step=0):
        """Start the clock of the steps, so that loading and evaluating do not count in the rates."""
        self._first, self._recent, self._tokens = (time.time(), step), (time.time(), step), 0

    def count_tokens(self, tokens):
        """Tokens processed since the last logged line, for tok/s."""
        self._tokens += int(tokens)

    def log(self, step, **metrics):
        """Print one line and append it to metrics.jsonl. Adds tok/s (when tokens were counted), eta and seconds.

        step counts optimizer steps from 1. None values are left out; floats are recorded in full.
        """
        now = time.time()
        if self._recent is None:
            self.begin_steps(step - 1)
        if self._tokens:
            metrics["tok/s"] = self._tokens / max(now - self._recent[0], 1e-9)
        self._recent, self._tokens = (now, step), 0
        record = {"step": step, **{k: v for k, v in metrics.items() if v is not None}}
        record["seconds"] = round(now - self.started, 3)
        if not self.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        for sink in self.sinks:
            sink(record, step)
        words = [f"{k} {_number(k, v)}" for k, v in record.items() if k not in ("step", "seconds")]
        if self.total_steps and step > self._first[1]:
            left = (now - self._first[0]) / (step - self._first[1]) * (self.total_steps - step)
            words.append(f"eta {duration(left)}")
        count = f"{step:>5}/{self.total_steps}" if self.total_steps else f"{step:>5}"
        say("step " + " | ".join([count, *words]))

    def finish(self, result, inputs=None, next_command=None, more=None):
        """Write manifest.json (which marks the run as finished) and say where everything is.

        result: what the run reached, numbers by name. inputs: sha256 of each model and data file it read, by name.
        more: entries for the manifest that are not printed.
        """
        if not self.is_main:
            return
        manifest = {
            **(more or {}),
            "script": self.script,
            "result": result,
            "inputs": inputs or {},
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
        }
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        reached = ", ".join(f"{k} {_number(k, v)}" for k, v in result.items())
        say(f"\ndone in {duration(manifest['seconds'])}, peak memory {manifest['peak_memory_gb']:.2f} GB: {reached}")
        say(f"written to {shown(self.folder)}/")
        if next_command:
            say(f"next: {next_command}")


def _number(key, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key == "lr":
        return f"{value:.1e}"
    if key == "tok/s":
        return f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
