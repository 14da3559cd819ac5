"""How a prompt and a completion become token ids: in one place, with one BOS, ended by the stop token."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.config import ROOT, UserError
from models import tiny
from models.device import pick_device
from models.loader import load_tokenizer
from models.tiny import byte_tokenizer
from models.tokens import completion_ids, prompt_ids

TALK = [{"role": "user", "content": "Hi"}]


@pytest.mark.statement("one-renderer")
def test_chat_templates_are_rendered_in_one_function_only():
    """Training, rollouts, evaluation and inference all call it, or they would drift apart."""
    rooms = ("configs", "runtime", "models", "data", "train", "rlhf", "inference", "report", "proof")
    code = [p for room in rooms for p in (ROOT / room).rglob("*.py")]
    used = {p.relative_to(ROOT).as_posix(): len(re.findall(r"\.apply_chat_template\(", p.read_text())) for p in code}
    assert {path: n for path, n in used.items() if n} == {"models/tokens.py": 1}


def with_bos():
    """A byte tokenizer that puts a BOS before every text, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(chat=False)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    return tokenizer, bos


@pytest.mark.statement("one-renderer")
def test_exactly_one_bos_where_the_tokenizer_has_one():
    tokenizer, bos = with_bos()
    assert prompt_ids(tokenizer, "Hi") == tokenizer("Hi").input_ids
    assert prompt_ids(tokenizer, "Hi").count(bos) == prompt_ids(tokenizer, TALK).count(bos) == 1
    assert prompt_ids(tokenizer, "<|im_start|>Hi").count(bos) == 1  # written out by the user
    assert bos not in completion_ids(tokenizer, "Hi")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert prompt_ids(tokenizer, TALK) == [bos, *tokenizer("Hi", add_special_tokens=False).input_ids]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.statement("one-renderer")
def test_no_bos_where_the_tokenizer_adds_none(name):
    tokenizer = load_tokenizer(name)
    assert prompt_ids(tokenizer, "Hi")[-2:] != [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(prompt_ids(load_tokenizer("tiny-gpt2"), "Hi")) == "Hi"


SMOLLM2 = pytest.param("smollm2-135m", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", SMOLLM2])
@pytest.mark.statement("stop-token")
def test_an_answer_ends_with_the_stop_token_in_every_template(name):
    tokenizer = load_tokenizer(name)
    for completion in ("Hello", [{"role": "assistant", "content": "Hello"}]):
        ids = completion_ids(tokenizer, completion)
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == "Hello"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_a_model_made_by_another_process_than_the_first_is_whole(name, tmp_path, monkeypatch):
    """transformers 5.23 saves on rank 0 alone; whichever process needs a model first makes it for all of them."""
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(tiny, "ROOT", tmp_path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    folder = tiny.build_tiny(name)
    monkeypatch.undo()
    assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 10_000


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="process 2 on this machine has no GPU: 1 can be seen"):
        pick_device()
