"""Where claims are measured: tiny models, a few prompts, definitions, and the distance of two results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data.blocks import make_blocks
from models.device import PRECISIONS, autocast, frozen_dtype
from models.loader import load_model, load_tokenizer
from models.tokens import completion_ids, prompt_ids
from rlhf import grpo_train, train_reward_model
from rlhf.packing import pack, packed_logprobs, packed_scores
from rlhf.policy import load_policy
from train.updates import make_optimizer

# float64 and float32: weights of that type. bf16 and fp16: float32 weights under autocast, frozen ones in that type
EPS = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


EPS = {numbers: torch.finfo(dtype).eps for numbers, dtype in EPS.items()}


PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9, 10, 11, 12], [8, 9, 10, 11, 12], [13]]


ANSWERS = [[21, 2, 23], [24], [29, 30], [33, 33, 33, 35, 2], [40, 41, 42, 2]]


TURNS = [("Count to three", "1 2 3"), ("Say it", "it"), ("And", "on and on and on"), ("Why", "because")]


PAD = 2  # also the id of the end of a turn


@dataclass(frozen=True)
class Lab:
    """Where claims are measured: a folder that `runs.prepare` has filled; the device of what runs in this process."""

    folder: Path
    device: torch.device

    def model(self, name, numbers):
        dtype = torch.float64 if numbers == "float64" else torch.float32
        return load_model(self.folder / name, dtype=dtype, device=self.device)

    def frozen(self, numbers):
        """The type of weights below an adapter."""
        return frozen_dtype(precision(numbers))

    def autocast(self, numbers):
        return autocast(self.device, precision(numbers))

    def policy(self, name, numbers, lora_r=4):
        """What DPO, PPO and GRPO train: (model, tokenizer, parameters, configuration)."""
        torch.manual_seed(0)
        config = grpo_train.Config(model_name=str(self.folder / name), prompts=str(self.folder / "prompts.json"),
            lora_r=lora_r, prompts_per_step=3, group_size=4, max_new_tokens=8)  # fmt: skip
        model, _, tokenizer, parameters = load_policy(config, self.device, precision(numbers), self.folder / "policy")
        return model, tokenizer, parameters, config

    def reward_model(self, name, numbers, lora_r):
        torch.manual_seed(0)
        config = train_reward_model.Config(model_name=str(self.folder / name), lora_r=lora_r)
        return train_reward_model.build(config, self.device, precision(numbers))

    def packed(self, pad_id=PAD):
        return pack(PROMPTS, ANSWERS, pad_id, self.device)

    def rows(self):
        """Each prompt with its answer, alone: tensors (1, T)."""
        return [torch.tensor([p + a], device=self.device) for p, a in zip(PROMPTS, ANSWERS)]


def precision(numbers):
    """The `precision` of the scripts that computes in these numbers (float64 takes weights of that type besides)."""
    return numbers if numbers in PRECISIONS else "fp32"


def deviation(found, expected):
    """Largest difference over the largest expected entry, of two lists of tensors or numbers taken as one."""
    a, b = (torch.cat([torch.as_tensor(x).detach().double().cpu().reshape(-1) for x in xs]) for xs in (found, expected))
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return math.inf
    return ((a - b).abs().max() / (b.abs().max().item() or 1.0)).item()


def definition(model, prompt, answer, temperature=1.0):
    """Log-probs of an answer's tokens by the definition: one row, no padding, all logits, log-softmax, gather."""
    ids = torch.tensor([prompt + answer], device=model.get_input_embeddings().weight.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]


def gradients(model, values):
    """Of a weighted sum of `values`, with respect to all weights that train, as one list."""
    model.zero_grad()
    flat = torch.cat([v.reshape(-1) for v in values])
    (flat * torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


def both(model, found, expected):
    """The deviation of values and the deviation of their gradients: the larger. found, expected: lists of tensors."""
    return max(deviation(found, expected), deviation(gradients(model, found), gradients(model, expected)))


def train_a_little(lab, numbers, parameters, loss):
    """Three steps of the scripts' optimizer on `loss()`. Asserts that they moved the weights visibly."""
    before = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(parameters, 1e-2)
    for _ in range(3):
        with lab.autocast(numbers):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert deviation(parameters, before) > 1e-3, "the training of a few steps moved nothing"


def trained_policy(lab, name, numbers, lora_r=4):
    """`Lab.policy` after three steps on the packed answers."""
    model, tokenizer, parameters, config = lab.policy(name, numbers, lora_r)
    train_a_little(lab, numbers, parameters, lambda: -packed_logprobs(model, lab.packed()).mean())
    return model, tokenizer, config


def trained_scorer(lab, name, numbers, lora_r):
    """`Lab.reward_model` after three steps on the packed answers."""
    scorer, packed = lab.reward_model(name, numbers, lora_r), lab.packed()
    parameters = [p for p in scorer.parameters() if p.requires_grad]
    train_a_little(lab, numbers, parameters, lambda: scores_of_packed(scorer, packed).mean())
    return scorer.eval()


def scores_of_packed(scorer, packed):
    return packed_scores(scorer.model, packed, scorer.head)


def documents(lab, name):
    """(the turns as one packed block, their prompts' ids, their answers' ids): what the LM scripts train on."""
    tokenizer = load_tokenizer(lab.folder / name)
    rows = [{"prompt": p, "completion": c} for p, c in TURNS]
    blocks = make_blocks(rows, "prompt", tokenizer, 256, "turns")
    assert len(blocks) == 1 and (blocks.position_ids == 0).sum() >= len(TURNS)
    return blocks, [prompt_ids(tokenizer, p) for p, _ in TURNS], [completion_ids(tokenizer, c) for _, c in TURNS]


def new_folder(lab, *names):
    folder = lab.folder.joinpath(*names)
    folder.mkdir(parents=True)
    return folder
