"""Compare a trained model with its base on the same prompts. Three inference scripts share this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from configs.config import UserError, option, read_yaml, refuse_unused, shown
from data.prompts import ARITHMETIC, PromptConfig, read_prompts
from models.completions import acquire_out, check_out, keep_for, sample_completions, sampling
from models.device import frozen_dtype, pick_device, pick_precision
from models.fast.head import check_head
from models.loader import adapter_base, load_model, load_tokenizer, resolve_model
from models.options import ModelOptions, QuantisationOptions, check_quantisation, quantisation
from models.tokens import prompt_ids
from rlhf.policy import as_reference
from rlhf.utils import completion_logprobs
from runtime.console import fold, quiet_libraries, say
from runtime.files import in_root


@dataclass
class CompareConfig(PromptConfig, ModelOptions, QuantisationOptions):
    RENAMED: ClassVar[dict] = {"batch_size": "sampling_batch_size", "group_size": "samples_per_prompt"}
    model_name: str = option("", "the run's folder")
    prompt: str | None = option(None, "one prompt of your own, in place of the file's")
    prompts: str = option(ARITHMETIC, "prompts (.json, .jsonl, .csv, .txt, ...); of a .json the held-out ones")
    limit: int = option(8, "how many of the file's prompts", at_least=1)
    max_new_tokens: int = option(16, "longest completion, in tokens", at_least=1)
    temperature: float = option(1.0, "of sampling and of the log-probs", above=0)
    sampling_batch_size: int = option(64, "completions sampled at once", at_least=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("fp32", "of the weights; fp32 gives exact log-probs")
    seed: int = option(0, "of the sampling; both models draw with the same random numbers", at_least=0)
    out: str | None = option(None, "JSONL file to write the completions to")

    def check(self):
        check_quantisation(self)
        check_out(self.out, self.prompts)
        if self.prompt is not None:
            refuse_unused(self, ["prompts", "prompt_column", "limit"], "a prompt of your own")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("prompt is empty")


class SideBySide:
    """The model of a run, its base, and the prompts that both complete.

    The base is the model with its adapter disabled. For a full model, the base is the model_name in the config.yaml of
    the run.
    """

    def __init__(self, config, made_by, need_checks=False, reward=None):
        """made_by: the command that makes the folder, for the UserError if the folder is not there.

        reward: `RewardFunctions` whose columns the prompts must have.
        """
        quiet_libraries()
        self.config, self.name = config, config.model_name
        self.folder = run_folder(config.model_name, made_by)
        self.rows = read_some(config, need_checks)
        if reward:
            reward.check_columns(self.rows)
        acquire_out(config.out)
        self.prompts = [row["prompt"] for row in self.rows]
        self.device = pick_device()
        self.dtype = frozen_dtype(pick_precision(config.precision, self.device))
        how = quantisation(config, self.dtype)
        self.model = load_model(self.folder, dtype=self.dtype, device=self.device, quantisation=how)
        check_head(self.model, self.folder)
        self.tokenizer = load_tokenizer(self.folder, config.chat_template_kwargs)
        if (self.folder / "adapter_config.json").is_file():
            self.base, self.reference = adapter_base(self.folder), None
        else:
            self.base = run_value(self.folder, "model_name")
            self.reference = load_model(self.base, dtype=self.dtype, device=self.device, quantisation=how)

    def answers(self, samples=1):
        """(completions of the model, completions of the base), each a list with `samples` Completions per prompt."""
        config = self.config
        each = f"{samples} completions" if samples > 1 else "a completion"
        words = f"{self.name} and its base {self.base}: {each} to each of {len(self.prompts)} prompts"
        say(fold(f"{words}, temperature {config.temperature:g}"))
        settings = (self.tokenizer, self.prompts, config.max_new_tokens, samples)
        own = sample_completions(self.model, *settings, keep_for(config.out, self.model), **sampling(config))
        with as_reference(self.model, self.reference) as ref:
            kept = keep_for(config.out, ref, ".base")
            return own, sample_completions(ref, *settings, kept, **sampling(config))

    def ids(self, groups):
        """(prompt ids, completion ids), one entry per completion. Completions of one prompt are consecutive."""
        rows = [(prompt_ids(self.tokenizer, p), a.ids) for p, group in zip(self.prompts, groups) for a in group]
        return [p for p, _ in rows], [c for _, c in rows]

    def logprobs(self, groups):
        """(log-probs under the model, log-probs under the base): for each completion a list of nats, one per token."""
        settings = (*self.ids(groups), self.tokenizer.pad_token_id, self.config.temperature)
        own = completion_logprobs(self.model, *settings)
        with as_reference(self.model, self.reference) as ref:
            return own, completion_logprobs(ref, *settings)


def run_folder(name, made_by):
    """The folder of a finished run. If it is not there, raises UserError with the command that makes it."""
    if not in_root(name).is_dir():
        raise UserError(f"{name} is not there. This makes it: {made_by}")
    return resolve_model(name)


def run_value(folder, key, default=None):
    """The value of `key` in the config.yaml of the run in `folder`, else `default`. Raises UserError without both."""
    path = folder / "config.yaml"
    value = read_yaml(path).get(key, default) if path.is_file() else default
    if value is None:
        raise UserError(f"{shown(path)} does not say {key}: is {shown(folder)} the folder of such a run?")
    return value


def read_some(config, need_checks=False):
    """The prompts of a comparison: config.prompt, or the first config.limit prompts of the file config.prompts."""
    if config.prompt is None:
        return read_prompts(config.prompts, "heldout", need_checks, config.prompt_column)[: config.limit]
    if need_checks:
        raise UserError("prompt: your own prompt has no checks to be scored by; give a --reward module:function")
    return [{"prompt": config.prompt}]
