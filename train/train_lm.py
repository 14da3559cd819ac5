"""Train a causal language model on text: the plain loop, in float32, in one process.

    python train/train_lm.py                                  # SmolLM2-135M on Shakespeare's plays
    python train/train_lm.py --config configs/train_scratch.yaml
    python train/train_lm.py --data my.jsonl --lr 1e-4

The model reads packed blocks of `max_length` tokens and predicts each next token. The other scripts of this folder are
this one and a technique: LoRA and W&B call `train` below, DDP and AMP/checkpointing change the loop (see their diff).
"""

from dataclasses import dataclass

import torch

from models.device import pick_device
from models.loader import weights_hash
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.files import shown
from runtime.run import Run
from train.common import (
    LMConfig,
    count_steps,
    evaluate_lm,
    lm_loss,
    load_blocks,
    load_data,
    load_start,
    save_samples,
    show_sample,
    step_rows,
    summary,
)
from train.updates import lr_at, make_optimizer


@dataclass
class Config(LMConfig):
    out: str = "models/lm"


def train(config, run=None, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    run: a `Run` made before, with its sinks. change_model: takes the loaded model and returns the one to train.
    save(model, tokenizer, folder): writes the weights.
    Returns what the run reached, and the samples before and after.
    """
    run = run or Run(config, config.out)
    quiet_libraries()
    device = pick_device()
    torch.manual_seed(config.seed)

    # 1. the text, the model, and the text as blocks of tokens
    corpus = load_data(config)
    model, tokenizer = load_start(config, corpus, device)
    inputs = {config.data: corpus.sha256, config.model_name: weights_hash(model)}
    if change_model:
        model = change_model(model)
    blocks, heldout = load_blocks(config, corpus, tokenizer)
    run.total_steps = count_steps(len(blocks), config)
    optimizer = make_optimizer(model.parameters(), config.lr, config.weight_decay)
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer)
    step, kept = checkpoints.load()  # (0, {}) unless this run was interrupted

    # 2. what the model can do before
    if not kept:
        kept["samples"] = [show_sample(model, tokenizer, corpus.kind, config, "before")]
        kept["before"] = evaluate_lm(model, heldout, config.batch_size)
        run.log(0, **kept["before"])

    # 3. the steps
    model.train()
    run.begin_steps(step)
    while step < run.total_steps:
        micro_batches = step_rows(step, len(blocks), config)
        count = sum(blocks.counted(rows) for rows in micro_batches)
        loss = torch.zeros((), device=device)
        for rows in micro_batches:
            nats, _ = lm_loss(model, blocks.batch(rows, device))
            nats = nats / count  # of the whole step: each token weighs the same, in whichever micro-batch it is
            nats.backward()
            loss += nats.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # the norm before clipping
        lr = lr_at(step + 1, run.total_steps, config.lr, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if run.finite(step + 1, blocks.named(micro_batches), loss=loss, grad_norm=grad_norm):
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        run.count_tokens(sum(blocks.tokens[rows].sum() for rows in micro_batches))
        due = config.eval_every and step % config.eval_every == 0 and step < run.total_steps
        if step % config.log_every == 0 or step == run.total_steps or due:
            run.log(step, loss=loss.item(), lr=lr, grad_norm=grad_norm.item())
        if due:
            run.log(step, **evaluate_lm(model, heldout, config.batch_size))
        if checkpoints.due(step):
            checkpoints.save(step, kept)

    # 4. what it can do after
    after = evaluate_lm(model, heldout, config.batch_size)
    run.log(step, **after)
    kept["samples"].append(show_sample(model, tokenizer, corpus.kind, config, "after"))

    # 5. save
    save(model, tokenizer, run.folder)
    save_samples(run.folder, kept["samples"])
    result = summary(kept["before"], after, step)
    run.finish(result, inputs, f"python inference/inference.py --model_name {shown(run.folder)}")
    return result, kept["samples"]


if __name__ == "__main__":
    cli(train, Config)
