"""One checkpoint measured as a command: on random weights, in seconds."""

import json
import math
import subprocess
import sys

import pytest
import torch

from configs.config import ROOT, UserError
from models.loader import load_model, load_tokenizer
from report.evaluate import (
    Config,
    completion_kls,
    evaluate,
    logprobs_of,
    measured_prompts,
    measurement_path,
    types_of,
)
from report.intervals import best_of_measured, pair_accuracy
from rlhf.utils import completion_logprobs

pytestmark = pytest.mark.slow

QUICK = {"base": "tiny-llama", "reward_model": None, "limit": 6, "max_new_tokens": 6, "text": "tests/train/text.jsonl",
         "text_tokens": 128, "text_length": 32, "precision": "fp32"}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter on tiny-llama that says something else than its base."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model("tiny-llama"), settings)
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    model.save_pretrained(folder, save_embedding_layers=False)
    load_tokenizer("tiny-llama").save_pretrained(folder)
    return folder


def run(*edits):
    return subprocess.run(
        [sys.executable, "report/evaluate.py", "--config", "configs/smoke/evaluate.yaml", *edits],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_as_a_command_twice(adapter, tmp_path):
    out = tmp_path / "adapter.json"
    edits = ("--model_name", str(adapter), "--reward_model", "none", "--out", str(out))
    first = run(*edits)
    assert first.returncode == 0, first.stderr
    assert "KL to the base" in first.stdout and "its score is left out" in first.stdout
    before = out.stat().st_mtime_ns
    second = run(*edits)
    assert second.returncode == 0 and "this very measurement" in second.stdout
    assert out.stat().st_mtime_ns == before


def test_measures_again_what_changed(adapter, tmp_path):
    path = str(tmp_path / "out.json")
    config = Config(**QUICK, model_name=str(adapter), out=path)
    first = evaluate(config)
    checks = {(check["model"], check["kind"].split()[0]) for check in first["admission"]}
    assert checks == {("model", "decoding"), ("model", "samples"), ("reference", "completions")}
    assert first["measured"]["kl"]["mean"] != 0 and len(first["answers"]) == 12
    assert evaluate(Config(**QUICK, model_name=str(adapter), out=path)) == json.loads(json.dumps(first))
    assert evaluate(Config(**QUICK, model_name=str(adapter), out=path, seed=1))["answers"] != first["answers"]
    base = evaluate(Config(**QUICK, model_name="tiny-llama", out=path))
    assert base["measured"]["kl"]["mean"] == 0.0
    assert base["identity"]["hashes"]["model"] == base["identity"]["hashes"]["base"]
    assert base["identity"]["hashes"]["model"] != first["identity"]["hashes"]["model"]


def test_reward_functions_give_the_gold_score_of_prompts_without_checks(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Say {i}.", "answer": str(i)} for i in range(5)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        "def size(prompt, completion, answer):\n    return None if answer == '3' else len(completion) + int(answer)\n"
    )
    (tmp_path / "own.py").write_text(source)
    options = QUICK | {"text": str(ROOT / "tests/train/text.jsonl"), "limit": None, "prompts": "qa.jsonl"}
    options |= {"prompt_column": "question", "reward": "own:size", "model_name": str(adapter), "out": "out.json"}
    options |= {"out": str(tmp_path / "out.json")}
    found = evaluate(Config(**options))
    assert len(found["answers"]) == 10 and found["left_out"] == {"reward_failed": 0, "reward_none": 2}
    golds = [None if i // 2 == 3 else len(a["text"]) + i // 2 for i, a in enumerate(found["answers"])]
    assert [a["gold"] for a in found["answers"]] == golds
    assert found["measured"]["gold"]["n"] == 4 and found["measured"]["checks"] == {}
    means = [(golds[2 * i] + golds[2 * i + 1]) / 2 for i in (0, 1, 2, 4)]
    assert found["measured"]["gold"]["mean"] == pytest.approx(sum(means) / 4)
    (tmp_path / "own.py").write_text(source.replace("len(completion)", "2 * len(completion)"))  # noticed
    assert evaluate(Config(**options))["measured"]["gold"]["mean"] > found["measured"]["gold"]["mean"]


def test_in_bf16_the_positions_of_the_measured_model_are_not_rounded(adapter, tmp_path, sampled_models):
    asked = sampled_models(sys.modules["report.evaluate"])
    evaluate(Config(**QUICK | {"precision": "bf16"}, model_name=str(adapter), out=str(tmp_path / "out.json")))
    (model,) = asked
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    frequencies = load_model("tiny-llama").model.rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(frequencies.bfloat16().float(), frequencies)  # rounding would be seen


def test_kl_of_completions_against_a_sum_in_float64(adapter):
    questions, completions = [[5, 6, 7], [8, 9]], [[10, 11, 12, 13], [14, 2]]
    model = load_model(str(adapter), merge_adapter=True)
    sampled = completion_logprobs(model, questions, completions, 2, temperature=0.7)
    base_logprobs = logprobs_of("tiny-llama", torch.float32, questions, completions, 2, temperature=0.7)
    found = completion_kls(sampled, base_logprobs)
    exact = [load_model(name, dtype=torch.float64, merge_adapter=True) for name in (str(adapter), "tiny-llama")]
    for question, completion, kl in zip(questions, completions, found):
        ids = torch.tensor([question + completion])
        sums = []
        for m in exact:
            logprobs = (m(ids).logits[0, :-1] / 0.7).log_softmax(-1)
            sums.append(logprobs.gather(-1, ids[0, 1:, None])[-len(completion) :].sum().item())
        assert kl == pytest.approx(sums[0] - sums[1], abs=1e-4)
        assert abs(kl) > 1e-3
        assert math.fsum(base_logprobs[completions.index(completion)]) == pytest.approx(sums[1], abs=1e-4)


def test_best_of_keeps_of_each_group_the_completion_with_the_highest_score():
    def answer(prompt, gold, proxy):
        words = f"answer {gold} {proxy}"
        same = {
            "text": words,
            "kl": 0.0,
            "base_nats": 6.0,
            "tokens": 3,
            "finish_reason": "stop",
            "checks": [["lowercase", gold == 1.0]],
        }
        return {"id": prompt, "gold": gold, "proxy": proxy, **same}

    of_a = [answer("a", gold, proxy) for gold, proxy in ((0.0, 0.1), (1.0, 0.3), (1.0, -1.0), (0.0, 2.0))]
    of_b = [answer("b", gold, proxy) for gold, proxy in ((0.0, -3.0), (1.0, -2.0), (0.0, 0.0), (1.0, 0.5))]
    answers = of_a + of_b
    result = {"answers": answers, "unseen_types": [], "measured": {}, "model_name": "x"}
    found = best_of_measured(result, 2)
    assert [(a["id"], a["proxy"]) for a in found["answers"]] == [("a", 0.3), ("a", 2.0), ("b", -2.0), ("b", 0.5)]
    assert found["measured"]["gold"]["mean"] == 0.75  # (1 + 0 + 1 + 1) / 4
    assert found["measured"]["kl"]["mean"] == pytest.approx(0.193147)  # log 2 - 1/2
    assert result["answers"] is answers and found["model_name"] == "x"


def test_pair_accuracy_counts_pairs_of_one_prompt_that_differ_in_gold():
    """By hand: of a's six pairs four differ and two are right; b's one pair is a tie of the proxies; c's is none."""

    def answers(prompt, *golds_and_proxies):
        return [{"id": prompt, "gold": gold, "proxy": proxy} for gold, proxy in golds_and_proxies]

    of_a = answers("a", (0.0, 0.1), (1.0, 0.3), (1.0, -1.0), (0.0, 0.2))
    of_b, of_c = answers("b", (0.5, 2.0), (0.0, 2.0)), answers("c", (1.0, 0.0), (1.0, 5.0))
    found = pair_accuracy([*of_b, *of_a[::-1], *of_c])
    assert (found["mean"], found["n"], found["pairs"]) == (0.5, 2, 5)
    of_a[1]["proxy"] = of_a[2]["proxy"] = 9.0  # every choice on a is right now
    assert pair_accuracy([*of_a, *of_b])["mean"] == 0.75  # (1 + 1/2) / 2: a prompt counts once, however many its pairs
    assert pair_accuracy(of_c) is None and pair_accuracy([]) is None


def test_best_of_needs_a_reward_model():
    with pytest.raises(UserError, match="train_reward_model"):
        evaluate(Config(**(QUICK | {"reward_model": "models/none"}), model_name="tiny-llama", best_of=2))


def test_unseen_types_are_those_that_no_training_prompt_has():
    prompts, unseen = measured_prompts(Config(limit=7, prompts="data/prompts.json"))
    assert len(prompts) == 7 and all(row["split"] == "heldout" for row in prompts)
    assert unseen == ["numbered", "repeats", "sentences"]
    prompts, unseen = measured_prompts(Config())
    assert unseen == ["larger sums", "smallest of four"] and types_of(prompts[0]) == [prompts[0]["family"]]
    prompts, unseen = measured_prompts(Config(split="validation"))
    assert {row["split"] for row in prompts} == {"validation"} and unseen == []


def test_where_a_measurement_goes():
    assert measurement_path(Config(model_name="smollm2-135m")) == ROOT / "report/runs/smollm2-135m.json"
    assert measurement_path(Config(model_name="models/x/dpo")) == ROOT / "report/runs/x-dpo.json"
    assert measurement_path(Config(model_name="gpt2", best_of=4)).name == "gpt2-best4.json"


def test_a_prompt_without_an_id_is_named_by_its_place(tmp_path):
    (tmp_path / "one.txt").write_text("Say something.\n")
    config = Config(prompts=str(tmp_path / "one.txt"), reward="my:own")
    assert [row["id"] for row in measured_prompts(config)[0]] == ["row 1"]
