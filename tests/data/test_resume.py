"""Preference generation and evaluation that are killed and started again by the same command: the very same files."""

import pytest
from interrupted import differences, run, run_killed, run_whole, said

pytestmark = pytest.mark.slow

SAMPLING = ["--model_name", "tiny-llama", "--max_new_tokens", 6, "--limit", 12, "--precision", "fp32"]
SAMPLING += ["--prompts", "tests/data/forms.json"]
PAIRS = [*SAMPLING, "--sampling_batch_size", 8, "--samples_per_prompt", 4, "--chosen_ended", "false"]
GROUPS = [*SAMPLING, "--sampling_batch_size", 16, "--samples_per_prompt", 8]


@pytest.mark.statement("resume")
def test_pairs_are_the_same_after_kills(tmp_path):
    out, whole = tmp_path / "killed" / "pairs.jsonl", tmp_path / "whole" / "pairs.jsonl"
    run_whole("data.generate_preferences", PAIRS, whole)
    events = 1  # the n-th process dies at its n-th event: within a batch, at both files, between them
    while run("data.generate_preferences", PAIRS, out, die_at=events) != 0:
        events += 1
    assert events > 3
    assert differences(whole, out) == []
    assert "continuing after batch" in said(out)
    assert sorted(p.suffix for p in out.parent.iterdir()) == [".end", ".json", ".jsonl", ".phase", ".said"]


@pytest.mark.statement("resume")
def test_groups_are_the_same_after_kills(tmp_path):
    out, whole = tmp_path / "killed" / "groups.jsonl", tmp_path / "whole" / "groups.jsonl"
    run_whole("data.generate_preferences_multi", GROUPS, whole)
    run_killed("data.generate_preferences_multi", GROUPS, out, whole)
    assert differences(whole, out) == []
    assert "continuing after batch" in said(out)


@pytest.mark.statement("resume")
def test_a_measurement_is_the_same_after_kills(tmp_path):
    words = ["--base", "tiny-llama", "--reward_model", "none", "--text", "tests/train/text.jsonl", "--text_length", 64]
    words += [*SAMPLING, "--text_tokens", 128, "--sampling_batch_size", 8]
    out, whole = tmp_path / "killed" / "tiny.json", tmp_path / "whole" / "tiny.json"
    run_whole("report.evaluate", words, whole)
    run_killed("report.evaluate", words, out, whole, kills=2)
    assert differences(whole, out) == []
    assert "continuing after batch" in said(out)
