"""What the language-model scripts share: configuration, data order, schedule, optimizer, loss, evaluation, saving."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from configs.config import UserError, option
from data.blocks import make_blocks
from data.corpus import load_corpus
from data.order import data_order
from models.device import compile_layers
from models.fast.head import check_head, head_nll, hidden_states, unwrapped
from models.generation import generate
from models.loader import check_length, load_model, load_tokenizer, portable_name, resolve_model
from models.scratch import build_scratch, train_tokenizer
from models.tokens import answer_text, prompt_ids
from runtime.checkpoint import Saving
from runtime.console import say
from runtime.files import in_root, shown, write_atomically


@dataclass
class LMConfig(Saving):
    """One run of language-model training. A script adds its own fields."""

    CONFIG: ClassVar[str] = "configs/train_base.yaml"
    model_name: str = option("smollm2-135m", "a folder, an embedded name, a hub id, or `scratch` for random weights")
    batch_size: int = option(2, "blocks in one forward pass", at_least=1)
    max_length: int = option(256, "tokens in a block", at_least=8)
    lr: float = option(5e-5, "peak learning rate", above=0)
    epochs: int = option(1, "times that each block is seen", at_least=1)
    max_steps: int = option(0, "optimizer steps at most; 0 = as many as the epochs have", at_least=0)
    accumulation_steps: int = option(2, "forward passes in one optimizer step, over all processes", at_least=1)
    warmup_steps: int = option(5, "optimizer steps until the peak learning rate", at_least=0)
    min_lr_ratio: float = option(0.1, "learning rate of the last step, as a share of lr", at_least=0, at_most=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    data: str = option("shakespeare", "an embedded text, a .txt or .jsonl file, a folder, or a hub dataset")
    heldout_fraction: float = option(0.05, "share kept for evaluation, where the data says nothing", above=0, below=1)
    eval_blocks: int = option(16, "held-out blocks that an evaluation reads; 0 = all", at_least=0)
    eval_every: int = option(0, "optimizer steps between evaluations; 0 = only before and after", at_least=0)
    log_every: int = option(5, "optimizer steps between log lines", at_least=1)
    sample_prompt: str = option("", "what the model goes on from, before and after training; empty = no samples")
    sample_tokens: int = option(60, "length of a sample at most", at_least=1)
    scratch_architecture: str | None = option(None, "only for model_name scratch: llama or gpt2")
    scratch_layers: int | None = option(None, "only for model_name scratch", at_least=1)
    scratch_width: int | None = option(None, "only for model_name scratch: size of the hidden states", at_least=8)
    scratch_heads: int | None = option(None, "only for model_name scratch: attention heads", at_least=1)
    scratch_vocab: int | None = option(None, "only for model_name scratch: ids of its tokenizer", at_least=260)
    seed: int = option(0, "decides weights, data order and samples", at_least=0)
    out: str = option("models/lm", "the folder that receives the model, metrics and manifest")
    overwrite: bool = option(False, "replace a run that lies in `out`")

    def check(self):
        shape = {k: v for k, v in vars(self).items() if k.startswith("scratch_")}
        given = sorted(k for k, v in shape.items() if v is not None)
        if self.model_name != "scratch" and given:
            raise UserError(f"{', '.join(given)} would have no effect: model_name is {self.model_name!r}, not scratch")
        if self.model_name == "scratch" and len(given) < len(shape):
            missing = ", ".join(sorted(shape.keys() - set(given)))
            raise UserError(f"model_name scratch needs {missing} too; see configs/train_scratch.yaml")
        if self.model_name == "scratch" and self.scratch_architecture not in ("llama", "gpt2"):
            raise UserError(f"scratch_architecture = {self.scratch_architecture!r}: must be llama or gpt2")
        if self.model_name == "scratch" and self.scratch_width % (2 * self.scratch_heads):
            raise UserError(
                f"scratch_width = {self.scratch_width} must be a multiple of twice scratch_heads = {self.scratch_heads}"
            )


def load_data(config):
    """The corpus that `data` names. Raises UserError when it holds nothing to train on or nothing to evaluate on."""
    path = in_root(config.data)
    if not path.exists() and path.name == "preferences.jsonl":
        raise UserError(f"{shown(path)} is not there. This makes it: python data/generate_preferences.py")
    corpus = load_corpus(str(path) if path.exists() else config.data, config.heldout_fraction)
    if not corpus.heldout:
        raise UserError(f"data = {config.data!r} is too small: no document is left for evaluation")
    return corpus


def load_blocks(config, corpus, tokenizer):
    """(training blocks, held-out blocks); of the held-out ones as many as an evaluation reads, spread over all."""
    size, name = config.max_length, corpus.name
    blocks = make_blocks(corpus.train, corpus.kind, tokenizer, size, f"{name}, training")
    heldout = make_blocks(corpus.heldout, corpus.kind, tokenizer, size, f"{name}, held out")
    if config.eval_blocks:
        heldout = heldout.pick(sorted(data_order(len(heldout), 0, 0)[: config.eval_blocks]))
    return blocks, heldout


def load_start(config, corpus, device):
    """The model in float32 and its tokenizer that training starts from: a pretrained one, or random weights."""
    if config.model_name == "scratch":
        tokenizer = train_tokenizer(corpus.train, config.scratch_vocab)
        shape = (config.scratch_layers, config.scratch_width, config.scratch_heads, config.max_length)
        model = build_scratch(config.scratch_architecture, *shape, tokenizer, config.seed).to(device)
    else:
        tokenizer = load_tokenizer(config.model_name)
        model = load_model(config.model_name, dtype=torch.float32, device=device, merge_adapter=True)
        check_head(model, config.model_name)
    check_length(model, config)
    return model, tokenizer


def steps_in_epoch(rows, config):
    return math.ceil(rows / (config.batch_size * config.accumulation_steps))


def count_steps(rows, config):
    """Optimizer steps of the run."""
    steps = config.epochs * steps_in_epoch(rows, config)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    if config.warmup_steps >= max(steps, 2):
        raise UserError(f"warmup_steps = {config.warmup_steps} must be below the {steps} steps of this run")
    return steps


def step_rows(step, rows, config):
    """The micro-batches of optimizer step `step` (from 0): lists of block numbers, a function of (seed, step) alone.

    The last step of an epoch may be smaller; no block is left out.
    """
    epoch, step = divmod(step, steps_in_epoch(rows, config))
    size = config.batch_size * config.accumulation_steps
    mine = data_order(rows, config.seed, epoch)[step * size : (step + 1) * size]
    return [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]


def lm_loss(model, batch, compiled=False):
    """(sum of -log p in nats over the counted tokens, their number) of a batch of packed blocks.

    compiled: that of `head_nll`. No attention mask is passed: from positions that restart, transformers makes the
    block-diagonal one.
    """
    input_ids, at = batch["input_ids"], batch["mask"]  # (B, T), (B, T-1)
    hidden = hidden_states(model, input_ids, position_ids=batch["position_ids"])[:, :-1]  # (B, T-1, H)
    head = unwrapped(model).get_output_embeddings()
    return head_nll(head, hidden[at], input_ids[:, 1:][at], compiled), at.sum()


@torch.no_grad()
def evaluate_lm(model, blocks, batch_size, share=(0, 1), reduce=None):
    """{"nats_per_token", "bits_per_byte"} over all counted tokens of `blocks`, each counted once.

    share: (r, n) reads every n-th block from r on; reduce: a function that sums a tensor over the n processes.
    Changes neither parameters nor random state.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    mine = list(range(len(blocks)))[share[0] :: share[1]]
    for rows in (mine[i : i + batch_size] for i in range(0, len(mine), batch_size)):
        nats, tokens = lm_loss(model, blocks.batch(rows, device))
        total += torch.tensor([nats.item(), tokens.item(), blocks.bytes[rows].sum().item()], dtype=torch.float64)
    model.train(was_training)
    nats, tokens, sizes = (reduce(total.to(device)) if reduce else total).tolist()
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / max(sizes, 1)}


def show_sample(model, tokenizer, kind, config, when):
    """Print and return the model's answer to `sample_prompt`, or None without one. Leaves the random state alone."""
    if not config.sample_prompt:
        return None
    plain = tokenizer(config.sample_prompt).input_ids
    ids = plain if kind == "text" else prompt_ids(tokenizer, config.sample_prompt)
    stop = (tokenizer.eos_token_id,)
    new = min(config.sample_tokens, model.config.max_position_embeddings - len(ids))
    if new < 1:
        raise UserError(f"sample_prompt has {len(ids)} tokens: the model reads at most {len(ids) + new}")
    found = generate(model, [ids], new, temperature=0.8, top_p=0.95, stop_ids=stop, seed=config.seed)
    text = answer_text(tokenizer, found.completions[0])
    say(f"\nsample {when} training, after {config.sample_prompt!r}:\n" + "\n".join("  " + x for x in text.splitlines()))
    return {"when": when, "prompt": config.sample_prompt, "answer": text}


def compile_if_asked(model, config):
    """Compile the layers where `config.compile` says so. Raises UserError on a CPU."""
    if config.compile and model.device.type == "cpu":
        raise UserError("compile = True is for GPUs: on a CPU compiling takes longer than it saves")
    if config.compile:
        compile_layers(model)


def save_samples(folder, samples):
    lines = [json.dumps(s, ensure_ascii=False) + "\n" for s in samples if s]
    if lines:
        write_atomically(folder / "samples.jsonl", "".join(lines))


def name_base(model, model_name):
    """Make an adapter name its base so that it loads on another machine, from another checkout."""
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = portable_name(resolve_model(model_name))


def summary(before, after, steps):
    """What a run reached, for its manifest: held-out loss before and after."""
    return {"steps": steps, **{f"{k}_before": v for k, v in before.items()}, **after}
