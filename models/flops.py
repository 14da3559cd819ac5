"""How much arithmetic a job needs: the matmuls that any implementation must do, and no more.

Only matmuls count, with 2 FLOP for each multiply-add. Forward: every token counts once. The prompt of a pair or of a
group counts once, and so does the common prefix of all prompts of a step. The head counts only for tokens whose
probability is used, and attention only for the tokens that a token sees. Backward: twice the forward for weights that
train; once for weights that are frozen under LoRA, which only pass the gradient on. Padding, recomputed activations and
a prompt that is computed again do not count. So a side's "% of peak" says how much of the machine the job gets out of
it, not how busy the machine is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.generation import common_prefix
from models.loader import model_config


@dataclass(frozen=True)
class Part:
    """Tokens through the body, pairs of a token and one that it sees, and tokens through the head."""

    tokens: int = 0
    pairs: int = 0
    head: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.tokens + other.tokens, self.pairs + other.pairs, self.head + other.head)


def row(prompt: int, completions: list[int], head: bool = True, known: int = 0) -> Part:
    """A prompt of so many tokens, once, and completions of these lengths; each sees the prompt and itself.

    The head counts for each token of the completions. known: tokens at the start of the prompt that are counted
    elsewhere.
    """
    pairs = prompt * (prompt + 1) // 2 - known * (known + 1) // 2
    pairs += sum(n * prompt + n * (n + 1) // 2 for n in completions)
    return Part(prompt - known + sum(completions), pairs, sum(completions) if head else 0)


def rows(prompts: list[list[int]], completions: list[list[int]], head: bool = True) -> Part:
    """A step: the common prefix of the prompts (token ids) once, then each prompt with its completions (lengths)."""
    shared = common_prefix(prompts)
    parts = [row(len(p), c, head, known=shared) for p, c in zip(prompts, completions, strict=True)]
    return sum(parts, row(shared, []))


def sampled(prompts: list[list[int]], new: int, samples: int) -> Part:
    """Sampling: prompts (token ids) once, then `new` tokens a completion; the model does not read the last one."""
    read = rows(prompts, [[new - 1] * samples] * len(prompts), head=False)
    return Part(read.tokens, read.pairs, new * samples * len(prompts))


@dataclass(frozen=True)
class Cost:
    """What the parts of a model cost. body, head: weights in their matmuls; lora: weights of the adapter."""

    body: int
    head: int
    attention: int  # FLOP for each pair of tokens
    lora: int = 0

    @classmethod
    def of(cls, model_name: str, lora_r: int = 0) -> Cost:
        """The cost of a model by name, with an adapter of rank lora_r on all linear layers of the body."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return cls.of_model(AutoModelForCausalLM.from_config(model_config(model_name)), lora_r)

    @classmethod
    def of_model(cls, model: Any, lora_r: int = 0) -> Cost:
        """The cost of a model without an adapter, which may be on the meta device. Of experts, those that are used."""
        config = model.config.get_text_config()
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        weights = [p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in embedded]
        experts = [p for p in model.base_model.parameters() if p.dim() == 3]
        used = sum(p.numel() // len(p) for p in experts) * (getattr(config, "num_experts_per_tok", None) or 1)
        output = model.get_output_embeddings()
        head = output.weight.numel() if output is not None else 0
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 4 * config.num_hidden_layers * config.num_attention_heads * size
        lora = sum(lora_r * sum(w.shape) for w in weights)
        return cls(sum(w.numel() for w in weights) + used, head, attention, lora)

    def forward(self, part: Part) -> int:
        """FLOP of a forward pass."""
        return 2 * (self.body + self.lora) * part.tokens + self.attention * part.pairs + 2 * self.head * part.head

    def training(self, part: Part) -> int:
        """FLOP of a forward and a backward pass."""
        frozen = bool(self.lora)
        weights = (4 if frozen else 6) * (self.body * part.tokens + self.head * part.head)
        return weights + 6 * self.lora * part.tokens + 3 * self.attention * part.pairs
