"""Load a model and its tokenizer by name, and say on what device and in what precision it runs.

A name is a folder, an embedded name (`smollm2-135m`), or a hub id (`gpt2`), tried in that order. A folder may hold a
full model or a PEFT adapter that names its base. Weights are read from safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from configs.config import UserError
from configs.run import in_root, shown
from models.fetch import EMBEDDED_MODELS, fetch_model
from models.tiny import TINY_MODELS, build_tiny

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_model(name):
    """The folder of a model (a Path), or a hub id (a str), for what a configuration calls `model_name`."""
    name = str(name)
    folder = in_root(name)
    if folder.is_dir() and name not in EMBEDDED_MODELS and name not in TINY_MODELS:
        kinds = ("config.json", "adapter_config.json")
        if not any((folder / kind).is_file() for kind in kinds):
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{shown(folder)} holds no model: it has neither config.json nor adapter_config.json (it has {there})"
            )
        return folder
    if name in EMBEDDED_MODELS:
        return Path(fetch_model(name))
    if name in TINY_MODELS:
        return build_tiny(name)
    if name.count("/") > 1 or name.startswith((".", "/", "models/")):
        raise UserError(f"model_name = {name!r}: no such folder")
    return name


def load_model(name, dtype=torch.float32, device=None, merge_adapter=False, trainable=False, **options):
    """A causal language model in eval mode.

    dtype: of the weights. Weights that are to be trained are float32. device: default `pick_device()`.
    merge_adapter: if the folder holds an adapter, fold it into the base and return a plain model.
    trainable: if the folder holds an adapter, load it so that its weights have gradients.
    Raises UserError for a folder without a model, damaged weights, or a hub id that cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    if isinstance(path, Path) and (path / "adapter_config.json").is_file():
        from peft import PeftModel

        model = load_model(adapter_base(path), dtype=dtype, device=device, **options)
        model = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
        if merge_adapter:
            model = model.merge_and_unload()
        return model.eval()
    model = _read(AutoModelForCausalLM, path, name, dtype=dtype, use_safetensors=True, **options)
    return model.to(device or pick_device()).eval()


def load_tokenizer(name):
    """The tokenizer that belongs to a model. Its pad token is set (to eos where it has none); masks go by length."""
    from transformers import AutoTokenizer

    path = resolve_model(name)
    if isinstance(path, Path) and not (path / "tokenizer_config.json").is_file():
        if (path / "adapter_config.json").is_file():
            return load_tokenizer(adapter_base(path))
        raise UserError(f"{shown(path)} has no tokenizer (tokenizer_config.json and tokenizer.json are missing)")
    tokenizer = _read(AutoTokenizer, path, name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token, which marks where an answer stops")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapter_base(folder):
    """The name of the model that the adapter in `folder` was trained on, as its adapter_config.json says."""
    base = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not base:
        raise UserError(f"{shown(folder)}/adapter_config.json names no base model (base_model_name_or_path is empty)")
    return base


def portable_name(path):
    """How an adapter names its base: relative to the root when it lies there, so that a moved checkout still loads."""
    return shown(path) if isinstance(path, Path) else path


def _read(auto_class, path, name, **options):
    """`from_pretrained`, with the library's many ways of failing turned into one sentence."""
    from safetensors import SafetensorError

    local = isinstance(path, Path)
    try:
        return auto_class.from_pretrained(str(path), local_files_only=local, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise UserError(f"the weights in {shown(path) if local else path} are damaged: {error}") from None
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if local:
            raise UserError(f"cannot load {shown(path)}: {first}") from None
        names = ", ".join((*EMBEDDED_MODELS, *TINY_MODELS))
        raise UserError(
            f"model_name = {name!r} is no folder, no embedded model, and the model hub gave no such model ({first}). "
            f"Without a hub these work: {names}, or any folder that holds a model"
        ) from None


def weights_hash(model):
    """A hash of all weights that decide what the model says (adapters included): 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def pick_device():
    """This process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def pick_precision(precision, device):
    """`auto` as fp32, bf16 or fp16: bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def autocast(device, precision):
    """The context in which a forward pass runs in `precision` (one of fp32, bf16, fp16); float32 weights stay."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def frozen_dtype(precision):
    """The dtype in which weights that are never trained are kept: half the memory, and no cast in each forward pass."""
    return PRECISIONS[precision]


def checkpoint_activations(model):
    """Make each layer compute its activations again in the backward pass instead of keeping them (while training)."""
    # the newer name of the two, so that transformers does not say that the older one will go
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # which also works where the inputs need no gradient, as under LoRA


def prompt_ids(tokenizer, prompt):
    """The one place where a prompt becomes token ids: for training, rollout, evaluation and inference.

    prompt: a list of chat messages, or a plain text. With a chat template, a text is one user message; without one
    (GPT-2), a text is taken as it stands and messages are joined as `role: content` lines.
    Exactly one BOS where the tokenizer has one. Raises UserError for a prompt of the wrong form.
    """
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    elif (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    ):
        messages = prompt
    else:
        raise UserError(f"a prompt must be text or a list of {{role, content}} messages, not {str(prompt)[:80]!r}")
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    elif isinstance(prompt, str):
        text = prompt
    else:
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and not tokenizer.chat_template and _adds_bos(tokenizer) and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids


def completion_ids(tokenizer, completion):
    """Token ids of an answer, ended by the stop token. Tokenised apart from the prompt, so no boundary can merge.

    completion: a text, or a list of one assistant message.
    """
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or "content" not in completion[0]:
            raise UserError(
                f"a completion must be text or a list of one assistant message, not {str(completion)[:80]!r}"
            )
        completion = completion[0]["content"]
    if not isinstance(completion, str):
        raise UserError(f"a completion must be text, not {type(completion).__name__}")
    return [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def _adds_bos(tokenizer):
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def answer_text(tokenizer, ids):
    """The text of sampled ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
