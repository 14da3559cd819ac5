"""The schema loader: precedence, casting, and messages that name the key."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from configs.config import UserError, format_config, load_config, option, read_yaml

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
    "grpo_offline": "rlhf.grpo_train", "evaluate": "report.evaluate", "compare": "report.compare",
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
