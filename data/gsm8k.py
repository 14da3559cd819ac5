"""A reward function for GSM8K (Cobbe et al. 2021): 1 where the last number of a completion is that of the `answer`.

    python rlhf/grpo_train.py --config configs/gpu/gsm8k_0.5b_h100.yaml

`answer` is the column of the data set: the steps, and after `####` the number. In a completion `#### 72`, `\\boxed{72}`
and `The answer is $72.00.` are all right: numbers are read by data/checks.py.
"""

from __future__ import annotations

from data.checks import numbers

MARK = "####"


def reward(prompt: str, completion: str, answer: str) -> float:
    """1.0 if the last number of the completion is that of the answer, else 0.0.

    Raises ValueError for an answer that has no number after `####`.
    """
    _, mark, final = answer.rpartition(MARK)
    right = numbers(final)[-1:]
    if not mark or right in ([], [None]):
        raise ValueError(f"answer = {answer[-60:]!r}: GSM8K ends it with {MARK} and a number")
    return float(numbers(completion)[-1:] == right)
