"""Weights & Biases: the plain loop of train_lm.py, which also sends its log lines to a W&B run.

    python train/train_lm_wandb.py                            # offline unless this machine is logged in to W&B
    python train/train_lm_wandb.py --wandb_log_model true     # the trained model as an artifact

The technique changes the logger, not the loop: this script adds one sink to the run and calls `train`. It sends the
keys of metrics.jsonl (loss, lr, grad_norm, tok/s, held-out loss), the samples as a table, and the configuration.
"""

import netrc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import wandb

from configs.config import UserError, config_to_dict, option, shown
from runtime.cli import cli
from runtime.console import say
from runtime.run import Run
from train.common import LMConfig
from train.train_lm import train


@dataclass
class Config(LMConfig):
    out: str = "models/lm_wandb"
    wandb_project: str = option("llm-from-scratch", "the W&B project that receives the run", identity=False)
    wandb_mode: Literal["auto", "online", "offline"] = option(
        "auto", "auto: online where a login is found", identity=False
    )
    wandb_log_model: bool = option(False, "also send the trained model, as an artifact", identity=False)


def logged_in():
    """Whether W&B finds a key without asking: in WANDB_API_KEY or in the .netrc file of this user.

    Raises UserError if the .netrc file cannot be read.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    for path in (os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"):
        if path and Path(path).is_file():
            try:
                return netrc.netrc(str(path)).authenticators(host) is not None
            except netrc.NetrcParseError as error:
                raise UserError(f"{path} cannot be read ({error.msg}, line {error.lineno})") from None
    return False


def open_wandb(config, folder):
    """Open a W&B run with its files in folder/wandb. Never asks for input.

    Raises UserError if W&B cannot be reached, or for mode online without a login.
    """
    mode = config.wandb_mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if logged_in() else "offline")
    if mode == "online" and not logged_in():
        raise UserError("wandb_mode = online, and there is no login: run `wandb login` first, or use offline")
    settings = wandb.Settings(silent=True, console="off")
    name = {"project": config.wandb_project, "name": folder.name, "config": config_to_dict(config)}
    try:
        return wandb.init(**name, dir=str(folder), mode=mode, settings=settings)
    except wandb.errors.Error as error:
        raise UserError(f"W&B cannot be reached ({error}); --wandb_mode offline works without it") from None


def main(config):
    run = Run(config, config.out)
    wb = open_wandb(config, run.folder)
    try:
        run.sinks.append(lambda metrics, step: wb.log(metrics, step=step))
        result, samples = train(config, run)

        rows = [[s["when"], s["prompt"], s["answer"]] for s in samples if s]
        wb.log({"samples": wandb.Table(columns=["when", "prompt", "answer"], data=rows)})
        wb.summary.update(result)
        if config.wandb_log_model:
            model = wandb.Artifact(run.folder.name, type="model", metadata=result)
            for path in sorted(run.folder.iterdir()):
                if path.is_file():
                    model.add_file(str(path))
            wb.log_artifact(model)
    except BaseException:  # as a context manager, W&B would print a traceback, even for a UserError
        wb.finish(exit_code=1)
        raise
    where, url = Path(wb.dir).parent, None if wb.offline else wb.url
    wb.finish()
    if url:
        say(f"W&B: {url}")
    else:
        say(f"W&B: offline run in {shown(where)}/. To send it: wandb login && wandb sync {shown(where)}")


if __name__ == "__main__":
    cli(main, Config)
