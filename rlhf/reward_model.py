"""The reward model: a transformer with a head of one score, and its loss, which makes chosen completions score higher.

Bradley-Terry (Stiennon et al. 2020, eq. 1): the probability that `chosen` is preferred is the sigmoid of the difference
of the scores. A margin (Touvron et al. 2023, eq. 2) asks for a larger difference where the preference is stronger.
Centering (Eisenstein et al. 2023) pulls the sum of both scores to 0; the Bradley-Terry loss does not depend on it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file

from configs.config import UserError, shown
from models.admission import known_as
from models.device import pick_device
from models.fast.head import hidden_states, unsupported, unwrapped
from models.fast.lora import merged, use_memory_efficient_adapters
from models.fast.quantised import quantisation_of
from models.loader import (
    model_config,
    portable_name,
    read_quantisation,
    read_weights,
    resolve_model,
    set_adapter_weights,
)
from models.save import save_weights
from rlhf.utils import packed_scores
from runtime.console import say
from runtime.files import in_root, read_json

ADAPTER = "adapter"  # subfolder of a reward model trained with LoRA: only the adapter, to share the policy's backbone


def reward_loss(chosen_scores, rejected_scores, margin=None, center_coef=0.0):
    """The mean over pairs of -log sigmoid(chosen - rejected - margin) + center_coef * (chosen + rejected)^2.

    All arguments except center_coef are (B,). margin: None is 0.
    """
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin
    losses = -F.logsigmoid(difference) + center_coef * (chosen_scores + rejected_scores).square()
    return losses.mean()


def last_token(attention_mask):
    """The index (B,) of the last real token of each row, with padding on either side."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * index).argmax(-1)


def score_at_end(hidden, attention_mask, head):
    """Scores (B,), float32, from the body's outputs (B, T, H) at the last real token of each row."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return head(hidden[rows, last_token(attention_mask)]).float().squeeze(-1)


def find_reward_model(name):
    """The folder of the reward model. If it is not there, raises UserError with the command that makes it."""
    if not in_root(name).exists():
        raise UserError(f"reward_model = {name!r} is not there. This makes it: python rlhf/train_reward_model.py")
    return resolve_model(name)


def has_score_head(config):
    """Whether transformers has a sequence classifier for this configuration with one linear head, named `score`."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):  # without memory
            return "score" in dict(AutoModelForSequenceClassification.from_config(config).named_children())
    except Exception as error:  # no such class, or not of a decoder alone
        if not unsupported(error):
            raise
        return False


class RewardModel(torch.nn.Module):
    """A transformers sequence classifier with one label. The mask, not the pad token, tells where the score is read."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @classmethod
    def load(cls, name, dtype=torch.float32, device=None, new_head=False):
        """Load a folder that `save` wrote, or a sequence classifier with one label.

        new_head: also accept a language model, and give it a new head.
        Raises UserError for a model with another head, for a model without a head if new_head is False, and for an
        adapter.
        """
        from transformers import AutoModelForSequenceClassification

        path = resolve_model(name)
        if isinstance(path, Path) and (path / "adapter_config.json").is_file():
            raise UserError(f"{shown(path)} is an adapter; a reward model is, and starts from, a full model: merge it")
        config = model_config(name)
        architecture = (config.architectures or ["model without architectures in its config.json"])[0]
        classifies = architecture.endswith("ForSequenceClassification")
        if classifies and config.num_labels != 1:
            raise UserError(f"{name}: a reward model has one label, this classifier has {config.num_labels}")
        if not (classifies or new_head):
            raise UserError(
                f"{name} is a {architecture}, not a reward model. This makes one: python rlhf/train_reward_model.py"
            )
        if not has_score_head(config):
            raise UserError(
                f"{name} is a {architecture}, for which transformers has no sequence classifier with a `score` head; "
                "a reward model needs one"
            )
        new = () if classifies else ("score.weight",)
        model = read_weights(AutoModelForSequenceClassification, path, name, new, num_labels=1, dtype=dtype)
        if new:  # small weights, so that all scores start near 0: Stiennon et al. 2020, appendix B.1
            torch.nn.init.normal_(model.score.weight, std=(model.score.weight.shape[-1] + 1) ** -0.5)
        return cls(known_as(model, "reward model").to(device or pick_device()).eval())

    @property
    def head(self):
        return unwrapped(self.model).score

    def forward(self, input_ids, attention_mask):
        return self.score(input_ids, attention_mask)

    def score(self, input_ids, attention_mask):
        """Scores (B,) of rows (B, T). Padding on either side does not change them."""
        return score_at_end(hidden_states(self.model, input_ids, attention_mask), attention_mask, self.head)

    def save(self, folder, tokenizer, base):
        """Write a folder that AutoModelForSequenceClassification loads. With LoRA, `adapter/` holds only the adapter.

        transformers finds the end of a row by the pad token, so the saved pad token is one that no text contains.
        """
        folder = Path(folder)
        model = self.model
        if model is not unwrapped(model):
            for adapter in model.peft_config.values():
                adapter.base_model_name_or_path = portable_name(base)
            save_weights(model, folder / ADAPTER)
            model = merged(model)
        eos = tokenizer.eos_token_id
        if tokenizer.pad_token_id == eos and tokenizer.unk_token_id not in (None, eos):
            tokenizer.pad_token = tokenizer.unk_token
        model.config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def place_reward_model(model, name, lora_r, device):
    """A function from a `Packed` to scores (N,) of the reward model `name`.

    If the reward model was trained with LoRA on the base of the policy, it becomes a second adapter on the policy's
    backbone. Else it is loaded as a separate model. Raises UserError if it is not there or damaged.
    """
    folder = find_reward_model(name)
    adapter = folder / ADAPTER
    shared = False
    if lora_r and adapter.is_dir():
        settings = read_json(adapter / "adapter_config.json")
        shared = settings.get("base_model_name_or_path") == model.peft_config["default"].base_model_name_or_path
        shared = shared and read_quantisation(adapter) == quantisation_of(model)
    if not shared:
        say(f"reward model {shown(folder)}: a model of its own")
        reward_model = RewardModel.load(name, device=device)
        return lambda packed: packed_scores(reward_model.model, packed, reward_model.head)

    try:
        weights = load_file(adapter / "adapter_model.safetensors")
        score = weights.pop("base_model.model.score.weight")
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the adapter of the reward model in {shown(adapter)} is damaged: {error}") from None
    head = torch.nn.Linear(score.shape[-1], 1, bias=False).to(device)
    head.weight.data.copy_(score)
    same = {key: settings.get(key) for key in ("r", "lora_alpha", "target_modules", "exclude_modules")}
    lora = LoraConfig(**same, task_type="CAUSAL_LM")
    model.add_adapter("reward", lora)
    use_memory_efficient_adapters(model)
    set_adapter_weights(model, weights, adapter, "reward")
    model.set_adapter("default")
    say(f"reward model {shown(folder)}: an adapter on the policy's backbone")

    def scores(packed):
        with adapter_in_use(model, "reward"):
            return packed_scores(model, packed, head)

    return scores


@contextlib.contextmanager
def adapter_in_use(model, name):
    """A context with the adapter `name` active, in eval mode. Afterwards the policy's adapter is active again."""
    was_training = model.training
    model.eval()
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter("default")
        model.train(was_training)
