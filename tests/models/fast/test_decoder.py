"""Decoding token by token against transformers' forward pass, bit by bit in bf16, and what it leaves alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from models import generation
from models.fast import decoder
from models.fast.attention import ALIGNED, use_matmul_attention
from models.fast.decoder import decoder_for
from models.fast.layers import use_memory_efficient_layers
from models.generation import generate

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
    mine, theirs = both_ways(use_memory_efficient_layers(tiny(**changes)), monkeypatch)
    assert mine.completions == theirs.completions and mine.finish_reasons == theirs.finish_reasons
    assert {"stop", "length"} == set(mine.finish_reasons)
    for a, b in zip(mine.logprobs, theirs.logprobs):
        assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.statement("sampler-logprobs")
def test_in_bf16_it_does_so_bit_by_bit(tiny, monkeypatch, packed):
    if not packed:
        monkeypatch.setattr(decoder, "packs", lambda: False)
    elif not decoder.packs():
        pytest.skip("torch lays no weights out for oneDNN here")
    mine, theirs = both_ways(use_matmul_attention(use_memory_efficient_layers(tiny(dtype=torch.bfloat16))), monkeypatch)
    assert mine == theirs


def test_what_it_does_not_know_goes_to_transformers(tiny):
    model = use_memory_efficient_layers(tiny())
    assert decoder_for(model)
    assert not decoder_for(tiny())  # norms of transformers
    assert not decoder_for(use_memory_efficient_layers(tiny("tiny-gpt2")))
    assert not decoder_for(use_memory_efficient_layers(tiny(attention_bias=True)))
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert not decoder_for(model)
    hook.remove()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert not decoder_for(adapted) and not decoder_for(adapted.get_base_model())


def replayed(run, device):
    """What a CUDA graph does, on any device: the result is written anew into the memory of the first one."""
    result, rows = run().clone(), []

    def replay():
        rows.append(len(result))
        result.copy_(run())

    recorded.append(rows)
    return replay, result


recorded = []  # of each graph, the rows of each replay


@pytest.mark.parametrize("aligned", [1, 16])
@pytest.mark.statement("sampler-logprobs", "left-padding")
def test_a_recorded_token_gives_what_a_plain_one_does_while_rows_leave(tiny, monkeypatch, aligned):
    model, options = use_memory_efficient_layers(tiny()), {"samples_per_prompt": 4, "stop_ids": range(4), "seed": 1}
    streams = [], []

    def sampled(stream):
        return generate(model, PROMPTS, 24, on_token=lambda row, token: stream.append((row, token)), **options)

    plain = sampled(streams[0])
    recorded.clear()
    monkeypatch.setattr(generation, "GRAPHED", ("cpu",))
    monkeypatch.setattr(decoder, "record", replayed)
    monkeypatch.setitem(ALIGNED, "cpu", aligned)
    mine = sampled(streams[1])
    assert mine.completions == plain.completions and mine.finish_reasons == plain.finish_reasons
    assert {"stop", "length"} == set(mine.finish_reasons)
    for a, b in zip(mine.logprobs, plain.logprobs):
        assert a == pytest.approx(b, abs=1e-6)
    assert sorted(streams[0]) == sorted(streams[1]) and len(streams[1]) == sum(map(len, mine.completions))
    sizes = [rows[0] for rows in recorded]
    assert len(sizes) > 1 and sizes[0] == 16 and all({*rows} == {n} for rows, n in zip(recorded, sizes))
    assert all(2 * b <= a for a, b in zip(sizes, sizes[1:]))  # a smaller graph, but not for each row that leaves


@pytest.mark.statement("cost-follows-work")
def test_a_cache_that_grows_is_recorded_again(tiny, monkeypatch):
    model, options = use_memory_efficient_layers(tiny()), {"samples_per_prompt": 2, "seed": 1}
    plain = generate(model, PROMPTS, 40, **options)
    recorded.clear()
    monkeypatch.setattr(generation, "GRAPHED", ("cpu",))
    monkeypatch.setattr(generation, "ROOM", 10)
    monkeypatch.setattr(decoder, "record", replayed)
    monkeypatch.setitem(ALIGNED, "cpu", 8)
    grown = generate(model, PROMPTS, 40, **options)
    assert grown.completions == plain.completions
    for a, b in zip(grown.logprobs, plain.logprobs):
        assert a == pytest.approx(b, abs=1e-6)
    # room for 10 after 5 tokens, to 16; then at 16, 32: to 26 and 42, made 32 and 48. No row left
    assert [len(rows) for rows in recorded] == [11, 16, 12]


def test_angles_that_depend_on_the_length_are_not_recorded(tiny, monkeypatch):
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
    monkeypatch.setattr(generation, "GRAPHED", ("cpu",))
    monkeypatch.setattr(decoder, "record", replayed)
    recorded.clear()
    generate(use_memory_efficient_layers(tiny()), PROMPTS, 4, seed=0)
    assert recorded
    recorded.clear()
    generate(use_memory_efficient_layers(tiny(rope_parameters=rope)), PROMPTS, 4, seed=0)
    assert not recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 before pytest shows it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_graph_gives_what_its_operations_do_one_by_one(tiny, monkeypatch, dtype):
    model, options = (
        use_memory_efficient_layers(tiny(dtype=dtype)).cuda(),
        {"samples_per_prompt": 4, "stop_ids": range(4), "seed": 1},
    )
    mine = generate(model, PROMPTS, 24, **options)
    monkeypatch.setattr(decoder, "record", replayed)
    assert generate(model, PROMPTS, 24, **options) == mine
    with torch.autocast("cuda", torch.bfloat16):  # which casts float32 weights within the graph
        plain = generate(model, PROMPTS, 24, **options)
        monkeypatch.undo()
        assert generate(model, PROMPTS, 24, **options) == plain
