"""The origin of a result: machine, versions, commit, and hashes of the files that were read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.config import ROOT, UserError, names_with
from runtime.files import in_root, sha256_file

JUDGES = ("checks.py", "procedural.py", "words.txt")  # the files of data/ that decide the gold score


def named_inputs(config):
    """{key: path} of the data and models that a configuration names (`option(reads=True)`).

    The paths of hub names do not exist.
    """
    return {key: in_root(vars(config)[key]) for key in names_with(config, reads=True) if vars(config)[key]}


def files_read(config):
    """{key: hash} of what decides a run besides its configuration, so that a change is noticed.

    That is the files and folders that it names as data or models, the file of its reward function, and where the
    checks of prompts score, their code. Whatever comes from the package index or a hub is not among them: it is pinned
    by its own hash or name.
    """
    found = {}
    for key, path in named_inputs(config).items():
        if not path.exists():
            continue
        kinds, ours = (".safetensors", ".json", ".jsonl", ".txt"), ("manifest.json", "metrics.jsonl", "samples.jsonl")
        inside = [p for p in sorted(path.rglob("*")) if p.suffix in kinds and p.name not in ours and p.is_file()]
        found[key] = sha256_files([path] if path.is_file() else inside, path)
    code = code_read(config)
    if "prompts" in vars(config) and not any(vars(config)[key] for key in names_with(config, reads="code")):
        found["checks"] = sha256_files([ROOT / "data" / name for name in JUDGES], ROOT)
    return found | code


def code_read(config):
    """{key: hash} of the files of the functions that a configuration names (`option(reads="code")`)."""
    found = {}
    for key in names_with(config, reads="code"):
        files = [path for path in map(code_file, (vars(config)[key] or "").split(",")) if path]
        if files:
            found[key] = sha256_files(files, ROOT)
    return found


def code_file(spec):
    """The file of a function `module:function`, found in the same way as by `load_reward`. None if there is none."""
    module = spec.partition(":")[0].strip()
    stem = Path.cwd().joinpath(*module.split("."))
    for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.has_location else None


def sha256_files(paths, root):
    """One hash, 16 hexadecimal digits, of several files and of their names below `root`."""
    names = [p.name if p == root or not p.is_relative_to(root) else str(p.relative_to(root)) for p in paths]
    parts = [("." if p == root else name, sha256_file(p)) for p, name in zip(paths, names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def peak_memory_gb():
    """The peak memory of this process so far, in GB: allocated on the GPU if one is used, else resident memory."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include the memory of the parent process when it started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine():
    """The machine: CPU, number of cores, GPUs, operating system."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    gpu = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform()}


def versions():
    """The versions of Python and of the libraries that decide the results."""
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


_planned: dict = {}  # {"planned_memory_gb": the planned peak of the run that goes on}


def note_plan(plan):
    """Call `plan`, which gives the `Plan` of the run (runtime/plan.py), and remember its peak for the next manifest.

    It is None for a model that cannot be planned, which may well be trained.
    """
    try:
        _planned["planned_memory_gb"] = round(plan().peak() / 1e9, 3)
    except UserError:
        _planned["planned_memory_gb"] = None


_admission: list[tuple[float, dict]] = []  # (time, result) of the checks of models since the last manifest


def note_admission(result):
    """Remember the result of a check of a model (models/admission.py), a dict, for the next manifest."""
    _admission.append((time.time(), result))


def provenance(seconds):
    """The entries of every manifest on the origin of its numbers. seconds: the time of the work.

    The results of the checks of models in this time are among them. Those of earlier work that failed are not.
    """
    checks = [result for when, result in _admission if when >= time.time() - seconds]
    planned = dict(_planned)
    _planned.clear()
    _admission.clear()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        **planned,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
        "admission": checks,
    }
