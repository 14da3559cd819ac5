"""Inference with --out that is killed and started again ends with the very file of a run that never was."""

import json

import pytest
from interrupted import differences, run, run_killed, run_whole, said

pytestmark = pytest.mark.slow

SCRIPTS = {
    "inference.inference": ["--top_k", 50, "--top_p", 0.9],
    "inference.dpo_inference": [],
    "inference.grpo_inference": ["--samples_per_prompt", 2],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a prompt file, a DPO run)."""
    here = tmp_path_factory.mktemp("made")
    rows = [{"prompt": f"Say {i}, {'and ' * (i % 5)}stop.", "checks": [{"name": "lowercase"}]} for i in range(12)]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_whole("data.generate_preferences", ["--config", "configs/smoke/preferences.yaml"], here / "pairs.jsonl")
    words = ["--config", "configs/smoke/dpo.yaml", "--data", here / "pairs.jsonl"]
    run_whole("rlhf.dpo_train", [*words, "--max_steps", 1, "--warmup_steps", 0], here / "dpo")
    return here / "prompts.jsonl", here / "dpo"


def words_of(script, made):
    prompts, dpo = made
    words = ["--prompts", prompts, "--sampling_batch_size", 4, "--max_new_tokens", 6, *SCRIPTS[script]]
    words += [] if script == "inference.inference" else ["--limit", 12]
    return [*words, "--model_name", "tiny-llama" if script == "inference.inference" else dpo]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("inference-resumes")
def test_killed_at_any_moment_the_file_is_that_of_an_undisturbed_run(script, made, tmp_path):
    words = words_of(script, made)
    (tmp_path / "whole").mkdir()
    whole, out = tmp_path / "whole" / "x.jsonl", tmp_path / "killed" / "x.jsonl"
    run_whole(script, words, whole)
    assert len(whole.read_text().splitlines()) == 12
    assert "continuing" not in said(whole)
    died = run_killed(script, words, out, whole, kills=3, seed=1)
    assert differences(whole, out) == [], died
    assert "continuing after batch" in said(out), died
    assert not list(out.parent.glob("*.partial"))


@pytest.mark.parametrize("change", [["--seed", 1], ["--precision", "bf16"], ["--top_p", 0.5], ["--top_k", 3]])
@pytest.mark.statement("inference-resumes")
def test_what_another_configuration_had_finished_is_sampled_anew(change, made, tmp_path):
    script, words = "inference.inference", words_of("inference.inference", made)
    other = [*words[: words.index("--top_k")], "--precision", "fp32", "--model_name", "tiny-llama"]
    changed = [word for word in other if change[0] != "--precision" or word not in ("--precision", "fp32")] + change
    whole, out = tmp_path / "whole" / "x.jsonl", tmp_path / "killed" / "x.jsonl"
    run_whole(script, changed, whole)
    assert run(script, other, out, die_at=3) < 0
    assert len((out.parent / "x.jsonl.partial").read_text().splitlines()) > 1
    run_whole(script, changed, out)
    assert "of another configuration, model or prompts: they are sampled anew" in said(out)
    assert "continuing" not in said(out)
    assert whole.read_bytes() == out.read_bytes()
