"""The reward of GSM8K on rows as the data set has them, and the runs of configs/gpu on stand-ins of model and data."""

import importlib
import json

import pytest
import yaml

from configs.config import ROOT, load_config
from data.gsm8k import reward
from data.pairs import load_pairs
from data.rewards import RewardFunctions
from models.loader import load_tokenizer

CLIPS = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)


def answer(final):
    return f"He pays 3*2=<<3*2=6>>6 dollars, then 10 more.\n#### {final}"


@pytest.mark.statement("last-number")
@pytest.mark.parametrize(
    "final, completion, right",
    [
        ("72", "She sold 24 in May, so 48 + 24 = 72.\n#### 72", True),
        ("72", "The answer is \\boxed{72}.", True),
        ("72", "72 clips altogether, not 71.", False),
        ("72", "#### 720", False),
        ("72", "", False),
        ("1,250", "That makes **$1250** in all.", True),
        ("1250", "He earns $1,250.00 a month.", True),
        ("70,000", "The profit is 195,000 - 125,000 = $70,000.", True),
        ("-3", "The temperature is -3 degrees.", True),
        ("-3", "The temperature is 3 degrees.", False),
        ("3", "It fell to -3.", False),
        ("5.5", "Each gets 5.50 dollars", True),
        ("0.5", "It is 1/2.", True),
        ("26", "It takes her 26 minutes.", True),
        ("20%", "It grew by 20%.", True),
        ("$18", "She makes $18 every day.", True),
    ],
)
def test_the_last_number_decides(final, completion, right):
    assert reward("How many?", completion, answer(final)) == float(right)


def test_a_row_of_the_data_set_through_the_reward_functions():
    functions = RewardFunctions("data.gsm8k:reward")
    columns = [{"answer": CLIPS}] * 2
    assert functions(["How many clips?"] * 2, ["72 clips", "24 clips"], columns).values == [1.0, 0.0]


@pytest.mark.parametrize("bad", ["72", "#### ", "#### many"])
def test_an_answer_that_is_not_that_of_gsm8k_is_said(bad):
    with pytest.raises(ValueError, match="GSM8K ends it with #### and a number"):
        reward("How many?", "72", bad)


RUNS = sorted((ROOT / "configs/gpu").glob("gsm8k_*.yaml"))


@pytest.fixture
def gsm8k(tmp_path):
    """A file with the columns of the data set."""
    rows = [{"question": f"Tom has {i} clips and buys {i}. How many has he?", "answer": f"{i}+{i}\n#### {2 * i}"}
            for i in range(40)]  # fmt: skip
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "gsm8k.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_grpo_on_gsm8k_by_each_yaml_with_another_model_and_file(path, gsm8k, tmp_path):
    from rlhf import grpo_train

    asked = yaml.safe_load(path.read_text())
    small = {"model_name": "tiny-llama", "prompts": gsm8k, "steps": 1, "max_new_tokens": 4, "prompts_per_step": 2,
             "samples_per_prompt": 2, "warmup_steps": 0, "precision": "fp32", "out": tmp_path / "out"}  # fmt: skip
    words = [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    config = load_config(grpo_train.Config, ["--config", str(path), *words])
    grpo_train.main(config)
    [line] = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert line["reward"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert {"prompts", "reward"} <= json.loads((tmp_path / "out/manifest.json").read_text())["files"].keys()
    assert (tmp_path / "out/adapter_config.json").is_file() == (asked["lora_r"] > 0)


def test_the_runs_say_that_they_were_not_measured_and_how_to_start():
    assert len(RUNS) == 4
    for path in [*RUNS, ROOT / "configs/gpu/ultrafeedback_dpo.yaml"]:
        head = path.read_text().split("\nmodel_name")[0]
        assert (
            "was NOT measured here" in head and "Needs the hub" in head and f"--config configs/gpu/{path.name}" in head
        )
        config = yaml.safe_load(path.read_text())
        assert config["precision"] == ("fp16" if path.stem.endswith("t4") else "bf16")
        assert config["lora_r"] == (16 if path.stem.endswith("t4") else 0)


def turns(question, said):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


@pytest.fixture
def ultrafeedback(tmp_path):
    """A file with all columns of the data set: the pairs are whole conversations, beside `prompt` and `messages`."""
    rows = []
    for i in range(30):
        question, good, bad = f"Name {i} fruits.", "A plum and a pear.", "I will not." + " No." * (i % 3)
        rows.append({"prompt": question, "prompt_id": f"{i:064x}", "chosen": turns(question, good),
                     "rejected": turns(question, bad), "messages": turns(question, good), "score_chosen": 8.5,
                     "score_rejected": 3.0})  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pairs.jsonl"


def test_the_prompt_is_taken_off_the_conversations_of_ultrafeedback(ultrafeedback):
    pairs, counts, _ = load_pairs(str(ultrafeedback), load_tokenizer("tiny-llama"), 512)
    assert len(pairs) == 30 and not any(counts.values())
    tokenizer = load_tokenizer("tiny-llama")
    assert "A plum and a pear." in tokenizer.decode(pairs[0]["chosen"])
    assert "Name" not in tokenizer.decode(pairs[0]["chosen"]) and "Name" in tokenizer.decode(pairs[0]["prompt"])


@pytest.mark.slow
def test_dpo_on_ultrafeedback_by_its_yaml_with_another_model_and_file(ultrafeedback, tmp_path):
    dpo_train = importlib.import_module("rlhf.dpo_train")
    small = {"model_name": "tiny-llama", "data": ultrafeedback, "precision": "fp32", "warmup_steps": 0, "batch_size": 8,
             "max_length": 512, "heldout_fraction": 0.2, "out": tmp_path / "out"}  # fmt: skip
    words = ["--config", str(ROOT / "configs/gpu/ultrafeedback_dpo.yaml")]
    words += [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    dpo_train.main(load_config(dpo_train.Config, words))
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_hub_dataset_is_named_with_configuration_and_split(monkeypatch):
    import datasets

    from data.prompts import prompts_and_hash
    from data.rows import read_rows

    asked = []

    def load_dataset(*place, split):
        asked.append((*place, split))
        return datasets.Dataset.from_list([{"question": "2 + 2?", "answer": "#### 4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("a/b", "a/b:c", "a/b@test", "a/b:c@test"):
        rows, _ = read_rows(name)
        assert rows[0]["where"] == f"{name} row 1"
        assert prompts_and_hash(name, column="question")[0][0]["prompt"] == "2 + 2?"
    expected = [("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", None, "test"), ("a/b", "c", "test")]
    assert asked == [each for each in expected for _ in range(2)]
