"""What the baselines get: the same for all of TRL's trainers. Each choice is equal to ours or in favour of TRL.

There is one exception. Our processes keep freed memory, as our scripts do (`runtime/memory.py`); the baselines do not
(`measure.py`).

Gradient checkpointing is off, as in our scripts. It is on by default in TRL, where it costs about a fifth more time and
saves memory. The model consists of transformers' own layers. Mixed precision, AdamW's betas and the constant learning
rate are ours; AdamW is torch's fused one. Nothing is saved or reported, and the rows come in our order.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks import measure
from models.device import cast_weights, pick_device
from train.updates import make_optimizer

LR_CONSTANT = {"warmup_steps": 0, "min_lr_ratio": 1.0}  # of our scripts
NO_CHECKPOINTS = {"save_every": 0, "save_minutes": 0}
BETAS = make_optimizer.__defaults__[-1]


def plain(model):
    """A model with the same weights, made of transformers' and peft's own layers, as users of the baseline have it.

    The adapter of a PEFT model moves to the new model; the given model is only its base afterwards.
    """
    if isinstance(model, PeftModel):
        config, adapter = model.peft_config["default"], get_peft_model_state_dict(model)
        theirs = get_peft_model(plain(model.unload()), config)
        for weight in theirs.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data  # a reward model's head, too
        set_peft_model_state_dict(theirs, adapter)
        return theirs.train(model.training)
    with torch.random.fork_rng(devices=[]):
        theirs = type(model)(type(model.config).from_dict(model.config.to_dict()))
    theirs.set_attn_implementation("sdpa")
    cast_weights(theirs, model.dtype).load_state_dict(model.state_dict())
    assert not any(type(module).__module__.startswith("models.") for module in theirs.modules())
    return theirs.to(model.device).train(model.training)


def arguments(Config, folder, steps, batch_size, lr, accumulation=1, weight_decay=0.0, **more):
    """A TRL configuration of the warm-up and `steps` timed steps."""
    kind, cpu = measure.precision(), pick_device().type == "cpu"
    return Config(
        output_dir=str(folder / "trl"),
        max_steps=steps + measure.WARM_UP,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        bf16=kind == "bf16",
        fp16=kind == "fp16",
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **more,
    )


def train(trainer, clock, work):
    """Train, and report what the clock and the trainer's log say."""
    with clock:
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return clock.measured(work, [line["loss"] for line in lines], [line["grad_norm"] for line in lines])
