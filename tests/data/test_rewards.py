"""Reward functions in both forms, with the columns of the prompt file."""

import pytest

from configs.config import UserError
from data.preferences import scores_of
from data.rewards import columns_of, reward_all

ROWS = [{"answer": "4", "level": 1}, {"answer": "6", "level": 2}]
PROMPTS, COMPLETIONS = ["2 + 2?", "3 + 3?"], ["It is 4.", "It is 5."]


def test_a_function_of_one_completion_gets_the_columns_it_names():
    def reward(prompt, completion, answer):
        assert prompt in PROMPTS
        return float(answer in completion)

    assert reward_all(reward, PROMPTS, COMPLETIONS, ROWS) == [1.0, 0.0]


def test_a_function_of_one_completion_gets_every_column_with_kwargs():
    seen = []

    def reward(prompt, completion, **columns):
        seen.append(columns)
        return 0.5

    assert reward_all(reward, PROMPTS, COMPLETIONS, ROWS) == [0.5, 0.5]
    assert seen == ROWS


def test_a_function_in_trls_form_gets_lists_and_is_called_once():
    calls = []

    def reward(prompts, completions, answer, **kwargs):
        calls.append((prompts, kwargs))
        return [float(a in c) for a, c in zip(answer, completions)]

    assert reward_all(reward, PROMPTS, COMPLETIONS, ROWS) == [1.0, 0.0]
    assert calls == [(PROMPTS, {"level": [1, 2]})]


def test_for_prompts_of_messages_trls_form_gets_messages_and_ours_gets_texts():
    asked = [[{"role": "user", "content": p}] for p in PROMPTS]

    def trl(completions, answer, **kwargs):
        return [float(a in c[0]["content"]) for a, c in zip(answer, completions)]

    def ours(prompt, completion, answer):
        return float(prompt in PROMPTS and answer in completion)

    assert reward_all(trl, asked, COMPLETIONS, ROWS) == reward_all(ours, asked, COMPLETIONS, ROWS) == [1.0, 0.0]


def test_a_builtin_without_a_signature_is_called_with_prompt_and_completion():
    assert reward_all(str.count, ["2 + 2?"], ["2"], [{}]) == [2.0]


@pytest.mark.parametrize("found", [[1.0], [1.0, None], [1.0, float("nan")], [1.0, "2"], 3.0, None])
def test_anything_else_than_a_finite_number_for_each_completion_is_an_error_that_names_the_function(found):
    def my_reward(prompts, completions):
        return found

    with pytest.raises(UserError, match="my_reward"):
        reward_all(my_reward, PROMPTS, COMPLETIONS, ROWS)


def test_a_column_that_the_file_lacks_is_an_error_that_names_it():
    def my_reward(prompt, completion, solution):
        return 1.0

    with pytest.raises(UserError, match="solution"):
        reward_all(my_reward, PROMPTS, COMPLETIONS, ROWS)


def test_preferences_and_inference_hand_a_reward_the_same_columns():
    def reward(prompt, completion, answer):
        return float(answer in completion)

    row = {"id": "a", "prompt": "2 + 2?", "split": "train", "answer": "4", "checks": []}
    assert scores_of(row, ["4", "5"], reward) == [1.0, 0.0]
    assert columns_of(row) == {"answer": "4"}
