"""QLoRA in the trainers: runs of each script on a base of 4 or 8 bits, and what they save."""

import math
import os
import subprocess
import sys

import pytest
import torch

from configs.config import ROOT
from inference import dpo_inference, inference
from models.fast.quantised import QuantisedLinear, quantisation_of
from models.loader import load_model
from report import evaluate as evaluation
from rlhf import grpo_train, policy, sampler, train_reward_model
from rlhf.policy import as_reference, load_policy
from rlhf.reward_model import RewardModel, place_reward_model
from rlhf.sampler import Sampler
from rlhf.utils import packed_logprobs, packed_scores
from train import train_lm_lora

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

FOUR_BITS = {"load_in_4bit": "true", "bnb_4bit_use_double_quant": "true"}
IDS = torch.arange(40).view(2, 20) % 29 + 5


def packed():
    from rlhf.packing import pack

    return pack([[5, 6, 7], [8, 9]], [[21, 2], [30, 31, 2]], 2, torch.device("cpu"))


def trained(config_changes, out):
    """(policy with an adapter that has an effect, its configuration) on a base of rounded weights."""
    config = grpo_train.Config(model_name="tiny-llama", lora_r=4, **config_changes)
    torch.manual_seed(0)
    model = load_policy(config, torch.device("cpu"), "fp32", out)[0]
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval(), config


@pytest.mark.statement("qlora", "dpo-ln-2")
def test_the_first_dpo_loss_is_ln_2_and_the_saved_adapter_gives_the_numbers_of_training(train, monkeypatch):
    models = []
    watched = policy.prepare_training
    monkeypatch.setattr(policy, "prepare_training", lambda *a, **k: models.append(watched(*a, **k)) or models[-1])
    folder, lines = train("dpo", **FOUR_BITS, epochs=2, lr=1e-2)
    assert lines[0]["loss"] == torch.tensor(math.log(2)).item() and lines[-1]["loss"] < lines[0]["loss"]
    [model] = models
    assert sum(isinstance(layer, QuantisedLinear) for layer in model.modules()) == 14
    again = load_model(folder, device="cpu")
    assert quantisation_of(again) == quantisation_of(model) != None  # noqa: E711 - both are there
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
        base = load_model("tiny-llama", device="cpu", quantisation=quantisation_of(model))
        with as_reference(model) as reference:  # after training
            assert torch.equal(reference(IDS).logits, base(IDS).logits)
        assert not torch.equal(base(IDS).logits, load_model("tiny-llama", device="cpu")(IDS).logits)


@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.statement("qlora")
def test_the_sampler_s_copy_is_the_policy(how, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sampler, "say", said.append)
    model, config = trained(how, tmp_path)
    found = Sampler(model, config, "fp32")
    copy = found.model()
    assert not said and copy is not model and quantisation_of(copy) is None  # plain weights: one matmul a layer
    with torch.no_grad():
        torch.testing.assert_close(packed_logprobs(copy, packed()), packed_logprobs(model, packed()))
        with model.disable_adapter():
            assert (packed_logprobs(copy, packed()) - packed_logprobs(model, packed())).abs().max() > 1e-2


@pytest.mark.statement("qlora")
def test_a_reward_model_is_saved_plain_and_shared_only_by_a_policy_with_the_same_base(train, tmp_path, monkeypatch):
    built = []
    watched = train_reward_model.build
    monkeypatch.setattr(train_reward_model, "build", lambda *a: built.append(watched(*a)) or built[-1])
    scores = []
    save = RewardModel.save

    def scored(model, *given):
        with torch.no_grad():
            scores.append(packed_scores(model.model.eval(), packed(), model.head))
        save(model, *given)

    monkeypatch.setattr(RewardModel, "save", scored)
    folder, _ = train("reward", out="reward", lr=1e-2, **FOUR_BITS)
    plain = RewardModel.load(folder, device="cpu")
    assert quantisation_of(plain.model) is None
    with torch.no_grad():
        torch.testing.assert_close(packed_scores(plain.model, packed(), plain.head), scores[0])
    said = []
    monkeypatch.setattr("rlhf.reward_model.say", said.append)
    for how, shared in (({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, True), ({}, False)):
        model, _ = trained(how, tmp_path / "policy")
        score = place_reward_model(model, str(folder), 4, torch.device("cpu"))
        assert ("an adapter on the policy's backbone" in said[-1]) is shared
        with torch.no_grad():
            torch.testing.assert_close(score(packed()), scores[0])


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.statement("qlora")
def test_ppo_and_grpo_sample_from_what_trains(train, name):
    folder, lines = train(name, steps=2, **FOUR_BITS, lr=1e-2)
    assert lines[-1]["sampler_kl"] < 1e-6
    assert quantisation_of(load_model(folder, device="cpu")).bnb_4bit_use_double_quant


@pytest.mark.statement("qlora")
def test_an_adapter_as_the_start_is_merged_and_its_weights_are_rounded_again(train, tmp_path):
    first, _ = train("dpo", out="first", lr=1e-2, **FOUR_BITS)
    model, _ = trained({"load_in_8bit": True}, tmp_path / "second")
    assert quantisation_of(model).load_in_8bit
    config = grpo_train.Config(model_name=str(first), lora_r=4, load_in_8bit=True)
    model = load_policy(config, torch.device("cpu"), "fp32", tmp_path / "second")[0]
    merged = load_model(first, device="cpu", merge_adapter=True)
    base = load_model(tmp_path / "second" / "base", device="cpu")
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, merged(IDS).logits)
        with as_reference(model) as reference:
            expected = load_model(base.config.name_or_path, device="cpu", quantisation=quantisation_of(model))
            assert torch.equal(reference(IDS).logits, expected(IDS).logits)


@pytest.mark.statement("qlora")
def test_language_model_then_inference_and_evaluation_load_the_same_base(tmp_path, capsys):
    out = tmp_path / "lm"
    config = train_lm_lora.Config(model_name="tiny-llama", data="tests/train/text.jsonl", out=str(out), max_length=32,
                                  max_steps=8, load_in_4bit=True, precision="fp32", lr=1e-2, merge=True)  # fmt: skip
    config.check()
    train_lm_lora.main(config)
    said = capsys.readouterr().out
    assert "18,432 weights in nf4" in said and "parameters train" in said
    inference.main(inference.Config(model_name=str(out), prompt="x", max_new_tokens=4, precision="fp32"))
    assert "18,432 weights in nf4" in capsys.readouterr().out
    inference.main(inference.Config(model_name="tiny-llama", prompt="x", max_new_tokens=4, load_in_8bit=True))
    assert "18,432 weights in int8" in capsys.readouterr().out
    compared = dpo_inference.Config(model_name=str(out), prompt="x", max_new_tokens=4, beta=0.1)
    dpo_inference.main(compared)
    assert "18,432 weights in nf4" in capsys.readouterr().out
    quick = {"base": "tiny-llama", "reward_model": None, "limit": 4, "max_new_tokens": 4, "text_tokens": 128,
             "text": "tests/train/text.jsonl", "text_length": 32, "precision": "fp32"}  # fmt: skip
    found = {}
    for name, how in ((out, {}), (out / "merged", {}), ("tiny-llama", {"load_in_4bit": True}), ("tiny-llama", {})):
        path = tmp_path / f"{len(found)}.json"
        settings = evaluation.Config(**quick, **how, model_name=os.fspath(name), out=str(path))
        found[len(found)] = evaluation.evaluate(settings)
    nats = [one["text"]["nats_per_token"] for one in found.values()]
    assert nats[0] == pytest.approx(nats[1], abs=1e-6) and nats[0] < nats[2] != nats[3]
    assert found[2]["measured"]["kl"]["mean"] != 0 == found[3]["measured"]["kl"]["mean"]  # to the base as it is
    assert "load_in_4bit" not in found[3]["identity"]["config"] and found[2]["identity"]["config"]["load_in_4bit"]


def test_with_the_package_a_command_prints_nothing_more():
    done = subprocess.run([sys.executable, "rlhf/grpo_train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--load_in_4bit False" in done.stdout and not done.stderr
