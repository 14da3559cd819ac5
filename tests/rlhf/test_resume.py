"""RLHF training that is killed and started again by the same command ends as if it never had been."""

import json

import pytest
from interrupted import differences, run, run_killed

from models.generation import generate
from models.loader import answer_text, load_model, load_tokenizer, prompt_ids

# between the lines that are logged too, so that what is measured since the last one must be carried over
PAIRS = ["--epochs", 2, "--batch_size", 3, "--micro_batch_size", 2, "--log_every", 3, "--save_every", 2]
STEPS = ["--steps", 4, "--save_every", 1]
CASES = {
    "reward": ("rlhf.train_reward_model", ["--config", "configs/smoke/reward.yaml", "--data", "PAIRS", *PAIRS]),
    "dpo": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", *PAIRS]),
    "dpo, all weights": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml", "--data", "PAIRS", *PAIRS,
                         "--lora_r", 0, "--precompute_reference", "false"]),
    "ppo": ("rlhf.ppo_train", ["--config", "configs/smoke/ppo.yaml", "--reward_model", "REWARD", *STEPS,
            "--kl_controller", "adaptive", "--kl_target", 3, "--kl_horizon", 20, "--kl_coef", 0.1, "--log_every", 3]),
    "grpo": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml", *STEPS, "--lr", 1e-2]),
    "grpo, offline": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo_offline.yaml", "--groups", "GROUPS", *STEPS,
                      "--inner_epochs", 2]),
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """{word in CASES: the file or folder for it}: pairs, groups sampled by tiny-llama, a reward model."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer = load_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    pairs, groups = [], []
    for i in range(16):
        prompt = [{"role": "user", "content": f"letter {i}"}]
        answers = [[{"role": "assistant", "content": x}] for x in ("a" * (1 + i % 3), "b" * (1 + i % 4))]
        pairs.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    for i in range(4):
        g = generate(model, [prompt_ids(tokenizer, prompt)], 8, samples_per_prompt=3, stop_ids=[2], seed=i)
        texts = [[{"role": "assistant", "content": answer_text(tokenizer, ids)}] for ids in g.completions]
        groups.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1:], "scores": [1.0, 0.0, 0.5],
                       "completion_ids": g.completions, "logprobs": g.logprobs, "temperature": 1.0})  # fmt: skip
    for name, rows in (("pairs", pairs), ("groups", groups)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--config", "configs/smoke/reward.yaml", "--data", folder / "pairs.jsonl", "--out", folder / "reward"]
    assert run("rlhf.train_reward_model", [*words, "--max_steps", 2, "--warmup_steps", 0]) == 0
    return {"PAIRS": folder / "pairs.jsonl", "GROUPS": folder / "groups.jsonl", "REWARD": folder / "reward"}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment_it_ends_with_the_same_weights_optimizer_and_metrics(case, inputs, tmp_path):
    script, words = CASES[case]
    words = [inputs.get(word, word) for word in words]
    out, said = tmp_path / "out", tmp_path / "said"
    assert run(script, [*words, "--out", f"{out}.whole"], said=said) == 0, said.read_text()
    died = run_killed(script, words, out, said=said)
    assert differences(f"{out}.whole", out) == [], (died, said.read_text())
    assert "continuing from step" in said.read_text()
    assert not (out / "checkpoints").exists()
