"""Two processes take the step of one: uneven counts, clipping, an empty share, one all-reduce set a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

DRIVER = str(Path(__file__).with_name("ddp_driver.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# one step has a micro-batch of 9 and one of 1 or 9 counted tokens, the other a single one: rank 1 gets no share of it
CASES = {
    "sgd": {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 0.5},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "max_grad_norm": 0.5},
    "tiny_limit": {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 1e-6},
}


def drive(folder, plan, launcher):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, DRIVER, str(folder), json.dumps(plan)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of `ddp_driver.py`: each case plain, as one process of the DDP script, and as two; then an error."""
    folder = tmp_path_factory.mktemp("ddp")
    ones = [{"name": f"{s}_{c}", "script": s, **CASES[c]} for c in CASES for s in ("plain", "ddp")]
    saving = {"gradient_checkpointing": True, "lora_r": 2}
    twos = [{"name": f"two_{c}", "script": "ddp", **CASES[c]} for c in CASES]
    twos += [{"name": "two_lora", "script": "ddp", **CASES["adamw"], "options": saving}]
    twos += [{"name": "error", "script": "ddp", **CASES["sgd"], "error_on_rank": 1}]
    done = drive(folder, ones, [sys.executable])
    assert done.returncode == 0, done.stderr[-3000:]
    done = drive(folder, twos, TORCHRUN)
    assert (folder / "two_lora.1.pt").exists(), done.stderr[-3000:]
    (folder / "error.txt").write_text(f"{done.returncode}\n{done.stderr}")
    return folder


def load(folder, name, rank=0):
    return torch.load(folder / f"{name}.{rank}.pt")


def difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a["parameters"], b["parameters"], strict=True))


@pytest.mark.parametrize("case", ["sgd", "adamw"])
@pytest.mark.statement("token-mean-ranks")
def test_two_ranks_with_1_and_9_counted_tokens_take_the_step_of_one_process_with_clipping_on(folder, case):
    plain = load(folder, f"plain_{case}")
    assert difference(plain, load(folder, f"ddp_{case}")) < 1e-12
    assert difference(plain, load(folder, f"two_{case}")) < 1e-12
    norms = [json.loads(x)["grad_norm"] for x in (folder / f"two_{case}/metrics.jsonl").open() if "grad_norm" in x]
    assert min(norms) > 0.5  # clipping was at work, and the norm logged is the one before it


@pytest.mark.parametrize("case", ["sgd", "adamw", "lora"])
@pytest.mark.statement("ranks-equal")
def test_parameters_are_equal_on_all_ranks(folder, case):
    assert difference(load(folder, f"two_{case}", 0), load(folder, f"two_{case}", 1)) == 0


@pytest.mark.statement("one-all-reduce")
def test_one_all_reduce_set_per_optimizer_step(folder):
    one_rank_step_has_two = [load(folder, name)["sets"] for name in ("ddp_sgd", "two_sgd")]
    assert one_rank_step_has_two == [4, 4]  # 3 blocks, 2 a step, 2 epochs


@pytest.mark.statement("data-order")
def test_loss_and_held_out_loss_are_those_of_one_process(folder):
    def logged(name):
        lines = [json.loads(x) for x in (folder / name / "metrics.jsonl").open()]
        keys = ("loss", "nats_per_token", "lr", "grad_norm")
        return [round(line[k], 5) for line in lines for k in keys if k in line]

    assert logged("two_sgd") == logged("plain_sgd")


@pytest.mark.parametrize("script", ["plain", "ddp", "two"])
@pytest.mark.statement("clipping")
def test_with_sgd_at_lr_1_and_a_limit_of_1e_6_weights_move_by_at_most_1e_6(folder, script):
    from models.loader import load_model

    start = [p.detach().double() for p in load_model("tiny-llama", device="cpu").parameters()]
    after = load(folder, f"{script}_tiny_limit")["parameters"]
    moved = torch.cat([(a - b).reshape(-1) for a, b in zip(after, start, strict=True)]).norm()
    assert 1e-7 < moved <= 4 * 1e-6  # four steps


@pytest.mark.statement("checkpointing")
def test_a_lora_run_over_two_ranks_moves_every_b_matrix(folder):
    from safetensors.torch import load_file

    weights = load_file(folder / "two_lora" / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # A and B of seven linear layers in each of two blocks
    assert all(w.abs().sum() > 0 for k, w in weights.items() if "lora_B" in k)


def test_the_user_error_of_one_rank_ends_all_and_is_said_once(folder):
    code, said = (folder / "error.txt").read_text().split("\n", 1)
    assert code != "0"
    assert said.count("error: only this rank sees it") == 1
