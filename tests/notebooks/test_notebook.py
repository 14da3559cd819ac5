"""The notebook: its commands are scripts with options that they take, and its own lines of Python run."""

import importlib
import json
import re
import shlex

import pytest

from configs.config import ROOT, load_config

pytestmark = pytest.mark.slow

NOTEBOOK = json.loads((ROOT / "notebooks/llm-training.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [line.removeprefix("!python ") for cell in CODE for line in cell.splitlines() if line.startswith("!python ")]


def test_it_holds_no_outputs():
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in NOTEBOOK["cells"] if "outputs" in cell
    )
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_a_script_with_options_that_it_takes(command):
    script, *words = shlex.split(command)
    assert (ROOT / script).is_file()
    if script == "models/fetch.py":
        assert not words
        return
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    importlib.sys.modules["script"] = module
    spec.loader.exec_module(module)
    load_config(module.Config, words)


def test_every_stage_is_there():
    scripts = {shlex.split(command)[0] for command in COMMANDS}
    for floor in ("train/train_lm.py", "data/generate_preferences.py", "data/generate_preferences_multi.py"):
        assert floor in scripts
    for stage in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train"):
        assert f"rlhf/{stage}.py" in scripts
    assert "report/compare.py" in scripts


def test_its_lines_of_python_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "notebooks")
    names = {}
    for cell in CODE:
        if "!" in cell or "preferences.jsonl" in cell or "IPython" in cell:
            continue
        exec(compile(cell, "cell", "exec"), names)
    said = capsys.readouterr().out
    assert "1.4997" in said and "0.6931" in said


def test_the_heading_up_to_which_it_shows_the_report_is_one_of_the_report():
    [heading] = re.findall(r"split\(\"(## .+?)\"\)", "\n".join(CODE))
    assert f"\n{heading}\n" in (ROOT / "report" / "page.py").read_text(encoding="utf-8")
