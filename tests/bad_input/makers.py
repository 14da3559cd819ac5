"""What the broken inputs are made with: each maker is a function (folder of the test) -> path to name in a command."""

import importlib.util
import json
import shutil
import sys

from configs.config import ROOT
from runtime.cli import cli

SCRIPTS = {  # short name: (script, the configuration that it is given or None)
    "lm": ("train/train_lm.py", "smoke/train_base.yaml"),
    "ddp": ("train/train_lm_ddp.py", "smoke/train_base.yaml"),
    "fsdp": ("train/train_lm_fsdp.py", "smoke/train_base.yaml"),
    "tp": ("train/train_lm_tp.py", "smoke/train_base.yaml"),
    "amp": ("train/train_lm_amp_ckpt.py", "smoke/train_base.yaml"),
    "lora": ("train/train_lm_lora.py", "smoke/train_base.yaml"),
    "wandb": ("train/train_lm_wandb.py", "smoke/train_base.yaml"),
    "scratch": ("train/train_lm.py", "smoke/train_scratch.yaml"),
    "pairs": ("data/generate_preferences.py", "smoke/preferences.yaml"),
    "groups": ("data/generate_preferences_multi.py", "smoke/preferences_multi.yaml"),
    "reward": ("rlhf/train_reward_model.py", "smoke/reward.yaml"),
    "dpo": ("rlhf/dpo_train.py", "smoke/dpo.yaml"),
    "ppo": ("rlhf/ppo_train.py", "smoke/ppo.yaml"),
    "grpo": ("rlhf/grpo_train.py", "smoke/grpo.yaml"),
    "offline": ("rlhf/grpo_train.py", "smoke/grpo_offline.yaml"),
    "evaluate": ("report/evaluate.py", "smoke/evaluate.yaml"),
    "compare": ("report/compare.py", "smoke/compare.yaml"),
    "inference": ("inference/inference.py", "inference.yaml"),
    "dpo_inference": ("inference/dpo_inference.py", None),
    "ppo_inference": ("inference/ppo_inference.py", None),
    "grpo_inference": ("inference/grpo_inference.py", None),
}


def module_of(script):
    """The module of a script as if it were run by path, loaded once."""
    name = "bad_input_" + script.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def words_of(name, options, good, here):
    """The command line of a script: its configuration, what works by itself, and `options` in place of some of that."""
    script, config = SCRIPTS[name]
    works = {
        "lm": {"out": here / "out"},
        "pairs": {"limit": 4, "out": here / "out.jsonl"},
        "reward": {"data": good / "pairs.jsonl", "out": here / "out"},
        "ppo": {"reward_model": good / "reward", "out": here / "out"},
        "grpo": {"out": here / "out"},
        "offline": {"groups": good / "groups.jsonl", "out": here / "out"},
        "evaluate": {"model_name": "tiny-llama", "reward_model": good / "reward", "out": here / "out.json"},
        "compare": {"models": here / "m", "reward_model": good / "reward", "runs": here / "r", "out": here / "out"},
        "inference": {"model_name": "tiny-llama"},
        "dpo_inference": {"model_name": good / "dpo"},
        "ppo_inference": {"model_name": good / "ppo"},
        "grpo_inference": {"model_name": good / "dpo"},
    }
    like = dict.fromkeys(("ddp", "fsdp", "tp", "amp", "lora", "wandb", "scratch"), "lm")
    like |= {"groups": "pairs", "dpo": "reward"}
    given = {key: value(here) if callable(value) else value for key, value in options.items()}
    settings = {"config": ROOT / "configs" / config} if config else {}
    settings |= works[like.get(name, name)] | given
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def run(name, words):
    """`python SCRIPT words` in this process; the exit status."""
    script, _ = SCRIPTS[name]
    module, argv = module_of(script), sys.argv
    sys.argv = [str(ROOT / script), *words]
    main = getattr(module, "main", None) or module.train
    try:
        cli(main, module.Config)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


def tree(folder):
    """Every path below `folder`, with what is in the files."""
    paths = [p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts]
    return {p.relative_to(folder): p.read_bytes() if p.is_file() else None for p in paths}


def file(name, content=b""):
    """A file. content: bytes, a text, or a list whose items become lines of JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content.encode() if isinstance(content, str) else content

    def make(here):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
        return here / name

    return make


def folder(name, *files):
    """A folder with these files in it."""

    def make(here):
        (here / name).mkdir()
        for each in files:
            each(here / name)
        return here / name

    return make


def pair(i=0, **changes):
    """A row of preferences; a change to None takes a key out."""
    row = {"prompt": f"letter {i}", "chosen": "a", "rejected": "bb", "chosen_score": 1.0, "rejected_score": 0.0}
    return {key: value for key, value in (row | changes).items() if value is not None}


def group(i=0, **changes):
    """A row of groups, with ids and log-probs."""
    row = {"prompt": f"letter {i}", "chosen": "a", "rejected": ["b", "c"], "scores": [1.0, 0.0, 0.5]}
    row |= {"temperature": 1.0, "completion_ids": [[68, 2], [69, 2], [70, 2]], "logprobs": [[-1.0, -2.0]] * 3}
    return {key: value for key, value in (row | changes).items() if value is not None}


def asked(i=0, **changes):
    """A prompt with its checks, as in data/prompts.json."""
    row = {"id": f"p{i}", "prompt": f"Say {i}.", "checks": [{"name": "lowercase"}], "split": "train"}
    return {key: value for key, value in (row | changes).items() if value is not None}


def prompts(*rows):
    """A prompt file."""
    return file("prompts.json", json.dumps(list(rows)))


def model(*edits, base="tiny-llama", name="model"):
    """A copy of a tiny model's folder, on which each edit(folder) is made."""

    def make(here):
        from models.tiny import build_tiny

        shutil.copytree(build_tiny(base), here / name)
        for edit in edits:
            edit(here / name)
        return here / name

    return make


def good(name):
    """A file or folder of the fixture `good`, as it is."""
    return lambda here: here.parent / "good" / name


def adapter(*edits):
    """A copy of the run `dpo` of the fixture `good`, an adapter, with edits."""
    return _copy("dpo", "adapter", edits)


def reward(*edits):
    """A copy of the reward model of the fixture `good`, with edits."""
    return _copy("reward", "reward", edits)


def _copy(name, to, edits):
    def make(here):
        shutil.copytree(here.parent / "good" / name, here / to)
        for edit in edits:
            edit(here / to)
        return here / to

    return make


def function(source):
    """A module rewards.py, and the name of the reward function `reward` in it."""
    return lambda here: f"{file('rewards.py', source)(here).stem}:reward"


def below_a_file(name):
    """A path below a file, where nothing can be written, whoever asks."""
    return lambda here: file("a")(here) / name


def without(*names):
    """An edit that removes files."""

    def edit(folder):
        for name in names:
            (folder / name).unlink()

    return edit


def put(name, content):
    """An edit that writes a file."""
    return lambda folder: file(name, content)(folder) and None


def settings(name="config.json", **changes):
    """An edit of a JSON file in the folder; a change to None takes a key out."""

    def edit(folder):
        found = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))

    return edit


def damaged(change, name="model.safetensors"):
    """An edit of the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def weights(change, name="model.safetensors"):
    """An edit of the tensors of a file: change(dict) -> dict."""

    def edit(folder):
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return edit


def drop(part):
    """A change of tensors: those whose name has `part` in it are left out."""
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def first_ids(count):
    """A change of tensors: the embedding and the head have rows for the first `count` of 259 ids alone."""
    return lambda tensors: {name: t[:count].clone() if t.shape[0] == 259 else t for name, t in tensors.items()}


def not_finite(tensors):
    """A change of tensors: those of norms become infinite."""
    return {name: tensor / 0 if "norm" in name else tensor for name, tensor in tensors.items()}


def other_ids(folder):
    """An edit that gives two tokens each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def bert(folder):
    """An edit that makes the folder one of a BERT classifier with one label."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=1, **shape)).save_pretrained(folder)
