"""Metrics that the doctor reads, against worked values: explained variance, first ratio, correlation with length."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.config import load_config
from rlhf.ppo_train import explained_variance
from rlhf.train_reward_model import length_correlation
from runtime.processes import Processes

T = torch.tensor


def batch(returns, values, mask):
    return SimpleNamespace(returns=T(returns), values=T(values), mask=T(mask))


ONE = batch([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]], [[1.0, 1.0, 7.0], [3.0, 7.0, 7.0]], [[1, 1, 0], [1, 0, 0]])
OTHER = batch([[6.0]], [[5.0]], [[1]])


@pytest.mark.statement("explained-variance")
def test_explained_variance_worked_values():
    # returns 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; errors 0, 1, 0, 1: variance 1/4
    assert explained_variance([ONE, OTHER], Processes()) == pytest.approx(1 - 0.25 / 3.5)
    assert explained_variance([batch([[1.0, 3.0]], [[1.0, 3.0]], [[1, 1]])], Processes()) == 1.0
    assert explained_variance([batch([[1.0, 3.0]], [[0.0, 0.0]], [[1, 1]])], Processes()) == 0.0
    assert explained_variance([batch([[1.0, 3.0]], [[3.0, 1.0]], [[1, 1]])], Processes()) == -3.0  # errors -2, 2
    assert explained_variance([batch([[2.0, 2.0]], [[0.0, 1.0]], [[1, 1]])], Processes()) is None
    assert explained_variance([], Processes()) is None


@pytest.mark.statement("explained-variance")
def test_explained_variance_is_over_all_processes():
    parts = []
    gather = SimpleNamespace(gather=lambda mine: parts.append(mine) or [mine])
    for batches in ([ONE], [OTHER], []):  # a process of three has nothing
        explained_variance(batches, gather)
    together = SimpleNamespace(gather=lambda mine: parts)
    assert explained_variance([ONE], together) == explained_variance([ONE, OTHER], Processes())


def test_length_correlation_worked_values():
    assert length_correlation([1.0, -2.0, 0.5], [2, -4, 1]) == pytest.approx(1.0)
    assert length_correlation([-1.0, 2.0], [2, -4]) == pytest.approx(-1.0)
    assert length_correlation([1.0, 1.0], [3, -3]) == 0.0
    assert length_correlation([1.0, 2.0], [0, 0]) == 0.0
    d, g = [0.5, -1.0, 2.0, 0.1], [3, 1, 5, -2]
    both = torch.stack([T(d + [-x for x in d]), T([*map(float, g), *(-float(x) for x in g)])])
    assert length_correlation(d, g) == pytest.approx(torch.corrcoef(both)[0, 1].item())
    assert length_correlation([-x for x in d], [-x for x in g]) == length_correlation(d, g)


@pytest.mark.slow
@pytest.mark.statement("ppo-first-step")
def test_the_first_of_several_updates_has_ratio_1(train):
    """And the value head starts at 0, so it explains nothing in the first rollout."""
    _, lines = train("ppo", inner_epochs=2, minibatches=2)
    assert all(line["approx_kl_first"] < 1e-9 < line["approx_kl"] for line in lines)
    assert lines[0]["explained_variance"] == 0.0 and lines[1]["explained_variance"] <= 1
    _, lines = train("grpo", out="grpo", inner_epochs=2)
    assert all(line["approx_kl_first"] < 1e-9 for line in lines) and max(line["approx_kl"] for line in lines) > 1e-9


@pytest.mark.slow
def test_the_reward_model_keeps_its_correlation_with_length(reward):
    found = json.loads((reward / "manifest.json").read_text())["result"]
    assert -1 <= found["length_correlation"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("count, said_of_it", [(2, "2 lines, too short to tell of"), (10, "no worry in 10 lines")])
def test_a_run_ends_with_what_the_doctor_says(module, words, tmp_path, capsys, count, said_of_it):
    script = module("dpo")
    script.main(load_config(script.Config, words("dpo", tmp_path / "run", max_steps=count, epochs=4, lr=1e-3)))
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if line.startswith("doctor: ")]
    assert 1 <= len(said) <= 3 and any(said_of_it in line for line in said), said
    at = printed.index(said[0])
    assert printed[at - 1].startswith("written to") and printed[at + len(said)].startswith("next: ")
