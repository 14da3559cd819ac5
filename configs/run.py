"""A run and its folder: config.yaml, metrics.jsonl, manifest.json, and the line that the terminal shows at each step.

    run = Run(config, "models/dpo", total_steps=100)
    run.log(step, loss=0.69, lr=1e-4, tokens=5120)          # one line, the same keys in metrics.jsonl
    run.finish(result={"heldout_accuracy": 0.81}, inputs={"data/preferences.jsonl": sha256})

Under torchrun or accelerate every rank makes a Run; only rank 0 prints and writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.claim import make_way, refuse_other_use
from configs.config import ROOT, UserError, config_to_dict, format_config, read_yaml

# keys that change how a run is watched, not what it computes
NOT_IDENTITY = {"out", "overwrite", "log_every", "wandb_project", "wandb_mode", "wandb_log_model"}
NOT_IDENTITY |= {"save_every", "save_minutes", "keep_checkpoints", "max_skipped"}
READ = ("data", "groups", "prompts", "model_name", "reward_model")  # keys that may name files that a run reads
CHECKPOINTS = "checkpoints"  # the subfolder of a run that is not finished; see configs/checkpoint.py
LOCK_SECONDS = 60  # to wait for the last process of the same run to end


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
    try:
        return path if path.exists() or path.is_absolute() else ROOT / path
    except OSError as error:  # a text that is too long for a name, for one
        raise UserError(f"{str(path)[:60]!r}... cannot be a file: {error.strerror}") from None


def clock(moment):
    """A time as '12:03', with the date where that is another day."""
    there, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if there[:3] == now[:3] else "%Y-%m-%d %H:%M", there)


def command():
    """The command that runs this process again, as a person would type it."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return "the same command again" if several else shlex.join(["python", *sys.argv])


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
    # peft finds out by itself how GPT-2's layers are laid out, and says so at each of them
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def synced(*paths):
    """Have the disk hold what was written to these files, or which names are in these folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path, text):
    """Write `text` so that `path` holds either its old content or all of the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def named_inputs(config):
    """{key: path} of the data and models that a configuration names; the paths of hub names are not there."""
    return {key: in_root(name) for key, name in config_to_dict(config).items() if key in READ and name}


def files_read(config):
    """{key: hash} of the files and folders that a configuration names as data or models, so that a change is noticed.

    What comes from the package index or a hub is not among them: it is pinned by its own hash or name.
    """
    found = {}
    for key, path in named_inputs(config).items():
        if not path.exists():
            continue
        kinds, ours = (".safetensors", ".json", ".jsonl", ".txt"), ("manifest.json", "metrics.jsonl", "samples.jsonl")
        inside = [p for p in sorted(path.rglob("*")) if p.suffix in kinds and p.name not in ours and p.is_file()]
        parts = [(str(p.relative_to(path)), sha256_file(p)) for p in ([path] if path.is_file() else inside)]
        found[key] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return found


def hold(folder):
    """Make this process the only one that writes to `folder`, until it ends or `release`s it.

    Waits a little for another one, which may be saving what it did before it was stopped; then raises UserError.
    """
    if folder in _held:
        return
    descriptor, waited = os.open(folder, os.O_RDONLY), 0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waited == LOCK_SECONDS:
                os.close(descriptor)
                raise UserError(f"another process writes to {shown(folder)}: end it, or give another --out") from None
            if waited == 1:
                say(f"waiting for another process that writes to {shown(folder)}")
            waited += 1
            time.sleep(1)
        except OSError:  # a file system without locks
            break
        else:
            break
    _held[folder] = descriptor


def release(folder):
    if folder in _held:
        os.close(_held.pop(folder))


_held = {}  # folder: the descriptor that locks it; locks end with the process


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
    return read_json(path) if path.is_file() else None


def json_error(error):
    """What the library says of a line that is not JSON, and where in it: 'Expecting value at column 3'."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def read_json(path):
    """The object in a JSON file of ours. Raises UserError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{shown(path)} is damaged: it takes one JSON object")
    return found


def read_lines(path):
    """The rows of a JSONL file of ours; [] if it is not there. A line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Run:
    """One run of one script: prints, records, and says at the end what it made.

    out: the folder that receives config.yaml, metrics.jsonl, manifest.json and the weights.
    total_steps: steps the run will take, for the estimate of the time left; may be set later.
    sinks: functions called with (metrics: dict, step) at each logged step, W&B for one.
    """

    def __init__(self, config, out, total_steps=None, sinks=()):
        self.config, self.folder, self.total_steps, self.sinks = config, in_root(out), total_steps, list(sinks)
        self.script = Path(sys.argv[0]).name
        self.started = time.time()  # less what the run had taken before, where it was interrupted
        self.unfinished = False  # whether the folder held this very run, interrupted
        self.checkpoint = None  # the folder of the last one
        self.files = {}  # hashes of what the run reads
        self.steps_began = None  # when
        self.skipped = 0  # steps in a row whose loss or gradient was not finite
        self._skips = 0  # of those, since the last logged line
        self._lines = 0  # of metrics.jsonl
        self._recent = None  # when the last line was logged, for rates
        self._first = None  # (time, step) when steps began, for the estimate
        self._tokens = 0
        self._carried = (0.0, 0)  # seconds and tokens between the last logged line and the checkpoint
        self.is_main = rank() == 0
        on_main(self._claim_folder)

    def _claim_folder(self):
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"out = {shown(self.folder)} is a file; give a folder")
        held, overwrite = self.folder / "config.yaml", self.config.overwrite
        refuse_other_use(self.folder, named_inputs(self.config))
        self.files = files_read(self.config)
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
            # a run that began with --overwrite true and was interrupted goes on: that, too, is the same command again
            self.unfinished = not (differences or manifest or (overwrite and not before.get("overwrite")))
        try:
            self._begin = make_way(self.folder, not self.unfinished, hold)
            write_atomically(held, format_config(self.config))
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        say(f"configuration ({shown(held)}):")
        words = ", ".join(f"{key} {value}" for key, value in config_to_dict(self.config).items())
        say(textwrap.fill(words, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))

    def refuse_changes(self, before, when):
        """Raise UserError if a file that the run reads is not what it was then. before: `files` of that time."""
        changed = [k for k in sorted(before.keys() & self.files.keys()) if before[k] != self.files[k]]
        if changed:
            names = ", ".join(f"{key} = {getattr(self.config, key)}" for key in changed)
            raise UserError(f"{names}: changed since {when}. --overwrite true begins again, another --out keeps both")

    def _differences(self, before):
        now = config_to_dict(self.config)
        different = [
            f"{key}: {before[key]!r} there, {now[key]!r} now"
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key] and key not in NOT_IDENTITY
        ]
        only = {"there": before.keys() - now.keys() - NOT_IDENTITY, "now": now.keys() - before.keys() - NOT_IDENTITY}
        return different + [f"only {where}: {', '.join(sorted(keys))}" for where, keys in only.items() if keys]

    def restart(self):
        """Begin at the beginning: nothing is logged yet."""
        if self.is_main:
            (self.folder / "metrics.jsonl").write_text("")

    def state(self):
        """What a checkpoint keeps of the clock and the counters, for `resume`."""
        now = time.time()
        since = now - self._recent if self._recent else 0.0
        counters = {"lines": self._lines, "tokens": self._tokens, "skipped": self.skipped, "skips": self._skips}
        return {"seconds": now - self.started, "since_logged": since, **counters}

    def resume(self, state):
        """Go on from a checkpoint's `state`: metrics.jsonl is cut back to its lines, seconds go on from there."""
        self.started -= state["seconds"]
        self._carried = (state["since_logged"], state["tokens"])
        self._lines, self.skipped, self._skips = state["lines"], state["skipped"], state["skips"]
        if self.is_main:
            lines = read_lines(self.folder / "metrics.jsonl")
            kept = [json.dumps(line) + "\n" for line in lines[: state["lines"]]]
            write_atomically(self.folder / "metrics.jsonl", "".join(kept))

    def begin_steps(self, step=0):
        """Start the clock of the steps, so that loading and evaluating do not count in the rates."""
        now = self.steps_began = time.time()
        since, tokens = self._carried
        self._first, self._recent, self._tokens = (now, step), now - since, tokens

    def count_tokens(self, tokens):
        """Tokens processed since the last logged line, for tok/s."""
        self._tokens += int(tokens)

    def finite(self, step, batch, **values):
        """Whether all values are finite. If not, step `step` is to be skipped: this is said and counted.

        batch: which rows the step is taken on, in words. Raises UserError at the config.max_skipped-th skipped step in
        a row.
        """
        bad = {key: float(value) for key, value in values.items() if not math.isfinite(value)}
        if not bad:
            self.skipped = 0
            return True
        self.skipped, self._skips = self.skipped + 1, self._skips + 1
        what = f"step {step}: {', '.join(f'{key} is {value}' for key, value in bad.items())} on {batch}"
        say(f"{what}; the step is skipped ({self.skipped} in a row)")
        if self.skipped >= self.config.max_skipped:
            last = f"the last good checkpoint is {shown(self.checkpoint)}" if self.checkpoint else "no checkpoint yet"
            raise UserError(
                f"{what}. {self.skipped} steps in a row were skipped (max_skipped = {self.config.max_skipped}). "
                f"Nothing was learnt from them; {last}. Look at these rows; a lower --lr with --overwrite true begins "
                "again, and a higher --max_skipped goes on from the checkpoint"
            )
        return False

    def log(self, step, **metrics):
        """Print one line and append it to metrics.jsonl. Adds tok/s (when tokens were counted), eta and seconds.

        step counts optimizer steps from 1. None values are left out, and those that are not finite are only printed;
        other floats are recorded in full. Steps that were skipped since the last line are counted under `skipped`.
        """
        now = time.time()
        if self._tokens:
            metrics["tok/s"] = self._tokens / max(now - self._recent, 1e-9)
        self._recent, self._tokens, self._lines = now, 0, self._lines + 1
        if self._skips:
            metrics["skipped"], self._skips = self._skips, 0
        record = {"step": step, **{k: v for k, v in metrics.items() if v is not None}}
        record["seconds"] = round(now - self.started, 3)
        if not self.is_main:
            return
        self._begin()
        recorded = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(recorded) + "\n")
        for sink in self.sinks:
            sink(record, step)
        words = [f"{k} {_number(k, v)}" for k, v in record.items() if k not in ("step", "seconds")]
        if self.total_steps and self._first and step > self._first[1]:
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
            "files": self.files,
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "git_commit": git_commit(),
            "versions": versions(),
            "machine": machine(),
        }
        write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        release(self.folder)
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
