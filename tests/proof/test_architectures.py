"""docs/models.md holds: one architecture of each kind is examined again, each cell by its first word."""

from types import SimpleNamespace

import pytest
import torch

from configs.config import UserError
from models.loader import load_model
from proof.architectures import KINDS, WORK, build, examine
from rlhf.policy import prepare_training

ROW = torch.arange(3, 40)[None]
WITH, WITHOUT = (SimpleNamespace(lora_r=0, gradient_checkpointing=on) for on in (True, False))
E, S, R = "exact", "slower", "refused"
# model_type: (its cells in the order of KINDS, what makes it a kind of its own)
EXPECTED = {
    "deepseek_v3": (E, E, E, E, E, E, E),  # latent attention, experts with a shared one
    "gemma3": (E, E, E, E, E, E, E),  # a composite with a vision part, windows in some layers, a scaled embedding
    "gemma2": (E, S, S, E, E, E, E),  # soft caps
    "gpt_oss": (S, S, S, E, E, E, E),  # sinks and windows
    "gpt_neo": (E, S, S, E, E, E, E),  # eager attention
    "opt": (S, E, E, E, E, E, E),  # ignores position ids; dropout as a function
    "bart": (S, S, S, E, E, R, E),  # the decoder of an encoder-decoder model
    "llama4_text": (E, E, E, E, E, R, E),  # its body has no name; it changes a projection's output in place
    "laguna": (E, E, E, E, E, R, E),  # peft renames its weights when it loads them
    "jamba": (S, S, S, E, E, E, E),  # recurrent; reads a weight without calling its layer
    "ernie4_5_moe": (E, E, E, E, E, R, E),  # a module of its own inside an adapter's wrapper
    "phimoe": (E, S, S, E, E, E, E),  # a router that returns two tensors
    "xlnet": (R, R, R, E, E, R, R),  # not causal
    "electra": (R, R, R, R, R, R, R),  # its head reads other numbers than its body's
}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.statement("architectures")
def test_the_page_says_what_is_true_of_each_kind(kind, tmp_path):
    build(kind, tmp_path)
    assert len(WORK) == len(KINDS) == 7
    cells = examine(tmp_path)
    found = tuple(cells[k].split(":")[0].split(" ")[0] for k in KINDS)
    assert found == EXPECTED[kind], cells


@pytest.mark.statement("architectures")
def test_a_model_that_is_another_in_train_mode_trains_in_eval_mode():
    def other(layer, inputs, output):
        return output * 1.01 if layer.training else output  # a stand-in for a router that is another in train mode

    def load():
        model = load_model("tiny-llama", device="cpu")
        model.model.layers[0].mlp.register_forward_hook(other)
        return model

    policy = prepare_training(load(), WITHOUT, "CAUSAL_LM")
    assert not policy.training and torch.equal(policy(ROW).logits, load_model("tiny-llama", device="cpu")(ROW).logits)
    assert not torch.equal(load().train()(ROW).logits, policy(ROW).logits)
    with pytest.raises(UserError, match="other numbers in train mode .* Try --gradient_checkpointing false"):
        prepare_training(load(), WITH, "CAUSAL_LM")


@pytest.mark.parametrize("settings", [WITH, WITHOUT])
@pytest.mark.statement("architectures")
def test_dropout_that_is_a_function_is_off(tmp_path, settings):
    build("opt", tmp_path)
    droopy = load_model(tmp_path, device="cpu").train()
    assert not torch.equal(droopy(ROW).logits, droopy(ROW).logits)
    assert all(x.p == 0 for x in droopy.modules() if isinstance(x, torch.nn.Dropout))  # it is not a module's
    policy = prepare_training(load_model(tmp_path, device="cpu"), settings, "CAUSAL_LM")
    assert policy.training == settings.gradient_checkpointing
    torch.testing.assert_close(policy(ROW).logits, droopy.eval()(ROW).logits)
