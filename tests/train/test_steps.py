"""An optimizer step of each loop, in one process: tokens weigh the same, however the step is split."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from configs.config import UserError
from data.corpus import Corpus
from models.device import compile_layers
from models.fast import head
from models.tiny import tiny_config
from train import common, real_size, train_lm, train_lm_amp_ckpt, train_lm_ddp, updates
from train.common import load_start

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _alone():
    """No test leaves its process group to the next."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


LOOPS = pytest.mark.parametrize("script", [train_lm, train_lm_ddp, train_lm_amp_ckpt])
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def calls_for(script):
    """The module that calls the loss and compiles the layers for a script."""
    return real_size if script is train_lm_ddp else script


def run(script, monkeypatch, folder, texts, **options):
    """Parameters after a run in float64 with plain SGD, and its logged lines."""
    parameters = []

    def optimizer(given, lr, *_):
        parameters.extend(p for p in given if p.requires_grad)
        return torch.optim.SGD(parameters, lr=lr)

    def start(*given):
        model, tokenizer = load_start(*given)
        return model.double(), tokenizer

    corpus = Corpus("texts", [{"text": text} for text in texts], [{"text": "hello"}], "text", "0")
    monkeypatch.setattr(updates, "make_optimizer", optimizer)
    monkeypatch.setattr(common, "load_start", start)
    monkeypatch.setattr(common, "load_data", lambda config: corpus)
    shape = {"model_name": "tiny-llama", "warmup_steps": 0, "log_every": 1, "out": str(folder), "precision": "fp32"}
    shape |= {"measure_steps": 0, **options}
    script.train(script.Config(**{k: v for k, v in shape.items() if k in script.Config.__dataclass_fields__}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.cat([p.detach().reshape(-1) for p in parameters]), [line for line in lines if "loss" in line]


@LOOPS
@pytest.mark.statement("token-mean")
def test_the_loss_of_micro_batches_with_1_and_9_tokens_and_losses_2_and_1_is_1_1(script, monkeypatch, tmp_path):
    def two_or_one(model, batch, compiled=False):
        count = batch["mask"].sum()
        weight = model.get_input_embeddings().weight
        return 0 * weight.sum() + (2.0 if count == 1 else 1.0) * count, count

    monkeypatch.setattr(calls_for(script), "lm_loss", two_or_one)
    options = {"batch_size": 2, "micro_batch_size": 1, "max_length": 10}
    _, [line] = run(script, monkeypatch, tmp_path / "run", ["abcdefghi", "a"], **options)
    assert line["loss"] == pytest.approx(1.1)  # (1 * 2 + 9 * 1) / 10; the mean of means is 1.5


@LOOPS
@pytest.mark.statement("token-mean")
def test_steps_do_not_depend_on_accumulation(script, monkeypatch, tmp_path):
    texts = [LETTERS[: 1 + n % 9] for n in range(20)]
    found = {}
    for pieces in (1, 2, 5):
        shape = {"batch_size": 10, "micro_batch_size": 10 // pieces, "max_length": 10, "lr": 0.5, "epochs": 2}
        found[pieces] = run(script, monkeypatch, tmp_path / str(pieces), texts, max_grad_norm=0.5, **shape)
    weights, lines = found[1]
    for other, its_lines in (found[2], found[5]):
        assert (other - weights).abs().max() < 1e-12
        for key in ("loss", "lr"):
            assert [line[key] for line in its_lines] == pytest.approx([line[key] for line in lines])
    assert min(line["grad_norm"] for line in lines) > 0.5  # clipping was at work


@pytest.mark.parametrize("script, more", [(train_lm_ddp, {}), (train_lm_ddp, {"lora_r": 2}), (train_lm_amp_ckpt, {})])
@pytest.mark.statement("lean-layers")
def test_compiled_steps_are_the_plain_ones(script, more, monkeypatch, tmp_path):
    texts = [LETTERS[: 1 + n % 9] for n in range(20)]
    options = {"max_length": 10, "lr": 0.5, "batch_size": 8, "micro_batch_size": 4, **more}
    plain, lines = run(script, monkeypatch, tmp_path / "plain", texts, **options)
    with pytest.raises(UserError, match="compile = True is for GPUs"):
        run(script, monkeypatch, tmp_path / "refused", texts, compile=True, **options)
    torch._dynamo.reset()
    asked, traced = [], functools.partial(torch.compile, backend="aot_eager")  # without a C++ compiler
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(head, "compiled_nll", lambda: asked.append(1) or traced(head.nll_of_logits))
    monkeypatch.setattr(calls_for(script), "compile_if_asked", lambda model, config: compile_layers(model))
    compiled, its_lines = run(script, monkeypatch, tmp_path / "compiled", texts, compile=True, **options)
    assert asked and (compiled - plain).abs().max() < (1e-6 if more else 1e-12)  # LoRA trains in float32
    assert [line["loss"] for line in its_lines] == pytest.approx([line["loss"] for line in lines])


def test_layers_are_compiled_where_it_is_asked_for_and_there_is_a_gpu():
    class OnGpu(torch.nn.Module):
        device = torch.device("cuda")

        def __init__(self):
            super().__init__()
            self.layer = LlamaDecoderLayer(tiny_config("tiny-llama", 64, 2), 0)

    model, plain = OnGpu(), LlamaDecoderLayer.forward
    real_size.compile_if_asked(model, SimpleNamespace(compile=False))
    assert model.layer.forward.__func__ is plain
    real_size.compile_if_asked(model, SimpleNamespace(compile=True))
    assert "forward" in vars(model.layer)
