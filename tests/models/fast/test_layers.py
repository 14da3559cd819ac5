"""The layers that keep less for the backward pass, against those of transformers and against finite differences."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GraniteConfig, MistralConfig, Qwen2Config, SmolLM3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.fast.head import hidden_states
from models.fast.layers import MLPS, NORMS, GatedMLP, RMSNorm, use_memory_efficient_layers
from models.tiny import tiny_config

close = torch.testing.assert_close
IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6], [9, 8, 7, 6, 5, 4, 3]])
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda: tiny_config("tiny-llama", 64, 2),
    "gpt2": lambda: tiny_config("tiny-gpt2", 64, 2),
    "mistral": lambda: MistralConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "smollm3": lambda: SmolLM3Config(**SHAPE, pad_token_id=2),
    "granite": lambda: GraniteConfig(**SHAPE),
}
KINDS = {  # of its norms and its MLPs, where these are replaced
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
}


def both(name, change=lambda model: model):
    """A random model as transformers builds it, and the memory-efficient one of the same weights; norms not 1."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).train()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(3).add_(0.1 * torch.rand_like(parameter))
    efficient = use_memory_efficient_layers(copy.deepcopy(plain))
    return change(plain), change(efficient)


def with_adapter(model):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model.train()


def passes(model, autocast=False):
    """(logits, {parameter: gradient}, bytes kept for the backward pass) of one forward and backward pass."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", enabled=autocast):
        out = hidden_states(model, IDS)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out.float() * weight).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients, sum(kept.values())


def apart(mine, slopes):
    """The distance of two gradients as a share of the second; one key's can be 0 but for rounding (a key's bias)."""
    a, b = (torch.cat([g[key].flatten() for key in slopes]) for g in (mine, slopes))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("change", [lambda model: model, with_adapter], ids=["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.statement("lean-layers")
def test_lean_layers_compute_what_those_of_transformers_do(name, change):
    plain, efficient = both(name, change)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in efficient.named_parameters()]
    (expected, slopes, _), (found, mine, _) = passes(plain), passes(efficient)
    close(found, expected, atol=5e-5 if name == "gpt2" else 0, rtol=0)  # its gelu has another order of operations
    assert mine.keys() == slopes.keys() and len(mine) > 10
    assert apart(mine, slopes) < 1e-5


@pytest.mark.parametrize("change", [lambda model: model, with_adapter], ids=["full", "lora"])
@pytest.mark.statement("lean-layers")
def test_under_autocast_they_give_the_same_numbers_in_half_precision(change):
    plain, efficient = both("llama", change)
    (expected, slopes, _), (found, mine, _) = passes(plain, True), passes(efficient, True)
    assert found.dtype == expected.dtype == torch.float32
    close(found, expected, atol=0, rtol=0)
    assert apart(mine, slopes) < 2e-2  # bf16 has 8 bits: 4e-3 each rounding


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.statement("lean-layers")
def test_they_keep_less(name, autocast):
    plain, efficient = both(name)
    most = 0.85 if name == "gpt2" else 0.75  # its norms are torch's own
    assert passes(efficient, autocast)[2] < most * passes(plain, autocast)[2]


@pytest.mark.statement("lean-layers")
def test_their_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(torch.nn.Parameter(torch.randn(8, dtype=torch.float64)), eps=1e-2)
    gate, up, down = (torch.nn.Linear(*s, bias=False).double() for s in ((8, 12), (8, 12), (12, 8)))
    mlp, adapted = GatedMLP(gate, up, down), GatedMLP(gate, up, torch.nn.Sequential(down))
    for layer in (norm, mlp, adapted):
        weights = dict(layer.named_parameters())
        call = lambda x, *values: torch.func.functional_call(layer, dict(zip(weights, values)), (x,))  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (x, *weights.values()))
    close(mlp(x), adapted(x))


@pytest.mark.statement("lean-layers")
def test_every_layer_that_it_names_is_compared_and_replaced():
    assert {f"{kind}RMSNorm" for kind in KINDS.values()} == set(NORMS)
    assert {f"{kind}MLP" for kind in KINDS.values()} == set(MLPS)
    for name, kind in KINDS.items():
        plain, efficient = ({type(layer).__name__ for layer in model.modules()} for model in both(name))
        theirs = {f"{kind}RMSNorm", f"{kind}MLP"}
        assert theirs <= plain and {"RMSNorm", "GatedMLP"} <= efficient and not theirs & efficient


@pytest.mark.statement("lean-layers")
def test_what_it_does_not_know_stays():
    torch.manual_seed(0)
    config = tiny_config("tiny-llama", 64, 2, hidden_act="gelu")
    kinds = {
        type(layer).__name__
        for layer in use_memory_efficient_layers(AutoModelForCausalLM.from_config(config)).modules()
    }
    assert "LlamaMLP" in kinds and "GatedMLP" not in kinds and "RMSNorm" in kinds


@pytest.mark.statement("lean-layers")
def test_weights_of_half_precision_have_their_norms_in_float32():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    norm.weight.data = torch.rand(64).bfloat16()
    x = 3 * torch.randn(200, 64).bfloat16()
    close(RMSNorm(norm.weight, 1e-5)(x), norm(x), atol=0, rtol=0)
