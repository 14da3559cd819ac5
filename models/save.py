"""Write a model and its tokenizer, so that a kill leaves no half-written model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from models.fast.quantised import quantisation_of
from models.loader import QUANTISATION
from runtime.files import synced


def save_weights(model: Any, folder: Path) -> None:
    """Write a model, or an adapter and how the weights of its base are rounded, by `save_pretrained`."""
    how = quantisation_of(model)
    model.save_pretrained(folder)
    if how:
        (folder / QUANTISATION).write_text(json.dumps(how.to_dict(), indent=1) + "\n", encoding="utf-8")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the weights and the tokenizer. config.json is written last, so a kill leaves no half-written model."""
    temporary = folder / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_weights(model, temporary)
        if not (temporary / QUANTISATION).is_file():
            (folder / QUANTISATION).unlink(missing_ok=True)  # of a run that was replaced
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
