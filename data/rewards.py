"""Reward functions of users, given as `module:function` on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from pathlib import Path

from configs.config import UserError


def load_reward(spec: str):
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


def call_reward(function, prompt: str, completion: str) -> float:
    """The reward as a finite float. Raises UserError, naming function, prompt and completion, for any other result."""
    name = getattr(function, "__qualname__", repr(function))
    where = f"reward {name} on prompt {prompt!r} and completion {completion!r}"
    try:
        value = function(prompt, completion)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
    try:
        result = math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception as error:
        raise UserError(f"{where} returned {value!r}, which is not a number") from error
    if not math.isfinite(result):
        raise UserError(f"{where} returned {value!r}, which is not a finite number")
    return result
