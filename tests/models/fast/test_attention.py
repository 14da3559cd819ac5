"""Attention by matmuls against PyTorch's own in float64, its gradients, its masks, and rows that lie end to end."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.fast import attention as module
from models.fast.attention import (
    ALIGNED,
    NAME,
    Ragged,
    added_mask,
    attention,
    blocks_of,
    takes_ragged,
    use_matmul_attention,
)
from models.fast.head import hidden_states
from models.loader import load_model
from rlhf.packing import pack
from rlhf.utils import packed_logprobs

B, T, KV, GROUP, D = 3, 7, 2, 2, 8


def inputs(dtype=torch.float64, length=T, grad=True):
    g = torch.Generator().manual_seed(0)
    shapes = [(B, KV * GROUP, length, D), (B, KV, T, D), (B, KV, T, D)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def reference(query, key, value, mask):
    """(B, T, heads, D) by PyTorch's kernel in float64."""
    q, k, v = (x.double() for x in (query, key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)))
    causal = mask is None and query.shape[2] > 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def assert_same_gradients(out, expected, mine, exact, tolerance):
    """Of a weighted sum of `out` with respect to `mine`, and of `expected` with respect to `exact`."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(mine, exact):
        assert (a.grad - b.grad).abs().max() < tolerance * b.grad.abs().max()


def random_mask():
    """(B, 1, T, T): each token sees itself and some others."""
    seen = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(1)) < 0.5
    return seen | torch.eye(T, dtype=torch.bool)


@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("masked", ["causal", "bool", "added"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.statement("packed-apart")
def test_half_precision_is_float64_rounded(monkeypatch, dtype, tolerance, masked, block):
    monkeypatch.setattr(module, "sdpa_attention_forward", None)  # it must not be called
    monkeypatch.setattr(module, "BLOCK", block)
    seen = None if masked == "causal" else random_mask()
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf) if masked == "added" else seen
    mine, exact = inputs(dtype), inputs()
    out, expected = attention(None, *mine, mask)[0], reference(*exact, seen)
    assert out.dtype == dtype and out.shape == (B, T, KV * GROUP, D)
    assert (out - expected).abs().max() < tolerance
    assert_same_gradients(out, expected, mine, exact, tolerance)


@pytest.mark.parametrize("block", [2, 128])
def test_the_equation_and_its_gradients_in_float64(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)  # of 7 queries, four blocks or one
    query, key, value = inputs()
    grouped = query.detach().unflatten(1, (KV, GROUP)).transpose(2, 3).flatten(2, 3).requires_grad_()
    added = added_mask(random_mask(), torch.float64)
    blocks = blocks_of(added)
    torch.autograd.gradcheck(lambda *x: module._Attention.apply(*x, added, blocks), (grouped, key, value))
    out = module._Attention.apply(grouped * D**-0.5, key, value, added, blocks)
    out = out.unflatten(2, (T, GROUP)).transpose(1, 2).flatten(2, 3)
    assert (out - reference(query, key, value, random_mask())).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_read_one_mask(monkeypatch, tiny, dtype):
    model, masks, attends = use_matmul_attention(tiny(dtype=torch.float32)), [], module._Attention.apply
    monkeypatch.setattr(module._Attention, "apply", lambda *x: masks.append(x[3]) or attends(*x))
    ids = torch.arange(6)[None] + 5
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden_states(model, ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))  # two packed texts
    if dtype == torch.float32:  # PyTorch's kernel
        assert not masks
    else:
        assert len(masks) == 2 and masks[0].data_ptr() == masks[1].data_ptr() and masks[0].dtype == dtype
        same = torch.arange(6)[:, None] // 3 == torch.arange(6) // 3
        assert torch.equal(masks[0][0, 0] == 0, same.tril())


@pytest.mark.statement("packed-apart")
def test_a_block_of_queries_reads_the_keys_that_it_sees(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    seen = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    seen[0, 0, :2, :2] = seen[0, 0, 2:5, 2:5] = True  # two texts and padding
    seen[1, 0, 1:4, 1:4] = True
    mask = added_mask(seen.tril(), torch.float32)
    ends = [(b.queries.start, b.queries.stop, b.keys.start, b.keys.stop) for b in blocks_of(mask)]
    assert ends == [(0, 3, 0, 3), (3, 6, 1, 5), (6, 8, 0, 1)]
    assert blocks_of(mask) is blocks_of(mask)  # one for all layers
    assert blocks_of(mask[:, :, :3]) is None and blocks_of(None) is None


def test_masks_of_earlier_passes_are_not_held(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    passes = []
    for _ in range(3):
        mask = added_mask(torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(), torch.float32)
        assert blocks_of(mask)
        passes.append(weakref.ref(mask))
    del mask
    gc.collect()
    assert [alive() is not None for alive in passes] == [False, False, True]  # the last one, for its other layers


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
@pytest.mark.statement("packed-apart")
def test_keys_that_no_query_of_a_block_sees_are_left_out(monkeypatch, dtype, tolerance):
    """A prompt of one token and three completions of two: the last block reads the prompt and its own completion."""
    monkeypatch.setattr(module, "BLOCK", 2)
    completion = torch.tensor([0, 1, 1, 2, 2, 3, 3])
    seen = ((completion[:, None] == completion) | (completion == 0)).tril()[None, None]
    added = added_mask(seen, dtype)
    keys = [b.keys if isinstance(b.keys, slice) else b.keys.tolist() for b in blocks_of(added)]
    assert keys == [slice(0, 2), slice(0, 4), [0, 3, 4, 5], [0, 5, 6]]
    mine, exact = inputs(dtype), inputs()
    grouped = (mine[0] * D**-0.5).unflatten(1, (KV, GROUP)).transpose(2, 3).flatten(2, 3)
    out = module._Attention.apply(grouped, *mine[1:], added, blocks_of(added))
    out = out.unflatten(2, (T, GROUP)).transpose(1, 2).flatten(2, 3)
    expected = reference(*exact, seen.expand(B, 1, T, T))
    assert (out - expected).abs().max() < tolerance
    assert_same_gradients(out, expected, mine, exact, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_one_new_token_in_decoding(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(module, "sdpa_attention_forward", None)
    seen = random_mask()[:, :, -1:]
    query, key, value = inputs(dtype, length=1, grad=False)
    with torch.no_grad():
        for mask in (seen, None):
            out = attention(None, query, key, value, mask)[0]
            assert (out - reference(*inputs(length=1, grad=False), mask)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.statement("packed-apart")
def test_what_is_not_seen_has_no_weight_and_padding_that_sees_nothing_stays_finite(dtype):
    query, key, value = inputs(dtype)
    query.data *= 30  # scores in the hundreds
    seen = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    seen[0, 0, 0] = False  # a padding token that sees nothing
    out = attention(None, query, key, value, seen)[0]
    assert out.isfinite().all()
    out[1, 2].float().sum().backward()  # it sees the tokens 0 to 2
    assert (key.grad[1, :, 3:] == 0).all() and (value.grad[1, :, 3:] == 0).all() and value.grad[1, :, 2].any()


def test_what_the_products_do_not_do_goes_to_pytorch(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *args, **kwargs: asked.append(kwargs) or (None, None))
    half = inputs(torch.bfloat16)
    attention(None, *half, None)
    assert not asked
    attention(None, *inputs(torch.float32), None)  # the kernel is the faster one
    attention(None, *half, None, dropout=0.1)
    attention(None, *half, None, softcap=30.0)
    attention(None, *half, None, is_causal=False)
    both_ways = torch.nn.Module()
    both_ways.is_causal = False
    attention(both_ways, *half, None)
    assert len(asked) == 5
    assert asked[1]["dropout"] == 0.1 and asked[2]["softcap"] == 30.0 and asked[3]["is_causal"] is False


def test_rows_go_there_and_back():
    lengths = [2, 4, 1]
    rows = Ragged.of(lengths, "cpu")
    x = torch.randn(1, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    padded = rows.pad(x)
    assert padded.shape == (3, 3, 4, 5) and rows.shape == (3, 4)
    for r, (start, length) in enumerate(zip((0, 2, 6), lengths)):
        assert torch.equal(padded[r, :, :length], x[0, :, start : start + length])
    assert torch.equal(rows.unpad(padded.transpose(1, 2)), x.transpose(1, 2))
    torch.autograd.gradcheck(lambda x: rows.unpad(rows.pad(x).transpose(1, 2)), x)
    full = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Ragged.of([3, 3], "cpu").unpad, full)


@pytest.mark.statement("packed-apart")
def test_rows_go_there_and_back_with_what_they_begin_with_once():
    rows = Ragged.of([3, 5, 4], "cpu", shared=2)  # 0 1 2, 0 1 3 4 5, 0 1 6 7
    x = torch.randn(1, 3, 8, 5, dtype=torch.float64, requires_grad=True)
    padded = rows.pad(x)
    for r, tokens in enumerate([[0, 1, 2], [0, 1, 3, 4, 5], [0, 1, 6, 7]]):
        assert torch.equal(padded[r, :, : len(tokens)], x[0, :, tokens])
    assert torch.equal(rows.unpad(padded.transpose(1, 2)), x.transpose(1, 2))
    real = torch.arange(5) < torch.tensor([3, 5, 4])[:, None]  # padding holds any token, and gives it no gradient
    torch.autograd.gradcheck(lambda x: rows.pad(x) * real[:, None, :, None], x)
    torch.autograd.gradcheck(lambda x: rows.unpad(rows.pad(x).transpose(1, 2).cumsum(1)), x)
    half = torch.ones(1, 1, 8, 1, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16)[:, None, None, None]
    (rows.pad(half) * weights).sum().backward()
    assert half.grad[0, 0, 0, 0] == 258  # in bfloat16, 256 + 1 is 256


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.statement("packed-apart")
def test_a_model_reads_rows_end_to_end_as_it_reads_them_padded(tiny, name, checkpointing):
    lengths = [5, 2, 4]
    ids = [torch.arange(5, 5 + n) for n in lengths]
    model = use_matmul_attention(tiny(name).double())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    seen = torch.zeros(3, 1, 5, 5, dtype=torch.bool)
    for r, n in enumerate(lengths):
        seen[r, 0, :n, :n] = True
    seen = (seen | torch.eye(5, dtype=torch.bool)).tril()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    states = hidden_states(model, torch.cat(ids)[None], seen, positions, rows=Ragged.of(lengths, "cpu"))[0]
    states.square().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    alone = copy.deepcopy(model)
    alone.zero_grad()
    each = [hidden_states(alone, x[None])[0] for x in ids]
    torch.cat(each).square().sum().backward()
    assert (states - torch.cat(each)).abs().max() < 1e-12
    expected = {key: p.grad for key, p in alone.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= 1e-11 * max(1.0, expected[key].abs().max()), key


def test_a_loaded_model_attends_here_and_a_saved_one_is_anybodys(tmp_path):
    model = load_model("tiny-llama", dtype=torch.float32)
    assert takes_ragged(model) and model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.statement("packed-apart")
def test_rows_padded_to_a_multiple_give_the_same_log_probs_and_gradients(tiny, monkeypatch, name):
    model, found = use_matmul_attention(tiny(name)), []
    prompts, completions = [[5, 6, 7], [5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14], [15]]
    for aligned in (1, 16):
        monkeypatch.setitem(ALIGNED, "cpu", aligned)
        packed = pack(prompts, completions, 2, "cpu")
        assert packed.attention_mask.shape == (2, 1, *[8 if aligned == 1 else 16] * 2)
        model.zero_grad()
        logprobs = packed_logprobs(model, packed)
        logprobs.square().sum().backward()
        found.append([logprobs, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12


def test_under_a_mask_a_gpu_attends_without_cudnn(monkeypatch):
    seen = []

    def kernel(*args, **kwargs):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))
        return None, None

    monkeypatch.setattr(module, "sdpa_attention_forward", kernel)
    single, mask = inputs(torch.float32), torch.ones(1, 1, T, T, dtype=torch.bool)
    for kinds in (("cuda",), ("cpu",)):
        monkeypatch.setattr(module, "HAS_CUDNN", kinds)
        attention(None, *single, mask)
        attention(None, *single, None)
    assert seen == [(True, True), (True, True), (False, True), (True, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled()
