"""The comparison on made-up measurements: the figures are there, the sentences follow the numbers both ways."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.config import ROOT, UserError
from report import compare
from report.compare import Config, equal_variety, find_runs, run_folder, seconds_before
from report.intervals import summarise
from report.methods import METHODS, method_of
from report.page import COLUMNS, NARROW, plain, sample_prompts, samples_text, table, targets_section, write_report
from report.sentences import (
    checks_sentence,
    cost_sentence,
    curves_sentence,
    fluency_sentence,
    gain,
    greedy_sentence,
    headline,
    kl_sentence,
    learned_sentence,
    listed,
    minutes_sentence,
    proxy_sentence,
    reward_sentence,
    sure,
)
from report.targets import missed_sentence, targets

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)
synthetic_rows = synthetic.synthetic_rows

NOTHING = dict.fromkeys(("sft", "dpo", "ppo", "grpo_offline", "grpo"), (0.15, 0.0, 4.0, 3.8))


def test_report_and_figures(tmp_path):
    path = write_report(Config(out=str(tmp_path)), synthetic_rows(), ["models/dpo learned from other data."])
    text = path.read_text()
    for name in ("scores", "curves", "checks"):
        figure = tmp_path / "figures" / f"{name}.png"
        assert f"(figures/{name}.png)" in text
        content = figure.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert 700 < width < 2000 and 300 < height < 1000
    for words in ("de-quantised from 4-bit", "models/dpo learned from other data.", "0123456789abcdef", "seed 0",
                  "## Targets",
                  "One training seed", "at most 0.64", "GRPO online has the highest gold score"):  # fmt: skip
        assert words in text, words


def test_a_report_on_reward_functions_and_prompts_without_checks(tmp_path):
    rows = synthetic_rows(best_of=None)
    for row in rows:
        for run in row.runs:
            run["identity"]["config"]["reward"] = "mine:right,mine:short"
            run["identity"]["hashes"]["reward"] = "abcdefabcdef"
            for kind in ("answers", "greedy"):
                run[kind] = [
                    answer | {"checks": [], "gold": None if i % 2 == 0 else answer["gold"] - 3.0}
                    for i, answer in enumerate(run[kind])
                ]
            run["unseen_types"] = []
            run["measured"] = row.measured = summarise(run["answers"], [], greedy=run["greedy"])
    text = write_report(Config(out=str(tmp_path), reward="mine:right,mine:short"), rows).read_text()
    assert "reward functions `mine:right,mine:short` (abcdefabcdef)" in text
    assert "Gold: reward by mine:right,mine:short" in text and "Each type of prompt" not in text
    assert (tmp_path / "figures" / "scores.png").is_file() and not (tmp_path / "figures" / "checks.png").exists()
    assert "| - |" in text  # the gold score of a sample without a reward
    assert "  -  " in samples_text(rows)
    assert "4 completions a prompt" not in text  # all completions count, not those with a reward


def test_every_row_of_the_table_has_every_column():
    lines = table(synthetic_rows())
    assert {len(line) for line in lines} == {len(COLUMNS)}
    assert [line[0] for line in lines[1:4]] == ["base", "SFT on chosen", "best of 4"]
    gain = COLUMNS.index("gain on base")
    assert lines[1][gain] == "" and "+-" in lines[2][gain]
    assert lines[3][COLUMNS.index("greedy")] == "-" and "+-" in lines[2][COLUMNS.index("greedy")]
    assert set(NARROW) < set(COLUMNS)


def test_variety_is_compared_over_as_many_completions():
    """Distinct-2 of more completions is lower: the base, of which twice as many were measured, would look poorer."""
    base, other = synthetic_rows()[:2]
    base.runs = [synthetic.measurement("base", 0.15, 0.0, 0.0, 3.8, samples=4)]
    base.measured = base.runs[0]["measured"]
    for row in (base, other):
        for i, answer in enumerate(row.answers()):
            answer["text"] = f"word{i % 4} word{i % 4 + 1}" if row is base else f"other{i % 2} other{i % 2 + 1}"
    equal_variety([base, other])
    pairs = 54 * 2  # one in each text
    assert base.measured["distinct_2"] == 2 / pairs  # of the first two completions; of all four: 4 / 216
    assert other.measured["distinct_2"] == 2 / pairs
    assert base.runs[0]["measured"]["distinct_2"] != base.measured["distinct_2"]  # the measurement stays


def test_headline_names_the_best_and_who_overlaps():
    text = headline(synthetic_rows())
    assert text.startswith("GRPO online has the highest gold score")
    assert "without overlap: DPO" in text or "GRPO online; overlapping" in text
    swapped = headline(synthetic_rows(dpo=(0.8, 1, 5, 3.8)))
    assert swapped.startswith("DPO has the highest")
    worse = headline(synthetic_rows(**dict.fromkeys(NOTHING, (0.0, 0, 4, 3.8)), best_of=None))
    assert worse.startswith("No method scores above the base")
    assert "below it, without overlap: SFT on chosen, DPO, PPO, GRPO offline and GRPO online" in worse
    assert "without overlap: none" in worse
    only = {key: None for key in synthetic.LEVELS if key != "base"}
    assert headline(synthetic_rows(**only)).startswith("Only the base was measured")


def test_proxy_sentence_tells_the_thing_from_the_proxy():
    levels = dict.fromkeys(("sft", "best_of", "grpo_offline"))
    text = proxy_sentence(synthetic_rows(**levels, dpo=(0.9, 3, 9, 3.8), ppo=(0.15, 3, 9, 3.8), grpo=(0.9, 0, 9, 3.8)))
    assert "gold and proxy both rose: DPO;" in text
    assert "only the proxy rose: PPO" in text
    assert "only the gold score rose: GRPO online" in text
    assert "neither rose: DPO" in proxy_sentence(synthetic_rows(**levels, ppo=None, grpo=None, dpo=(0.0, -2, 9, 3.8)))
    rows = synthetic_rows()
    rows[1].measured["proxy"] = None
    assert "not measured" in proxy_sentence(rows)


def test_reward_sentence_counts_the_bases_own_completions():
    rows = synthetic_rows()
    for answer in rows[0].answers():
        known = answer["checks"][0][0] not in synthetic.UNSEEN
        answer["proxy"] = answer["gold"] if known else -answer["gold"]
    text = reward_sentence(rows)
    assert "prefers the better in" in text and text.endswith("trained on, in 100% +- 0%.")
    assert "100% +- 0% (" not in text  # on all prompts it is not always right
    rows[0].runs[0]["unseen_types"] = []
    assert "trained on" not in reward_sentence(rows)
    for answer in rows[0].answers():
        answer["gold"] = 1.0
    assert reward_sentence(rows).startswith("No two completions of the base")
    rows[0].answers()[0]["proxy"] = None
    assert reward_sentence(rows) == ""


def test_kl_sentence():
    text = kl_sentence(synthetic_rows())
    assert text.startswith("GRPO online reaches") and "GRPO online went furthest" in text
    assert "best of 4 gains most a nat" in text
    text = kl_sentence(synthetic_rows(best_of=None, ppo=(0.3, 1, 40, 3.8)))
    assert "PPO went furthest" in text
    nobody = dict.fromkeys(NOTHING, (0.0, 0, 4, 3.8))
    assert kl_sentence(synthetic_rows(**nobody, best_of=None)).startswith("None of the methods")


def test_curves_sentence_says_rose_and_fell():
    rows = synthetic_rows()
    assert "GRPO online's gold score rose" in curves_sentence(rows)
    grpo = rows[-1]
    grpo.curves = [{"step": line["step"], "gold": 1 - line["gold"]} for line in grpo.curves]
    assert "GRPO online's gold score fell" in curves_sentence(rows)
    for row in rows:
        row.curves = []
    assert curves_sentence(rows) == "No run left a log of its scores."


def test_checks_and_cost_sentences_follow_the_numbers():
    rows = synthetic_rows()
    assert checks_sentence(rows).startswith("GRPO online gains most on")
    for row in (other := synthetic_rows()):
        row.runs[0]["unseen_types"] = list(row.measured["checks"])
    assert checks_sentence(other).startswith("No type of these prompts is in the training prompts.")
    assert "(includes, numbered)" in checks_sentence(rows)
    assert "GRPO online, the highest, 3.880 (+0.080; perplexity +8.3%)" in cost_sentence(rows)  # exp(0.08) = 1.0833
    assert "PPO, the highest, 3.900" in cost_sentence(synthetic_rows(ppo=(0.3, 1, 4, 3.9)))


def test_paired_gain_is_sharper_than_two_intervals():
    rows = synthetic_rows(**NOTHING)
    base, same = rows[0], rows[0]
    assert gain(same, base)["mean"] == 0 and sure(gain(same, base)) == 0
    found = gain(synthetic_rows()[-1], base)
    assert sure(found) == 1
    assert found["mean"] == pytest.approx(synthetic_rows()[-1].gold["mean"] - base.gold["mean"])


def test_the_same_prompts_are_shown_for_every_method_but_best_of_n():
    rows = synthetic_rows()
    for row in rows:
        row.runs[0]["greedy"] = [answer for answer in row.runs[0]["greedy"] if answer["id"] != "p3"]
    shown = sample_prompts(rows, 5)
    names = [answers[0][1]["checks"][0][0] for _, answers in shown]
    assert len(set(names)) == 5 and "question" not in names  # p3 is missing: `question` has fewer prompts than others
    for prompt, answers in shown:
        assert [row.key for row, _ in answers] == [row.key for row in rows if row.key != "best_of"]
        assert {answer["prompt"] for _, answer in answers} == {prompt}
    text = samples_text(rows)
    assert text.count("GRPO online") == 5 and "best of 4" not in text
    for _, answers in shown:
        for row, answer in answers:
            assert answer["text"] in text and row.greedy


def test_greedy_sentence_follows_the_numbers():
    rows = synthetic_rows()
    for row, mean in zip(rows, (0.2, 0.3, None, 0.5, 0.4, 0.1, 0.45)):
        row.measured["greedy"] = mean and {"mean": mean, "half": 0.01, "se": 0.005, "n": 54}
    text = greedy_sentence(rows)
    assert text.startswith("Greedy, DPO is the best: 0.500 +- 0.010, 2.5 times the base's 0.200 +- 0.010.")
    rows[0].measured["greedy"] = {"mean": 0.0, "half": 0.0, "se": 0.0, "n": 54}
    assert "DPO is the best: 0.500 +- 0.010, against the base's 0.000" in greedy_sentence(rows)
    rows[0].measured["greedy"] = {"mean": 0.6, "half": 0.0, "se": 0.0, "n": 54}
    assert greedy_sentence(rows) == "Greedy, no method scores above the base, 0.600 +- 0.000."
    rows[0].measured["greedy"] = None
    assert greedy_sentence(rows) == ""


def test_missing_runs_are_named_with_their_commands(tmp_path):
    config = Config(models=str(tmp_path), reward_model=str(tmp_path / "reward"), seeds="0,1")
    with pytest.raises(UserError) as error:
        find_runs(config)
    for words in (f"{tmp_path}/dpo: python rlhf/dpo_train.py\n", f"--seed 1 --out {tmp_path}/dpo-seed1",
                  f"{tmp_path}/reward: python rlhf/train_reward_model.py", "--allow_missing true"):  # fmt: skip
        assert words in str(error.value)
    config.allow_missing = True
    (tmp_path / "dpo").mkdir()
    (tmp_path / "dpo" / "manifest.json").write_text("{}")
    config.seeds = None
    assert [method.key for method in find_runs(config)] == ["base", "dpo"]


def test_seeds_are_checked_and_name_their_folders():
    assert Config(seeds="0, 2").seed_list() == [0, 2]
    assert run_folder(Config(), method_of("dpo"), 0) == "models/dpo"
    assert run_folder(Config(), method_of("dpo"), 2) == "models/dpo-seed2"
    for bad in ("0,0", "a", "1,,2"):
        with pytest.raises(UserError, match="seeds"):
            Config(seeds=bad).seed_list()


def test_several_seeds_are_pooled_and_their_spread_is_shown(tmp_path):
    config = Config(seeds="0,1", models=str(tmp_path), out=str(tmp_path / "out"))
    methods = [method for method in METHODS if method.key in ("base", "grpo")]
    results = {m.key: [synthetic.measurement(m.key, *synthetic.LEVELS[m.key], seed=s) for s in (0, 1)] for m in methods}
    for suffix, seconds in (("", 100), ("-seed1", 200)):
        folder = tmp_path / f"grpo{suffix}"
        folder.mkdir()
        manifest = {"seconds": seconds, "peak_memory_gb": 2.0, "inputs": {}, "script": "grpo_train.py"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "config.yaml").write_text("model_name: smollm2-135m\nprompts_per_step: 8\nsamples_per_prompt: 8\n")
    rows = compare.make_rows(config, methods, results)
    one, two = (run["measured"]["gold"]["mean"] for run in results["grpo"])
    assert rows[1].gold["mean"] == pytest.approx((one + two) / 2)
    assert rows[1].gold["n"] == 54 and rows[1].seconds == 150  # prompts, not prompts times seeds
    text = write_report(config, rows).read_text()
    assert f"| GRPO online | {one:.3f} | {two:.3f} |" in text
    (tmp_path / "grpo" / "config.yaml").write_text("model_name: gpt2\n")
    with pytest.raises(UserError, match="gpt2"):
        compare.make_rows(config, methods, results)


RIGHT = {"result": {"heldout_accuracy": 0.9, "heldout_pairs": 120}}


def reaching():
    """Rows that reach every target."""
    levels = dict.fromkeys(("sft", "best_of", "grpo_offline"))
    rows = synthetic_rows(
        **levels, base=(0.05, 0, 0, 3.8), dpo=(0.5, 2, 5, 3.8), ppo=(0.5, 2, 5, 3.8), grpo=(0.6, 2, 5, 3.8)
    )
    for row in rows:
        row.measured = row.measured | {"answers": 300, "finish_stop": 0.95}
    return rows


@pytest.mark.statement("targets")
def test_each_target_is_missed_alone_and_named_with_its_figure():
    rows = reaching()
    assert missed_sentence(targets(rows, RIGHT)) == "7 of 7 targets were reached."
    by_key = {row.key: row for row in rows}
    grpo, base = by_key["grpo"].measured, by_key["base"].measured
    for key, name, value, words in (
        ("grpo", "finish_stop", 0.949, "94.9%"),
        ("dpo", "answers", 299, "299 completions"),
        ("ppo", "gold", base["gold"], "PPO above the base"),
        ("grpo", "gold", grpo["gold"] | {"mean": base["gold"]["mean"] * 4.9}, "4.90 times"),
        ("grpo", "greedy", base["greedy"] | {"mean": base["greedy"]["mean"] * 1.96}, "1.96 times"),
    ):
        rows = reaching()
        row = next(row for row in rows if row.key == key)
        row.measured = row.measured | {name: value}
        missed = [target for target in targets(rows, RIGHT) if not target.reached]
        assert len(missed) == 1 and words in missed_sentence(missed), (name, missed)
    for right, pairs, words in ((0.79, 120, "79.0% of 120"), (0.9, 99, "90.0% of 99"), (None, None, "not measured")):
        result = {"heldout_accuracy": right, "heldout_pairs": pairs} if right else {}
        [missed] = [target for target in targets(reaching(), {"result": result}) if not target.reached]
        assert words in missed.found
    few = [row for row in reaching() if row.key != "grpo"]
    assert sum(target.found == "not measured" for target in targets(few, None)) == 5  # four of GRPO, the reward model


@pytest.mark.statement("targets")
def test_targets_are_those_of_the_shipped_tasks_alone():
    assert "## Targets" in targets_section(Config(), reaching())
    assert targets_section(Config(prompts="my.json"), reaching()) == ""


def test_fluency_types_and_minutes_follow_the_numbers():
    rows = synthetic_rows()
    rows[1].measured = rows[1].measured | {"fluency": 9.0}
    rows[2].measured = rows[2].measured | {"fluency": 0.5}
    text = fluency_sentence(rows)
    assert f"the least natural are {rows[1].label}'s (9.00), the most natural {rows[2].label}'s (0.50)" in text
    for answer in rows[-1].answers():  # GRPO always passes one seen and one unseen type, and never a third
        name, good = answer["checks"][0]
        passes = {"lowercase": True, "numbered": True, "starts_with": False}
        answer["checks"] = [[name, passes.get(name, good)]]
    said = learned_sentence(rows).split("GRPO online: ")[1]
    assert "numbered*" in said and "lowercase" in said.split("(fell")[0]
    for row in rows:
        row.seconds = {"dpo": 60.0, "ppo": 600.0}.get(row.key, row.seconds and 300.0)
        row.seconds_before, row.memory = (0.0 if row.seconds else None), (row.key == "ppo" and 3.5) or 2.0
    text = minutes_sentence(rows)
    assert "DPO took least, 1.0 minutes, and PPO most, 10.0" in text and "PPO took the most memory: 3.50 GB" in text


def test_time_of_what_a_run_needs_is_counted_once(tmp_path):
    pairs, reward = tmp_path / "pairs.jsonl", tmp_path / "reward"
    pairs.write_text("{}\n")
    pairs.with_suffix(".manifest.json").write_text(json.dumps({"seconds": 60, "inputs": {"prompts": "x"}}))
    reward.mkdir()
    (reward / "manifest.json").write_text(json.dumps({"seconds": 100, "inputs": {str(pairs): "x"}}))
    assert seconds_before({str(pairs): ""}) == 60
    assert seconds_before({str(pairs): "", str(reward): ""}) == 160
    assert seconds_before({"data/nothing-of-that-name.json": ""}) == 0


def test_completions_cannot_break_the_tables():
    assert plain("a | b\n\n- c*d*") == r"a \| b / - c\*d\*"
    assert plain("") == "(nothing)"
    assert listed(["a", "b", "c"]) == "a, b and c" and listed([]) == "none"


def made_up_run(folder, start):
    folder.mkdir()
    (folder / "manifest.json").write_text('{"seconds": 3.0, "inputs": {}}')
    (folder / "config.yaml").write_text(f"model_name: {start}\n")
    return str(folder)


@pytest.mark.statement("starts")
def test_the_way_of_a_run_to_the_base_is_followed(tmp_path):
    sft = made_up_run(tmp_path / "sft", "tiny-llama")
    dpo = made_up_run(tmp_path / "dpo", sft)
    grpo = made_up_run(tmp_path / "grpo", tmp_path / "." / "dpo")
    assert compare.way_to_base(sft, "tiny-llama") == () == compare.way_to_base(sft, sft)
    assert compare.way_to_base(dpo, "tiny-llama") == (sft,) and compare.way_to_base(dpo, f"{sft}/") == ()
    assert compare.way_to_base(grpo, "tiny-llama") == (dpo, sft)
    with pytest.raises(UserError, match="dpo started from '.*sft', and that from 'tiny-llama', not from base = 'gpt2'"):
        compare.way_to_base(dpo, "gpt2")
    circle = made_up_run(tmp_path / "circle", tmp_path / "circle")
    with pytest.raises(UserError, match="not from base"):
        compare.way_to_base(circle, "tiny-llama")


@pytest.mark.statement("starts")
def test_a_run_from_another_start_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    made_up_run(tmp_path / "sft", "another-model")
    monkeypatch.setattr(compare, "evaluate", lambda job: pytest.fail("measured"))
    with pytest.raises(UserError, match="sft started from 'another-model', not from base"):
        compare.main(Config(models=str(tmp_path), allow_missing=True, out=str(tmp_path / "report")))


@pytest.mark.statement("starts")
def test_sft_then_dpo_then_the_comparison(tmp_path):
    """The usual pipeline, by its own commands: the KL of both is to the base, and the report says the way."""
    rows = [
        {"prompt": f"letter {i}", "chosen": "a" * (1 + i % 3), "rejected": "b" * (1 + i % 4), "chosen_score": 1.0,
         "rejected_score": 0.0}
        for i in range(24)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, sft, dpo = f"--data {tmp_path}/pairs.jsonl", f"{tmp_path}/sft", f"{tmp_path}/dpo"
    for script, config, words in (
        ("train/train_lm_lora.py", "sft", f"{data} --out {sft} --sample_prompt="),
        ("rlhf/dpo_train.py", "dpo", f"{data} --out {dpo} --model_name {sft}"),
        ("report/compare.py", "compare", f"--models {tmp_path} --allow_missing true --limit 4 --reward_model none "
         f"--out {tmp_path}/report --runs {tmp_path}/measured"),
    ):  # fmt: skip
        command = [sys.executable, ROOT / script, "--config", ROOT / f"configs/smoke/{config}.yaml", *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report" / "REPORT.md").read_text()
    assert f"Not at once: DPO by way of `{sft}`." in text
    first, second = (json.loads((tmp_path / "measured" / f"{name}.json").read_text()) for name in ("sft", "dpo"))
    assert first["measured"]["kl"]["mean"] != 0 != second["measured"]["kl"]["mean"]
    hashes = second["identity"]["hashes"]
    assert first["identity"]["hashes"]["base"] == hashes["base"] != hashes["model"]
