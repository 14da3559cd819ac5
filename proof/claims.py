"""What `proof/verify.py` measures: each function here measures one claim and returns {case: deviation}.

A deviation is the largest difference between what was found and what was expected, over the largest expected entry; inf
where they cannot be compared (NaN, other tokens). Both sides come from the very functions that the training scripts
call, or one of them from the plain definition (`definition`). `numbers` says in which numbers: see EPS.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from data.pairs import load_groups
from models.fast import head as loss_head
from models.fast.head import hidden_states
from models.generation import generate
from models.loader import load_model
from models.save import save_model
from proof.lab import (
    ANSWERS,
    PAD,
    PROMPTS,
    both,
    definition,
    deviation,
    documents,
    gradients,
    new_folder,
    precision,
    scores_of_packed,
    trained_policy,
    trained_scorer,
)
from proof.trainers import DROPOUT, TRAINERS, apart, differ, interrupt, largest, layers_computed, metrics, run, said
from rlhf import grpo_train, ppo_train
from rlhf.packing import pack, packed_logprobs
from rlhf.policy import as_reference, save_policy
from rlhf.reward_model import RewardModel
from rlhf.rollouts import PromptStream, Sampler
from rlhf.steps import Meter
from rlhf.utils import masked_mean, masked_whiten, pad_rows, token_logprobs
from train.common import lm_loss
from train.train_lm_lora import add_lora, save_adapter


def memory_efficient_is_plain(lab, name, numbers):
    """The layers of models/fast/layers.py against those of transformers: what the head reads, and all gradients."""
    plain = AutoModelForCausalLM.from_pretrained(lab.folder / name, dtype=torch.float32).to(lab.device).eval()
    ids, found = torch.tensor([PROMPTS[2] + ANSWERS[3], ANSWERS[3] + PROMPTS[2]], device=lab.device), []
    for model in (lab.model(name, numbers), plain):
        with lab.autocast(numbers):
            hidden = hidden_states(model, ids)
        found.append(([hidden], gradients(model, [hidden])))
    (values, slopes), (expected, expected_slopes) = found
    return {"values and gradients": max(deviation(values, expected), deviation(slopes, expected_slopes))}


def packed_is_separate(lab, name, numbers):
    """Rows that share a block or a prompt against each one alone, by the definition: values and gradients."""
    model, packed = lab.model(name, numbers), lab.packed()
    blocks, prompts, answers = documents(lab, name)
    at, found = packed.mask.bool(), {}
    with lab.autocast(numbers):
        alone = torch.cat([definition(model, p, a) for p, a in zip(prompts, answers)])
        found["LM"] = both(model, [lm_loss(model, blocks.batch([0], lab.device))[0]], [-alone.sum()])
        together = packed_logprobs(model, packed, 0.7)[at]
        alone = [definition(model, p, a, 0.7) for p, a in zip(PROMPTS, ANSWERS)]
        if numbers == "float64":  # without scores and values, which are float32 by design, and without the gradients
            found["DPO, PPO, GRPO"] = deviation([together], alone)  # of Llama's norm, which transformers has in float32
            return found
        found["DPO, PPO, GRPO"] = both(model, [together], alone)
        scorer = lab.reward_model(name, numbers, lora_r=0)
        alone = [scorer.score(row, torch.ones_like(row)) for row in lab.rows()]
        found["reward"] = both(scorer, [scores_of_packed(scorer, packed)], alone)
        states = [model.base_model(row).last_hidden_state[0] for row in lab.rows()]
        alone = [scorer.head(x[len(p) - 1 : -1].float())[:, 0].float() for x, p in zip(states, PROMPTS)]
        found["PPO's values"] = both(model, [packed_logprobs(model, packed, value_head=scorer.head)[1][at]], alone)
    return found


@contextlib.contextmanager
def chunks_of(positions, model):
    """The head of the model over so many positions at a time."""
    size = 4 * positions * model.config.vocab_size
    settings = loss_head.PIECE, loss_head.HELD
    before = [dict(setting) for setting in settings]
    for setting in settings:
        setting.update(dict.fromkeys(setting, size))
    try:
        yield
    finally:
        for setting, found in zip(settings, before):
            setting.update(found)


def chunked_is_plain(lab, name, numbers):
    """The loss with the head over 3 positions at a time, and its gradients, against the log-softmax of all logits by
    the definition; with the head's weight in training, and frozen as it is under an adapter."""
    model, found = lab.model(name, numbers), {}
    blocks, prompts, answers = documents(lab, name)
    batch, packed = blocks.batch([0], lab.device), pack(PROMPTS[::2], ANSWERS[::2], PAD, lab.device)
    for trained, weight in ((True, "head trained"), (False, "head frozen")):
        model.get_output_embeddings().weight.requires_grad_(trained)
        with lab.autocast(numbers):
            plain = {
                "LM": [-torch.cat([definition(model, p, a) for p, a in zip(prompts, answers)]).sum()],
                "DPO, PPO, GRPO": [definition(model, p, a, 0.7) for p, a in zip(PROMPTS[::2], ANSWERS[::2])],
            }
            with chunks_of(3, model):  # the gradients too: the backward pass goes piece by piece
                chunked = {
                    "LM": [lm_loss(model, batch)[0]],
                    "DPO, PPO, GRPO": [packed_logprobs(model, packed, 0.7)[packed.mask.bool()]],
                }
                slopes = {what: gradients(model, values) for what, values in chunked.items()}
            for what, values in plain.items():
                off = deviation(chunked[what], values), deviation(slopes[what], gradients(model, values))
                found[f"{what}, {weight}"] = max(off)
    return found


def padded_is_single(lab, name, numbers):
    """A batch with rows padded on the left, or on the right, against each row alone: log-probs and scores."""
    rows, found = [p + a for p, a in zip(PROMPTS, ANSWERS)], {}
    model, scorer = lab.model(name, numbers), lab.reward_model(name, numbers, lora_r=0)
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, PAD, lab.device, left=side == "left")
        at = (mask[:, 1:] * mask[:, :-1]).bool()
        with lab.autocast(numbers):
            alone = [definition(model, row[:1], row[1:]) for row in rows]
            found[f"log-probs, {side}"] = both(model, [token_logprobs(model, ids, mask)[at]], alone)
            if numbers != "float64":
                alone = [scorer.score(row, torch.ones_like(row)) for row in lab.rows()]
                found[f"reward, {side}"] = both(scorer, [scorer.score(ids, mask)], alone)
    return found


def padded_generation_is_single(lab, name, numbers):
    """Answers sampled (and greedy) in a batch of prompts of 1, 3 and 5 tokens, against each prompt alone.

    Another token counts as inf, but in 16 bits, where a draw that falls between two tokens may fall to either: there
    the log-probs are compared up to the first such draw.
    """
    prompts, found, model = [PROMPTS[i] for i in (0, 2, 4)], {}, lab.model(name, numbers)
    uniforms = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for what, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        options = {"max_new_tokens": 8, "temperature": temperature, "stop_ids": [PAD]}
        with lab.autocast(numbers):
            batch = generate(model, prompts, samples_per_prompt=2, uniforms=uniforms, **options)
            alone = [generate(model, [prompts[i // 2]], uniforms=uniforms[i : i + 1], **options) for i in range(6)]
        same = [agreement(tokens, a.completions[0]) for tokens, a in zip(batch.completions, alone)]
        found[what] = deviation(
            [x[:n] for x, n in zip(batch.logprobs, same)], [a.logprobs[0][:n] for a, n in zip(alone, same)]
        )
        if numbers == "float32" and batch.completions != [a.completions[0] for a in alone]:
            found[what] = math.inf
    return found


def agreement(a, b):
    """How many entries two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def sampler_is_trainer(lab, name, numbers):
    """Log-probs that the sampler of PPO and GRPO recorded, against those that training computes for its ratio; those of
    offline GRPO by way of its file of groups."""
    found, accelerator = {}, Accelerator(cpu=lab.device.type == "cpu")
    for lora_r, what in ((4, "LoRA"), (0, "all weights")):
        model, tokenizer, config = trained_policy(lab, name, numbers, lora_r)
        stream = PromptStream(config.prompts, tokenizer, config.prompts_per_step, 0, accelerator, need_checks=False)
        sampler = Sampler(model, config, precision(numbers))
        for config.temperature in (1.0, 0.7):
            with lab.autocast(numbers), torch.no_grad():
                rollout = sampler.sample(tokenizer, stream, 1, config, config.group_size)
                packed = rollout.pack(range(len(rollout.prompts)), tokenizer.pad_token_id, lab.device)
                again = packed_logprobs(model, packed, config.temperature)
            found[f"{what}, temperature {config.temperature}"] = deviation([packed.align(rollout.logprobs)], [again])
    if numbers == "float32":  # in which the groups were sampled
        model = lab.model(name, numbers)
        groups = load_groups(lab.folder / name / "groups.jsonl", tokenizer, max_length=64)[0]
        rows = [(g["prompt"], c) for g in groups for c in g["completions"]]
        packed = pack(*zip(*rows), tokenizer.pad_token_id, lab.device)
        stored = packed.align([x for g in groups for x in g["logprobs"]])
        found["GRPO offline"] = deviation([stored], [packed_logprobs(model, packed)])
    return found


def lora_starts_as_base(lab, name, numbers):
    """A fresh adapter changes nothing: log-probs and scores are those of the base, bitwise."""
    dtype, packed, batch = lab.frozen(numbers), lab.packed(), documents(lab, name)[0].batch([0], lab.device)
    base = load_model(lab.folder / name, dtype=dtype, device=lab.device)
    policy = lab.policy(name, numbers)[0]
    adapted = load_model(lab.folder / name, dtype=dtype, device=lab.device)
    adapted = add_lora(adapted, str(lab.folder / name), 4, dtype=dtype)
    torch.manual_seed(0)
    scorer = RewardModel.load(lab.folder / name, dtype=dtype, device=lab.device, new_head=True)
    scorer.head.float()
    with lab.autocast(numbers), torch.no_grad():
        return {
            "LM": deviation([lm_loss(adapted, batch)[0]], [lm_loss(base, batch)[0]]),
            "DPO, PPO, GRPO": deviation([packed_logprobs(policy, packed)], [packed_logprobs(base, packed)]),
            "reward": deviation(
                [scores_of_packed(lab.reward_model(name, numbers, lora_r=4), packed)],
                [scores_of_packed(scorer, packed)],
            ),
        }


def adapter_off_is_base(lab, name, numbers):
    """After training, the reference of DPO, PPO and GRPO (the adapter switched off) is the base, bitwise."""
    found, packed, policy = {}, lab.packed(), trained_policy(lab, name, numbers)[0]
    base = load_model(lab.folder / name, dtype=lab.frozen(numbers), device=lab.device)
    with lab.autocast(numbers), torch.no_grad():
        expected, trained = packed_logprobs(base, packed), packed_logprobs(policy, packed)
        assert deviation([trained], [expected]) > 1e-3, "the adapter changes nothing: the claim would be empty"
        with as_reference(policy) as reference:
            found["DPO, GRPO"] = deviation([packed_logprobs(reference, packed)], [expected])
        if name == "tiny-llama":  # the reward model of whose run is an adapter: PPO puts it beside the policy's
            folder = run(lab.folder, "reward", name)
            scores = ppo_train.place_reward_model(policy, SimpleNamespace(lora_r=4), folder, lab.device)
            scores(packed)
            with as_reference(policy) as reference:
                found["PPO"] = deviation([packed_logprobs(reference, packed)], [expected])
            found["PPO's policy after scoring"] = deviation([packed_logprobs(policy, packed)], [trained])
    return found


def merged_is_adapter(lab, name, numbers):
    """An adapter folded into its base says what the adapter says: in the sampler, on loading, and in reward models."""
    packed, out, options = lab.packed(), new_folder(lab, "merged", name, numbers), {"device": lab.device}
    policy, tokenizer, config = trained_policy(lab, name, numbers)
    save_policy(policy, tokenizer, out / "policy")
    (out / "LM").mkdir()
    save_adapter(policy, tokenizer, out / "LM", merge=True)
    scorer, dtype, found = trained_scorer(lab, name, numbers, lora_r=4), lab.frozen(numbers), {}
    with lab.autocast(numbers), torch.no_grad():
        merged = {
            "PPO's and GRPO's sampler": Sampler(policy, config, precision(numbers)).model(),
            "loading": load_model(out / "policy", dtype=dtype, merge_adapter=True, **options),
            "LM, saved with merge": load_model(out / "LM" / "merged", dtype=dtype, **options),
        }
        expected, scores = packed_logprobs(policy, packed), scores_of_packed(scorer, packed)
        for what, model in merged.items():
            found[what] = deviation([packed_logprobs(model, packed)], [expected])
        scorer.save(out / "reward", tokenizer, lab.folder / name)
        loaded = RewardModel.load(out / "reward", dtype=dtype, **options)
        loaded.head.float()
        found["reward"] = deviation([scores_of_packed(loaded, packed)], [scores])
    return found


def saved_is_in_memory(lab, name, numbers):
    """What a run saved and the next stage loads is what training ended with, bitwise."""
    packed, found = lab.packed(), {}
    for lora_r, kind in ((0, "all weights"), (4, "LoRA")):
        out = new_folder(lab, "saved", name, numbers, kind)
        policy, tokenizer, _ = trained_policy(lab, name, numbers, lora_r)
        dtype = lab.frozen(numbers) if lora_r else torch.float32
        for what, save in (("LM", save_model), ("DPO, PPO, GRPO", save_policy)):
            (out / what).mkdir()
            save(policy, tokenizer, out / what)
            loaded = load_model(out / what, dtype=dtype, device=lab.device)
            with lab.autocast(numbers), torch.no_grad():
                found[f"{what}, {kind}"] = deviation(
                    [packed_logprobs(loaded, packed)], [packed_logprobs(policy, packed)]
                )
    scorer = trained_scorer(lab, name, numbers, lora_r=0)  # with LoRA it is saved merged: see `merged_is_adapter`
    scorer.save(out / "reward", tokenizer, lab.folder / name)
    loaded = RewardModel.load(out / "reward", device=lab.device)
    with lab.autocast(numbers), torch.no_grad():
        found["reward, all weights"] = deviation([scores_of_packed(loaded, packed)], [scores_of_packed(scorer, packed)])
    return found


def other_padding_is_the_same(lab, name, numbers):
    """Padding by one token or by another: bitwise the same log-probs, losses and scores."""
    model, scorer = lab.model(name, numbers), lab.reward_model(name, numbers, lora_r=0)
    rows, blocks = [p + a for p, a in zip(PROMPTS, ANSWERS)], documents(lab, name)[0]
    computed = []
    for pad_id in (PAD, 77):
        packed, padded = lab.packed(pad_id), pad_rows(rows, pad_id, lab.device, left=True)
        batch = blocks.batch([0], lab.device)
        batch["input_ids"][0, blocks.tokens[0] :] = pad_id
        with lab.autocast(numbers), torch.no_grad():
            computed.append({
                "LM": [lm_loss(model, batch)[0]],
                "DPO, PPO, GRPO": [packed_logprobs(model, packed)],
                "token_logprobs": [token_logprobs(model, *padded)],
                "reward": [scores_of_packed(scorer, packed), scorer.score(*padded)],
            })  # fmt: skip
    return {what: deviation(computed[1][what], values) for what, values in computed[0].items()}


def poisoned_is_clean(lab, name, numbers):
    """Losses, advantages, statistics, logged metrics and their gradients with inf, NaN and 1,000 in masked entries."""
    found = {}
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], device=lab.device)
    dtype = torch.float64 if numbers == "float64" else torch.float32
    for poison in (math.inf, -math.inf, math.nan, 1e3, -1e3):
        for what, compute in LOSSES.items():
            inputs = [_loss_inputs(mask, dtype, x) for x in (poison, 0.0)]
            found[f"{what}, {poison:g}"] = deviation(*(_values_and_gradients(compute, x, mask) for x in inputs))
    return found


def _loss_inputs(mask, dtype, poison):
    """Random per-token inputs of the losses, the same for equal shapes, with `poison` where nothing counts."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for key in ("logprobs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages", "entropy"):
        x = torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(mask.device, dtype)
        inputs[key] = torch.where(mask.bool(), x, poison).requires_grad_(key in ("logprobs", "values"))
    inputs["a"] = torch.randn(len(mask), generator=generator, dtype=torch.float64).to(mask.device, dtype)
    return inputs


def _values_and_gradients(compute, inputs, mask):
    """What a function of LOSSES gives, and the gradients of its sum with respect to log-probs and values."""
    values = compute(SimpleNamespace(**inputs), mask)
    total = sum(v.sum() for v in values)
    leaves = [inputs["logprobs"], inputs["values"]]
    if not total.requires_grad:
        return values
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*values, *(g for g in grads if g is not None)]


def _ppo_metrics(x, mask):
    meter, batch = Meter(), {"mask": mask, "old_logprobs": x.old, "advantages": x.advantages}
    ppo_train.measure(meter, batch, x.logprobs.detach(), x.entropy, SimpleNamespace(clip_eps=0.2))
    return list(map(torch.tensor, meter.collect(SimpleNamespace(num_processes=1)).values()))


def _grpo_metrics(x, mask):
    meter, config = Meter(), SimpleNamespace(clip_low=0.2, clip_high=0.2)
    grpo_train.measure(meter, x.logprobs.detach(), x.old, x.ref, x.entropy, x.a, mask, config)
    return list(map(torch.tensor, meter.collect(SimpleNamespace(num_processes=1)).values()))


def _grpo(aggregate, kl_kind):
    options = {"kl_coef": 0.1, "kl_kind": kl_kind, "aggregate": aggregate, "max_tokens": 5}
    return lambda x, mask: [grpo_train.grpo_loss(x.logprobs, x.old, x.ref, x.a, mask, **options)]


LOSSES = {
    "masked_mean": lambda x, mask: [masked_mean(x.logprobs, mask), masked_mean(x.logprobs, mask, dim=1)],
    "masked_whiten": lambda x, mask: [masked_whiten(x.values, mask), masked_whiten(x.values, mask, shift_mean=False)],
    "token_rewards": lambda x, mask: [ppo_train.token_rewards(x.a, x.logprobs, x.ref, mask, 0.1)],
    "gae": lambda x, mask: [*ppo_train.gae(x.rewards, x.values, mask), *ppo_train.gae(x.rewards, x.values, mask, 0.9,
        0.5, last_values=x.a)],
    "policy_loss": lambda x, mask: [ppo_train.policy_loss(x.logprobs, x.old, x.advantages, mask)],
    "value_loss": lambda x, mask: [ppo_train.value_loss(x.values, x.old_values, x.returns, mask)],
    "PPO's metrics": _ppo_metrics,
    "GRPO's metrics": _grpo_metrics,
    **{f"grpo_loss, {aggregate}, {kind}": _grpo(aggregate, kind)
        for aggregate in ("token", "sequence", "constant") for kind in ("ratio_k3", "k2", "k3")},
}  # fmt: skip


def accumulation_is_full_batch(lab, name, numbers):
    """Whole runs with a step's batch in the smallest pieces, against the batch in one piece."""
    found = {}
    for trainer in ("LM", "DDP", "AMP") if numbers == "float64" else TRAINERS:
        whole = run(lab.folder, trainer, name, "whole", exact=numbers, **TRAINERS[trainer].whole)
        parts = run(lab.folder, trainer, name, "pieces", exact=numbers, **TRAINERS[trainer].pieces)
        found[trainer] = apart(parts, whole, lab.folder / name, numbers)
    return found


def two_processes_are_one(lab, name, numbers):
    """Whole runs on two processes that talk over gloo, with unequal shares of a step's tokens and its gradient clipped,
    against one process with the batch in one piece."""
    found = {}
    for trainer in ("DDP",) if numbers == "float64" else ("DDP", "reward", "DPO", "PPO", "GRPO", "GRPO offline"):
        one = run(lab.folder, trainer, name, "whole", exact=numbers, **TRAINERS[trainer].whole)
        two = run(lab.folder, trainer, name, "two processes", processes=2, exact=numbers)
        norms = [line["grad_norm"] for line in metrics(one) if "grad_norm" in line]
        assert max(norms) > TRAINERS[trainer].options["max_grad_norm"], f"{trainer}: no step was clipped"
        found[trainer] = apart(two, one, lab.folder / name, numbers)
    return found


def checkpointing_changes_nothing(lab, name, numbers):
    """Whole runs with gradient checkpointing, which must compute layers again, against runs without: bitwise."""
    found = {}
    for trainer in ("AMP", "DDP", "reward", "DPO", "PPO", "GRPO", "GRPO offline"):
        off = run(lab.folder, trainer, name)
        on = run(lab.folder, trainer, name, "checkpointing", gradient_checkpointing=True)
        recomputed = layers_computed(on) > layers_computed(off)
        found[trainer] = differ(on, off) if recomputed else math.inf
    return found


def amp_at_fp32_is_plain(lab, name, numbers):
    """Whole runs of the AMP script and of the DDP script in one process, at fp32, against the plain loop: bitwise."""
    plain = run(lab.folder, "LM", name)
    return {trainer: differ(run(lab.folder, trainer, name), plain) for trainer in ("AMP", "DDP")}


def first_step_is_neutral(lab, name, numbers):
    """DPO's first loss is ln 2 and its margin 0, with dropout in the model's configuration too; in PPO and GRPO the
    ratio is 1 in every update of runs whose learning rate is too small (1e-30) to move a weight: approx_kl and
    clip_fraction are 0."""
    found = {}
    for model in (name, DROPOUT) if name == "tiny-gpt2" else (name,):
        dropout = ", dropout" if model == DROPOUT else ""
        first = metrics(run(lab.folder, "DPO", model, "fresh reference", precompute_reference=False))[0]
        found[f"DPO{dropout}"] = largest([abs(first["loss"] - torch.tensor(2.0).log().item()), abs(first["margin"])])
        for trainer in ("PPO", "GRPO"):
            updates = {"inner_epochs": 2, "minibatches": 2, "micro_batch_size": 2, "lr": 1e-30}
            lines = metrics(run(lab.folder, trainer, model, "still", **updates))
            found[f"{trainer}{dropout}"] = largest(abs(x[key]) for x in lines for key in ("approx_kl", "clip_fraction"))
    return found


def cached_reference_is_fresh(lab, name, numbers):
    """Whole DPO runs with the reference's log-probs computed once before training, against runs that compute them in
    each step."""
    cached = run(lab.folder, "DPO", name, "whole", exact=numbers, **TRAINERS["DPO"].whole)
    options = TRAINERS["DPO"].pieces | {"precompute_reference": False}
    again = run(lab.folder, "DPO", name, "fresh reference", exact=numbers, **options)
    return {"DPO": apart(again, cached, lab.folder / name, numbers)}


def resumed_is_uninterrupted(lab, name, numbers):
    """Whole runs killed with SIGKILL once a checkpoint is there, and started again by the same command, against runs
    that were left alone: weights and logged numbers bitwise. In the middle of an epoch, with accumulation, and for the
    LM scripts on GPT-2 with dropout."""
    found, model = {}, DROPOUT if name == "tiny-gpt2" else name
    for trainer in TRAINERS:
        whole = run(lab.folder, trainer, model)
        killed = interrupt(lab.folder, trainer, model, "killed", save_every=1)
        again = run(lab.folder, trainer, model, "killed", save_every=1)
        found[trainer] = differ(again, whole) if killed and "continuing from step" in said(again) else math.inf
    return found
