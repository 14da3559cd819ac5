"""`--dry_run true` of every training script, and planned beside measured peaks."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest

from configs.config import ROOT, UserError, load_config
from runtime import plan

SCRIPTS = {
    "train.train_lm": "train_base", "train.train_lm_ddp": "train_base", "train.train_lm_amp_ckpt": "train_base",
    "train.train_lm_lora": "train_base", "train.train_lm_wandb": "train_base", "train.train_lm_fsdp": "train_base",
    "train.train_lm_tp": "train_base", "rlhf.train_reward_model": "reward", "rlhf.dpo_train": "dpo",
    "rlhf.ppo_train": "ppo", "rlhf.grpo_train": "grpo",
}  # fmt: skip


@pytest.fixture
def config(pairs, tmp_path):
    """(module, words) -> its smoke configuration, with `out` in tmp_path."""

    def load(module, *words):
        smoke = ["--config", str(ROOT / f"configs/smoke/{SCRIPTS[module]}.yaml"), "--out", str(tmp_path / "out")]
        if module in ("rlhf.dpo_train", "rlhf.train_reward_model"):
            smoke += ["--data", str(pairs)]
        return load_config(importlib.import_module(module).Config, [*smoke, *map(str, words)])

    return load


@pytest.fixture
def shape(tmp_path):
    """A folder with the configuration of Llama-2-7B alone."""
    folder = tmp_path / "seven"
    folder.mkdir()
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(named | sizes))
    return folder


@pytest.mark.parametrize("module", SCRIPTS)
def test_a_dry_run_prints_a_table_in_80_columns_and_writes_nothing(module, config, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert plan.dry_run(config(module, "--dry_run", "true"))
    printed = capsys.readouterr().out.split("dry run of ")[1]
    assert sorted(tmp_path.rglob("*")) == before
    assert all(len(line) <= plan.WIDTH for line in printed.splitlines())
    for words in ("steps", "tokens", "Python and torch", "weights", "gradients", "optimizer", "activations", "fits:"):
        assert words in printed
    for words in ("KV cache", "value head"):
        assert (words in printed) == (
            module == "rlhf.ppo_train" or (words == "KV cache" and module == "rlhf.grpo_train")
        )
    assert ("time    at most" in printed) == (module in ("rlhf.ppo_train", "rlhf.grpo_train"))
    assert not plan.dry_run(config(module))


def test_the_steps_of_a_dry_run_are_those_of_a_run(config):
    assert config("train.train_lm").plan().steps.startswith("6 of 4 blocks")
    assert config("rlhf.ppo_train").plan().steps.startswith("2 rollouts, 4 updates each")
    assert config("rlhf.dpo_train", "--max_steps", 3).plan().steps.startswith("3 of 4 pairs")


P, ADAPTER = 6_738_415_616, 39_976_960  # weights of Llama-2-7B, and of an adapter of rank 16 on its linear layers
ROLES = {  # script: its options, {role: copies of the frozen weights at 2 or 4 bytes}, of a model and of an adapter
    "train.train_lm_ddp": ([], {}, {}),
    "rlhf.train_reward_model": ([], {}, {}),
    "rlhf.dpo_train": (["--precompute_reference", "false"], {"reference: weights, bf16": 2}, {}),
    "rlhf.ppo_train": (
        [],
        {"reference: weights, bf16": 2, "reward model: weights, float32": 4, "sampler: weights": 2},
        {"sampler: weights": 2, "sampler: matrices in the layout of the decoder": 2},
    ),
    "rlhf.grpo_train": (
        [],
        {"reference: weights, bf16": 2, "sampler: weights": 2},
        {"sampler: weights": 2, "sampler: matrices in the layout of the decoder": 2},
    ),
}


@pytest.mark.parametrize("module", ROLES)
def test_a_7b_shape_without_weights_is_planned_for_cards_that_are_not_here(module, config, shape, capsys):
    options, of_model, of_adapter = ROLES[module]
    words = ["--model_name", shape, "--dry_run", "true", "--dry_run_gb", 80, "--dry_run_devices", 8, *options]
    words += ["--precision", "bf16", "--lora_r"]
    assert plan.dry_run(config(module, *words, 0))
    printed = " ".join(capsys.readouterr().out.split())
    assert "saves -" not in printed
    assert "does not fit" in printed and "sharded over 8 devices" in printed
    full, adapter = config(module, *words, 0).plan(), config(module, *words, 16).plan()
    score = module == "rlhf.train_reward_model"  # a head of one row in place of 32,000
    base = P - 31_999 * 4096 if score else P
    trained = ADAPTER + 4096 if score else ADAPTER
    assert f"{base / 1e6:,.1f} M weights, all train" in printed
    assert full.part("optimizer: two moments of AdamW") == 8 * base
    assert adapter.part("optimizer: two moments of AdamW") == 8 * trained
    for found, held, roles in ((full, 20 * base, of_model), (adapter, 2 * base + 20 * trained, of_adapter)):
        for name, size in roles.items():
            assert found.part(name) == size * P, name
        assert sum(part.bytes for part in found.held) >= held
    assert not full.fits and adapter.fits
    assert full.peak(shards=8) < full.peak() / 2


def test_a_7b_shape_sharded_over_8_cards_by_hand(config, shape, capsys):
    """docs/sharding.md, "What is kept", with rows of 4,096 tokens."""
    words = ["--model_name", shape, "--dry_run", "true", "--dry_run_gb", 80, "--dry_run_devices", 8, "--batch_size", 8]
    words += ["--micro_batch_size", 1, "--max_length", 4096, "--precision", "bf16", "--gradient_checkpointing", "true"]
    fsdp = config("train.train_lm_fsdp", *words)
    assert plan.dry_run(fsdp)
    printed = " ".join(capsys.readouterr().out.split())
    p, r = 202_383_360, 262_148_096
    assert 32 * p + r == P
    for role, size in (
        ("model: weights, float32, 1/8 of it", 4 * P / 8),
        ("gradients, 1/8 of it", 4 * P / 8),
        ("optimizer: two moments of AdamW, 1/8 of it", 8 * P / 8),
        ("gathered: two layers", 2 * 2 * p),
        ("gathered: embedding, head and last norm", 2 * r),
        ("gradients of a layer, or of these", 6 * r),
    ):
        assert f"{role} {size / 1e9:.2f} GB" in printed
    assert "8 processes share the work, not the memory" not in printed and "a layer is gathered" in printed
    inputs, found = 2 * 32 * 4096 * 4096, fsdp.plan()
    a_layer = 2 * 4096 * (8 * 4096 + 2 * 11008)  # states, queries, keys, values, both inputs of the gate: see above
    assert inputs < found.part("activations") < inputs + 1.2 * a_layer
    split = config("train.train_lm_tp", *words).plan()
    assert split.shards == 8 and split.part("gathered: two layers") == 0
    assert split.part("optimizer: two moments of AdamW") == found.part("optimizer: two moments of AdamW") == 8 * P


def test_each_option_that_saves_says_what_it_saves(config, shape, capsys):
    words = ("--model_name", shape, "--dry_run", "true", "--dry_run_gb", 16, "--lora_r", 0)
    asked = config("rlhf.dpo_train", *words)
    plan.dry_run(asked)
    said = capsys.readouterr().out
    assert "the reference goes before gradients and moments come" in " ".join(said.split())
    lines = said.split("What needs less:")[1].splitlines()
    peak, less = (config("rlhf.dpo_train", *words[:-1], r).plan().peak() / 1e9 for r in (0, 16))
    assert f"  --lora_r 16: saves {peak - less:.1f} GB, {less:.1f} GB remain" in lines
    assert any(line.startswith("  --gradient_checkpointing true: saves") for line in lines)


def test_what_a_dry_run_cannot_do_is_said(config, tmp_path):
    with pytest.raises(UserError, match="dry_run_gb = 80.0 has no effect with dry_run = False"):
        plan.dry_run(config("rlhf.dpo_train", "--dry_run_gb", 80))
    with pytest.raises(UserError, match="dry_run_devices = 2 has no effect with dry_run_gb = none"):
        plan.dry_run(config("rlhf.dpo_train", "--dry_run_devices", 2, "--dry_run", "true"))
    bound = dataclasses.replace(config("rlhf.dpo_train"), data=str(tmp_path / "none.jsonl")).plan()
    assert any("none.jsonl" in note and "max_length = 512" in note for note in bound.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, smoke", [("train/train_lm.py", "train_base"), ("rlhf/dpo_train.py", "dpo"), ("rlhf/grpo_train.py", "grpo")]
)
def test_the_manifest_has_planned_and_measured_peak_within_a_quarter(script, smoke, pairs, tmp_path):
    words = [sys.executable, str(ROOT / script), "--config", str(ROOT / f"configs/smoke/{smoke}.yaml")]
    words += ["--out", str(tmp_path / "out"), *(["--data", str(pairs)] if smoke == "dpo" else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=120)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["planned_memory_gb"] == pytest.approx(manifest["peak_memory_gb"], rel=0.25)
