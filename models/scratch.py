"""A new model: random weights of a given shape, and a byte-level BPE tokenizer trained on the corpus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from configs.config import UserError
from models.fast.attention import use_matmul_attention
from models.fast.layers import use_memory_efficient_layers
from models.tiny import CHAT_TEMPLATE
from models.tokens import PIECE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORD_END = re.compile(r"\w(?= )")


def train_tokenizer(documents: Sequence[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016) with `vocab_size` ids. It encodes any text without loss.

    documents: those of `load_corpus`. Raises UserError if the corpus is too small for so many ids.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    chat = "text" not in documents[0]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, seen or not
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(documents), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(f"scratch_vocab = {vocab_size}: the corpus has pairs for {found} ids only; set that or less")
    eos = "<|im_end|>" if chat else "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, unk_token="<|endoftext|>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def _texts(documents):
    for document in documents:
        if "text" in document:
            yield from _at_words(document["text"])
        for value in (document.get("prompt"), document.get("completion"), document.get("messages")):
            yield from [value] if isinstance(value, str) else [m["content"] for m in value or []]


def _at_words(text):
    """A text in pieces of some PIECE characters. A space after a letter begins a word, so no word is cut."""
    start = 0
    while found := WORD_END.search(text, start + PIECE):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def scratch_config(architecture: str, layers: int, width: int, heads: int, context: int, vocabulary: int, **ids) -> Any:
    """The configuration of `build_scratch`. vocabulary: ids of the tokenizer. ids: its special tokens."""
    from transformers import GPT2Config, LlamaConfig

    shape: dict[str, Any]
    if architecture == "gpt2":
        dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": context}
        return GPT2Config(vocab_size=vocabulary, **shape, **dropout, **ids)
    inner = -(-width * 8 // 3 // 32) * 32  # 8/3 of the width, rounded up to a multiple of 32
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    attention: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
    }
    return LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **shape, **attention, **ids)


def build_scratch(
    architecture: str, layers: int, width: int, heads: int, context: int, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Any:
    """A causal language model with random float32 weights, initialised as transformers does for the architecture.

    architecture: "llama" (rotary positions, RMSNorm, SwiGLU of 8/3 width) or "gpt2" (learned positions, LayerNorm).
    width: size of the hidden states. heads: attention heads. context: the longest text, in tokens. seed: decides the
    weights. The output embedding is tied to the input embedding.
    """
    from transformers import AutoModelForCausalLM

    ids: dict[str, Any] = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = scratch_config(architecture, layers, width, heads, context, len(tokenizer), **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return use_matmul_attention(
            use_memory_efficient_layers(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
        )
