"""The sampler: a copy of the policy that samples while the policy trains. It is updated before each rollout."""

from __future__ import annotations

import time

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from models.admission import TOLERANCE, Admitted, apart, check_tokens, known_as, record
from models.device import frozen_dtype
from models.fast.head import unwrapped
from models.generation import generate
from models.loader import load_model
from models.tokens import never_sampled, stop_ids
from runtime.console import say


def merged_weight(layer, kind):
    """The parameter `kind` of a layer of the policy, merged with its adapter. With an adapter it is float32.

    A layer may have several wrappers: peft wraps the experts of a mixture once for each parameter.
    """
    delta = None
    while isinstance(layer, LoraLayer):
        of = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        if of == kind:
            delta = layer.get_delta_weight("default").float()
        layer = layer.base_layer
    weight = getattr(layer, kind)
    return weight if delta is None else weight.float() + delta


def layer_of(policy, name):
    """The module `name` of the base model inside a policy. On the way, an adapter's wrapper is what it wraps."""
    module = unwrapped(policy)
    for part in name.split(".") if name else ():
        while isinstance(module, LoraLayer):
            module = module.base_layer
        module = getattr(module, part)
    return module


class Sampler:
    """The model that samples: a copy of the policy in the dtype of the forward passes, updated before each rollout.

    With LoRA, the copy is the base with the merged adapter, because separate adapters double the time per token. If all
    weights train in float32, the copy saves the cast of every weight for every token. If the forward passes are also
    in float32, the policy itself samples. Rounding the merged weights to bf16 changes at most 1e-4 nats per token,
    measured in the tests. The copy has weights only while it samples, so that training can use their memory.
    """

    def __init__(self, policy, config, precision):
        self.policy = self.copy = policy
        weight = policy.get_input_embeddings().weight
        self.dtype = frozen_dtype(precision)
        if isinstance(policy, PeftModel) or weight.dtype != self.dtype:
            self.copy = load_model(config.model_name, dtype=self.dtype, device=weight.device, merge_adapter=True)
            known_as(self.copy, "sampler").requires_grad_(False)
            if not self._is_the_policy():
                self.copy = policy
                say("sampler: a copy with merged adapters does not say what the policy says; the policy itself samples")
            self.rest()

    @torch.no_grad()
    def model(self):
        """A model with the current weights of the policy, ready to sample."""
        if self.copy is self.policy:
            return self.copy
        for name, mine in self.copy.named_parameters():
            layer, _, kind = name.rpartition(".")
            mine.data = merged_weight(layer_of(self.policy, layer), kind).to(self.dtype)
        return self.copy

    @torch.no_grad()
    def _is_the_policy(self):
        """Whether copy and policy give the same logits. For this check, the adapters are changed and then restored."""
        moved = [p for p in self.policy.parameters() if p.requires_grad] if isinstance(self.policy, PeftModel) else []
        before = [p.detach().clone() for p in moved]
        generator = torch.Generator().manual_seed(0)
        began, training = time.time(), self.policy.training
        self.policy.eval()
        try:
            for p in moved:
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
            [ids] = check_tokens(self.policy, [12])
            row = torch.tensor([ids], device=self.policy.get_input_embeddings().weight.device)
            kind, dtype = row.device.type, self.dtype
            with torch.autocast(
                kind, dtype=dtype, cache_enabled=False, enabled=dtype in (torch.float16, torch.bfloat16)
            ):
                theirs = self.policy(input_ids=row, use_cache=False).logits[0]
            mine = self.model()(input_ids=row, use_cache=False).logits[0]
        finally:
            for p, old in zip(moved, before):
                p.copy_(old)
            self.policy.train(training)
            self.rest()
        far = apart([mine], [theirs])
        right = far <= TOLERANCE[self.dtype]
        copy, itself = "a separate copy", "the policy itself"
        way, there, differed = (copy, far, {}) if right else (itself, 0.0, {copy: far})
        record(self.policy, Admitted("logits of the sampler", way, there, differed, time.time() - began))
        return right

    def rest(self):
        """Free the weights of the copy until the next rollout."""
        if self.copy is not self.policy:
            for weight in self.copy.parameters():
                weight.data = weight.new_empty(0)

    def sample(self, tokenizer, stream, step, config, samples):
        """The `Generation` with `samples` completions of each prompt of this process in the step.

        The random numbers depend on the place of a prompt in the step, so any number of processes draws the same
        completions.
        """
        share = stream.at(step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        uniforms = torch.rand(stream.count, samples, config.max_new_tokens, generator=generator, dtype=torch.float64)
        generation = generate(
            self.model(),
            [ids for _, _, ids in share],
            config.max_new_tokens,
            temperature=config.temperature,
            samples_per_prompt=samples,
            stop_ids=stop_ids(tokenizer),
            never=never_sampled(tokenizer),
            uniforms=uniforms[[k for k, _, _ in share]].flatten(0, 1),
            batch_size=config.sampling_batch_size,
        )
        self.rest()
        return generation
