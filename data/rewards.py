"""Reward functions of users, given as `module:function` on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path

from configs.config import UserError
from data.prompts import text_of


def load_reward(spec: str) -> Callable:
    """`module:function` -> a callable reward(prompt, completion) -> float.

    The module is searched in the working directory first, then on Python's import path. Raises UserError if the module
    or the function cannot be loaded.
    """
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UserError(f"reward must be module:function, such as my_reward:reward, got {spec!r}")
    stem = Path.cwd().joinpath(*module_name.split("."))
    own = [file for file in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if file.is_file()]
    try:
        if own:
            module_spec = importlib.util.spec_from_file_location(module_name, own[0])
            assert module_spec and module_spec.loader, own[0]
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module  # dataclasses and pickle look it up by name
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        reason = (
            f"{own[0]} imports it; for modules beside it set PYTHONPATH=." if own else f"{stem}.py is no file either"
        )
        raise UserError(f"reward {spec!r}: Python finds no module {error.name!r}, and {reason}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {spec!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    if function_name not in vars(module):
        raise UserError(f"reward {spec!r}: {module.__file__} has no {function_name!r}")
    function = vars(module)[function_name]
    if not callable(function):
        raise UserError(f"reward {spec!r}: {function_name} is a {type(function).__name__}, not a function")
    return function


def call_reward(function: Callable, prompt: str, completion: str, **columns) -> float:
    """The reward as a finite float. Raises UserError, naming function, prompt and completion, for any other result."""
    name = getattr(function, "__qualname__", repr(function))
    where = f"reward {name} on prompt {prompt!r} and completion {completion!r}"
    try:
        value = function(prompt, completion, **columns)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    try:
        result = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception as error:
        raise UserError(f"{where} returned {value!r}, which is not a number") from error
    if not math.isfinite(result):
        raise UserError(f"{where} returned {value!r}, which is not a finite number")
    return result


def columns_of(row: dict) -> dict:
    """The columns of a prompt's row that a reward function may ask for."""
    return {key: value for key, value in row.items() if key not in ("id", "prompt", "split", "checks")}


def reward_all(function: Callable, prompts: list, completions: list[str], columns: list[dict]) -> list[float]:
    """The rewards of completions, in order.

    function: `(prompt, completion) -> float`, or TRL's `(prompts, completions, **columns) -> list of floats`, told by
        the names of its parameters. Either gets the columns of the prompt file that it has parameters for (all of them
        with **kwargs): a value for the first form, a list for the second. If a prompt is messages, the second form gets
        its completion as TRL gives it: a list of one assistant message.
    prompts: texts, or lists of messages. columns: for each completion the other columns of its prompt's row.
    Raises UserError, naming the function, for anything else than a finite number for each completion.
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        parameters = {}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    names = {key for row in columns for key in row if takes_all or key in parameters}
    if "completions" not in parameters:
        pick = [{key: row[key] for key in names if key in row} for row in columns]
        return [call_reward(function, text_of(p), c, **more) for p, c, more in zip(prompts, completions, pick)]
    name = getattr(function, "__qualname__", repr(function))
    lists = {key: [row.get(key) for row in columns] for key in names}
    given = [[{"role": "assistant", "content": c}] if isinstance(p, list) else c for p, c in zip(prompts, completions)]
    try:
        found = function(prompts=prompts, completions=given, **lists)
        values = [math.nan if isinstance(x, (str, bytes)) or x is None else float(x) for x in found]
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {name} on {len(completions)} completions raised {type(error).__name__}: {error}"
        ) from error
    if len(values) != len(completions) or not all(map(math.isfinite, values)):
        raise UserError(
            f"reward {name} must return {len(completions)} finite numbers, one a completion, not {found!r}"[:300]
        )
    return values
