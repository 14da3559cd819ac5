"""The pages: they build, their links and anchors lead somewhere, and what they name, show and quote is there."""

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from configs.config import ROOT, UserError, load_config
from data.corpus import load_corpus
from data.pairs import load_groups, load_pairs
from data.prompts import load_prompts, read_prompts
from data.rewards import RewardFunctions
from models.loader import load_tokenizer
from report.evaluate import read_measurement
from rlhf import dpo_train, grpo_train, ppo_train, train_reward_model
from train import train_lm
from train.common import LMConfig, load_data, load_start

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TODAY = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what was there before
FORMATS = ROOT / "docs" / "data-formats.md"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
ROOMS = "configs|runtime|models|data|train|rlhf|inference|report|proof|benchmarks|tests|notebooks|docs"


def named(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them: small letters, no marks, a hyphen for each space."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_to_files_and_headings(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


# what docs/adding-a-method.md has its reader make
RLOO = {"rlhf/rloo_train.py", "configs/rloo.yaml", "configs/smoke/rloo.yaml", "docs/methods/rloo.md"}


@pytest.mark.parametrize("page", TODAY, ids=named)
def test_scripts_configurations_and_files_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\bpython ([\w./-]+\.py)\b", text))  # a script that is run
    names |= set(re.findall(rf"(?<![\w./-])((?:{ROOMS})/[\w/.-]*\w\.(?:py|yaml|ipynb|md))\b", text))
    own = re.compile(r"(.*/)?my_[^/]*|.*/KEY\.yaml")  # the reader's, and placeholders
    assert not sorted(name for name in names - RLOO if not own.fullmatch(name) and not (ROOT / name).is_file())


# The formats: each example of docs/data-formats.md is loaded, and each error that stands there is provoked


@cache
def examples():
    """{file name: text} of the examples: a block after a line that ends in `NAME`: ."""
    text = FORMATS.read_text(encoding="utf-8")
    return dict(re.findall(r"`([\w.]+)`(?:, for `[^`]+`)?:\n\n```\w+\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-llama")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function (name, text or rows) -> the name of a file in the working directory."""
    monkeypatch.chdir(tmp_path)

    def file(name, content):
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_text(text, encoding="latin-1" if name.endswith(".txt") else "utf-8")
        return name

    return file


@pytest.mark.parametrize(
    "name, kind",
    [
        ("text.jsonl", "text"), ("messages.jsonl", "messages"), ("completions.jsonl", "prompt"),
        ("other_forms.jsonl", "prompt"), ("sharegpt.jsonl", "messages"), ("pairs_scored.jsonl", "prompt"),
    ],
)  # fmt: skip
def test_examples_of_text_load(name, kind, write):
    assert load_corpus(write(name, examples()[name]), 0.5).kind == kind


@pytest.mark.parametrize("name, rows", [("pairs.jsonl", 3), ("pairs_scored.jsonl", 1)])
def test_examples_of_pairs_load(name, rows, write, tokenizer):
    pairs, counts, _ = load_pairs(write(name, examples()[name]), tokenizer, 512)
    assert len(pairs) == rows and not any(counts.values())
    assert all(pair["prompt"] and pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("name, stored", [("groups.jsonl", True), ("groups_texts.jsonl", False)])
def test_examples_of_groups_load(name, stored, write, tokenizer):
    [group], _ = load_groups(write(name, examples()[name]), tokenizer, 512)
    assert len(group["completions"]) == len(group["scores"]) == 3
    assert (group["logprobs"] is not None) == stored
    if stored:  # the ids are those of the texts
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in group["completions"]]
        assert texts == group["text"]["completions"] == ["A plum.", "A", "7"]


def test_examples_of_prompts_rewards_configurations_and_records_load(write):
    prompts = write("prompts.json", examples()["prompts.json"])
    assert [row["id"] for row in load_prompts(prompts)] == ["t1", "h1"]
    assert len(read_prompts(write("my_prompts.jsonl", examples()["my_prompts.jsonl"]))) == 2
    write("my_reward.py", examples()["my_reward.py"])
    assert RewardFunctions("my_reward:reward")(["p"], ["a b c"], [{}]).values == [0.25]
    config = load_config(dpo_train.Config, ["--config", write("my_dpo.yaml", examples()["my_dpo.yaml"])])
    assert (config.beta, config.lr) == (0.1, 5e-4) and yaml.safe_load(examples()["my_dpo.yaml"])
    assert [json.loads(line)["step"] for line in examples()["metrics.jsonl"].splitlines()] == [1, 2]
    options = load_config(dpo_train.Config, ["--config", write("my_options.yaml", examples()["my_options.yaml"])])
    assert options.chat_template_kwargs == {"enable_thinking": False}
    assert json.loads(examples()["manifest.json"])["script"] == "dpo_train.py"


@pytest.mark.slow
def test_grpo_on_questions_and_answers_by_the_command_of_its_page(tmp_path, monkeypatch):
    """The two files and the very command of the page, on a tiny model."""
    text = (ROOT / "docs/methods/grpo.md").read_text(encoding="utf-8")
    section = text.split("## Your own questions, answers and reward")[1].split("\n## ")[0]
    (rows,), (source,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("json", "python"))
    [command] = re.findall(r"```\n(python .*?)```", section, re.DOTALL)
    (tmp_path / "questions.jsonl").write_text(rows)
    (tmp_path / "maths.py").write_text(source)
    python, script, *words = shlex.split(command)
    tiny = ["--config", str(ROOT / "configs/smoke/grpo.yaml"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words, *tiny], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert python == "python" and done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        both = line["rewards/right/mean"] + 0.2 * line["rewards/short/mean"]
        assert line["reward"] == pytest.approx(both) and line["rewards/short/mean"] > 0
    assert len(lines) == 2
    files = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    assert {"prompts", "reward"} <= files.keys()
    [following] = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
    assert "--prompts questions.jsonl --prompt_column question --reward maths:right,maths:short" in following
    monkeypatch.chdir(tmp_path)
    rewards = RewardFunctions("maths:right,maths:short")(
        ["2 + 3?"] * 2, ["It is 5", "5 or 6"], [{"answer": "5"}] * 2
    ).by_function
    assert rewards == {"right": [1.0, 0.0], "short": [1 / 4, 1 / 4]}


def errors(write, tokenizer):
    """What provokes each error of the page: functions, each of which raises a UserError."""
    pair, group = {"prompt": "a", "chosen": "b", "rejected": "c"}, json.loads(examples()["groups_texts.jsonl"])
    first, held = json.loads(examples()["prompts.json"])
    ids, logprobs = [[5, 6, 2], [7], [8, 9]], [[-1.0, -1.0, -0.5], [-1.0], [-1.0, -1.0]]
    more = "def word(p, c): return 'good'\ndef maths(p, c, answer): return 1\ndef fails(p, c): 1 / 0\n"
    write("my_reward.py", examples()["my_reward.py"] + more)

    def text(content, name="my.jsonl"):
        return lambda: load_corpus(write(name, content), 0.5)

    def pairs(*rows, max_length=512):
        return lambda: load_pairs(write("my.jsonl", list(rows)), tokenizer, max_length)

    def groups(*rows, max_length=512):
        return lambda: load_groups(write("my.jsonl", list(rows)), tokenizer, max_length)

    def prompts(*rows, split=None):
        return lambda: load_prompts(write("my.json", json.dumps(list(rows))), split)

    def yaml_of(content):
        return lambda: load_config(dpo_train.Config, ["--config", write("my.yaml", content)])

    def options(script, *words):
        return lambda: load_config(script.Config, list(words))

    def reward(spec):
        return lambda: RewardFunctions(spec)(["p"], ["c"], [{}])

    def measurement():
        return read_measurement(Path(write("my.json", "{}")))

    def plain_text():
        data = write("my.txt", "one line\n" * 50)
        config = LMConfig(data=data, chat_template_kwargs={"enable_thinking": False})
        return load_start(config, load_data(config), "cpu")

    return [
        text('{"text": "a"}\n{"text": \n'),
        text('["a"]\n'),
        text([{"body": "a"}]),
        text([{"text": "a"}, {"prompt": "a", "completion": "b"}]),
        text([{"text": " "}]),
        text([{"messages": [{"role": "user", "content": "a"}]}]),
        text([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}]),
        text([{"prompt": "a", "completion": "b", "tools": "c"}]),
        text("a", name="my.doc"),
        text("caf\xe9", name="my.txt"),
        lambda: load_tokenizer("tiny-llama", {"enable_thinking": False}),
        lambda: load_tokenizer("tiny-gpt2", {"enable_thinking": False}),
        plain_text,
        pairs({**pair, "chat_template_kwargs": {"enable_thinking": False}}),
        pairs({"prompt": "a", "completion": "b"}),
        pairs({"chosen": "b", "rejected": "c"}),
        pairs({**pair, "chosen": ""}),
        pairs({**pair, "chosen_finish_reason": "eos"}),
        pairs({**pair, "chosen_score": "high", "rejected_score": 0}),
        pairs({**pair, "chosen": "b" * 30}, max_length=16),
        lambda: load_pairs("missing.jsonl", tokenizer, 512),
        groups({**group, "rejected": "x"}),
        groups({**group, "scores": [1, 0]}),
        groups({**group, "completion_ids": ids, "logprobs": [[-1.0]] * 3}),
        groups({**group, "completion_ids": [[5, 6, 2], [7], [8, 900]], "logprobs": logprobs}),
        groups({**group, "temperature": 0}),
        groups(group, max_length=16),
        groups({**group, "completion_ids": ids, "logprobs": logprobs}, group),
        prompts({key: first[key] for key in ("id", "prompt", "split")}),
        prompts({**first, "checks": [{"name": "max_word", "n": 5}]}),
        prompts({**first, "checks": [{"name": "max_words"}]}),
        prompts({**first, "split": "test"}),
        prompts(first, first),
        prompts(first, {**held, "prompt": first["prompt"]}),
        prompts(first, split="heldout"),
        lambda: read_prompts(write("my.jsonl", [{"prompt": "a"}]), need_checks=True),
        lambda: read_prompts(write("my.jsonl", [{"question": "a", "answer": "b"}])),
        reward("my_reward"),
        reward("my_reward:rewrd"),
        reward("no_module:reward"),
        lambda: RewardFunctions("my_reward:maths").check_columns([{"prompt": "p"}]),
        lambda: RewardFunctions("my_reward:reward", "1,2"),
        reward("my_reward:word"),
        reward("my_reward:fails"),
        yaml_of("bta: 0.2"),
        yaml_of("beta: high"),
        yaml_of("beta: -1"),
        yaml_of("loss_type: kto"),
        yaml_of("beta: 0.1\nbeta: 0.2"),
        yaml_of("- beta"),
        options(grpo_train, "--group_size", "4"),
        options(dpo_train, "--loss_type", "hinge", "--label_smoothing", "0.1"),
        measurement,
    ]


def test_the_errors_on_the_page_are_those_that_one_gets(write, tokenizer, tmp_path):
    """A long message may stand there shortened: by its beginning."""
    shown = re.findall(r"^error: (.+)$", FORMATS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    got = []
    for provoke in errors(write, tokenizer):
        with pytest.raises(UserError) as raised:
            provoke()
        got.append(str(raised.value).replace(f"{tmp_path}/", ""))
    wrong = [line for line in shown if not any(message.startswith(line) for message in got)]
    wrong.remove("models/dpo holds a run with another configuration:")  # tests/runtime has that one
    assert not wrong, "not what one gets: " + "\n".join([*wrong, "what one gets:", *got])
    left = [message for message in got if not any(message.startswith(line) for line in shown)]
    assert not left


DEFAULTS = {  # page: its script, and how many defaults its table names at least
    "dpo": (dpo_train, 6), "grpo": (grpo_train, 15), "ppo": (ppo_train, 12), "reward-model": (train_reward_model, 5),
    "language-model": (train_lm, 8),
}  # fmt: skip


@pytest.mark.parametrize("page", DEFAULTS)
def test_the_defaults_on_a_page_are_those_of_its_yaml(page):
    """A cell names one value for each option of its row. What stands after a blank, a reason, is not compared."""
    script, least = DEFAULTS[page]
    config = vars(load_config(script.Config, []))
    table = (ROOT / "docs/methods" / f"{page}.md").read_text().split("| option | default")[1].split("\n\n")[0]
    compared = []
    for line in table.splitlines()[2:]:
        names, values = (cell.strip() for cell in line.split("|")[1:3])
        if "script" in names + values:  # the option of another script of the page
            continue
        for name, value in zip(re.findall(r"`(\w+)`", names), [value.split(" ")[0] for value in values.split(", ")]):
            if isinstance(config[name], (int, float, str)):
                assert type(config[name])(yaml.safe_load(value)) == config[name], (name, value)
                compared.append(name)
    assert len(set(compared)) >= least, compared
