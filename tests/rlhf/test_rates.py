"""Tokens per second: those of all processes, whatever process counts them."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.pairs import Pairs
from rlhf.policy import Policy
from rlhf.rollouts import Rollout
from runtime.processes import Processes


def stage_of(processes):
    counted = []
    run = SimpleNamespace(count_tokens=counted.append)
    return SimpleNamespace(processes=processes, run=run, device="cpu", counted=counted)


@pytest.mark.statement("data-order")
def test_a_step_on_pairs_counts_the_pairs_of_all_processes():
    rows = [{"prompt": [1] * n, "chosen": [2] * 3, "rejected": [3] * n} for n in range(1, 7)]
    for processes in (Processes(), Processes(0, 4), Processes(3, 4)):
        pairs = Pairs.__new__(Pairs)
        pairs.stage, pairs.train = stage_of(processes), rows
        pairs.config = SimpleNamespace(batch_size=6, micro_batch_size=1, seed=0)
        mine = [pair for batch in pairs.batches(1) for pair in batch]
        assert len(mine) == len(processes.share(rows))
        assert pairs.stage.counted == [2 * 21 + 6 * 3]  # the prompts and rejected have 1 to 6 tokens


def test_a_minibatch_counts_what_all_processes_compute():
    class Three(Processes):
        def sum(self, x):
            return x * 3  # as if two others had the same

    rollout = Rollout([[5, 6]] * 2, [[7], [8, 9]], None, ["stop"] * 2, ["", ""], ["", ""], [2], [0], rewards=[0.0, 1.0])
    for processes, others in ((Processes(), 1), (Three(), 3)):
        policy = Policy.__new__(Policy)
        policy.stage, policy.tokenizer = stage_of(processes), SimpleNamespace(pad_token_id=0)
        policy.config = SimpleNamespace(minibatches=1, micro_batch_size=4)
        [minibatch] = policy.minibatches(rollout)
        assert policy.stage.counted == [5 * others]  # the prompt once, and both completions
        assert (minibatch.tokens, minibatch.sequences) == (3 * others, 2 * others)
        assert torch.equal(minibatch.batches[0].mask, torch.tensor([[1, 0], [1, 1]]))
