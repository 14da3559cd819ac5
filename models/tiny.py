"""Models of a few thousand parameters, built on first use, for tests and `configs/smoke/`. They run in seconds.

Each is saved as a folder like any other model, so that adapters can name it as their base. The weights are random
(seed 0). The tokenizer has one id per byte. Nothing is downloaded, and every text can be encoded and decoded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.config import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_MODELS = ("tiny-llama", "tiny-gpt2")  # rotary positions, learned positions


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each byte and three special tokens; pad is its own token only without `chat`."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos = "<|im_end|>" if chat else "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos, unk_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": specials[1:]})
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(name: str, vocab_size: int, eos_token_id: int | None, **changes) -> PreTrainedConfig:
    """The configuration of a tiny model. `changes` override single entries (dropout in a test, for example)."""
    from transformers import GPT2Config, LlamaConfig

    ids = {"bos_token_id": None, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id}
    if name == "tiny-gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(vocab_size=vocab_size, **{**shape, **dropout, **ids, **changes})
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=True, **{**shape, **heads, **ids, **changes})


def save_whole(model: Any, folder: str | Path) -> None:
    """Call `save_pretrained` so that it writes in every process.

    Once processes are connected, transformers (5.23) writes on rank 0 only, without a message. Here the first process
    that needs a model makes it for all.
    """
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)


def build_tiny(name: str) -> Path:
    """The folder of a tiny model. It is made on first use, atomically: other processes see all of it or nothing."""
    from transformers import AutoModelForCausalLM

    folder = ROOT / "models" / name
    if (folder / "config.json").is_file():
        return folder
    tokenizer = byte_tokenizer(chat=name == "tiny-llama")
    config = tiny_config(name, len(tokenizer), tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    temporary = Path(f"{folder}.{os.getpid()}.tmp")
    save_whole(model, temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
    return folder
