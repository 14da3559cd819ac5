"""Several processes, one of which dies; more or fewer of them afterwards; two machines: the result is that of one.

Who dies does so by itself in a given step, so that nothing depends on who is quicker.
"""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from interrupted import finish, free_port, lines, run, run_whole, said, start, start_ranks
from safetensors.torch import load_file
from torch.distributed import TCPStore

from configs.config import ROOT
from models.tiny import build_tiny

pytestmark = pytest.mark.slow

DDP = ["train.train_lm_ddp", ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", 2, "--save_every", 1]]
GRPO = ["rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml", "--steps", 3, "--save_every", 1, "--max_grad_norm",
        0.05]]  # fmt: skip


def run_on_two_machines(script, words, out, die_at=0, restarts=0):
    """Two launchers with a process each, which meet over the network, as on two machines."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", f"--max-restarts={restarts}"]
    launch += ["tests/train/dying_worker.py", str(die_at), script.replace(".", "/") + ".py"]
    command = [*launch, *map(str, words), "--out", str(out)]
    with open(f"{out}.said", "a") as f:
        machines = [
            subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=f, stderr=f)
            for _ in range(2)
        ]
        for machine in machines:
            assert machine.wait(240) == 0, said(out)


def assert_equal(one, other):
    """The weights and the metrics of two runs, up to rounding."""
    (path,) = [p.name for p in one.glob("*model.safetensors")]
    mine, theirs = load_file(one / path), load_file(other / path)
    assert max((mine[key] - theirs[key]).abs().max() for key in mine) < 2e-5
    mine, theirs = lines(one), lines(other)
    assert [list(row) for row in mine] == [list(row) for row in theirs]
    for a, b in zip(mine, theirs):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    """Made by one process, before several want it."""
    build_tiny("tiny-llama")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A function job -> the folder of its run in one process, uninterrupted."""
    made = {}

    def folder(script, words):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("one") / "run"
            run_whole(script, words, made[script])
        return made[script]

    return folder


def test_a_process_that_dies_takes_the_other_down_with_a_message_and_one_or_two_go_on(one, tmp_path):
    script, words = DDP
    for after in (1, 2):
        out = tmp_path / f"run{after}"
        first, second = start_ranks(script, words, out, 2, {"die_at": 4})
        second.join(120)
        clock = time.time()
        first.join(60)
        assert (first.exitcode, second.exitcode) == (2, -signal.SIGKILL), said(out)
        assert time.time() - clock < 60
        assert "error: another process of this run ended" in said(out) and "Traceback" not in said(out)
        finish(start_ranks(script, words, out, after), out)
        assert "continuing from step 3 of 6" in said(out)
        assert len((out / "samples.jsonl").read_text().splitlines()) == 2  # before and after, of one process
        assert_equal(one(script, words), out)


def test_a_run_goes_on_with_more_processes(one, tmp_path):
    script, words = GRPO
    out = tmp_path / "run"
    assert run(script, words, out, die_at=20) == -signal.SIGKILL
    finish(start_ranks(script, words, out, 2), out)
    assert "continuing from step" in said(out)
    assert_equal(one(script, words), out)


def test_one_process_asked_to_stop_stops_all_after_the_same_step(tmp_path):
    script, words = DDP
    out = tmp_path / "run"
    for process in start_ranks(script, words, out, 2, {"die_at": 4, "die_by": signal.SIGTERM}):
        process.join(120)
        assert process.exitcode == 128 + signal.SIGTERM, said(out)
    assert said(out).count("SIGTERM: stopped after step 4 of 6") == 1


def test_processes_that_are_started_again_do_not_look_for_those_that_died(one, tmp_path):
    """The launchers' store still holds the addresses of before, and the second process reads them first."""
    script, words = DDP
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    launchers = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for k in range(2):
        out = tmp_path / f"run{k}"
        ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **launchers}
        second = start(script, words, out, environment={"RANK": "1", "LOCAL_RANK": "1", **ranks})
        second.join(2)
        first = start(script, words, out, environment={"RANK": "0", "LOCAL_RANK": "0", **ranks})
        finish([first, second], out)
    assert_equal(one(script, words), out)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_two_machines_go_on_by_themselves_when_a_worker_is_killed(one, tmp_path, name):
    script, words = f"train.train_lm_{name}", DDP[1]
    out = tmp_path / "run"
    run_on_two_machines(script, words, out, die_at=4, restarts=1)
    assert "continuing from step 3 of 6" in said(out)
    assert_equal(one(script, words), out)


def test_two_machines_take_the_steps_of_one_in_rlhf(one, tmp_path):
    script, words = GRPO
    out = tmp_path / "run"
    run_on_two_machines(script, words, out)
    assert_equal(one(script, words), out)
