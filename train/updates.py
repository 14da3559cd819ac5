"""One optimizer step: AdamW, the learning rate, clipping, the gradient scaler of fp16."""

from __future__ import annotations

import math

import torch


def lr_at(step, total_steps, lr, warmup_steps, min_lr_ratio):
    """Learning rate of optimizer step `step` (from 1): linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio`.

    The peak is at step `warmup_steps` (at step 1 without warm-up), the minimum at `total_steps`; Loshchilov & Hutter,
    "SGDR" (2016), eq. 5, with one period.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    peak = max(warmup_steps, 1)
    progress = min(max(step - peak, 0) / max(total_steps - peak, 1), 1.0)
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(parameters, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """AdamW over the parameters that train. Matrices decay; vectors (biases, norms) do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)
