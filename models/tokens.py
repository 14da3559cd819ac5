"""Prompts and completions to token ids and back. Only this file renders a chat template."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError, meta
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from configs.config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTIONS = "chat_template_kwargs"  # the name that transformers and TRL give the options of a chat template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """The token ids of a prompt. Training, rollouts, evaluation and inference all use this function.

    prompt: a list of chat messages, or a plain text. With a chat template, a text is one user message. Without a
    template (GPT-2), a text is encoded unchanged, and messages are joined as `role: content` lines.
    Without a template, the ids begin with exactly one BOS if the tokenizer adds one.
    Raises UserError for a prompt of the wrong form.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in prompt)
    ):
        messages = prompt
    else:
        raise UserError(f"a prompt must be text or a list of {{role, content}} messages, not {str(prompt)[:80]!r}")
    for message in messages:
        _encodable(message["content"])
    if tokenizer.chat_template:
        try:
            text = render(tokenizer, messages, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template of the tokenizer does not take this prompt: {error}") from None
    elif isinstance(prompt, str):
        text = prompt
    else:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and not tokenizer.chat_template and _adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    return readable(tokenizer, ids)


def render(tokenizer: Any, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """Messages as the text that the chat template makes of them, with the options of `use_template_options`."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **used_options(tokenizer)
    )


def used_options(tokenizer: Any) -> dict:
    """The options of the chat template with which the prompts of a tokenizer are rendered."""
    return tokenizer.init_kwargs.get(OPTIONS) or {}


def use_template_options(tokenizer: Any, given: dict | None, name: str | Path) -> None:
    """Render all prompts with these options of the chat template, such as {"enable_thinking": False} of Qwen3.

    They are saved with the tokenizer (in tokenizer_config.json, where transformers leaves them alone), so that later
    stages render the same prompts. An option in `given` wins over a saved one. name: of the model, for messages.
    Raises UserError for a tokenizer without a chat template, and for an option that the template does not use.
    """
    saved = used_options(tokenizer)
    if not isinstance(saved, dict):
        raise UserError(f"the tokenizer of {name}: {OPTIONS} = {saved!r} is no mapping")
    wanted = {**saved, **(given or {})}
    if not wanted:
        return
    if not tokenizer.chat_template:
        raise UserError(f"{OPTIONS} = {wanted}: the tokenizer of {name} has no chat template")
    known = template_options(tokenizer)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise UserError(
            f"{OPTIONS}: the chat template of {name} does not use {', '.join(unknown)}; "
            f"its options are: {', '.join(known) or 'none'}"
        )
    tokenizer.init_kwargs[OPTIONS] = wanted
    _ends.pop(tokenizer, None)


def template_options(tokenizer: Any) -> list[str]:
    """The names that the chat template reads and that neither it nor its renderer sets, sorted.

    Raises UserError for a template that is no Jinja.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        names = meta.find_undeclared_variables(environment.parse(tokenizer.get_chat_template()))
    except (TemplateError, ValueError) as error:
        raise UserError(f"the chat template of the tokenizer cannot be read: {error}") from None
    of_renderer = {"messages", "raise_exception", "strftime_now", *tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    of_renderer |= {*inspect.signature(tokenizer.apply_chat_template).parameters, *environment.globals}
    return sorted(names - of_renderer)


class _Generation(Extension):
    """The tag {% generation %} of transformers around what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id with which the chat template ends a message of the assistant; without one, or a template, eos.

    It is the target after a completion: a model that learns another one would not stop where its template does.
    """
    if tokenizer not in _ends:
        _ends[tokenizer] = _find_end(tokenizer)
    return _ends[tokenizer]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a completion, in order: the end of a turn, eos, and those of the model's generation_config."""
    return tuple(sorted({end_of_turn(tokenizer), tokenizer.eos_token_id, *_of_config.get(tokenizer, ())}))


PIECE = 1 << 16  # characters that are tokenised at once: the tokenizer takes some 180 bytes of memory for each
OVERLAP = 1 << 12  # characters that a piece repeats of the piece before it


def text_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, spans) of consecutive parts of a text: together they are the tokens of `tokenizer(text)`.

    ids: (n,). spans: (n, 2), the first character of each token and the one after its last, in `text`.
    A cut changes only the tokens near it. So two pieces that overlap have the same tokens inside the overlap, and are
    joined there. They must agree over half of OVERLAP characters. If they do not (one word of thousands of characters),
    the overlap grows. If no overlap is enough, the rest of the text is tokenised at once.
    """
    begin, end, known = 0, min(PIECE, len(text)), 0  # known: tokens of the piece that were yielded before
    ids, spans = _encoded(tokenizer, text, begin, end)
    while end < len(text):
        overlap, joint = OVERLAP, None
        while joint is None and overlap < end - begin:
            more = _encoded(tokenizer, text, end - overlap, min(end + PIECE, len(text)))
            joint = _joint((ids, spans), more, range(end - overlap, end, OVERLAP // 4))
            overlap *= 8
        if joint is None:
            end = len(text)
            ids, spans = _encoded(tokenizer, text, begin, end)
        else:
            yield ids[known : joint[0]], spans[known : joint[0]]
            begin, end, known = end - overlap // 8, min(end + PIECE, len(text)), joint[1]
            ids, spans = more
    yield ids[known:], spans[known:]


def _encoded(tokenizer, text, begin, end):
    """(ids, spans) of text[begin:end]. Only the ends of the whole text get the special tokens of the tokenizer."""
    found = tokenizer(text[begin:end], return_offsets_mapping=True, return_special_tokens_mask=True)
    real = np.array(found.special_tokens_mask) == 0
    kept = np.ones(len(real), dtype=bool)
    if begin > 0:
        kept &= real.cumsum() > 0
    if end < len(text):
        kept &= real[::-1].cumsum()[::-1] > 0
    spans = np.array(found.offset_mapping, dtype=np.int64).reshape(-1, 2) + begin
    return np.array(found.input_ids, dtype=np.int64)[kept], spans[kept]


def _joint(piece, more, places):
    """(i, j): from token i of one piece and token j of the next one on, both go on alike. None if they do nowhere."""
    (ids, spans), (more_ids, more_spans) = piece, more
    for place in places:
        i, j = (int(np.searchsorted(x[:, 0], place)) for x in (spans, more_spans))
        n = min(len(ids) - i, len(more_ids) - j)
        alike = (ids[i : i + n] == more_ids[j : j + n]) & (spans[i : i + n] == more_spans[j : j + n]).all(1)
        run = n if alike.all() else int(alike.argmin())
        if run and spans[i + run - 1, 1] - place >= OVERLAP // 2:
            return i + run // 2, j + run // 2
    return None


def note_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, without_token: Iterable[int]) -> None:
    """Remember how many embedding rows the model of a tokenizer has, and which of their ids have no token."""
    _vocabulary[tokenizer] = (rows, tuple(without_token))


def never_sampled(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that a model must not sample: its embedding has rows for them, its tokenizer no token. Mostly none."""
    return _vocabulary.get(tokenizer, (None, ()))[1]


def readable(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """These ids. Raises UserError for one that the model has no embedding row for: some tokenizers have more ids."""
    rows = _vocabulary.get(tokenizer, (None, ()))[0]
    odd = next((i for i in ids if rows is not None and i >= rows), None)
    if odd is not None:
        token = tokenizer.convert_ids_to_tokens(odd)
        raise UserError(
            f"the text holds the token {token!r} (id {odd}), which the model cannot read: it has rows for {rows} ids, "
            f"and the tokenizer has {max(tokenizer.get_vocab().values()) + 1}"
        )
    return ids


def add_stop_ids(tokenizer: PreTrainedTokenizerBase, ids: int | list[int] | None) -> None:
    """Remember the stop ids of a model's generation_config with its tokenizer; None for none."""
    found = [ids] if isinstance(ids, int) else ids or []
    _of_config[tokenizer] = tuple(i for i in found if i is not None)


_vocabulary: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer: (rows, ids without a token)
_ends: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer: its end of turn
_of_config: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # tokenizer: stop ids of generation_config


def _find_end(tokenizer):
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    word = "xyzzy"  # a text that no template holds
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": word}]
    try:
        _, found, after = render(tokenizer, turns).rpartition(word)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return tokenizer.eos_token_id
    ids = tokenizer(after, add_special_tokens=False).input_ids if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((i for i in ids if i in special), tokenizer.eos_token_id)


def completion_ids(tokenizer: PreTrainedTokenizerBase, completion: str | list[dict]) -> list[int]:
    """The token ids of a completion, with the stop token at the end.

    The completion is tokenised without the prompt, so no token can span the boundary between them.
    completion: a text, or a list of one assistant message. Raises UserError for anything else.
    """
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or "content" not in completion[0]:
            raise UserError(
                f"a completion must be text or a list of one assistant message, not {str(completion)[:80]!r}"
            )
        completion = completion[0]["content"]
    if not isinstance(completion, str):
        raise UserError(f"a completion must be text, not {type(completion).__name__}")
    _encodable(completion)
    ids = readable(tokenizer, tokenizer(completion, add_special_tokens=False).input_ids)
    return [*ids, end_of_turn(tokenizer)]


def _encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half of a surrogate pair stands at character {error.start} of {text[:80]!r}") from None


def _adds_bos(tokenizer):
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def completion_text(tokenizer: Any, ids: list[int]) -> str:
    """The text of sampled ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def token_texts(tokenizer: Any, ids: list[int]) -> list[str | dict]:
    """The text of each token. For one that is only a part of a character: {"bytes": its bytes as hex digits}.

    A tokenizer may drop a space at the beginning of a text, so each token is decoded behind another one. Special tokens
    have the text by which the tokenizer knows them.
    """
    before = tokenizer("a", add_special_tokens=False).input_ids
    known = tokenizer.decode(before, skip_special_tokens=False)
    special = special_ids(tokenizer)
    found: dict[int, str | dict] = {}
    for i in set(ids):
        name = tokenizer.convert_ids_to_tokens(i)
        text = name
        if i not in special:
            decoded = tokenizer.decode([*before, i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            text = decoded.removeprefix(known)
        found[i] = _part_of_a_character(name) if "\N{REPLACEMENT CHARACTER}" in text else text
    return [found[i] for i in ids]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of all special tokens: those with a role (eos, pad), and those that were added as special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _part_of_a_character(name):
    """The token that the vocabulary has under this name: its text, or {"bytes": ...} if its bytes are no text.

    A vocabulary of bytes writes each byte as one letter (GPT-2), or the bytes that have no token as <0xE2> (Llama 2).
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    single = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    if single:
        found = bytes.fromhex(single[1])
    elif all(letter in byte_of for letter in name):
        found = bytes(byte_of[letter] for letter in name)
    else:
        return name
    try:
        return found.decode()
    except UnicodeDecodeError:
        return {"bytes": found.hex()}
