"""Write a model and its tokenizer, so that a kill leaves no half-written model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.files import synced

if TYPE_CHECKING:
    pass


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the weights and the tokenizer. config.json is written last, so a kill leaves no half-written model."""
    temporary = folder / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        last = ("config.json", "adapter_config.json")
        for path in sorted(temporary.iterdir(), key=lambda p: (p.name in last, p.name)):
            if path.is_dir():  # a second adapter
                shutil.rmtree(folder / path.name, ignore_errors=True)
            else:
                synced(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
