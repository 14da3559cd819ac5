"""What the machine does to a run: no disk, no memory, a signal. One message, and the same command goes on."""

import os
import shutil
import signal
import time

import psutil
import pytest
import torch
from interrupted import differences, run, run_whole, said, start, wait_for

from rlhf import dpo_train, grpo_train
from runtime.failures import explain, savers
from train import train_lm, train_lm_ddp

WORDS = ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", 2, "--save_every", 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_whole("train.train_lm", WORDS, out)
    return out


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(number, status, whole, tmp_path):
    out = tmp_path / "run"
    middle = torch.load(f"{whole}.end")["events"] // 2
    assert run("train.train_lm", WORDS, out, die_at=middle, die_by=number) == status, said(out)
    assert f"{number.name}: stopped after step" in said(out) and "To go on: python train/train_lm.py" in said(out)
    run_whole("train.train_lm", WORDS, out)
    assert differences(whole, out) == [] and "continuing from step" in said(out)


@pytest.mark.parametrize("save_every, message", [
    (1, "the checkpoint of step 1 cannot be written"),
    (0, "File too large"),
])  # fmt: skip
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(save_every, message, whole, tmp_path):
    out = tmp_path / "run"
    words = [*WORDS[:-1], save_every]
    assert run("train.train_lm", words, out, largest_file=50_000) == 2  # the model has 109,552 bytes
    assert said(out).count("error: ") == 1 and message in said(out) and "Traceback" not in said(out)
    assert "go on with: python train/train_lm.py" in said(out)
    assert not (out / "model.safetensors").exists()
    run_whole("train.train_lm", words, out)
    assert differences(whole, out) == []


def test_a_folder_that_vanishes_is_one_message(tmp_path):
    out = tmp_path / "run"
    process = start("train.train_lm", [*WORDS, "--epochs", 99, "--max_steps", 900], out)
    wait_for(out, "step     2/")
    os.kill(process.pid, signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)  # the signal is on its way
    shutil.rmtree(out)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 2 and "Traceback" not in said(out)
    assert said(out).count("error: ") == 1 and "go on with: python" in said(out)


def test_out_of_memory_names_the_line_what_is_free_and_what_saves_most_first():
    config = dpo_train.Config(lora_r=0, precision="fp32", micro_batch_size=8)
    try:
        torch.empty(2**50)
    except RuntimeError as error:
        message = explain(error, config)
    assert "tests/runtime/test_failures.py line" in message and "`torch.empty(2**50)`" in message
    assert "GB free" in message
    order = ["--lora_r 16", "--gradient_checkpointing true", "--micro_batch_size 4", "--precision bf16", "--max_length"]
    assert [message.index(option) for option in order] == sorted(message.index(option) for option in order)


def test_the_advice_fits_the_script():
    assert savers(train_lm.Config(batch_size=8, micro_batch_size=4, max_length=64)) == [
        "--micro_batch_size 2: the same steps", "--max_length 32",
    ]  # fmt: skip
    assert savers(grpo_train.Config(sampling_batch_size=64, max_new_tokens=48), sampling=True) == [
        "--sampling_batch_size 32", "--max_new_tokens 24",
    ]  # fmt: skip
    # advice that would change nothing is not given: 2 x 3 completions are in one pass, whatever was set
    few = grpo_train.Config(prompts_per_step=4, minibatches=2, samples_per_prompt=3, micro_batch_size=64)
    assert "--micro_batch_size 3: the same steps" in savers(few)
    assert savers(few, sampling=True)[0] == "--sampling_batch_size 6"
    offline = grpo_train.Config(mode="offline", prompts_per_step=1, samples_per_prompt=2, micro_batch_size=8)
    assert "--micro_batch_size 4: the same steps" in savers(offline)  # the sizes of its groups are in the file
    smallest = {"micro_batch_size": 1, "gradient_checkpointing": True, "lora_r": 8, "precision": "bf16"}
    assert savers(train_lm_ddp.Config(max_length=8, **smallest)) == []


def test_a_bug_of_ours_stays_a_traceback():
    assert explain(RuntimeError("shapes do not match"), train_lm.Config()) is None
    assert explain(FileNotFoundError(2, "No such file", "elsewhere.txt"), train_lm.Config()) is None


def test_a_lost_process_is_named_only_where_there_are_several(monkeypatch):
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3")
    assert explain(error, train_lm.Config()) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "another process of this run ended" in explain(error, train_lm.Config())
