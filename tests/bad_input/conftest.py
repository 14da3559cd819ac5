"""Inputs that work, for commands in which one other thing is broken."""

import json

import pytest
from bad_input.makers import group, pair


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="session")
def good(work):
    """Pairs, groups, a reward model, an adapter (`dpo`) and the same with a PPO run's configuration (`ppo`)."""
    import torch
    from peft import LoraConfig, get_peft_model

    from models.loader import load_model, load_tokenizer, portable_name
    from models.tiny import build_tiny
    from rlhf.reward_model import RewardModel

    folder = work / "good"
    folder.mkdir()
    for name, row in (("pairs", pair), ("groups", group)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(12)))
    base = portable_name(build_tiny("tiny-llama"))
    tokenizer = load_tokenizer("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reward_model = RewardModel.load("tiny-llama", device="cpu", new_head=True)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        policy = get_peft_model(load_model("tiny-llama", device="cpu"), lora)
    policy.peft_config["default"].base_model_name_or_path = base
    for run, own in (("dpo", "beta: 0.1"), ("ppo", f"reward_model: {folder / 'reward'}")):
        policy.save_pretrained(folder / run)
        tokenizer.save_pretrained(folder / run)
        (folder / run / "config.yaml").write_text(f"model_name: tiny-llama\n{own}\n")
    reward_model.save(folder / "reward", tokenizer, base)
    return folder


@pytest.fixture
def here(work, good, request, monkeypatch):
    """An empty folder, beside the one that works, in which the command is run."""
    folder = work / f"case{len(list(work.iterdir()))}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
