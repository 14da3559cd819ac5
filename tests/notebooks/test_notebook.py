"""The notebook: it runs from its first cell to its last one, its commands exist, and what its cells call works."""

import ast
import base64
import importlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from html.parser import HTMLParser

import pytest
import torch

from configs.config import ROOT, UserError, load_config
from rlhf import grpo_train
from runtime.curves import new_figure
from runtime.files import as_lines, read_lines, read_manifest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install nbclient ipykernel")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install nbclient ipykernel")
import nbformat  # noqa: E402
from PIL import Image  # noqa: E402

from report import notebook  # noqa: E402

pytestmark = pytest.mark.slow

PATH = ROOT / "notebooks/llm-training.ipynb"
SMOKE = ROOT / "configs/smoke"


def code(cells):
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs(cell, mime):
    """What a cell shows in this form, as texts."""
    return ["".join(o["data"][mime]) for o in cell["outputs"] if mime in o.get("data", {})]


def printed(cell):
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def by_id(cells):
    return {cell["id"]: cell for cell in cells}


def files_of_the_tree():
    """{file: (time of its last change, size)} of what git knows, or would take."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


# The file


@pytest.fixture(scope="module")
def saved():
    return json.loads(PATH.read_text(encoding="utf-8"))["cells"]


def test_it_is_saved_with_the_outputs_of_a_run_without_an_error_or_a_warning(saved):
    assert PATH.stat().st_size < 2_000_000
    counts = [cell["execution_count"] for cell in code(saved)]
    assert counts == list(range(1, len(counts) + 1))  # from the first to the last, once
    silent = [cell["id"] for cell in code(saved) if not cell["outputs"]]
    assert silent == ["place"]
    kinds = {o["output_type"] for cell in code(saved) for o in cell["outputs"]}
    names = {o.get("name") for cell in code(saved) for o in cell["outputs"]}
    assert "error" not in kinds and "stderr" not in names
    assert sum(len(outputs(cell, "image/png")) for cell in code(saved)) == 6
    assert sum(len(outputs(cell, "text/html")) for cell in code(saved)) == 2
    assert not re.search(r"/(home|root|tmp|Users)/", json.dumps(saved))


def test_its_cells_have_names_and_a_badge(saved):
    ids = [cell["id"] for cell in saved]
    assert len(set(ids)) == len(ids)
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    assert badge in "".join(saved[0]["source"]) and badge in (ROOT / "README.md").read_text(encoding="utf-8")


# Its commands


def settings(smoke):
    """The names that the notebook's second cell sets, for the real run or the smoke run."""
    source = "".join(by_id(json.loads(PATH.read_text(encoding="utf-8"))["cells"])["setting"]["source"])
    names = {"os": os, "SMOKE": smoke}
    for line in source.splitlines():
        if re.match(r"(configs|work|few, rollouts) = ", line):
            exec(line, names)
    return names


def commands(smoke):
    """(name of the function, text) of each call with a command in it: run("..."), train("...")."""
    names, found = settings(smoke), []
    for cell in code(json.loads(PATH.read_text(encoding="utf-8"))["cells"]):
        source = re.sub(r"^( *)!.*", r"\1pass", "".join(cell["source"]), flags=re.M)  # a line for the shell
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("run", "train"):
                found.append((ast.unparse(node.func), eval(ast.unparse(node.args[0]), names)))
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "options":
                found.append(("train_here", "rlhf/grpo_train.py " + eval(ast.unparse(node.value), names)))
    return found


@pytest.mark.parametrize("smoke", [None, "/somewhere"])
def test_each_command_is_a_script_with_options_that_it_takes(smoke):
    found = commands(smoke)
    assert len(found) == 10
    for _, command in found:
        script, *words = shlex.split(command)
        assert (ROOT / script).is_file()
        if script == "models/fetch.py":
            assert not words
            continue
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        config = load_config(module.Config, words)
        if "--out" in words:
            assert config.out.startswith(smoke or "models/notebook/")
    trained = [shlex.split(command)[0] for function, command in found if function == "train"]
    assert trained == [f"rlhf/{name}.py" for name in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train")]


# All of it, at smoke size


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the cells after the run, the folder of its results). No file of the tree changes."""
    folder, before = tmp_path_factory.mktemp("notebook"), files_of_the_tree()
    cells = nbformat.read(PATH, as_version=4)
    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = nbclient.NotebookClient(cells, timeout=300, kernel_name="python3", resources=place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTEBOOK_SMOKE", str(folder))
        client.execute()  # raises the error of a cell
    assert files_of_the_tree() == before
    return cells["cells"], folder


def test_every_stage_has_run(executed):
    cells, folder = executed
    for name, script in (("reward", "reward"), ("dpo", "dpo"), ("ppo", "ppo"), ("grpo", "grpo")):
        logged = read_lines(folder / name / "metrics.jsonl")
        assert [line["step"] for line in logged] == [1, 2]  # as configs/smoke/ has it
        assert read_manifest(folder / name)["result"]["steps"] == 2, script
    assert len(read_lines(folder / "preferences.jsonl")) > 3
    assert len(read_lines(folder / "one_step/metrics.jsonl")) == 1
    assert {path.stem for path in (folder / "runs").glob("*.json")} == {"base", "dpo", "ppo", "grpo"}
    assert (folder / "report/REPORT.md").is_file()


def test_no_cell_warns_and_each_shows_something(executed):
    cells, _ = executed
    assert [cell["id"] for cell in code(cells) if not cell["outputs"]] == ["place"]
    assert not [o for cell in code(cells) for o in cell["outputs"] if o.get("name") == "stderr"]
    for cell in code(cells):
        for picture in outputs(cell, "image/png"):
            width, height = Image.open(io.BytesIO(base64.b64decode(picture))).size
            assert 1000 < width < 1600 and height < 1000 and len(picture) < 300_000, cell["id"]
    assert len(json.dumps(cells)) < 2_000_000


def test_the_cells_show_what_the_runs_left(executed):
    cells, folder = executed
    shown = by_id(cells)
    for name in ("reward", "dpo", "ppo", "grpo"):
        assert f"the curves of {name}, up to step 2" in outputs(shown[f"train_{name}"], "text/plain")
        assert "doctor: " in "".join(outputs(shown[f"train_{name}"], "text/plain"))
    doctor = " ".join(outputs(shown["ask_the_doctor"], "text/plain")[0].split())
    assert doctor.count("patterns looked for") == 4
    group = read_lines(folder / "one_step/tokens.jsonl")[0]["sequences"]
    rewards = torch.tensor([sequence["scores"]["reward"] for sequence in group], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert rewards.std() > 0  # the group teaches something
    [text] = outputs(shown["group_advantages"], "text/markdown")
    seen = [
        [float(cell) for cell in line.split(" | ")[-2:]]
        for line in text.replace(" |\n", "\n").rstrip(" |").splitlines()[2:]
    ]
    assert seen == [[round(r, 2), round(a, 2)] for r, a in zip(rewards.tolist(), expected.tolist())]
    [answers] = outputs(shown["beside_each_other"], "text/markdown")
    assert answers.splitlines()[0] == "| prompt | base | DPO | PPO | GRPO online |" and len(answers.splitlines()) == 8
    assert printed(shown["ask"]).count("you> ") == printed(shown["ask"]).count("model> ") == 2


# What the cells call


class Attributes(HTMLParser):
    """The attributes of the iframe of a page, as a browser's parser finds them."""

    def handle_starttag(self, tag, attributes):
        if tag == "iframe":
            self.found = dict(attributes)


def test_the_frame_holds_the_page(tmp_path):
    token = {"ids": [5], "texts": ["it's &amp; \"<b>'"], "special": [], "length": 1}
    sequence = {**token, "name": "completion 1", "numbers": {"mask": [1], "logprob": [-1.0]}, "scores": {"reward": 1.0}}
    kept = [{"step": step, "group_size": 1, "prompt": token, "sequences": [sequence]} for step in (1, 7)]
    (tmp_path / "tokens.jsonl").write_text(as_lines(kept))
    (tmp_path / "config.yaml").write_text("model_name: tiny\n")
    parser = Attributes()
    parser.feed(notebook.token_page(tmp_path, 7).data)
    content = parser.found["srcdoc"]
    assert parser.found["sandbox"] == "allow-scripts" and content.startswith("<!doctype html>")
    data = json.loads(re.search(r'id="data"[^>]*>(.*?)</script>', content, re.DOTALL)[1])
    assert [group["step"] for group in data["groups"]] == [7]
    texts = "".join(part for part, _ in data["groups"][0]["sequences"][0]["texts"][0])
    assert texts == token["texts"][0].replace(" ", "·")


@pytest.fixture
def displayed(monkeypatch):
    """The texts and pictures that cells display, in order: each dict replaces the one of its output."""
    found = []

    class Handle:
        def update(self, data, raw):
            found.append(data)

    def display(data, raw, display_id):
        found.append(data)
        return Handle()

    monkeypatch.setattr(notebook, "display", display)
    return found


def test_the_curves_move_while_a_script_trains(displayed, monkeypatch, tmp_path):
    monkeypatch.setattr(notebook, "REDRAW", 0.0)
    notebook.train(f"rlhf/grpo_train.py --config {SMOKE}/grpo.yaml --steps 60 --out {tmp_path}/run")
    pictures = [data for data in displayed if "image/png" in data]
    steps = [int(re.search(r"up to step (\d+)", data["text/plain"])[1]) for data in pictures]
    assert len(steps) > 2 and steps == sorted(set(steps)) and steps[-1] == 60
    assert len({data["image/png"] for data in pictures}) == len(steps)
    before = len(displayed)
    notebook.train(f"rlhf/grpo_train.py --config {SMOKE}/grpo.yaml --steps 60 --out {tmp_path}/run")  # finished
    again = displayed[before:]
    assert pictures[-1] in again and "holds this very run, finished" in again[-1]["text/plain"]


def test_a_script_that_fails_stops_the_notebook(displayed):
    with pytest.raises(UserError, match="dpo_train.py --bta 1 ended with status 2:\nerror: .*Did you mean 'beta'"):
        notebook.run("rlhf/dpo_train.py --bta 1")
    assert displayed[-1]["text/plain"].startswith("error: unknown key 'bta'")


@pytest.mark.statement("notebook")
def test_an_interrupted_cell_goes_on_when_it_is_run_again(displayed, monkeypatch, tmp_path):
    """Jupyter signals the kernel and its children; elsewhere the kernel alone may get the signal."""
    folder, steps, started = tmp_path / "run", 200, []
    command = f"rlhf/grpo_train.py --config {SMOKE}/grpo.yaml --steps {steps} --out {folder}"
    popen = subprocess.Popen

    def start(*words, **settings):
        started.append(popen(*words, **settings))
        return started[-1]

    monkeypatch.setattr(notebook.subprocess, "Popen", start)
    logged = 0
    for children_too in (True, False):

        def interrupt(logged=logged, children_too=children_too):
            while len(read_lines(folder / "metrics.jsonl")) <= logged:
                time.sleep(0.02)
            if children_too:
                started[-1].send_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            notebook.train(command)
        thread.join()
        logged = len(read_lines(folder / "metrics.jsonl"))
        assert logged < steps and list(folder.glob("checkpoints/step-*")) and read_manifest(folder) is None
        assert any("SIGINT: stopped after step" in data["text/plain"] for data in displayed[-3:])
    notebook.train(command)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, steps + 1))


OPTIONS = f"--config {SMOKE}/grpo.yaml --steps 3"


@pytest.mark.statement("notebook")
def test_the_advantage_of_a_cell_is_the_one_that_trains(displayed):
    own, handlers = grpo_train.advantages_of_step, signal.getsignal(signal.SIGTERM)
    asked = []

    def nothing(groups, config):
        asked.append(len(groups))
        return [torch.zeros_like(rewards) for rewards in groups]

    without = notebook.train_here(nothing, OPTIONS)
    assert asked == [3, 3, 3] and [line.get("advantage", 0.0) for line in without] == [0.0] * 3
    assert grpo_train.advantages_of_step is own and signal.getsignal(signal.SIGTERM) is handlers
    original = notebook.train_here(own, OPTIONS)
    assert all(line["advantage"] > 0 for line in original) and original[0]["reward"] == without[0]["reward"]
    assert displayed[-1]["text/plain"].startswith("step     1/3") and displayed[-1]["text/plain"].count("step ") == 3


def test_runs_beside_each_other_are_wholly_within_the_axes(monkeypatch):
    seen = []

    def watched(*size):
        figure, axes = new_figure(*size)
        seen.extend(axes)
        return figure, axes

    monkeypatch.setattr(notebook, "new_figure", watched)
    runs = {
        name: [
            {"step": step, "advantage": 0.8, "grad_norm": 0.3 * step, "reward": reward + step / 10} for step in (1, 2)
        ]
        for name, reward in (("GRPO", -0.5), ("yours", -0.4))
    }
    assert len(notebook.beside(runs).data) > 10_000 and len(seen) == 3
    for ax, key in zip(seen, ("advantage", "grad_norm", "reward")):
        low, high = ax.get_ylim()
        drawn = [list(line.get_ydata()) for line in ax.lines]
        assert drawn == [[line[key] for line in lines] for lines in runs.values()]
        assert all(low <= value <= high for values in drawn for value in values) and low < high


def test_an_advantage_that_fails_leaves_everything_as_it_was(displayed):
    own = grpo_train.advantages_of_step
    with pytest.raises(ZeroDivisionError):
        notebook.train_here(lambda groups, config: 1 / 0, OPTIONS)
    assert grpo_train.advantages_of_step is own and len(notebook.train_here(own, OPTIONS)) == 3


@pytest.mark.statement("notebook")
def test_the_mistakes_of_a_reward_model_are_those_that_it_counted(displayed, tmp_path):
    """Training says how often the score is right on held-out pairs; the rest are the mistakes."""
    data, folder = tmp_path / "pairs.jsonl", tmp_path / "reward"
    notebook.run(f"data/generate_preferences.py --config {SMOKE}/preferences.yaml --out {data}")
    words = f"--config {SMOKE}/reward.yaml --data {data} --heldout_fraction 0.6 --out {folder}"
    notebook.run(f"rlhf/train_reward_model.py {words}")
    rows, pairs = notebook.mistakes(folder)
    result = read_manifest(folder)["result"]
    assert pairs == result["heldout_pairs"] > 2
    assert len(rows) == round(pairs * (1 - result["heldout_accuracy"])) and 0 < len(rows) < pairs
    assert all(rejected >= chosen for _, _, chosen, _, rejected in rows)
    gaps = [rejected - chosen for _, _, chosen, _, rejected in rows]
    assert gaps == sorted(gaps, reverse=True)
    texts = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in read_lines(data)}
    assert {(row[1], row[3]) for row in rows} <= texts
