"""Measure what mixed precision and gradient checkpointing save: peak memory and seconds of a few steps.

Each setting runs in a separate process, because the peak memory of a process never falls.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time

import torch

from configs.config import ROOT, UserError
from models.device import autocast, checkpoint_activations, pick_device
from models.loader import load_model
from models.save import save_model
from runtime.console import say
from runtime.files import in_root
from runtime.progress import Progress
from runtime.provenance import peak_memory_gb
from train.common import lm_loss
from train.updates import make_optimizer


def compare_memory_and_time(config, model, tokenizer, precision):
    """Measure plain, AMP, CKPT and both on random batches of config.micro_batch_size x config.max_length tokens.

    Prints a table and returns it for the manifest: {"measured": {setting: {"peak_memory_gb", "seconds_a_step"}}}.
    Returns {} if measure_steps is 0. With precision fp32, only plain and CKPT are measured.
    """
    if not config.measure_steps:
        return {}
    settings = {"plain": ("fp32", False), "CKPT": ("fp32", True)}
    if precision != "fp32":
        settings |= {f"AMP {precision}": (precision, False), f"AMP {precision} + CKPT": (precision, True)}
    say(f"\nmeasuring {config.measure_steps} steps of {config.micro_batch_size} x {config.max_length} tokens each:")
    name, start = config.model_name, in_root(config.out) / "start.tmp"
    if name == "scratch":
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir()
        save_model(model, tokenizer, start)
        name = str(start)
    rows, progress = {}, Progress(dict.fromkeys(settings, 1), name="done")
    say(f"  {'':<18} {'peak memory':>12} {'s a step':>9} {'tok/s':>7}")
    for label, (kind, checkpointing) in settings.items():
        job = {"name": name, "precision": kind, "checkpointing": checkpointing, "steps": config.measure_steps}
        rows[label] = gb, seconds = _in_subprocess({**job, "shape": [config.micro_batch_size, config.max_length]})
        tokens = config.micro_batch_size * config.max_length / seconds
        done = progress.done(label)
        say(f"  {label:<18} {gb:>9.2f} GB {seconds:>9.2f} {tokens:>7,.0f} | {done}")
    shutil.rmtree(start, ignore_errors=True)
    plain = rows["plain"]
    for label in list(rows)[1:]:
        say(f"  {label} saves {plain[0] - rows[label][0]:.2f} GB and {plain[1] - rows[label][1]:.2f} s a step")
    rows = {label: {"peak_memory_gb": gb, "seconds_a_step": seconds} for label, (gb, seconds) in rows.items()}
    return {"measured": rows}


def _in_subprocess(job):
    code = "import json, sys; from train.amp_savings import measure; print(json.dumps(measure(**json.load(sys.stdin))))"
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise UserError(f"measuring failed; --measure_steps 0 goes without.\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, precision, checkpointing, steps, shape):
    """(peak memory in GB, seconds per step) of this process over `steps` optimizer steps on random tokens.

    shape: (B, T). The first step is not timed, because it also allocates the optimizer's state. The time is that of the
    fastest other step.
    """
    device = pick_device()
    model = load_model(name, device=device, merge_adapter=True).train()
    if checkpointing:
        checkpoint_activations(model)
    optimizer = make_optimizer(model.parameters(), 1e-6)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    input_ids = torch.randint(model.config.vocab_size, shape, device=device)
    positions = torch.arange(shape[1], device=device).expand(shape)
    batch = {"input_ids": input_ids, "position_ids": positions, "mask": torch.ones_like(input_ids[:, 1:]).bool()}
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with autocast(device, precision):
            nats, count = lm_loss(model, batch)
        scaler.scale(nats / count).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return peak_memory_gb(), min(seconds[1:])
