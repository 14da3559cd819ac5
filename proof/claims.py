"""What `proof/verify.py` measures: each function here measures one claim and returns {case: deviation}.

A deviation is the largest difference between what was found and what was expected, over the largest expected entry. It
is inf where the two cannot be compared (NaN, other tokens). Both sides come from the very functions that the training
scripts call, or one side comes from the plain definition (`definition`).

Each function takes the `Lab`, the name of a model in its folder, and the name of the dtype (see proof/lab.py). The
certificate holds its docstring.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from data.pairs import load_groups
from models.fast import head as loss_head
from models.fast.head import body, hidden_states
from models.fast.lora import add_adapter
from models.fast.quantised import Quantisation, dequantise, quantise
from models.generation import generate
from models.loader import load_model
from models.save import save_model
from proof.lab import (
    COMPLETIONS,
    DTYPES,
    PAD,
    PROMPTS,
    assert_beyond_window,
    both,
    definition,
    deviation,
    documents,
    gradients,
    new_folder,
    precision,
    scores_of,
    trained_policy,
    trained_reward_model,
)
from proof.trainers import (
    DROPOUT,
    RLHF,
    TRAINERS,
    apart,
    differ,
    interrupt,
    largest,
    layers_computed,
    metrics,
    run,
    said,
)
from rlhf import grpo_train, ppo_train
from rlhf.packing import pack
from rlhf.policy import as_reference, save_policy
from rlhf.reward_model import RewardModel, place_reward_model
from rlhf.rollouts import Batch, PromptStream
from rlhf.sampler import Sampler
from rlhf.steps import Meter
from rlhf.utils import masked_mean, masked_whiten, packed_logprobs, pad_rows, token_logprobs
from runtime.processes import Processes
from train.common import lm_loss
from train.train_lm_lora import add_lora, save_adapter


def memory_efficient_is_plain(lab, name, dtype):
    """The layers of models/fast/layers.py against those of transformers: what the head reads, and all gradients."""
    plain = AutoModelForCausalLM.from_pretrained(lab.folder / name, dtype=torch.float32).to(lab.device).eval()
    ids, found = torch.tensor([PROMPTS[2] + COMPLETIONS[3], COMPLETIONS[3] + PROMPTS[2]], device=lab.device), []
    for model in (lab.model(name, dtype), plain):
        with lab.autocast(dtype):
            hidden = hidden_states(model, ids)
        found.append(([hidden], gradients(model, [hidden])))
    (values, slopes), (expected, expected_slopes) = found
    return {"values and gradients": max(deviation(values, expected), deviation(slopes, expected_slopes))}


def packed_is_separate(lab, name, dtype):
    """Rows that share a block or a prompt, against each row alone, by the definition: values and gradients."""
    model, packed = lab.model(name, dtype), lab.packed()
    blocks, prompts, completions = documents(lab, name)
    at, found = packed.mask.bool(), {}
    with lab.autocast(dtype):
        alone = torch.cat([definition(model, p, c) for p, c in zip(prompts, completions)])
        found["LM"] = both(model, [lm_loss(model, blocks.batch([0], lab.device))[0]], [-alone.sum()])
        together = packed_logprobs(model, packed, 0.7)[at]
        alone = [definition(model, p, c, 0.7) for p, c in zip(PROMPTS, COMPLETIONS)]
        if dtype == "float64":  # without scores and values, which are float32 by design, and without the gradients
            found["DPO, PPO, GRPO"] = deviation([together], alone)  # of Llama's norm, which transformers has in float32
            return found
        found["DPO, PPO, GRPO"] = both(model, [together], alone)
        reward_model = lab.reward_model(name, dtype, lora_r=0)
        alone = [reward_model.score(row, torch.ones_like(row)) for row in lab.rows()]
        found["reward"] = both(reward_model, [scores_of(reward_model, packed)], alone)
        states = [body(model)(row).last_hidden_state[0] for row in lab.rows()]
        alone = [reward_model.head(x[len(p) - 1 : -1].float())[:, 0].float() for x, p in zip(states, PROMPTS)]
        values = packed_logprobs(model, packed, value_head=reward_model.head)[1][at]
        found["PPO's values"] = both(model, [values], alone)
    return found


@contextlib.contextmanager
def chunks_of(positions, model):
    """Inside, the head of the model computes so many positions at a time."""
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


def chunked_is_plain(lab, name, dtype):
    """The loss with the head over 3 positions at a time, and its gradients, against the log-softmax of all logits, by
    the definition. The head's weight trains, or it is frozen, as it is under an adapter."""
    model, found = lab.model(name, dtype), {}
    blocks, prompts, completions = documents(lab, name)
    batch, packed = blocks.batch([0], lab.device), pack(PROMPTS[::2], COMPLETIONS[::2], PAD, lab.device)
    for trained, weight in ((True, "head trained"), (False, "head frozen")):
        model.get_output_embeddings().weight.requires_grad_(trained)
        with lab.autocast(dtype):
            plain = {
                "LM": [-torch.cat([definition(model, p, c) for p, c in zip(prompts, completions)]).sum()],
                "DPO, PPO, GRPO": [definition(model, p, c, 0.7) for p, c in zip(PROMPTS[::2], COMPLETIONS[::2])],
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


def padded_is_single(lab, name, dtype):
    """A batch with rows padded on the left, or on the right, against each row alone: log-probs and scores."""
    rows, found = [p + c for p, c in zip(PROMPTS, COMPLETIONS)], {}
    model, reward_model = lab.model(name, dtype), lab.reward_model(name, dtype, lora_r=0)
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, PAD, lab.device, left=side == "left")
        at = (mask[:, 1:] * mask[:, :-1]).bool()
        with lab.autocast(dtype):
            alone = [definition(model, row[:1], row[1:]) for row in rows]
            found[f"log-probs, {side}"] = both(model, [token_logprobs(model, ids, mask)[at]], alone)
            if dtype != "float64":
                alone = [reward_model.score(row, torch.ones_like(row)) for row in lab.rows()]
                found[f"reward, {side}"] = both(reward_model, [reward_model.score(ids, mask)], alone)
    return found


def padded_generation_is_single(lab, name, dtype):
    """Completions sampled (and greedy) in a batch of prompts of 1, 3 and 5 tokens, against each prompt alone.

    Another token counts as inf. In 16 bits it does not: a draw that falls between two tokens may fall to either. There
    the log-probs are compared up to the first such draw.
    """
    prompts, found, model = [PROMPTS[i] for i in (0, 2, 4)], {}, lab.model(name, dtype)
    assert_beyond_window(model, prompts)
    uniforms = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for what, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        options = {"max_new_tokens": 8, "temperature": temperature, "stop_ids": [PAD]}
        with lab.autocast(dtype):
            batch = generate(model, prompts, samples_per_prompt=2, uniforms=uniforms, **options)
            alone = [generate(model, [prompts[i // 2]], uniforms=uniforms[i : i + 1], **options) for i in range(6)]
        same = [agreement(tokens, a.completions[0]) for tokens, a in zip(batch.completions, alone)]
        found[what] = deviation(
            [x[:n] for x, n in zip(batch.logprobs, same)], [a.logprobs[0][:n] for a, n in zip(alone, same)]
        )
        if dtype == "float32" and batch.completions != [a.completions[0] for a in alone]:
            found[what] = math.inf
    return found


def agreement(a, b):
    """How many entries at the start of two lists are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def sampler_is_trainer(lab, name, dtype):
    """Log-probs that the sampler of PPO and GRPO recorded, against those that training computes for its ratio. Those of
    offline GRPO go through its file of groups."""
    found = {}
    for lora_r, what in ((4, "LoRA"), (0, "all weights")):
        model, tokenizer, config = trained_policy(lab, name, dtype, lora_r)
        stream = PromptStream(config.prompts, tokenizer, config.prompts_per_step, 0, Processes(), need_checks=False)
        samples = config.samples_per_prompt
        prompts = [ids for _, _, ids in stream.at(1) for _ in range(samples)]
        assert_beyond_window(model, prompts)
        sampler = Sampler(model, config, precision(dtype))
        for config.temperature in (1.0, 0.7):
            with lab.autocast(dtype), torch.no_grad():
                sampled = sampler.sample(tokenizer, stream, 1, config, samples)
                packed = pack(prompts, sampled.completions, tokenizer.pad_token_id, lab.device)
                again = packed_logprobs(model, packed, config.temperature)
            found[f"{what}, temperature {config.temperature}"] = deviation([packed.align(sampled.logprobs)], [again])
    if dtype == "float32":  # in which the groups were sampled
        model = lab.model(name, dtype)
        groups = load_groups(lab.folder / name / "groups.jsonl", tokenizer, max_length=64)[0]
        rows = [(g["prompt"], c) for g in groups for c in g["completions"]]
        packed = pack(*zip(*rows), tokenizer.pad_token_id, lab.device)
        stored = packed.align([x for g in groups for x in g["logprobs"]])
        found["GRPO offline"] = deviation([stored], [packed_logprobs(model, packed)])
    return found


def lora_starts_as_base(lab, name, dtype):
    """A fresh adapter changes nothing: log-probs and scores are those of the base, bitwise."""
    frozen, packed, batch = lab.frozen(dtype), lab.packed(), documents(lab, name)[0].batch([0], lab.device)
    base = load_model(lab.folder / name, dtype=frozen, device=lab.device)
    policy = lab.policy(name, dtype)[0]
    adapted = load_model(lab.folder / name, dtype=frozen, device=lab.device)
    adapted = add_lora(adapted, str(lab.folder / name), 4, dtype=frozen)
    torch.manual_seed(0)
    reward_model = RewardModel.load(lab.folder / name, dtype=frozen, device=lab.device, new_head=True)
    reward_model.head.float()
    with lab.autocast(dtype), torch.no_grad():
        return {
            "LM": deviation([lm_loss(adapted, batch)[0]], [lm_loss(base, batch)[0]]),
            "DPO, PPO, GRPO": deviation([packed_logprobs(policy, packed)], [packed_logprobs(base, packed)]),
            "reward": deviation(
                [scores_of(lab.reward_model(name, dtype, lora_r=4), packed)],
                [scores_of(reward_model, packed)],
            ),
        }


def adapter_off_is_base(lab, name, dtype):
    """After training, the reference of DPO, PPO and GRPO (the adapter switched off) is the base, bitwise."""
    found, packed, policy = {}, lab.packed(), trained_policy(lab, name, dtype)[0]
    base = load_model(lab.folder / name, dtype=lab.frozen(dtype), device=lab.device)
    with lab.autocast(dtype), torch.no_grad():
        expected, trained = packed_logprobs(base, packed), packed_logprobs(policy, packed)
        assert deviation([trained], [expected]) > 1e-3, "the adapter changes nothing: the claim would be empty"
        with as_reference(policy) as reference:
            found["DPO, GRPO"] = deviation([packed_logprobs(reference, packed)], [expected])
        if name == "tiny-llama":  # the reward model of whose run is an adapter: PPO puts it beside the policy's
            folder = run(lab.folder, "reward", name)
            scores = place_reward_model(policy, folder, 4, lab.device)
            scores(packed)
            with as_reference(policy) as reference:
                found["PPO"] = deviation([packed_logprobs(reference, packed)], [expected])
            found["PPO's policy after scoring"] = deviation([packed_logprobs(policy, packed)], [trained])
    return found


def qlora_is_lora(lab, name, dtype):
    """LoRA on weights of 4 or 8 bits (QLoRA) against LoRA on the same rounded weights in a plain model: log-probs and
    all gradients, and both again after a pass without gradients. Bitwise."""
    packed, found = lab.packed(), {}
    for way, more in (("4 bits", {"load_in_4bit": True}), ("8 bits", {"load_in_8bit": True})):
        frozen = lab.frozen(dtype)
        how = Quantisation(**more, dtype=str(frozen).removeprefix("torch."))
        models = []
        for plain in (False, True):
            model = quantise(load_model(lab.folder / name, dtype=frozen, device=lab.device), how)
            torch.manual_seed(0)
            model = add_adapter(dequantise(model, frozen) if plain else model, 4, 8, init_lora_weights=False)
            models.append(model)
        for when in ("before", "after"):
            computed = []
            for model in models:
                with lab.autocast(dtype):
                    logprobs = packed_logprobs(model.train(), packed)
                    computed.append(([logprobs.detach()], gradients(model, [logprobs])))
                with lab.autocast(dtype), torch.no_grad():
                    packed_logprobs(model.eval(), packed)
            (values, slopes), (expected, expected_slopes) = computed
            found[f"{way}, {when} an evaluation"] = max(deviation(values, expected), deviation(slopes, expected_slopes))
    return found


def merged_is_adapter(lab, name, dtype):
    """An adapter merged into its base computes what the adapter computes: in the sampler, on loading, and in reward
    models."""
    packed, out, options = lab.packed(), new_folder(lab, "merged", name, dtype), {"device": lab.device}
    policy, tokenizer, config = trained_policy(lab, name, dtype)
    save_policy(policy, tokenizer, out / "policy")
    (out / "LM").mkdir()
    save_adapter(policy, tokenizer, out / "LM", merge=True)
    reward_model, frozen, found = trained_reward_model(lab, name, dtype, lora_r=4), lab.frozen(dtype), {}
    sampler = Sampler(policy, config, precision(dtype))
    with lab.autocast(dtype), torch.no_grad():
        merged = {
            "PPO's and GRPO's sampler": sampler.model(),
            "loading": load_model(out / "policy", dtype=frozen, merge_adapter=True, **options),
            "LM, saved with merge": load_model(out / "LM" / "merged", dtype=frozen, **options),
        }
        expected, scores = packed_logprobs(policy, packed), scores_of(reward_model, packed)
        for what, model in merged.items():
            found[what] = deviation([packed_logprobs(model, packed)], [expected])
        reward_model.save(out / "reward", tokenizer, lab.folder / name)
        loaded = RewardModel.load(out / "reward", dtype=frozen, **options)
        loaded.head.float()
        found["reward"] = deviation([scores_of(loaded, packed)], [scores])
    return found


def saved_is_in_memory(lab, name, dtype):
    """What a run saves and the next stage loads is what training ended with, bitwise."""
    packed, found = lab.packed(), {}
    for lora_r, kind in ((0, "all weights"), (4, "LoRA")):
        out = new_folder(lab, "saved", name, dtype, kind)
        policy, tokenizer, _ = trained_policy(lab, name, dtype, lora_r)
        kept = lab.frozen(dtype) if lora_r else torch.float32
        for what, save in (("LM", save_model), ("DPO, PPO, GRPO", save_policy)):
            (out / what).mkdir()
            save(policy, tokenizer, out / what)
            loaded = load_model(out / what, dtype=kept, device=lab.device)
            with lab.autocast(dtype), torch.no_grad():
                found[f"{what}, {kind}"] = deviation(
                    [packed_logprobs(loaded, packed)], [packed_logprobs(policy, packed)]
                )
    # only with all weights: with LoRA it is saved merged, see `merged_is_adapter`
    reward_model = trained_reward_model(lab, name, dtype, lora_r=0)
    reward_model.save(out / "reward", tokenizer, lab.folder / name)
    loaded = RewardModel.load(out / "reward", device=lab.device)
    with lab.autocast(dtype), torch.no_grad():
        found["reward, all weights"] = deviation([scores_of(loaded, packed)], [scores_of(reward_model, packed)])
    return found


def other_padding_is_the_same(lab, name, dtype):
    """Padding by one token or by another: bitwise the same log-probs, losses and scores."""
    model, reward_model = lab.model(name, dtype), lab.reward_model(name, dtype, lora_r=0)
    rows, blocks = [p + c for p, c in zip(PROMPTS, COMPLETIONS)], documents(lab, name)[0]
    computed = []
    for pad_id in (PAD, 77):
        packed, padded = lab.packed(pad_id), pad_rows(rows, pad_id, lab.device, left=True)
        batch = blocks.batch([0], lab.device)
        batch["input_ids"][0, blocks.tokens[0] :] = pad_id
        with lab.autocast(dtype), torch.no_grad():
            computed.append({
                "LM": [lm_loss(model, batch)[0]],
                "DPO, PPO, GRPO": [packed_logprobs(model, packed)],
                "token_logprobs": [token_logprobs(model, *padded)],
                "reward": [scores_of(reward_model, packed), reward_model.score(*padded)],
            })  # fmt: skip
    return {what: deviation(computed[1][what], values) for what, values in computed[0].items()}


def poisoned_is_clean(lab, name, dtype):
    """Losses, advantages, statistics, logged metrics and their gradients, with inf, NaN and 1,000 in masked entries,
    against the same with 0 there."""
    found = {}
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], device=lab.device)
    for poison in (math.inf, -math.inf, math.nan, 1e3, -1e3):
        for what, compute in LOSSES.items():
            inputs = [_loss_inputs(mask, DTYPES[dtype], x) for x in (poison, 0.0)]
            found[f"{what}, {poison:g}"] = deviation(*(_values_and_gradients(compute, x, mask) for x in inputs))
    return found


def _loss_inputs(mask, dtype, poison):
    """Random inputs of the losses, (B, T) like `mask`, the same for equal shapes. Masked entries hold `poison`."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    per_token = ("logprobs", "old", "ref", "rewards", "values", "old_values", "returns", "advantages", "entropy")
    for key in (*per_token, "sampler"):
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
    config = SimpleNamespace(clip_eps=0.2, inner_epochs=1, minibatches=1)
    meter, batch = Meter(), _batch(mask, old_logprobs=x.old, advantages=x.advantages)
    ppo_train.measure(meter, batch, 0.0, 0.0, x.logprobs.detach(), x.entropy, config)
    return _collected(meter)


def _grpo_metrics(x, mask):
    config = SimpleNamespace(clip_low=0.2, clip_high=0.2, inner_epochs=1, minibatches=1, mode="online")
    meter, batch = Meter(), _batch(mask, sampler_logprobs=x.sampler, ref_logprobs=x.ref, advantages=x.a)
    grpo_train.measure(meter, batch, 0.0, x.logprobs.detach(), x.old, x.entropy, config)
    return _collected(meter)


def _batch(mask, **tensors):
    """A `Batch` with this mask and these tensors, and nothing else."""
    return Batch(SimpleNamespace(mask=mask), rows=list(range(len(mask))), **tensors)


def _collected(meter):
    return list(map(torch.tensor, meter.collect(Processes()).values()))


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


def accumulation_is_full_batch(lab, name, dtype):
    """Whole runs with a step's batch in the smallest micro-batches, against the batch in one."""
    found = {}
    for trainer in ("LM", "DDP", "AMP") if dtype == "float64" else TRAINERS:
        whole = run(lab.folder, trainer, name, "whole", exact=dtype, **TRAINERS[trainer].whole)
        parts = run(lab.folder, trainer, name, "pieces", exact=dtype, **TRAINERS[trainer].pieces)
        found[trainer] = apart(parts, whole, lab.folder / name, dtype)
    return found


def two_processes_are_one(lab, name, dtype):
    """Whole runs on two processes that talk over gloo, against one process with the batch in one micro-batch. The
    shares of a step's tokens are unequal, and its gradient is clipped."""
    trainers = ("DDP",) if dtype == "float64" else ("DDP", *RLHF)
    return {trainer: _two_from_one(lab, name, dtype, trainer, trainer) for trainer in trainers}


def sharded_is_one_process(lab, name, dtype):
    """Whole runs of train_lm_fsdp.py on two processes that talk over gloo, each with half of every weight, against
    train_lm.py with the batch in one micro-batch. The gradient of each step is clipped by the norm over all shards."""
    return {"FSDP": _two_from_one(lab, name, dtype, "LM", "FSDP")}


def tensor_parallel_is_one_process(lab, name, dtype):
    """Whole runs of train_lm_tp.py on two processes that talk over gloo, each with half of the heads, of the MLP and of
    the vocabulary, against train_lm.py. The norm counts what is split once, and what is not split once."""
    return {"TP": _two_from_one(lab, name, dtype, "LM", "TP")}


def _two_from_one(lab, name, dtype, plain, trainer):
    """How far runs of `trainer` on two processes are from those of `plain` on one, with the batch in one piece."""
    one = run(lab.folder, plain, name, "whole", exact=dtype, **TRAINERS[plain].whole)
    two = run(lab.folder, trainer, name, "two processes", processes=2, exact=dtype)
    norms = [line["grad_norm"] for line in metrics(one) if "grad_norm" in line]
    assert max(norms) > TRAINERS[plain].options["max_grad_norm"], f"{plain}: no step was clipped"
    return apart(two, one, lab.folder / name, dtype)


def checkpointing_changes_nothing(lab, name, dtype):
    """Whole runs with gradient checkpointing, against runs without: bitwise. Layers must be computed again."""
    found = {}
    for trainer in ("AMP", "DDP", *RLHF):
        off = run(lab.folder, trainer, name)
        on = run(lab.folder, trainer, name, "checkpointing", gradient_checkpointing=True)
        recomputed = layers_computed(on) > layers_computed(off)
        found[trainer] = differ(on, off) if recomputed else math.inf
    return found


def amp_at_fp32_is_plain(lab, name, dtype):
    """Whole runs of the AMP script and of the DDP script in one process, at fp32, against the plain loop: bitwise."""
    plain = run(lab.folder, "LM", name)
    return {trainer: differ(run(lab.folder, trainer, name), plain) for trainer in ("AMP", "DDP")}


def first_step_is_neutral(lab, name, dtype):
    """DPO's first loss is ln 2 and its margin 0, also with dropout in the model's configuration. In runs of PPO and
    GRPO whose learning rate is too small (1e-30) to move a weight, the ratio is 1 in every update: approx_kl and
    clipfrac are 0."""
    found = {}
    for model in (name, DROPOUT) if name == "tiny-gpt2" else (name,):
        dropout = ", dropout" if model == DROPOUT else ""
        first = metrics(run(lab.folder, "DPO", model, "fresh reference", precompute_reference=False))[0]
        found[f"DPO{dropout}"] = largest([abs(first["loss"] - torch.tensor(2.0).log().item()), abs(first["margin"])])
        for trainer in ("PPO", "GRPO"):
            updates = {"inner_epochs": 2, "minibatches": 2, "micro_batch_size": 2, "lr": 1e-30}
            lines = metrics(run(lab.folder, trainer, model, "still", **updates))
            found[f"{trainer}{dropout}"] = largest(abs(x[key]) for x in lines for key in ("approx_kl", "clipfrac"))
    return found


def cached_reference_is_fresh(lab, name, dtype):
    """Whole DPO runs with the reference's log-probs computed once before training, against runs that compute them in
    each step."""
    cached = run(lab.folder, "DPO", name, "whole", exact=dtype, **TRAINERS["DPO"].whole)
    options = TRAINERS["DPO"].pieces | {"precompute_reference": False}
    again = run(lab.folder, "DPO", name, "fresh reference", exact=dtype, **options)
    return {"DPO": apart(again, cached, lab.folder / name, dtype)}


def resumed_is_uninterrupted(lab, name, dtype):
    """Whole runs that are killed with SIGKILL once a checkpoint is there and started again by the same command, against
    runs that are left alone: weights and logged numbers, bitwise. In the middle of an epoch, with accumulation, and for
    the LM scripts on GPT-2 with dropout."""
    found, model = {}, DROPOUT if name == "tiny-gpt2" else name
    for trainer in TRAINERS:
        whole = run(lab.folder, trainer, model)
        killed = interrupt(lab.folder, trainer, model, "killed", save_every=1)
        again = run(lab.folder, trainer, model, "killed", save_every=1)
        found[trainer] = differ(again, whole) if killed and "continuing from step" in said(again) else math.inf
    return found
