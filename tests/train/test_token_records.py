"""Token records of language-model training, beside transformers on each sample alone."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.config import ROOT, load_config
from train import token_records, train_lm, train_lm_amp_ckpt
from train.token_records import STEPS, TokenRecords, kept_steps

CONFIG = ["--config", str(ROOT / "configs/smoke/train_base.yaml"), "--min_lr_ratio", "1", "--warmup_steps", "0"]
CONFIG += ["--sample_prompt", "", "--eval_blocks", "1"]


def records(folder):
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]


def train(out, *words, script=train_lm):
    with contextlib.redirect_stdout(io.StringIO()):
        script.train(load_config(script.Config, [*CONFIG, "--out", str(out), *map(str, words)]))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if key not in ("seconds", "tok/s")} for line in lines]


@pytest.mark.parametrize("total, expected", [(1, {1}), (3, {1, 2, 3}), (7, {1, 3, 4, 5, 7}), (9, {1, 3, 5, 7, 9})])
def test_kept_steps_are_the_first_the_last_and_some_between(total, expected):
    assert kept_steps(total) == expected


def test_a_step_that_comes_again_is_kept_once():
    run = SimpleNamespace(config=SimpleNamespace(keep_tokens=1), is_main=True, total_steps=2, kept_step=0)
    found = TokenRecords(run, None)
    assert found.due(1) and found.due(2) and not found.due(3)
    run.kept_step = 1
    assert not found.due(1) and found.due(2)
    assert not TokenRecords(SimpleNamespace(config=SimpleNamespace(keep_tokens=0), is_main=True), None).due(1)
    assert not TokenRecords(SimpleNamespace(config=SimpleNamespace(keep_tokens=1), is_main=False), None).due(1)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_lm, train_lm_amp_ckpt])
@pytest.mark.statement("token-records")
def test_rows_have_what_transformers_says_of_each_sample_alone(script, tmp_path):
    more = ["--precision", "fp32", "--measure_steps", 0] if script is train_lm_amp_ckpt else []
    train(tmp_path / "one", "--max_steps", 1, *more, script=script)
    lines = train(tmp_path / "two", "--max_steps", 2, "--keep_tokens", 3, *more, script=script)
    assert lines == train(tmp_path / "without", "--max_steps", 2, *more, script=script)
    assert not (tmp_path / "without/tokens.jsonl").exists()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("two", "without")]
    assert weights[0] == weights[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    found = [group["sequences"] for group in records(tmp_path / "two") if group["step"] == 2]
    assert len(found) == 3 and any(len(sequence["first"]) > 1 for [sequence] in found)
    for [sequence] in found:
        ids, x, starts = sequence["ids"], sequence["numbers"], sequence["first"]
        assert starts[0] == 0 and len(ids) == sequence["length"] == len(x["mask"])
        total = []
        for start, end in zip(starts, [*starts[1:], len(ids)]):
            assert x["logprob"][start] is None and x["rank"][start] is None and x["mask"][start] == 0
            with torch.no_grad():
                log_p = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
            for place in range(start + 1, end):
                row = log_p[place - start - 1]
                assert x["logprob"][place] == pytest.approx(row[ids[place]].item(), abs=2e-4)
                assert x["rank"][place] == (row > row[ids[place]]).sum().item() + 1 and x["mask"][place] == 1
                assert x["entropy"][place] == pytest.approx(-(row.exp() * row).sum().item(), abs=2e-4)
                total.append(-row[ids[place]].item())
        assert sequence["scores"]["loss"] == pytest.approx(sum(total) / len(total), abs=2e-4)


@pytest.mark.slow
def test_the_mask_says_what_is_trained(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Say {i}.", "completion": f"well {i}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tmp_path / "sft", "--data", data, "--max_steps", 1, "--keep_tokens", 1)
    [group] = records(tmp_path / "sft")
    [sequence] = group["sequences"]
    texts, mask = sequence["texts"], sequence["numbers"]["mask"]
    counted = "".join(text for text, counts in zip(texts, mask) if counts)
    assert re.fullmatch(r"(well \d+<\|im_end\|>)+", counted) and counted.count("well") == len(sequence["first"])
    assert "Say" in "".join(texts)
    unknown = [place for place, x in enumerate(sequence["numbers"]["logprob"]) if x is None]
    assert unknown == sequence["first"]


@pytest.mark.slow
def test_long_blocks_and_runs_keep_a_bounded_part(tmp_path, monkeypatch):
    monkeypatch.setattr(token_records, "LONGEST", 20)
    train(tmp_path / "run", "--max_steps", 6, "--keep_tokens", 1)
    found = records(tmp_path / "run")
    assert [group["step"] for group in found] == sorted(kept_steps(6)) and len(found) == STEPS
    for group in found:
        [sequence] = group["sequences"]
        assert len(sequence["ids"]) == 20 < sequence["length"] and max(sequence["first"]) < 20
        assert {len(values) for values in sequence["numbers"].values()} == {20}


@pytest.mark.slow
@pytest.mark.statement("token-records")
def test_two_processes_keep_the_rows_of_one(tmp_path):
    words = ["--max_steps", 2, "--keep_tokens", 3]
    train(tmp_path / "one", *words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [ROOT / "train/train_lm_ddp.py", *CONFIG, *words, "--out", tmp_path / "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two/manifest.json").read_text())["processes"] == 2
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert [g["step"] for g in one] == [g["step"] for g in two] == [1, 1, 1, 2, 2, 2]
    for a, b in zip(one, two):
        [a], [b] = a["sequences"], b["sequences"]
        assert a["ids"] == b["ids"] and a["name"] == b["name"] and a["numbers"]["mask"] == b["numbers"]["mask"]
        assert a["numbers"]["logprob"][1:4] == pytest.approx(b["numbers"]["logprob"][1:4], abs=1e-3)
