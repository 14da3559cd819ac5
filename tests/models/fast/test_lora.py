"""The LoRA layer as one function against peft's single operations, and peft's methods on it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import AutoModelForCausalLM

from models.fast.head import hidden_states
from models.fast.lora import MemoryEfficientLinear, _Lora, use_memory_efficient_adapters
from models.tiny import tiny_config

IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6], [9, 8, 7, 6, 5, 4, 3]])


def both(dtype=torch.float64, **options):
    """The same random model twice, with adapters of peft and with memory-efficient ones whose B is not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("tiny-llama", 64, 2), dtype=dtype).requires_grad_(False)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    model = get_peft_model(model, LoraConfig(**options)).train()
    return model, use_memory_efficient_adapters(copy.deepcopy(model))


def passes(model, autocast=False):
    with torch.autocast("cpu", enabled=autocast):
        out = hidden_states(model, IDS)
    model.zero_grad()
    out.double().square().sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def efficient_calls(monkeypatch):
    calls, apply = [], _Lora.apply
    monkeypatch.setattr(_Lora, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


def test_outputs_and_gradients_are_pefts(monkeypatch):
    plain, efficient = both()
    calls = efficient_calls(monkeypatch)
    (a, of_a), (b, of_b) = passes(plain), passes(efficient)
    assert len(calls) == 2 * 7  # each linear layer of both blocks
    assert (a - b).abs().max() < 1e-12
    assert of_a.keys() == of_b.keys() and all("lora_" in name for name in of_a)
    for name in of_a:
        assert (of_a[name] - of_b[name]).abs().max() < 1e-10 * of_a[name].abs().max(), name


def test_under_autocast_it_is_as_close_to_float32_as_pefts_is():
    plain, efficient = both(torch.float32)
    exact, half, mine = passes(plain), passes(plain, True), passes(efficient, True)
    assert mine[0].dtype == half[0].dtype
    assert (mine[0] - exact[0]).abs().max() < 2 * (half[0] - exact[0]).abs().max()
    for name, gradient in exact[1].items():
        assert mine[1][name].dtype == torch.float32
        assert (mine[1][name] - gradient).norm() < 2 * (half[1][name] - gradient).norm() + 1e-6, name


def test_gradients_by_finite_differences_with_a_bias():
    g = torch.Generator().manual_seed(0)
    shapes = (2, 3, 5), (2, 5), (4, 2), (4, 5), (4,)
    x, a, b, weight, bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    torch.autograd.gradcheck(lambda x, a, b: _Lora.apply(x, weight, bias, a, b, 1.7, torch.float64), (x, a, b))
    expected = x @ (weight + 1.7 * b @ a).T + bias
    assert (_Lora.apply(x, weight, bias, a, b, 1.7, torch.float64) - expected).abs().max() < 1e-14


def test_less_is_kept_for_the_backward_pass():
    def kept(model):
        found, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu"):
            hidden_states(model, IDS.repeat(20, 1))
        return sum(found.values())

    plain, efficient = both(torch.bfloat16)  # peft keeps the adapters in float32
    assert kept(efficient) < 0.9 * kept(plain)


@pytest.mark.statement("adapter-off")
def test_pefts_methods_work_on_it(monkeypatch):
    plain, efficient = both()
    base = copy.deepcopy(plain).unload()
    with efficient.disable_adapter():
        assert torch.equal(hidden_states(efficient, IDS), hidden_states(base, IDS))
    other = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    for model in (plain, efficient):
        torch.manual_seed(3)
        model.add_adapter("other", other)
        model.set_adapter("other")
    assert all(type(m) is MemoryEfficientLinear for m in efficient.modules() if isinstance(m, Linear))
    calls = efficient_calls(monkeypatch)
    assert (hidden_states(plain, IDS) - hidden_states(efficient, IDS)).abs().max() < 1e-12
    assert len(calls) == 2 * 7
    for model in (plain, efficient):
        model.base_model.set_adapter(["default", "other"])  # two at once: peft's own way
    assert torch.equal(hidden_states(plain, IDS), hidden_states(efficient, IDS))
    merged = hidden_states(efficient.merge_and_unload(), IDS)
    assert (merged - hidden_states(plain.merge_and_unload(), IDS)).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}])
def test_dropout_and_variants_are_left_to_peft(monkeypatch, options):
    plain, efficient = both(**options)
    calls = efficient_calls(monkeypatch)
    torch.manual_seed(5)
    expected = hidden_states(plain, IDS)
    torch.manual_seed(5)
    assert torch.equal(expected, hidden_states(efficient, IDS))
    assert not calls


def test_a_bias_beside_b_is_left_to_peft(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    model = use_memory_efficient_adapters(get_peft_model(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True)))
    calls = efficient_calls(monkeypatch)
    assert model(torch.randn(2, 3)).shape == (2, 4)
    assert not calls


def test_a_base_that_trains_gets_its_gradient(monkeypatch):
    plain, efficient = (model.requires_grad_(True) for model in both())
    calls = efficient_calls(monkeypatch)
    of_plain, of_efficient = passes(plain)[1], passes(efficient)[1]
    assert not calls and any("base_layer" in name for name in of_efficient)
    assert all(torch.equal(of_plain[name], of_efficient[name]) for name in of_plain)
