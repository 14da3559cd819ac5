"""Run the study: both tasks, several seeds, longer runs than the demo's, then REPORT.md in `out`.

    python report/study.py                    # all of it; the time is said at the start
    python report/study.py --smoke true       # the same stages on a tiny model with random weights
    python report/study.py --tasks arithmetic --seeds 0,1

Each stage is a command that a user would type, and is printed. A stage that is already done ends at once: after an
interruption, the same command goes on from there. The stages of a task:

- preference pairs, groups and a reward model, once: the seeds are those of the training runs;
- every method of report/methods.py with every seed, compared by report/compare.py;
- with the first seed GRPO at several KL coefficients, DPO at several betas, and PPO for long at a low KL coefficient
  (over-optimisation), each measured by report/evaluate.py.

This file trains and measures nothing. report/study_page.py writes the page.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field

from configs.config import ROOT, UserError, option, read_yaml
from data.prompts import PROMPTS
from report.compare import Config as CompareConfig
from report.compare import run_folder
from report.demo import FETCH, SMOKE_PACE, Stage, first_pace, run_all, seconds_left
from report.methods import METHODS, method_of
from report.study_page import TaskRuns, write_study
from runtime.cli import cli
from runtime.console import duration, say
from runtime.files import in_root
from runtime.run_folder import hold_output

BEST_OF = 8  # completions of the base from which best-of-n is chosen
UNITS = 359 * (5 * 2 + 4)  # completions that the demo's comparison samples: it takes MEASURED["compare"]


@dataclass
class Config:
    smoke: bool = option(False, "seconds a stage, with configs/smoke/ on random weights; one task and two seeds")
    tasks: str | None = option(None, "of arithmetic and instructions, with commas; none: both")
    seeds: str | None = option(None, "training seeds with commas; none: 0,1,2")
    models: str | None = option(None, "the folder of data, runs, measurements; none: models/study, models/smoke/study")
    out: str | None = option(
        None, "the folder of REPORT.md, figures/ and each task's page; none: report, report/runs/study"
    )

    def check(self):
        self.models = (self.models or ("models/smoke/study" if self.smoke else "models/study")).rstrip("/")
        self.out = (self.out or ("report/runs/study" if self.smoke else "report")).rstrip("/")
        unknown = [name for name in self.task_list() if name not in TASKS]
        if unknown or len(set(self.task_list())) < len(self.task_list()):
            raise UserError(f"tasks = {self.tasks!r}: must be different ones of {', '.join(TASKS)}")
        self.seed_list()

    def task_list(self):
        return [w.strip() for w in self.tasks.split(",")] if self.tasks else list(TASKS)[: 1 if self.smoke else None]

    def seed_list(self):
        return CompareConfig(seeds=self.seeds or ("0,1" if self.smoke else "0,1,2")).seed_list()


@dataclass(frozen=True)
class Task:
    """One task of the study, by what it differs in from the demo's YAMLs.

    sampling: the options of every script that samples. heldout: how many of the prompts are held out.
    cost: of a completion, in training and sampling, as a multiple of the demo's (by its tokens; not measured).
    longer: {key of a method: its options}; coefficients: {key: the option and its values}; optimised: of the long PPO.
    """

    heldout: int
    cost: float
    sampling: dict = field(default_factory=dict)
    longer: dict = field(default_factory=dict)
    coefficients: dict = field(default_factory=dict)
    optimised: dict = field(default_factory=dict)


COEFFICIENTS = {"grpo": ("kl_coef", (0.01, 0.05, 0.2)), "dpo": ("beta", (0.03, 0.3))}  # beta 0.1 is the method's own
TASKS = {
    "arithmetic": Task(
        359, 1.0, {},
        {"dpo": {"epochs": 3}, "ppo": {"steps": 20}, "grpo_offline": {"steps": 16}, "grpo": {"steps": 60}},
        {"grpo": {"steps": 40}, "dpo": {"epochs": 3}},
        {"steps": 48, "kl_coef": 0.001},
    ),
    "instructions": Task(  # at temperature 1 the 4-bit model writes gibberish
        120, 2.5, {"prompts": PROMPTS, "max_new_tokens": 48, "temperature": 0.7},
        {"dpo": {"epochs": 2}, "ppo": {"steps": 12}, "grpo_offline": {"steps": 8},
         "grpo": {"steps": 24, "kl_coef": 0.02}},  # these checks can be fooled
        {"grpo": {"steps": 16}, "dpo": {"epochs": 2}},
        {"steps": 24, "kl_coef": 0.001},
    ),
}  # fmt: skip


NAMED = {method.key for method in METHODS if not method.own_config}  # YAMLs that a command has to name


def words(options):
    """{"lr": 0.1} -> ("--lr", "0.1")"""
    return tuple(word for key, value in options.items() for word in (f"--{key}", str(value)))


def stages(config, name):
    """The stages of one task, in order."""
    task, place, smoke = TASKS[name], f"{config.models}/{name}", config.smoke
    where = "configs/smoke" if smoke else "configs"
    sampling = {} if smoke else task.sampling
    pairs, groups, reward = f"{place}/preferences.jsonl", f"{place}/groups.jsonl", f"{place}/reward"
    data = {"text": {"data": pairs}, "pairs": {"data": pairs}, "groups": {"groups": groups}, "rollouts": sampling}

    def stage(key, title, script, yaml, made, options, share):
        given = ("--config", f"{where}/{yaml}.yaml") if smoke or yaml in NAMED else ()
        return Stage(key, f"{name}: {title}", (script, *given, *words(options)), made, share)

    def train(key, folder, seed, options, what=""):
        """The training of one method; `options` are those beside its data."""
        method = method_of(key)
        before = read_yaml(ROOT / where / f"{key}.yaml")
        longer = [options[k] / before.get(k, options[k]) for k in ("steps", "epochs") if k in options]
        share = (longer or [1.0])[0] * task.cost
        reads = dict(data[method.learns_from])
        if "reward_model" in before:
            reads["reward_model"] = reward
        if method.learns_from == "groups" and "temperature" in sampling:  # that of the stored log-probs
            reads["temperature"] = sampling["temperature"]
        options = {**reads, **options, **({"seed": seed} if seed else {}), "out": folder}
        title = f"{method.label}{what}, seed {seed}"
        return stage(key, title, method.script, key, f"{folder}/manifest.json", options, share)

    def evaluate(folder):
        options = measured | {"model_name": folder, "out": measurement(folder)}
        title = f"measure {folder.rsplit('/', 1)[1]}"
        return stage("compare", title, "report/evaluate.py", "evaluate", measurement(folder), options, 2 * unit)

    seeds = config.seed_list()
    unit = task.heldout / UNITS * task.cost  # of one completion to each held-out prompt
    measured = {**sampling, "reward_model": reward, **({"seed": seeds[0]} if seeds[0] else {})}
    completions = 2 * len([m for m in METHODS if m.script]) + BEST_OF
    longer, varying = ({}, {}) if smoke else (task.longer, task.coefficients)
    long = task.optimised | ({"steps": 6} if smoke else {})
    trained = [
        train(method.key, run_folder(CompareConfig(models=place), method, seed), seed, longer.get(method.key, {}))
        for method in METHODS if method.script for seed in seeds
    ]  # fmt: skip
    varied = [
        train(key, variant(place, key, option, value), seeds[0], {**varying.get(key, {}), option: value},
              f" with {option} {value:g}")
        for key, (option, values) in COEFFICIENTS.items() for value in values
    ]  # fmt: skip
    varied.append(train("ppo", f"{place}/ppo-long", seeds[0], long, " for long"))
    return [
        stage("preferences", "preference pairs", "data/generate_preferences.py", "preferences",
              pairs.replace(".jsonl", ".manifest.json"), {**sampling, "out": pairs}, task.cost),
        stage("groups", "groups with several rejections", "data/generate_preferences_multi.py", "preferences_multi",
              groups.replace(".jsonl", ".manifest.json"), {**sampling, "out": groups}, task.cost),
        stage("reward", "reward model", "rlhf/train_reward_model.py", "reward", f"{reward}/manifest.json",
              {"data": pairs, "out": reward}, task.cost),
        *trained,
        stage("compare", "measure and compare", "report/compare.py", "compare", measurement(folder_of(trained[-1])),
              compare_options(config, name), completions * len(seeds) * unit),
        *varied,
        *[evaluate(folder_of(run)) for run in varied],
    ]  # fmt: skip


def compare_options(config, name):
    """The options of report/compare.py for one task."""
    task, place = TASKS[name], f"{config.models}/{name}"
    own = {} if config.smoke else {**task.sampling, "best_of": BEST_OF}
    return {
        **own, "reward_model": f"{place}/reward", "seeds": ",".join(map(str, config.seed_list())), "models": place,
        "runs": f"{place}/measured", "out": f"{config.out}/{name}",
    }  # fmt: skip


def folder_of(run):
    """The folder of the run that a `Stage` trains."""
    return run.made.removesuffix("/manifest.json")


def variant(place, key, option, value):
    """The folder of a run that differs from the method's own in one option: models/study/arithmetic/grpo-kl_coef0.05"""
    return f"{place}/{key}-{option}{value:g}"


def measurement(folder):
    """The measurement of a run, in the folder in which report/compare.py keeps those that it makes."""
    place, _, run = folder.rpartition("/")
    return f"{place}/measured/{run}.json"


def task_runs(config, name):
    """What the page reads of one task."""
    place, seed = f"{config.models}/{name}", config.seed_list()[0]
    folders = {key: [(x, variant(place, key, option, x)) for x in xs] for key, (option, xs) in COEFFICIENTS.items()}
    varied = {
        key: (COEFFICIENTS[key][0], [(value, folder, measurement(folder)) for value, folder in found])
        for key, found in folders.items()
    }
    long = f"{place}/ppo-long"
    given = ("--config", "configs/smoke/compare.yaml") if config.smoke else ()
    options = (*given, *words(compare_options(config, name)))
    return TaskRuns(name, options, varied, (long, measurement(long)), seed)


def main(config):
    place = in_root(config.models)
    hold_output(place, lambda: place.mkdir(exist_ok=True), 0, "it is this study; wait until it has ended")
    todo = [] if config.smoke else [FETCH]
    todo += [stage for name in config.task_list() for stage in stages(config, name)]
    pace = SMOKE_PACE if config.smoke else first_pace()
    say(f"{len(todo)} stages; about {duration(seconds_left(todo, pace))} from here. Stop and start again at any time.")
    again = shlex.join(["python", "report/study.py", *sys.argv[1:]])
    run_all(todo, again, pace)
    say(
        f"the study, with figures: {write_study(config.out, [task_runs(config, n) for n in config.task_list()], again)}"
    )


if __name__ == "__main__":
    cli(main, Config)
