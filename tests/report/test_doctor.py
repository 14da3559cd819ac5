"""report/doctor.py as a command: what it prints, its exit status, and what the report says of runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.config import ROOT, UserError, format_config, load_config
from report import doctor
from report.compare import checkups
from report.page import doctor_section
from runtime.doctor import Diagnosis, patterns_table
from runtime.patterns import Finding

spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)


@pytest.fixture
def ill(tmp_path):
    """The folder of a run of 12 steps in which 0.9 of the completions are cut; no manifest: it goes on."""
    folder = tmp_path / "ill"
    folder.mkdir()
    lines = [{"step": i, "clipped_ratio": 0.9, "reward": 0.1 * i, "sampler_kl": 0.001} for i in range(1, 13)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("max_new_tokens: 16\n")
    return folder


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "lr": 0.1}\n')
    return path


def test_several_runs_as_text(ill, short, capsys):
    doctor.main(load_config(doctor.Config, [str(ill), str(short)]))
    printed = capsys.readouterr().out
    assert f"{ill}: logged lines 12" in printed.replace("\n", " ") and printed.index(str(ill)) < printed.index(
        str(short)
    )
    assert "act: completions cut by length" in printed and "--max_new_tokens 32" in printed
    assert "Too short to tell of: loss_spikes" in " ".join(printed.split())
    assert all(len(line) <= 80 or str(ill) in line or str(short) in line for line in printed.splitlines())


def test_json(ill, short, capsys):
    doctor.main(load_config(doctor.Config, [str(ill), "--json", "true", str(short)]))
    first, second = json.loads(capsys.readouterr().out)
    assert (first["run"], first["lines"], second["run"]) == (str(ill), 12, str(short))
    [finding] = first["findings"]
    assert (finding["pattern"], finding["level"]) == ("completions_cut", "act")
    assert finding.keys() == {"pattern", "level", "short", "seen", "means", "advice"}
    assert second["findings"] == [] and "loss_spikes" in second["too_short"] and second["looked_for"] == []


def test_the_table_of_patterns(capsys):
    doctor.main(load_config(doctor.Config, ["--patterns", "true"]))
    assert capsys.readouterr().out == patterns_table() + "\n"


def test_words_without_a_key_are_the_runs():
    assert load_config(doctor.Config, ["a", "--json", "true", "b c"]).runs == ("a", "b c")
    config = load_config(doctor.Config, ["--runs", "a"])
    assert config.runs == ("a",) and "- a" in format_config(config)
    with pytest.raises(UserError, match="'b' on the command line: --runs was given already"):
        load_config(doctor.Config, ["--runs", "a", "b"])
    with pytest.raises(UserError, match="--runs is given twice"):
        load_config(doctor.Config, ["b", "--runs", "a"])
    with pytest.raises(UserError, match="runs = .*must be one text or several"):
        load_config(doctor.Config, [""])
    with pytest.raises(UserError, match="give the folder of a run"):
        load_config(doctor.Config, [])
    with pytest.raises(UserError, match="options are written --key value"):
        from report import compare

        load_config(compare.Config, ["models/dpo"])


@pytest.mark.slow
def test_exit_statuses(ill, tmp_path):
    def run(*words):
        command = [sys.executable, ROOT / "report/doctor.py", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = run("ill")
    assert done.returncode == 0 and "act: completions cut" in done.stdout and done.stderr == ""
    wrong = run("ill", "nowhere")
    assert wrong.returncode == 2 and wrong.stdout == "" and "nowhere is not there" in wrong.stderr
    (ill / "metrics.jsonl").write_text('{"step": "one"}\n')
    wrong = run("ill")
    assert wrong.returncode == 2 and "line 1: must be an object with a step" in wrong.stderr
    assert "Traceback" not in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_the_report_says_what_the_doctor_says(ill, tmp_path):
    rows = synthetic.synthetic_rows()
    assert doctor_section(rows) == "No run left a log."
    by_key = {row.key: row for row in rows}
    by_key["grpo"].checkups = checkups([str(ill), str(tmp_path / "nowhere")])
    fine = Finding("normal", "near 0", "The mean loss is 0.", "It is near 0.", "Nothing.", "grpo_loss")
    by_key["dpo"].checkups = {"models/dpo": Diagnosis(30, [fine], ["grpo_loss", "clipped"], ["slow"])}
    text = doctor_section(rows)
    assert (
        f"| `{ill}` | act | In steps 9 to 12 the length limit cut 90% +- 0%" in text and "--max_new_tokens 32" in text
    )
    assert "| `models/dpo` | normal | The mean loss is 0. |  |" in text
    assert "| `models/dpo` | none | logged lines 30, patterns looked for 2 |  |" in text
    assert "| `models/dpo` | - | too short to tell of: slow |  |" in text
    assert "nowhere" not in text and f"| `{ill}` | none" not in text
