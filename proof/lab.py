"""The Lab, and what claims are measured with: tiny models, a few prompts, definitions, the distance of two results.

`dtype` is a name here: "float64", "float32", "bf16" or "fp16". In float64 and float32 the weights have that dtype. In
bf16 and fp16 trained weights are float32 under autocast, and frozen weights have that dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data.blocks import make_blocks
from models.admission import window_of
from models.device import PRECISIONS, autocast, frozen_dtype
from models.loader import load_model, load_tokenizer
from models.tokens import completion_ids, prompt_ids
from rlhf import grpo_train, train_reward_model
from rlhf.packing import pack
from rlhf.policy import load_policy
from rlhf.utils import packed_logprobs, packed_scores
from train.updates import make_optimizer

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}  # the relative size of a rounding
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9, 10, 11, 12], [8, 9, 10, 11, 12], [13]]
COMPLETIONS = [[21, 2, 23], [24], [29, 30], [33, 33, 33, 35, 2], [40, 41, 42, 2]]
TURNS = [("Count to three", "1 2 3"), ("Say it", "it"), ("And", "on and on and on"), ("Why", "because")]
PAD = 2  # also the id of the end of a turn


@dataclass(frozen=True)
class Lab:
    """A folder that `trainers.prepare` has filled, and the device of what is measured in this process.

    name: that of a model in the folder.
    """

    folder: Path
    device: torch.device

    def model(self, name, dtype):
        """A language model whose weights all train, in float64 for that dtype and else in float32."""
        weights = torch.float64 if dtype == "float64" else torch.float32
        model = load_model(self.folder / name, dtype=weights, device=self.device)
        assert_beyond_window(model, [p + c for p, c in zip(PROMPTS, COMPLETIONS)])
        return model

    def frozen(self, dtype):
        """The torch dtype of the weights below an adapter."""
        return frozen_dtype(precision(dtype))

    def autocast(self, dtype):
        """The context of forward passes."""
        return autocast(self.device, precision(dtype))

    def policy(self, name, dtype, lora_r=4):
        """What DPO, PPO and GRPO train: (model, tokenizer, parameters, configuration of GRPO)."""
        torch.manual_seed(0)
        config = grpo_train.Config(model_name=str(self.folder / name), prompts=str(self.folder / "prompts.json"),
            lora_r=lora_r, prompts_per_step=3, samples_per_prompt=4, max_new_tokens=8)  # fmt: skip
        model, _, tokenizer, parameters = load_policy(config, self.device, precision(dtype), self.folder / "policy")
        return model, tokenizer, parameters, config

    def reward_model(self, name, dtype, lora_r):
        """What train_reward_model.py trains: a `RewardModel` with a new head."""
        torch.manual_seed(0)
        config = train_reward_model.Config(model_name=str(self.folder / name), lora_r=lora_r)
        return train_reward_model.build(config, self.device, precision(dtype))

    def packed(self, pad_id=PAD):
        """PROMPTS and COMPLETIONS as one `Packed`."""
        return pack(PROMPTS, COMPLETIONS, pad_id, self.device)

    def rows(self):
        """Each prompt with its completion, alone: tensors (1, T)."""
        return [torch.tensor([p + c], device=self.device) for p, c in zip(PROMPTS, COMPLETIONS)]


def assert_beyond_window(model, rows):
    """Raise AssertionError if the model has a window that no row exceeds: a claim would say nothing of it then."""
    window, longest = window_of(model), max(map(len, rows))
    assert window is None or longest > window, f"the longest row has {longest} tokens, the window {window}"


def precision(dtype):
    """The `precision` of the scripts that computes in this dtype: "fp32" for float64, too, whose weights differ."""
    return dtype if dtype in PRECISIONS else "fp32"


def deviation(found, expected):
    """The largest difference over the largest expected entry, a float. found, expected: lists of tensors or numbers.

    Each list is taken as one vector. inf if the vectors differ in length, or if one holds inf or NaN.
    """
    a, b = (torch.cat([torch.as_tensor(x).detach().double().cpu().reshape(-1) for x in xs]) for xs in (found, expected))
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return ((a - b).abs().max() / (b.abs().max().item() or 1.0)).item()


def definition(model, prompt, completion, temperature=1.0):
    """Log-probs of a completion's tokens by the definition, (L,) in nats, at least in float32.

    One row, no padding, all logits, log-softmax, gather. prompt, completion: token ids.
    """
    ids = torch.tensor([prompt + completion], device=model.get_input_embeddings().weight.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def gradients(model, values):
    """The gradients of a weighted sum of `values`, a list of tensors: one for each weight that trains."""
    model.zero_grad()
    flat = torch.cat([v.reshape(-1) for v in values])
    (flat * torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


def both(model, found, expected):
    """The deviation of values or of their gradients, the larger one. found, expected: lists of tensors."""
    return max(deviation(found, expected), deviation(gradients(model, found), gradients(model, expected)))


def train_a_little(lab, dtype, parameters, loss):
    """Take three steps of the scripts' optimizer on `loss()`. Raises AssertionError if the weights hardly moved."""
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(parameters, 1e-2)
    for _ in range(3):
        with lab.autocast(dtype):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert deviation(parameters, before) > 1e-3, "the training of a few steps moved nothing"


def trained_policy(lab, name, dtype, lora_r=4):
    """(model, tokenizer, configuration) of `Lab.policy` after three steps on the packed completions."""
    model, tokenizer, parameters, config = lab.policy(name, dtype, lora_r)
    train_a_little(lab, dtype, parameters, lambda: -packed_logprobs(model, lab.packed()).mean())
    return model, tokenizer, config


def trained_reward_model(lab, name, dtype, lora_r):
    """`Lab.reward_model` after three steps on the packed completions."""
    reward_model, packed = lab.reward_model(name, dtype, lora_r), lab.packed()
    parameters = [p for p in reward_model.parameters() if p.requires_grad]
    train_a_little(lab, dtype, parameters, lambda: scores_of(reward_model, packed).mean())
    return reward_model.eval()


def scores_of(reward_model, packed):
    """Scores (N,) of the N completions of a `Packed`."""
    return packed_scores(reward_model.model, packed, reward_model.head)


def documents(lab, name):
    """(the TURNS as one packed block, their prompts' ids, their completions' ids): what the LM scripts train on."""
    tokenizer = load_tokenizer(lab.folder / name)
    rows = [{"prompt": p, "completion": c} for p, c in TURNS]
    blocks = make_blocks(rows, "prompt", tokenizer, 256, "turns")
    assert len(blocks) == 1 and (blocks.position_ids == 0).sum() >= len(TURNS)
    return blocks, [prompt_ids(tokenizer, p) for p, _ in TURNS], [completion_ids(tokenizer, c) for _, c in TURNS]


def new_folder(lab, *names):
    """Make a folder in the lab's. Raises FileExistsError if it is there already."""
    folder = lab.folder.joinpath(*names)
    folder.mkdir(parents=True)
    return folder
