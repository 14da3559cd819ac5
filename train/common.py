"""Shared code of the language-model scripts: options, model and data, the order of blocks, the loss, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from configs.config import UserError, option, refuse_unused, shown
from data.blocks import gives_samples, make_blocks
from data.corpus import load_corpus, split_heldout
from data.order import epoch_order, in_batches
from models.admission import check_training
from models.fast.head import check_head, head_nll, output_head
from models.generation import generate
from models.loader import check_length, context_length, load_model, load_tokenizer, weights_hash
from models.options import ModelOptions
from models.router import check_router, router_of
from models.scratch import build_scratch, train_tokenizer
from models.tokens import completion_text, never_sampled, prompt_ids, stop_ids, use_template_options
from runtime.checkpoint import Saving
from runtime.console import say
from runtime.files import in_root
from runtime.plan import Plan
from runtime.processes import Processes
from runtime.progress import Progress
from runtime.provenance import note_plan
from train.packed import block_states
from train.plan import estimated_blocks, known, plan_lm
from train.updates import check_warmup


@dataclass
class LMConfig(ModelOptions, Saving):
    """The options of a language-model run. A script adds its own options."""

    CONFIG: ClassVar[str] = "configs/train_base.yaml"
    AUTOCAST: ClassVar[bool] = True  # `precision`, where it is an option, is that of the matmuls by autocast
    DDP: ClassVar[bool] = False
    SHARDED: ClassVar[bool] = False  # whether weights, gradients and the optimizer's state are divided among processes
    GATHERS: ClassVar[bool] = False  # whether each layer is put together for its pass; else it stays divided
    RENAMED: ClassVar[dict] = {
        "accumulation_steps": "batch_size (blocks an optimizer step) and micro_batch_size (blocks in one pass)"
    }
    model_name: str = option(
        "smollm2-135m", "a folder, an embedded name, a hub id, or `scratch` for random weights", reads=True
    )
    batch_size: int = option(4, "blocks per optimizer step, over all processes", at_least=1)
    micro_batch_size: int = option(2, "blocks in one forward and backward pass", at_least=1)
    max_length: int = option(256, "tokens in a block", at_least=8)
    lr: float = option(5e-5, "peak learning rate", above=0)
    epochs: int = option(1, "times that each block is seen", at_least=1)
    max_steps: int = option(0, "optimizer steps at most; 0 = as many as the epochs have", at_least=0)
    warmup_steps: int = option(5, "optimizer steps until the peak learning rate", at_least=0)
    min_lr_ratio: float = option(0.1, "learning rate of the last step, as a share of lr", at_least=0, at_most=1)
    weight_decay: float = option(0.1, "AdamW's, on matrices", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    data: str = option("shakespeare", "an embedded text, a .txt or .jsonl file, a folder, or a hub dataset", reads=True)
    heldout_fraction: float = option(0.05, "share held out, if the data has no held-out part", above=0, below=1)
    eval_blocks: int = option(16, "held-out blocks that an evaluation reads; 0 = all", at_least=0)
    eval_every: int = option(0, "optimizer steps between evaluations; 0 = only before and after", at_least=0)
    log_every: int = option(5, "optimizer steps between log lines", at_least=1, identity=False)
    sample_prompt: str = option("", "prompt of the samples before and after training; empty = no samples")
    sample_tokens: int = option(60, "longest sample, in tokens", at_least=1)
    scratch_architecture: str | None = option(None, "only for model_name scratch: llama or gpt2")
    scratch_layers: int | None = option(None, "only for model_name scratch", at_least=1)
    scratch_width: int | None = option(None, "only for model_name scratch: size of the hidden states", at_least=8)
    scratch_heads: int | None = option(None, "only for model_name scratch: attention heads", at_least=1)
    scratch_vocab: int | None = option(None, "only for model_name scratch: ids of its tokenizer", at_least=260)
    seed: int = option(0, "decides weights, data order and samples", at_least=0)
    out: str = option("models/lm", "the folder that receives the model, metrics and manifest", identity=False)
    overwrite: bool = option(False, "replace a run that lies in `out`", identity=False)

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

    def plan(self, data: Any = None) -> Plan:
        """The `Plan` of this run. data: the number of its training blocks; None: read the data to count them."""
        notes: list[str] = []
        if data is None:
            corpus = known(lambda: load_data(self), notes, "steps are not known, or max_steps")
            data = corpus and count_blocks(self, corpus, notes)
        return plan_lm(self, data, notes)


class Start:
    """The model and the data of a run: `model`, `tokenizer`, training `blocks` and `heldout` blocks.

    kind: "text", "messages" or "prompt", the kind of the corpus. inputs: {name: hash} of the data and the weights.
    """

    def __init__(self, config, device, change_model=None):
        """change_model: takes the loaded model and returns the one to train."""
        corpus = load_data(config)
        self.kind = corpus.kind
        self.model, self.tokenizer = load_start(config, corpus, device)
        self.inputs = {config.data: corpus.sha256, config.model_name: weights_hash(self.model)}
        if change_model:
            self.model = change_model(self.model)
        check_training(self.model.train(), noise=True)
        check_router(self.model)
        self.model.eval()
        self.blocks, self.heldout = load_blocks(config, corpus, self.tokenizer)
        note_plan(lambda: config.plan(len(self.blocks)))


def load_data(config):
    """The corpus of config.data. Raises UserError if it has nothing to train on or nothing to evaluate on."""
    path = in_root(config.data)
    if not path.exists() and path.name == "preferences.jsonl":
        raise UserError(f"{shown(path)} is not there. This makes it: python data/generate_preferences.py")
    corpus = load_corpus(str(path) if path.exists() else config.data, config.heldout_fraction)
    if not corpus.heldout:
        why = "is too small" if len(corpus.train) == 1 else f"holds {len(corpus.train)} equal documents"
        raise UserError(f"data = {config.data!r} {why}: no document is left for evaluation")
    return corpus


def load_blocks(config, corpus, tokenizer):
    """(training blocks, held-out blocks). Of the held-out blocks, config.eval_blocks are chosen at random (seed 0).

    If nothing of the held-out documents can be used, the usable training documents are split again.
    """
    size, name, train, held = config.max_length, corpus.name, corpus.train, corpus.heldout
    if not any(gives_samples(tokenizer, document, size) for document in held):
        usable = [document for document in train if gives_samples(tokenizer, document, size)]
        if len(usable) > 1:
            say(f"{name}: none of its {len(held)} held-out documents can be used; others are held out")
            train, held = split_heldout(usable, config.heldout_fraction)
    blocks = make_blocks(train, corpus.kind, tokenizer, size, f"{name}, training")
    heldout = make_blocks(held, corpus.kind, tokenizer, size, f"{name}, held out")
    if config.eval_blocks:
        heldout = heldout.pick(sorted(epoch_order(len(heldout), 0, 0)[: config.eval_blocks]))
    return blocks, heldout


def count_blocks(config, corpus, notes):
    """The number of training blocks of a corpus: by the model's tokenizer, or by characters where it is not here."""
    tokenizer = None
    if config.model_name != "scratch":
        options, bound = config.chat_template_kwargs, "tokens are counted as 4 characters each"
        tokenizer = known(lambda: load_tokenizer(config.model_name, options), notes, bound)
    return (
        len(load_blocks(config, corpus, tokenizer)[0])
        if tokenizer
        else estimated_blocks(corpus.train, config.max_length)
    )


def load_start(config, corpus, device):
    """(model, tokenizer) at the start of training, in float32: a pretrained model, or random weights."""
    options = config.chat_template_kwargs
    if corpus.kind == "text":
        refuse_unused(config, ["chat_template_kwargs"], f"data = {config.data!r}: no template renders plain text")
    if config.model_name == "scratch":
        tokenizer = train_tokenizer(corpus.train, config.scratch_vocab)
        use_template_options(tokenizer, options, config.model_name)
        shape = (config.scratch_layers, config.scratch_width, config.scratch_heads, config.max_length)
        model = build_scratch(config.scratch_architecture, *shape, tokenizer, config.seed).to(device)
    else:
        tokenizer = load_tokenizer(config.model_name, options)
        model = load_model(config.model_name, dtype=torch.float32, device=device, merge_adapter=True)
        check_head(model, config.model_name)
    check_length(model, config)
    return model, tokenizer


def steps_in_epoch(rows, config):
    return math.ceil(rows / config.batch_size)


def count_steps(rows, config):
    """The number of optimizer steps of the run. Raises UserError if the warm-up is not shorter."""
    steps = config.epochs * steps_in_epoch(rows, config)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    check_warmup(config.warmup_steps, steps)
    return steps


def step_rows(step, rows, config):
    """The micro-batches of optimizer step `step` (from 1): lists of block numbers. They depend on (seed, step) only.

    The last step of an epoch may be smaller. No block is left out.
    """
    epoch, place = divmod(step - 1, steps_in_epoch(rows, config))
    size, piece = config.batch_size, config.micro_batch_size
    return in_batches(epoch_order(rows, config.seed, epoch)[place * size : (place + 1) * size], piece)


def lm_loss(model, batch, compiled=False, nll=head_nll):
    """(sum of -log p in nats over the counted tokens, their number) of a batch of packed blocks.

    compiled: that of `head_nll`. nll: a function with its arguments that takes its place. Samples that share a row do
    not see each other: see train/packed.py. The gradients include those of the router's auxiliary loss, if the model
    asks for it; the value does not: see models/router.py.
    """
    input_ids, at = batch["input_ids"], batch["mask"]  # (B, T), (B, T-1)
    head, router = output_head(model), router_of(model)  # before the states: it may run the model in eval mode
    with router.watching():
        hidden = block_states(model, input_ids, batch["position_ids"])[:, :-1]  # (B, T-1, H)
    nats = nll(head, hidden[at], input_ids[:, 1:][at], compiled)
    return router.beside(nats, at), at.sum()


@torch.no_grad()
def evaluate_lm(model, blocks, batch_size, processes=Processes(), loss=lm_loss, in_step=False):  # noqa: B008 - frozen
    """{"nats_per_token", "bits_per_byte"} over all counted tokens of `blocks`. Each block is read by one process.

    loss: a function with the arguments and the result of `lm_loss`. in_step: all processes make the same number of
    passes, because their passes communicate. Does not change the parameters or the random state.
    """
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    rows = list(range(len(blocks)))
    if in_step:
        passes = processes.equal_share(in_batches(rows, batch_size))
    else:
        passes = [(batch, 1) for batch in in_batches(processes.share(rows), batch_size)]
    progress = Progress({"batch": len(passes)}, name="batches of held-out text")
    for mine, weight in passes:
        nats, tokens = loss(model, blocks.batch(mine, device))
        found = [nats.item(), tokens.item(), blocks.bytes[mine].sum().item()]
        total += torch.tensor(found, dtype=torch.float64) * weight
        progress.tell("batch")
    model.train(was_training)
    nats, tokens, sizes = processes.sum(total.to(device)).tolist()
    return {"nats_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / max(sizes, 1)}


class Evaluation:
    """Evaluation before, during and after training: the loss on held-out blocks, and a sample.

    processes: the processes that share the blocks. Process 0 draws the sample.
    """

    def __init__(self, start, config, updates, processes=None):
        self.start, self.config, self.forward = start, config, updates.forward  # same precision as in training
        self.processes = processes or Processes()

    def due(self, step, steps):
        """Whether to evaluate after `step`: every eval_every steps, except after the last step."""
        every = self.config.eval_every
        return bool(every) and step % every == 0 and step < steps

    def loss(self):
        """The held-out loss; see `evaluate_lm`."""
        with self.forward():
            return evaluate_lm(self.start.model, self.start.heldout, self.config.micro_batch_size, self.processes)

    def sample(self, when):
        """A sample; see `show_sample`. None in every process except process 0."""
        if not self.processes.is_main:
            return None
        with self.forward():
            return show_sample(self.start.model, self.start.tokenizer, self.start.kind, self.config, when)


def show_sample(model, tokenizer, kind, config, when):
    """Print and return the model's completion of `sample_prompt`. None without a prompt.

    Does not change the random state. Raises UserError if the prompt is too long for the model.
    """
    if not config.sample_prompt:
        return None
    plain = tokenizer(config.sample_prompt).input_ids
    ids = plain if kind == "text" else prompt_ids(tokenizer, config.sample_prompt)
    stop = stop_ids(tokenizer)
    room = context_length(model)
    new = min(config.sample_tokens, room - len(ids)) if room else config.sample_tokens
    if new < 1:
        raise UserError(f"sample_prompt has {len(ids)} tokens: the model reads at most {len(ids) + new}")
    found = generate(
        model, [ids], new, temperature=0.8, top_p=0.95, stop_ids=stop, never=never_sampled(tokenizer), seed=config.seed
    )
    text = completion_text(tokenizer, found.completions[0])
    say(f"\nsample {when} training, after {config.sample_prompt!r}:\n" + "\n".join("  " + x for x in text.splitlines()))
    return {"when": when, "prompt": config.sample_prompt, "answer": text}


def summary(before, after, steps):
    """The result of a run for its manifest: steps, and held-out loss before and after."""
    return {"steps": steps, **{f"{k}_before": v for k, v in before.items()}, **after}


def next_command(folder):
    """The command that uses the model of a finished run."""
    return f"python inference/inference.py --model_name {shown(folder)}"
