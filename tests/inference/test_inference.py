import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
import yaml

from configs.config import ROOT, UserError, load_config
from models.completions import TextStream
from models.loader import load_model, load_tokenizer, portable_name
from models.tiny import build_tiny
from models.tokens import prompt_ids
from rlhf.reward_model import RewardModel
from rlhf.side_by_side import SideBySide

pytestmark = pytest.mark.slow

QUICK = ["--max_new_tokens", "8"]


def load_script(name):
    """A script of inference/ as a module. It cannot be imported by name: inference.py hides the folder."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "inference" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *options, stdin=None):
    """What the command would do, in this process: (exit status, stdout, stderr). stdin: text that is piped in."""
    script = load_script(name)
    out, err = io.StringIO(), io.StringIO()
    status, before = 0, sys.stdin
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), tempfile.TemporaryFile("w+") as given:
        given.write(stdin or "")
        given.seek(0)
        sys.stdin = given
        try:
            script.main(load_config(script.Config, list(map(str, options))))
        except UserError as error:
            status = 2
            print(f"error: {error}", file=err)
        finally:
            sys.stdin = before
    return status, out.getvalue(), err.getvalue()


def typed(name, *options, **given):
    """The command in a process of its own, one thread."""
    command = [sys.executable, str(ROOT / "inference" / f"{name}.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders as the RLHF scripts leave them: adapters (dpo, ppo, grpo), a full model (full), a reward model."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer("tiny-llama")
    base = portable_name(build_tiny("tiny-llama"))
    torch.manual_seed(0)
    reward_model = RewardModel.load("tiny-llama", device="cpu", new_head=True)
    reward_model.save(folder / "reward", load_tokenizer("tiny-llama"), base)
    reward = str(folder / "reward")
    settings = {"dpo": {"beta": 0.2}, "ppo": {"reward_model": reward}, "grpo": {}, "full": {"beta": 0.5}}
    for name, extra in settings.items():
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(load_model("tiny-llama", device="cpu"), lora)
        model.peft_config["default"].base_model_name_or_path = base
        if name == "full":
            model = model.merge_and_unload()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "config.yaml").write_text(yaml.safe_dump({"model_name": "tiny-llama", **extra}))
    return folder


def test_prompts_from_a_file_are_answered_in_order_and_written(tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    prompts.write_text("\n".join(json.dumps({"prompt": p}) for p in ("a much longer prompt than the rest", "b", chat)))
    options = ["--model_name", "tiny-llama", "--prompts", prompts, "--temperature", 0, *QUICK, "--precision", "fp32"]
    status, stdout, stderr = run("inference", *options, "--top_p", 1, "--out", out)
    assert status == 0, stderr
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == ["a much longer prompt than the rest", "b", chat]
    assert all(row["finish_reason"] in ("stop", "length") and row["tokens"] <= 8 for row in rows)
    assert "tok/s" in stdout and "greedy" in stdout
    # a left-padded row gets what it gets alone
    status, _, stderr = run(
        "inference", "--model_name", "tiny-llama", "--prompt", "b", *options[4:], "--top_p", 1, "--out", out
    )
    assert status == 0, stderr
    assert rows_of(out)[0]["completion"] == rows[1]["completion"]


def test_standard_input_is_read_when_it_is_a_pipe(tmp_path):
    out = tmp_path / "out.jsonl"
    options = ["--model_name", "tiny-llama", *QUICK, "--out", out]
    status, _, stderr = run("inference", *options, stdin="first\n\nsecond\n")
    assert status == 0, stderr
    assert [row["prompt"] for row in rows_of(out)] == ["first", "second"]
    status, _, stderr = run("inference", *options, stdin="")  # an empty pipe, as schedulers give: the examples
    assert status == 0 and len(rows_of(out)) == 4
    status, _, stderr = run("inference", *options, "--prompts", "-", stdin="")
    assert status == 2 and "standard input" in stderr


def test_as_typed_a_pipe_is_read_and_a_silent_one_does_not_hang():
    options = ["--model_name", "tiny-llama", *QUICK]
    asked = typed("inference", *options, stdin=subprocess.PIPE)
    silent = typed("inference", *options, stdin=subprocess.PIPE)
    wrong = typed("dpo_inference", "--model_name", "models/nothing", stdin=subprocess.DEVNULL)
    try:
        stdout, stderr = asked.communicate("Wie süß ist Honig?\n".encode(), timeout=120)
        assert asked.returncode == 0 and stderr == b"" and "1. Wie süß ist Honig?" in stdout.decode()
        assert silent.wait(timeout=120) == 0  # its standard input was never closed: it answers the examples
        stdout, stderr = wrong.communicate(timeout=120)
        assert wrong.returncode == 2 and stdout == b""
        assert stderr.decode() == "error: models/nothing is not there. This makes it: python rlhf/dpo_train.py\n"
    finally:
        for process in (asked, silent, wrong):
            process.kill()
            process.wait()


def test_adapter_is_found_and_merging_changes_nothing(runs, tmp_path):
    texts = {}
    for name, options in {
        "base": ["--model_name", "tiny-llama"],
        "adapter": ["--model_name", runs / "dpo"],
        "merged": ["--model_name", runs / "dpo", "--merge", "true"],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        greedy = ["--temperature", 0, "--max_new_tokens", 24, "--precision", "fp32", "--prompt", "Hello", "--out", out]
        status, _, stderr = run("inference", *options, *greedy)
        assert status == 0, stderr
        texts[name] = rows_of(out)[0]["completion"]
    assert texts["adapter"] == texts["merged"] != texts["base"]


def test_chat_keeps_the_conversation_and_obeys_its_commands():
    lines = "hello\n/what\n\nagain\n/reset\nhello\n/quit\nnever read\n"
    options = ["--model_name", "tiny-llama", "--chat", "true", "--temperature", 0, *QUICK]
    status, stdout, stderr = run("inference", *options, stdin=lines)
    assert status == 0, stderr
    answers = [part.split("\n\nyou> ")[0] for part in stdout.split("model> ")[1:]]
    assert len(answers) == 3 and "(the commands are /reset and /quit)" in stdout and "bye" in stdout
    first, _, after_reset = (a.split("\n(")[0] for a in answers)
    assert first == after_reset  # greedy, the same prompt again
    # what ends by itself, and what does not fit: the tiny model has room for 512 bytes
    status, stdout, stderr = run("inference", *options, stdin=f"{'x' * 300}\n{'y' * 300}\n{'z' * 600}\n")
    assert status == 0, stderr
    assert "are forgotten" in stdout and "too long" in stdout and stdout.count("model> ") == 2 and "bye" in stdout


def test_stream_holds_back_what_is_not_a_whole_character():
    tokenizer = load_tokenizer("tiny-llama")
    text = "é 蜂 \U0001f41d!"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == text and stream.end() == ""
    assert pieces[:2] == ["", "é"] and not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(tokenizer)
    assert "".join(cut.add(token) for token in ids[:-2]) == "é 蜂 "  # two bytes of the bee are missing
    assert set(cut.end()) == {"\ufffd"}


def log_prob(model, prompt, completion):
    """Sum over the completion's tokens, from the logits of one unpadded row."""
    logits = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


@pytest.mark.parametrize("name, beta", [("dpo", 0.2), ("full", 0.5)])
def test_dpo_shows_beta_times_the_log_ratio(runs, tmp_path, name, beta):
    out = tmp_path / "out.jsonl"
    options = ["--model_name", runs / name, "--limit", 3, *QUICK, "--out", out]
    status, stdout, stderr = run("dpo_inference", *options)
    assert status == 0, stderr
    assert f"beta {beta}" in stdout and "tiny-llama" in stdout
    both = SideBySide(load_config(load_script("dpo_inference").Config, list(map(str, options))), made_by="")
    own, base_answers = both.answers()  # the same seed: the answers that the script has shown
    model, base = load_model(runs / name, device="cpu"), load_model("tiny-llama", device="cpu")
    for row, [a], [b] in zip(rows_of(out), own, base_answers):
        assert (row["completion"], row["base_completion"]) == (a.text, b.text)
        prompt = prompt_ids(both.tokenizer, row["prompt"])
        for ids, shown in ((a.ids, row["implicit_reward"]), (b.ids, row["base_implicit_reward"])):
            expected = beta * (log_prob(model, prompt, ids) - log_prob(base, prompt, ids))
            assert shown == pytest.approx(expected, abs=1e-4) and shown != 0


def test_ppo_shows_score_and_kl(runs, tmp_path):
    out = tmp_path / "ppo.jsonl"
    status, stdout, stderr = run("ppo_inference", "--model_name", runs / "ppo", "--limit", 2, *QUICK, "--out", out)
    assert status == 0, stderr
    assert "score" in stdout and "kl" in stdout and "gold" in stdout
    assert all(row["kl"] > 0 and row["score"] != row["base_score"] for row in rows_of(out))


JUDGES = """
def odd(prompts, completions, answer, **columns):
    return [len(c) + int(a) if len(c) % 2 else None for c, a in zip(completions, answer)]

def size(prompt, completion, answer):
    return len(completion) / 4 + int(answer)
"""


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """The options that name a file of questions in a working directory, which also has reward functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges.py").write_text(JUDGES)
    rows = [{"question": f"Say {i}.", "answer": str(i)} for i in range(4)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--prompts", "qa.jsonl", "--prompt_column", "question", *QUICK]


def score_of(text, answer):
    """The sum of both reward functions."""
    return len(text) / 4 + answer + (len(text) + answer if len(text) % 2 else 0)


def test_ppo_scores_by_reward_functions_or_by_those_of_the_run(runs, questions, tmp_path):
    functions = ["--reward", "judges:size,judges:odd"]
    status, stdout, stderr = run(
        "ppo_inference", "--model_name", runs / "ppo", *questions, *functions, "--out", tmp_path / "x.jsonl"
    )
    assert status == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"Say {i}." for i in range(4)]
    for i, row in enumerate(rows):
        assert row["score"] == pytest.approx(score_of(row["completion"], i))
        assert row["base_score"] == pytest.approx(score_of(row["base_completion"], i))
    own = tmp_path / "own"
    shutil.copytree(runs / "ppo", own)
    (own / "config.yaml").write_text("reward: judges:size,judges:odd\nreward_weights: 1,1\nreward_model: null\n")
    status, again, stderr = run("ppo_inference", "--model_name", own, *questions, "--out", tmp_path / "y.jsonl")
    assert status == 0, stderr
    assert (tmp_path / "y.jsonl").read_text() == (tmp_path / "x.jsonl").read_text()
    both = [*functions, "--reward_model", "models/x"]
    with pytest.raises(UserError, match="give one of them"):
        load_config(load_script("ppo_inference").Config, both)


def test_completions_to_which_no_function_applies_have_no_score(runs, questions, tmp_path):
    status, stdout, stderr = run("ppo_inference", "--model_name", runs / "ppo", *questions, "--reward", "judges:odd",
                                 "--seed", 1, "--out", tmp_path / "x.jsonl")  # fmt: skip
    assert status == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        text = row["completion"]
        assert row["score"] == (len(text) + i if len(text) % 2 else None)
    assert {row["score"] is None for row in rows} == {True, False}
    assert "score -" in stdout and "have no score" in stdout
    status, stdout, stderr = run("grpo_inference", "--model_name", runs / "grpo", *questions, "--reward", "judges:odd",
                                 "--samples_per_prompt", 4, "--out", tmp_path / "y.jsonl")  # fmt: skip
    assert status == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    kept = sum(len(row["rewards"]) for row in rows)
    assert 0 < kept < 16 and f"{16 - kept} completions (reward_none {16 - kept}) have no reward" in stdout
    for i, row in enumerate(rows):
        assert row["rewards"] == [len(text) + i for text in row["completions"]]
        assert all(len(text) % 2 for text in row["completions"])


def test_a_column_of_questions_is_asked(questions, tmp_path):
    status, _, stderr = run("inference", "--model_name", "tiny-llama", *questions, "--out", tmp_path / "x.jsonl")
    assert status == 0, stderr
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"Say {i}." for i in range(4)]


def test_grpo_shows_mean_and_best_of_a_group(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where reward functions are looked for first
    (tmp_path / "my_reward.py").write_text("def reward(prompt, completion):\n    return len(completion) / 10\n")
    out = tmp_path / "grpo.jsonl"
    options = ["--model_name", runs / "grpo", "--samples_per_prompt", 4, "--prompt", "Hi", *QUICK]
    status, stdout, stderr = run("grpo_inference", *options, "--reward", "my_reward:reward", "--out", out)
    assert status == 0, stderr
    [row] = rows_of(out)
    assert row["rewards"] == [len(text) / 10 for text in row["completions"]] and len(row["rewards"]) == 4
    assert f"mean@4 {sum(row['rewards']) / 4:.2f}, best@4 {max(row['rewards']):.2f}" in stdout
    assert f"mean@4 {sum(row['base_rewards']) / 4:.2f}, best@4 {max(row['base_rewards']):.2f}" in stdout


@pytest.mark.parametrize(
    "script, options, message",
    [
        ("dpo_inference", ["--model_name", "models/nothing"], "This makes it: python rlhf/dpo_train.py"),
        ("ppo_inference", ["--model_name", "models/nothing"], "This makes it: python rlhf/ppo_train.py"),
        ("grpo_inference", ["--model_name", "models/nothing"], "This makes it: python rlhf/grpo_train.py"),
        ("inference", ["--prompt", "a", "--chat", "true"], "exclude each other"),
        ("inference", ["--model_name", "tiny-llama", "--prompt", "a", "--merge", "true"], "holds no adapter"),
        ("inference", ["--prompts", "nothing.txt"], "no such file"),
        ("inference", ["--promt", "a"], "Did you mean 'prompt"),
        ("inference", ["--prompt", "a", "--out", "/nowhere/x.jsonl"], "out ="),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(script, options, message):
    status, _, stderr = run(script, *options)
    assert status == 2 and message in stderr and "Traceback" not in stderr


def test_ppo_names_the_command_for_a_missing_reward_model(runs):
    status, _, stderr = run("ppo_inference", "--model_name", runs / "ppo", "--reward_model", "models/nothing")
    assert status == 2 and "This makes it: python rlhf/train_reward_model.py" in stderr
