"""Decoding token by token against transformers' forward pass, bit by bit in bf16, and what it leaves alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models import decoding, generation
from models.attention import use_products
from models.decoding import decoder_for
from models.generation import generate
from models.lean import make_lean

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15]]


def both_ways(model, monkeypatch):
    """What is sampled with the decoder and without it."""
    used, options = [], {"samples_per_prompt": 3, "stop_ids": range(4), "seed": 0}
    monkeypatch.setattr(generation, "decoder_for", lambda model: used.append(decoder_for(model)) or used[-1])
    mine = generate(model, PROMPTS, 8, **options)
    assert used[0]
    monkeypatch.setattr(generation, "decoder_for", lambda _: None)
    return mine, generate(model, PROMPTS, 8, **options)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"rope_parameters": {"rope_theta": 500.0}}])
@pytest.mark.statement("sampler-logprobs", "left-padding")
def test_it_computes_what_transformers_does(tiny, monkeypatch, changes):
    mine, theirs = both_ways(make_lean(tiny(**changes)), monkeypatch)
    assert mine.completions == theirs.completions and mine.finish_reasons == theirs.finish_reasons
    assert {"stop", "length"} == set(mine.finish_reasons)
    for a, b in zip(mine.logprobs, theirs.logprobs):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.statement("sampler-logprobs")
def test_in_bf16_it_does_so_bit_by_bit(tiny, monkeypatch, packed):
    if not packed:
        monkeypatch.setattr(decoding, "packs", lambda: False)
    elif not decoding.packs():
        pytest.skip("torch lays no weights out for oneDNN here")
    mine, theirs = both_ways(use_products(make_lean(tiny(dtype=torch.bfloat16))), monkeypatch)
    assert mine == theirs


def test_what_it_does_not_know_goes_to_transformers(tiny):
    model = make_lean(tiny())
    assert decoder_for(model)
    assert not decoder_for(tiny())  # norms of transformers
    assert not decoder_for(make_lean(tiny("tiny-gpt2")))
    assert not decoder_for(make_lean(tiny(attention_bias=True)))
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert not decoder_for(model)
    hook.remove()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not decoder_for(adapted) and not decoder_for(adapted.get_base_model())
