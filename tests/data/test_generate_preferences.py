import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from configs.config import ROOT, UserError, load_config
from data import generate_preferences, generate_preferences_multi, preferences, rewards
from data.checks import score
from data.generate_preferences import make_pairs
from data.generate_preferences_multi import order_group
from data.pairs import load_groups, load_pairs
from data.preferences import SamplingConfig, histogram, load_task, sample_and_score
from data.prompts import parse_prompts, read_prompts
from models.completions import Completion
from models.loader import load_model, load_tokenizer, weights_hash
from models.tokens import completion_text, prompt_ids
from rlhf.utils import completion_logprobs
from runtime.cli import cli

pytestmark = pytest.mark.slow
PAIRS = {"--chosen_ended": "false", "--pairs_per_prompt": 1, "--temperature": 1.0}  # for models that hardly end


def run(script, *options):
    """What the command would do, in this process: (exit status, stdout, stderr). One start of Python saved each."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    if script is generate_preferences:
        for key, value in PAIRS.items():
            options = options if key in options else (key, value, *options)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
                cli(script.main, script.Config)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(text, value, finish="stop"):
    return Completion(text, [1, 2], [-1.0, -1.0], finish, value)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A prompt file of checks that random bytes pass by chance: a digit somewhere, no letter e."""
    checks = [{"name": "number"}], [{"name": "no_letter", "letter": "e"}, {"name": "number"}]
    rows = [{"id": f"p{i}", "prompt": f"Say {i}.", "checks": checks[i % 2], "split": "train"} for i in range(12)]
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def tiny_options(prompts):
    options = "--model_name tiny-llama --precision fp32 --max_new_tokens 10 --samples_per_prompt 4 --limit 12"
    return [*options.split(), "--prompts", prompts]


@pytest.fixture(scope="module")
def made_pairs(tmp_path_factory, tiny_options):
    out = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    status, stdout, stderr = run(generate_preferences, *tiny_options, "--pairs_per_prompt", 1, "--out", out)
    assert status == 0, stderr
    return out, stdout


@pytest.fixture(scope="module")
def made_groups(tmp_path_factory, tiny_options):
    out = tmp_path_factory.mktemp("groups") / "groups.jsonl"
    status, stdout, stderr = run(generate_preferences_multi, *tiny_options, "--temperature", "0.7", "--out", out)
    assert status == 0, stderr
    return out, stdout


def test_best_is_paired_with_worst_and_ties_give_nothing():
    a, b, c, d = answer("a", 0.5), answer("b", 1.0), answer("c", 0.0), answer("d", 0.5)
    assert make_pairs([a, b, c, d]) == [(b, c)]
    assert make_pairs([a, b, c, d], 2) == [(b, c)]  # the second pair would be a against d, a tie
    assert make_pairs([answer("a", 1.0), answer("b", 1.0)]) == []


def test_among_equal_scores_the_completion_that_ended_goes_first():
    cut_good, good = answer("a", 1.0, "length"), answer("b", 1.0)
    cut_bad, bad = answer("c", 0.0, "length"), answer("d", 0.0)
    assert make_pairs([cut_good, good, cut_bad, bad], 2) == [(good, bad), (cut_good, cut_bad)]
    assert order_group([cut_bad, cut_good, bad, good]) == [good, cut_good, bad, cut_bad]


@pytest.mark.statement("chosen-ended")
def test_a_completion_that_was_cut_is_not_chosen_if_the_run_asks_for_that():
    cut_good, good, bad = answer("a", 1.0, "length"), answer("b", 0.5), answer("c", 0.0)
    assert make_pairs([cut_good, good, bad]) == [(cut_good, bad)]
    assert make_pairs([cut_good, good, bad], chosen_ended=True) == [(good, bad)]
    assert make_pairs([cut_good, bad], chosen_ended=True) == []
    cut_bad = answer("d", 0.0, "length")
    assert make_pairs([good, cut_bad, bad], chosen_ended=True) == [(good, cut_bad)]  # the first that was sampled
    assert make_pairs([good, cut_bad, bad]) == [(good, bad)]


def test_no_empty_completion_and_no_text_twice_in_the_pairs():
    a, again, empty, bad = answer("a", 1.0), answer("a", 1.0), answer("", 0.0), answer("z", 0.0)
    assert make_pairs([a, again, empty, bad], 2) == [(a, bad)]
    assert make_pairs([a, empty]) == []


def test_pairs_are_what_the_checks_say(made_pairs, prompts):
    out, stdout = made_pairs
    checks = {row["prompt"]: row["checks"] for row in json.loads(prompts.read_text())}
    rows = rows_of(out)
    for row in rows:
        [question], [chosen], [rejected] = row["prompt"], row["chosen"], row["rejected"]
        assert (question["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        assert row["chosen_score"] == score(chosen["content"], checks[question["content"]])
        assert row["rejected_score"] == score(rejected["content"], checks[question["content"]])
        assert row["chosen_score"] > row["rejected_score"]
        assert {row["chosen_finish_reason"], row["rejected_finish_reason"]} <= {"stop", "length"}
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows)
    assert f"{len(rows)} pairs of 12 prompts; dropped {12 - len(rows)}" in stdout
    manifest = json.loads(out.with_suffix(".manifest.json").read_text())
    assert manifest["rows"] == len(rows) and manifest["config"]["seed"] == 0
    assert manifest["summary"]["ties_dropped"] == 12 - len(rows)
    assert manifest["inputs"]["policy"] == weights_hash(load_model("tiny-llama", device="cpu"))
    assert [check["kind"] for check in manifest["admission"]] == ["decoding"]


def test_same_seed_same_file_other_seed_other_file(made_pairs, tiny_options, tmp_path):
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    assert run(generate_preferences, *tiny_options, "--sampling_batch_size", 8, "--out", same)[0] == 0
    assert run(generate_preferences, *tiny_options, "--seed", 1, "--out", other)[0] == 0
    assert same.read_text() == made_pairs[0].read_text()
    assert other.read_text() != same.read_text()


def test_second_run_stops_and_another_configuration_is_refused(made_pairs, tiny_options):
    out, _ = made_pairs
    before = out.read_bytes()
    status, stdout, _ = run(generate_preferences, *tiny_options, "--out", out)
    assert status == 0 and "is there already" in stdout
    status, _, stderr = run(generate_preferences, *tiny_options, "--seed", 3, "--out", out)
    assert status == 2 and "seed: 0 there, 3 now" in stderr and "--overwrite true" in stderr
    assert out.read_bytes() == before


def test_a_file_of_the_user_is_not_overwritten(tiny_options, tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text("mine\n")
    status, _, stderr = run(generate_preferences, *tiny_options, "--out", out)
    assert status == 2 and "mine.manifest.json" in stderr and out.read_text() == "mine\n"


def test_trl_and_the_loader_of_this_project_read_the_pairs(made_pairs, tmp_path):
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    out, _ = made_pairs
    tokenizer = load_tokenizer("tiny-llama")
    data = datasets.load_dataset("json", data_files=str(out), split="train", cache_dir=str(tmp_path))
    assert all(data_utils.is_conversational(row) for row in data)
    row = data_utils.maybe_apply_chat_template(data[0], tokenizer)
    assert row["prompt"].endswith("<|im_start|>assistant\n")
    assert row["chosen"].startswith(data[0]["chosen"][0]["content"]) and "<|im_end|>" in row["chosen"]
    pairs, counts, _ = load_pairs(out, tokenizer, max_length=512)
    assert len(pairs) == len(data) and counts == {"dropped": 0, "cut": 0, "equal": 0}


def test_groups_hold_what_was_sampled(made_groups):
    out, _ = made_groups
    tokenizer, model = load_tokenizer("tiny-llama"), load_model("tiny-llama", device="cpu")
    for row in rows_of(out):
        assert len(row["rejected"]) == 3 and len(row["scores"]) == 4
        assert row["scores"] == sorted(row["scores"], reverse=True) and row["scores"][0] > row["scores"][-1]
        texts = [row["chosen"][0]["content"], *(r[0]["content"] for r in row["rejected"])]
        assert texts == [completion_text(tokenizer, ids) for ids in row["completion_ids"]]
        for ids, finish in zip(row["completion_ids"], row["finish_reasons"]):
            assert (ids[-1] == tokenizer.eos_token_id) == (finish == "stop")
            assert finish == "stop" or len(ids) == 10
        assert row["temperature"] == 0.7 and row["policy"] == weights_hash(model)
    assert len(load_groups(out, tokenizer, max_length=512)[0]) == len(rows_of(out))


def test_stored_logprobs_are_those_of_the_tempered_policy(made_groups):
    tokenizer, model = load_tokenizer("tiny-llama"), load_model("tiny-llama", device="cpu")
    for row in rows_of(made_groups[0]):
        prompt = prompt_ids(tokenizer, row["prompt"])
        ids = row["completion_ids"]
        again = completion_logprobs(model, [prompt] * len(ids), ids, tokenizer.pad_token_id, temperature=0.7)
        for stored, recomputed in zip(row["logprobs"], again):
            torch.testing.assert_close(torch.tensor(stored), torch.tensor(recomputed), atol=1e-4, rtol=0)


def test_bf16_completions_come_from_the_model_that_a_trainer_loads_in_bf16(tiny_options, tmp_path, sampled_models):
    asked = sampled_models(preferences)
    argv = ["bf16" if x == "fp32" else str(x) for x in (*tiny_options, "--out", tmp_path / "pairs.jsonl")]
    config = load_config(generate_preferences.Config, argv)
    sample_and_score(config, load_task(config))
    theirs, (mine,) = load_model("tiny-llama", dtype=torch.bfloat16), asked
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), mine.parameters()))
    buffers = dict(theirs.named_buffers())
    assert buffers and all(torch.equal(buffers[name], b) for name, b in mine.named_buffers())


def test_a_heldout_prompt_is_refused_by_name(tiny_options, tmp_path):
    heldout = next(r for r in json.loads((ROOT / "data/prompts.json").read_text()) if r["split"] == "heldout")
    path = tmp_path / "leak.json"
    leak = {**heldout, "id": "mine", "split": "train", "prompt": "  " + heldout["prompt"].upper()}
    path.write_text(json.dumps([leak]))
    config = SamplingConfig(prompts=str(path))
    with pytest.raises(UserError, match=heldout["id"]):
        load_task(config)
    options = [path if option == tiny_options[-1] else option for option in tiny_options]
    options[options.index("--limit") + 1] = 1
    status, _, stderr = run(generate_preferences, *options, "--out", tmp_path / "x.jsonl")
    assert status == 2 and heldout["id"] in stderr and not list(tmp_path.glob("x*"))


def test_a_reward_function_scores_prompts_without_checks(tiny_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where reward functions are looked for first
    (tmp_path / "my_reward.py").write_text(
        "def length(prompt, completion):\n    return len(completion)\n"
        "def broken(prompt, completion):\n    raise KeyError('no such thing')\n"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Say one.\n\nSay two.\n")
    options = [*tiny_options[:-1], prompts]
    options[options.index("--limit") + 1] = 2
    out = tmp_path / "scored.jsonl"
    status, stdout, stderr = run(generate_preferences, *options, "--reward", "my_reward:length", "--out", out)
    assert status == 0, stderr
    for row in rows_of(out):
        assert row["chosen_score"] == len(row["chosen"][0]["content"]) > row["rejected_score"]
    assert "'longer wins'" in stdout and "pass each check" not in stdout
    broken = tmp_path / "broken.jsonl"
    # --judge is the older name of --reward
    status, _, stderr = run(generate_preferences, *options, "--judge", "my_reward:broken", "--out", broken)
    assert status == 2 and "raised KeyError" in stderr and not broken.exists()
    status, _, stderr = run(generate_preferences, *options, "--out", broken)
    assert status == 2 and "--reward" in stderr


JUDGES = """
calls = []

def even(prompts, completions, answer, **columns):
    calls.append(len(prompts))
    assert all(isinstance(ids, list) for ids in columns["completion_ids"]) and set(answer) <= {"4", "6"}
    return [None if len(c) % 2 else len(c) for c in completions]

async def breaks(prompt, completion):
    if "e" in completion:
        raise TimeoutError("no answer")
    return 1.0

def nobody(prompt, completion):
    return None
"""


@pytest.mark.parametrize("script", [generate_preferences, generate_preferences_multi])
def test_completions_without_a_score_are_left_out_and_counted(script, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "PAUSE", 0.0)
    monkeypatch.setattr(rewards, "AT_ONCE", 16)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judges.py").write_text(JUDGES)
    asked = [{"question": f"Say {i}.", "answer": "46"[i % 2]} for i in range(8)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    line = "--model_name tiny-llama --precision fp32 --max_new_tokens 10 --samples_per_prompt 6 --limit 8"
    options = [*line.split(), "--prompts", "qa.jsonl", "--prompt_column", "question", "--out", tmp_path / "made.jsonl"]
    both = ["--reward", "judges:even,judges:breaks", "--reward_weights", "1,-1"]
    status, stdout, stderr = run(script, *options, *both)
    assert status == 0, stderr
    summary = json.loads((tmp_path / "made.manifest.json").read_text())["summary"]
    kept, failed = summary["answers"], summary["reward_failed"]
    assert failed > 0 and summary["reward_none"] == 0 and kept + failed == 8 * 6
    assert f"left out, without a score: {failed} completions (reward_failed {failed})" in stdout
    assert "raised TimeoutError: no answer, twice" in stdout
    for row in rows_of(tmp_path / "made.jsonl"):
        answers = [row["chosen"], *(row["rejected"] if script is generate_preferences_multi else [row["rejected"]])]
        texts = [answer[0]["content"] for answer in answers]
        scores = row["scores"] if script is generate_preferences_multi else [row["chosen_score"], row["rejected_score"]]
        assert scores == [(0 if len(text) % 2 else len(text)) - 1.0 for text in texts]
        assert not any("e" in text for text in texts)
    nobody = [*options[:-1], tmp_path / "none.jsonl"]
    status, _, stderr = run(script, *nobody, "--reward", "judges:nobody")
    assert status == 2 and "and 48 completions (reward_none 48) have no score" in stderr


def test_histogram_counts_every_value():
    assert histogram([0.0, 0.0, 1.0]).splitlines()[0].split("|")[1].split() == ["#" * 40, "2"]
    counts = [int(line.split()[-1]) for line in histogram([x / 7 for x in range(100)]).splitlines()]
    assert len(counts) == 8 and sum(counts) == 100


def test_prompt_files_of_three_forms(tmp_path):
    assert parse_prompts(b"a\n\n b \n", "x") == [{"prompt": "a"}, {"prompt": "b"}]
    assert parse_prompts(b'{"prompt": "a", "tag": 1}\n', "x") == [{"prompt": "a", "tag": 1}]
    with pytest.raises(UserError, match="x line 2"):
        parse_prompts(b'{"prompt": "a"}\n{"promt": "b"}\n', "x")
    with pytest.raises(UserError, match="no prompt in it"):
        parse_prompts(b" \n", "x")
    assert len(read_prompts("data/prompts.json", "heldout", need_checks=True)) >= 100
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompts(tmp_path / "bad.txt")


def test_the_commands_as_typed(tmp_path):
    """Each script once in a process of its own; the smoke configurations give enough rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def typed(script, *options):
        command = [sys.executable, str(ROOT / "data" / script), *options]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    pairs, groups = str(tmp_path / "pairs.jsonl"), str(tmp_path / "groups.jsonl")
    done = typed("generate_preferences.py", "--config", "configs/smoke/preferences.yaml", "--out", pairs)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1] == f"next: python rlhf/train_reward_model.py --data {pairs}"
    assert len(rows_of(tmp_path / "pairs.jsonl")) >= 8
    done = typed("generate_preferences_multi.py", "--config", "configs/smoke/preferences_multi.yaml", "--out", groups)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(rows_of(tmp_path / "groups.jsonl")) >= 4


def test_configuration_errors():
    with pytest.raises(UserError, match="at least 2"):
        load_config(generate_preferences.Config, ["--samples_per_prompt", "1"])
    with pytest.raises(UserError, match="sampling_batch_size = 2: must be at least samples_per_prompt = 4"):
        SamplingConfig(sampling_batch_size=2, samples_per_prompt=4).check()
    with pytest.raises(UserError, match="unknown key 'batch_size' .*: it is now sampling_batch_size"):
        load_config(generate_preferences.Config, ["--batch_size", "8"])
    with pytest.raises(UserError, match=".jsonl"):
        SamplingConfig(out="data/pairs.json").check()
