"""The RLHF scripts as commands: tiny runs, two processes against one, user errors."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.config import UserError, load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# one update a rollout; and two, of three and of two prompts, of which process 1 has one each
DEALT = pytest.mark.parametrize("dealt", [("--minibatches", 1), ("--minibatches", 2, "--prompts_per_step", 5)])


def call(script, *arguments):
    """Run a script's main in this process (a new one takes seconds to import its libraries); what it printed."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main(load_config(module.Config, [str(a) for a in arguments]))
    return printed.getvalue()


def command(script, *arguments, processes=1, cwd=ROOT, status=0):
    """Run a script as a command, under torchrun for several processes; what it printed."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [str(ROOT / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun sets it where nobody else does
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    assert status == 0 or "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def on_one_and_two_processes(script, tmp_path, *arguments):
    """Run a script in this process into tmp_path/1, and on two processes into tmp_path/2; the logged lines of both."""
    call(script, *arguments, "--out", tmp_path / "1")
    command(script, *arguments, "--out", tmp_path / "2", processes=2, cwd=Path.cwd())
    for n in (1, 2):
        assert manifest(tmp_path / str(n))["processes"] == n
    return metrics(tmp_path / "1"), metrics(tmp_path / "2")


def manifest(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b, tolerance):
    a, b = (load_file(Path(x) / "adapter_model.safetensors") for x in (a, b))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=0)
    assert any(key.endswith("lora_B.weight") and value.abs().max() > 1e-4 for key, value in a.items())


def test_reward_model_learns_and_reports(reward):
    assert manifest(reward)["result"]["heldout_accuracy"] == 1.0
    assert (reward / "calibration.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [(), ("--loss_type", "ipo"), ("--precompute_reference", "false", "--lora_r", "0")])
def test_dpo_runs_and_a_second_run_is_recognised(pairs, tmp_path, options):
    arguments = ("--config", "configs/smoke/dpo.yaml", "--data", pairs, "--out", tmp_path / "dpo", *options)
    call("rlhf/dpo_train.py", *arguments)
    losses = [row["loss"] for row in metrics(tmp_path / "dpo")]
    assert losses[-1] < losses[0]
    assert "holds this very run, finished" in call("rlhf/dpo_train.py", *arguments)
    with pytest.raises(UserError, match="beta: 0.1 there, 0.3 now(.|\n)*--overwrite true"):
        call("rlhf/dpo_train.py", *arguments, "--beta", "0.3")


@pytest.mark.statement("cached-reference")
def test_cached_reference_equals_fresh(pairs, tmp_path):
    for cached in ("true", "false"):
        call("rlhf/dpo_train.py", "--config", "configs/smoke/dpo.yaml", "--data", pairs, "--out", tmp_path / cached,
            "--precompute_reference", cached)  # fmt: skip
    same_weights(tmp_path / "true", tmp_path / "false", 1e-5)


def test_gradient_checkpointing_moves_every_lora_b_and_changes_nothing(pairs, tmp_path):
    for on in ("true", "false"):
        call("rlhf/dpo_train.py", "--config", "configs/smoke/dpo.yaml", "--data", pairs, "--out", tmp_path / on,
            "--gradient_checkpointing", on, "--max_steps", 1, "--warmup_steps", 0)  # fmt: skip
    same_weights(tmp_path / "true", tmp_path / "false", 1e-5)
    weights = load_file(tmp_path / "true" / "adapter_model.safetensors")
    b = [value for key, value in weights.items() if "lora_B" in key]
    assert len(b) == 14 and all(value.abs().max() > 0 for value in b)


@pytest.mark.statement("token-mean-ranks")
def test_two_processes_take_the_steps_of_one_dpo(pairs, tmp_path):
    options = ("--config", "configs/smoke/dpo.yaml", "--data", pairs, "--max_grad_norm", "0.05", "--batch_size", 3)
    options += ("--max_steps", 3)
    one, two = on_one_and_two_processes("rlhf/dpo_train.py", tmp_path, *options)
    same_weights(tmp_path / "1", tmp_path / "2", 2e-5)
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in ("loss", "accuracy", "chosen_logps", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-3, rel=1e-4), key
    again = command("rlhf/dpo_train.py", *options, "--out", tmp_path / "2", processes=2)
    assert again.count("holds this very run, finished") == 1  # and both processes end well, or the status were not 0


@DEALT
@pytest.mark.statement("token-mean-ranks")
def test_two_processes_take_the_steps_of_one_grpo(tmp_path, monkeypatch, dealt):
    (tmp_path / "own.py").write_text("def reward(prompt, completion):\n    return float(len(completion) % 3)\n")
    monkeypatch.chdir(tmp_path)
    options = ("--config", ROOT / "configs/smoke/grpo.yaml", "--reward", "own:reward", "--max_grad_norm", "0.05")
    one, two = on_one_and_two_processes("rlhf/grpo_train.py", tmp_path, *options, *dealt)
    same_weights(tmp_path / "1", tmp_path / "2", 2e-5)
    assert len(one) == len(two) == 2
    for a, b in zip(one, two):
        for key in ("reward", "loss", "mean_length", "grad_norm", "frac_reward_zero_std"):
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), key


@pytest.mark.parametrize("options", [(), ("--lora_r", "0"), ("--kl_controller", "adaptive", "--kl_target", "3")])
def test_ppo_runs(reward, tmp_path, options):
    out = tmp_path / "ppo"
    call("rlhf/ppo_train.py", "--config", "configs/smoke/ppo.yaml", "--reward_model", reward, "--out", out, *options)
    rows = metrics(out)
    assert len(rows) == 2 and (out / "value_head.safetensors").is_file()
    assert {"reward", "gold", "kl", "entropy", "clipfrac", "value_loss", "clipped_ratio", "tok/s"} <= rows[0].keys()
    training, sampling, packed = "gradients", "decoding", "completions that share a prompt"
    expected = [("policy", training), ("sampler", sampling), ("policy", packed)]
    if "--lora_r" in options:  # a reference and a reward model that are models of their own; the policy samples
        expected = [("policy", training), ("policy", sampling), ("reward model", packed), ("policy", packed)]
        expected.append(("reference", packed))
    else:
        expected.insert(1, ("policy", "logits of the sampler"))
    assert [(check["model"], check["kind"]) for check in manifest(out)["admission"]] == expected


@DEALT
@pytest.mark.statement("whitening")
def test_ppo_two_processes_take_the_steps_of_one(reward, tmp_path, dealt):
    options = ("--config", "configs/smoke/ppo.yaml", "--reward_model", reward, "--inner_epochs", 1)
    found = on_one_and_two_processes("rlhf/ppo_train.py", tmp_path, *options, *dealt)
    same_weights(tmp_path / "1", tmp_path / "2", 2e-5)
    one, two = ([row["grad_norm"] for row in rows] for rows in found)
    assert two == pytest.approx(one, rel=1e-3)  # AdamW's small steps hide most of what is wrong with a gradient


@pytest.mark.statement("ppo-first-step")
def test_ppo_first_inner_step_has_ratio_1(reward, tmp_path):
    call("rlhf/ppo_train.py", "--config", "configs/smoke/ppo.yaml", "--reward_model", reward, "--inner_epochs", 1,
        "--minibatches", 1, "--out", tmp_path / "ppo")  # fmt: skip
    assert all(row["approx_kl"] == 0 and row["clipfrac"] == 0 for row in metrics(tmp_path / "ppo"))


@pytest.mark.statement("offline-online")
def test_grpo_offline_starts_on_policy_with_stored_logprobs(groups, tmp_path):
    arguments = ("--config", "configs/smoke/grpo_offline.yaml", "--groups", groups, "--out", tmp_path / "g")
    assert "ratios to the stored log-probs" in call("rlhf/grpo_train.py", *arguments)
    first, second = metrics(tmp_path / "g")
    assert first["approx_kl"] < 1e-9 < second["approx_kl"]
    assert first["reward"] == pytest.approx(0.5)


def test_grpo_offline_without_stored_logprobs_says_what_it_is(groups, tmp_path):
    rows = [json.loads(line) for line in groups.read_text().splitlines()]
    stripped = [{k: v for k, v in row.items() if k not in ("completion_ids", "logprobs")} for row in rows]
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in stripped))
    output = call("rlhf/grpo_train.py", "--config", "configs/smoke/grpo_offline.yaml", "--groups", path,
                 "--out", tmp_path / "g")  # fmt: skip
    assert "advantage-weighted fine-tuning" in output


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("dpo_train", ("--beta", "-1"), "beta = -1.0 is out of range: must be above 0"),
        ("dpo_train", ("--bta", "1"), "Did you mean 'beta'?"),
        ("dpo_train", ("--data", "data/nowhere.jsonl"), "python data/generate_preferences.py"),
        ("dpo_train", ("--loss_type", "hinge", "--label_smoothing", "0.1"), "has no effect with loss_type = hinge"),
        ("ppo_train", ("--reward_model", "models/nowhere"), "python rlhf/train_reward_model.py"),
        ("ppo_train", ("--kl_target", "3"), "kl_target has no effect with kl_controller = fixed"),
        ("grpo_train", ("--samples_per_prompt", "1"), "samples_per_prompt = 1 is out of range"),
        ("grpo_train", ("--group_size", "8"), "it is now samples_per_prompt"),
        ("ppo_train", ("--missing_end_penalty", "1"), "it is now missing_eos_penalty"),
        ("grpo_train", ("--mode", "offline", "--reward", "a:b"), "have no effect"),
        ("grpo_train", ("--mode", "offline", "--judge", "a:b"), "have no effect"),  # another name of --reward
        ("grpo_train", ("--prompts", "nowhere.json"), "nowhere.json"),
        ("grpo_train", ("--model_name", "models/nowhere"), "models/nowhere"),
    ],
)
def test_user_errors_name_the_key(script, arguments, message, tmp_path):
    with pytest.raises(UserError) as error:
        call(f"rlhf/{script}.py", "--config", f"configs/smoke/{script.split('_')[0]}.yaml", "--out",
             tmp_path / "out", *arguments)  # fmt: skip
    assert message in str(error.value)


@pytest.mark.parametrize("script", ["train_reward_model", "dpo_train", "ppo_train", "grpo_train"])
def test_a_user_error_ends_a_command_with_status_2_and_no_traceback(script):
    assert "Did you mean 'lr'" in command(f"rlhf/{script}.py", "--lrr", "1", status=2)
