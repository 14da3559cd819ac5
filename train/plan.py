"""The plan of a language-model run: what `--dry_run true` prints, and what the manifest compares with the peak."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from configs.config import UserError
from models.admission import MOST_IN_FLOAT32
from models.device import PRECISIONS
from models.flops import Part as Work
from models.options import QuantisationOptions, quantisation
from models.plan import (
    FLOAT,
    gathered,
    in_words,
    logits,
    pace,
    passes,
    planned_model,
    planned_precision,
    sizes,
    target,
    training_parts,
)
from models.scratch import scratch_config
from runtime.plan import Part, Plan

CHARACTERS = 4  # a token, where no tokenizer is here


def plan_lm(config: Any, blocks: int | None, notes: list[str]) -> Plan:
    """The `Plan` of a run of train/. blocks: those that it trains on; None: not known. notes: on how that is known.

    With config.AUTOCAST false, the frozen weights have the dtype of `precision` and no autocast changes it.
    """
    options = vars(config)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    to = target(config, processes)
    precision = planned_precision(options.get("precision", "fp32"), to)
    lora_r, checkpointing = options.get("lora_r", 0), options.get("gradient_checkpointing", False)
    if lora_r and not config.AUTOCAST and precision == "fp16":
        precision = "fp32"
    dtype = PRECISIONS[precision] if lora_r or config.GATHERS else torch.float32
    matmuls = precision if config.AUTOCAST else "fp32"
    how = quantisation(config, dtype) if isinstance(config, QuantisationOptions) else None
    s = sizes(planned_model(config, lambda: scratch(config)), matmuls, dtype, lora_r, how=how)
    rows = min(config.micro_batch_size, config.batch_size)
    tokens, itemsize = rows * config.max_length, PRECISIONS[precision].itemsize
    loading = []
    if lora_r and dtype != torch.float32:  # loaded in float32, and cast weight by weight
        whole = FLOAT * s.base
        # the check of a small model makes it float32 once more
        again = FLOAT * (s.base - s.quantised) if s.weights <= MOST_IN_FLOAT32 else 0
        loading.append(Part("weights in float32", whole + again if to.kind == "cpu" else whole - s.frozen_bytes))
    in_passes = passes(s, tokens, config.max_length, rows, checkpointing)
    in_passes += logits(s, rows * (config.max_length - 1), to.kind, itemsize, not lora_r)
    work = {"loading and checks": loading} if loading else {}
    work["forward and backward pass"] = in_passes
    steps = None
    if blocks is not None:
        steps = config.epochs * math.ceil(blocks / config.batch_size)
    if config.max_steps:
        steps = min(steps or config.max_steps, config.max_steps)
    shards = to.processes if config.SHARDED else 1
    if shards > 1 and config.GATHERS:
        in_passes += gathered(s, itemsize)
        notes.append("a layer is gathered before its pass and freed after it; the embedding and the head stay")
    elif shards > 1:
        notes.append("activations count in whole; those within a layer are split, too, and the norms are not")
    each = config.batch_size * config.max_length
    work_a_step = Work(each, each * config.max_length // 2, each)
    return Plan(
        target=to,
        model=f"{in_words(s, config.model_name)}, {precision}",
        steps=f"{steps:,} of {config.batch_size} blocks" if steps else "not known",
        tokens=f"{each * steps:,} trained, at most" if steps else "not known",
        held=training_parts(s, "model", dtype, to.processes // shards, config.DDP),
        work=work,
        notes=notes,
        flops=s.cost.training(work_a_step) * (steps or 0),
        seconds_of=pace(s, precision, to),
        shards=shards,
    )


def scratch(config: Any) -> Any:
    """The configuration of the model with random weights that `config` asks for."""
    shape = (config.scratch_layers, config.scratch_width, config.scratch_heads, config.max_length)
    return scratch_config(config.scratch_architecture, *shape, config.scratch_vocab)


def estimated_blocks(documents: list[dict], max_length: int) -> int:
    """The blocks of documents where no tokenizer is here, by their characters."""
    return max(1, sum(len(str(document)) for document in documents) // CHARACTERS // max_length)


def known(read: Any, notes: list[str], bound: str) -> Any:
    """What `read` returns. If it raises UserError, None, with a note that says why and what `bound` is used instead."""
    try:
        return read()
    except UserError as error:
        notes.append(f"{bound}: {error}")
        return None
