import json
import re
from collections import Counter

import pytest

from configs.config import ROOT, UserError
from data.checks import CHECKS, GATES, asked_checks, is_degenerate, numbers, passed, score, split_sentences, words
from data.prompts import load_prompts, validate_checks
from data.rewards import load_reward

# name, arguments, answers that pass, answers that nearly pass
CASES = [
    ("max_words", {"n": 4}, ["Bees make sweet honey.", "It's a well-known 3.5.", "one"],
     ["a b c d e", "one/two three four five"]),
    ("short_words", {"n": 5}, ["Bees fly low.", "A so-so hive"], ["Bees buzzed.", "A small-minded bee"]),
    ("one_sentence", {}, [
        "Bees make honey.", "  Bees make honey!\n\n", "Mr. Smith keeps 3.5 hives, e.g. in Kent.",
        "Is it J. K. Rowling?", '"Stop!" she said.', "“Bees make honey.”", "Wait... and see.", "**Bees make honey.**",
        "At 5 p.m. they rest.",
    ], [
        "Bees make honey", "Bees make honey. They also", "Bees make honey. They sting.", "bees fly. they sting.",
        "A title\nBees make honey.", "Bees fly.They sting.", "Here it is:", "At 5 p.m. They rest.",
    ]),
    ("sentences", {"n": 2}, ["Bees fly. They sting!", "Bees fly.\nThey sting.", "1. Bees fly. They sting."],
     ["Bees fly. They sting", "Bees fly.", "Bees fly. They sting. Ouch."]),
    ("lowercase", {}, ["bees, 3 of them!", "é 你好"], ["bees in Kent", "123", "你好", "", "ǅ b"]),
    ("capitals", {}, ["BEES, 3 OF THEM!", "É 你好"], ["BEES IN KENt", "123", "你好", ""]),
    ("no_commas", {}, ["Bees; wasps."], ["Bees, wasps.", "1,000 bees", "蜂，蜂"]),
    ("starts_with", {"word": "Imagine"}, ["Imagine a bee.", "  “imagine that!”", "**Imagine** it", "- imagine"],
     ["Imagined bees.", "To imagine", "1. Imagine", "Imagine-like"]),
    ("ends_with", {"phrase": "that is all"}, ["Bees fly, and that is all.", "That is all", '"That is ALL!"\n'],
     ["That is all there is.", "that, is small", "is all", ""]),
    ("includes", {"word": "bee"}, ["A Bee.", "the bee's knees", "honey-bee"], ["bees", "been", "b e e"]),
    ("excludes", {"word": "bee"}, ["bees", "been"], ["A Bee.", "the bee’s knees", "honey-bee", "_bee_"]),
    ("repeats", {"word": "bee", "n": 2}, ["A bee, a BEE", "bee bee bee"], ["A bee, two bees", "bee"]),
    ("bullets", {"n": 2}, ["- a\n- b", "* a\n\n* b\n", "Here:\n  - a\n  - b", "- **a**: x\n- b"],
     ["- a", "- a\n- b\n- c", "-a\n-b", "- a\n- b\n1. c", "- a\n- b\n• c", "• a\n• b", "- a\n- ",
      "1. a\n2. b", "**a**\n**b**"]),
    ("numbered", {"n": 2}, ["1. a\n2. b", "Here:\n1. a\n\n2. b"],
     ["1. a", "2. a\n1. b", "1. a\n2. b\n3. c", "1) a\n2) b", "1. a\n2. b\n- c", "1. a 2. b"]),
    ("question", {}, ["Do bees fly?", "Do they?\n", '"Do they?"', "**Why?**"],
     ["Do bees fly", "Do they? Yes.", "Why?!"]),
    ("exclamation", {}, ["Bees!", "(Bees!) ", "“Bees!”"], ["Bees", "Bees! Yes.", "Bees!?"]),
    ("quoted", {}, ['"Bees fly."', "“Bees fly.”\n"],
     ['"Bees fly', 'Bees "fly"', '"Bees" and "wasps"', '"Bees".', '"!"', "'Bees'"]),
    ("parentheses", {}, ["Bees (small) fly", "(3)"],
     ["Bees (small fly", "Bees () fly", "Bees )small( fly", "Bees [small]", "(!)"]),
    ("no_letter", {"letter": "e"}, ["A small wasp", "42"], ["Bee", "E", "caf\u00e9"]),
    ("last_number", {"value": 27}, [
        "27", "27.", "The answer is 27.", "13 + 14 = 27", "13+14=27", "27.0", "**27**", "$27", "It is 27!", "27%",
        "(27)", "\\boxed{27}", "27 apples", "27cm", "54/2", "2.7e1", "20-7 is not 13 but 27", "- 27", "1. 27", "26, 27",
        "+27", "26-27", "\u201c27\u201d", "027", "27\n",
    ], [
        "-27", "-27.", "28", "27.5", "27 28", "270", "1,270", "27,000", "2 7", "minus 27", "negative 27", "= -27",
        "= - 27", "\u221227", "is \u201327.", "27,5", "27/2", "27/1 1/2", "twenty-seven", "x27", "27 - 1",
        "27 - 14 = 13", "27 x 2", "27e3", "2.7", "0.27", "27/0", "27.27", "27:30", "None.",
    ]),
    ("number", {}, ["7 bees", "1. We saw 7 bees", "1.5 l"], ["seven bees", "1. Bees\n2. Wasps", "(1) Bees"]),
]  # fmt: skip


@pytest.mark.statement("last-number")
@pytest.mark.parametrize("name, arguments, good, bad", CASES, ids=[case[0] for case in CASES])
def test_each_check_on_answers_that_pass_and_nearly_pass(name, arguments, good, bad):
    for text in good:
        assert CHECKS[name](text, **arguments) is True, text
    for text in bad:
        assert CHECKS[name](text, **arguments) is False, text


def test_every_check_is_tested_and_documented():
    assert {case[0] for case in CASES} == set(CHECKS)
    assert len(CHECKS) >= 14
    assert all(check.__doc__ for check in (CHECKS | GATES).values())


@pytest.mark.statement("last-number")
@pytest.mark.parametrize(
    "text, value",
    [("1,234", 1234), ("1,234.5", 1234.5), ("1,234,567.", 1234567), ("12,34", 34), ("12,345,6", 6), ("-7", -7),
     ("it is -7.", -7), ("= - 7", -7), ("3-5=-2", -2), ("minus 7", -7), ("20-7", 7), ("20 - 7", 7), ("20 minus 7", 7),
     ("(4) - 7", 7), ("a negative 7", -7), ("is \u22125", -5), ("0", 0), ("-0", 0), (".5", 0.5), ("-0.5", -0.5),
     ("1/2", 0.5), ("-1/2", -0.5), ("3.14", 3.14), ("x1 is 8", 8)],
)  # fmt: skip
def test_the_last_number_of_a_text(text, value):
    assert CHECKS["last_number"](text, value) is True, numbers(text)
    assert CHECKS["last_number"](text, value + 1) is False


def test_words_and_sentences():
    assert words("Don’t, e.g., pay 1,000.50 for well-known honey/wax — no!") == [
        "don't", "e", "g", "pay", "1,000.50", "for", "well-known", "honey", "wax", "no",
    ]  # fmt: skip
    assert split_sentences("It cost 3.5. Dr. Bee paid!\nNo end") == ["It cost 3.5.", "Dr. Bee paid!", "No end"]
    assert split_sentences("Take salt, etc. and go. Take salt, etc. Then go.") == [
        "Take salt, etc. and go.", "Take salt, etc.", "Then go.",
    ]  # fmt: skip


LOOPS = [
    "the bee is the bee is the bee is the",
    "no no no no no no",
    "A good start for the day. Bees fly. Bees fly. Bees fly. Bees fly.",
    "- bees\n- bees\n- bees\n- bees\n- bees\n- bees",
    "bees a bees b bees c bees d bees",  # 5 of 9 words
    "a b c a c b b a c c b a b c a c a b a b c",  # 3 different words of 21
    "hahahahahahahahaha",
    "!!!!!!!!",
]
ORDINARY = [
    "",
    "Bees.",
    "Bees make honey.",
    "No, no, no!",
    "Row, row, row your boat gently down the stream.",
    "- bees\n- wasps\n- ants",
    "- Red apple\n- Green apple\n- Yellow apple\n- Small apple",  # 4 of 8 words is not more than half
    "What a long long long road it was to the village on the hill!",
    "Hmmmmmmmmmmmmm, let me think about honey bees and flowers.",
    "Bees are small insects that live in hives, and they visit flowers to collect nectar for their honey.",
]


@pytest.mark.parametrize("text", LOOPS)
def test_loops_are_degenerate_and_score_zero(text):
    assert is_degenerate(text)
    assert score(text, [{"name": "no_letter", "letter": "z"}]) == 0.0


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_answers_are_not_degenerate(text):
    assert not is_degenerate(text)


def test_score_is_the_share_of_checks_passed():
    checks = [{"name": "lowercase"}, {"name": "max_words", "n": 3}, {"name": "question"}, {"name": "no_commas"}]
    assert passed("bees make honey", checks) == [True, True, False, True]
    assert score("bees make honey", checks) == 0.75
    assert score("Bees, wasps, ants, and so on.", checks) == 0.0
    assert score("do bees fly?", checks) == 1.0
    with pytest.raises(ValueError, match="at least one check"):
        score("bees", [])


@pytest.mark.parametrize("text", ["", "  \n", "...", "- \n- ", "🙂"])
def test_an_answer_without_a_word_passes_nothing(text):
    checks = [{"name": "max_words", "n": 3}, {"name": "no_commas"}, {"name": "excludes", "word": "bee"}]
    assert passed(text, checks) == [False, False, False]
    assert score(text, checks) == 0.0


@pytest.mark.parametrize(
    "checks, message",
    [
        ([], "train-001.*at least one"),
        ({"name": "lowercase"}, "must be a list"),
        (["lowercase"], 'with a "name"'),
        ([{"n": 3}], 'with a "name"'),
        (
            [{"name": "max_word", "n": 3}],
            "unknown check 'max_word' .did you mean 'max_words'.*; known checks: .*lowercase",
        ),
        ([{"name": "xyzzy"}], "unknown check 'xyzzy'; known checks"),
        ([{"name": "max_words"}], "lacks the argument 'n'; max_words takes n .a whole number"),
        ([{"name": "max_words", "n": 3, "m": 4}], "unknown argument 'm'"),
        ([{"name": "lowercase", "n": 3}], "unknown argument 'n'; lowercase takes no arguments"),
        ([{"name": "max_words", "n": "3"}], "n='3'"),
        ([{"name": "max_words", "n": True}], "n=True"),
        ([{"name": "max_words", "n": 0}], "at least 1"),
        ([{"name": "includes", "word": "two words"}], "one word"),
        ([{"name": "includes", "word": 7}], "one word"),
        ([{"name": "ends_with", "phrase": "..."}], "at least one word"),
        ([{"name": "no_letter", "letter": "ab"}], "one letter"),
        ([{"name": "last_number", "value": True}], "value=True; last_number takes value .a number"),
        ([{"name": "real_answer", "n": 4}], "lacks the argument 'stems'; real_answer takes stems"),
        ([{"name": "real_answer", "n": 4, "stems": ["Bee"]}], "in lower case"),
        ([{"name": "real_answer", "n": 4, "stems": ["bee"], "prompt": "x"}], "unknown argument 'prompt'"),
        ([{"name": "lowercase"}, {"name": "repeats", "word": "bee", "n": 1.5}], "n=1.5"),
    ],
)
def test_a_wrong_check_is_an_error_that_names_the_prompt(checks, message):
    with pytest.raises(UserError, match=f"(?s)train-001.*{message}" if "train-001" not in message else message):
        validate_checks(checks, "train-001")


ROW = {"id": "a", "prompt": "Describe bees.", "checks": [{"name": "lowercase"}], "split": "train"}


def without(key):
    return {k: v for k, v in ROW.items() if k != key}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one prompt"),
        ({"a": 1}, "must be a list"),
        (["text"], "entry 1: lacks id"),
        ([without("id")], "entry 1: lacks id"),
        ([without("prompt")], "'a': lacks prompt"),
        ([without("checks")], "'a': lacks checks"),
        ([without("split")], "'a': lacks split"),
        ([{**ROW, "id": 3}], "id must be a text"),
        ([{**ROW, "prompt": " "}], "'a': prompt must be a text"),
        ([{**ROW, "split": "test"}], "'a': split must be one of train, validation, heldout, got 'test'"),
        ([{**ROW, "checks": [{"name": "lower"}]}], "'a': unknown check 'lower' .did you mean 'lowercase'"),
        ([ROW, {**ROW, "prompt": "Other."}], "'a': this id stands twice"),
        ([ROW, {**ROW, "id": "b", "prompt": "describe  BEES.", "split": "heldout"}], "'b': the same prompt"),
    ],
)
def test_a_broken_prompt_file_is_an_error_that_names_the_entry(tmp_path, rows, message):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(UserError, match=f"mine.json.*{message}"):
        load_prompts(file)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(ROOT / "none.json"))):
        load_prompts("none.json")
    (tmp_path / "bad.json").write_text('[\n{"id": "a",}\n]')
    with pytest.raises(UserError, match="not valid JSON at line 2"):
        load_prompts("bad.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(UserError, match="UTF-8"):
        load_prompts("latin.json")
    with pytest.raises(UserError, match="split must be one of train, validation, heldout"):
        load_prompts(split="test")


def test_paths_and_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_prompts()) >= 500  # the default lies in the repository
    (tmp_path / "mine.json").write_text(json.dumps([ROW]))
    assert load_prompts("mine.json") == load_prompts("mine.json", split="train") == [ROW]
    with pytest.raises(UserError, match="no prompt has split 'heldout'"):
        load_prompts("mine.json", split="heldout")
    (tmp_path / "scored.json").write_text(json.dumps([without("checks")]))
    assert load_prompts("scored.json", need_checks=False) == [without("checks")]


# The stems of the words that name the held-out topics.
TOPIC = re.compile(
    r"\b(?:elephant|penguin|owl|horse|butterfl|shark|banana|tomato|pancake|soup|chocolate|volcano|mountain|river|desert"
    r"|thunder|autumn|moon|bicycl|cycl|airplane|bridge|librar|museum|guitar|danc|swim|paint|chess|camp|tent|doctor|farm"
    r"|firefight|dentist|teeth|password|umbrella|candle|mirror|birthday|wedding|homework)",
    re.IGNORECASE,
)


def names(rows):
    return Counter(check["name"] for row in rows for check in asked_checks(row["checks"]))


def test_prompt_file_has_the_stated_sizes():
    train, heldout = load_prompts(split="train"), load_prompts(split="heldout")
    validation = load_prompts(split="validation")
    assert (len(train), len(validation), len(heldout)) == (420, 60, 120)
    rows = train + validation + heldout
    assert load_prompts() == rows and all(row["id"].startswith(row["split"]) for row in rows)
    assert len({row["prompt"].casefold() for row in rows}) == len(rows)
    assert all(set(row) == {"id", "prompt", "checks", "split"} for row in rows)
    assert all(5 <= len(row["prompt"].split()) <= 30 for row in rows)
    doubles = sum(len(asked_checks(row["checks"])) == 2 for row in rows)
    assert doubles + sum(len(asked_checks(row["checks"])) == 1 for row in rows) == len(rows)
    assert 0.1 < doubles / len(rows) < 0.2


def test_heldout_topics_do_not_occur_in_training():
    assert [row["id"] for row in load_prompts(split="train") if TOPIC.search(row["prompt"])] == []
    assert [row["id"] for row in load_prompts(split="heldout") if not TOPIC.search(row["prompt"])] == []


def test_some_check_types_occur_only_heldout():
    train, heldout = names(load_prompts(split="train")), load_prompts(split="heldout")
    new = set(names(heldout)) - set(train)
    assert 2 <= len(new) <= 3
    assert 20 <= sum(any(check["name"] in new for check in row["checks"]) for row in heldout) <= 28
    assert set(train) <= set(names(heldout))
    assert len(train) + len(new) >= 14
    assert min(train.values()) >= 20


def test_no_prompt_contradicts_itself():
    one_of = [
        {"lowercase", "capitals"},
        {"one_sentence", "sentences", "bullets", "numbered"},
        {"question", "exclamation", "ends_with"},
        {"quoted", "bullets", "numbered"},
        {"max_words", "bullets", "numbered"},
    ]
    for row in load_prompts():
        kinds = names([row])
        assert max(kinds.values()) == 1, row
        assert all(len(group & set(kinds)) <= 1 for group in one_of), row
        check = {check["name"]: check for check in row["checks"]}
        wanted = [check[name]["word"].lower() for name in ("includes", "starts_with", "repeats") if name in check]
        assert "excludes" not in check or check["excludes"]["word"].lower() not in wanted, row
        assert "no_letter" not in check or all(check["no_letter"]["letter"] not in word for word in wanted), row
        assert "short_words" not in check or all(len(word) <= check["short_words"]["n"] for word in wanted), row


def test_arguments_stand_in_the_prompt():
    number_words = {1: "one", 2: "two", 3: "three", 7: "seven", 8: "eight", 10: "ten", 12: "twelve", 15: "15"}
    for row in load_prompts():
        for check in asked_checks(row["checks"]):
            for key, value in check.items():
                if key != "name":
                    said = number_words[value] if key == "n" else value
                    assert re.search(rf"\b{said}\b", row["prompt"], re.IGNORECASE), row


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward.py").write_text(
        "import math\nlength = 3\ndef reward(prompt, completion):\n    return len(completion) - len(prompt)\n"
    )
    (tmp_path / "own_folder").mkdir()
    (tmp_path / "own_folder" / "inner.py").write_text("def reward(prompt, completion):\n    return True\n")
    (tmp_path / "own_broken.py").write_text("def reward(:\n")
    (tmp_path / "own_needs.py").write_text("import no_such_library\n")


def test_a_reward_function_in_the_working_directory_is_found(rewards):
    assert load_reward("own_reward:reward")("ab", "abcde") == 3
    assert load_reward("own_folder.inner:reward")("ab", "c") is True
    assert load_reward("data.checks:score")("bees", [{"name": "lowercase"}]) == 1.0  # an installed module


@pytest.mark.parametrize(
    "spec, message",
    [
        ("own_reward", "must be module:function"),
        ("own_reward.py:reward:x", "must be module:function"),
        (":reward", "must be module:function"),
        ("own_reward:", "must be module:function"),
        ("folder/own_reward:reward", "must be module:function"),
        ("no_such_reward:reward", "no module 'no_such_reward'.*no_such_reward.py is no file"),
        ("own_needs:reward", "no module 'no_such_library'.*own_needs.py imports it"),
        ("own_broken:reward", "importing own_broken failed: SyntaxError"),
        ("own_reward:rewrad", "own_reward.py has no 'rewrad'"),
        ("own_reward:length", "length is a int, not a function"),
    ],
)
def test_a_reward_function_that_cannot_be_loaded(rewards, spec, message):
    with pytest.raises(UserError, match=message):
        load_reward(spec)


@pytest.mark.parametrize("text", ["1e9999999999", "1E+999999", "9" * 5000, "1/" + "3" * 500])
@pytest.mark.statement("last-number")
def test_a_number_that_nobody_asks_for_takes_no_time(text):
    assert numbers(f"2 + 2 = {text}")[-1] is None and CHECKS["last_number"](f"It is {text}", 4) is False
    assert numbers("1e12 and 1.5e-3")[-1] is not None
