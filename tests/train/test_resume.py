"""Language-model training that is killed and started again by the same command ends as if it never had been."""

import pytest
from interrupted import differences, run_killed, run_whole, said

from models.loader import load_model, load_tokenizer

pytestmark = pytest.mark.slow

SMOKE = ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", 2, "--save_every"]
SCRATCH = ["--config", "configs/smoke/train_scratch.yaml", "--sample_tokens", 2, "--save_every"]
TWO_EPOCHS = ["--epochs", 2, "--max_steps", 9]
CASES = {
    "dropout": ("train.train_lm", [*SMOKE, 1, "--model_name", "DROPOUT", *TWO_EPOCHS, "--batch_size", 8,
                                   "--micro_batch_size", 4]),
    "scratch": ("train.train_lm", [*SCRATCH, 2, *TWO_EPOCHS, "--batch_size", 16, "--micro_batch_size", 16]),
    "ddp": ("train.train_lm_ddp", [*SMOKE, 1, "--max_steps", 5]),
    "fp16": ("train.train_lm_amp_ckpt", [*SMOKE, 2, "--precision", "fp16", "--measure_steps", 0]),
    "lora": ("train.train_lm_lora", [*SMOKE, 1, "--lora_dropout", 0.3, "--merge", "true", "--precision", "fp32"]),
    "wandb": ("train.train_lm_wandb", [*SMOKE, 1, "--wandb", "offline", "--max_steps", 4]),
}  # fmt: skip


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    """A model whose forward pass draws random numbers."""
    folder = tmp_path_factory.mktemp("dropout")
    model = load_model("tiny-llama", device="cpu")
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder)
    load_tokenizer("tiny-llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.statement("resume")
def test_killed_at_any_moment_it_ends_with_the_same_weights_optimizer_and_metrics(case, with_dropout, tmp_path):
    script, words = CASES[case]
    words = [with_dropout if word == "DROPOUT" else word for word in words]
    out, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    run_whole(script, words, whole)
    died = run_killed(script, words, out, whole)
    assert differences(whole, out) == [], (died, said(out))
    assert "continuing from step" in said(out)
    assert not (out / "checkpoints").exists()
