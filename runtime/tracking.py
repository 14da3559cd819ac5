"""Weights & Biases (W&B): a run is also sent to a server, where it can be watched, or kept in files to be sent later.

    python rlhf/grpo_train.py --wandb auto        # online where wandb finds a login, else offline

A tracker gets three things of a run: its configuration, its numbers as they come, and what it made. So it sits where
the numbers are written (`Run.log` in runtime/run.py), and no loop knows of it. Row k of the W&B history is line k of
metrics.jsonl, with the same keys, grouped in sections. Because of these numbers a resumed run sends each line once: the
id of the W&B run lies in the run's folder, and what the server does not have yet is read from metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from configs.config import UserError, config_to_dict, option, shown
from runtime.console import say
from runtime.files import write_atomically
from runtime.run_folder import on_refusal

FOLDER = "wandb"  # subfolder of a run: the files of W&B
SECTIONS = {  # of the page of a run; other keys are in "train"
    "heldout": ("nats_per_token", "bits_per_byte"),
    "rollout": (
        "reward",
        "reward_se",
        "gold",
        "gold_se",
        "mean_length",
        "clipped_ratio",
        "frac_reward_zero_std",
        "advantage",
    ),
    "policy": ("kl", "kl_per_token", "kl_coef", "approx_kl", "approx_kl_first", "clipfrac", "entropy", "sampler_kl"),
    "optimizer": ("lr", "grad_norm", "skipped"),
    "speed": ("tok/s", "seconds"),
}
SECTION_OF = {key: section for section, keys in SECTIONS.items() for key in keys}


@dataclass
class Tracking:
    """The options of what is sent to W&B. They do not change the results of a run."""

    wandb: Literal["off", "auto", "online", "offline"] = option(
        "off", "send the run to W&B; auto: online where wandb finds a login, else offline", identity=False
    )
    wandb_project: str = option(
        "llm-from-scratch", "the W&B project; WANDB_PROJECT replaces this default", identity=False
    )


class Tracker:
    """The W&B run of one process. If `config.wandb` is "off", nothing happens, and wandb is not imported.

    folder: of the run; the files of W&B are in folder/wandb. name, group, job: of the W&B run. Runs that are compared
    share a group. Raises UserError if wandb is not installed, if it refuses its settings, and without a login if
    "online" was asked for.
    """

    def __init__(self, config: Any, folder: Path, name: str, group: str, job: str):
        self.config, self.folder = config, folder
        self.words = {"name": name, "group": group, "job_type": job}
        self.mode = find_mode(config.wandb)
        self.run: Any = None

    def open(self, lines: list[dict] | None = None, samples: Iterable[dict] = ()) -> None:
        """Begin the W&B run, or go on with the one whose id lies in the folder, and send the lines that it lacks.

        lines: of metrics.jsonl so far; None: a new W&B run that nothing resumes. samples: the rows of samples.jsonl.
        Raises UserError if W&B cannot be reached.
        """
        if self.mode is None:
            return
        import wandb

        place = self.folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        known = wandb.setup().settings  # from the environment and wandb's own settings files
        kept = place / "id.txt"
        resumed = lines is not None and kept.is_file()
        run_id = kept.read_text(encoding="utf-8").strip() if resumed else known.run_id or secrets.token_hex(4)
        if lines is not None:
            write_atomically(kept, run_id + "\n")
        earlier = list(place.glob(f"*run-*-{run_id}"))
        if self.mode == "offline" and any(map(on_server, earlier)):
            raise UserError(
                f"W&B has a part of this run ({run_id}) already, and offline it is not known which. "
                "Go on with --wandb online, or with --wandb off"
            )
        default = type(self.config).wandb_project
        words = self.words | {"name": known.run_name or self.words["name"]}
        words |= {"group": known.run_group or self.words["group"]}
        words |= {"project": (self.config.wandb_project == default and known.project) or self.config.wandb_project}
        words |= {"resume": "allow"} if self.mode == "online" else {}
        online = self.mode == "online"
        what = "W&B cannot be reached" if online else "wandb cannot begin the run"
        with refused(what, "--wandb offline works without it" if online else "train without it: --wandb off"):
            self.run = wandb.init(
                **words, id=run_id, mode=self.mode, dir=str(self.folder), config=config_to_dict(self.config),
                settings=wandb.Settings(silent=True, console="off", reinit="finish_previous"),
            )  # fmt: skip
        on_refusal.append(self._failed)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        last = {line["step"]: number for number, line in enumerate(lines or [])}  # the last line of each step
        samples_of: dict[int, list[dict]] = {}
        for sample in samples:
            samples_of.setdefault(last[sample["step"]], []).append(sample)
        for number, line in enumerate(lines or []):
            self.line(number, line, samples_of.get(number, []))
        for path in earlier:  # the new folder has all their lines
            if not on_server(path):
                shutil.rmtree(path, ignore_errors=True)

    def line(self, number: int, record: dict, samples: list[dict]) -> None:
        """Send line `number` (from 0) of metrics.jsonl, with its samples as a table. Each line is sent once."""
        if self.run is None or number < self.run.starting_step:
            return
        row = {key if key == "step" else f"{SECTION_OF.get(key, 'train')}/{key}": x for key, x in record.items()}
        if samples:
            row["samples"] = as_table(samples)
        self.run.log(row, step=number, commit=True)

    def finish(
        self, result: dict, tables: dict[str, list[dict]] | None = None, kind: str = "", files: Sequence[Path] = ()
    ) -> None:
        """Send the result, tables {name: rows}, and files as an artifact of this kind. End, and print where the run is.

        result: {name: number}, for the summary of the run.
        """
        if self.run is None:
            return
        import wandb

        for name, rows in (tables or {}).items():
            self.run.log({name: as_table(rows)})
        self.run.summary.update({f"result/{key}": value for key, value in result.items()})
        if files:
            artifact = wandb.Artifact(self.words["name"], type=kind, metadata=result)
            for path in files:
                artifact.add_file(str(path))
            self.run.log_artifact(artifact)
        offline, url, run_id = self.run.offline, self.run.url, self.run.id
        self.run.finish()
        on_refusal.remove(self._failed)
        if offline:
            waiting = sorted(p for p in (self.folder / FOLDER).glob(f"offline-run-*-{run_id}") if not on_server(p))
            folders = " ".join(map(shown, waiting))
            say(f"W&B: offline in {folders}/\nto send it: wandb login && wandb sync {folders}")
        else:
            say(f"W&B: {url}")

    def _failed(self):
        self.run.finish(exit_code=1)


@contextlib.contextmanager
def refused(what: str, advice: str) -> Iterator[None]:
    """A context for calls of wandb before training: any error in it becomes a UserError of one sentence, with advice.

    wandb raises errors of its own, of its settings (a model of pydantic), of sockets, and of the service behind it.
    """
    from pydantic import ValidationError

    try:
        yield
    except UserError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"WANDB_{str(first['loc'][0]).upper()} = {first['input']!r}: {first['msg']}") from None
    except Exception as error:
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{what} ({why}); {advice}") from None


def find_mode(wanted: str) -> Literal["online", "offline"] | None:
    """The mode of wandb for the option `wandb`; None: nothing is sent.

    WANDB_MODE = disabled turns W&B off. Any other mode of the environment, or of wandb's settings files, is that of
    "auto". A login is found by wandb itself: WANDB_API_KEY, netrc, or an identity token, for the server that it uses.
    """
    if wanted == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f"wandb = {wanted} needs the package wandb: pip install wandb") from None
    service = os.environ.get("WANDB_SERVICE")  # of another process; wandb sets its own at the first setup
    ended = f"WANDB_SERVICE = {service} may be of a process that has ended: unset it, or " if service else ""
    with refused("wandb cannot start", f"{ended}train without it: --wandb off"):
        settings = wandb.setup(wandb.Settings(silent=True)).settings
    with refused("wandb cannot use its login", "--wandb offline works without it"):
        said = {"run": "online", "dryrun": "offline"}.get(settings.mode, settings.mode)
        if said == "disabled":
            say("W&B is off, because its mode is disabled (WANDB_MODE)")
            return None
        if said == "shared":
            raise UserError("WANDB_MODE = shared: must be online, offline or disabled")
        if "offline" in (wanted, said if wanted == "auto" else wanted):
            return "offline"
        before, settings.mode = settings.mode, "online"  # offline, wandb does not look for a login
        try:
            if wandb.login(prompt=False, verify=False):
                return "online"
        finally:
            settings.mode = before
    if wanted == "online" or os.environ.get("WANDB_MODE"):
        raise UserError("wandb = online, and there is no login: run `wandb login` first, or use offline")
    return "offline"


def on_server(path: Path) -> bool:
    """Whether W&B's server has what a folder of wandb holds, or a part of it: an online run, or one that was synced."""
    return not path.name.startswith("offline-") or any(path.glob("*.synced"))


def as_table(rows: list[dict]) -> Any:
    """Rows with the same keys as a table of W&B."""
    import wandb

    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
