"""The schema loader: precedence, casting, and messages that name the key."""

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from configs.config import UserError, format_config, load_config, names_with, option, options, read_yaml, usage

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Config:
    lr: float = option(1e-3, "learning rate", above=0)
    steps: int = option(10, "steps", at_least=1, at_most=100)
    flag: bool = option(False, "a flag")
    kind: Literal["a", "b"] = option("a", "a choice")
    name: str = option("x", "a name")
    extra: float | None = option(None, "may be none", above=0)

    def check(self):
        if self.flag and self.kind == "b":
            raise UserError("flag has no effect with kind = b")


def test_defaults_then_yaml_then_command_line(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 3e-4\nsteps: 20\nflag: on\n")
    config = load_config(Config, ["--config", str(tmp_path / "c.yaml"), "--steps=30", "--extra", "2"])
    assert config == Config(lr=3e-4, steps=30, flag=True, extra=2.0)
    assert load_config(Config, []) == Config()
    assert load_config(Config, ["--extra", "none"]).extra is None


def test_what_is_saved_reads_back(tmp_path):
    config = Config(lr=5e-05, name="on", extra=0.5)
    (tmp_path / "c.yaml").write_text(format_config(config))
    assert load_config(Config, ["--config", str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lrr", "1"], "unknown key 'lrr' on the command line. Did you mean 'lr'"),
        (["--lr", "fast"], "lr = 'fast' on the command line: must be a number above 0"),
        (["--lr", "0"], "lr = 0.0 is out of range: must be above 0"),
        (["--lr", "nan"], "must be a number above 0"),
        (["--steps", "2.5"], "must be a whole number at least 1 and at most 100"),
        (["--steps", "101"], "steps = 101 is out of range"),
        (["--flag", "maybe"], "flag = 'maybe' on the command line: must be true or false"),
        (["--kind", "c"], "must be one of a, b"),
        (["--lr"], "--lr needs a value"),
        (["lr", "1"], "options are written --key value"),
        (["--lr", "1", "--lr", "2"], "--lr is given twice"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--flag", "true", "--kind", "b"], "flag has no effect with kind = b"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        load_config(Config, arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: [1]", "lr = [1] in"),
        ("- lr", "must be a mapping"),
        ("lr: 1\n  x: : 2", "line 2: not valid YAML"),
        ("name: no", "must be text; put it in quotes"),
        ("steps: true", "must be a whole number"),
    ],
)
def test_mistakes_in_a_yaml_are_named(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(Config, ["--config", str(tmp_path / "c.yaml")])
    assert message in str(error.value)


def test_a_yaml_that_is_not_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"lr: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(tmp_path / "c.yaml")


SCRIPTS = {
    "train_base": "train.train_lm", "train_scratch": "train.train_lm", "sft": "train.train_lm_lora",
    "preferences": "data.generate_preferences", "preferences_multi": "data.generate_preferences_multi",
    "reward": "rlhf.train_reward_model", "dpo": "rlhf.dpo_train", "ppo": "rlhf.ppo_train", "grpo": "rlhf.grpo_train",
    **{f"gsm8k_{size}_{gpu}": "rlhf.grpo_train" for size in ("0.5b", "1.5b") for gpu in ("t4", "h100")},
    "ultrafeedback_dpo": "rlhf.dpo_train", "grpo_offline": "rlhf.grpo_train",
    "evaluate": "report.evaluate", "compare": "report.compare",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_yaml_loads(path, monkeypatch):
    if path.stem == "inference":
        spec = importlib.util.spec_from_file_location("inference_script", ROOT / "inference" / "inference.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look up the types of its fields
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(SCRIPTS[path.stem])
    load_config(module.Config, ["--config", str(path)])


def test_a_class_attribute_names_the_yaml_that_is_read_by_itself():
    @dataclass
    class Own:
        CONFIG: ClassVar[str] = "configs/dpo.yaml"
        beta: float = option(0.3, "")

    with pytest.raises(UserError, match="unknown key 'model_name' in .*dpo.yaml"):
        load_config(Own, [])


@dataclass
class Shared:
    steps: int = option(10, "how many", at_least=1, at_most=100, identity=False)
    data: str = option("text", "what is read", reads=True)
    lr: float = option(1e-3, "peak", above=0)


@dataclass
class Method(Shared):
    steps: int = 20
    data: str = "pairs"
    beta: float = option(0.1, "of the KL", at_least=0)


@dataclass
class Variant(Method):
    data: str = "groups"
    lr: float = option(1e-4, "peak of the variant", above=0, below=1)


@pytest.mark.parametrize("kind", [Method, Variant, Variant()])
def test_another_default_leaves_help_range_identity_and_reads_of_an_inherited_option(kind):
    said, inherited = options(kind), options(Shared)
    assert list(said) == ["steps", "data", "lr", "beta"]
    assert said["steps"] == inherited["steps"]
    assert said["steps"] == {"help": "how many", "identity": False, "reads": False, "at_least": 1, "at_most": 100}
    assert said["data"] == inherited["data"] == {"help": "what is read", "identity": True, "reads": True}
    assert said["beta"] == {"help": "of the KL", "identity": True, "reads": False, "at_least": 0}


def test_an_option_that_is_said_anew_replaces_the_inherited_one():
    assert options(Method)["lr"] == options(Shared)["lr"]
    expected = {"help": "peak of the variant", "identity": True, "reads": False, "above": 0, "below": 1}
    assert options(Variant)["lr"] == expected


def test_the_inherited_range_holds_for_the_new_default_and_is_in_the_help():
    assert load_config(Method, []) == Method(steps=20, data="pairs")
    with pytest.raises(UserError, match="steps = 101 is out of range: must be at least 1 and at most 100"):
        load_config(Method, ["--steps", "101"])
    (line,) = (line for line in usage(Method).splitlines() if line.startswith("  --steps"))
    assert " ".join(line.split()) == "--steps 20 how many [a whole number at least 1 and at most 100]"

    @dataclass
    class OutOfRange(Shared):
        steps: int = 0

    with pytest.raises(UserError, match="steps = 0 is out of range"):
        load_config(OutOfRange, [])


@pytest.mark.parametrize("kind", [Shared, Method, Variant, Variant()])
def test_names_with_are_those_of_which_all_of_it_was_said(kind):
    own = [] if kind is Shared else ["beta"]
    assert names_with(kind, identity=False) == ["steps"]
    assert names_with(kind, reads=True) == ["data"]
    assert names_with(kind, identity=True) == ["data", "lr", *own]
    assert names_with(kind, identity=True, reads=False) == ["lr", *own]
    assert names_with(kind, identity=False, reads=True) == []
    assert names_with(kind, at_least=1) == ["steps"]


@dataclass
class Older:
    RENAMED: ClassVar[dict] = {"size": "batch_size", "passes": "batch_size (rows) and epochs"}
    ALIASES: ClassVar[dict] = {"dataset": "data"}
    batch_size: int = option(4, "rows", at_least=1)
    epochs: int = option(1, "passes", at_least=1)
    data: str = option("text", "what is read")


@dataclass
class Newer(Older):
    RENAMED: ClassVar[dict] = {"tau": "beta"}
    ALIASES: ClassVar[dict] = {"kl": "beta"}
    beta: float = option(0.1, "of the KL", at_least=0)


@pytest.mark.parametrize(
    "Config, key, new",
    [
        (Older, "size", "batch_size"),
        (Newer, "size", "batch_size"),  # of the base
        (Newer, "passes", "batch_size (rows) and epochs"),
        (Newer, "tau", "beta"),
    ],
)
def test_a_key_by_its_old_name_is_an_error_that_names_the_new_one(Config, key, new, tmp_path):
    with pytest.raises(UserError) as error:
        load_config(Config, [f"--{key}", "8"])
    assert str(error.value) == f"unknown key {key!r} on the command line: it is now {new}"
    path = tmp_path / "c.yaml"
    path.write_text(f"{key}: 8\n")
    with pytest.raises(UserError) as error:
        load_config(Config, ["--config", str(path)])
    assert str(error.value) == f"unknown key {key!r} in {path}: it is now {new}"


def test_the_old_name_of_another_class_is_only_an_unknown_key():
    with pytest.raises(UserError, match="unknown key 'tau' on the command line.* The keys are: batch_size"):
        load_config(Older, ["--tau", "1"])


def test_a_key_by_its_other_name_is_taken_everywhere(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset: mine\nkl: 0.5\n")
    assert load_config(Newer, ["--config", str(tmp_path / "c.yaml")]) == Newer(data="mine", beta=0.5)
    assert load_config(Newer, ["--dataset", "mine", "--kl=0.5"]) == Newer(data="mine", beta=0.5)
    with pytest.raises(UserError, match="--beta is given twice"):
        load_config(Newer, ["--kl", "1", "--beta", "2"])
    with pytest.raises(UserError, match="must be a number at least 0"):
        load_config(Newer, ["--kl", "much"])
    with pytest.raises(UserError, match="unknown key 'kl'"):
        load_config(Older, ["--kl", "1"])


@pytest.mark.parametrize(
    "script, key, new",
    [
        ("train.train_lm", "accumulation_steps", "batch_size (blocks an optimizer step) and micro_batch_size"),
        ("train.train_lm_lora", "accumulation_steps", "batch_size (blocks an optimizer step) and micro_batch_size"),
        ("rlhf.ppo_train", "missing_end_penalty", "missing_eos_penalty"),
        ("rlhf.ppo_train", "rollout_batch_size", "sampling_batch_size"),
        ("rlhf.grpo_train", "group_size", "samples_per_prompt"),
        ("rlhf.grpo_train", "rollout_batch_size", "sampling_batch_size"),
        ("data.generate_preferences", "batch_size", "sampling_batch_size"),
        ("data.generate_preferences_multi", "batch_size", "sampling_batch_size"),
        ("report.evaluate", "batch_size", "sampling_batch_size"),
    ],
)
def test_what_the_scripts_renamed_is_named(script, key, new, tmp_path):
    Config = importlib.import_module(script).Config
    (tmp_path / "c.yaml").write_text(f"{key}: 8\n")
    for words in ([f"--{key}", "8"], ["--config", str(tmp_path / "c.yaml")]):
        with pytest.raises(UserError, match=f"unknown key '{key}' .*: it is now {re.escape(new)}"):
            load_config(Config, words)


@pytest.mark.parametrize("script", sorted({*SCRIPTS.values()}))
def test_names_that_a_script_renamed_or_takes_too_lead_to_its_options(script):
    Config = importlib.import_module(script).Config
    for kind in Config.__mro__:
        for old, new in vars(kind).get("RENAMED", {}).items():
            assert old not in options(Config) and new.split()[0] in options(Config)
        for other, name in vars(kind).get("ALIASES", {}).items():
            assert other not in options(Config) and name in options(Config)


def test_judge_is_another_name_of_grpos_reward(tmp_path):
    from rlhf import grpo_train

    function = "data.checks:score"
    config = load_config(grpo_train.Config, ["--judge", function])
    assert config.reward == function and config == load_config(grpo_train.Config, ["--reward", function])
    (tmp_path / "c.yaml").write_text(f"judge: {function}\n")
    assert load_config(grpo_train.Config, ["--config", str(tmp_path / "c.yaml")]).reward == function
