"""Reward functions in the trainers: completions that are left out, failures, several functions, PPO without a model."""

import json
import shlex
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from configs.config import ROOT, UserError, load_config
from data import rewards
from inference import ppo_inference
from proof import trainers
from rlhf import grpo_train, ppo_train
from rlhf.grpo_train import advantages_of_step
from rlhf.rollouts import Rollout, inference_command
from runtime.processes import Processes
from runtime.provenance import files_read

SOURCE = """
from pathlib import Path

def first(completion):
    return sum(map(ord, completion)) % 7

def some(prompt, completion):
    '''None for some completions.'''
    return None if first(completion) > 4 else first(completion) / 4

def breaks(prompt, completion):
    '''Raises for some completions.'''
    if first(completion) == 0:
        raise TimeoutError("no answer")
    return float(first(completion))

def thirds(prompts, completions, **columns):
    return [float(len(c) % 3) for c in completions]

def needs_a_server(prompt, completion):
    if not Path("server").exists():
        raise ConnectionError("no server")
    return float(first(completion))

def goes_away(prompt, completion):
    done = Path("done")
    done.write_text(done.read_text() + "." if done.exists() else ".")
    if len(done.read_text()) > 24 and not Path("server").exists():
        raise ConnectionError("no server")
    return float(first(completion))

def never(prompt, completion):
    return None
"""


@pytest.fixture(autouse=True)
def functions(home, monkeypatch):
    monkeypatch.setattr(rewards, "PAUSE", 0.0)
    (home / "judges.py").write_text(SOURCE)
    for name in ("server", "done"):
        (home / name).unlink(missing_ok=True)
    return home


def rollout(groups):
    """A rollout with these rewards in each group; texts name the rows."""
    sizes = [len(group) for group in groups]
    rows = [f"{g}{i}" for g, size in enumerate(sizes) for i in range(size)]
    return Rollout(
        prompts=[[int(row[0])] for row in rows], completions=[[7, int(row[1])] for row in rows], logprobs=None,
        finish_reasons=["stop"] * len(rows), texts=rows, questions=[row[0] for row in rows], group_sizes=sizes,
        places=list(range(len(sizes))), rewards=[reward for group in groups for reward in group],
        gold=[float(i) for i in range(len(rows))],
    )  # fmt: skip


GROUPS = [[1.0, None, 3.0, 8.0], [None, None, None, None], [None, 5.0, None, None], [2.0, 2.0, None, 1e8]]


@pytest.mark.statement("reward-left-out")
@pytest.mark.parametrize("scale_std", [True, False])
def test_advantages_are_those_of_the_completions_that_are_left(scale_std):
    kept = rollout(GROUPS).without_left_out()
    assert kept.texts == ["00", "02", "03", "21", "30", "31", "33"] and kept.group_sizes == [3, 0, 1, 3]
    assert kept.completions == [[7, int(text[1])] for text in kept.texts]
    assert kept.gold == [0.0, 2.0, 3.0, 9.0, 12.0, 13.0, 15.0]
    config = SimpleNamespace(scale_std=scale_std)
    found = kept.map_groups(lambda groups: advantages_of_step(groups, config), Processes()).tolist()
    expected = []
    for group in GROUPS:  # by hand: a completion that is alone is the mean of its group
        left = [reward for reward in group if reward is not None]
        spread = statistics.stdev(left) + 1e-4 if len(left) > 1 and scale_std else 1.0
        expected += [(reward - statistics.fmean(left)) / spread for reward in left]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.statement("reward-left-out")
def test_advantages_of_groups_with_completions_left_out_are_trls():
    trl = pytest.importorskip("trl.trainer.utils")
    table = torch.tensor([[float("nan") if x is None else x for x in group] for group in GROUPS])
    mean = torch.nanmean(table, dim=1, keepdim=True)
    theirs = torch.nan_to_num((table - mean) / (trl.nanstd(table, dim=1)[:, None] + 1e-4), nan=0.0)
    kept = rollout(GROUPS).without_left_out()
    config = SimpleNamespace(scale_std=True)
    mine = kept.map_groups(lambda groups: advantages_of_step(groups, config), Processes())
    left = torch.tensor([[x is not None for x in group] for group in GROUPS])
    assert mine.tolist() == pytest.approx(theirs[left].tolist(), abs=1e-5)
    assert not theirs[~left].any()


@pytest.mark.statement("reward-left-out")
def test_a_step_trains_on_the_completions_that_are_left(train, module, monkeypatch, sgd, tmp_path):
    """It is the step of offline GRPO on groups that hold these completions alone."""
    seen = []
    original = Rollout.without_left_out
    monkeypatch.setattr(Rollout, "without_left_out", lambda self: seen.append((self, original(self))) or seen[-1][1])
    shape = {
        "steps": 1,
        "lr": 1.0,
        "max_grad_norm": 1e9,
        "kl_coef": 0.1,
        "prompts_per_step": 3,
        "samples_per_prompt": 6,
    }
    _, [line] = train("grpo", out="online", reward="judges:some", **shape)
    [(whole, kept)] = seen
    lost = len(whole.texts) - len(kept.texts)
    assert lost > 0 and line["reward_none"] == lost and min(kept.group_sizes) > 1
    assert line["reward"] == pytest.approx(np.mean(kept.rewards)) and line["grad_norm"] > 0.01
    online = torch.cat([p.detach().flatten() for p in sgd])
    rows = []
    for group in kept.grouped(range(len(kept.texts))):
        ranked = sorted(group, key=lambda i: -kept.rewards[i])
        rows.append({"prompt": kept.asked[ranked[0]], "chosen": kept.texts[ranked[0]],
                     "rejected": [kept.texts[i] for i in ranked[1:]], "scores": [kept.rewards[i] for i in ranked],
                     "temperature": 1.0, "completion_ids": [kept.completions[i] for i in ranked],
                     "logprobs": [kept.logprobs[i] for i in ranked]})  # fmt: skip
    (tmp_path / "left.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sgd.clear()
    del shape["samples_per_prompt"]
    train("offline", out="offline", groups=tmp_path / "left.jsonl", **shape)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in sgd]), online, atol=1e-5, rtol=0)


@pytest.mark.statement("reward-functions")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_failures_are_counted_and_the_run_goes_on(name, train, capsys):
    options = {"reward": "judges:breaks,judges:thirds", "reward_weights": "1,-0.5", "steps": 3, "samples_per_prompt": 6}
    _, lines = train(name, **options | ({"reward_model": "none"} if name == "ppo" else {}))
    assert len(lines) == 3 and sum(line.get("reward_failed", 0) for line in lines) > 0
    for line in lines:
        assert isinstance(line.get("reward_failed", 0), int)
        assert {"rewards/breaks/mean", "rewards/thirds/mean"} <= line.keys()
        if "reward_failed" not in line:  # all completions: the mean of the sums is the sum of the means
            assert line["reward"] == pytest.approx(line["rewards/breaks/mean"] - 0.5 * line["rewards/thirds/mean"])


@pytest.mark.statement("reward-left-out")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_step_without_any_reward_moves_no_weight(name, train):
    out, lines = train(name, reward="judges:never", steps=2, max_skipped=9, kl_coef=0.1,
                       **({"reward_model": "none", "inner_epochs": 2} if name == "ppo" else {}))  # fmt: skip
    assert [line["skipped"] for line in lines] == [1, 1] and all(line["reward_none"] for line in lines)
    assert not any(
        value.any() for key, value in load_file(out / "adapter_model.safetensors").items() if "lora_B" in key
    )
    with pytest.raises(UserError, match="2 steps in a row were skipped"):
        train(name, out="other", reward="judges:never", steps=5, max_skipped=2,
              **({"reward_model": "none"} if name == "ppo" else {}))  # fmt: skip


@pytest.mark.statement("reward-functions")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_if_every_call_of_a_step_fails_the_steps_before_are_saved(name, train, functions, tmp_path, capsys):
    options = {"reward": "judges:goes_away", "steps": 4, "prompts_per_step": 3, "samples_per_prompt": 4, "lr": 1e-3}
    options |= {"reward_model": "none"} if name == "ppo" else {}
    (functions / "server").touch()
    whole, lines = train(name, out="whole", **options)
    (functions / "server").unlink()
    (functions / "done").unlink()
    with pytest.raises(
        UserError, match="goes_away .* raised ConnectionError: no server. Every call failed.* Step 2 is saved"
    ):
        train(name, out="torn", **options)
    assert (tmp_path / "torn" / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    (functions / "server").touch()
    torn, again = train(name, out="torn", **options)
    said = [
        [{k: v for k, v in line.items() if k not in ("seconds", "tok/s")} for line in run] for run in (lines, again)
    ]
    assert said[0] == said[1] and len(again) == 4
    for file in sorted(path.name for path in whole.glob("*.safetensors")):
        a, b = load_file(whole / file), load_file(torn / file)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), file


@pytest.mark.statement("reward-functions")
def test_steps_before_some_without_any_reward_are_saved_and_skipped_steps_alone_are_not(train, functions, tmp_path):
    (functions / "judges.py").write_text(SOURCE + "n = 0\ndef ends(prompts, completions):\n    global n\n    n += 1\n"
                                         "    return [None if n > 2 else len(c) for c in completions]\n")  # fmt: skip
    with pytest.raises(UserError, match="2 steps in a row were skipped.* Step 3 is saved"):
        train("grpo", reward="judges:ends", steps=9, max_skipped=2)
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    with pytest.raises(UserError, match="2 steps in a row were skipped") as refused:
        train("grpo", out="never", reward="judges:never", steps=9, max_skipped=2)
    assert "is saved" not in str(refused.value) and not (tmp_path / "never" / "checkpoints").exists()


@pytest.mark.slow
def test_a_reward_model_and_reward_functions_take_prompts_without_checks(train, reward, functions, tmp_path):
    """Conversations with a system message, too: functions in TRL's form get them as they are."""
    user, system = {"role": "user", "content": "Say one."}, {"role": "system", "content": "Be short."}
    rows = [{"messages": [system, user], "answer": "1"}, {"messages": [user], "answer": "1"}] * 2
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (functions / "judges.py").write_text(
        "def chat(prompts, completions, answer):\n"
        "    assert all(p[-1] == {'role': 'user', 'content': 'Say one.'} for p in prompts) and set(answer) == {'1'}\n"
        "    return [len(p) + len(c[0]['content']) for p, c in zip(prompts, completions)]\n"
    )
    options = {"prompts": tmp_path / "chats.jsonl", "steps": 1, "prompts_per_step": 4}
    for name, how in (("grpo", {"reward": "none", "reward_model": reward}), ("grpo", {"reward": "judges:chat"}),
                      ("ppo", {}), ("ppo", {"reward": "judges:chat", "reward_model": "none"})):  # fmt: skip
        _, [line] = train(name, out=f"{name} {len(how)} {how.get('reward')}", **options, **how)
        assert line["reward"] and "gold" not in line and "reward_failed" not in line


@pytest.mark.slow
def test_the_command_that_a_run_names_next_asks_it_what_the_run_asked(train, reward, tmp_path, capsys):
    """With a reward model the prompts need no checks, so the script must be the one that reads the reward model."""
    (tmp_path / "asked.jsonl").write_text('{"question": "Say one."}\n{"question": "Say two."}\n')
    options = {"prompts": str(tmp_path / "asked.jsonl"), "prompt_column": "question"}
    folder, _ = train("grpo", reward="none", reward_model=reward, steps=1, prompts_per_step=2, **options)
    config = grpo_train.Config(out=str(folder), reward_model=str(reward), **options)
    script, *words = shlex.split(inference_command(config, "grpo"))[1:]
    assert script == "inference/ppo_inference.py" and str(folder) in words
    ppo_inference.main(load_config(ppo_inference.Config, [*words, "--max_new_tokens", "4"]))
    assert "means over 2 completions each" in capsys.readouterr().out
    by_default = grpo_train.Config(model_name="tiny-llama")
    assert inference_command(by_default, "grpo") == "python inference/grpo_inference.py"


@pytest.mark.statement("reward-functions")
@pytest.mark.slow
def test_ppo_with_a_function_that_scores_as_the_reward_model_does_takes_its_steps(train, reward, functions):
    (functions / "model_says.py").write_text(
        "from models.loader import load_tokenizer\nfrom models.tokens import prompt_ids\n"
        "from rlhf.utils import score_completions\nfrom rlhf.reward_model import RewardModel\n"
        f"NAME = {str(reward)!r}\nmodel, tokenizer = RewardModel.load(NAME), load_tokenizer(NAME)\n"
        "def score(prompts, completion_ids):\n"
        "    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]\n"
        "    return score_completions(model, asked, completion_ids, tokenizer.pad_token_id)\n"
    )
    options = {"inner_epochs": 2, "minibatches": 2, "steps": 3}
    _, expected = train("ppo", out="model", **options)
    _, found = train("ppo", out="function", reward_model="none", reward="model_says:score", **options)
    for a, b in zip(found, expected, strict=True):
        for key in b.keys() - {"seconds", "tok/s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    assert any(line["reward"] for line in found)


def test_ppo_without_a_reward_model_loads_none(train, monkeypatch):
    def loads(*_, **__):
        raise AssertionError("a reward model is loaded")

    for name in ("find_reward_model", "place_reward_model"):
        monkeypatch.setattr(ppo_train, name, loads)
    out, lines = train("ppo", reward="judges:thirds", reward_model="none")
    assert lines and "reward_model" not in json.loads((out / "manifest.json").read_text())["files"]


@pytest.mark.statement("reward-left-out")
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["GRPO", "PPO"])
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_leaves_out_the_same(trainer, processes, tmp_path_factory):
    folder = trainers_folder(tmp_path_factory)
    options = {"reward": "judges:some,judges:breaks", "samples_per_prompt": 4, "minibatches": 2, "inner_epochs": 1}
    runs = [
        trainers.run(folder, trainer, "tiny-llama", f"{n} leave out", n, "float32", **options) for n in (1, processes)
    ]
    one, several = runs
    assert json.loads((several / "manifest.json").read_text())["processes"] == processes
    lines, others = (trainers.metrics(run) for run in runs)
    assert any("reward_failed" in line for line in lines)
    counts = ("reward_failed", "reward_none")
    assert [[line.get(key) for key in counts] for line in lines] == [
        [line.get(key) for key in counts] for line in others
    ]
    assert trainers.apart(several, one, folder / "tiny-llama", "float32") < 1e-3


def trainers_folder(tmp_path_factory, made=[]):  # noqa: B006 - made once
    if not made:
        made.append(tmp_path_factory.mktemp("trainers"))
        trainers.prepare(made[0])
        (made[0] / "judges.py").write_text(SOURCE)
    return made[0]


@pytest.mark.statement("reward-functions")
def test_a_change_of_any_of_the_files_is_noticed(functions, monkeypatch):
    monkeypatch.chdir(functions)
    (functions / "other.py").write_text("def reward(prompt, completion):\n    return 1.0\n")
    words = ["--config", str(ROOT / "configs/smoke/grpo.yaml"), "--reward", "judges:some, other:reward"]
    before = files_read(load_config(grpo_train.Config, words))["reward"]
    assert files_read(load_config(grpo_train.Config, words))["reward"] == before
    (functions / "other.py").write_text("def reward(prompt, completion):\n    return 2.0\n")
    assert files_read(load_config(grpo_train.Config, words))["reward"] != before


@pytest.mark.statement("reward-functions")
def test_a_run_that_goes_on_with_another_reward_is_refused(train, functions):
    (functions / "server").touch()
    (functions / "other.py").write_text("def reward(prompt, completion):\n    return 1.0\n")
    options = {"reward": "judges:needs_a_server,other:reward", "steps": 2, "save_every": 1}

    def stop(self, step, carried=None):
        save(self, step, carried)
        raise KeyboardInterrupt

    from runtime.checkpoint import Checkpoints

    save = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", stop)
        train("grpo", **options)
    (functions / "other.py").write_text("def reward(prompt, completion):\n    return -1.0\n")
    with pytest.raises(UserError, match="reward = judges:needs_a_server,other:reward: changed since the checkpoint"):
        train("grpo", **options)


def test_a_reward_on_the_command_line_takes_the_place_of_the_files_reward_model():
    words = ["--config", str(ROOT / "configs/smoke/ppo.yaml")]
    config = load_config(ppo_train.Config, [*words, "--reward", "judges:some"])
    assert (config.reward, config.reward_model) == ("judges:some", None)
    config = load_config(ppo_train.Config, words)
    assert (config.reward, config.reward_model) == (None, "models/smoke/reward")
    with pytest.raises(UserError, match="give one of them"):
        load_config(ppo_train.Config, [*words, "--reward", "judges:some", "--reward_model", "models/reward"])
    with pytest.raises(UserError, match="give exactly one of them"):
        load_config(ppo_train.Config, [*words, "--reward_model", "none"])
