"""Every number is that of the plain forward pass of transformers, one sequence at a time, for every kind of model."""

import json
import time

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from configs.config import UserError
from models.admission import Admitted, admit, admitted, apart, known_as, record, window_of
from models.fast.attention import takes_ragged, use_matmul_attention, windowed
from models.fast.layers import use_memory_efficient_layers
from models.generation import generate
from rlhf.packing import pack
from rlhf.utils import packed_logprobs
from runtime.provenance import provenance
from train.common import lm_loss

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
IDS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
SMALL = {"vocab_size": 64, "hidden_size": 32, "max_position_embeddings": 128}
KINDS = {  # name: (model_type, shape); a window of 8, or a short one of 4, is shorter than the rows below
    "llama": ("llama", SHAPE),
    "mistral, window": ("mistral", {**SHAPE, "sliding_window": 8}),
    "gemma3, windows in some layers": ("gemma3_text", {**SHAPE, "head_dim": 8, "sliding_window": 8,
        "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2, learned positions": ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 128}),
    "gpt_neo, eager": ("gpt_neo", {**SMALL, "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]]}),
    "gpt_neo, short window": ("gpt_neo", {**SMALL, "num_layers": 2, "num_heads": 4, "window_size": 4,
        "attention_types": [[["global", "local"], 1]]}),
    "opt, ignores positions": ("opt", {**SMALL, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
        "word_embed_proj_dim": 32}),
    "bloom, alibi": ("bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "granite, scaled logits": ("granite", {**SHAPE, "logits_scaling": 4.0}),
    "mixtral, experts": ("mixtral", {**SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None}),
    "lfm2, recurrent": ("lfm2", {**SHAPE, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8,
        "conv_L_cache": 3}),
    "qwen3_5, recurrent": ("qwen3_5_text", {**SHAPE, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"]}),
}  # fmt: skip
SLOWER = {  # the kinds for which a fast way is wrong, and what is slower for them
    "gpt_neo, eager": {"completions", "decoding"},
    "gpt_neo, short window": {"completions", "decoding"},  # only the first 3 tokens of a completion see the prompt
    "opt, ignores positions": {"samples"},
    "bloom, alibi": {"samples", "completions", "decoding"},
    "lfm2, recurrent": {"samples", "completions", "decoding"},
    "qwen3_5, recurrent": {"samples", "completions", "decoding"},
}
EVERY = pytest.mark.parametrize("name", KINDS)
PROMPTS = [[(7 * i) % 57 + 3 for i in range(20)], [11, 30, 8, 45, 23], [50, 9, 33, 4, 17, 29, 41, 12, 6]]
COMPLETIONS = [[(5 * i) % 53 + 4 for i in range(14)], [6, 44, 21, 9, 13, 2], [18, 55, 7]]


@pytest.fixture(scope="module")
def model():
    """name of a kind -> a random model of it, as `load_model` would give it."""
    built = {}

    def build(name):
        if name not in built:
            kind, shape = KINDS[name]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape, **IDS), dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for p in model.parameters():
                    if p.dim() >= 2:  # large enough for attention to look somewhere
                        p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if min(p.shape) > 8 else 0.1))
            built[name] = use_matmul_attention(use_memory_efficient_layers(model))
        return built[name]

    return build


@torch.no_grad()
def plain(model, prompt, completion):
    """Log-probs of a completion by the plain forward pass, with the attention of transformers."""
    ours = takes_ragged(model)
    if ours:
        model.set_attn_implementation("sdpa")
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    if ours:
        use_matmul_attention(model)
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@EVERY
@pytest.mark.statement("packed-apart")
def test_packed_samples_have_the_loss_that_they_have_alone(model, name):
    rows = [p + c for p, c in zip(PROMPTS, COMPLETIONS)]
    ids = torch.tensor([[t for row in rows for t in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    mask = torch.ones_like(ids, dtype=torch.bool)[:, 1:]
    for end in (len(rows[0]), len(rows[0]) + len(rows[1])):
        mask[0, end - 1] = False  # the first token of a sample is nobody's target
    with torch.no_grad():
        nats, tokens = lm_loss(model(name), {"input_ids": ids, "position_ids": positions, "mask": mask})
    expected = -sum(plain(model(name), row[:1], row[1:]).sum() for row in rows)
    assert tokens == sum(map(len, rows)) - 3
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=0)


@EVERY
@pytest.mark.statement("packed-apart")
def test_completions_that_share_a_prompt_have_the_log_probs_that_they_have_alone(model, name):
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    completions = [*COMPLETIONS, COMPLETIONS[1]]
    with torch.no_grad():
        found = packed_logprobs(model(name), pack(prompts, completions, 2, "cpu"))
    for row, prompt, completion in zip(found, prompts, completions):
        expected = plain(model(name), prompt, completion)
        torch.testing.assert_close(row[: len(completion)], expected, rtol=0, atol=3e-5)
    packed = pack(prompts, completions, 2, "cpu")
    gradients = []
    for loss in (packed_logprobs(model(name), packed).sum(), None):
        model(name).zero_grad()
        if loss is None:
            loss = sum(plain.__wrapped__(model(name), p, c).sum() for p, c in zip(prompts, completions))
        loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model(name).parameters() if p.grad is not None]))
    assert apart([gradients[0]], [gradients[1]]) < 1e-3 and gradients[1].abs().max() > 0


@EVERY
@pytest.mark.statement("left-padding")
def test_prompts_of_different_lengths_decode_as_each_alone(model, name):
    found = generate(model(name), PROMPTS, 12, temperature=0)
    assert len({len(p) for p in PROMPTS}) == 3
    for prompt, ids, logprobs in zip(PROMPTS, found.completions, found.logprobs):
        expected = plain(model(name), prompt, ids)
        torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=2e-4)
        for i, token in enumerate(ids):
            logits = model(name)(input_ids=torch.tensor([prompt + ids[:i]]), use_cache=False).logits[0, -1]
            assert logits.argmax() == token


@EVERY
def test_a_slower_way_is_taken_where_the_fast_one_is_wrong_and_nowhere_else(model, name):
    ids = torch.tensor([PROMPTS[0]])
    positions = torch.arange(20)[None]
    with torch.no_grad():
        lm_loss(model(name), {"input_ids": ids, "position_ids": positions, "mask": torch.ones(1, 19).bool()})
        packed_logprobs(model(name), pack(PROMPTS, COMPLETIONS, 2, "cpu"))
    generate(model(name), PROMPTS, 4, temperature=0)
    slower = {found["kind"].split()[0] for found in admitted(model(name)) if found["differed"]}
    assert slower == SLOWER.get(name, set())
    window = window_of(model(name))
    assert window == (4 if "short" in name else 8 if "window" in name or "gpt_neo" in name else None)
    assert window is None or window < len(PROMPTS[0])


def test_a_kind_of_work_for_which_no_way_is_right_is_refused_by_name(model):
    def check(way, lengths):
        if way == "one":
            raise RuntimeError("sizes do not match")
        return [torch.ones(9)], [torch.full((9,), 1.5)]

    with pytest.raises(
        UserError, match="LlamaForCausalLM: washing up cannot be computed.*one: inf; two: 3.3e-01.*sizes"
    ):
        admit(model("llama"), "washing up", ["one", "two"], check, 20)


def test_a_window_counts_the_tokens_that_are_seen_wherever_they_stand():
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]).bool()
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
    ).bool()
    assert torch.equal(windowed(seen[None, None], 2)[0, 0], expected)  # a prompt of two, completions of one and two
    added = torch.zeros(1, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min / 2)
    assert torch.equal(windowed(added, 2)[0, 0] == 0, expected)
    assert torch.equal(windowed(windowed(seen[None, None], 2), 2)[0, 0], expected)


@pytest.mark.statement("architectures")
def test_the_next_manifest_has_each_check_since_the_last_one_by_the_name_of_its_model(model):
    provenance(0.0)  # forgets the checks of other tests
    known_as(model("llama"), "reference")
    record(model("llama"), Admitted("washing up", "by hand", 0.25, {"a machine": float("inf")}, 1.23456))
    record(model("granite, scaled logits"), Admitted("drying", "a towel", 0.0, {}, 0.5), beyond=True)
    text = json.dumps(provenance(60.0)["admission"], allow_nan=False)  # infinity would be no JSON
    first, second = json.loads(text)
    assert first == {
        "model": "reference", "name": "this model", "kind": "washing up", "way": "by hand", "deviation": 0.25,
        "differed": {"a machine": None}, "seconds": 1.235, "beyond_window": False,
    }  # fmt: skip
    assert (second["model"], second["kind"], second["beyond_window"]) == ("model", "drying", True)
    assert provenance(60.0)["admission"] == []  # another run in this process has its own checks alone
    record(model("llama"), Admitted("of a run that failed", "any", 0.0, {}, 0.0))
    time.sleep(0.1)
    assert provenance(0.05)["admission"] == []


def test_a_check_is_recorded_once_however_often_its_model_is_used():
    torch.manual_seed(0)
    kind, shape = KINDS["bloom, alibi"]
    bloom = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape, **IDS), dtype=torch.float32).eval()
    provenance(0.0)
    for _ in range(2):
        generate(bloom, PROMPTS, 2, temperature=0)
    [found] = provenance(60.0)["admission"]
    assert (found["kind"], found["way"]) == ("decoding", "prompts of one length together")
    assert list(found["differed"]) == ["in left-padded batches"] and found["deviation"] < 2e-4
