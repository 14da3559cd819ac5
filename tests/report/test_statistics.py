"""The figures of a measurement against worked numbers and against an enumerated policy."""

import itertools
import math
import random

import pytest
import torch

from report.intervals import best_of_kl, clustered, distinct, summarise
from rlhf.utils import kl_estimate
from runtime.means import interval, t975


def answer(key, text="a bee hums", gold=1.0, proxy=0.0, kl=0.0, tokens=4, finish="stop", checks=(("lowercase", True),)):
    checks = [list(check) for check in checks]
    return {"id": key, "text": text, "gold": gold, "proxy": proxy, "kl": kl, "base_nats": 2.0 * tokens,
            "tokens": tokens, "finish_reason": finish, "checks": checks}  # fmt: skip


@pytest.mark.parametrize("df, table", [(3, 3.182), (5, 2.571), (15, 2.131), (30, 2.042), (119, 1.980), (10**6, 1.960)])
def test_t_quantile_agrees_with_the_printed_table(df, table):
    assert t975(df) == pytest.approx(table, rel=0.01 if df < 5 else 0.001)


def test_interval_of_four_numbers():
    # mean 0.5; deviations -0.5, -0.1, 0.1, 0.5: squares sum to 0.52, / 3 = 0.17333, root 0.41633; / 2 = 0.20817;
    # t at 3 degrees of freedom is 3.182
    found = interval([0.0, 0.4, 0.6, 1.0])
    assert found["mean"] == pytest.approx(0.5)
    assert found["se"] == pytest.approx(0.208167, abs=1e-6)
    assert found["half"] == pytest.approx(3.182 * 0.208167, rel=0.01)
    assert found["n"] == 4


def test_one_value_has_no_interval():
    assert interval([0.7]) == {"mean": 0.7, "se": None, "half": None, "n": 1}


def test_fluency_is_nats_over_tokens_not_a_mean_of_means():
    # 8 nats of 4 tokens and 6 nats of 1: 14 / 5, not (2 + 6) / 2
    answers = [answer("a", tokens=4), answer("b", tokens=1) | {"base_nats": 6.0}]
    assert summarise(answers, [])["fluency"] == pytest.approx(2.8)


def test_completions_to_one_prompt_count_once():
    # two prompts, means 0.5 and 1.0: mean 0.75, stdev 0.35355, se 0.25, whatever the number of copies of a completion
    few = [answer("p", gold=0.0), answer("p", gold=1.0), answer("q"), answer("q")]
    many = few * 10
    for answers in (few, many):
        found = clustered(answers, lambda a: a["gold"])
        assert (found["mean"], found["n"]) == (0.75, 2)
        assert found["se"] == pytest.approx(0.25)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Clustered data: prompts differ, their completions are alike. Unclustered intervals would cover some 60 %."""
    rng, hits, rounds = random.Random(0), 0, 600
    for _ in range(rounds):
        answers = []
        for i in range(12):
            level = rng.gauss(0.5, 0.2)
            answers += [answer(str(i), gold=level + rng.gauss(0, 0.02)) for _ in range(4)]
        found = clustered(answers, lambda a: a["gold"])
        hits += abs(found["mean"] - 0.5) <= found["half"]
    assert 0.92 < hits / rounds < 0.98


def test_distinct():
    # words: the bee the bee / the fox: 6 words, 3 of them different; pairs: the-bee bee-the the-bee, the-fox: 3 of 4
    texts = ["The bee, the bee", "the fox."]
    assert distinct(texts, 1) == pytest.approx(3 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 4)
    assert distinct(["one"], 2) == 0.0


def test_best_of_one_is_the_base():
    assert best_of_kl(1) == 0.0
    assert best_of_kl(4) == pytest.approx(1.386294 - 0.75, abs=1e-6)


def test_k1_summed_over_a_completion_has_the_enumerated_kl_as_its_mean():
    """Two-token completions over three symbols, the second drawn given the first: all 9 with their probability."""
    torch.manual_seed(0)
    policy, base = torch.randn(4, 3).double().log_softmax(-1), torch.randn(4, 3).double().log_softmax(-1)
    truth = estimate = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        p, q = ([table[0, a], table[1 + a, b]] for table in (policy, base))
        weight = math.exp(sum(p))
        truth += weight * float(sum(p) - sum(q))
        estimate += weight * kl_estimate(torch.stack(p), torch.stack(q), "k1").sum().item()
    assert truth > 0.1
    assert estimate == pytest.approx(truth, abs=1e-12)


def test_summary_by_hand():
    answers = [
        answer("p", gold=0.5, proxy=1.0, kl=2.0, tokens=10, checks=[("lowercase", True), ("repeats", False)]),
        answer("p", proxy=3.0, kl=4.0, tokens=20, checks=[("lowercase", True), ("repeats", True)], finish="length"),
        answer("q", gold=0.0, proxy=0.0, kl=0.0, tokens=6, checks=[("lowercase", False)]),
        answer("q", gold=0.0, proxy=0.0, kl=6.0, tokens=4, checks=[("lowercase", False)]),
    ]
    found = summarise(answers, ["repeats"], greedy=[answer("p", gold=1.0), answer("q", gold=0.5)])
    assert found["greedy"]["mean"] == 0.75 and found["greedy"]["n"] == 2
    assert found["gold"]["mean"] == pytest.approx(0.375)  # prompts: 0.75 and 0
    assert found["unseen"]["mean"] == 0.5 and found["unseen"]["n"] == 1
    assert found["checks"]["lowercase"]["mean"] == 0.5
    assert found["proxy"]["mean"] == 1.0
    assert found["kl"]["mean"] == 3.0
    assert found["kl_per_token"] == pytest.approx(12 / 40)  # of all nats and all tokens, not a mean of ratios
    assert found["finish_stop"] == 0.75 and found["tokens"] == 10
    without = summarise([answer("p", proxy=None, kl=None)], [])
    assert (without["proxy"], without["kl"], without["kl_per_token"], without["unseen"]) == (None,) * 4
    assert without["greedy"] is None
