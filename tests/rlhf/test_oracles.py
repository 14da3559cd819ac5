"""Independent implementations say the same: TRL on whole models, PEFT, and float64 sums from the definitions."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.config import load_config
from data.order import step_indices
from data.pairs import load_pairs
from models.loader import load_tokenizer
from models.tiny import build_tiny
from rlhf import dpo_train
from rlhf.dpo_train import dpo_loss, pair_logps
from rlhf.grpo_train import grpo_loss
from rlhf.packing import pack
from rlhf.ppo_train import gae, policy_loss, token_rewards, value_loss
from rlhf.reward_model import RewardModel, reward_loss
from rlhf.sampler import Sampler
from rlhf.utils import kl_estimate, packed_logprobs, packed_scores, token_logprobs

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
PROMPTS = [[50, 60, 70], [50, 60, 70], [80, 90, 100, 110, 120], [80, 90, 100, 110, 120]]
COMPLETIONS = [[10, 20, 30], [40], [90, 20], [30, 30, 30, 50, 20]]
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5])
close = torch.testing.assert_close


def policy(name="tiny-llama", noise_seed=None):
    """A tiny model in float32; with noise_seed, another one near it."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny(name))
    if noise_seed is not None:
        generator = torch.Generator().manual_seed(noise_seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def trainer_options(folder, **more):
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, **quiet, **more}


# GRPO: TRL's loss type and ours. "grpo" in TRL is the mean over completions of their means, "bnpo" and "dapo" the mean
# over tokens, "dr_grpo" the sum over a constant.


@pytest.fixture(scope="module")
def grpo_trainer(tmp_path_factory):
    from trl import GRPOConfig, GRPOTrainer

    options = trainer_options(
        tmp_path_factory.mktemp("grpo"), per_device_train_batch_size=4, num_generations=2, max_completion_length=10,
        temperature=0.7, beta=0.04, epsilon=0.1, epsilon_high=0.15,
    )  # fmt: skip
    return GRPOTrainer(
        model=policy(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
        processing_class=load_tokenizer("tiny-llama"),
    )


def trl_batch():
    """Prompts padded on the left, completions on the right, as TRL's GRPO wants them."""

    def padded(rows, left):
        width = max(map(len, rows))
        gaps = [[0] * (width - len(r)) for r in rows]
        ids = [[*g, *r] if left else [*r, *g] for r, g in zip(rows, gaps)]
        mask = [[*g, *[1] * len(r)] if left else [*[1] * len(r), *g] for r, g in zip(rows, gaps)]
        return torch.tensor(ids), torch.tensor(mask)

    prompt_ids, prompt_mask = padded(PROMPTS, left=True)
    completion_ids, completion_mask = padded(COMPLETIONS, left=False)
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
            "completion_mask": completion_mask, "advantages": ADVANTAGES}  # fmt: skip


@pytest.mark.statement("sampler-logprobs")
def test_token_logprobs_and_entropies_are_trls(grpo_trainer):
    batch = trl_batch()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width, at = batch["completion_ids"].shape[1], batch["completion_mask"].bool()
    theirs, their_entropies, _ = grpo_trainer._get_per_token_logps_and_entropies(
        grpo_trainer.model, ids, mask, width, compute_entropy=True
    )
    packed = pack(PROMPTS, COMPLETIONS, 0, "cpu")
    mine, entropies = packed_logprobs(grpo_trainer.model, packed, temperature=0.7, entropy=True)
    padded = token_logprobs(grpo_trainer.model, ids, mask, temperature=0.7)[:, -width:]
    for found, expected in ((mine, theirs), (padded, theirs), (entropies, their_entropies)):
        close(found[at], expected[at], atol=1e-5, rtol=1e-5)


@BOTH
def test_token_logprobs_are_those_of_transformers_loss(name):
    """transformers averages over the targets that are not -100."""
    model = policy(name)
    rows = [p + a for p, a in zip(PROMPTS, COMPLETIONS)]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    labels = ids.masked_fill(mask == 0, -100)
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    mine = token_logprobs(model, ids, mask)
    close(-mine.sum() / mask[:, 1:].sum(), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kl_kind", ["k3", "ratio_k3"])
@pytest.mark.parametrize(
    "loss_type, aggregate", [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")]
)
@pytest.mark.statement("aggregations")
def test_grpo_losses_and_gradients_are_trls(grpo_trainer, loss_type, aggregate, kl_kind):
    trainer, model = grpo_trainer, grpo_trainer.model
    trainer.loss_type, trainer.args.use_bias_correction_kl = loss_type, kl_kind == "ratio_k3"
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    packed = pack(PROMPTS, COMPLETIONS, 0, "cpu")
    with torch.no_grad():
        old = packed_logprobs(policy(noise_seed=1), packed, 0.7)
        ref = packed_logprobs(policy(noise_seed=2), packed, 0.7)
    assert ((packed_logprobs(model, packed, 0.7) - old).abs() > 0.15).any()  # some tokens are clipped
    stored = {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": packed.mask.sum()}
    theirs = trainer._compute_loss(model, {**trl_batch(), **stored})
    expected = gradients(theirs, model)
    mine = grpo_loss(
        packed_logprobs(model, packed, 0.7), old, ref, ADVANTAGES, packed.mask, clip_low=0.1, clip_high=0.15,
        kl_coef=0.04, kl_kind=kl_kind, aggregate=aggregate, max_tokens=10,
    )  # fmt: skip
    close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 0.01
    close(gradients(mine, model), expected, atol=1e-5, rtol=1e-4)


def test_kl_estimators_sum_to_the_divergence_of_torch_distributions():
    p, q = (torch.distributions.Categorical(logits=torch.randn(7).double()) for _ in range(2))
    tokens = torch.arange(7)
    expected = torch.distributions.kl_divergence(p, q)
    for kind in ("k1", "k3"):
        close((p.probs * kl_estimate(p.log_prob(tokens), q.log_prob(tokens), kind)).sum(), expected)


# DPO

PAIRS = [
    {"prompt": PROMPTS[0], "chosen": COMPLETIONS[0], "rejected": COMPLETIONS[1]},
    {"prompt": PROMPTS[2], "chosen": COMPLETIONS[2], "rejected": COMPLETIONS[3]},
    {"prompt": [33, 44], "chosen": COMPLETIONS[3], "rejected": COMPLETIONS[0]},
]


def make_dpo_trainer(folder, model, rows, order, **options):
    """TRL's DPOTrainer on these very token ids, in this very order."""
    from trl import DPOConfig, DPOTrainer

    class SameData(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_):
            return order

    keys = ("prompt", "chosen", "rejected")
    return SameData(
        model=model,
        ref_model=options.pop("ref_model", None),
        args=DPOConfig(**trainer_options(folder, **options)),
        train_dataset=Dataset.from_list([{f"{key}_ids": row[key] for key in keys} for row in rows]),
        processing_class=load_tokenizer("tiny-llama"),
    )


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    return make_dpo_trainer(
        tmp_path_factory.mktemp("dpo"), policy(), PAIRS, range(3), ref_model=policy(noise_seed=1), beta=0.3
    )


@pytest.mark.parametrize(
    "theirs, mine, smoothing",
    [("sigmoid", "sigmoid", 0.0), ("hinge", "hinge", 0.0), ("ipo", "ipo", 0.0), ("aot_unpaired", "sigmoid", 0.1)],
)
@pytest.mark.statement("dpo-sums")
def test_dpo_losses_and_gradients_are_trls(dpo_trainer, theirs, mine, smoothing):
    # TRL smooths labels only in its optimal-transport losses, which sort a batch: of one pair, that is smoothed DPO
    trainer, model = dpo_trainer, dpo_trainer.model
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing = [theirs], [1.0], smoothing
    tokenizer = load_tokenizer("tiny-llama")
    for pairs in [[pair] for pair in PAIRS] if smoothing else [PAIRS]:
        rows = [{f"{k}_ids": v for k, v in pair.items()} for pair in pairs]
        expected = trainer._compute_loss(model, trainer.data_collator(rows), False)
        expected_gradient = gradients(expected, model)
        with torch.no_grad():
            ref = pair_logps(trainer.ref_model, pairs, tokenizer, "cpu", per_token=mine == "ipo")
        logps = pair_logps(model, pairs, tokenizer, "cpu", per_token=mine == "ipo")
        found = dpo_loss(*logps, *ref, beta=0.3, loss_type=mine, label_smoothing=smoothing)[0].mean()
        close(found, expected, atol=1e-5, rtol=1e-5)
        assert expected_gradient.abs().max() > 0.01
        close(gradients(found, model), expected_gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.statement("token-mean")
def test_20_steps_of_dpo_have_the_losses_of_trls_dpo_trainer(tmp_path):
    """The whole run: same pairs, order, optimizer, clipping; here in micro-batches and with the reference cached."""
    abc = "abcdefghijklmnopqrstuvwxyz"
    rows = [
        {"prompt": abc[i % 20 :][:3], "chosen": abc[i % 7 :][: 2 + i % 5], "rejected": abc[i % 11 :: -1][: 1 + i % 4]}
        for i in range(32)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--config", "configs/smoke/dpo.yaml", "--data", data, "--heldout_fraction", 0, "--out", tmp_path / "dpo"]
    words += ["--lora_r", 0, "--lr", "2e-3", "--warmup_steps", 0, "--min_lr_ratio", 1, "--epochs", 3, "--max_steps", 20]
    words += ["--batch_size", 4, "--micro_batch_size", 3, "--beta", 0.2, "--max_grad_norm", 0.5]
    dpo_train.main(load_config(dpo_train.Config, [str(word) for word in words]))
    lines = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]

    pairs, _, _ = load_pairs(data, load_tokenizer("tiny-llama"), 512)
    order = [i for step in range(1, 21) for i in step_indices(len(pairs), 4, step, 0)]
    trainer = make_dpo_trainer(
        tmp_path / "trl", policy(), pairs, order, max_steps=20, per_device_train_batch_size=4, learning_rate=2e-3,
        lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=0.5, beta=0.2, ref_model=policy(),
    )  # fmt: skip
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(history) == 20
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in history], abs=1e-4)
    assert [x["grad_norm"] for x in lines] == pytest.approx([x["grad_norm"] for x in history], rel=1e-3)
    assert lines[-1]["loss"] < 0.6 and max(x["grad_norm"] for x in lines) > 0.5  # it learned, and clipping was at work


# reward model


@pytest.mark.parametrize("margin, center", [(False, 0.0), (True, 0.0), (True, 0.01)])
@pytest.mark.statement("bradley-terry")
def test_reward_loss_and_gradients_are_trls(tmp_path, margin, center):
    from trl import RewardConfig, RewardTrainer

    folder = build_tiny("tiny-llama")
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = tokenizer.unk_token  # transformers finds the end of a row by its pad token
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    margins = [0.5, 1.0, 0.25]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trainer_options(tmp_path, center_rewards_coefficient=center or None)),
        train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}]),
        processing_class=tokenizer,
    )
    rows = [
        {"chosen_ids": p["prompt"] + p["chosen"], "rejected_ids": p["prompt"] + p["rejected"], "margin": m}
        for p, m in zip(PAIRS, margins)
    ]
    if not margin:
        rows = [{k: v for k, v in row.items() if k != "margin"} for row in rows]
    theirs = trainer.compute_loss(model, dict(trainer.data_collator(rows)))
    expected = gradients(theirs, model)
    reward_model = RewardModel(model)
    prompts = [pair["prompt"] for pair in PAIRS for _ in range(2)]
    packed = pack(prompts, [pair[k] for pair in PAIRS for k in ("chosen", "rejected")], 0, "cpu")
    scores = packed_scores(reward_model.model, packed, reward_model.head)
    mine = reward_loss(scores[0::2], scores[1::2], torch.tensor(margins) if margin else None, center)
    close(mine, theirs, atol=1e-6, rtol=1e-5)
    close(gradients(mine, model), expected, atol=1e-5, rtol=1e-4)


# PPO, whose implementation in TRL is unmaintained: plain sums in float64


@pytest.mark.statement("gae-padding", "reward-at-end")
def test_ppo_is_its_definition_in_plain_numbers():
    torch.manual_seed(0)
    spans = [(0, 5), (2, 4), (1, 5)]
    shape = (3, 5)
    logprobs, old, ref, values, old_values = (0.3 * torch.randn(shape).double() - 1 for _ in range(5))
    scores = torch.tensor([1.0, -0.5, 0.25]).double()
    mask = torch.zeros(shape)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = 1
    logprobs.requires_grad_()
    values.requires_grad_()
    kl_coef, gamma, lam, eps = 0.1, 0.97, 0.9, 0.2
    advantages, returns = gae(token_rewards(scores, old, ref, mask, kl_coef), old_values, mask, gamma, lam)
    surrogate = policy_loss(logprobs, old, advantages, mask, eps)
    squared = value_loss(values, old_values, returns, mask, eps)
    (surrogate + squared).backward()

    count = sum(end - start for start, end in spans)
    expected_surrogate = expected_squared = 0.0
    clipped = 0
    for row, (start, end) in enumerate(spans):

        def reward(t, row=row, end=end):
            here = -kl_coef * (old[row, t] - ref[row, t]).item()
            return here + (scores[row].item() if t == end - 1 else 0.0)

        def value(t, row=row, end=end):
            return old_values[row, t].item() if t < end else 0.0

        for t in range(start, end):
            a = sum((gamma * lam) ** (s - t) * (reward(s) + gamma * value(s + 1) - value(s)) for s in range(t, end))
            assert advantages[row, t].item() == pytest.approx(a, abs=1e-12)
            ratio = (logprobs[row, t] - old[row, t]).exp().item()
            bounded = min(max(ratio, 1 - eps), 1 + eps)
            expected_surrogate -= min(ratio * a, bounded * a) / count
            active = ratio * a <= bounded * a
            clipped += not active
            slope = -ratio * a / count if active else 0.0  # of -ratio * a with respect to the log-prob
            assert logprobs.grad[row, t].item() == pytest.approx(slope, abs=1e-12)
            v, target = values[row, t].item(), a + value(t)
            near = value(t) + min(max(v - value(t), -eps), eps)
            expected_squared += 0.5 * max((v - target) ** 2, (near - target) ** 2) / count
    assert clipped  # or the bound was not tested
    assert surrogate.item() == pytest.approx(expected_surrogate, abs=1e-12)
    assert squared.item() == pytest.approx(expected_squared, abs=1e-12)
    assert (logprobs.grad[mask == 0] == 0).all() and (values.grad[mask == 0] == 0).all()


# LoRA


def test_the_samplers_merged_copy_is_pefts_adapter():
    """The sampler folds B A into the weights itself; PEFT's forward pass and PEFT's own merge are the oracles."""
    from types import SimpleNamespace

    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(policy(), settings)
    sampler = Sampler(model, SimpleNamespace(model_name="tiny-llama"), "fp32")
    ids = torch.tensor([[50, 60, 70, 80]])
    close(sampler.model()(ids).logits, policy()(ids).logits)
    for seed in (1, 2):  # after the first rollout and after the second
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.1)
        found = sampler.model()(ids).logits
        close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
        assert (found - policy()(ids).logits).abs().max() > 0.01
        sampler.rest()
    merged = model.merge_and_unload()
    close(found, merged(ids).logits, atol=1e-6, rtol=1e-6)
