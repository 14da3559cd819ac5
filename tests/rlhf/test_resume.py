"""RLHF training that is killed and started again by the same command ends as if it never had been."""

import signal

import pytest
import torch
from interrupted import differences, run, run_killed, run_whole, said

pytestmark = pytest.mark.slow

# between the lines that are logged too, so that what is measured since the last one must be carried over
PAIRS = ["--epochs", 2, "--batch_size", 3, "--micro_batch_size", 2, "--log_every", 3, "--save_every", 2]
STEPS = ["--steps", 4, "--save_every", 1]
CASES = {
    "reward": ("rlhf.train_reward_model", ["--config", "configs/smoke/reward.yaml", "--data", "PAIRS", *PAIRS]),
    "dpo": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", *PAIRS]),
    "dpo, all weights": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", *PAIRS,
                         "--lora_r", 0, "--precompute_reference", "false"]),
    "dpo, 4 bits": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", *PAIRS,
                    "--load_in_4bit", "true"]),
    "ppo": ("rlhf.ppo_train", ["--config", "configs/smoke/ppo.yaml", "--reward_model", "REWARD", *STEPS,
            "--kl_controller", "adaptive", "--kl_target", 3, "--kl_horizon", 20, "--kl_coef", 0.1, "--log_every", 3]),
    "grpo": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml", *STEPS, "--lr", 1e-2]),
    "grpo, offline": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo_offline.yaml", "--groups", "GROUPS", *STEPS,
                      "--inner_epochs", 2]),
}  # fmt: skip


@pytest.fixture
def words(pairs, reward, groups):
    """case -> (script, its command line)."""
    files = {"PAIRS": pairs, "REWARD": reward, "GROUPS": groups}
    return lambda case: (CASES[case][0], [files.get(word, word) for word in CASES[case][1]])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.statement("resume")
def test_killed_at_any_moment_it_ends_with_the_same_weights_optimizer_and_metrics(case, words, tmp_path):
    script, words = words(case)
    out, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    run_whole(script, words, whole)
    half = torch.load(f"{whole}.end")["events"] // 2  # first in the middle: later ones may leave no steps to take
    assert run(script, words, out, die_at=half) == -signal.SIGKILL
    died = [half, *run_killed(script, words, out, whole)]
    assert differences(whole, out) == [], (died, said(out))
    assert "continuing from step" in said(out)
    assert not (out / "checkpoints").exists()
