"""Where a result comes from: machine, versions, commit, hashes of what was read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.config import ROOT, names_with
from runtime.files import in_root, sha256_file


def named_inputs(config):
    """{key: path} of the data and models that a configuration names (`option(reads=True)`).

    The paths of hub names are not there.
    """
    return {key: in_root(vars(config)[key]) for key in names_with(config, reads=True) if vars(config)[key]}


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


def provenance(seconds):
    """What every manifest says of where its numbers come from. seconds: what the work took."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": machine(),
    }
