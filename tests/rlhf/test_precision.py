"""A run with `precision: auto` that goes on where `auto` is another precision: it says so and goes on right."""

import pytest
import torch

from configs.config import load_config
from rlhf import dpo_train, stage
from runtime.run_folder import release
from train.updates import Updates

pytestmark = pytest.mark.slow


@pytest.fixture
def begun(words, tmp_path, monkeypatch, capsys):
    """(trainer's name, its module, precision before, precision now) -> what the second part of the run printed."""

    def go(name, script, before, now):
        given = words(name, tmp_path / "run", precision="auto", max_steps=3, save_every=1, log_every=1)
        config, step = load_config(script.Config, given), Updates.step

        def interrupted(self, number, *rest, **seen):
            if number == 3:
                raise KeyboardInterrupt
            return step(self, number, *rest, **seen)

        monkeypatch.setattr(stage, "pick_precision", lambda *_: before)
        monkeypatch.setattr(Updates, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(config)
        release(tmp_path / "run")
        assert f" in {before} on cpu" in capsys.readouterr().out  # the set-up is what it says
        monkeypatch.setattr(stage, "pick_precision", lambda *_: now)
        monkeypatch.setattr(Updates, "step", step)
        script.main(config)
        return capsys.readouterr().out

    return go


@pytest.mark.parametrize("before, now", [("bf16", "fp16"), ("fp16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")])
@pytest.mark.parametrize("name", ["dpo", "reward"])
@pytest.mark.statement("resume-precision")
def test_another_precision_is_said_in_one_line_and_the_run_ends(begun, module, name, before, now):
    said = begun(name, module(name), before, now)
    assert "continuing from step 2 of 3" in said and f" in {now} on cpu" in said
    line = f"precision: {before} until here, {now} on this machine: the run goes on in it"
    assert said.count(line) == said.count("precision: ") == (before != now)
    assert (line + ", with a new loss scale\n" in said) == (now == "fp16")
    assert "step     3/3" in said and "loss nan" not in said


@pytest.mark.parametrize("now, again", [("bf16", False), ("fp32", True)])
@pytest.mark.statement("resume-precision")
def test_dpo_compares_the_policy_with_a_reference_of_its_own_precision(begun, monkeypatch, now, again):
    computed, compute = [], dpo_train.Reference.compute

    def watched(self, pairs):
        computed.append(self.stage.precision)
        return compute(self, pairs)

    monkeypatch.setattr(dpo_train.Reference, "compute", watched)
    begun("dpo", dpo_train, "bf16", now)
    passes = computed.index(now) if again else len(computed)
    assert passes > 0 and computed == ["bf16"] * passes + [now] * (passes if again else 0)


@pytest.mark.statement("resume-precision")
def test_a_loss_scale_is_kept_where_the_precision_is():
    class Config:
        lr, warmup_steps, min_lr_ratio, weight_decay, max_grad_norm = 1e-3, 0, 0.1, 0.0, 1.0

    def made(precision):
        weight = torch.nn.Parameter(torch.ones(2, 2))
        return Updates([weight], Config, run=None, precision=precision)

    fp16 = made("fp16")
    fp16.scaler.scale(torch.ones(()))  # makes its scale
    fp16.scaler.update(1024.0)
    state = fp16.state_dict()
    same, other, fresh = made("fp16"), made("bf16"), made("fp16")
    same.load_state_dict(state)
    other.load_state_dict(state)
    fresh.load_state_dict(other.state_dict())
    assert same.scaler.get_scale() == 1024.0 and fresh.scaler.get_scale() == 65536.0
