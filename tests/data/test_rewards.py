"""Reward functions: their forms, columns, weights, failures, and calls at the same time."""

import asyncio
import contextlib
import functools
import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from configs.config import UserError
from data import rewards
from data.preferences import score_answers
from data.rewards import Failed, RewardFunction, RewardFunctions, columns_of
from models.completions import Completion

ROWS = [{"answer": "4", "level": 1}, {"answer": "6", "level": 2}]
PROMPTS, COMPLETIONS = ["2 + 2?", "3 + 3?"], ["It is 4.", "It is 5."]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(rewards, "PAUSE", 0.0)


def values(function, prompts=PROMPTS, completions=COMPLETIONS, columns=ROWS, **more):
    return RewardFunction(function, function.__name__, **more)(prompts, completions, columns)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A function (source, names, weights) -> the `RewardFunctions` of a module with this source."""
    monkeypatch.chdir(tmp_path)

    def load(source, names, weights=None):
        (tmp_path / "own.py").write_text(source)
        return RewardFunctions(",".join(f"own:{name}" for name in names), weights)

    return load


def test_a_function_of_one_completion_gets_the_columns_it_names():
    def reward(prompt, completion, answer):
        assert prompt in PROMPTS
        return float(answer in completion)

    assert values(reward) == [1.0, 0.0]


def test_a_function_of_one_completion_gets_every_column_with_kwargs():
    seen = []

    def reward(prompt, completion, **columns):
        seen.append(columns)
        return 0.5

    assert values(reward) == [0.5, 0.5]
    assert seen == ROWS


def test_a_function_in_trls_form_gets_lists_and_is_called_once():
    calls = []

    def reward(prompts, completions, answer, **kwargs):
        calls.append((prompts, kwargs))
        return [float(a in c) for a, c in zip(answer, completions)]

    assert values(reward) == [1.0, 0.0]
    assert calls == [(PROMPTS, {"level": [1, 2]})]


def test_trls_form_may_take_ids_alone_or_everything():
    def lengths(completion_ids, **kwargs):
        return [len(ids) for ids in completion_ids]

    def everything(**given):
        return [len(given["completions"])] * len(given["prompts"])

    assert RewardFunction(lengths, "lengths")(PROMPTS, COMPLETIONS, ROWS, [[1, 2], [3]]) == [2.0, 1.0]
    assert values(everything) == [2.0, 2.0]


def test_for_prompts_of_messages_trls_form_gets_messages_and_ours_gets_texts():
    asked = [[{"role": "user", "content": p}] for p in PROMPTS]

    def trl(completions, answer, **kwargs):
        return [float(a in c[0]["content"]) for a, c in zip(answer, completions)]

    def ours(prompt, completion, answer):
        return float(prompt in PROMPTS and answer in completion)

    assert values(trl, asked) == values(ours, asked) == [1.0, 0.0]


def test_objects_and_partial_functions_are_called_as_functions_are():
    class Judge:
        async def __call__(self, prompt, completion, answer):
            return float(answer in completion)

    class Judges:
        def __call__(self, completions, answer, scale=1.0):
            return [scale * (a in c) for a, c in zip(answer, completions)]

    for judge in (Judge(), Judges()):
        assert RewardFunction(judge, "judge")(PROMPTS, COMPLETIONS, ROWS) == [1.0, 0.0]
    twice = functools.partial(Judges().__call__, scale=2.0)
    assert RewardFunction(twice, "twice")(PROMPTS, COMPLETIONS, ROWS) == [2.0, 0.0]


def test_a_builtin_without_a_signature_is_called_with_prompt_and_completion():
    assert RewardFunction(str.count, "count")(["2 + 2?"], ["2"], [{}]) == [2.0]


def test_a_column_that_is_called_as_a_parameter_does_not_take_its_place():
    rows = [{"completion": "a reference"}, {"completion": "another"}]

    def ours(prompt, completion, **columns):
        return len(completion) + len(columns)

    def trl(completions, completion):
        return [len(c) + len(reference) for c, reference in zip(completions, completion)]

    assert values(ours, columns=rows) == [8.0, 8.0]
    assert values(trl, columns=rows) == [8.0 + 11, 8.0 + 7]


@pytest.mark.parametrize("found", [[1.0], [1.0, float("nan")], [1.0, "2"], 3.0, None, "ab"])
def test_a_list_of_anything_else_is_an_error_that_names_the_function(found):
    def my_reward(prompts, completions):
        return found

    with pytest.raises(UserError, match="reward my_reward must return 2 finite numbers or None"):
        values(my_reward)


@pytest.mark.parametrize(
    "value, message",
    [
        (math.nan, "returned nan, which is not a finite number"),
        (-math.inf, "returned -inf"),
        ("0.5", "returned '0.5'"),
        ([1.0], "not a number"),
    ],
)
def test_anything_else_than_a_number_or_none_is_an_error_that_names_the_function(value, message):
    def my_reward(prompt, completion):
        return value

    with pytest.raises(UserError, match=f"my_reward on prompt '2 . 2.' and completion 'It is 4.'.*{message}"):
        values(my_reward)


def test_a_column_that_no_row_has_is_an_error_that_names_those_that_are_there(functions):
    reward = functions("def f(prompt, completion, solution):\n    return 1.0\n", ["f"])
    with pytest.raises(UserError, match="reward f needs the column solution, and .* are: answer, level"):
        reward.check_columns([{"prompt": p, **row} for p, row in zip(PROMPTS, ROWS)])
    reward.check_columns([{"prompt": "p"}, {"prompt": "p", "solution": "4"}])  # one row has it
    assert reward(["p"], ["c"], [{}]).values == [1.0]  # the others then get None


def test_a_function_of_another_form_is_refused():
    with pytest.raises(UserError, match=r"takes \(completion\): it must take \(prompt, completion\)"):
        RewardFunction(lambda completion: 1.0, "f")


def test_preferences_and_inference_hand_a_reward_the_same_columns(functions):
    reward = functions("def f(prompt, completion, answer):\n    return float(answer in completion)\n", ["f"])
    row = {"id": "a", "prompt": "2 + 2?", "split": "train", "answer": "4", "checks": []}
    groups = [[Completion("4", [1], [0.0], "stop"), Completion("5", [1], [0.0], "stop")]]
    [group], left_out = score_answers([row], groups, reward)
    assert [answer.score for answer in group] == [1.0, 0.0] and not any(left_out.values())
    assert columns_of(row) == {"answer": "4"}


SEVERAL = """
def words(prompt, completion):
    return float(len(completion.split()))

def maths(prompts, completions, answer):
    return [None if a is None else float(a in c) for a, c in zip(answer, completions)]

async def later(prompts, completions):
    return [None if "5" in c else 2.0 for c in completions]
"""


@pytest.mark.statement("reward-functions")
def test_the_reward_is_the_weighted_sum_of_the_functions_that_apply(functions):
    reward = functions(SEVERAL, ["words", "maths", "later"], "0.5, 1,-1")
    columns = [{"answer": "4"}, {"answer": None}]
    scores = reward(PROMPTS, ["It is 4.", "It is 5."], columns)
    assert scores.values == [0.5 * 3 + 1 - 2, 0.5 * 3]
    assert scores.by_function == {"words": [3, 3], "maths": [1, None], "later": [2, None]}
    assert not any(scores.left_out.values())
    assert functions(SEVERAL, ["words", "maths"])(PROMPTS, COMPLETIONS, columns).values == [4.0, 3.0]  # weights are 1


@pytest.mark.statement("reward-functions")
def test_a_completion_to_which_no_function_applies_is_left_out(functions):
    reward = functions(SEVERAL, ["maths", "later"])
    scores = reward(PROMPTS, ["It is 4.", "It is 5."], [{"answer": None}] * 2)
    assert scores.values == [2.0, None] and scores.left_out == {"reward_failed": 0, "reward_none": 1}


FOR_TRL = """
def maths(prompts, completions, answer, **kwargs):
    return [None if a is None else float(a in c) for a, c in zip(answer, completions)]

async def later(prompts, completions, **kwargs):
    return [None if "5" in c else 2.0 for c in completions]
"""


@pytest.mark.statement("reward-functions")
@pytest.mark.slow
def test_the_weighted_sum_is_trls(functions, monkeypatch):
    """TRL's own method calls the functions; then it takes the nan-aware weighted sum."""
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    reward = functions(FOR_TRL, ["maths", "later"], "0.25,3")
    monkeypatch.setattr(trl, "gather", lambda x: x)
    monkeypatch.setattr(trl, "profiling_context", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(trl.logger, "warning", lambda *_: None)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")), reward_func_names=["maths", "later"],
        reward_funcs=[f.function for f in reward.functions], reward_processing_classes=[None, None], state=None,
        environments=None, async_loop=rewards.event_loop(), _log_completion_extra=None, _log_metric=None,
    )  # fmt: skip
    prompts, completions, ids = ["a", "b", "c", "d"], ["4", "5", "6", "5"], [[1]] * 4
    columns = [{"answer": answer} for answer in ("4", "5", None, None)]
    rows = [{"prompt": prompt, **row} for prompt, row in zip(prompts, columns)]
    table = trl.GRPOTrainer._calculate_rewards.__wrapped__(trainer, rows, prompts, completions, ids)
    assert table.isnan().all(1).tolist() == [False, False, False, True]
    theirs = (table * torch.tensor([0.25, 3.0])).nansum(1)
    mine = reward(prompts, completions, columns, ids)
    assert mine.values[:3] == theirs[:3].tolist() == [0.25 + 6, 0.25, 6.0]
    assert mine.values[3] is None  # TRL sets it to nan before it computes advantages
    for name, column in zip(("maths", "later"), table.T):
        assert [math.nan if x is None else x for x in mine.by_function[name]] == pytest.approx(
            column.tolist(), nan_ok=True
        )


@pytest.mark.statement("reward-functions")
def test_a_call_that_raises_is_tried_again_once(functions, capsys):
    reward = functions(
        "tried = []\ndef f(prompt, completion):\n    tried.append(completion)\n"
        "    if completion == 'bad' or tried.count(completion) == 1 and completion == 'shy':\n"
        "        raise TimeoutError('no answer')\n    return len(completion)\n",
        ["f"],
    )
    scores = reward(["one", "two", "three"], ["shy", "bad", "good"], [{}] * 3)
    assert scores.values == [3.0, None, 4.0] and scores.left_out == {"reward_failed": 1, "reward_none": 0}
    assert reward.functions[0].function.__globals__["tried"] == ["shy", "bad", "good", "shy", "bad"]
    said = capsys.readouterr().out.splitlines()
    assert said == ["reward f on prompt 'two' raised TimeoutError: no answer, twice: 1 of 3 completions are left out"]


@pytest.mark.statement("reward-functions")
def test_a_function_that_fails_leaves_its_completion_out_whatever_the_others_say(functions):
    source = SEVERAL + "def fails(prompt, completion):\n    return 1 / ('4' in completion)\n"
    scores = functions(source, ["words", "fails"])(PROMPTS, COMPLETIONS, ROWS)
    assert scores.values == [4.0, None]
    assert scores.by_function == {"words": [3.0, 3.0], "fails": [1.0, None]}


@pytest.mark.parametrize("kind", ["def f(prompt, completion)", "def f(prompts, completions)",
                                  "async def f(prompt, completion)", "async def f(prompts, completions)"])  # fmt: skip
def test_if_every_call_fails_the_error_names_function_and_reason(functions, kind):
    reward = functions(f"{kind}:\n    raise SystemExit('away')\n", ["f"])
    with pytest.raises(
        UserError, match="reward f on prompt '2 . 2.' raised SystemExit: away. Every call failed, 2 comp"
    ):
        reward(PROMPTS, COMPLETIONS, ROWS)


@pytest.mark.statement("reward-functions")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["def", "async def"])
def test_twelve_calls_that_wait_run_at_the_same_time_and_stay_in_order(form):
    at_once, most = 0, 0

    def enter(by):
        nonlocal at_once, most
        at_once += by
        most = max(most, at_once)

    def waits(prompt, completion):
        enter(1)
        time.sleep(0.2)
        enter(-1)
        return float(completion)

    async def waits_async(prompt, completion):
        enter(1)
        await asyncio.sleep(0.2)
        enter(-1)
        return float(completion)

    function = waits if form == "def" else waits_async
    numbers = [str(i) for i in range(12)]
    began = time.perf_counter()
    assert values(function, ["p"] * 12, numbers, [{}] * 12) == list(range(12))
    assert most > 4 and time.perf_counter() - began < 1.2
    at_once = most = 0
    values(function, ["p"] * 12, numbers, [{}] * 12, concurrency=1)
    assert most == 1
    at_once = most = 0
    values(function, ["p"] * 12, numbers, [{}] * 12, concurrency=3)
    assert most == 3


@pytest.mark.statement("reward-functions")
def test_calls_that_compute_stay_in_the_main_thread():
    """Some of them use signals or what belongs to a thread; threads would not make them faster."""
    threads = set()

    def computes(prompt, completion):
        threads.add(threading.current_thread())
        until = time.thread_time() + 2 * rewards.WAITED
        while time.thread_time() < until:
            pass
        return 1.0

    values(computes, ["p"] * 6, ["c"] * 6, [{}] * 6)
    assert threads == {threading.main_thread()}


def test_all_async_calls_of_a_process_share_one_event_loop():
    loops = []

    async def reward(prompts, completions):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(prompts)

    async def in_a_notebook():
        return values(reward)  # where a loop runs already

    values(reward)
    asyncio.run(in_a_notebook())
    assert len(loops) == 2 and loops[0] is loops[1]


@pytest.mark.parametrize(
    "weights, message",
    [
        ("1", "reward_weights = '1' has 1 numbers, and reward = 'own:a,own:b' has 2 functions"),
        ("1,2,3", "has 3 numbers, and reward = 'own:a,own:b' has 2 functions"),
        ("1,x", "must be numbers with commas"),
        ("1,inf", "must be numbers with commas"),
        ("1 2", "must be numbers with commas"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        rewards.parse_weights(weights, ["own:a", "own:b"])


def test_a_function_that_is_given_twice_is_refused():
    with pytest.raises(UserError, match="own:a is given twice"):
        rewards.split_specs("own:a, own:b,own:a")


def test_functions_of_one_module_share_it_and_have_names_of_their_own(functions, tmp_path):
    source = "n = []\ndef a(p, c):\n    n.append(c)\n    return 1\ndef b(p, c):\n    return len(n)\n"
    reward = functions(source, ["a", "b"])
    assert reward(["p"], ["c"], [{}]).values == [2.0]
    (tmp_path / "other.py").write_text("def a(p, c):\n    return 0\n")
    both = RewardFunctions("own:a,other:a")
    assert list(both(["p"], ["c"], [{}]).by_function) == ["own:a", "other:a"]


def test_failed_is_not_a_value():
    def reward(prompt, completion):
        raise ValueError("no")

    assert values(reward) == [Failed("ValueError: no")] * 2


@pytest.mark.statement("reward-left-out")
def test_of_many_completions_a_failed_part_is_left_out_and_the_first_part_must_not_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(rewards, "PAUSE", 0)
    monkeypatch.setattr(rewards, "AT_ONCE", 2)
    (tmp_path / "mine.py").write_text(
        "def away(prompts, completions):\n    if 'x' in completions:\n        raise OSError('away')\n"
        "    return [1.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    judge = RewardFunctions("mine:away")
    columns, ids = [{}] * 6, [[1]] * 6
    scores = judge.in_parts(["p"] * 6, ["a", "b", "x", "x", "c", "d"], columns, ids, 2)
    assert scores.values == [1.0, 1.0, None, None, 1.0, 1.0] and scores.left_out["reward_failed"] == 2
    with pytest.raises(UserError, match="Every call failed, 2 completions"):
        judge.in_parts(["p"] * 6, ["x", "x", "a", "b", "c", "d"], columns, ids, 2)
