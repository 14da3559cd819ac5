"""A folder with a tiny model whose tokenizer is as a test wants it."""

import json

import torch
from transformers import AutoModelForCausalLM

from models.tiny import byte_tokenizer, tiny_config


def folder_with(path, rows=None, template=None, generation_stops=None, eos="<|im_end|>", token=None):
    """A folder with a tiny Llama of `rows` embedding rows, and a tokenizer whose eos, template and stops are these."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.eos_token = eos
    if token:
        tokenizer.add_tokens([token])
    if template is not None:
        tokenizer.chat_template = template
    config = tiny_config("tiny-llama", rows or len(tokenizer), tokenizer.eos_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    if generation_stops is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_stops}))
    return path
