"""One flat dataclass per script is schema, default and documentation; a YAML is one run; the command line is an edit.

    @dataclass
    class Config:
        CONFIG: ClassVar[str] = "configs/dpo.yaml"          # read when no --config is given
        lr: float = option(1e-4, "peak learning rate", above=0)
        loss_type: Literal["sigmoid", "ipo"] = option("sigmoid", "which DPO loss")

    config = load_config(Config)        # defaults < YAML < --lr 3e-4

Unknown keys, wrong types, values out of range and options that contradict each other raise `UserError`, which
`cli` of runtime/cli.py prints as one message and turns into exit status 2. This file imports nothing of the project.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2**32 - 1  # of whole numbers: seeds and steps are multiplied in 64 bits


class UserError(ValueError):
    """A mistake in what the user gave (a key, a file, a row). The message says what is wrong and what is allowed."""


def shown(path: Path) -> str:
    """A path as a person would type it from the repository's root."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def option(
    default: Any,
    help: str = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    identity: bool = True,
    reads: bool | str = False,
) -> Any:
    """A dataclass field with its documentation, its allowed range, and what it means to a run.

    at_least, at_most, above, below: the range (at_*: inclusive).
    identity: whether the value decides what the run computes. A folder that holds a run with another value of such a
        key is refused; other keys only say how a run is watched, or where it goes.
    reads: whether the value may name a file or a folder that the run reads: its content is hashed, and is part of the
        run's identity, too. "code": it names a function, `module:function`, whose file is hashed.
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    limits = {key: value for key, value in limits.items() if value is not None}
    return field(default=default, metadata={"help": help, "identity": identity, "reads": reads, **limits})


def options(Config: Any) -> dict[str, Any]:
    """{name: what `option` said of it} of a dataclass (or an instance of one).

    A class that gives an inherited option another default (`out: str = "models/dpo"`) need not say the rest again.
    """
    kind = Config if isinstance(Config, type) else type(Config)
    found = {}
    for f in dataclasses.fields(kind):
        levels = [vars(c).get("__dataclass_fields__", {}) for c in kind.__mro__]
        said = (level[f.name].metadata for level in levels if f.name in level and level[f.name].metadata)
        found[f.name] = next(said, f.metadata)
    return found


def names_with(Config: Any, **said) -> list[str]:
    """The names of the options of which `option` was told this: names_with(Config, reads=True)."""
    wanted = said.items()
    return [name for name, metadata in options(Config).items() if wanted <= metadata.items()]


def load_config(Config: Any, argv: list[str] | None = None) -> Any:
    """Build `Config` from its defaults, then a YAML file, then the command line; later ones win.

    Config: a dataclass; its class attribute CONFIG names the YAML that is read when `--config` is not given, and its
        method `check(self)`, where it has one, raises UserError for options that contradict each other. Its class
        attribute RENAMED = {old name: new name} tells users of a key by its old name what it is called now, and ALIASES
        = {other name: name} takes a key by another name. ONE_OF names keys of which one is given: a level that sets one
        of them takes back what the levels before it set in the others. NOTE is a text that `--help` shows. WORDS names
        the option, a tuple of texts, that takes the words without a key: `doctor.py models/dpo models/grpo`.
    argv: the arguments after the script's name (default: sys.argv[1:]): `--key value`, `--key=value`, `--config PATH`.
    Raises UserError (a ValueError) naming the key and what is allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    edits, path = _parse_command_line(Config, argv)
    if path is None and getattr(Config, "CONFIG", None):
        path = ROOT / Config.CONFIG
    values = {} if path is None else _values(Config, path)
    edited = {key: _cast(Config, key, value, "on the command line") for key, value in edits.items()}
    values = _only_one(Config, _only_one(Config, {}, values), edited)
    config = Config(**values)
    for name, metadata in options(Config).items():  # a bad default is a bug of ours: found by the same check
        _check_range(name, metadata, getattr(config, name))
    if callable(getattr(config, "check", None)):
        config.check()
    return config


def changed(config: Any) -> dict[str, Any]:
    """{key: value} of the options that differ from what the script takes when no option is given."""
    Config = type(config)
    path = getattr(Config, "CONFIG", None)
    usual = vars(Config(**_only_one(Config, {}, _values(Config, ROOT / path) if path else {})))
    return {key: value for key, value in config_to_dict(config).items() if value != usual[key]}


def _values(Config, path):
    """{option: value} in a YAML file, each as its field's type."""
    values = {}
    for key, value in read_yaml(path).items():
        name = _field(Config, key, f"in {shown(path)}").name
        if name in values:
            raise UserError(f"{shown(path)}: {name} is given twice, also as {key}")
        values[name] = _cast(Config, key, value, f"in {shown(path)}")
    return values


def _only_one(Config, before, values):
    """`before | values`, without the keys of `before` and the defaults that a key of ONE_OF in `values` replaces."""
    group = getattr(Config, "ONE_OF", ())
    given = [key for key in group if values.get(key) is not None]
    return before | {key: None for key in group if given} | values


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file, read with the safe loader. Raises UserError naming the file and line."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file. The project's own are in {shown(ROOT / 'configs')}/")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{shown(path)}{where}: not valid YAML ({what}); it takes one `key: value` a line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{shown(path)}: must be a mapping of keys to values, one `key: value` a line")
    _refuse_equal_keys(yaml.compose(text, Loader=yaml.SafeLoader), shown(path))
    return content


def _refuse_equal_keys(root, name):
    """Raise UserError if a mapping of a YAML has a key twice: the library keeps the last one."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):  # an alias is the node that it names
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"{name} line {line}: {key.value} stands in line {lines[key.value]} already")
            lines[key.value] = line
            nodes.append(value)


def refuse_unused(config: Any, keys: Iterable[str], because: str) -> None:
    """Raise UserError if one of these keys was set: they have no effect, `because` of another."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    for key in keys:
        if getattr(config, key) != defaults[key]:
            raise UserError(f"{key} = {getattr(config, key)!r} has no effect with {because}")


def config_to_dict(config: Any) -> dict:
    return dataclasses.asdict(config)


def format_config(config: Any) -> str:
    """`key: value` lines that `read_yaml` reads back to the same configuration."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, default_flow_style=False)


def _parse_command_line(Config, argv):
    """`--key value` pairs as a dict, and the path given by --config."""
    edits, path, i = {}, None, 0
    while i < len(argv):
        word = argv[i]
        if word in ("-h", "--help"):
            print(usage(Config))
            sys.exit(0)
        alone = getattr(Config, "WORDS", None)
        if not word.startswith("--") and alone:
            if isinstance(edits.get(alone), str):
                raise UserError(f"{word!r} on the command line: --{alone} was given already")
            edits[alone] = (*edits.get(alone, ()), word)
            i += 1
            continue
        if not word.startswith("--"):
            raise UserError(f"{word!r} on the command line: options are written --key value (see --help)")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if key != "config":
            key = _field(Config, key, "on the command line").name  # an unknown key before a missing value
        if not equals:
            i += 1
            if i >= len(argv) or (argv[i].startswith("--") and len(argv[i]) > 2):
                raise UserError(f"--{key} needs a value: --{key} {'PATH' if key == 'config' else 'VALUE'}")
            value = argv[i]
        if key in edits or (key == "config" and path):
            raise UserError(f"--{key} is given twice on the command line")
        if key == "config":
            path = Path(value)
        else:
            edits[key] = value
        i += 1
    return edits, path


def usage(Config: Any) -> str:
    """The help text: every key with its default (after the YAML), what it takes and what it does."""
    path = getattr(Config, "CONFIG", None)
    in_yaml = read_yaml(ROOT / path) if path else {}
    doc = (sys.modules[Config.__module__].__doc__ or "").strip()
    note = getattr(Config, "NOTE", "")
    lines = [doc, "", *([note, ""] if note else [])]
    lines.append(f"options (defaults: {path or 'below'}; --config PATH reads another file)")
    said = options(Config)
    for f in dataclasses.fields(Config):
        default = in_yaml.get(f.name, f.default)
        allowed = _describe(Config, f)
        lines.append(f"  --{f.name} {default!r}".ljust(34) + f"  {said[f.name].get('help', '')} [{allowed}]")
    return "\n".join(lines)


def _field(Config, key, where):
    fields = {f.name: f for f in dataclasses.fields(Config)}
    key = _of_all_bases(Config, "ALIASES").get(key, key)
    if key in fields:
        return fields[key]
    renamed = _of_all_bases(Config, "RENAMED")
    if key in renamed:
        raise UserError(f"unknown key {key!r} {where}: it is now {renamed[key]}")
    near = difflib.get_close_matches(str(key), list(fields) + ["config"], n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"unknown key {str(key)!r} {where}.{hint} The keys are: {', '.join(fields)}")


def _of_all_bases(Config, name):
    """The union of the dicts that a class and its bases have under this name; the class comes first."""
    found = {}
    for kind in reversed(Config.__mro__):
        found |= vars(kind).get(name, {})
    return found


def _cast(Config, key, value, where):
    """`value` as the field's type. YAML reads 3e-4 as a string and `on` as a boolean; the command line has strings."""
    f = _field(Config, key, where)
    kind = typing.get_type_hints(Config)[f.name]
    wrong = UserError(f"{key} = {value!r} {where}: must be {_describe(Config, f)}")
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise wrong
        return value
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise wrong
        return value
    if kind is str:
        if isinstance(value, (bool, dict, list)) or value is None:
            raise UserError(f"{key} = {value!r} {where}: must be text; put it in quotes")
        if "\0" in str(value) or (f.default and not str(value).strip()):  # an empty path would be the working directory
            raise UserError(f"{key} = {value!r} {where}: must be text that is not empty")
        return str(value)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise wrong
        try:
            number = float(value)
        except ValueError:
            raise wrong from None
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise wrong
        if kind is int and abs(number) > LARGEST:
            raise UserError(f"{key} = {value!r} {where} is out of range: whole numbers go up to {LARGEST}")
        return kind(number)
    if typing.get_origin(kind) is tuple:
        found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
        if not found or not all(isinstance(text, str) and text.strip("\0 ") for text in found):
            raise wrong
        return found
    if kind is dict:
        found = _mapping(value)
        if not found:
            raise wrong
        return found
    raise AssertionError(f"configuration field {key}: type {kind} is not supported")


def _mapping(value):
    """A mapping from a YAML, or its JSON text, as a dict of JSON values. None for anything else."""
    try:
        found = json.loads(value, object_pairs_hook=_without_equal_keys) if isinstance(value, str) else value
        same = json.loads(json.dumps(found, allow_nan=False)) == found  # a date of a YAML is no JSON, a number no key
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) and same else None


def _without_equal_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _check_range(name, m, value):
    if value is None or isinstance(value, str):
        return
    bad = (
        ("at_least" in m and value < m["at_least"])
        or ("at_most" in m and value > m["at_most"])
        or ("above" in m and value <= m["above"])
        or ("below" in m and value >= m["below"])
    )
    if bad:
        raise UserError(f"{name} = {value!r} is out of range: must be {_limits(m)}")


def _limits(metadata):
    words = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
    return " and ".join(f"{words[k]} {metadata[k]}" for k in words if k in metadata)


def _describe(Config, f):
    """What the field takes, in words: 'a number above 0', 'one of a, b', 'true or false'."""
    kind = typing.get_type_hints(Config)[f.name]
    tail = ""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        tail = ", or none"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(v) for v in typing.get_args(kind)) + tail
    if typing.get_origin(kind) is tuple:
        return "one text or several"
    mapping = 'a mapping that is not empty, as JSON on the command line: {"name": value}'
    name = {bool: "true or false", str: "text", int: "a whole number", float: "a number", dict: mapping}[kind]
    limits = _limits(options(Config)[f.name])
    return name + (f" {limits}" if limits else "") + tail
