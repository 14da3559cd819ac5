"""What all scripts that use a model have in common on the command line."""

import importlib

import pytest

from configs.config import ROOT, options, usage
from models.options import ModelOptions

NO_MODEL = ("demo", "study", "doctor", "token_view", "make_arithmetic")
SCRIPTS = [
    f"{room}.{path.stem}"
    for room in ("train", "rlhf", "data", "inference", "report")
    for path in sorted((ROOT / room).glob("*.py"))
    if "cli(" in path.read_text() and path.stem not in NO_MODEL
]


def test_all_scripts_are_looked_at():
    assert len(SCRIPTS) == 19


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_that_a_check_runs_which_cannot_be_turned_off(script):
    Config = importlib.import_module(script).Config
    assert " ".join(ModelOptions.NOTE.split()) in " ".join(usage(Config).split())
    assert "cannot be turned off" in ModelOptions.NOTE
    assert {name for name in options(Config) if "check" in name} <= {"keep_checkpoints", "gradient_checkpointing"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_options_of_the_chat_template_which_decide_the_result(script):
    assert options(importlib.import_module(script).Config)["chat_template_kwargs"]["identity"]
