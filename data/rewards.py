"""Reward functions of users: `--reward module:function`, several with commas.

A reward function has one of two forms, each as `def` or `async def`:

    reward(prompt, completion, **columns) -> float or None                          # called once per completion
    reward(prompts, completions, **columns) -> list of floats or None               # TRL's form: called once per step

None means that the function does not apply to this completion. A call that raises is tried once more, after a pause.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from configs.config import UserError, option, refuse_unused
from data.rows import text_of
from runtime.console import duration, say
from runtime.processes import gather

PAUSE = 1.0  # seconds before the calls that raised are tried again
WAITED = 0.05  # seconds: a call that takes longer, and computes in less than a tenth of its time, waits for something
AT_ONCE = 64  # completions, about, in one call of `in_parts`
LISTS = ("prompts", "completions", "completion_ids")  # parameters that tell TRL's form


@dataclass
class RewardConfig:
    """The options of all scripts that take reward functions."""

    ALIASES: ClassVar[dict] = {"judge": "reward"}
    reward: str | None = option(
        None,
        "module:function, a reward function in place of the checks (in PPO: of the reward model); several with commas",
        reads="code",
    )
    reward_weights: str | None = option(None, "a number for each reward function, with commas; none: all 1")
    reward_concurrency: int = option(
        16, "calls of a reward function that wait at the same time; 1: one after another", at_least=1, identity=False
    )

    def check(self) -> None:
        if self.reward is None:
            refuse_unused(self, ["reward_weights", "reward_concurrency"], "no reward function: give --reward")
        else:
            parse_weights(self.reward_weights, split_specs(self.reward))


def split_specs(reward: str) -> list[str]:
    """`a:f, b:g` -> ["a:f", "b:g"]. Raises UserError if one stands twice."""
    specs = [spec.strip() for spec in reward.split(",")]
    twice = next((spec for spec in specs if specs.count(spec) > 1), None)
    if twice:
        raise UserError(f"reward = {reward!r}: {twice} is given twice; --reward_weights gives it another weight")
    return specs


def parse_weights(weights: str | None, specs: list[str]) -> list[float]:
    """One weight for each reward function: the numbers of `0.5, 1`, or all 1. Raises UserError for anything else."""
    if weights is None:
        return [1.0] * len(specs)
    try:
        found = [float(word) for word in weights.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"reward_weights = {weights!r}: must be numbers with commas between them, such as 0.5,1")
    if len(found) != len(specs):
        raise UserError(
            f"reward_weights = {weights!r} has {len(found)} numbers, and reward = {','.join(specs)!r} has {len(specs)} "
            "functions: give one number for each"
        )
    return found


def load_reward(spec: str, loaded: dict[str, ModuleType] | None = None) -> Callable:
    """`module:function` -> the function.

    The module is searched in the working directory first, then on Python's import path. loaded: {name: module} of the
    modules that are not to be loaded again; the module is added. Raises UserError if the module or the function cannot
    be loaded.
    """
    loaded = {} if loaded is None else loaded
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UserError(f"reward must be module:function, such as my_reward:reward, got {spec!r}")
    if module_name not in loaded:
        loaded[module_name] = _load_module(module_name, spec)
    module = loaded[module_name]
    if function_name not in vars(module):
        raise UserError(f"reward {spec!r}: {module.__file__} has no {function_name!r}")
    function = vars(module)[function_name]
    if not callable(function):
        raise UserError(f"reward {spec!r}: {function_name} is a {type(function).__name__}, not a function")
    return function


def _load_module(module_name, spec):
    stem = Path.cwd().joinpath(*module_name.split("."))
    own = [file for file in (stem.with_name(stem.name + ".py"), stem / "__init__.py") if file.is_file()]
    try:
        if own:
            module_spec = importlib.util.spec_from_file_location(module_name, own[0])
            assert module_spec and module_spec.loader, own[0]
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_name] = module  # dataclasses and pickle look it up by name
            module_spec.loader.exec_module(module)
            return module
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        reason = (
            f"{own[0]} imports it; for modules beside it set PYTHONPATH=." if own else f"{stem}.py is no file either"
        )
        raise UserError(f"reward {spec!r}: Python finds no module {error.name!r}, and {reason}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {spec!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error


def columns_of(row: dict) -> dict:
    """The columns of a prompt's row that a reward function may ask for."""
    return {key: value for key, value in row.items() if key not in ("id", "prompt", "split", "checks")}


@dataclass
class Failed:
    """What came of a call that raised twice."""

    error: str


class RewardFunction:
    """One reward function: its form, and its values for a list of completions."""

    def __init__(self, function: Callable, name: str, concurrency: int = 16):
        """name: for messages and metrics. concurrency: how many calls may wait at the same time."""
        self.function, self.name, self.concurrency = function, name, concurrency
        call = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
        self.is_async = any(map(inspect.iscoroutinefunction, (function, call)))
        self.waits = False  # whether a call was seen to wait; the next ones then run in threads
        try:
            parameters = dict(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # a builtin without a signature
            parameters = {}
        kinds = [p.kind for p in parameters.values()]
        by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        places = [key for key, p in parameters.items() if p.kind in by_place]
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.in_lists = any(key in parameters for key in LISTS) or (kinds == [inspect.Parameter.VAR_KEYWORD])
        if parameters and not self.in_lists and len(places) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise UserError(
                f"reward {name} takes ({', '.join(parameters)}): it must take (prompt, completion), or the lists "
                "(prompts, completions) of TRL"
            )
        given = LISTS if self.in_lists else places[:2]
        self.given = [key for key in LISTS if self.takes_all or key in parameters]
        self.named = {
            key: p
            for key, p in parameters.items()
            if key not in given and p.kind in (*by_place, inspect.Parameter.KEYWORD_ONLY)
        }
        self.not_columns = set(given)

    def check_columns(self, columns: Sequence[dict]) -> None:
        """Raise UserError if the function needs a column that no row has."""
        there = list(dict.fromkeys(key for row in columns for key in row))
        lacks = [key for key, p in self.named.items() if p.default is inspect.Parameter.empty and key not in there]
        if lacks:
            names = f"the columns beside the prompt are: {', '.join(there)}" if there else "there is only the prompt"
            raise UserError(f"reward {self.name} needs the column {', '.join(lacks)}, and {names}")

    def __call__(self, prompts: list, completions: list[str], columns: list[dict], ids: list | None = None) -> list:
        """For each completion: its value, None if the function does not apply, or a `Failed`.

        Raises UserError, naming the function, for a value that is no finite number.
        """
        calls = self._calls(prompts, completions, columns, ids)
        outcomes = self._round(calls)
        again = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Failed)]
        if again:
            time.sleep(PAUSE)
            for i, outcome in zip(again, self._round([calls[i] for i in again])):
                outcomes[i] = outcome
        if self.in_lists:
            return self._values_of_list(outcomes[0], len(completions))
        return [self._value(*row) for row in zip(outcomes, prompts, completions)]

    def _calls(self, prompts, completions, columns, ids):
        """The calls, as functions without arguments: one for TRL's form, else one per completion."""
        needed = [key for key, p in self.named.items() if p.default is inspect.Parameter.empty]
        there = {key for row in columns for key in row if self.takes_all or key in self.named}
        names = sorted((there | set(needed)) - self.not_columns)
        if self.in_lists:
            said = [
                [{"role": "assistant", "content": c}] if isinstance(p, list) else c
                for p, c in zip(prompts, completions)
            ]
            lists = {"prompts": prompts, "completions": said} | ({} if ids is None else {"completion_ids": ids})
            given = {key: lists[key] for key in self.given if key in lists}
            more = {key: [row.get(key) for row in columns] for key in names}
            return [functools.partial(self.function, **given, **more)]
        return [
            functools.partial(
                self.function, text_of(p), c, **{key: row.get(key) for key in names if key in row or key in needed}
            )
            for p, c, row in zip(prompts, completions, columns)
        ]

    def _round(self, calls):
        """The outcomes of all calls, in order. See docs/data-formats.md for what runs at the same time."""
        if self.is_async:
            return asyncio.run_coroutine_threadsafe(self._all_async(calls), event_loop()).result()
        outcomes = []
        for call in calls:
            if self.waits:
                break
            began, computed = time.perf_counter(), time.thread_time()
            outcomes.append(_outcome(call))
            took, computed = time.perf_counter() - began, time.thread_time() - computed
            self.waits = self.concurrency > 1 and took > WAITED and computed < took / 10
        rest = calls[len(outcomes) :]
        if not rest:
            return outcomes
        pool = ThreadPoolExecutor(min(self.concurrency, len(rest)))
        try:
            return outcomes + list(pool.map(_outcome, rest))
        finally:
            pool.shutdown(cancel_futures=True)

    async def _all_async(self, calls):
        free = asyncio.Semaphore(self.concurrency)

        async def outcome(call):
            async with free:
                try:
                    return await call()
                except (Exception, SystemExit, asyncio.CancelledError) as error:
                    return Failed(_said(error))

        return await asyncio.gather(*map(outcome, calls))

    def _value(self, outcome, prompt, completion):
        if outcome is None or isinstance(outcome, Failed):
            return outcome
        value = _number(outcome)
        if value is None or not math.isfinite(value):
            kind = "a number" if value is None else "a finite number"
            where = f"reward {self.name} on prompt {text_of(prompt)!r} and completion {completion!r}"
            raise UserError(f"{where} returned {outcome!r}, which is not {kind}")
        return value

    def _values_of_list(self, outcome, count):
        if isinstance(outcome, Failed):
            return [outcome] * count
        try:
            values = [None if x is None else _number(x) for x in outcome]
            bad = any(x is not None and (v is None or not math.isfinite(v)) for x, v in zip(outcome, values))
        except TypeError:  # not a list
            values, bad = [], True
        if bad or len(values) != count:
            wanted = f"{count} finite numbers or None, one a completion"
            raise UserError(f"reward {self.name} must return {wanted}, not {outcome!r}"[:300])
        return values


def _number(value):
    """The value as a float: NaN for a text, None for what is no number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(value)
    except Exception:
        return None


def _outcome(call):
    try:
        return call()
    except (Exception, SystemExit) as error:
        return Failed(_said(error))


def _said(error):
    """An exception in one line, at most 300 characters: servers answer with whole pages."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all async reward functions, in a thread of its own.

    There is one loop until the process ends, because a client that a reward function keeps belongs to its loop. It is
    not in the main thread, because a notebook has a loop there.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async rewards", daemon=True).start()
    return loop


@dataclass
class Scores:
    """The rewards of N completions.

    values: for each completion the weighted sum; None if it is left out. by_function: {name: the values of one
    function, None where there is none}. left_out: {"reward_failed", "reward_none": numbers of completions}.
    """

    values: list[float | None]
    by_function: dict[str, list[float | None]]
    left_out: dict[str, int]


class RewardFunctions:
    """All reward functions of a run: the reward of a completion is the weighted sum of those that apply to it."""

    def __init__(self, reward: str, weights: str | None = None, concurrency: int = 16):
        """reward, weights, concurrency: the options of `RewardConfig`. Raises UserError for what cannot be loaded."""
        specs = split_specs(reward)
        self.weights = parse_weights(weights, specs)
        loaded: dict[str, ModuleType] = {}
        functions = [load_reward(spec, loaded) for spec in specs]
        short = [spec.partition(":")[2] for spec in specs]
        names = [name if short.count(name) == 1 else spec for name, spec in zip(short, specs)]
        self.functions = [RewardFunction(f, name, concurrency) for f, name in zip(functions, names)]

    def check_columns(self, rows: list[dict]) -> None:
        """Raise UserError if a function needs a column that no row (of prompts) has. Call it before the work."""
        for function in self.functions:
            function.check_columns([columns_of(row) for row in rows])

    def __call__(
        self, prompts: list, completions: list[str], columns: list[dict], ids: list | None = None, before: int = 0
    ) -> Scores:
        """The `Scores` of completions.

        prompts: texts, or lists of messages; TRL's form then gets its completions as lists of one assistant message.
        columns: for each completion the other columns of its prompt's row. ids: the token ids of each completion.
        A completion is left out if a function raised for it twice, or if all functions return None. In a run of several
        processes all must call this at the same time.
        before: how many completions did not fail in earlier calls for the same work.
        Raises UserError in all processes, naming the function, if one returns something else than a finite number or
        None, and if every completion of all processes failed and `before` is 0.
        """
        found, refusal, first = [], None, None
        try:
            found = [function(prompts, completions, columns, ids) for function in self.functions]
        except UserError as error:
            refusal = str(error)
        rows = list(zip(*found)) if refusal is None else []
        failed = [any(isinstance(x, Failed) for x in row) for row in rows]
        values = [None if bad else self._sum(row) for row, bad in zip(rows, failed)]
        if any(failed):
            place = failed.index(True)
            name, why = next((f.name, x.error) for f, x in zip(self.functions, rows[place]) if isinstance(x, Failed))
            prompt = " ".join(text_of(prompts[place]).split())
            first = f"reward {name} on prompt {prompt[:60]!r} raised {why}"
        none = sum(value is None for value in values) - sum(failed)
        self._report(gather((refusal, first, len(rows), sum(failed))), before)
        by_function = {
            f.name: [None if isinstance(x, Failed) else x for x in column] for f, column in zip(self.functions, found)
        }
        return Scores(values, by_function, {"reward_failed": sum(failed), "reward_none": none})

    def in_parts(self, prompts: list, completions: list[str], columns: list[dict], ids: list, samples: int) -> Scores:
        """The `Scores` of many completions, `samples` of each prompt, in calls of about AT_ONCE completions.

        Prints the progress. A call in TRL's form that raises twice costs one part.
        """
        size = max(1, AT_ONCE // samples) * samples
        values: list[float | None] = []
        by_function: dict[str, list[float | None]] = {f.name: [] for f in self.functions}
        left_out: Counter[str] = Counter()
        began = said = time.time()
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            before = len(values) - left_out["reward_failed"]
            scores = self(prompts[part], completions[part], columns[part], ids[part], before)
            values += scores.values
            left_out.update(scores.left_out)
            for name, found in scores.by_function.items():
                by_function[name] += found
            now = time.time()
            if now - said >= 5:
                said, left = now, (now - began) / len(values) * (len(completions) - len(values))
                say(f"rewards {len(values):>6,}/{len(completions):,} | {duration(now - began)} | eta {duration(left)}")
        return Scores(values, by_function, dict(left_out))

    def _sum(self, row):
        """The weighted sum of the values that are there; None if there are none."""
        terms = [weight * x for weight, x in zip(self.weights, row) if x is not None]
        return sum(terms) if terms else None

    def _report(self, everywhere, before):
        """Raise what must end the run in all processes, or print what was left out. everywhere: of all processes."""
        refusals = [refusal for refusal, *_ in everywhere if refusal]
        if refusals:
            raise UserError(refusals[0])
        firsts = [first for _, first, *_ in everywhere if first]
        rows, failed = (sum(counts) for counts in list(zip(*everywhere))[2:])
        if failed and failed == rows and not before:
            raise UserError(f"{firsts[0]}. Every call failed, {rows} completions, and each was tried twice")
        if failed:
            say(f"{firsts[0]}, twice: {failed} of {rows} completions are left out")


def reward_functions(config: Any) -> RewardFunctions | None:
    """The `RewardFunctions` of a configuration with the options of `RewardConfig`; None if it names none."""
    if config.reward is None:
        return None
    return RewardFunctions(config.reward, config.reward_weights, config.reward_concurrency)


def in_numbers(left_out: dict[str, int]) -> str:
    """`3 completions (reward_failed 2, reward_none 1)`, for messages. Empty if there are none."""
    why = ", ".join(f"{key} {number}" for key, number in left_out.items() if number)
    return f"{sum(left_out.values())} completions ({why})" if why else ""
