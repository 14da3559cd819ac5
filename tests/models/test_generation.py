"""The sampler against transformers' own generate, against forward passes, and against probabilities."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import generation
from models.fast.decoder import decoder_for
from models.fast.layers import use_memory_efficient_layers
from models.generation import BLOCK, _moved, _moves, generate, inverse_cdf, tempered_logprobs

ALL = pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "decoder"])
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15]]


@pytest.fixture
def tiny(tiny):
    """The models of conftest.py, and under the name "decoder" one that models/fast/decoder.py takes."""

    def build(name="tiny-llama", **changes):
        if name != "decoder":
            return tiny(name, **changes)
        model = use_memory_efficient_layers(tiny(**changes))
        assert decoder_for(model)
        return model

    return build


@ALL
@pytest.mark.statement("left-padding")
def test_greedy_equals_transformers_on_a_padded_batch(tiny, name):
    model = tiny(name)
    found = generate(model, PROMPTS, 10, temperature=0)
    for prompt, mine in zip(PROMPTS, found.completions):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert mine == theirs[0, len(prompt) :].tolist()


@ALL
@pytest.mark.statement("left-padding")
def test_a_row_gets_in_a_batch_what_it_gets_alone(tiny, name):
    model = tiny(name)
    numbers = torch.rand(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = generate(model, PROMPTS, 8, samples_per_prompt=3, stop_ids=range(4), uniforms=numbers)
    small = generate(model, PROMPTS, 8, samples_per_prompt=3, stop_ids=range(4), uniforms=numbers, batch_size=2)
    alone = [generate(model, [PROMPTS[i // 3]], 8, stop_ids=range(4), uniforms=numbers[i : i + 1]) for i in range(12)]
    assert together.completions == small.completions == [g.completions[0] for g in alone]
    assert together.finish_reasons == [g.finish_reasons[0] for g in alone]
    assert {"stop", "length"} == set(together.finish_reasons)  # rows left the batch at different steps
    for a, b in zip(together.logprobs, alone):
        assert a == pytest.approx(b.logprobs[0], abs=1e-6)


class Products(TorchDispatchMode):
    """Remembers the numbers in the largest operand of any batched matrix product, repeated ones counted."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.bmm.default:
            self.largest = max(self.largest, *(x.numel() for x in args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_is_not_repeated_for_each_row(tiny, frozen):
    model = tiny(vocab_size=4096).requires_grad_(not frozen)
    with Products() as products:
        generate(model, [[i, 5, 6] for i in range(40)], 2, temperature=0, batch_size=40)
    assert 0 < products.largest < model.get_output_embeddings().weight.numel()


def test_rows_that_stay_close_up_whichever_leave():
    for pattern in itertools.product([False, True], repeat=6):
        done = [b for b, leaves in enumerate(pattern) if leaves]
        holes, movers, count = _moves(6, done)
        left = _moved(torch.arange(6), holes, movers, count).tolist()
        assert sorted(left) == [b for b in range(6) if b not in done]
        assert len(movers) <= len(done)  # what is copied is no more than what leaves


@ALL
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6)])
@pytest.mark.statement("sampler-logprobs")
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(tiny, name, temperature, top_k, top_p):
    model = tiny(name)
    g = generate(model, PROMPTS, 6, temperature, top_k, top_p, samples_per_prompt=2, seed=0)
    for i, (completion, logprobs) in enumerate(zip(g.completions, g.logprobs)):
        prompt = PROMPTS[i // 2]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = tempered_logprobs(logits, temperature, top_k, top_p).gather(-1, torch.tensor(completion)[:, None])
        assert logprobs == pytest.approx(expected[:, 0].tolist(), abs=1e-5)


@ALL
@pytest.mark.parametrize("tails", [[[1], [2, 3], [4, 5, 6]], [[1], [], [1, 2]], [[], []]])
def test_prompts_that_begin_alike_get_what_they_get_alone(tiny, name, tails):
    model = tiny(name)
    prompts = [[7, 8, 9, 10, *tail] for tail in tails]
    together = generate(model, prompts, 8, temperature=0)
    alone = [generate(model, [p], 8, temperature=0) for p in prompts]
    assert together.completions == [g.completions[0] for g in alone]
    for a, b in zip(together.logprobs, alone):
        assert a == pytest.approx(b.logprobs[0], abs=1e-6)


def test_frequencies_of_first_tokens_follow_the_probabilities(tiny):
    model = tiny(vocab_size=6)
    g = generate(model, [[3, 4]], 1, samples_per_prompt=20_000, seed=0, batch_size=5000)
    counts = torch.bincount(torch.tensor([c[0] for c in g.completions]), minlength=6) / 20_000
    p = model(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
    assert (counts - p).abs().max() < 4 * 0.5 / math.sqrt(20_000)


@pytest.mark.parametrize("vocabulary", [6, BLOCK, 3 * BLOCK, 3 * BLOCK + 7])
@pytest.mark.statement("sampler-logprobs")
def test_the_token_of_a_uniform_number_is_where_the_running_sum_passes_it(vocabulary):
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(400, vocabulary, generator=generator, dtype=torch.float64)
    p[torch.rand(p.shape, generator=generator) < 0.5] = 0
    p[:, vocabulary // 3] += 0.1
    p[:2] = 0
    p[0, -1], p[1, vocabulary // 2] = 1e-300, 2.0  # one token alone has probability
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[2], uniform[3] = 0.0, 1.0  # 1: what rounds to it
    found = inverse_cdf(p, uniform)
    for row, u, token in zip(p, uniform, found.tolist()):
        sums = list(itertools.accumulate(row.tolist()))
        above = [t for t, x in enumerate(sums) if x > u * sums[-1]]
        assert token == (above[0] if above else row.nonzero()[-1].item())
    assert (inverse_cdf(p.float(), uniform) == found).float().mean() > 0.99


def test_top_k_and_top_p_on_worked_numbers():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert tempered_logprobs(logits, top_k=2).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    # 0.5 < 0.7 <= 0.5 + 0.3: the smallest set that reaches 0.7 is the first two
    assert tempered_logprobs(logits, top_p=0.7).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert tempered_logprobs(logits, top_p=0.5).exp()[0].tolist() == pytest.approx([1, 0, 0, 0])
    # temperature 0.5 squares: 0.25, 0.09, 0.0225, 0.0025 over 0.365
    assert tempered_logprobs(logits, 0.5).exp()[0, 0].item() == pytest.approx(0.25 / 0.365)


def test_the_stop_id_is_kept_and_ends_the_completion(tiny):
    g = generate(tiny(vocab_size=4), [[3]] * 20, 30, stop_ids=[2], seed=0)
    for completion, reason, logprobs in zip(g.completions, g.finish_reasons, g.logprobs):
        assert len(completion) == len(logprobs)
        assert (reason == "stop") == (completion[-1] == 2) and 2 not in completion[:-1]
        assert reason == "stop" or len(completion) == 30


def test_same_seed_same_completions_and_training_mode_is_kept(tiny):
    model = tiny().train()
    first, second, other = (generate(model, PROMPTS, 5, seed=s).completions for s in (0, 0, 1))
    assert first == second != other and model.training
    assert model.config._attn_implementation == "sdpa"


def test_tokens_stream_as_they_come(tiny):
    seen = []
    g = generate(tiny(), [[5, 6]], 5, seed=0, on_token=lambda row, token: seen.append((row, token)))
    assert seen == [(0, t) for t in g.completions[0]]


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5] * 510], {}, "does not fit into the model's context of 512"),
        ([[5]], {"temperature": -1}, "temperature = -1"),
        ([[5]], {"top_p": 0}, "top_p = 0"),
    ],
)
def test_bad_input_is_named(tiny, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, 8, **options)


@pytest.mark.slow
@pytest.mark.statement("left-padding")
def test_greedy_equals_transformers_with_smollm2_on_a_padded_batch_of_real_prompts():
    from models.loader import load_model, load_tokenizer
    from models.tokens import prompt_ids

    model, tokenizer = load_model("smollm2-135m", device="cpu"), load_tokenizer("smollm2-135m")
    texts = ["What is the capital of France?", "Hi", "Name three colours. Write only in lowercase letters.", "2 + 2 ="]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Describe honey bees to a child."}]
    ids = [prompt_ids(tokenizer, t) for t in (*texts, talk)]
    assert len({len(row) for row in ids}) > 3
    found = generate(model, ids, 16, temperature=0, stop_ids=[tokenizer.eos_token_id])
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    theirs = model.generate(padded, attention_mask=mask, max_new_tokens=16, do_sample=False)[:, width:].tolist()
    for mine, row in zip(found.completions, theirs):
        assert mine == row[: len(mine)]
        assert len(mine) == 16 or mine[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(found.completions[0])


@pytest.fixture
def batches(monkeypatch):
    """The batches that were sampled from, in order."""
    found, sample = [], generation._sample

    def watched(batch, *rest):
        found.append(batch)
        return sample(batch, *rest)

    monkeypatch.setattr(generation, "_sample", watched)
    return found


@ALL
@pytest.mark.statement("cost-follows-work")
def test_a_cache_that_grows_gives_what_one_of_full_size_gives(tiny, name, monkeypatch, batches):
    model, options = tiny(name), {"samples_per_prompt": 3, "stop_ids": range(4), "seed": 3}
    whole = generate(model, PROMPTS, 40, **options)
    assert batches[0].seen.shape[1] == 5 + 40
    monkeypatch.setattr(generation, "ROOM", 7)
    grown = generate(model, PROMPTS, 40, **options)
    assert batches[1].seen.shape[1] == batches[1].cache.layers[0].keys.shape[2] == 5 + 40  # in the end, by six steps
    assert grown.completions == whole.completions and {"stop", "length"} == set(grown.finish_reasons)
    for a, b in zip(grown.logprobs, whole.logprobs):
        assert a == pytest.approx(b, abs=1e-6)


@ALL
@pytest.mark.statement("cost-follows-work")
def test_a_short_completion_takes_no_memory_for_a_long_limit(tiny, name, batches):
    model = tiny(name)
    drawn = generate(model, PROMPTS, 4, temperature=0).completions
    short = generate(model, PROMPTS, 400, temperature=0, stop_ids=[completion[-1] for completion in drawn])
    assert max(map(len, short.completions)) <= 4
    assert batches[1].cache.layers[0].values.shape[2] == 5 + generation.ROOM < 400
    assert short.completions == [c[: len(s)] for c, s in zip(drawn, short.completions)]
