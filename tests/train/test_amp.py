"""fp16 with a gradient scaler: the schedule stands still on a skipped step, clipping sees true gradients."""

import json
from functools import partial

import pytest
import torch

from configs.config import UserError
from train import train_lm_amp_ckpt, updates
from train.updates import lr_at


def config(folder, **changes):
    base = {"model_name": "tiny-llama", "data": "tests/train/text.jsonl", "heldout_fraction": 0.2, "out": str(folder)}
    shape = {"batch_size": 4, "micro_batch_size": 2, "max_length": 64, "max_steps": 4, "warmup_steps": 2}
    more = {"eval_blocks": 2, "log_every": 1, "lr": 1e-3, "precision": "fp16", "measure_steps": 0, **changes}
    return train_lm_amp_ckpt.Config(**{**base, **shape, **more})


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line[key] for line in lines if key in line]


@pytest.mark.statement("schedule")
def test_the_schedule_stands_still_on_skipped_steps_and_ends_at_its_minimum(tmp_path, monkeypatch):
    train_lm_amp_ckpt.train(config(tmp_path / "plain"))
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    train_lm_amp_ckpt.train(config(tmp_path / "skipping"))
    result = json.loads((tmp_path / "skipping/manifest.json").read_text())["result"]
    assert result["skipped_steps"] > 0 and result["steps"] == 4
    lrs = logged(tmp_path / "skipping", "lr")
    assert lrs == [lr_at(step, 4, 1e-3, 2, 0.1) for step in (1, 2, 3, 4)]
    assert lrs[-1] == pytest.approx(1e-4)
    # no data was lost either: the same steps were taken, only later
    assert logged(tmp_path / "skipping", "loss") == pytest.approx(logged(tmp_path / "plain", "loss"), abs=1e-2)


@pytest.mark.statement("clipping")
def test_the_norm_is_that_of_the_unscaled_gradients_and_the_limit_holds(tmp_path, monkeypatch):
    moved = []

    class Sgd(torch.optim.SGD):
        def step(self, *given, **more):
            parameters = [p for g in self.param_groups for p in g["params"]]
            before = [p.detach().clone() for p in parameters]
            super().step(*given, **more)
            moved.append(torch.cat([(p - b).reshape(-1) for p, b in zip(parameters, before)]).double().norm().item())

    monkeypatch.setattr(updates, "make_optimizer", lambda params, lr, decay: Sgd(params, lr=lr))
    train_lm_amp_ckpt.train(config(tmp_path / "fp16", lr=1.0, max_grad_norm=1e-3, max_steps=1, warmup_steps=0))
    train_lm_amp_ckpt.train(
        config(tmp_path / "fp32", precision="fp32", lr=1.0, max_grad_norm=1e-3, max_steps=1, warmup_steps=0)
    )
    assert moved == pytest.approx([1e-3, 1e-3], rel=0.02)
    (fp16,), (fp32,) = logged(tmp_path / "fp16", "grad_norm"), logged(tmp_path / "fp32", "grad_norm")
    assert fp16 == pytest.approx(fp32, rel=0.05) and fp32 > 0.1


def test_gradients_that_no_scale_makes_finite_end_the_run_with_a_message(tmp_path, monkeypatch):
    def broken(model, batch, compiled):
        weight = model.get_input_embeddings().weight
        return (weight - weight.detach()).sum().sqrt(), batch["mask"].sum()  # 0, with an infinite gradient

    monkeypatch.setattr(train_lm_amp_ckpt, "lm_loss", broken)
    with pytest.raises(UserError, match="step 1: gradients are not finite"):
        train_lm_amp_ckpt.train(config(tmp_path / "broken"))
