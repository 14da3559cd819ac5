"""Sampling a batch: ours is models/generation.py, the baseline is transformers' `model.generate`.

Both sides hold the weights in the precision that `precision: auto` means, sample from the whole distribution at
temperature 1, and never stop early. The prompts have no common prefix. A batch counts as a step.

Sampled completions depend on random numbers, so another batch is compared, which is greedy and not timed. Its losses
are means of -log p in nats per token, one for each quarter of the completion. Of each completion they count the tokens
up to the first at which the two sides differ.
"""

from __future__ import annotations

import torch

from benchmarks import baselines, measure
from benchmarks.texts import passages
from models.device import frozen_dtype, pick_device
from models.flops import Cost, sampled
from models.loader import load_model, load_tokenizer

SIZE = {"model_name": "smollm2-135m", "batch_size": 32, "prompt": 64, "new": 64, "steps": 3}
ON_GPU = {"batch_size": 256, "new": 128}
SMOKE = {"model_name": "tiny-llama", "batch_size": 4, "prompt": 16, "new": 16, "steps": 2}
QUARTERS = 4


def start(size):
    """The model and the prompts' token ids."""
    model = load_model(size.model_name, dtype=frozen_dtype(measure.precision()), device=pick_device())
    return model, passages(load_tokenizer(size.model_name), [size.prompt] * size.batch_size)


def work(size):
    """Tokens and FLOP of a batch. The tokens are the new ones; the FLOP contain those of the prompts."""
    cost = Cost.of(size.model_name)
    prompts = [[i, *range(1, size.prompt)] for i in range(size.batch_size)]  # no common prefix
    flops = cost.forward(sampled(prompts, size.new, 1))
    return {"tokens": size.batch_size * size.new, "flops": flops}


def timed(size, batch):
    """A clock that saw the warm-up and `steps` batches. batch() returns the token ids of the completions."""
    clock = measure.Clock()
    clock.tick()
    for _ in range(measure.WARM_UP + size.steps):
        completions = batch()
        clock.tick()
        assert [len(ids) for ids in completions] == [size.new] * size.batch_size
    clock.moments = clock.moments[1:]  # the first batch is the warm-up
    return clock


def ours(size, folder):
    from models.generation import generate

    model, prompts = start(size)

    def batch(temperature=1.0):
        return generate(model, prompts, size.new, temperature, batch_size=size.batch_size)

    torch.manual_seed(0)
    clock = timed(size, lambda: batch().completions)
    greedy = batch(temperature=0)
    return clock.measured(work(size), greedy={"ids": greedy.completions, "logprobs": greedy.logprobs})


def baseline(size, folder):
    model, prompts = start(size)
    model = baselines.plain(model)
    model.generation_config.eos_token_id = None  # nothing stops a completion
    input_ids = torch.tensor(prompts, device=pick_device())
    shape = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": size.new, "pad_token_id": 0}
    shape |= {"top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def batch():
        return model.generate(input_ids, do_sample=True, **shape)[:, size.prompt :]

    torch.manual_seed(0)
    clock = timed(size, batch)
    greedy = model.generate(input_ids, do_sample=False, output_logits=True, return_dict_in_generate=True, **shape)
    ids = greedy.sequences[:, size.prompt :]  # (B, new)
    logprobs = torch.stack(greedy.logits, 1).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return clock.measured(work(size), greedy={"ids": ids.tolist(), "logprobs": logprobs.tolist()})


def settle(ours, baseline):
    """Put the losses of the greedy completions into both sides' reports, and the share of tokens that are the same."""
    a, b = ours.pop("greedy"), baseline.pop("greedy")
    sums, count = [[0.0] * QUARTERS, [0.0] * QUARTERS], [0] * QUARTERS
    for x, y, p, q in zip(a["ids"], b["ids"], a["logprobs"], b["logprobs"], strict=True):
        same = next((i for i, (s, t) in enumerate(zip(x, y)) if s != t), len(x))
        for i in range(same):
            quarter = i * QUARTERS // len(x)
            sums[0][quarter] -= p[i]
            sums[1][quarter] -= q[i]
            count[quarter] += 1
    for side, total in zip((ours, baseline), sums):
        side["losses"] = [t / n for t, n in zip(total, count) if n]
        side["same_tokens"] = sum(count) / sum(map(len, a["ids"]))
