"""What a launcher hands on: settings of accelerate, processes of torchrun; and terminals that cannot show a text."""

import io
import sys

import pytest

from configs.config import UserError
from runtime.cli import refuse_several
from runtime.console import say
from runtime.processes import refuse_accelerate_settings


@pytest.mark.parametrize(
    "environment, named",
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--precision bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend"),
    ],
)
def test_a_setting_of_accelerate_that_would_not_be_followed_is_refused(environment, named):
    with pytest.raises(UserError, match=named):
        refuse_accelerate_settings(environment)


def test_accelerates_defaults_are_taken():
    refuse_accelerate_settings(
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "WORLD_SIZE": "2"}
    )


def test_a_script_of_one_process_refuses_several_and_names_those_that_take_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="train_lm_ddp.py"):
        refuse_several()


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    say("caf\N{LATIN SMALL LETTER E WITH ACUTE} is open")
    assert written.getvalue() == b"caf? is open\n"


def test_a_closed_pipe_does_not_end_the_work(monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    say("nobody reads this")
    say("nor this")
    assert not isinstance(sys.stdout, Closed)
