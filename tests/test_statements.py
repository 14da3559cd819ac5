"""Every statement has a test and a mutant, and each of them names a statement."""

import ast
from dataclasses import replace
from functools import cache

import pytest
from mutants.mutants import MUTANTS
from statements import STATEMENTS

from configs.config import ROOT


@cache
def marked_tests():
    """{(file, test function): the keys in its statement marks}."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [d for d in node.decorator_list if isinstance(d, ast.Call)]
                keys = [a.value for d in marks if ast.unparse(d.func) == "pytest.mark.statement" for a in d.args]
                found[path.relative_to(ROOT).as_posix(), node.name] = keys
    return found


def test_every_mark_names_a_statement_and_every_statement_has_a_test():
    named = {key for keys in marked_tests().values() for key in keys}
    assert named == STATEMENTS.keys()


def test_every_statement_has_a_mutant():
    assert {mutant.statement for mutant in MUTANTS} == STATEMENTS.keys()


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_fits_the_code_and_its_tests_are_of_its_statement(mutant):
    assert mutant.fits(ROOT), "stale: the code has changed; say in mutants.py how to break it now"
    tests = marked_tests()
    for name in mutant.tests:
        file, function = name.split("::")
        assert mutant.statement in tests[file, function.split("[")[0]], name


def test_a_mutant_finds_its_code_where_it_has_moved():
    mutant = next(m for m in MUTANTS if m.symbol == "Updates.step")
    moved = replace(mutant, file="rlhf/gone.py")
    assert moved.fits(ROOT) and moved.path(ROOT) == mutant.path(ROOT) == ROOT / "train/updates.py"
    assert not replace(moved, symbol="Updates.remaining").fits(ROOT) and not replace(mutant, old="    ").fits(ROOT)
