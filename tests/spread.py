"""Runs whose weights are spread over processes, for test_sharded.py: in processes of their own, forked."""

import contextlib
import importlib
import json
import os
import sys

import torch

from runtime import checkpoint
from runtime.cli import cli
from train import common, train_lm_fsdp, updates

# five steps of micro-batches of 2, 2 and 1 blocks: two processes do not get equal shares of them
FIVE = {"batch_size": 5, "micro_batch_size": 2, "max_length": 64, "max_steps": 5, "warmup_steps": 0, "lr": 1e-2}
FIVE |= {"log_every": 1, "max_grad_norm": 0.5, "eval_blocks": 5, "data": "tests/train/text.jsonl"}
WORDS = ["--config", "configs/smoke/train_base.yaml", "--sample_tokens", 2, "--save_every", 1, "--batch_size", 6]


def work(folder, name, script, model, dtype, environment, options):
    """Five AdamW steps of `script` on `model`, in a process of its own. NAME.RANK.json has how many numbers it kept."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    module, load, made = importlib.import_module(f"train.{script}"), common.load_model, updates.Updates.__init__
    common.load_model = lambda *given, **more: load(*given, **{**more, "dtype": getattr(torch, dtype)})
    kept = []

    def remember(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        for p in parameters:
            kept.append((p.to_local() if script == "train_lm_fsdp" else p).numel())
        made(self, parameters, *args, **kwargs)

    updates.Updates.__init__ = remember
    out = folder / name
    with open(f"{out}.said", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        module.train(module.Config(model_name=str(folder / model), out=str(out), **FIVE, **options))
    rank = environment.get("RANK", "0")
    (folder / f"{name}.{rank}.json").write_text(json.dumps(sum(kept)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def spoilt(folder, out):
    """A run of the FSDP script whose checkpoints are written where process 0 does not look."""
    write = checkpoint.write_shards
    checkpoint.write_shards = lambda tensors, where: write(tensors, where.with_name("elsewhere"))
    sys.argv = ["train/train_lm_fsdp.py", *map(str, [*WORDS, "--model_name", folder / "tied", "--out", out])]
    with open(f"{out}.said", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        cli(train_lm_fsdp.train, train_lm_fsdp.Config, several=True)
