"""QLoRA is LoRA on a base whose weights were rounded by transformers and bitsandbytes, in evaluation and training."""

import contextlib
import io
import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from configs.config import UserError, load_config
from models.admission import exact_weights
from models.fast.head import unwrapped
from models.fast.lora import MemoryEfficientLinear, add_adapter
from models.fast.quantised import (
    Quantisation,
    QuantisedLinear,
    count_quantised,
    dequantise,
    quantisation_of,
    quantised_layers,
)
from models.loader import load_model, model_config
from models.plan import sizes
from models.save import save_model

pytest.importorskip("bitsandbytes")

WAYS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDS = torch.arange(40).view(2, 20) % 29 + 5


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def base(dtype="float32", **how):
    """tiny-llama with rounded weights, by this project."""
    return load_model("tiny-llama", DTYPES[dtype], "cpu", quantisation=Quantisation(**how, dtype=dtype))


def adapted(model):
    """`model` with an adapter that has an effect; the same one at each call."""
    torch.manual_seed(0)
    model = add_adapter(model, 4, 8, task_type="CAUSAL_LM")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def loss_and_gradients(model):
    """(loss, {name: gradient} of the adapter) of the language model's loss on IDS."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.statement("qlora")
def test_weights_are_those_of_transformers_and_bitsandbytes(way, dtype, tiny, tmp_path):
    """Of a model of 64 and 128 columns: bitsandbytes 0.50.2 is right for those."""
    tiny(dtype=DTYPES[dtype], hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    how = WAYS[way]
    ours = load_model(tmp_path, DTYPES[dtype], "cpu", quantisation=Quantisation(**how, dtype=dtype))
    computed = {"bnb_4bit_compute_dtype": DTYPES[dtype]} if "load_in_4bit" in how else {}
    settings = BitsAndBytesConfig(**how, **computed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=DTYPES[dtype], quantization_config=settings)
    names = [name for name, layer in ours.named_modules() if isinstance(layer, QuantisedLinear)]
    assert names == [n for n, x in theirs.named_modules() if type(x).__name__ in ("Linear4bit", "Linear8bitLt")]
    assert len(names) == 14 and count_quantised(ours) == sum(ours.get_submodule(n).weight.numel() for n in names)
    plain, made = load_model(tmp_path, DTYPES[dtype], "cpu"), theirs.dequantize()
    for name in names:
        mine, exact = ours.get_submodule(name), plain.get_submodule(name).weight
        there = made.get_submodule(name).weight.to(mine.weight.dtype)
        rounding = 0.0 if way != "int8" else 2 * torch.finfo(DTYPES[dtype]).eps  # the order of two products
        assert (mine.weight - there).abs().max() <= rounding * there.abs().max()
        assert 0.001 < (mine.weight - exact).norm() / exact.norm() < 0.15
        nested = 4 * mine.state.state2.absmax.numel() if "double" in way else 0
        size = sum(x.numel() * x.itemsize for x in mine.buffers())
        assert mine.how.size(mine.out_features, mine.in_features) == size + nested


# Dettmers et al. 2023, appendix E
NF4 = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 32), (16, 96), (33, 100), (7, 33), (1, 5), (8, 64)])
@pytest.mark.statement("qlora")
def test_nf4_takes_the_nearest_number_of_the_paper_in_each_block_of_64(shape):
    layer = torch.nn.Linear(shape[1], shape[0])
    made = QuantisedLinear(layer, Quantisation(load_in_4bit=True)).weight
    flat = layer.weight.detach().flatten()
    scale = torch.stack([block.abs().max() for block in flat.split(64)]).repeat_interleave(64)[: len(flat)]
    choices = scale[:, None] * torch.tensor(NF4)
    nearest = choices.gather(1, (choices - flat[:, None]).abs().argmin(1)[:, None])
    torch.testing.assert_close(made, nearest.view(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.statement("qlora")
def test_qlora_is_lora_on_the_rounded_weights_before_and_after_an_evaluation(way, dtype):
    ours = adapted(base(dtype, **WAYS[way]))
    assert sum(type(layer) is MemoryEfficientLinear for layer in ours.modules()) == 14
    plain = adapted(dequantise(base(dtype, **WAYS[way]), DTYPES[dtype]))
    assert not any(quantised_layers(plain)) and len(list(quantised_layers(ours))) == 14
    expected_loss, expected = loss_and_gradients(plain)
    assert len(expected) == 28 and all(g.abs().max() > 0 for g in expected.values())
    for _ in range(2):
        loss, gradients = loss_and_gradients(ours.train())
        assert torch.equal(loss, expected_loss) and gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        with torch.no_grad():  # the layers of bitsandbytes pack their weights in this pass
            assert torch.equal(ours.eval()(IDS).logits, plain.eval()(IDS).logits)
        with torch.no_grad(), ours.disable_adapter(), plain.disable_adapter():
            assert torch.equal(ours(IDS).logits, plain(IDS).logits)
            assert torch.equal(ours(IDS).logits, base(dtype, **WAYS[way])(IDS).logits)


@pytest.mark.statement("qlora")
def test_with_dropout_and_peft_s_own_forward_pass_it_is_the_same():
    models = [base(**WAYS["nf4"]), dequantise(base(**WAYS["nf4"]), torch.float32)]
    found = []
    for model in models:
        torch.manual_seed(0)
        model = add_adapter(model, 4, 8, task_type="CAUSAL_LM", lora_dropout=0.5).train()
        torch.manual_seed(1)
        found.append(loss_and_gradients(model))
    (loss, gradients), (expected_loss, expected) = found
    assert torch.equal(loss, expected_loss) and all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.statement("qlora")
def test_matmuls_have_the_dtype_that_is_asked_for():
    asked = base(**WAYS["nf4"], bnb_4bit_compute_dtype="bfloat16")
    layer, plain = next(quantised_layers(asked)), next(quantised_layers(base(**WAYS["nf4"])))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), (x.bfloat16() @ plain.weight.bfloat16().T).float())
    assert torch.equal(plain(x), x @ plain.weight.T)


@pytest.mark.statement("qlora")
def test_a_check_computes_in_float32_where_matmuls_have_another_dtype():
    asked, plain = base(**WAYS["nf4"], bnb_4bit_compute_dtype="bfloat16"), base(**WAYS["nf4"])
    with torch.no_grad():
        before, expected = asked(IDS).logits, plain(IDS).logits
        with exact_weights(asked):
            assert torch.equal(asked(IDS).logits, expected)
        assert torch.equal(asked(IDS).logits, before) and not torch.equal(before, expected)


@pytest.mark.statement("qlora")
def test_nothing_of_a_weight_is_kept_for_the_backward_pass():
    kept = []
    model = adapted(base(**WAYS["nf4"]))
    sizes = {(layer.out_features, layer.in_features) for layer in quantised_layers(model)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        model(input_ids=IDS, labels=IDS, use_cache=False)
    assert kept and not sizes & set(kept)


@pytest.mark.statement("qlora")
def test_a_saved_adapter_names_its_base_and_gives_the_same_numbers(tmp_path):
    from models.loader import load_tokenizer

    model = adapted(base("bfloat16", **WAYS["nf4, double"]))
    model.peft_config["default"].base_model_name_or_path = "tiny-llama"
    save_model(model, load_tokenizer("tiny-llama"), tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora" in name for name in stored)
    again = load_model(tmp_path, torch.bfloat16, "cpu")
    assert quantisation_of(again) == quantisation_of(model)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
        exact = load_model(tmp_path, torch.float32, "cpu")  # in another precision the weights are the same
        assert torch.equal(next(quantised_layers(exact)).weight, next(quantised_layers(model)).weight)
        merged = load_model(tmp_path, torch.float32, "cpu", merge_adapter=True)
        assert not any(quantised_layers(merged)) and unwrapped(merged) is merged
        torch.testing.assert_close(merged(IDS).logits, exact(IDS).logits)
        plain = load_model("tiny-llama", torch.float32, "cpu")
        assert (merged(IDS).logits - plain(IDS).logits).abs().max() > 1e-2
    with pytest.raises(UserError, match="was trained on a base in nf4, double quantisation, not int8"):
        load_model(tmp_path, torch.float32, "cpu", quantisation=Quantisation(load_in_8bit=True))
    (tmp_path / "quantization_config.json").write_text(json.dumps(Quantisation(load_in_4bit=True).to_dict()))
    save_model(adapted(load_model("tiny-llama")), load_tokenizer("tiny-llama"), tmp_path)  # over a quantised run
    assert not (tmp_path / "quantization_config.json").exists()


def test_what_cannot_be_is_refused_in_words(monkeypatch):
    from inference.inference import Config as Inference
    from rlhf.grpo_train import Config as Grpo

    cases = {
        ("load_in_4bit", "load_in_8bit"): "load_in_4bit and load_in_8bit exclude each other",
        ("bnb_4bit_use_double_quant",): "bnb_4bit_use_double_quant = True has no effect with load_in_4bit = false",
    }
    for keys, words in cases.items():
        for Config in (Inference, Grpo):
            with pytest.raises(UserError, match=words):
                load_config(Config, [word for key in keys for word in (f"--{key}", "true")])
    with pytest.raises(UserError, match="load_in_8bit = true needs lora_r > 0"):
        load_config(Grpo, ["--load_in_8bit", "true", "--lora_r", "0"])
    with pytest.raises(UserError, match="has no torch.nn.Linear below its head: no weight can be nf4"):
        load_model("tiny-gpt2", quantisation=Quantisation(load_in_4bit=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(UserError, match="This installs it: pip install bitsandbytes"):
        load_model("tiny-llama", quantisation=Quantisation(load_in_4bit=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.statement("planned-parts")
def test_the_planned_bytes_of_frozen_weights_are_those_that_are_held(way):
    how = Quantisation(**WAYS[way], dtype="bfloat16")
    planned = sizes(model_config("tiny-llama"), "bf16", torch.bfloat16, lora_r=4, how=how)
    model = adapted(base("bfloat16", **WAYS[way]))
    held = [p for p in model.parameters() if not p.requires_grad]
    held += [x for layer in quantised_layers(model) for x in layer.buffers()]
    held += [layer.state.state2.absmax for layer in quantised_layers(model) if "double" in way]
    assert planned.frozen_bytes == sum(x.numel() * x.itemsize for x in held)
    assert planned.quantised == count_quantised(model) > 0
    plain = sizes(model_config("tiny-llama"), "bf16", torch.bfloat16, lora_r=4)
    assert planned.weights == plain.weights and planned.frozen_bytes < plain.frozen_bytes
