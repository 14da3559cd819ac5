"""Gradients that turn NaN in the middle of a run: each loop stops, has learnt nothing from them, and can go on."""

import pytest
from interrupted import differences, run, run_whole, said

pytestmark = pytest.mark.slow

LM = ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", 2, "--save_every", 1]
CASES = {  # its script, its command line, how it names the rows of a step
    "lm": ("train.train_lm", LM, "blocks 8, 49 + 0, 28"),
    "ddp": ("train.train_lm_ddp", LM, "blocks 8, 49 + 0, 28"),
    "amp": ("train.train_lm_amp_ckpt", [*LM, "--precision", "fp32", "--measure_steps", 0], "blocks 8, 49 + 0, 28"),
    "dpo": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", "--batch_size", 3,
            "--save_every", 1], "pairs.jsonl line 14; "),
    "ppo": ("rlhf.ppo_train", ["--config", "configs/smoke/ppo.yaml", "--reward_model", "REWARD", "--steps", 6,
            "--inner_epochs", 1, "--minibatches", 1, "--save_every", 1], "List some good things about living in a"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_learnt_from_nan_and_the_same_command_goes_on_from_the_last_good_checkpoint(
    case, pairs, reward, tmp_path
):
    script, words, rows = CASES[case]
    words = [{"PAIRS": pairs, "REWARD": reward}.get(word, word) for word in words]
    out, whole = tmp_path / "spoilt" / "run", tmp_path / "whole" / "run"
    run_whole(script, words, whole)
    assert run(script, words, out, spoil_from=3) == 2
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    (error,) = [line for line in said(out).splitlines() if line.startswith("error: ")]
    assert error.startswith("error: step 5: grad_norm is nan on ") and rows in error
    assert "3 steps in a row were skipped (max_skipped = 3)" in error
    assert "the last good checkpoint is " in error and "checkpoints/step-00000002" in error
    run_whole(script, words, out)  # what was wrong with the gradients is over
    assert "continuing from step 2 of" in said(out)
    assert differences(whole, out) == []
