"""How much arithmetic a job needs: the products that any implementation must do, and no more.

Matrix products only, 2 FLOP for each multiply-add. Forward: every token that differs once (the prompt of a pair or a
group once, and what all prompts of a step begin with), the head only where a token's probability counts, attention only
to what a token sees. Backward: twice the forward for weights that train; once for weights that are frozen under LoRA,
which only pass the gradient on. What is computed again, for padding, or for a prompt a second time, is not counted, so
a side's share of the matrix-product peak is what it makes of the machine for the job, not how busy it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.generation import common_prefix
from models.loader import model_config


@dataclass(frozen=True)
class Part:
    """Tokens through the body, pairs of a token and one that it sees, and tokens through the head."""

    tokens: int = 0
    pairs: int = 0
    head: int = 0

    def __add__(self, other):
        return Part(self.tokens + other.tokens, self.pairs + other.pairs, self.head + other.head)


def row(prompt, answers, head=True, known=0):
    """A prompt of so many tokens once, and answers of these lengths that each see it and themselves.

    The head reads what predicts each token of the answers. known: tokens at the prompt's start that are counted
    elsewhere.
    """
    pairs = prompt * (prompt + 1) // 2 - known * (known + 1) // 2
    pairs += sum(a * prompt + a * (a + 1) // 2 for a in answers)
    return Part(prompt - known + sum(answers), pairs, sum(answers) if head else 0)


def rows(prompts, answers, head=True):
    """Those of a step: what all prompts (token ids) begin with once, then each with its answers (lists of lengths)."""
    shared = common_prefix(prompts)
    parts = [row(len(p), a, head, known=shared) for p, a in zip(prompts, answers, strict=True)]
    return sum(parts, row(shared, []))


def sampled(prompts, new, samples):
    """Sampling: prompts (token ids) once, then so many new tokens an answer, of which the last is not read again."""
    read = rows(prompts, [[new - 1] * samples] * len(prompts), head=False)
    return Part(read.tokens, read.pairs, new * samples * len(prompts))


@dataclass(frozen=True)
class Cost:
    """What a model's parts cost. body: weights in its matrix products; lora: weights in the adapter."""

    body: int
    head: int
    attention: int  # FLOP for each pair of tokens
    lora: int = 0

    @classmethod
    def of(cls, model_name, lora_r=0):
        """The cost of a model by name, with an adapter of rank lora_r on all linear layers of the body."""
        from transformers import AutoModelForCausalLM

        config = model_config(model_name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        weights = [p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in embedded]
        head = model.get_output_embeddings().weight.numel()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * size
        return cls(sum(w.numel() for w in weights), head, attention, sum(lora_r * sum(w.shape) for w in weights))

    def forward(self, part):
        """FLOP of a forward pass."""
        return 2 * (self.body + self.lora) * part.tokens + self.attention * part.pairs + 2 * self.head * part.head

    def training(self, part):
        """FLOP of a forward and a backward pass."""
        frozen = bool(self.lora)
        weights = (4 if frozen else 6) * (self.body * part.tokens + self.head * part.head)
        return weights + 6 * self.lora * part.tokens + 3 * self.attention * part.pairs
