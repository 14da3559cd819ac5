"""What this project writes, other libraries read: TRL trains on the pairs unchanged and loads the reward model."""

import json

import pytest

from models.tiny import build_tiny

pytestmark = pytest.mark.slow

PAIR = {
    "prompt": [{"role": "user", "content": "Say ok."}],
    "chosen": [{"role": "assistant", "content": "ok"}],
    "rejected": [{"role": "assistant", "content": "no, never"}],
    "chosen_score": 1.0,
    "rejected_score": 0.0,
}


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    return path


def test_preferences_train_in_trls_dpo_trainer_unchanged(preferences, tmp_path):
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    folder = build_tiny("tiny-llama")
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=1,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(preferences), split="train", cache_dir=str(tmp_path / "c")),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[1] < losses[0]


def test_the_reward_model_loads_in_trl(tmp_path):
    """TRL takes a reward model as a folder that AutoModelForSequenceClassification loads with one label."""
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from models.loader import load_tokenizer
    from rlhf.reward_model import RewardModel

    base = build_tiny("tiny-llama")
    reward_model = RewardModel.load("tiny-llama", device="cpu", new_head=True)
    reward_model.save(tmp_path / "reward", load_tokenizer("tiny-llama"), base)
    from datasets import Dataset

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1)
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=2, max_steps=1, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{key: PAIR[key] for key in ("prompt", "chosen", "rejected")}] * 2
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(tmp_path / "reward"),
    )
    trainer.train()
    assert any("loss" in row for row in trainer.state.log_history)
