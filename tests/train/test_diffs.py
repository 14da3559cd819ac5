"""The lesson of the diffs: a technique is what its script adds to train_lm.py, and each added line says what for."""

import ast
import difflib

import pytest

from configs.config import ROOT

MARKS = {
    "train_lm_ddp": ("DDP:",),
    "train_lm_amp_ckpt": ("AMP:", "CKPT:", "COMPILE:"),
    "train_lm_fsdp": ("FSDP:",),
    "train_lm_tp": ("TP:",),
}


def code(name):
    """The lines of a script of train/ after its docstring."""
    text = (ROOT / "train" / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0]
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)
    return text.splitlines()[docstring.end_lineno :]


def added_lines(plain, other):
    """The lines that `diff` would show as added, blank ones left out."""
    matcher = difflib.SequenceMatcher(None, plain, other, autojunk=False)
    changes = [other[start:end] for tag, _, _, start, end in matcher.get_opcodes() if tag != "equal"]
    return [line for lines in changes for line in lines if line.strip()]


def test_a_line_that_was_put_in_or_changed_is_an_added_one_and_one_that_was_taken_out_is_not():
    assert added_lines(["a", "b", "c", "d"], ["a", "", "x", "b", "C"]) == ["x", "C"]


@pytest.mark.parametrize("name", MARKS)
def test_each_line_that_is_added_to_the_plain_loop_names_its_technique(name):
    added = added_lines(code("train_lm"), code(name))
    assert [line for line in added if not any(mark in line for mark in MARKS[name])] == []
    for mark in MARKS[name]:
        assert any(mark in line for line in added)
