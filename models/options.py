"""What all scripts that use a model have in common on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from configs.config import option


@dataclass
class ModelOptions:
    """The base of the configurations of all scripts that use a model."""

    NOTE: ClassVar[str] = (
        "Before each kind of work, a check of about a second compares the fast ways to compute it with the plain\n"
        "forward pass of transformers, on this very model: a way that gives other numbers is not used, a message says\n"
        "what is used instead, and the manifest of a run keeps the result. The check cannot be turned off."
    )
    chat_template_kwargs: dict | None = option(
        None, 'options of the chat template, such as {"enable_thinking": false}; none: those saved with the tokenizer'
    )
