"""Runs of the training scripts on tiny models, a second each: what the claims about whole runs are measured on.

A run is a process of its own, or several that talk over gloo. The script is called as its command line calls it. All
processes are forked from one server that has imported the libraries: a run then takes a second, not ten. They run on
the CPU, also where there is a GPU.
"""

from __future__ import annotations

import collections
import faulthandler
import functools
import importlib
import json
import math
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.config import ROOT
from models.generation import generate
from models.loader import load_model, load_tokenizer
from models.tiny import byte_tokenizer, tiny_config
from models.tokens import completion_text, prompt_ids
from proof.architectures import build
from report.methods import METHODS
from rlhf import train_reward_model
from runtime.cli import cli
from train import common, train_lm, train_lm_amp_ckpt, train_lm_ddp, train_lm_fsdp, train_lm_lora, train_lm_tp, updates

MODELS = ("tiny-gpt2", "tiny-llama")  # learned positions, rotary positions
WINDOW = 4  # tokens: the claims' longer prompts, and their rows, exceed it
# Tiny models of other kinds: (model_type, what the kind is, the keys that make it, the dtypes in which it is measured)
KINDS: dict[str, tuple[str, str, dict, tuple[str, ...]]] = {
    "tiny-mistral": ("mistral", "windowed", {"sliding_window": WINDOW}, ("float64", "float32", "bf16", "fp16")),
    # not in float64, because transformers takes the softmax of eager attention in float32
    "tiny-gemma2": ("gemma2", "soft-capped, windowed in one layer", {"sliding_window": WINDOW,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 3.0}, ("float32", "bf16", "fp16")),
    # in float32 only, because a rounding of 16 bits may send a token to another expert; torch.grouped_mm has no float64
    "tiny-mixtral": ("mixtral", "a mixture of experts", {"sliding_window": None}, ("float32",)),
    # in float32 only, because its attention does not scale the products: it multiplies the roundings of 16 bits
    "tiny-gpt-neo": ("gpt_neo", "eager, windowed in one layer", {"window_size": WINDOW}, ("float32",)),
}  # fmt: skip
DROPOUT = "tiny-gpt2-dropout"
SECONDS = 120  # after which a run counts as hung

REWARD = """def reward(prompt, completion):
    return sum(map(ord, completion)) % 7 / 7
"""


@dataclass(frozen=True)
class Trainer:
    """A script, the options that make it a run of a second, and how large its micro-batches are."""

    script: ModuleType
    options: dict
    whole: dict  # options with which a step is one micro-batch
    pieces: dict  # options with which its micro-batches are as small as possible
    sgd_lr: float = 0.5  # the learning rate where SGD takes the steps
    reward_model: bool = False  # whether it learns from a reward model, if it is given no reward function


GROUP = 3  # completions in a stored group
PAIRS = {"data": "pairs.jsonl", "batch_size": 3, "epochs": 2, "max_steps": 5, "warmup_steps": 1}
ROLLOUTS = {"prompts": "prompts.json", "prompts_per_step": 3, "max_new_tokens": 8, "temperature": 0.7, "steps": 3}
GROUPS = {"groups": "groups.jsonl", "prompts_per_step": 3, "steps": 3}
LEARNS_FROM = {"pairs": PAIRS, "rollouts": ROLLOUTS, "groups": GROUPS}


def _lm(script, sgd_lr=0.5, **options):
    """An LM script. Its run ends in the middle of the second epoch."""
    base = {"config": "smoke/train_base", "data": "text.jsonl", "batch_size": 4, "micro_batch_size": 2, "epochs": 2}
    base |= {"max_steps": 9, "log_every": 1, "max_grad_norm": 0.5, "sample_tokens": 2}
    return Trainer(script, base | options, {"micro_batch_size": 4}, {"micro_batch_size": 1}, sgd_lr)


def _rlhf(script, config, together=1, **options):
    """A script of rlhf/, whose steps have three pairs or groups. together: the completions of a group, 1 for pairs."""
    one, two, three = ({"micro_batch_size": n} for n in (1, 2 * together, 3 * together))
    return Trainer(script, {"config": config, "max_grad_norm": 0.5} | two | options, whole=three, pieces=one)


def _method(method):
    """The script of a method of report/methods.py that learns from pairs, rollouts or groups."""
    script = importlib.import_module(method.script.removesuffix(".py").replace("/", "."))
    options = LEARNS_FROM[method.learns_from] | method.tiny
    reward_model = method.learns_from == "rollouts" and bool(script.Config.reward_model)
    if method.learns_from == "rollouts" and not reward_model:
        options["reward"] = "reward:reward"  # in place of the checks, which the prompts do not have
    together = GROUP if method.learns_from == "groups" else options.get("samples_per_prompt", 1)
    return replace(_rlhf(script, f"smoke/{method.key}", together, **options), reward_model=reward_model)


RLHF = {"reward": _rlhf(train_reward_model, "smoke/reward", **PAIRS)}
RLHF |= {m.label.removesuffix(" online"): _method(m) for m in METHODS if m.learns_from in LEARNS_FROM}
TRAINERS = {
    "LM": _lm(train_lm),
    "DDP": _lm(train_lm_ddp),
    "AMP": _lm(train_lm_amp_ckpt, precision="fp32", gradient_checkpointing=False, measure_steps=0),
    "LoRA": _lm(train_lm_lora, 0.05, precision="fp32", lora_r=4),
    **RLHF,
}
SPREAD = {"FSDP": _lm(train_lm_fsdp), "TP": _lm(train_lm_tp)}  # their weights are spread over the processes
RUNS = TRAINERS | SPREAD


def prepare(folder):
    """Write into `folder` what runs and claims read: models, texts, pairs, prompts, groups and a reward function.

    The models are those of `models/tiny.py`, but their weights are ten times as large: attention then looks somewhere,
    and a wrong position or mask shows. The token that ends a turn is often sampled: completions then differ in length.
    Beside them, the models of KINDS as `proof/architectures.py` builds them.
    """
    for name in (*MODELS, DROPOUT):
        tokenizer = byte_tokenizer(chat=name == "tiny-llama")
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1) if name == DROPOUT else {}
        shape = name.removesuffix("-dropout")
        config = tiny_config(shape, len(tokenizer), tokenizer.eos_token_id, initializer_range=0.2, **dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                torch.nn.init.normal_(model.get_output_embeddings().weight[tokenizer.eos_token_id], std=0.8)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        _write(folder / name / "groups.jsonl", _groups(folder / name))
    for name, (model_type, _, changes, _) in KINDS.items():
        build(model_type, folder / name, max_position_embeddings=512, **changes)
        _write(folder / name / "groups.jsonl", _groups(folder / name))
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    texts = [{"prompt": f"Count {i}", "completion": " ".join(words[i % 5 : i % 5 + 1 + i % 7])} for i in range(40)]
    pairs = [
        {"prompt": f"letter {i}", "chosen": "a" * (1 + 3 * (i % 4)), "rejected": "b" * (9 - 2 * (i % 3))}
        for i in range(16)
    ]
    prompts = [{"id": str(i), "prompt": "Say " + word, "split": "train"} for i, word in enumerate(words)]
    _write(folder / "text.jsonl", texts)
    _write(folder / "pairs.jsonl", pairs)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "reward.py").write_text(REWARD)


def _groups(model_folder):
    """Rows with groups of three completions that the model itself sampled, as the generator of groups writes them."""
    model, tokenizer = load_model(model_folder, device="cpu"), load_tokenizer(model_folder)
    rows = []
    for i in range(6):
        prompt, stops = f"group {i}", [tokenizer.eos_token_id]
        g = generate(model, [prompt_ids(tokenizer, prompt)], 8, samples_per_prompt=GROUP, stop_ids=stops, seed=i)
        texts = [completion_text(tokenizer, c) for c in g.completions]
        rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1:], "scores": [1.0, 0.0, 0.5],
                     "completion_ids": g.completions, "logprobs": g.logprobs, "temperature": 1.0})  # fmt: skip
    return rows


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, trainer, model, name="left alone", processes=1, exact=None, **changes):
    """The folder of a finished run of `trainer`, a key of RUNS, on `model`. Runs it if the folder is not there yet.

    changes: options that differ from the trainer's own. exact: None for the script as it is; "float32" or "float64" for
    steps that can be compared, see `_exact`. Raises AssertionError if the run fails, with the end of what it printed.
    """
    out = _folder(folder, trainer, model, name, exact)
    if not (out / "manifest.json").is_file():
        started = start(folder, trainer, model, out, processes, exact, **changes)
        for process in started:
            process.join(SECONDS)
            if process.is_alive():
                process.kill()
        codes = [process.exitcode for process in started]
        assert codes == [0] * processes, f"{out.name} of {trainer}: exit {codes}\n{said(out)[-2000:]}"
    return out


def interrupt(folder, trainer, model, name, **changes):
    """Start a run, and kill it by SIGKILL once its first checkpoint is there. Returns whether the run was killed.

    A busy machine may see the checkpoint only after the run has ended, so this is tried five times.
    """
    out = _folder(folder, trainer, model, name, None)
    for _ in range(5):
        (process,) = start(folder, trainer, model, out, **changes)
        until = time.monotonic() + SECONDS
        while process.is_alive() and time.monotonic() < until and not list(out.glob("checkpoints/step-*")):
            time.sleep(0.002)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL and not (out / "manifest.json").exists():
            return True
        shutil.rmtree(out, ignore_errors=True)
    return False


def _folder(folder, trainer, model, name, exact):
    return folder / "runs" / trainer / model / f"{name}{', ' + exact if exact else ''}"


def start(folder, trainer, model, out, processes=1, exact=None, **changes):
    """Start the processes of a run into the folder `out`, and return them; see `run`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    options = RUNS[trainer].options | {"model_name": folder / model, "out": out}
    if exact:  # few steps, because rounding grows from step to step
        options |= {"lr": RUNS[trainer].sgd_lr} | ({"max_steps": 4} if "max_steps" in options else {"steps": 2})
    options |= changes
    script = RUNS[trainer].script.__name__
    if script.startswith("rlhf") and model.startswith("tiny-gpt2"):  # all its weights train; tiny-llama gets an adapter
        options = {"lora_r": 0} | options
    if RUNS[trainer].reward_model and "reward" not in options:
        options["reward_model"] = run(folder, "reward", model)
    options["config"] = ROOT / "configs" / f"{options['config']}.yaml"
    for key in ("data", "prompts", "groups"):
        if key in options:
            options[key] = folder / (model if key == "groups" else ".") / options[key]
    words = [word for key, value in options.items() for word in (f"--{key}", _word(value))]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {"HF_HUB_OFFLINE": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work = (script, words, environment, folder, f"{out}.log", exact)
        started.append(server().Process(target=_command, args=work, daemon=True))
        started[-1].start()
    return started


def _word(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def server():
    """The server that forks the processes of runs; it sees no GPU. The first call starts it, which takes 10 seconds."""
    context = multiprocessing.get_context("forkserver")
    late = ["datasets", "peft", "matplotlib.pyplot", "torch.optim.adamw"]  # what scripts import late
    context.set_forkserver_preload(["proof.claims", *late])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    multiprocessing.forkserver.ensure_running()
    if visible is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return context


def _command(script, words, environment, folder, log, exact):
    """Do what `python SCRIPT.py WORDS` does, in a process that has imported everything. The file `log` gets the output.

    The last line of the output is how often each kind of layer was computed.
    """
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    os.environ.pop("OMP_NUM_THREADS", None)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 5, exit=True)  # a run that hangs says where
    sys.argv = [f"{script.replace('.', '/')}.py", *words]
    module = importlib.import_module(script)
    if exact:
        _exact(exact)
    layers = collections.Counter()
    count = torch.nn.modules.module.register_module_forward_pre_hook
    count(lambda layer, _: layers.update([type(layer).__name__]))
    cli(vars(module).get("main", vars(module).get("train")), module.Config, several="RANK" in environment)
    print(json.dumps(layers))


def _exact(dtype):
    """Make a script's steps comparable: plain SGD in place of AdamW. With "float64" an LM script gets such weights.

    AdamW divides a gradient by its own size. This hides a wrong scale. Where a gradient is 0 but for rounding, AdamW
    makes full steps of that rounding.
    """
    updates.make_optimizer = lambda parameters, lr, *_: torch.optim.SGD([p for p in parameters if p.requires_grad], lr)
    if dtype == "float64":
        load = common.load_model
        common.load_model = lambda *given, **options: load(*given, **{**options, "dtype": torch.float64})


def said(out):
    """What the run with this folder printed."""
    return Path(f"{out}.log").read_text(encoding="utf-8")


def layers_computed(out):
    """How often a layer of the transformer was computed in a run: in forward passes, and again in backward passes."""
    counts = json.loads(said(out).splitlines()[-1])
    return sum(count for name, count in counts.items() if name.endswith("MLP"))  # each layer has one


def metrics(out):
    """The logged lines of a run as dicts, without what depends on the clock."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in ("seconds", "tok/s")} for x in lines]


def weights(folder):
    """All saved weights in a folder, by name, in float64: of the model or the adapter, and of PPO's value head."""
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.stem}/{name}": value.double() for path in files for name, value in load_file(path).items()}


def apart(found, expected, start, dtype):
    """How far two runs ended from each other, a float: the largest of three. found, expected: their folders.

    The three are: the Euclidean distance of all weights, as a share of how far they moved from those in the folder
    `start`; the relative differences of the logged losses (absolute below 1 nat); and those of the gradients' norms.
    Losses are left out with dtype "float64", because they are added up in float32. Adapters and value heads start at 0.
    What starts at random (an adapter's A, the head of scores) is left out of how far the weights moved.
    Raises AssertionError if the runs have weights with other names.
    """
    a, b, before = weights(found), weights(expected), weights(start)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    moved = [value - before.get(name, 0) for name, value in b.items() if "lora_A" not in name and "score" not in name]
    distance = _norm(a[name] - value for name, value in b.items()) / _norm(moved)
    lines = list(zip(metrics(found), metrics(expected), strict=True))
    keys = ("grad_norm",) if dtype == "float64" else ("loss", "grad_norm")
    logged = [abs(x[k] - y[k]) / max(abs(y[k]), 1.0) for x, y in lines for k in keys if k in y]
    return largest([distance, *logged])


def largest(deviations):
    """The largest of some deviations, a float; inf if one is NaN, because `max` may pass over it."""
    deviations = [float(x) for x in deviations]
    return math.inf if any(map(math.isnan, deviations)) else max(deviations)


def _norm(tensors):
    return sum(x.square().sum() for x in tensors).sqrt().item()


def differ(found, expected):
    """The largest difference of the saved weights and of the logged numbers of two runs; 0 means bitwise equal.

    found, expected: their folders. Raises AssertionError if the runs have weights or logged numbers with other names.
    """
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    lines = list(zip(metrics(found), metrics(expected), strict=True))
    assert all(x.keys() == y.keys() for x, y in lines)
    logged = [abs(x[key] - y[key]) for x, y in lines for key in y]
    return largest([*logged, *((a[name] - value).abs().max() for name, value in b.items())])
