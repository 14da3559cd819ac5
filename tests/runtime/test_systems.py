"""Other systems, as far as they can be simulated: Windows is refused in one sentence, a Mac trains on its CPU."""

import ast
import json
import os
import subprocess
import sys

import pytest

from configs.config import ROOT, UserError
from models import device
from runtime import run_folder

SCRIPTS = (
    "train/train_lm.py", "rlhf/ppo_train.py", "data/generate_preferences.py", "inference/inference.py",
    "report/compare.py",
)  # fmt: skip
WINDOWS = f"""
import builtins, runpy, sys
found = builtins.__import__

def import_as_on_windows(name, importer=None, *rest, **words):  # what libraries import on Linux stays
    mine = str((importer or dict()).get("__file__")).startswith({str(ROOT)!r} + "/")
    if name in ("fcntl", "resource") and mine and "site-packages" not in importer["__file__"]:
        raise ImportError(name)
    return found(name, importer, *rest, **words)

builtins.__import__ = import_as_on_windows
"""
MAC = """
import pathlib, platform, resource, runpy, sys, types
import torch, transformers, datasets, peft  # they look at the system when they are imported
exists, getrusage = pathlib.Path.exists, resource.getrusage
pathlib.Path.exists = lambda path, **words: not str(path).startswith("/proc") and exists(path, **words)
resource.getrusage = lambda who: types.SimpleNamespace(ru_maxrss=getrusage(who).ru_maxrss * 1024)  # bytes there
platform.libc_ver = lambda: ("", "")
torch.backends.mps.is_available = lambda: True
sys.platform = "darwin"
"""


def start(system, script, *words):
    """Run a script on a simulated system: code that comes before it."""
    code = f"{system}sys.argv = {[script, *map(str, words)]!r}\nrunpy.run_path({script!r}, run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
@pytest.mark.statement("systems")
@pytest.mark.parametrize("script", SCRIPTS)
def test_windows_is_refused_in_one_sentence(script, tmp_path):
    done = start(WINDOWS, script)
    assert done.returncode == 2
    assert done.stderr == "error: this system has no POSIX file locks: on Windows, run the scripts in WSL 2\n"
    assert done.stdout == ""


def test_nothing_else_needs_a_module_that_windows_lacks():
    """`fcntl` is imported where its absence is seen, `resource` where it is used."""
    found = {}
    for path in sorted(ROOT.glob("[a-z]*/**/*.py")):
        if path.parts[len(ROOT.parts)] not in ("tests", "shared"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in {"fcntl", "resource", "pwd", "grp", "termios"} & set(names):
                    found.setdefault(path.relative_to(ROOT).as_posix(), []).append(name)
    assert found == {"runtime/run_folder.py": ["fcntl"], "runtime/provenance.py": ["resource"]}


def test_a_notebook_on_windows_gets_the_same_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)
    with pytest.raises(UserError, match="on Windows, run the scripts in WSL 2"):
        run_folder.RunFolder(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.statement("systems")
def test_a_mac_trains_on_its_cpu_and_says_once_that_its_gpu_is_not_used(tmp_path):
    words = ["--config", "configs/smoke/grpo.yaml", "--out", tmp_path / "out"]
    done = start(MAC, "rlhf/grpo_train.py", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the GPU of this Mac (MPS) is not used") == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert 0.05 < manifest["peak_memory_gb"] < 20


def test_other_machines_hear_nothing_of_macs(capsys, monkeypatch):
    device.pick_device()
    assert "MPS" not in capsys.readouterr().out
