"""Tiny data for the RLHF scripts, a trained reward model, and a way to run each trainer's `main` in this process."""

import contextlib
import importlib
import io
import json

import pytest

from configs.config import ROOT, load_config

TRAINERS = {  # name: (module, its smoke configuration)
    "reward": ("rlhf.train_reward_model", "reward"),
    "dpo": ("rlhf.dpo_train", "dpo"),
    "ppo": ("rlhf.ppo_train", "ppo"),
    "grpo": ("rlhf.grpo_train", "grpo"),
    "offline": ("rlhf.grpo_train", "grpo_offline"),
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Pairs in which the chosen completion is the one with the letter a."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(24):
        chosen, rejected = "a" * (1 + i % 3), "b" * (1 + i % 4)
        rows.append({
            "prompt": [{"role": "user", "content": f"letter {i}"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "chosen_score": 1.0, "rejected_score": 0.5 if i % 2 else 0.0,
        })  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reward(pairs, tmp_path_factory):
    """The folder of a reward model trained on `pairs`."""
    from rlhf import train_reward_model as script

    out = tmp_path_factory.mktemp("models") / "reward"
    words = ["--config", ROOT / "configs/smoke/reward.yaml", "--data", pairs, "--out", out, "--lr", 1e-2, "--epochs", 3]
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(load_config(script.Config, [str(word) for word in words]))
    return out


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Groups as the generator writes them, sampled by tiny-llama itself."""
    from models.generation import generate
    from models.loader import load_model, load_tokenizer
    from models.tokens import completion_text, prompt_ids

    model, tokenizer = load_model("tiny-llama", device="cpu"), load_tokenizer("tiny-llama")
    rows = []
    for i in range(4):
        prompt = [{"role": "user", "content": f"group {i}"}]
        g = generate(model, [prompt_ids(tokenizer, prompt)], 8, samples_per_prompt=3, stop_ids=[2], seed=i)
        texts = [[{"role": "assistant", "content": completion_text(tokenizer, c)}] for c in g.completions]
        rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1:], "scores": [1.0, 0.0, 0.5],
                     "completion_ids": g.completions, "logprobs": g.logprobs, "temperature": 1.0})  # fmt: skip
    path = tmp_path_factory.mktemp("data") / "groups.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def module():
    """name of a trainer -> its module."""
    return lambda name: importlib.import_module(TRAINERS[name][0])


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a reward function in it: those are looked for in the working directory."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "thirds.py").write_text("def reward(prompt, completion):\n    return float(len(completion) % 3)\n")
    return folder


@pytest.fixture(scope="session")
def words(pairs, reward, groups):
    """(trainer's name, out, options by name) -> its command line. PPO and GRPO take one optimizer step a rollout."""

    def words(name, out, **options):
        fixed = {"config": ROOT / f"configs/smoke/{TRAINERS[name][1]}.yaml", "out": out}
        if name in ("reward", "dpo"):
            fixed |= {"data": pairs}
        if name == "ppo":
            fixed |= {"reward_model": reward, "inner_epochs": 1, "minibatches": 1}
        if name == "grpo":
            fixed |= {"reward": "thirds:reward"}
        if name == "offline":
            fixed |= {"groups": groups}
        return [str(word) for key, value in {**fixed, **options}.items() for word in (f"--{key}", value)]

    return words


@pytest.fixture
def train(module, words, home, tmp_path, monkeypatch):
    """(trainer's name, out, options by name) -> (the run's folder, its logged lines)."""
    monkeypatch.chdir(home)

    def run(name, out="run", **options):
        script = module(name)
        with contextlib.redirect_stdout(io.StringIO()):
            script.main(load_config(script.Config, words(name, tmp_path / out, **options)))
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        return tmp_path / out, [json.loads(line) for line in lines]

    return run


@pytest.fixture
def sgd(monkeypatch):
    """Plain SGD in place of AdamW, in every trainer; the list that will hold the parameters that train."""
    import torch

    from train import updates

    trained = []

    def make_optimizer(parameters, lr, weight_decay=0.0):
        trained.extend(parameters)
        return torch.optim.SGD(trained, lr=lr)

    monkeypatch.setattr(updates, "make_optimizer", make_optimizer)
    return trained
