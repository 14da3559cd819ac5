"""Broken inputs and the message that each must give: exit status 2, one message, nothing left behind.

The commands are those of the README, at the size of configs/smoke/ and run in this process; a few also as typed.
In a message, `...` stands for any text, {here} for the folder of the test, {good} for the inputs that work.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from bad_input.makers import (
    SCRIPTS,
    adapter,
    asked,
    below_a_file,
    bert,
    damaged,
    drop,
    file,
    first_ids,
    folder,
    function,
    good,
    group,
    model,
    not_finite,
    other_ids,
    pair,
    prompts,
    put,
    reward,
    run,
    settings,
    tree,
    weights,
    without,
    words_of,
)

from configs.config import ROOT
from data.prompts import ARITHMETIC, load_prompts

pytestmark = pytest.mark.slow

T5 = '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'
VIT = '{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'
HELDOUT = load_prompts(split="heldout")[0]["prompt"]
FINISHED = folder(
    "out",
    file("config.yaml", "model_name: tiny-llama\nbeta: 0.3\n"),
    file("manifest.json", "{}"),
    file("adapter_model.safetensors", "weights"),
)


def case(script, message, **options):
    """A row of the tables below. options: in place of those with which the script works (`words_of`)."""
    return pytest.param(script, message, options, id=f"{script}: {message[:60]}")


KEYS = [
    case("dpo", "unknown key 'bta' on the command line. Did you mean 'beta'? The keys are: ...", bta=0.2),
    case(
        "lm",
        "unknown key 'batchsize' in {here}/a.yaml. Did you mean 'batch_size'? The keys are: ...",
        config=file("a.yaml", "model_name: tiny-llama\nbatchsize: 4\n"),
    ),
    case("lm", "lr = 'fast' on the command line: must be a number above 0", lr="fast"),
    case("grpo", "steps = '2.5' on the command line: must be a whole number at least 1", steps=2.5),
    case("ppo", "gamma = 1.5 is out of range: must be above 0 and at most 1", gamma=1.5),
    case("dpo", "beta = 0.0 is out of range: must be above 0", beta=0),
    case("lm", "seed = -1 is out of range: must be at least 0", seed=-1),
    case(
        "dpo",
        "seed = '1099511627776' on the command line is out of range: whole numbers go up to 4294967295",
        seed=2**40,
    ),
    case("dpo", "loss_type = 'kto' on the command line: must be one of sigmoid, ipo, hinge", loss_type="kto"),
    case(
        "dpo",
        "precompute_reference = 'maybe' on the command line: must be true or false",
        precompute_reference="maybe",
    ),
    case("lm", "lr = 'nan' on the command line: must be a number above 0", lr="nan"),
    case("lm", "data = '' on the command line: must be text that is not empty", data=""),
    case("reward", "out = ' ' on the command line: must be text that is not empty", out=" "),
    case("lm", "--config nowhere.yaml: no such file. The project's own are in configs/", config="nowhere.yaml"),
    case(
        "lm",
        "{here}/a.yaml line 2: not valid YAML (mapping values are not allowed here); it takes one `key: value` a line",
        config=file("a.yaml", "lr: 1\n  x: : 2\n"),
    ),
    case(
        "lm",
        "{here}/a.yaml: must be a mapping of keys to values, one `key: value` a line",
        config=file("a.yaml", "- lr\n"),
    ),
    case("lm", "{here}/a.yaml: not UTF-8 text (invalid start byte at byte 4)", config=file("a.yaml", b"lr: \xff\n")),
    case("lm", "{here}/a.yaml line 2: lr stands in line 1 already", config=file("a.yaml", "lr: 1e-3\nlr: 1e-4\n")),
    case(
        "lm",
        "model_name = True in {here}/a.yaml: must be text; put it in quotes",
        config=file("a.yaml", "model_name: on\n"),
    ),
    case("lm", "lr = ['1e-3'] in {here}/a.yaml: must be a number above 0", config=file("a.yaml", "lr: [1e-3]\n")),
    case(
        "dpo",
        "unknown key 'reward_model' in configs/ppo.yaml. Did you mean 'wandb_model'? The keys are: ...",
        config=ROOT / "configs/ppo.yaml",
    ),
    case(
        "lm",
        "{here}/a.yaml line 1: not valid YAML (could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.system'); it takes one `key: value` a line",
        config=file("a.yaml", "lr: !!python/object/apply:os.system [echo]\n"),
    ),
    case("dpo", "precision = 'int8' on the command line: must be one of auto, fp32, bf16, fp16", precision="int8"),
    case("evaluate", "limit = 1 is out of range: must be at least 2", limit=1),
    case("inference", "top_p = 0.0 is out of range: must be above 0 and at most 1", top_p=0),
]

OLD_NAMES = [  # (scripts, the old name of a key, what a message says of it)
    (
        ("lm", "ddp", "fsdp", "tp", "amp", "lora", "wandb"),
        "accumulation_steps",
        "batch_size (blocks an optimizer step) and micro_batch_size (blocks in one pass)",
    ),
    (("ppo", "grpo", "offline", "grpo_inference"), "group_size", "samples_per_prompt"),
    (("ppo", "grpo"), "rollout_batch_size", "sampling_batch_size"),
    (("ppo",), "missing_end_penalty", "missing_eos_penalty"),
    (
        ("pairs", "groups", "evaluate", "compare", "inference", "dpo_inference", "ppo_inference", "grpo_inference"),
        "batch_size",
        "sampling_batch_size",
    ),
]
RENAMED = [
    row
    for scripts, old, new in OLD_NAMES
    for script in scripts
    for row in (
        case(script, f"unknown key '{old}' on the command line: it is now {new}", **{old: 2}),
        case(script, f"unknown key '{old}' in {{here}}/a.yaml: it is now {new}", config=file("a.yaml", f"{old}: 2\n")),
    )
]

CONTRADICTIONS = [
    case("dpo", "label_smoothing = 0.1 has no effect with loss_type = hinge", loss_type="hinge", label_smoothing=0.1),
    case("ppo", "kl_controller = adaptive needs kl_target, in nats per sequence (6, say)", kl_controller="adaptive"),
    case("ppo", "kl_target has no effect with kl_controller = fixed", kl_target=6),
    case("ppo", "kl_horizon = 100 has no effect with kl_controller = fixed", kl_horizon=100),
    case(
        "ppo",
        "minibatches = 5: at most prompts_per_step = 4, or one would train on nothing",
        minibatches=5,
    ),
    case(
        "grpo",
        "reward and reward_model both score the completions: give one of them",
        reward="a:b",
        reward_model="models/reward",
    ),
    case("ppo", "reward and reward_model both score the completions: give one of them", reward="a:b"),
    case("ppo", "PPO needs a reward_model or a reward function: give exactly one of them", reward_model="none"),
    case(
        "grpo",
        "reward_weights = '1,2,3' has 3 numbers, and reward = 'a:b,c:d' has 2 functions: give one number for each",
        reward="a:b,c:d",
        reward_weights="1,2,3",
    ),
    case(
        "pairs",
        "reward_weights = '1,two': must be numbers with commas between them, such as 0.5,1",
        reward="a:b,c:d",
        reward_weights="1,two",
    ),  # fmt: skip
    case(
        "evaluate", "reward = 'a:b,a:b': a:b is given twice; --reward_weights gives it another weight", reward="a:b,a:b"
    ),  # fmt: skip
    case("grpo", "reward_weights = '1' has no effect with no reward function: give --reward", reward_weights=1),
    case("offline", "mode = offline takes the stored scores: reward and reward_model have no effect", reward="a:b"),
    case("pairs", "reward must be module:function, such as my_reward:reward, got 'rewards'", judge="rewards"),
    case("grpo_inference", "--reward is given twice on the command line", judge="a:b", reward="a:b"),
    case("offline", "samples_per_prompt = 4 has no effect with mode = offline", samples_per_prompt=4),
    case("grpo", "max_length = 64 has no effect with mode = online", max_length=64),
    case("grpo", "kl_kind = 'k2' has no effect with kl_coef = 0", kl_coef=0, kl_kind="k2"),
    case("grpo", "minibatches = 4: at most prompts_per_step = 3, or one would train on nothing", minibatches=4),
    case("offline", "minibatches = 3: at most prompts_per_step = 2, or one would train on nothing", minibatches=3),
    case("lm", "scratch_layers would have no effect: model_name is 'tiny-llama', not scratch", scratch_layers=2),
    case(
        "scratch",
        "model_name scratch needs scratch_layers too; see configs/train_scratch.yaml",
        scratch_layers="none",
    ),
    case("scratch", "scratch_width = 32 must be a multiple of twice scratch_heads = 3", scratch_heads=3),
    case(
        "scratch",
        "scratch_vocab = 5000: the corpus has pairs for 419 ids only; set that or less",
        scratch_vocab=5000,
    ),
    case(
        "lora",
        "model_name = 'scratch': an adapter needs a trained model that it can name as its base",
        config=ROOT / "configs/smoke/train_scratch.yaml",
    ),
    case("lm", "warmup_steps = 6 must be below the 6 optimizer steps of this run", warmup_steps=6),
    case("dpo", "warmup_steps = 2 must be below the 2 optimizer steps of this run", warmup_steps=2),
    case("reward", "warmup_steps = 9 must be below the 2 optimizer steps of this run", warmup_steps=9),
    case("ppo", "warmup_steps = 8 must be below the 8 optimizer steps of this run", warmup_steps=8),
    case("lm", "max_length = 1024: tiny-llama reads at most 512 tokens", max_length=1024),
    case("lm", "sample_prompt has 1000 tokens: the model reads at most 512", sample_prompt="word " * 200),
    case("dpo", "max_length = 1024: tiny-llama reads at most 512 tokens", max_length=1024),
    case("dpo", "batch_size = 12: there are only 8 pairs to train on; set at most that", batch_size=12),
    case(
        "pairs",
        "sampling_batch_size = 2: must be at least samples_per_prompt = 4, because the samples of a prompt run "
        "together",
        sampling_batch_size=2,
    ),
    case("pairs", "limit = 100000: tests/data/forms.json has only 108 training prompts", limit=100000),
    case("inference", "prompt, prompts and chat exclude each other: give one of them", prompt="a", chat="true"),
    case("inference", "merge = true: tiny-llama holds no adapter, there is nothing to merge", prompt="a", merge="true"),
    case(
        "inference",
        "top_k = 5 has no effect with temperature = 0, which takes the most probable token",
        prompt="a",
        temperature=0,
        top_k=5,
    ),
    case("dpo_inference", "limit = 3 has no effect with a prompt of your own", prompt="a", limit=3),
    case(
        "evaluate",
        "best_of = 2 needs a reward model, and reward_model = 'models/nowhere' is not there. This makes it: "
        "python rlhf/train_reward_model.py",
        best_of=2,
        reward_model="models/nowhere",
    ),
    case("evaluate", "text_length = 1024: tiny-llama reads at most 512 tokens", text_length=1024),
    case("compare", "seeds = '0,0': must be different whole numbers, such as 0,1,2", seeds="0,0"),
    case(
        "wandb",
        "wandb = online, and there is no login: run `wandb login` first, or use offline",
        wandb="online",
    ),
]

DATA = [
    case("dpo", "nowhere.jsonl is not there. This makes it: python data/generate_preferences.py", data="nowhere.jsonl"),
    case(
        "dpo",
        "{here}/pairs.jsonl is empty. This makes it: python data/generate_preferences.py",
        data=file("pairs.jsonl"),
    ),
    case(
        "dpo",
        "{here}/pairs is no folder of `save_to_disk`: Directory {here}/pairs is neither a `Dataset` directory nor a "
        "`DatasetDict` directory.",
        data=folder("pairs"),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl line 2: not valid JSON (Unterminated string starting at column 39); it takes one object "
        "a line",
        data=file("pairs.jsonl", json.dumps(pair()) + "\n" + json.dumps(pair())[:40]),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl line 1: not UTF-8 text (byte 15 of the line)",
        data=file("pairs.jsonl", b'{"prompt": "caf\xe9"}\n'),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl line 1: not valid JSON (Expecting value at column 1); it takes one object a line",
        data=file("pairs.jsonl", "prompt,chosen,rejected\na,b,c\n"),
    ),
    case(
        "dpo",
        '{here}/pairs.jsonl line 2: must be an object with keys, not \'["a", "b"]\'',
        data=file("pairs.jsonl", [pair(), ["a", "b"]]),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl line 1: has no 'prompt', and chosen and rejected begin differently. A row is prompt, "
        "chosen, rejected; it has question, chosen, rejected",
        data=file("pairs.jsonl", [{"question": "a", "chosen": "b", "rejected": "c"}]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 2: has no 'rejected'. A row is prompt, chosen, rejected; it has prompt, chosen, "
        "chosen_score, rejected_score",
        data=file("pairs.jsonl", [pair(), pair(rejected=None)]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 2: a completion is empty: nothing of this row would be learned",
        data=file("pairs.jsonl", [pair(), pair(chosen="")]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 1: a prompt must be text or a list of {role, content} messages, not '3'",
        data=file("pairs.jsonl", [pair(prompt=3)]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 1: a prompt must be text or a list of {role, content} messages, not \"[{'role': "
        "'user'}]\"",
        data=file("pairs.jsonl", [pair(prompt=[{"role": "user"}])]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 1: chosen_score and rejected_score must be finite numbers, not ('high', 0.0)",
        data=file("pairs.jsonl", [pair(chosen_score="high")]),
    ),
    case(
        "reward",
        "{here}/pairs.jsonl line 1: chosen_score and rejected_score must be finite numbers, not (nan, 0.0)",
        data=file("pairs.jsonl", [pair(chosen_score=float("nan"))]),
    ),
    case(
        "reward",
        "margin = true needs chosen_score and rejected_score, which {here}/pairs.jsonl line 1 lacks",
        data=file("pairs.jsonl", [pair(i, chosen_score=None) for i in range(12)]),
        margin="true",
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl line 1: half of a surrogate pair stands at character 0 of '\\ud83d'",
        data=file("pairs.jsonl", [pair(chosen="\ud83d")]),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl: no row is left: of 1 rows 1 are longer than max_length = 512, and in 0 chosen and "
        "rejected are equal",
        data=file("pairs.jsonl", [pair(chosen="a" * 600)]),
    ),
    case(
        "dpo",
        "{here}/pairs.jsonl: no row is left: of 1 rows 1 are longer than max_length = 512, and in 0 chosen and "
        "rejected are equal",
        data=file("pairs.jsonl", [pair(prompt="a" * 600)]),
        truncation="drop",
    ),
    case(
        "dpo",
        "heldout_fraction = 0.25: leaves 0 training and 12 held-out rows, because there is one row, or all are equal. "
        "--heldout_fraction 0 trains on all where the script takes it",
        data=file("pairs.jsonl", [pair()] * 12),
    ),
    case(
        "dpo",
        "{good}/groups.jsonl line 1: a completion must be text or a list of one assistant message, not \"['b', 'c']\"",
        data=good("groups.jsonl"),
    ),
    case(
        "offline",
        "{good}/pairs.jsonl line 1: 'rejected' must be a list of completions, as in groups.jsonl; pairs are for DPO",
        groups=good("pairs.jsonl"),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 2: 2 scores for 3 completions (chosen first, then rejected)",
        groups=file("g.jsonl", [group(), group(scores=[1.0, 0.0])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: scores must be a list of finite numbers, not [1.0, 0.0, 'x']",
        groups=file("g.jsonl", [group(scores=[1.0, 0.0, "x"])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: finish_reasons must be a list with stop or length for each of 3 completions",
        groups=file("g.jsonl", [group(finish_reasons=["stop", "length", "cut"])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: completion_ids and logprobs must have one list a completion, of equal lengths",
        groups=file("g.jsonl", [group(logprobs=[[-1.0, -2.0], [-1.0], [-1.0, -2.0]])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: logprobs must be lists of finite numbers, one for each of completion_ids",
        groups=file("g.jsonl", [group(logprobs=[[-1.0, None]] * 3)]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: completion_ids must be lists of token ids, whole numbers from 0 on",
        groups=file("g.jsonl", [group(completion_ids=[["a"], [2], [2]])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: completion_ids hold 999, and the tokenizer has 259 ids: another model sampled them",
        groups=file("g.jsonl", [group(completion_ids=[[999, 2], [69, 2], [70, 2]])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 2: has no logprobs, and other rows have them; a file holds one kind",
        groups=file("g.jsonl", [group(), group(1, logprobs=None)]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1 was sampled at temperature 0.7: set temperature to that, or the stored log-probs "
        "do not compare with the policy's",
        groups=file("g.jsonl", [group(i, temperature=0.7) for i in range(4)]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: temperature must be a number above 0, not 'hot'",
        groups=file("g.jsonl", [group(temperature="hot")]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: 'rejected' must be a list of completions, as in groups.jsonl; pairs are for DPO",
        groups=file("g.jsonl", [group(rejected=[])]),
    ),
    case(
        "offline",
        "{here}/g.jsonl line 1: 621 tokens do not fit into max_length = 512",
        groups=file("g.jsonl", [group(prompt="a" * 600)]),
    ),
    case("offline", "prompts_per_step = 2: {here}/g.jsonl has only 1 groups", groups=file("g.jsonl", [group()])),
    case(
        "lm",
        "{here}/a.jsonl line 1: must be an object with keys, not '[]'",
        data=file("a.jsonl", "[]\n"),
    ),
    case("wandb", "nowhere.txt: no such file or folder (looked from {here})", data="nowhere.txt"),
    case(
        "ddp",
        "{here}/a.jsonl line 1: `text` has the type int, it takes a string",
        data=file("a.jsonl", [{"text": 3}]),
    ),
    case(
        "amp",
        "{here}/a.jsonl line 1: `completion` is empty",
        data=file("a.jsonl", [{"prompt": "a", "completion": " "}]),
    ),
    case(
        "lora",
        "{here}/preferences.jsonl line 1: `prompt`[0] takes an object with `role` and `content`",
        data=file("preferences.jsonl", [pair(prompt=["a"], chosen=["b"])]),
    ),
    case("lm", "nowhere.txt: no such file or folder (looked from {here})", data="nowhere.txt"),
    case("lm", "{here}/a.txt is empty", data=file("a.txt")),
    case("lm", "{here}/a.txt is not UTF-8 (byte 3); convert it first, e.g. with iconv", data=file("a.txt", b"caf\xe9")),
    case(
        "lm",
        "{here}/texts is a folder without .txt files, and none of `save_to_disk`; without a hub there are ...",
        data=folder("texts", file("a.md", "text")),
    ),
    case(
        "lm",
        "{here}/a.md: text comes as .txt, a folder of .txt, or rows as .csv, .tsv, .parquet, .json, .jsonl, .arrow, "
        "also compressed",
        data=file("a.md", "a\n"),
    ),
    case(
        "lm",
        "{here}/a.csv row 1 has the keys txt; it takes `text`, `messages`, `prompt` and `completion`, or `prompt`, "
        "`chosen` and `rejected`",
        data=file("a.csv", "txt\na\n"),
    ),
    case(
        "lm",
        "{here}/a.jsonl line 2 has the keys txt; it takes `text`, `messages`, `prompt` and `completion`, or "
        "`prompt`, `chosen` and `rejected`",
        data=file("a.jsonl", [{"text": "a"}, {"txt": "b"}]),
    ),
    case(
        "lm",
        "{here}/a.jsonl line 2 has the keys prompt; it takes `text`, `messages`, `prompt` and `completion`, or "
        "`prompt`, `chosen` and `rejected`",
        data=file("a.jsonl", [{"text": "a"}, {"prompt": "b"}]),
    ),
    case(
        "lm",
        "{here}/a.jsonl line 2 is of the kind prompt (strings), the rows before it are text; a file holds one kind",
        data=file("a.jsonl", [{"text": "a"}, {"prompt": "b", "completion": "c"}]),
    ),
    case(
        "lm",
        "{here}/a.jsonl line 2: not valid JSON (Unterminated string starting at column 10); it takes one object a line",
        data=file("a.jsonl", '{"text": "a"}\n{"text": "b'),
    ),
    case(
        "lm",
        "{here}/a.jsonl line 1: `messages` has no message of the assistant, so there is nothing to learn",
        data=file("a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}] * 2),
    ),
    case(
        "lm",
        "{here}/a.jsonl, training: nothing is left: 3 completions are longer than max_length = 64, and 0 messages of "
        "the assistant have nothing before them",
        data=file("a.jsonl", [{"prompt": f"a{i}", "completion": "b" * 100} for i in range(4)]),
    ),
    case("lm", "data = '{here}/a.txt' is too small: no document is left for evaluation", data=file("a.txt", "x")),
    case(
        "lm",
        "no/such-corpus is no local path and no embedded text, and cannot be had from the hub: ...\nwithout a hub"
        " there are shakespeare, bible-web, openwebtext-sample, any .txt file, any folder of .txt files, and rows "
        "with `text`, `messages`, or `prompt` and `completion` in .jsonl, .json, .csv or .parquet",
        data="no/such-corpus",
    ),
    case("pairs", "prompts = 'nowhere.json': no such file", prompts="nowhere.json"),
    case(
        "pairs",
        "{here}/prompts.json: not valid JSON at line 1, column 2: Expecting property name enclosed in double quotes",
        prompts=file("prompts.json", "{"),
    ),
    case(
        "pairs",
        "{here}/prompts.json: must be a list of at least one prompt, not []",
        prompts=file("prompts.json", "[]"),
    ),
    case(
        "groups",
        "{here}/prompts.json: not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 1: invalid start byte",
        prompts=file("prompts.json", b"[\xff]"),
    ),
    case(
        "groups",
        "{here}/prompts.json: entry 1: lacks id, checks; every prompt is an object with id, prompt, split, checks",
        prompts=prompts({"prompt": "Say one.", "split": "train"}),
    ),
    case(
        "groups",
        "{here}/prompts.json row 1: has no checks to be scored by; give a --reward module:function",
        prompts=prompts({"prompt": "Say one."}),
    ),
    case(
        "pairs",
        "{here}/prompts.json: prompt 'p0': unknown check 'lowercas' (did you mean 'lowercase'?); known checks: ...",
        prompts=prompts(asked(checks=[{"name": "lowercas"}])),
    ),
    case(
        "pairs",
        "{here}/prompts.json: prompt 'p0': check 'max_words' got n=0; max_words takes n (a whole number of at least 1)",
        prompts=prompts(asked(checks=[{"name": "max_words", "n": 0}])),
    ),
    case("pairs", "{here}/prompts.json: prompt 'p0': this id stands twice", prompts=prompts(asked(), asked())),
    case(
        "pairs",
        "{here}/prompts.json: prompt 'p1': prompt must be a text that is not empty, or messages, got ' '",
        prompts=prompts(asked(), asked(1, prompt=" ")),
    ),
    case(
        "pairs",
        "{here}/prompts.json: prompt 'p1': split must be one of train, validation, heldout, got 'test'",
        prompts=prompts(asked(), asked(1, split="test")),
    ),
    case(
        "pairs",
        "{here}/prompts.json: prompt 'p1': the same prompt stands in two splits",
        prompts=prompts(asked(), asked(1, prompt="SAY  0.", split="heldout")),
    ),
    case(
        "evaluate",
        "{here}/prompts.json: prompt 'p2': the same prompt is held out twice, and would count twice; take one out",
        prompts=prompts(asked(), asked(1, split="heldout"), asked(2, prompt="Say 1.", split="heldout")),
    ),
    case("evaluate", "{here}/prompts.json has no prompt with split 'heldout'", prompts=prompts(asked())),
    case(
        "pairs",
        "{here}/prompts.json: the prompt '...' is the held-out prompt ... of data/prompts.json, on which models "
        "are measured; take it out",
        prompts=prompts(asked(prompt=HELDOUT)),
        limit=1,
    ),
    case(
        "pairs",
        "{here}/prompts.json: the prompt '...' is the held-out prompt 'heldout-001' of data/arithmetic.json, on which "
        "models are measured; take it out",
        prompts=prompts(asked(prompt=load_prompts(ARITHMETIC, "heldout")[0]["prompt"])),
        limit=1,
    ),
    case(
        "pairs",
        "{here}/p.txt: lines of text have no checks to be scored by; give a --reward module:function",
        prompts=file("p.txt", "Say one."),
        limit=1,
    ),
    case(
        "grpo",
        "prompt 'p2' has 619 tokens: with max_new_tokens = 8 it does not fit into the model's context of 512",
        prompts=prompts(asked(0), asked(1), asked(2, prompt="a" * 600)),
    ),
    case("grpo", "prompts_per_step = 3: {here}/prompts.json has only 1 training prompts", prompts=prompts(asked(0))),
    case("inference", "{here}/p.txt: there is no prompt in it", prompts=file("p.txt", "\n\n")),
    case(
        "inference",
        '{here}/p.jsonl line 2: must be an object whose "prompt" is a text or a list of messages, each with '
        "role and content, not \"{'prompt': 3}\"",
        prompts=file("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n'),
    ),
    case(
        "inference",
        "{here}/p.jsonl line 2: has no column 'prompt'. Its columns are: promt. --prompt_column names another",
        prompts=file("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n'),
    ),
    case(
        "ppo",
        "{here}/p.csv row 1: has no column 'ask'. Its columns are: question, answer. --prompt_column names another",
        prompts=file("p.csv", "question,answer\n2 + 2?,4\n"),
        prompt_column="ask",
    ),
    case(
        "grpo",
        "{here}/p.jsonl line 1: has no column 'ask'. Its columns are: question, answer. --prompt_column names another",
        prompts=file("p.jsonl", '{"question": "2 + 2?", "answer": "4"}\n'),
        prompt_column="ask",
        reward=function("def reward(prompt, completion): return 1.0"),
    ),
    case(
        "inference",
        "prompt_column = 'ask': {here}/p.txt has lines of text, and no columns",
        prompts=file("p.txt", "2 + 2?\n"),
        prompt_column="ask",
    ),
    case(
        "inference",
        "prompt_column = 'ask' has no effect with prompt or chat: it is of a file",
        prompt="a",
        prompt_column="ask",
    ),  # fmt: skip
    case(
        "ppo",
        "{here}/p.jsonl line 1: has tools, which no stage takes: leave the row or the key out",
        prompts=file("p.jsonl", '{"prompt": "2 + 2?", "tools": [{"name": "add"}]}\n'),
    ),
    case(
        "inference",
        "'What is the colour of the sky? What is the colour of the sky'... cannot be a file: File name too long",
        prompts="What is the colour of the sky? " * 20,
    ),
    case(
        "inference",
        "prompt 0 has 1019 tokens; with 96 new ones it does not fit into the model's context of 512: shorten it",
        prompt="word " * 200,
    ),
]

MODELS = [
    case("lm", "model_name = 'models/nowhere': no such folder", model_name="models/nowhere"),
    case(
        "dpo",
        "{here}/model holds no model: it has neither config.json nor adapter_config.json (it has notes.txt)",
        model_name=folder("model", file("notes.txt")),
    ),
    case(
        "dpo",
        "model_name = '{here}/model.gguf' is a file: give the folder that holds config.json and the weights",
        model_name=file("model.gguf", b"GGUF"),
    ),
    case(
        "dpo",
        "model_name = 'no/such-model' is no folder, no embedded model, and the model hub gave no such model "
        "(...). Without a hub these work: smollm2-135m, tiny-llama, tiny-gpt2, or any folder that holds a model",
        model_name="no/such-model",
    ),
    case(
        "dpo",
        "{here}/model has no weights: there is no .safetensors file in it.",
        model_name=model(without("model.safetensors")),
    ),
    case(
        "dpo",
        "{here}/model has no tokenizer (tokenizer_config.json and tokenizer.json are missing)",
        model_name=model(without("tokenizer.json", "tokenizer_config.json")),
    ),
    case(
        "dpo",
        "cannot load the tokenizer of {here}/model: It looks like the config file at '{here}/model/config.json' "
        "is not a valid JSON file.",
        model_name=model(put("config.json", "{")),
    ),
    case(
        "dpo",
        "{here}/model is a BertForMaskedLM; this takes a causal language model (LlamaForCausalLM, say)",
        model_name=model(settings(model_type="bert", architectures=["BertForMaskedLM"])),
    ),
    case(
        "dpo",
        "{here}/model is a T5ForConditionalGeneration; this takes a causal language model (LlamaForCausalLM, say)",
        model_name=model(put("config.json", T5)),
    ),
    case(
        "lm",
        "{here}/model is a ViTForImageClassification, which reads no text",
        model_name=model(put("config.json", VIT)),
    ),
    case(
        "inference",
        "cannot load config.json of {here}/model: The checkpoint you are trying to load has model type `llamma` "
        "but Transformers does not recognize this architecture. This could be because of an issue with the "
        "checkpoint, or because your version of Transformers is out of date.",
        prompt="a",
        model_name=model(settings(model_type="llamma")),
    ),
    case(
        "dpo",
        "the weights in {here}/model do not fit its config.json: model.embed_tokens.weight is (259, 32) in the "
        "file, and config.json asks for (259, 64)",
        model_name=model(settings(hidden_size=64)),
    ),
    case(
        "dpo",
        "the weights in {here}/model do not fit its config.json: model.embed_tokens.weight is (259, 32) in the "
        "file, and config.json asks for (200, 32)",
        model_name=model(settings(vocab_size=200)),
    ),
    case(
        "dpo",
        "{good}/pairs.jsonl line 1: the text holds the token ... (id ...), which the model cannot read: it has rows "
        "for 80 ids, and the tokenizer has 259",
        model_name=model(settings(vocab_size=80), weights(first_ids(80))),
    ),
    case(
        "dpo",
        "cannot load the tokenizer of {here}/model: Validation error for field 'hidden_size': TypeError: Field "
        "'hidden_size' expected int, got str (value: 'wide')",
        model_name=model(settings(hidden_size="wide")),
    ),
    case(
        "dpo",
        "the weights in {here}/model are damaged: Error while deserializing header: incomplete metadata, file not"
        " fully covered",
        model_name=model(damaged(lambda b: b[:5000])),
    ),
    case(
        "dpo",
        "the weights in {here}/model are damaged: Error while deserializing header: header too large",
        model_name=model(damaged(lambda b: b"\xff" * 8 + b[8:])),
    ),
    case(
        "dpo",
        "the weights in {here}/model are damaged: Error while deserializing header: header too small",
        model_name=model(damaged(lambda b: b"")),
    ),
    case(
        "dpo",
        "the weights in {here}/model are damaged: model.layers.0.input_layernorm.weight holds numbers that are "
        "not finite",
        model_name=model(weights(not_finite)),
    ),
    case(
        "dpo",
        "{good}/pairs.jsonl line 1: the chat template of the tokenizer does not take this prompt: no such role",
        model_name=model(put("chat_template.jinja", "{{ raise_exception('no such role') }}")),
    ),
    case(
        "dpo",
        "chat_template_kwargs: the chat template of {here}/model does not use enable_thinkin; its options are: "
        "enable_thinking",
        model_name=model(put("chat_template.jinja", "{{ enable_thinking }}")),
        chat_template_kwargs='{"enable_thinkin": false}',
    ),
    case(
        "reward",
        "{good}/pairs.jsonl line 1: the chat template of the tokenizer does not take this prompt: can only "
        'concatenate str (not "int") to str',
        model_name=model(put("chat_template.jinja", "{{ 'It is ' + date_string }}")),
        chat_template_kwargs='{"date_string": 5}',
    ),
    case(
        "grpo",
        "chat_template_kwargs = {'enable_thinking': False}: the tokenizer of tiny-gpt2 has no chat template",
        model_name="tiny-gpt2",
        chat_template_kwargs='{"enable_thinking": false}',
    ),
    case(
        "inference",
        "the tokenizer of {here}/model: chat_template_kwargs = 5 is no mapping",
        model_name=model(settings("tokenizer_config.json", chat_template_kwargs=5)),
        prompt="hi",
    ),
    case(
        "ppo",
        "chat_template_kwargs = 'thinking' on the command line: must be a mapping that is not empty, as JSON on the "
        'command line: {"name": value}, or none',
        chat_template_kwargs="thinking",
    ),
    case(
        "lm",
        "{here}/model has no weights: there is no .safetensors file in it. pytorch_model.bin is a pickle, which "
        "can run code, and is never read: convert it to safetensors",
        model_name=model(without("model.safetensors"), put("pytorch_model.bin", b"x")),
    ),
    case(
        "dpo",
        "cannot load the tokenizer of {here}/model: Unterminated string starting at: line 53 column 9 (char 992)",
        model_name=model(damaged(lambda b: b[:1000], "tokenizer.json")),
    ),
    case(
        "dpo",
        "the weights in {here}/model are incomplete: model.layers.1.mlp.down_proj.weight and 2 more are missing",
        model_name=model(weights(drop("layers.1.mlp"))),
    ),
    case(
        "dpo",
        "the tokenizer of {here}/model has no end-of-sequence token, which marks where a completion stops",
        model_name=model(settings("tokenizer_config.json", eos_token=None)),
    ),
    case(
        "lm",
        "{good}/reward is a LlamaForSequenceClassification; this takes a causal language model (LlamaForCausalLM, say)",
        model_name=good("reward"),
    ),
    case(
        "dpo",
        "{here}/adapter has no weights: adapter_model.safetensors is missing.",
        model_name=adapter(without("adapter_model.safetensors")),
    ),
    case(
        "dpo",
        "{here}/adapter/adapter_config.json is damaged: it takes one JSON object",
        model_name=adapter(put("adapter_config.json", "[]")),
    ),
    case(
        "dpo",
        "the base that {here}/adapter/adapter_config.json names is not there: model_name = 'models/gone': no such"
        " folder",
        model_name=adapter(settings("adapter_config.json", base_model_name_or_path="models/gone")),
    ),
    case(
        "dpo",
        "{here}/adapter/adapter_config.json names no base model (base_model_name_or_path is empty)",
        model_name=adapter(settings("adapter_config.json", base_model_name_or_path=None)),
    ),
    case(
        "dpo",
        "the adapter in {here}/adapter does not fit its base: Target modules ... not found in the base model. "
        "Please check the target modules and try again.",
        model_name=adapter(settings("adapter_config.json", base_model_name_or_path="tiny-gpt2")),
    ),
    case(
        "dpo",
        "the adapter in {here}/adapter does not fit its base: Error(s) in loading state_dict for "
        "PeftModelForCausalLM: size mismatch for "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight: copying a param with shape "
        "torch.Size([4, 32]) from checkpoint, the shape in current model is torch.Size([8, 32]).",
        model_name=adapter(settings("adapter_config.json", r=8)),
    ),
    case(
        "dpo",
        "the adapter in {here}/adapter does not fit its base: "
        "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight is only in the adapter",
        model_name=adapter(settings("adapter_config.json", target_modules=["q_proj"])),
    ),
    case(
        "dpo",
        "{here}/adapter/adapter_config.json: peft_type = 'MAGIC': must be LORA",
        model_name=adapter(settings("adapter_config.json", peft_type="MAGIC")),
    ),
    case(
        "dpo",
        "the weights in {here}/adapter are damaged: Error while deserializing header: incomplete metadata, file "
        "not fully covered",
        model_name=adapter(damaged(lambda b: b[:2000], "adapter_model.safetensors")),
    ),
    case(
        "inference",
        "{here}/adapter/adapter_config.json names another adapter, adapter, as its base: merge that one first",
        prompt="a",
        model_name=adapter(settings("adapter_config.json", base_model_name_or_path="adapter")),
    ),
    case(
        "lora",
        "model_name = '{here}/adapter' is itself an adapter; train it with --merge true and use /merged",
        model_name=adapter(),
    ),
    case(
        "ppo",
        "reward_model = 'models/nowhere' is not there. This makes it: python rlhf/train_reward_model.py",
        reward_model="models/nowhere",
    ),
    case(
        "ppo",
        "reward_model = 'tiny-llama' is not there. This makes it: python rlhf/train_reward_model.py",
        reward_model="tiny-llama",
    ),
    case(
        "ppo",
        "{here}/model is a LlamaForCausalLM, not a reward model. This makes one: python rlhf/train_reward_model.py",
        reward_model=model(),
    ),
    case(
        "grpo",
        "{here}/model is a LlamaForCausalLM, not a reward model. This makes one: python rlhf/train_reward_model.py",
        reward_model=model(),
    ),
    case(
        "ppo",
        "{here}/adapter is an adapter; a reward model is, and starts from, a full model: merge it",
        reward_model=adapter(),
    ),
    case(
        "reward",
        "{here}/adapter is an adapter; a reward model is, and starts from, a full model: merge it",
        model_name=adapter(),
    ),
    case(
        "ppo",
        "{here}/reward: a reward model has one label, this classifier has 2",
        reward_model=reward(settings(id2label={"0": "a", "1": "b"})),
    ),
    case(
        "ppo",
        "the weights in {here}/reward are incomplete: score.weight is missing",
        reward_model=reward(weights(drop("score"))),
    ),
    case(
        "ppo",
        "the weights in {here}/reward are damaged: Error while deserializing header: incomplete metadata, file "
        "not fully covered",
        reward_model=reward(damaged(lambda b: b[:3000])),
    ),
    case(
        "evaluate",
        "{here}/model is a LlamaForCausalLM, not a reward model. This makes one: python rlhf/train_reward_model.py",
        reward_model=model(),
    ),
    case(
        "ppo",
        "{here}/reward is a BertForSequenceClassification, for which transformers has no sequence classifier with a "
        "`score` head; a reward model needs one",
        reward_model=reward(bert),
    ),
    case(
        "ppo",
        "{here}/reward has another tokenizer than the model that it is to work with: give another one",
        reward_model=reward(other_ids),
    ),
    case(
        "grpo",
        "{here}/reward has another tokenizer than the model that it is to work with: give another one",
        reward_model=reward(other_ids),
    ),
    case(
        "ppo_inference",
        "{here}/reward has another tokenizer than the model that it is to work with: give another one",
        reward_model=reward(other_ids),
    ),
    case(
        "evaluate",
        "{here}/model has another tokenizer than the model that it is to work with: give another one",
        base=model(other_ids),
    ),
]

REWARD_FUNCTIONS = [
    case("pairs", "reward must be module:function, such as my_reward:reward, got 'rewards'", reward="rewards"),
    case(
        "pairs",
        "reward 'no_such_module:reward': Python finds no module 'no_such_module', and {here}/no_such_module.py is "
        "no file either",
        reward="no_such_module:reward",
    ),
    case(
        "pairs",
        "reward 'rewards:reward': {here}/rewards.py has no 'reward'",
        reward=function("def other(prompt, completion): return 1.0"),
    ),
    case("pairs", "reward 'rewards:reward': reward is a int, not a function", reward=function("reward = 3")),
    case(
        "pairs",
        "reward 'rewards:reward': Python finds no module 'no_such_library', and {here}/rewards.py imports it; for "
        "modules beside it set PYTHONPATH=.",
        reward=function("import no_such_library"),
    ),
    case(
        "pairs",
        "reward 'rewards:reward': importing rewards failed: ValueError: not ready",
        reward=function("raise ValueError('not ready')"),
    ),
    case(
        "pairs",
        "reward 'rewards:reward': importing rewards failed: SystemExit: 0",
        reward=function("import sys; sys.exit(0)"),
    ),
    case(
        "grpo_inference",
        "reward reward on prompt ... raised KeyError: 'x'. Every call failed, 8 completions, and each was tried twice",
        reward=function("def reward(prompt, completion): raise KeyError('x')"),
        limit=1,
    ),
    case(
        "grpo",
        "reward reward on prompt ... raised SystemExit: 0. Every call failed, 12 completions, and each was tried twice",
        reward=function("def reward(prompt, completion): import sys; sys.exit(0)"),
    ),
    case(
        "grpo",
        "reward reward on prompt ... and completion ... returned nan, which is not a finite number",
        reward=function("def reward(prompt, completion): return float('nan')"),
    ),
    case(
        "grpo",
        "reward reward on prompt ... and completion ... returned 'good', which is not a finite number",
        reward=function("def reward(prompt, completion): return 'good'"),
    ),
    case(
        "grpo",
        "reward reward takes (prompt): it must take (prompt, completion), or the lists (prompts, completions) of TRL",
        reward=function("def reward(prompt): return 1.0"),
    ),
    case(
        "grpo_inference",
        "no reward function gave a reward to a completion of ...: all returned None",
        reward=function("def reward(prompt, completion): return None"),
        limit=1,
    ),
    case(
        "grpo",
        "step 1: reward is nan on all completions: no reward function applies. 1 steps in a row were skipped ...",
        reward=function("def reward(prompt, completion): return None"),
        max_skipped=1,
    ),
    case(
        "ppo",
        "reward reward needs the column solution, and the columns beside the prompt are: answer",
        reward_model="none",
        reward=function("def reward(prompts, completions, solution): return [1.0] * len(prompts)"),
        prompts=file("p.jsonl", '{"prompt": "2 + 2?", "answer": "4"}\n' * 4),
    ),
    case(
        "ppo",
        "reward reward must return 8 finite numbers or None, one a completion, not [1.0, 'good']",
        reward_model="none",
        reward=function("async def reward(prompts, completions): return [1.0, 'good']"),
    ),
]

PLACES = [
    case("dpo", "cannot write to {here}/a/out: Not a directory", out=below_a_file("out")),
    case("dpo", "out = {here}/out is a file; give a folder", out=file("out", "mine")),
    case(
        "dpo",
        "out = {here}/out holds files of something else than a run (thesis.txt): give another --out",
        out=folder("out", file("thesis.txt", "mine")),
    ),
    case(
        "dpo",
        "nowhere.jsonl is not there. This makes it: python data/generate_preferences.py",
        out=folder("out"),
        data="nowhere.jsonl",
    ),
    case(
        "dpo",
        "nowhere.jsonl is not there. This makes it: python data/generate_preferences.py",
        out=FINISHED,
        overwrite="true",
        data="nowhere.jsonl",
    ),
    case(
        "grpo",
        "reward reward on prompt ... raised KeyError: 1. Every call failed, 12 completions, and each was tried twice",
        out=folder("out"),
        reward=function("def reward(prompt, completion): return {}[1]"),
    ),
    case("dpo", "cannot write to /proc/run: No such file or directory", out="/proc/run"),
    case(
        "lm",
        "out = model is where model_name = {here}/model lies, which the run reads: give another --out",
        model_name=model(),
        out="model",
    ),
    case("pairs", "cannot write to {here}/a: {here}/a is a file", out=below_a_file("pairs.jsonl")),
    case("pairs", "out = 'pairs.json': must be a file name that ends in .jsonl", out="pairs.json"),
    case(
        "pairs",
        "{here}/pairs.jsonl is there, and no pairs.manifest.json beside it says what made it. Give another --out,"
        " or --overwrite true to replace it",
        out=file("pairs.jsonl", "mine"),
    ),
    case("evaluate", "cannot write to {here}/a: {here}/a is a file", out=below_a_file("out.json")),
    case(
        "evaluate",
        "{here}/out.json is there and no measurement: give another --out, or --overwrite true",
        out=file("out.json", "{}"),
    ),
    case(
        "inference",
        "out = 'nowhere/out.jsonl': must be a file in a folder that is there, with a name that ends in .jsonl",
        prompt="a",
        out="nowhere/out.jsonl",
    ),
    case(
        "inference",
        "out = 'p.jsonl' is the file of the prompts: give another one",
        prompts=file("p.jsonl", [{"prompt": "a"}]),
        out="p.jsonl",
    ),
]

RUNS = [
    case(
        "dpo_inference",
        "models/nowhere is not there. This makes it: python rlhf/dpo_train.py",
        model_name="models/nowhere",
    ),
    case(
        "dpo",
        "{here}/out/manifest.json is damaged: it takes one JSON object",
        out=folder("out", file("config.yaml", "model_name: tiny-llama\n"), file("manifest.json", "{")),
    ),
    case(
        "pairs",
        "{here}/out.manifest.json is damaged: it takes one JSON object",
        out=file("out.jsonl", "mine"),
        prompts=file("out.manifest.json", "{"),
    ),
    case(
        "dpo_inference",
        "{good}/ppo/config.yaml does not say beta: is {good}/ppo the folder of such a run?",
        model_name=good("ppo"),
    ),
    case(
        "ppo_inference",
        "{good}/dpo/config.yaml does not say reward_model: is {good}/dpo the folder of such a run?",
        model_name=good("dpo"),
    ),
    case(
        "dpo",
        "{here}/out holds a run with another configuration:\n  only there: steps\n  only now: ...\nGive another "
        "--out, or --overwrite true to replace it",
        out=folder("out", file("config.yaml", "model_name: tiny-llama\nsteps: 3\n")),
    ),
    case(
        "dpo",
        "{here}/out/config.yaml line 1: not valid YAML (expected the node content, but found '<stream end>'); it takes "
        "one `key: value` a line",
        out=folder("out", file("config.yaml", "model_name: [")),
    ),
    case(
        "compare",
        "these runs are missing; each is made by the command beside it:\n  {here}/m/sft: python "
        "train/train_lm_lora.py --config configs/sft.yaml\n  {here}/m/dpo: python rlhf/dpo_train.py\n  "
        "{here}/m/ppo: python rlhf/ppo_train.py\n  {here}/m/grpo_offline: python rlhf/grpo_train.py "
        "--config configs/grpo_offline.yaml\n  {here}/m/grpo: python rlhf/grpo_train.py\n--allow_missing "
        "true compares the others",
    ),
]


def expected(message, here, good):
    """The pattern of all that the command prints to stderr."""
    named = message.replace("{here}", str(here)).replace("{good}", str(good)).replace("{root}", str(ROOT))
    return re.escape(f"error: {named}\n").replace(re.escape("..."), ".*")


@pytest.mark.parametrize(
    ("script", "message", "options"), KEYS + RENAMED + CONTRADICTIONS + DATA + MODELS + REWARD_FUNCTIONS + PLACES + RUNS
)
def test_a_mistake_is_one_message_and_leaves_nothing(script, message, options, here, good, capfd):
    words = words_of(script, options, good, here)
    before, measured = tree(here), set((ROOT / "report").rglob("*.json"))
    capfd.readouterr()
    assert run(script, words) == 2
    said = capfd.readouterr().err
    assert re.fullmatch(expected(message, here, good), said, flags=re.DOTALL), said
    assert tree(here) == before
    assert set((ROOT / "report").rglob("*.json")) == measured


def test_there_are_enough_of_them():
    every = KEYS + RENAMED + CONTRADICTIONS + DATA + MODELS + REWARD_FUNCTIONS + PLACES + RUNS
    assert len({(row.values[0], row.values[1], str(row.values[2])) for row in every}) >= 60
    assert {row.values[0] for row in every} == set(SCRIPTS)  # each script is among them


@pytest.mark.parametrize(
    ("script", "words", "given", "message"),
    [
        ("train/train_lm.py", ["lr", "1"], b"", "'lr' on the command line: options are written --key value (...)"),
        ("rlhf/dpo_train.py", ["--lr"], b"", "--lr needs a value: --lr VALUE"),
        ("inference/inference.py", ["--prompts", "-"], b"caf\xe9", "standard input: not UTF-8 text (...)"),
    ],
)
def test_the_same_as_typed(script, words, given, message, here, good):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    typed = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(typed, cwd=here, env=environment, input=given, capture_output=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(expected(message, here, good), done.stderr.decode())
    assert not list(here.iterdir())
