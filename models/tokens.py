"""From prompts and completions to token ids and back: the one place that renders a chat template."""

from __future__ import annotations

from jinja2 import TemplateError

from configs.config import UserError


def prompt_ids(tokenizer, prompt):
    """The one place where a prompt becomes token ids: for training, rollout, evaluation and inference.

    prompt: a list of chat messages, or a plain text. With a chat template, a text is one user message; without one
    (GPT-2), a text is taken as it stands and messages are joined as `role: content` lines.
    Exactly one BOS where the tokenizer has one. Raises UserError for a prompt of the wrong form.
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
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise UserError(f"the chat template of the tokenizer does not take this prompt: {error}") from None
    elif isinstance(prompt, str):
        text = prompt
    else:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and not tokenizer.chat_template and _adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def completion_ids(tokenizer, completion):
    """Token ids of a completion, ended by the stop token. Tokenised apart from the prompt, so no boundary can merge.

    completion: a text, or a list of one assistant message.
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
    return [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def _encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half of a surrogate pair stands at character {error.start} of {text[:80]!r}") from None


def _adds_bos(tokenizer):
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def completion_text(tokenizer, ids):
    """The text of sampled ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
