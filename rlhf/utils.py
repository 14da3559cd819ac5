"""What two or more of the RLHF scripts use: log-probs, masked statistics, KL estimators, steps over several processes.

Everything per token has shape (B, T-1) and is aligned with `input_ids[:, 1:]`: entry t speaks of token t+1.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import LoraConfig, get_peft_model

from configs.config import UserError
from configs.run import in_root, on_main, rank, say
from models.loader import frozen_dtype, load_model, load_tokenizer, portable_name, resolve_model
from models.logprobs import check_head, head_logprobs, hidden_states, unwrapped
from models.lora import lean_adapters
from train.common import save_model


def token_logprobs(model, input_ids, attention_mask, temperature=1.0, where=None, entropy=False):
    """Log-prob of each token given those before it, (B, T-1) float32, at the sampling temperature.

    Positions come from the mask, so left-padded, right-padded and unpadded rows get the same values.
    where: (B, T-1), 1 for the tokens that count; the head runs there alone and other entries are 0. Without it, every
    real token that follows a real token counts.
    entropy=True also returns the entropies (B, T-1) in nats, without gradient.
    """
    if where is None:
        where = attention_mask[:, 1:] * attention_mask[:, :-1]
    at = where.bool()
    hidden = hidden_states(model, input_ids, attention_mask)  # (B, T, H): position t predicts token t+1
    head = unwrapped(model).get_output_embeddings()
    measured = head_logprobs(head, hidden[:, :-1][at], input_ids[:, 1:][at], temperature, entropy)
    empty = hidden.new_zeros(at.shape, dtype=(measured[0] if entropy else measured).dtype)
    if entropy:
        return tuple(empty.masked_scatter(at, x) for x in measured)
    return empty.masked_scatter(at, measured)


def masked_mean(x, mask, dim=None):
    """Mean of x where mask is 1; 0 where nothing counts. Masked entries may hold anything, inf and NaN included."""
    x = torch.where(mask.bool(), x, 0.0)
    if dim is None:
        return x.sum() / mask.sum().clamp(min=1)
    return x.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(x, mask, shift_mean=True, reduce=None):
    """(x - mean) / std over counted entries (population variance + 1e-8); masked entries come out 0.

    shift_mean=False keeps the mean. reduce: a function that sums a tensor over all ranks, so that the statistics are
    those of all counted tokens everywhere.
    """
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    sums = torch.stack([x.sum(), mask.sum().to(x.dtype)])
    total, count = reduce(sums) if reduce else sums
    mean = total / count.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum()
    variance = (reduce(squares) if reduce else squares) / count.clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, 0.0)


def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimates (B, T-1) of KL(policy || reference) on tokens that the policy sampled.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d
    (Schulman, "Approximating KL divergence", 2020). Their values estimate the KL (k1 and k3 without bias); their
    gradients do not: as a loss, on-policy, k1 has expected gradient 0, k2 that of the reverse KL, k3 that of the
    forward KL; ratio * k3 has that of the reverse KL (`grpo_loss` offers it as "ratio_k3"). Of the KL of each next
    token, that is, with the tokens before it held fixed: that a token decides what follows, and with it the KL to come,
    is in the gradient only with k1 in the reward (`token_rewards` in ppo_train.py). report/EXACT.md has the numbers.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    raise UserError(f"KL estimator {kind!r}: must be k1, k2 or k3")


def measure_kl(meter, logprobs, ref_logprobs, mask):
    """Count the KL to the reference of answers that the policy sampled, by k3; all (N, L).

    As "kl" in nats an answer, and as "kl_per_token" in nats a token.
    """
    kl = torch.where(mask.bool(), kl_estimate(logprobs, ref_logprobs, "k3"), 0.0)
    meter.mean(len(mask), kl=kl.sum(1).mean())
    meter.mean(mask.sum(), kl_per_token=masked_mean(kl, mask))


def pad_rows(rows, value, device, left=False):
    """Lists of numbers as one tensor (B, longest), padded on the right with `value`, and the mask of what is real."""
    width = max(map(len, rows))
    dtype = torch.float32 if isinstance(value, float) else torch.long
    filled, mask = [], []
    for row in rows:
        gap = [value] * (width - len(row))
        filled.append([*gap, *row] if left else [*row, *gap])
        mask.append([0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap))
    return torch.tensor(filled, dtype=dtype, device=device), torch.tensor(mask, device=device)


def completion_batch(prompts, completions, pad_id, device, width=None):
    """Prompt and completion as right-padded (input_ids, attention_mask, mask); mask (B, T-1) is 1 on the completion.

    Masks go by length, never by token id: with pad equal to eos the final eos still counts.
    """
    rows = [p + c for p, c in zip(prompts, completions)]
    input_ids, attention_mask = pad_rows(rows, pad_id, device)
    mask = torch.zeros_like(attention_mask)
    for i, (p, c) in enumerate(zip(prompts, completions)):
        mask[i, len(p) : len(p) + len(c)] = 1
    return input_ids, attention_mask, mask[:, 1:]


@contextlib.contextmanager
def as_reference(model, reference=None):
    """The reference policy, without gradients: a frozen copy if one is given, else `model` with its adapter off.

    In eval mode, so that dropout in the configuration does not touch it.
    """
    if reference is not None:
        with torch.no_grad():
            yield reference
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield model
    finally:
        model.train(was_training)


def disable_dropout(model):
    """Set every dropout probability to 0: the policy that is trained must be the one that is compared and sampled."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for key in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if key in unwrapped(model).config.to_dict():
            setattr(unwrapped(model).config, key, 0.0)


def sum_over_ranks(accelerator, x):
    """The sum of a tensor over all processes; the tensor itself with one process."""
    return accelerator.reduce(x, reduction="sum") if accelerator.num_processes > 1 else x


def sum_gradients(accelerator, parameters):
    """Add up the gradients of all ranks in one all-reduce, so that a loss divided by global counts is one process's.

    Called once per optimizer step, after the last micro-batch. A rank without any row takes part with zeros.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    flat = sum_over_ranks(accelerator, flat)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(piece.view_as(p))


def load_policy(config, device, precision, out):
    """(model, reference, tokenizer, parameters): the policy to train and what it is compared with.

    With lora_r > 0 the base is frozen in the precision's dtype, the adapter trains in float32, and the reference is the
    base itself, adapter off (`reference` is None). With lora_r = 0 all weights train in float32 and the reference is a
    frozen copy. An adapter given as model_name is merged first; its merged weights are kept in `out`/base, so that the
    new adapter has a base that can be loaded.
    """
    tokenizer = load_tokenizer(config.model_name)
    path = resolve_model(config.model_name)
    adapter_given = isinstance(path, Path) and (path / "adapter_config.json").is_file()
    dtype = frozen_dtype(precision) if config.lora_r else torch.float32
    model = load_model(config.model_name, dtype=dtype, device=device, merge_adapter=True)
    check_head(model, config.model_name)
    base = path
    if adapter_given and config.lora_r:
        base = in_root(out) / "base"
        on_main(lambda: save_model(model, tokenizer, base))
    model = prepare_training(model, config, "CAUSAL_LM")
    reference = None
    if config.lora_r:
        model.peft_config["default"].base_model_name_or_path = portable_name(base)
    else:
        reference = load_model(config.model_name, dtype=frozen_dtype(precision), device=device, merge_adapter=True)
        disable_dropout(reference)
        reference.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained, all_of_them = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    say(f"{config.model_name} in {precision} on {device}: {trained:,} of {all_of_them:,} weights train")
    return model, reference, tokenizer, parameters


def prepare_training(model, config, task_type, **lora_options):
    """Dropout off; with config.lora_r an adapter on a frozen base; gradient checkpointing where configured."""
    disable_dropout(model)
    if config.lora_r:
        model.requires_grad_(False)
        adapter = LoraConfig(
            r=config.lora_r,
            lora_alpha=2 * config.lora_r,
            target_modules="all-linear",
            task_type=task_type,
            **lora_options,
        )
        model = lean_adapters(get_peft_model(model, adapter))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora_r:  # no weight before the checkpointed blocks trains: without this, no gradient would enter them
            model.enable_input_require_grads()
    return model.train()  # transformers checkpoints activations in this mode alone; there is no dropout left to differ


def optimizer_step(run, step, batch, accelerator, optimizer, scaler, parameters, lr):
    """Sum the gradients over ranks, unscale, clip, step. Returns (norm before clipping, whether a step was taken).

    With fp16 a step whose gradients overflowed is skipped, and the scaler lowers its scale; the schedule stands still.
    Without a scaler a gradient that is not finite is a failure, which the run counts: see `Run.finite`, where `batch`
    says what the step is taken on. Raises UserError at too many of them, or when no scale helps.
    """
    sum_gradients(accelerator, parameters)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm)
    scale = scaler.get_scale()
    if scale < 1e-6:
        raise UserError(f"step {step}: gradients are not finite; try a lower lr, or precision bf16 or fp32")
    finite = scaler.is_enabled() or run.finite(step, batch, grad_norm=norm)
    if finite:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), finite and scaler.get_scale() >= scale


def in_words(rows):
    """Rows of a batch (their places in a file, or their prompts) as one text, each once: for a message about them."""
    return "; ".join(dict.fromkeys(" ".join(row.split()) for row in rows))


def save_policy(model, tokenizer, folder):
    """The weights (an adapter that names its base, or the full model) and the tokenizer."""
    on_main(lambda: save_model(model, tokenizer, folder))


class Meter:
    """What a step measured: means and sums over its micro-batches and all ranks.

    totals: what `over_ranks` gave before an interruption; rank 0 goes on from it.
    """

    def __init__(self, totals=None):
        self.totals = dict(totals or {}) if rank() == 0 else {}

    def mean(self, weight=1.0, **values):
        """Count each value with this weight (the number of tokens or rows that it is the mean of)."""
        for key, value in values.items():
            total, count = self.totals.get(key, (0.0, 0.0))
            self.totals[key] = (total + float(value) * float(weight), count + float(weight))

    def sum(self, **values):
        """Add up each value; the sum over micro-batches and ranks is reported."""
        for key, value in values.items():
            self.totals[key] = (self.totals.get(key, (0.0, None))[0] + float(value), None)

    def over_ranks(self, accelerator):
        """{name: (total, count, or None for a sum)} of everything measured so far, over all ranks."""
        merged = {}
        for totals in gather_object([self.totals]) if accelerator.num_processes > 1 else [self.totals]:
            for key, (total, count) in totals.items():
                before = merged.get(key, (0.0, None if count is None else 0.0))
                merged[key] = (before[0] + total, None if count is None else before[1] + count)
        return merged

    def collect(self, accelerator):
        """Everything measured, over all ranks, as a dict of floats."""
        merged = self.over_ranks(accelerator)
        return {key: t if c is None else t / max(c, 1e-12) for key, (t, c) in merged.items()}
