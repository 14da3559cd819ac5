"""Packing: rows do not see each other, nothing is lost silently, and what counts is what the assistant says."""

import numpy as np
import pytest
import torch

from configs.config import UserError
from data.blocks import make_blocks, text_sample
from models import scratch, tokens
from models.fast.head import hidden_states
from models.loader import load_model, load_tokenizer
from models.scratch import build_scratch, train_tokenizer
from models.tokens import completion_ids, prompt_ids, text_pieces
from train.common import lm_loss
from train.updates import make_optimizer

ROWS = [{"prompt": f"Count to {n}", "completion": " ".join(map(str, range(n)))} for n in (3, 5, 4, 2)]
NAMES = ("tiny-llama", "tiny-gpt2")


def pieces(blocks, row):
    """Where the samples of a block begin and end, padding left out."""
    starts = [i for i, p in enumerate(blocks.position_ids[row].tolist()) if p == 0 and i < blocks.tokens[row]]
    return list(zip(starts, [*starts[1:], int(blocks.tokens[row])]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.statement("packed-apart")
def test_a_packed_sample_has_the_logits_it_has_alone(name):
    model, tokenizer = load_model(name, dtype=torch.float64, device="cpu"), load_tokenizer(name)
    blocks = make_blocks(ROWS, "prompt", tokenizer, 256, "test")
    assert len(blocks) == 1 and len(pieces(blocks, 0)) == 4
    batch = blocks.batch([0], "cpu")
    packed = hidden_states(model, batch["input_ids"], position_ids=batch["position_ids"])
    for start, end in pieces(blocks, 0):
        alone = hidden_states(model, batch["input_ids"][:, start:end])
        assert (packed[:, start:end] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.statement("packed-apart")
def test_the_loss_of_one_sample_has_no_gradient_with_respect_to_another(name):
    model, tokenizer = load_model(name, dtype=torch.float64, device="cpu"), load_tokenizer(name)
    blocks = make_blocks(ROWS, "prompt", tokenizer, 256, "test")
    batch = blocks.batch([0], "cpu")
    (_, _), (start, end), *_ = pieces(blocks, 0)
    batch["mask"][:, : start - 1] = False
    batch["mask"][:, end - 1 :] = False
    lm_loss(model, batch)  # the check of the model's packing runs once, before the hook is there
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    model.get_input_embeddings().register_forward_hook(keep)
    lm_loss(model, batch)[0].backward()
    size = kept[0].grad.abs().sum(-1)[0]
    assert (size[start : end - 1] > 0).all()
    assert size[:start].sum() == 0 and size[end:].sum() == 0


@pytest.mark.statement("packed-apart")
def test_positions_restart_and_text_repeats_one_token_of_context():
    tokenizer = load_tokenizer("tiny-llama")
    blocks = make_blocks([{"text": "abcdefghij"}, {"text": "xy"}], "text", tokenizer, 8, "test")
    ids = {c: tokenizer(c).input_ids[0] for c in "abcdefghijxy"}
    eos = tokenizer.eos_token_id
    # 11 tokens: a-h, then h again as context for i j eos; then x y eos, and one token of padding
    assert blocks.input_ids.tolist() == [
        [ids[c] for c in "abcdefgh"],
        [*(ids[c] for c in "hij"), eos, *(ids[c] for c in "xy"), eos, eos],
    ]
    assert blocks.position_ids.tolist() == [list(range(8)), [0, 1, 2, 3, 0, 1, 2, 0]]
    assert blocks.mask.int().tolist() == [[1] * 7, [1, 1, 1, 0, 1, 1, 0]]
    assert blocks.bytes.tolist() == [7, 3] and blocks.tokens.tolist() == [8, 7]


def test_bytes_are_those_of_the_text_also_where_a_character_is_several_tokens():
    sample = text_sample(load_tokenizer("tiny-llama"), "é—𝄞x")
    assert len(sample) == 2 + 3 + 4 + 1 + 1 and sample.bytes.sum() == 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["prompt", "messages"])
@pytest.mark.statement("eos-is-target")
def test_only_the_completion_counts_and_the_stop_token_with_it(name, kind):
    tokenizer = load_tokenizer(name)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # masks go by length
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"messages": chat} if kind == "messages" else {"prompt": "Hi", "completion": "Hello"}
    blocks = make_blocks([row], kind, tokenizer, 96, "test")
    p = prompt_ids(tokenizer, chat[:1] if kind == "messages" else "Hi")
    c = completion_ids(tokenizer, "Hello")
    assert c[-1] == tokenizer.eos_token_id
    assert blocks.input_ids[0, : len(p + c)].tolist() == p + c
    counted = blocks.input_ids[0, 1:][blocks.mask[0]].tolist()
    assert counted == c
    assert blocks.bytes.tolist() == [5]


def test_each_message_of_the_assistant_is_learnt_once_after_what_stood_before_it():
    tokenizer = load_tokenizer("tiny-llama")
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))
    ]
    blocks = make_blocks([{"messages": chat}], "messages", tokenizer, 128, "test")
    counted = blocks.input_ids[0, 1:][blocks.mask[0]].tolist()
    assert sorted([counted[:3], counted[3:]]) == sorted([completion_ids(tokenizer, x) for x in ("bb", "dd")])


@pytest.mark.statement("truncation")
def test_rows_cut_or_dropped_are_counted_and_a_completion_is_never_cut(capsys):
    tokenizer = load_tokenizer("tiny-gpt2")  # one id a byte, no template
    rows = [{"prompt": "p" * 20 + "0123456789", "completion": "short"}, {"prompt": "p", "completion": "c" * 40}]
    blocks = make_blocks(rows, "prompt", tokenizer, 16, "rows")
    assert "1 dropped as too long, 1 prompts cut" in " ".join(capsys.readouterr().out.split())
    assert tokenizer.decode(blocks.input_ids[0].tolist()) == "0123456789short<|endoftext|>"
    assert blocks.mask[0].sum() == 6
    with pytest.raises(UserError, match="rows: nothing is left: 1 completions are longer than max_length = 16, and 0 "):
        make_blocks(rows[1:], "prompt", tokenizer, 16, "rows")


@pytest.mark.statement("empty-completion")
def test_a_row_that_would_teach_nothing_is_an_error_that_names_it():
    with pytest.raises(UserError, match="rows, document 2: a completion is empty"):
        make_blocks([ROWS[0], {"prompt": "p", "completion": ""}], "prompt", load_tokenizer("tiny-llama"), 64, "rows")


@pytest.mark.parametrize("name", NAMES)  # with a chat template and without one
@pytest.mark.statement("stop-token")
def test_a_model_overfitted_on_four_rows_stops_by_itself(name):
    from models.generation import generate

    tokenizer = load_tokenizer(name)
    model = load_model(name, device="cpu").train()
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "one"), ("b", "two"), ("c", "six"), ("d", "ten"))]
    batch = make_blocks(rows, "prompt", tokenizer, 256, "rows").batch([0], "cpu")
    optimizer = make_optimizer(model.parameters(), 1e-2)
    for _ in range(120):
        nats, count = lm_loss(model, batch)
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [prompt_ids(tokenizer, row["prompt"]) for row in rows]
    found = generate(model, prompts, 12, temperature=0, stop_ids=(tokenizer.eos_token_id,))
    assert found.finish_reasons == ["stop"] * 4
    assert found.completions == [completion_ids(tokenizer, row["completion"]) for row in rows]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_from_scratch_has_its_own_tokenizer_and_the_loss_of_a_uniform_guess(architecture):
    documents = [{"text": "the cat sat on the mat, the dog sat on the log. " * 20}]
    tokenizer = train_tokenizer(documents, 270)
    assert len(tokenizer) == 270
    text = "naïve — 漢字 \x00 the"
    assert tokenizer.decode(tokenizer(text).input_ids) == text  # any text, seen or not
    model = build_scratch(architecture, 2, 32, 4, 64, tokenizer, seed=1)
    blocks = make_blocks(documents, "text", tokenizer, 64, "test")
    nats, count = lm_loss(model, blocks.batch(list(range(len(blocks))), "cpu"))
    assert nats.item() / count.item() == pytest.approx(np.log(270), abs=0.2)
    again = build_scratch(architecture, 2, 32, 4, 64, tokenizer, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.statement("text-in-pieces")
def test_a_tokenizer_learns_from_pieces_what_it_learns_from_the_whole(monkeypatch):
    whole = train_tokenizer([{"text": LONG}], 500)
    monkeypatch.setattr(scratch, "PIECE", 100)
    assert len(list(scratch._at_words(LONG))) > 50 and "".join(scratch._at_words(LONG)) == LONG
    assert train_tokenizer([{"text": LONG}], 500).backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()


def test_a_vocabulary_that_the_corpus_cannot_fill_is_an_error():
    with pytest.raises(UserError, match="scratch_vocab = 5000: the corpus has pairs for"):
        train_tokenizer([{"text": "aaaa bbbb"}], 5000)


def trained(kind):
    """A small tokenizer of another kind than the models': what a cut changes is different in each."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["[UNK]", "[CLS]", "[SEP]"]
    model, trainer, options = {
        "words": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, {}),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, {"unk_token": "[UNK]"}),
        "one word": (models.BPE(unk_token="[UNK]", byte_fallback=True), trainers.BpeTrainer, {}),
    }[kind]
    tokenizer = Tokenizer(model)
    if kind == "words":
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "unigram":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:  # as Llama 2: no word ends before the text does
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainer(vocab_size=400, special_tokens=specials, show_progress=False, **options)
    tokenizer.train_from_iterator([LONG[i : i + 40] for i in range(0, len(LONG), 40)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(x, tokenizer.token_to_id(x)) for x in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", pad_token="[SEP]")


def long_text():
    rng = np.random.default_rng(0)
    parts = ["the ", "cat's", " sat", "\n", "\n\n", "  ", "1234", " — ", "漢字", "é", "🙂🙂", "WORD", "...", "\t", "zz"]
    return "".join(rng.choice(parts, 3000)) + " " * 300 + "aaaaa" * 100 + "".join(rng.choice(parts, 1000)) + "end"


LONG = long_text()
KINDS = ("words", "unigram", "one word")
SMOLLM2 = pytest.param("smollm2-135m", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [*NAMES, SMOLLM2, "words", "unigram", "one word"])
@pytest.mark.parametrize("piece, overlap", [(1 << 9, 1 << 7), (1 << 10, 1 << 5), (64, 32)])
@pytest.mark.statement("text-in-pieces")
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, name, piece, overlap):
    tokenizer = trained(name) if name in KINDS else load_tokenizer(name)
    whole = tokenizer(LONG, return_offsets_mapping=True, return_special_tokens_mask=True)
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "OVERLAP", overlap)
    pieces = list(text_pieces(tokenizer, LONG))
    assert len(pieces) > 5  # it was cut
    assert [i for ids, _ in pieces for i in ids.tolist()] == whole.input_ids
    spans = [tuple(span) for _, spans in pieces for span in spans.tolist()]
    texts = [i for i, special in enumerate(whole.special_tokens_mask) if not special]
    assert [spans[i] for i in texts] == [whole.offset_mapping[i] for i in texts]
    sample = text_sample(tokenizer, LONG)
    end = [] if whole.input_ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
    assert sample.ids.tolist() == whole.input_ids + end
    if name not in KINDS:  # these leave nothing of a text out
        assert sample.bytes.sum() == len(LONG.encode())


@pytest.mark.statement("text-in-pieces")
def test_where_pieces_never_agree_the_rest_is_tokenised_at_once(monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letters: i for i, letters in enumerate(("a", "aa", "aaa", "b"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a"), ("aa", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="b", pad_token="b")
    monkeypatch.setattr(tokens, "PIECE", 100)
    monkeypatch.setattr(tokens, "OVERLAP", 31)  # pieces of aaa begin one letter off
    text = "b" * 150 + "a" * 1001
    assert text_sample(tokenizer, text).ids.tolist()[:-1] == tokenizer(text).input_ids


@pytest.mark.statement("text-in-pieces")
def test_no_piece_is_longer_than_it_must_be():
    tokenizer, seen = load_tokenizer("tiny-llama"), []

    class Watched:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            seen.append(len(text))
            return tokenizer(text, **options)

        __hash__ = object.__hash__

    text = LONG * 40
    sample = text_sample(Watched(), text)
    assert len(text) > 5 * tokens.PIECE and max(seen) <= tokens.PIECE + tokens.OVERLAP
    assert sum(seen) < 1.2 * len(text)
    assert sample.ids.dtype == sample.bytes.dtype == np.int32 and sample.bytes.sum() == len(text.encode())
