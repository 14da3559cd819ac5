"""Kill every stage at random moments, start it again by the same command, and compare what it ends with.

    make chaos                                        # every stage, 20 kills each
    python tests/chaos.py ppo grpo --kills 100        # these stages
    python tests/chaos.py --seed 1 --json chaos.json  # other moments; the table as JSON

Each stage runs at smoke size, first to its end, then again and again, killed with SIGKILL: every other time from
outside, at a moment drawn from the seconds that a run takes; else at an event within it, a step of the optimizer or
something that makes a file last (see interrupted.py). A run that was killed is started again by the same command until
it finishes; then its weights, the states of its optimizer, scaler and random generators, its metrics and other files
must be those of the run that never was killed. That goes on until there were as many kills as asked for. The demo is
killed with the stage that it runs, or alone, which leaves that stage behind. W&B's own files are not compared. All
happens in a copy of the code, on the CPU, one thread a stage.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("configs", "runtime", "models", "data", "train", "rlhf", "inference", "report", "proof", "tests")
FILES = (
    "data/arithmetic.json",
    "data/prompts.json",
    "data/words.txt",
    "tests/data/forms.json",
    "tests/train/text.jsonl",
)
MADE = ("models/smoke", "data/smoke", "report/runs/smoke")  # where the demo at smoke size writes
LM = ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", "2", "--save_every", "1", "--epochs", "2"]
LM += ["--max_steps", "9"]  # of which five are in the second epoch
PAIRS = ["--data", "PAIRS", "--batch_size", "3", "--micro_batch_size", "2", "--log_every", "3", "--save_every", "1"]
ROLLOUTS = ["--steps", "4", "--save_every", "1", "--log_every", "3"]
SAMPLING = ["--model_name", "tiny-llama", "--max_new_tokens", "6", "--limit", "12", "--precision", "fp32"]
SAMPLING += ["--sampling_batch_size", "8", "--prompts", "tests/data/forms.json"]
STAGES = {  # name: (script, its command line); the demo has its own
    "demo": None,
    "lm": ("train.train_lm", LM),
    "ddp": ("train.train_lm_ddp", LM),
    "amp_ckpt": ("train.train_lm_amp_ckpt", [*LM, "--precision", "fp16", "--measure_steps", "0"]),
    "lora": ("train.train_lm_lora", [*LM, "--lora_dropout", "0.3", "--merge", "true", "--precision", "fp32"]),
    "wandb": ("train.train_lm_wandb", [*LM, "--wandb", "offline"]),
    "preferences": ("data.generate_preferences", [*SAMPLING, "--samples_per_prompt", "4"]),
    "groups": ("data.generate_preferences_multi", [*SAMPLING, "--samples_per_prompt", "8"]),
    "reward": ("rlhf.train_reward_model", ["--config", "configs/smoke/reward.yaml", *PAIRS]),
    "dpo": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", *PAIRS]),
    "ppo": ("rlhf.ppo_train", ["--config", "configs/smoke/ppo.yaml", "--reward_model", "REWARD", *ROLLOUTS,
            "--kl_controller", "adaptive", "--kl_target", "3", "--kl_horizon", "20", "--kl_coef", "0.1"]),
    "grpo": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml", *ROLLOUTS, "--lr", "1e-2"]),
    "grpo_offline": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo_offline.yaml", "--groups", "GROUPS", *ROLLOUTS,
                     "--inner_epochs", "2"]),
    "evaluation": ("report.evaluate", ["--base", "tiny-llama", "--reward_model", "REWARD", "--text",
                   "tests/train/text.jsonl", "--text_length", "64", "--text_tokens", "128", *SAMPLING]),
}  # fmt: skip
PHASES = ("start-up", "steps", "saving")  # what a process was doing when it died
OUT = {"preferences": "out.jsonl", "groups": "out.jsonl", "evaluation": "out.json"}  # of the others: a folder
INPUTS = {  # what stages read: (script, its command line, its --out)
    "PAIRS": ("data.generate_preferences", ["--config", "configs/smoke/preferences.yaml", "--limit", "32"],
              "pairs.jsonl"),
    "GROUPS": ("data.generate_preferences_multi", ["--config", "configs/smoke/preferences_multi.yaml", "--limit", "12"],
               "groups.jsonl"),
    "REWARD": ("rlhf.train_reward_model", ["--config", "configs/smoke/reward.yaml", "--data", "PAIRS"], "reward"),
}  # fmt: skip


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python tests/chaos.py", description="Kill stages at random moments and compare what they end with."
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all if none is named")
    parser.add_argument("--kills", type=int, default=20, help="of each stage (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--jobs", type=int, help="stages at once (2, or 1 on one core)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table there")
    parser.add_argument("--in_copy", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = [name for name in options.stages if name not in STAGES]
    if unknown:
        parser.exit(2, f"error: no stage is called {unknown[0]!r}. The stages are: {', '.join(STAGES)}\n")
    if options.kills < 1 or (options.jobs is not None and options.jobs < 1):
        parser.exit(2, "error: --kills and --jobs must be at least 1\n")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.exit(2, f"error: --json {options.json}: there is no folder {options.json.absolute().parent}\n")
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    options.jobs = options.jobs or min(2, cores)
    options.stages = list(dict.fromkeys(options.stages)) or list(STAGES)
    return options


def copy_code(folder):
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*"):
            name = path.relative_to(ROOT)
            code = path.suffix in (".py", ".yaml") or name.as_posix() in FILES
            if code and path.is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / name)


def in_copy(options):
    """Run all this in a copy of the code, so that neither its files nor those of this tree change meanwhile."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        code = Path(folder) / "code"
        copy_code(code)
        (Path(folder) / "runs").mkdir()
        words = [*options.stages, "--in_copy", "--kills", options.kills, "--seed", options.seed, "--jobs", options.jobs]
        words += ["--json", options.json.absolute()] if options.json else []
        environment = {**os.environ, "PYTHONPATH": f"{code}:{code}/tests", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        # the tracker misses the semaphores of those that are killed
        environment |= {"PYTHONWARNINGS": "ignore:resource_tracker"}
        command = [sys.executable, code / "tests" / "chaos.py", *map(str, words)]
        process = subprocess.Popen(command, cwd=code, env=environment, start_new_session=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print("\ninterrupted", file=sys.stderr)
            return 130


def duration(seconds):
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


class Progress:
    """A line for each report, with an estimate of the time left."""

    def __init__(self, stages, kills, jobs):
        self.began, self.kills, self.jobs = time.time(), kills, jobs
        self.done, self.since, self.spent = dict.fromkeys(stages, 0), {}, {}

    def left(self):
        """Seconds: those that are not begun take as long as the mean of the others, the demo six times as long."""
        a_kill = {name: self.spent[name] / self.done[name] for name in self.spent if self.done[name]}
        others = [x for name, x in a_kill.items() if name != "demo"] or [a_kill.get("demo", 0) / 6]
        usual = {name: sum(others) / len(others) * (6 if name == "demo" else 1) for name in self.done}
        each = [a_kill.get(name, usual[name]) * (self.kills - done) for name, done in self.done.items()]
        return max(sum(each) / self.jobs, *each)

    def say(self, name, what, done):
        now = time.time()
        self.done[name] = self.kills if what in ("done", "differs") else done
        self.since.setdefault(name, now)
        if done:
            self.spent[name] = now - self.since[name]
        words = f"kill {done} of {self.kills}, in {what}" if what in PHASES else what
        left = f", about {duration(self.left())} left" if any(self.spent.values()) else ""
        print(f"{duration(now - self.began):>6} | {name:<12} | {words:<28}{left}", flush=True)


def table(found):
    """The results as lines."""
    moments = [f"in {moment}" for moment in PHASES]
    rows = [["stage", "runs", "kills", *moments, "differences", "seconds"]]
    for one in found:
        counts = [str(one[moment]) for moment in PHASES]
        rows.append([one["stage"], str(one["runs"]), str(one["kills"]), *counts, str(len(one["differences"])),
                     f"{one['seconds']:.0f}"])  # fmt: skip
    wide = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(wide[0]), *(x.rjust(w) for x, w in zip(row[1:], wide[1:]))]) for row in rows]


def main(options):
    """Torture the stages; exit status 0 if nothing differs."""
    import torture

    began = time.time()
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    print(f"{len(options.stages)} stages, {options.kills} kills each, {options.jobs} at once, seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="chaos-runs-") as folder:
        folder = Path(folder)
        pool = ProcessPoolExecutor(
            options.jobs, mp_context=context, initializer=torture.begin_worker, initargs=(reports,)
        )
        with pool:
            print(f"{'0m00s':>6} | making what the stages read", flush=True)
            pool.submit(torture.make_inputs, folder).result()
            progress = Progress(options.stages, options.kills, options.jobs)
            work = [pool.submit(torture.torture, name, folder, options.kills, options.seed) for name in options.stages]
            while not (all(one.done() for one in work) and reports.empty()):
                with contextlib.suppress(queue.Empty):
                    progress.say(*reports.get(timeout=0.2))
            found = [one.result() for one in work]
    seconds = time.time() - began
    print("", *table(found), sep="\n")
    for one in found:
        for difference in one["differences"]:
            print(f"{one['stage']}: {difference}")
    if options.json:
        record = {"seed": options.seed, "kills": options.kills, "jobs": options.jobs, "seconds": round(seconds, 1)}
        options.json.write_text(json.dumps({**record, "stages": found}, indent=1) + "\n")
    print(f"\n{verdict(found, seconds)}")
    return any(one["differences"] for one in found)


def verdict(found, seconds):
    differ = [one["stage"] for one in found if one["differences"]]
    runs, kills = (sum(one[key] for one in found) for key in ("runs", "kills"))
    words = f"DIFFERENT after kills: {', '.join(differ)}" if differ else "all ended as if they never had been killed"
    return f"{len(found)} stages, {runs} runs, {kills} kills, {duration(seconds)}: {words}"


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    if not chosen.in_copy:
        sys.exit(in_copy(chosen))
    sys.exit(main(chosen))
