"""The policy that trains, and its reference."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from models.admission import check_training, known_as
from models.device import frozen_dtype
from models.fast.head import check_head, unwrapped
from models.fast.lora import add_adapter
from models.fast.quantised import count_quantised, quantise
from models.loader import load_model, load_tokenizer, portable_name, resolve_model
from models.options import quantisation
from models.router import check_router, router_of
from models.save import save_model
from rlhf.rollouts import Minibatch
from rlhf.utils import packed_logprobs
from runtime.console import say
from runtime.files import in_root
from runtime.processes import on_main


class Policy:
    """The policy that trains (`model`, `parameters`, `tokenizer`), and the `reference` to which its KL is measured.

    `router`: the `RouterLoss` of the model.
    """

    def __init__(self, config, stage):
        self.config, self.stage = config, stage
        loaded = load_policy(config, stage.device, stage.precision, config.out)
        self.model, self.reference, self.tokenizer, self.parameters = loaded
        self.router = router_of(self.model)

    def logprobs(self, batch, entropy=False, value_head=None):
        """Log-probs (N, L) of a batch's completions, in nats, at the sampling temperature; see `packed_logprobs`."""
        with self.stage.autocast():
            return packed_logprobs(self.model, batch.packed, self.config.temperature, entropy, value_head)

    def ref_logprobs(self, batch):
        """The same log-probs under the reference, without gradients."""
        with self.stage.autocast(), as_reference(self.model, self.reference) as reference:
            return packed_logprobs(reference, batch.packed, self.config.temperature)

    def minibatches(self, rollout, learn=None):
        """Divide the rollout into config.minibatches `Minibatch`es of whole groups.

        learn: for each row, whether it is computed (default: all rows). A row that is not computed still counts in the
        means.
        """
        config, stage, found = self.config, self.stage, []
        for rows in rollout.split_groups(config.minibatches):
            computed = rows if learn is None else [i for i in rows if learn[i]]
            batches = rollout.batches(computed, config.micro_batch_size, self.tokenizer.pad_token_id, stage.device)
            tokens, sequences, computed = rollout.count(rows, batches, stage.processes, stage.device)
            stage.run.count_tokens(computed)
            found.append(Minibatch(batches, tokens, sequences))
        return found

    def save(self, folder):
        """Write the weights (an adapter that names its base, or the full model) and the tokenizer."""
        save_policy(self.model, self.tokenizer, folder)


@contextlib.contextmanager
def as_reference(model, reference=None):
    """The reference policy, without gradients: `reference` if it is given, else `model` with its adapter disabled.

    The model is in eval mode, so dropout has no effect on it.
    """
    if reference is not None:
        with torch.no_grad():
            yield reference
        return
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield model
    finally:
        model.train(was_training)


def disable_dropout(model):
    """Set every dropout probability to 0: training, comparison and sampling must use the same policy."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # dropout as a function, its probability a number in the layer
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    config = unwrapped(model).config
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and "drop" in key:
                setattr(part, key, 0.0)


def load_policy(config, device, precision, out):
    """(model, reference, tokenizer, parameters): the policy to train, and its reference.

    With lora_r > 0, the base is frozen in the dtype of the precision, the adapter trains in float32, and the reference
    is the base with the adapter disabled (`reference` is None). With lora_r = 0, all weights train in float32, and the
    reference is a frozen copy. If model_name is an adapter, it is merged first. Its merged weights are saved in
    `out`/base, so that the new adapter has a base that can be loaded. With load_in_4bit or load_in_8bit, the linear
    layers of the base are rounded after that.
    """
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    path = resolve_model(config.model_name)
    adapter_given = isinstance(path, Path) and (path / "adapter_config.json").is_file()
    dtype = frozen_dtype(precision) if config.lora_r else torch.float32
    how = quantisation(config, dtype)
    model = load_model(config.model_name, dtype=dtype, device=device, merge_adapter=True)
    check_head(known_as(model, "policy"), config.model_name)
    base = path
    if adapter_given and config.lora_r:
        base = in_root(out) / "base"
        on_main(lambda: save_model(model, tokenizer, base))
    model = prepare_training(quantise(model, how), config, "CAUSAL_LM")
    reference = None
    if config.lora_r:
        model.peft_config["default"].base_model_name_or_path = portable_name(base)
    else:
        reference = load_model(config.model_name, dtype=frozen_dtype(precision), device=device, merge_adapter=True)
        disable_dropout(known_as(reference, "reference"))
        reference.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trained, all_of_them = sum(p.numel() for p in parameters), sum(p.numel() for p in model.parameters())
    all_of_them += count_quantised(model)
    say(f"{config.model_name} in {precision} on {device}: {trained:,} of {all_of_them:,} weights train")
    return model, reference, tokenizer, parameters


def prepare_training(model, config, task_type, **lora_options):
    """Prepare `model` for training and return it.

    Disables dropout. With config.lora_r, freezes the model and adds an adapter. With config.gradient_checkpointing,
    turns on gradient checkpointing. Without it, the model trains in eval mode: some models compute
    something else in train mode (the router of PhiMoE), and the policy that trains must be the one that samples.
    Raises UserError if the model cannot be trained like that.
    """
    disable_dropout(model)
    if config.lora_r:
        model = add_adapter(model, config.lora_r, 2 * config.lora_r, task_type=task_type, **lora_options)
    check_training(model.train(config.gradient_checkpointing))  # transformers checkpoints only in train mode
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.lora_r:  # no weight before the checkpointed blocks trains; without this they would get no gradient
            model.enable_input_require_grads()
    check_router(model)
    return model


def save_policy(model, tokenizer, folder):
    """Write the weights (an adapter that names its base, or the full model) and the tokenizer. Process 0 writes."""
    on_main(lambda: save_model(model, tokenizer, folder))
