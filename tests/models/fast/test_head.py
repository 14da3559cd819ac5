"""Log-probs: in float32 whatever the weights are, and the same however many rows the head reads at a time."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

from configs.config import UserError
from models.device import checkpoint_activations, compile_layers
from models.fast import head as module
from models.fast.attention import use_matmul_attention
from models.fast.head import check_head, head_logprobs, head_nll, hidden_states, nll_of_logits, output_head
from models.fast.layers import use_memory_efficient_layers
from train.common import lm_loss

close = torch.testing.assert_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.statement("float32-softmax")
def test_the_log_softmax_of_a_half_precision_model_is_computed_in_float32(tiny, dtype):
    model, ids = tiny(dtype=dtype), torch.tensor([[5, 6, 7, 8]])
    hidden = hidden_states(model, ids)[0, :-1]
    found, entropy = head_logprobs(model.lm_head, hidden, ids[0, 1:], entropy=True)
    logits = model.lm_head(hidden).double()
    expected = logits.log_softmax(-1)
    assert found.dtype == entropy.dtype == torch.float32
    close(found.double(), expected.gather(-1, ids[0, 1:, None])[:, 0], atol=1e-6, rtol=0)
    close(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-6, rtol=0)


def in_pieces(monkeypatch):
    """Of the logits of 1,100 rows over 40 tokens in float64, 500 are held, and the softmax is taken of 150."""
    monkeypatch.setitem(module.PIECE, "cpu", 8 * 40 * 150)
    monkeypatch.setitem(module.HELD, "cpu", 8 * 40 * 500)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.statement("lean-layers")
def test_the_head_in_pieces_gives_the_values_and_gradients_of_the_definition(trained, monkeypatch):
    in_pieces(monkeypatch)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, bias=False).double().requires_grad_(trained)
    hidden, targets = torch.randn(1100, 8).double(), torch.randint(40, (1100,))

    def definition(head, hidden, targets, temperature):
        return (head(hidden) / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    found = []
    for function in (head_logprobs, definition):
        h = hidden.clone().requires_grad_()
        head.weight.grad = None
        values = function(head, h, targets, temperature=0.7)
        values.square().sum().backward()
        found.append((values.detach(), h.grad, head.weight.grad if trained else torch.zeros(1)))
    close(found[0], found[1], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.statement("lean-layers")
def test_the_sum_in_pieces_has_the_value_and_gradients_of_the_definition(read, trained, monkeypatch):
    in_pieces(monkeypatch)
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, bias=False).double().requires_grad_(trained)
    hidden, targets = torch.randn(1100, 8).double(), torch.randint(40, (1100,))

    def definition(head, hidden, targets):
        return torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")

    found = []
    for function in (head_nll, definition):
        h = hidden.clone().requires_grad_(read)
        head.weight.grad = None
        value = function(head, h, targets)
        if read or trained:
            (value / 7).backward()
        nothing = torch.zeros(1)
        slopes = h.grad if read else nothing, head.weight.grad if trained else nothing
        found.append((value.detach(), *slopes))
    close(found[0], found[1], atol=1e-12, rtol=1e-12)


@pytest.mark.statement("lean-layers")
def test_logits_that_stay_for_the_backward_pass_are_those_that_are_made_again(monkeypatch):
    """In bf16, if all are held at once; twice over the same graph, as the first pass overwrites them."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 40, bias=False)
    hidden, targets = torch.randn(300, 8, requires_grad=True), torch.randint(40, (300,))
    slopes = torch.linspace(-1, 1, 300)
    found = []
    for held in (2 * 40 * 300, 2 * 40 * 299):
        monkeypatch.setitem(module.HELD, "cpu", held)
        monkeypatch.setitem(module.PIECE, "cpu", 4 * 40 * 70)
        made, mm = [], torch.mm
        monkeypatch.setattr(torch, "mm", lambda *x, **kw: made.append(x) or mm(*x, **kw))  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = head_logprobs(head, hidden, targets, temperature=0.7, entropy=True)
        for _ in range(2):
            found.append(torch.autograd.grad(value, (hidden, head.weight), slopes, retain_graph=True))
        monkeypatch.setattr(torch, "mm", mm)
        found.append(len(made))
    kept, again, products, *others, many = found
    assert products == 2 and many == 6  # once, and again for the second pass; two pieces in each of three passes
    for gradients in (again, *others):
        for a, b in zip(kept, gradients):
            close(a, b, atol=1e-2 * b.abs().max().item(), rtol=0)
    for a, b in zip(kept, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [head_nll, head_logprobs])
def test_without_any_row_the_heads_gradient_is_0_and_not_missing(function):
    head, hidden = torch.nn.Linear(8, 40, bias=False), torch.zeros(0, 8, requires_grad=True)
    function(head, hidden, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert head.weight.grad is not None and not head.weight.grad.any() and hidden.grad.shape == (0, 8)


@pytest.mark.statement("lean-layers")
def test_probabilities_near_1_and_0_keep_their_gradient():
    head = torch.nn.Linear(2, 3, bias=False)
    head.weight.data = torch.tensor([[12.0, 0.0], [0.0, 1.0], [-300.0, 0.0]])
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], requires_grad=True)
    targets = torch.tensor([0, 0])  # of which the first is almost sure, the second has log-prob -312 and more
    value = head_nll(head, hidden, targets)
    value.backward()
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ head.weight.double().T, targets, reduction="sum")
    expected.backward()
    close(value.double(), expected, atol=0, rtol=1e-6)
    close(hidden.grad.double(), exact.grad, atol=2e-6, rtol=1e-5)  # 1 - p has an error of 6e-8, times weights of 12


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


HEADS = pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SHAPE, logits_scaling=4.0),
        CohereConfig(**SHAPE),
        Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.0),
        PhiConfig(**SHAPE),
    ],
    ids=lambda config: config.model_type,
)


def perturbed(config):
    """A model of this configuration in float64, with weights (and biases) that are not small."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scales_soft_caps_and_biases_of_the_head_are_in_log_probs_and_their_gradients(config, temperature):
    model = perturbed(config)
    head = output_head(model)
    assert not head.plain  # else this test would show nothing
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids).logits[0, :-1] / temperature
    expected = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    (expected.sum() * 0.3).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    found, entropy = head_logprobs(head, hidden_states(model, ids)[0, :-1], ids[0, 1:], temperature, entropy=True)
    (found.sum() * 0.3).backward()
    close(found, expected, atol=1e-9, rtol=0)
    close(entropy, -(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1).detach(), atol=1e-9, rtol=0)
    for p, gradient in zip(model.parameters(), gradients):
        close(p.grad, gradient, atol=1e-9, rtol=1e-6)
    if temperature == 1.0:
        nll = head_nll(head, hidden_states(model, ids)[0, :-1], ids[0, 1:])
        close(nll, -expected.detach().sum(), atol=1e-9, rtol=0, check_dtype=False)


def test_logits_that_are_made_otherwise_are_refused_by_name(tiny, monkeypatch):
    model = tiny("tiny-llama")
    forward = type(model).forward

    def odd(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.sin()
        return out

    monkeypatch.setattr(type(model), "forward", odd)
    with pytest.raises(UserError, match="the logits of somebody/model are more than"):
        check_head(model, "somebody/model")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_logits_of_other_models_pass_and_nothing_is_changed(tiny, name, dtype):
    model = tiny(name, dtype=dtype).train()
    state = torch.get_rng_state()
    check_head(model, name)
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.statement("lean-layers")
def test_the_loss_that_is_compiled_on_a_gpu_has_the_value_and_gradient_of_the_definition(dtype, bound):
    torch.manual_seed(0)
    logits, targets = (4 * torch.randn(50, 40)).to(dtype), torch.randint(40, (50,))
    exact = logits.detach().clone().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    nll = nll_of_logits(logits, targets)  # the logits become the gradient
    close(nll.double(), expected.detach(), atol=0, rtol=1e-12 if dtype == torch.float64 else 1e-6)
    close(logits.double(), exact.grad, atol=bound, rtol=0)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.statement("lean-layers")
def test_compiled_layers_and_loss_compute_what_plain_ones_do(tiny, monkeypatch, name, checkpointing):
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="aot_eager")  # as Inductor gets it, without a C++ compiler
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(module, "compiled_nll", lambda: traced(nll_of_logits))
    model = use_matmul_attention(use_memory_efficient_layers(tiny(name))).train()
    ids = torch.randint(64, (4, 24))
    at = torch.arange(24)
    batches = [  # of one text, and of two in each row
        {"input_ids": ids, "position_ids": positions.expand(4, 24), "mask": torch.ones(4, 23).bool()}
        for positions in (at, torch.where(at < 9, at, at - 9))
    ]

    def passes(compiled):
        found = []
        for batch in batches:
            model.zero_grad()
            nats, _ = lm_loss(model, batch, compiled)
            nats.backward()
            found += [nats.detach(), *(p.grad.clone() for p in model.parameters())]
        return found

    plain = passes(False)
    if checkpointing:
        checkpoint_activations(model)
    compile_layers(model)
    counters.clear()
    compiled = passes(True)
    # one graph for all layers, with and without a mask; and the loss
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    for a, b in zip(compiled, plain):
        close(a, b, atol=1e-10, rtol=1e-10)
    monkeypatch.undo()
    assert callable(module.compiled_nll())  # its options are Inductor's
    with torch.no_grad():  # evaluation is not compiled: its shapes would be new ones
        lm_loss(model, {key: x[:3] for key, x in batches[0].items()})
    assert counters["stats"]["unique_graphs"] == 3
