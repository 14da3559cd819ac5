"""The sizes of a plan, part by part, beside what torch allocates, what published models have, and sums by hand."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    T5Config,
)

from configs.config import UserError
from models import plan
from models.device import autocast
from models.fast.attention import causal_mask, use_matmul_attention
from models.fast.head import HELD, HeadNLL, hidden_states
from models.fast.layers import use_memory_efficient_layers
from models.fast.lora import add_adapter
from models.generation import _Batch
from models.plan import build_meta, gathered, leave_two, logits, outer_layers, passes, sampling, sizes, training_parts
from models.tiny import tiny_config
from runtime.plan import Part, Plan, Target
from train.updates import make_optimizer

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_2_5_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 320}
DENSE = {"intermediate_size": 96, "num_key_value_heads": 2}


def real(config, dtype=torch.float32, lora_r=0):
    """The model that a run trains, with its weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = use_matmul_attention(use_memory_efficient_layers(model))
    return (add_adapter(model, lora_r, 2 * lora_r, task_type="CAUSAL_LM") if lora_r else model).eval()


CONFIGS = {
    "tied": lambda: LlamaConfig(**SMALL, **DENSE, tie_word_embeddings=True),
    "not tied": lambda: LlamaConfig(**SMALL, **DENSE, tie_word_embeddings=False),
    "padded vocabulary": lambda: Qwen2Config(**SMALL | {"vocab_size": 384}, **DENSE),
    "learned positions": lambda: tiny_config("tiny-gpt2", 320, 2, n_layer=4),
    "composite": lambda: Gemma3Config(
        text_config={**SMALL, **DENSE, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 16},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
}
KINDS = [("fp32", torch.float32, 0), ("bf16", torch.float32, 0), ("bf16", torch.bfloat16, 4)]


@pytest.mark.statement("planned-parts")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision, dtype, lora_r", KINDS)
def test_weights_and_what_a_pass_keeps_are_those_of_the_real_model(name, precision, dtype, lora_r):
    planned = sizes(CONFIGS[name](), precision, dtype, lora_r)
    model = real(CONFIGS[name](), dtype, lora_r)
    weights = list(model.parameters())
    assert planned.weights == sum(p.numel() for p in weights)
    assert planned.trained == sum(p.numel() for p in weights if p.requires_grad)
    assert planned.frozen_bytes == sum(p.nbytes for p in weights if not p.requires_grad)
    own, kept = {p.untyped_storage().data_ptr() for p in weights}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), x
        return x

    ids = torch.randint(3, 300, (3, 50))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(torch.device("cpu"), precision):
        hidden_states(model, ids, position_ids=(torch.arange(50) % 25).expand(3, 50))  # two samples a row
    real_size = sum(size for size, _ in kept.values())
    assert planned.kept * 150 + planned.cast + planned.mask * 3 * 50 * 50 == pytest.approx(real_size, rel=0.02)
    masks = sum(size for size, x in kept.values() if x.shape[-2:] == (50, 50))
    assert planned.mask * 3 * 50 * 50 == pytest.approx(masks, rel=0.05)  # GPT-2's position ids, one row, count as mask
    both = sum(part.bytes for part in passes(planned, 150, 50, 3, checkpointing=False))  # with each mask as bool, too
    assert both == pytest.approx(real_size, rel=0.08)


def test_of_layers_that_are_the_same_two_are_run():
    model = build_meta(CONFIGS["composite"](), torch.float32)
    layers = outer_layers(model.get_decoder())
    assert [layer.self_attn.is_sliding for layer in layers] == 5 * [True] + [False, True]
    assert leave_two(layers) == {layers[6]: 5}  # the other one of its kind, and all that lie between
    assert [bool(list(layer.parameters())) for layer in layers] == [True, *4 * [False], True, True]


@pytest.mark.statement("planned-parts")
def test_a_seventh_layer_is_a_layer_more():
    two, six, seven = (sizes(LlamaConfig(**SMALL | {"num_hidden_layers": n}), "bf16", torch.float32) for n in (2, 6, 7))
    for key in ("kept", "cast", "cache", "weights", "trained"):
        a_layer = getattr(seven, key) - getattr(six, key)
        assert a_layer > 0 and getattr(six, key) - getattr(two, key) == pytest.approx(4 * a_layer)
    assert seven.weights - six.weights == seven.layer == six.layer
    assert seven.mask == six.mask == two.mask == 2  # one mask for all layers, in the dtype of the products


def test_what_a_layer_keeps_by_hand():
    """Llama-2-7B in float32. By a token and a layer: the inputs of two norms and what these give; queries, keys, values
    and the output of attention; both inputs of the gate; for each norm and each head one number."""
    s = sizes(LlamaConfig(**LLAMA_2_7B), "fp32", torch.float32)
    a_layer = 4 * (2 * 4096 + 2 * 4096 + 4 * 4096 + 2 * 11008 + 2 + 32)
    final = 4 * (4096 + 4096)
    assert s.kept == pytest.approx(32 * a_layer + final, rel=0.01)
    [checkpointed, _] = passes(s, 1000, 1000, 1, checkpointing=True)
    assert checkpointed.bytes == pytest.approx(1000 * (32 * 4 * 4096 + a_layer), rel=0.03)


@pytest.mark.parametrize(
    "config, weights, cache",
    [(LlamaConfig(**LLAMA_2_7B), 6.738e9, 2 * 32 * 4096), (Qwen2Config(**QWEN_2_5_7B), 7.616e9, 2 * 28 * 4 * 128)],
)
def test_a_7b_shape_on_one_two_and_eight_cards_of_80_gb(config, weights, cache):
    s = sizes(config, "bf16", torch.float32)
    assert s.weights == s.trained == pytest.approx(weights, rel=1e-3)
    assert s.cache == 4 * cache  # keys and values of a token, with float32 weights
    tokens = passes(s, 4096, 4096, 1, checkpointing=True)

    def planned(processes):
        held = training_parts(s, "model", torch.float32, processes)
        return Plan(Target("cuda", 80e9, processes, named=True), "", "", "", held, {"pass": tokens})

    in_pass = sum(part.bytes for part in tokens)
    one, two, eight = planned(1), planned(2), planned(8)
    assert one.peak() == pytest.approx(16 * weights + in_pass, rel=1e-3)  # 4 bytes each: weight, gradient, two moments
    assert two.peak() == eight.peak() == pytest.approx(20 * weights + in_pass, rel=1e-3)  # and the exchange
    assert not one.fits and not eight.fits
    assert eight.peak(shards=8) == pytest.approx(20 * weights / 8 + in_pass, rel=1e-3)
    assert two.peak(shards=2) > 55e9 and eight.peak(shards=8) < 60e9
    lora = sizes(config, "bf16", torch.bfloat16, 16)
    held = training_parts(lora, "model", torch.bfloat16)
    assert sum(part.bytes for part in held) == pytest.approx(2 * weights + 16 * lora.trained, rel=1e-3)


@pytest.mark.statement("planned-parts")
def test_the_state_of_adamw_has_two_moments():
    model = real(CONFIGS["tied"]())
    optimizer = make_optimizer(model.parameters(), 1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = sum(x.nbytes for entry in optimizer.state.values() for x in entry.values() if x.dim())
    gradients = sum(p.grad.nbytes for p in model.parameters())
    held = {
        p.name: p.bytes for p in training_parts(sizes(CONFIGS["tied"](), "fp32", torch.float32), "m", torch.float32)
    }
    assert held == {"m: weights, float32": gradients, "gradients": gradients, "optimizer: two moments of AdamW": state}


@pytest.mark.statement("planned-parts")
@pytest.mark.parametrize("name", ["tied", "learned positions"])
def test_the_cache_is_that_of_a_real_decode(name):
    model, planned = real(CONFIGS[name]()), sizes(CONFIGS[name](), "fp32", torch.float32)
    batch = _Batch(model, [[5, 6, 7, 8]] * 3, 2, 9)
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in batch.cache.layers)
    parts = {part.name: part.bytes for part in sampling(planned, 6, 4, 9, 4, copy=False, kind="cpu")}
    assert parts["KV cache"] == allocated and "sampler: weights" not in parts
    assert parts["logits of the next tokens"] == 3 * batch.logits.float().nbytes


def test_logits_are_held_in_pieces_and_the_head_has_a_gradient(monkeypatch):
    s = sizes(CONFIGS["tied"](), "fp32", torch.float32)
    few, many = (logits(s, rows, "cpu", 4, trained=True)[0].bytes for rows in (100, 10**6))
    assert few == 100 * (320 + 64) * 4
    assert many == pytest.approx(HELD["cpu"] + 10**6 * 64 * 4, rel=1e-3)
    weight, hidden = torch.randn(320, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True)
    nats = HeadNLL.apply(hidden, weight, torch.zeros(100, dtype=torch.long), torch.float32, False)
    of_hidden, of_weight = nats.grad_fn.saved_tensors
    assert logits(s, 100, "cpu", 4, trained=True)[1].bytes == 2 * of_weight.nbytes  # and that of the embedding
    assert few - 100 * 320 * 4 == of_hidden.nbytes


def test_experts_are_planned_and_other_kinds_are_refused_by_name():
    shape = {**SMALL, **DENSE, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    shape |= {"num_hidden_layers": 6, "mlp_only_layers": [0, 2, 4]}  # two kinds of layers in turn
    s = sizes(Qwen3MoeConfig(**shape), "fp32", torch.float32)
    assert s.weights == sum(p.numel() for p in real(Qwen3MoeConfig(**shape)).parameters())
    assert s.kept > 0
    for config in (T5Config(), MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=300)):
        with pytest.raises(UserError, match=f"a {type(config).__name__} cannot be planned"):
            sizes(config, "fp32", torch.float32)


def test_planning_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(plan, "_known", {})  # nothing is remembered from other tests
    state = torch.random.get_rng_state()
    sizes(CONFIGS["tied"](), "bf16", torch.bfloat16, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert causal_mask.cache_info().currsize == 0 and len(plan._known) == 1


def test_what_is_gathered_of_a_7b_shape_by_hand():
    """docs/sharding.md: 2 (2 p + r) in bf16, and 6 max(p, r) for the gradients of a group in bf16 and float32."""
    s = sizes(LlamaConfig(**LLAMA_2_7B), "bf16", torch.bfloat16)
    p, r = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096, 2 * 32000 * 4096 + 4096
    assert (s.layer, s.rest) == (p, r) and s.weights == 32 * p + r
    assert [part.bytes for part in gathered(s, 2)] == [4 * p, 2 * r, 6 * r]
    assert [part.bytes for part in gathered(s, 4)] == [8 * p, 4 * r, 4 * r]
    assert not any(part.sharded for part in gathered(s, 2))


def test_parts_of_a_sharded_run_are_divided():
    held = [Part("weights", 12, sharded=True), Part("reward", 5)]
    divided = Plan(Target("cuda", 30.0, 4), "", "", "", held, {"pass": [Part("activations", 7)]}, shards=4)
    assert divided.peak() == 12 / 4 + 5 + 7 and divided.peak(shards=1) == 24
    assert "weights, 1/4 of it" in divided.lines()[0] and "1/4" not in divided.lines()[1]


@pytest.mark.parametrize("kind, peak", [("cpu", 0.5e9 + 4 + 5 + 3), ("cuda", 4 + 5)])
def test_kinds_of_work_add_up_on_a_cpu_and_the_largest_counts_on_a_gpu(kind, peak):
    work = {"sampling": [Part("cache", 5)], "pass": [Part("activations", 3)]}
    added = Plan(Target(kind, 1e9), "", "", "", [Part("weights", 4, sharded=True)], work)
    assert added.peak() == peak and added.fits
    assert added.peak(shards=2) == peak - 2
    assert added.part("cache") == 5 and not Plan(Target(kind, 1.0), "", "", "", added.held, work).fits
