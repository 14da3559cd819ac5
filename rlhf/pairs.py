"""Pairs of a chosen and a rejected completion: the training data of DPO and of the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from configs.config import option
from data.order import step_indices
from data.pairs import batches_by_length, count_steps, describe_pairs, load_pairs, pair_length, split_by_prompt
from models.loader import check_length, load_tokenizer
from rlhf.packing import pack
from rlhf.plan import plan_pairs
from rlhf.stage import TrainingConfig
from rlhf.steps import in_words
from runtime.plan import Plan
from runtime.provenance import note_plan
from train.plan import known
from train.updates import check_warmup


@dataclass
class PairsConfig(TrainingConfig):
    """The common options of DPO and of the reward model."""

    data: str = option(
        "data/preferences.jsonl", "pairs with prompt, chosen, rejected: JSONL or hub dataset", reads=True
    )
    heldout_fraction: float = option(0.1, "share of the prompts kept for accuracy", at_least=0, below=1)
    max_length: int = option(512, "longest prompt and completion together, in tokens", at_least=8)
    truncation: Literal["left", "drop"] = option("left", "cut a long prompt from the left, or drop the row")
    epochs: int = option(1, "passes over the pairs", at_least=1)
    max_steps: int = option(0, "stop after this many optimizer steps; 0 takes all", at_least=0)
    batch_size: int = option(16, "pairs per optimizer step, over all processes", at_least=1)
    micro_batch_size: int = option(8, "pairs in one forward and backward pass", at_least=1)
    warmup_steps: int = 3
    SCORE: ClassVar[bool] = False  # whether a head of one score trains, not the language model's

    def plan(self, data: Any = None) -> Plan:
        """The `Plan` of this run. data: its training pairs; None: read them."""
        notes: list[str] = []
        if data is None:
            bound = f"pairs count with max_length = {self.max_length} for each completion"
            options = self.chat_template_kwargs
            data = known(lambda: read_pairs(self, load_tokenizer(self.model_name, options))[0], notes, bound)
        return plan_pairs(self, data, notes, self.SCORE)


def read_pairs(config, tokenizer):
    """(training pairs, held-out pairs, counts, hash) of config.data; see `load_pairs`."""
    pairs, counts, sha256 = load_pairs(config.data, tokenizer, config.max_length, config.truncation)
    return *split_by_prompt(pairs, config.heldout_fraction, config.seed), counts, sha256


class Pairs:
    """The pairs of a run: `train` and `heldout`, split by prompt. `inputs`: {name: hash} of the data."""

    def __init__(self, config, stage, model, tokenizer):
        """Read config.data, print a summary of it, and set the number of steps of the run.

        Raises UserError for rows that cannot be used, and if the model's context is shorter than config.max_length.
        """
        self.config, self.stage = config, stage
        self.train, self.heldout, counts, sha256 = read_pairs(config, tokenizer)
        self.inputs = {config.data: sha256}
        describe_pairs(self.train, self.heldout, counts)
        check_length(model, config)
        stage.run.total_steps = count_steps(config, len(self.train))
        check_warmup(config.warmup_steps, stage.run.total_steps)
        note_plan(lambda: config.plan(self.train))

    def indices(self, step):
        """The indices in `train` of the pairs of step `step` (from 1), over all processes. Each pair once per epoch."""
        return step_indices(len(self.train), self.config.batch_size, step, self.config.seed)

    def mine(self, step):
        """This process's pairs of the step."""
        return [self.train[i] for i in self.stage.processes.share(self.indices(step))]

    def batches(self, step):
        """This process's pairs of the step in lists of micro_batch_size, sorted by length.

        The tokens of the whole step are counted, those of the other processes too.
        """
        self.stage.run.count_tokens(sum(pair_length(self.train[i]) for i in self.indices(step)))
        return batches_by_length(self.mine(step), self.config.micro_batch_size)

    def where(self, step):
        """A text that names the rows of a step, for messages."""
        return in_words(self.train[i]["where"] for i in self.indices(step))

    def used(self):
        """All pairs that the run reads: the pairs of its steps, and the held-out pairs."""
        steps = range(1, self.stage.run.total_steps + 1)
        return [self.train[i] for i in {i for step in steps for i in self.indices(step)}] + self.heldout


def pack_pairs(pairs, pad_id, device):
    """Both completions of each pair in one `Packed`: chosen, rejected, chosen, ... Each prompt is there once."""
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    completions = [completion for pair in pairs for completion in (pair["chosen"], pair["rejected"])]
    return pack(prompts, completions, pad_id, device)
