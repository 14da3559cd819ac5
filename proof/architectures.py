"""What works with which model: a tiny random model of every causal architecture that transformers can build.

    python proof/architectures.py                     # docs/models.md (make architectures)
    python proof/architectures.py --only gemma3_text  # one of them, on the terminal

Each model goes through the functions that the scripts call, and each number is held beside the plain forward pass of
transformers, one sequence at a time. A cell says how far it is from that ("exact"), which slower way is taken, or the
message with which the work is refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from configs.config import UserError, option, shown
from models.admission import admitted, apart, plain_logits
from models.fast.head import body
from models.generation import generate
from models.loader import load_model, load_tokenizer
from models.options import QuantisationOptions
from models.tiny import byte_tokenizer
from rlhf.packing import pack
from rlhf.policy import load_policy, prepare_training, save_policy
from rlhf.reward_model import RewardModel
from rlhf.sampler import Sampler
from rlhf.utils import packed_logprobs, score_completions
from runtime.checkpoint import flatten, put_back, state_of, unflatten
from runtime.cli import cli
from runtime.console import duration, fold, quiet_libraries, say
from runtime.files import in_root, write_atomically
from train.common import lm_loss

# What makes an architecture tiny: each is set where its configuration has a key of this name
SHAPE = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "intermediate_size": 64, "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "n_positions": 128,
    "n_ctx": 128, "word_embed_proj_dim": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "rotary_dim": 4, "sliding_window": 8, "window_size": 8, "state_size": 8,
    "conv_kernel": 4, "time_step_rank": 4, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8,
    "mamba_n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "block_multiple_of": 8, "lru_width": 32, "attention_window_size": 8, "first_k_dense_replace": 1,
    "chunk_size": 16, "num_ln_in_parallel_attn": None, "pad_token_id": 2, "bos_token_id": 2, "eos_token_id": 2,
    "index_n_heads": 4, "index_head_dim": 8, "index_topk": 64, "linear_head_dim": 8, "linear_num_heads": 4,
    "num_experts_per_token": 2, "num_expert_group": 1, "mamba_d_ssm": 64, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259, "num_kv_shared_layers": 0,
    "num_dense_layers": 1, "n_shared_experts": 1,
}  # fmt: skip
SPECIAL = {  # what one architecture needs beside it
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "dots1": {"num_key_value_heads": 4},
    "modernbert-decoder": {"cls_token_id": 2, "sep_token_id": 2, "local_attention": 8},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": {"is_decoder": True, "pronunciation_vocab_size": 16, "shape_vocab_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
KINDS = ("LM packing", "RLHF packing", "decoding", "sampler with adapter", "LoRA", "reward head", "resume")
PROMPTS = [[(7 * i) % 57 + 3 for i in range(20)], [11, 30, 8, 45, 23], [50, 9, 33, 4, 17, 29, 41, 12, 6]]
COMPLETIONS = [[(5 * i) % 53 + 4 for i in range(14)], [6, 44, 21, 9, 13, 2], [18, 55, 7]]
LARGEST = 3_000_000  # weights of a model that counts as tiny
BAD = ("FAILS", "WRONG")  # the first word of a cell that must not be
FAR = 1e-3  # of log-probs in float32: more is a wrong number


@dataclass
class Config:
    only: str | None = option(None, "one model_type, shown and not written")
    out: str = option("docs/models.md", "the page")


def tiny(default, tokens):
    """The keys that make a configuration like `default` tiny, with `tokens` rows of vocabulary; its parts, too."""
    keys = default.to_dict()
    given = {name: value for name, value in (SHAPE | {"vocab_size": tokens}).items() if name in keys}
    kinds = sorted(set(keys.get("layer_types") or keys.get("layers_block_type") or []))
    if kinds:  # a layer of each kind
        name = "layer_types" if keys.get("layer_types") else "layers_block_type"
        given[name] = (kinds * 2)[: max(2, len(kinds))]
        given["num_hidden_layers"] = len(given[name])
    if "qk_rope_head_dim" in keys:  # latent attention: one key and value for each head; head_dim is its rotated part
        given |= {"num_key_value_heads": given["num_attention_heads"], "head_dim": given["qk_rope_head_dim"]}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None and "model_type" in part.to_dict():
            given[name] = tiny(part, tokens)
    return given | SPECIAL.get(default.model_type, {})


def build(kind, folder, **changes):
    """Make a folder with a tiny random model of this model_type. changes: keys of its configuration, with their values.

    Raises what transformers raises if the model cannot be built.
    """
    tokenizer = byte_tokenizer(chat=True)
    config = CONFIG_MAPPING[kind](**tiny(CONFIG_MAPPING[kind](), len(tokenizer)) | changes)
    with torch.device("meta"):  # without memory
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it does not become small: {size:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:  # large enough for attention to look somewhere
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if min(p.shape) > 8 else 0.1))
        model.eval()(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False)  # transformers alone can compute it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plain(model, prompt, completion):
    """Log-probs (n,) of a completion by the plain forward pass of transformers."""
    [logits] = plain_logits(model, [prompt + completion], len(completion) + 1)
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def lm_packing(model, folder):
    rows = [p + c for p, c in zip(PROMPTS, COMPLETIONS)]
    ids = torch.tensor([[t for row in rows for t in row]])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    mask = torch.ones_like(ids, dtype=torch.bool)[:, 1:]
    mask[0, [len(rows[0]) - 1, len(rows[0]) + len(rows[1]) - 1]] = False
    nats, _ = lm_loss(model, {"input_ids": ids, "position_ids": positions, "mask": mask})
    return abs(nats.item() + sum(plain(model, r[:1], r[1:]).sum().item() for r in rows)) / int(mask.sum())


def rlhf_packing(model, folder):
    prompts, completions = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2]], [*COMPLETIONS, COMPLETIONS[1]]
    found = packed_logprobs(model, pack(prompts, completions, 2, "cpu"))
    pairs = zip(found, prompts, completions)
    return max((row[: len(c)] - plain(model, p, c)).abs().max().item() for row, p, c in pairs)


def decoding(model, folder):
    found = generate(model, PROMPTS, 10, temperature=0)
    rows = zip(PROMPTS, found.completions, found.logprobs)
    return max((torch.tensor(values) - plain(model, p, ids)).abs().max().item() for p, ids, values in rows)


def policy_of(folder):
    """A policy with an adapter on the model in `folder`, moved away from 0: (config, policy, tokenizer, parameters)."""
    config = SimpleNamespace(
        model_name=str(folder), chat_template_kwargs=None, lora_r=4, precision="fp32", gradient_checkpointing=False,
        **vars(QuantisationOptions()),
    )  # fmt: skip
    policy, _, tokenizer, parameters = load_policy(config, torch.device("cpu"), "fp32", folder / "run")
    generator = torch.Generator().manual_seed(1)
    for p in parameters:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return config, policy.eval(), tokenizer, parameters


def sampler(model, folder):
    config, policy, *_ = policy_of(folder)
    logits = policy(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits
    copy = Sampler(policy, config, "fp32").model()
    return apart([copy(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0]], [logits[0]])


def lora(model, folder):
    """The logits of a saved adapter beside those before, loaded as an adapter and merged into its base."""
    _, policy, tokenizer, _ = policy_of(folder)
    row = torch.tensor([PROMPTS[0]])
    logits = policy(input_ids=row, use_cache=False).logits[0]
    (folder / "run").mkdir(exist_ok=True)
    save_policy(policy, tokenizer, folder / "run")
    again = [load_model(folder / "run", device="cpu", merge_adapter=merge) for merge in (False, True)]
    base = load_model(folder, device="cpu")(input_ids=row, use_cache=False).logits[0]
    if apart([base], [logits]) < FAR:
        return float("inf")  # the adapter changes nothing: the comparison would say nothing
    return max(apart([x(input_ids=row, use_cache=False).logits[0]], [logits]) for x in again)


def reward_head(model, folder):
    scorer = RewardModel.load(str(folder), device="cpu", new_head=True)
    found = score_completions(scorer, PROMPTS, COMPLETIONS, 2)
    worst = 0.0
    for p, c, score in zip(PROMPTS, COMPLETIONS, found):
        hidden = body(scorer.model)(input_ids=torch.tensor([p + c]), use_cache=False).last_hidden_state
        worst = max(worst, abs(scorer.head(hidden[0, -1]).item() - score))
    return worst


@torch.enable_grad()
def resume(model, folder):
    """The weights after two steps beside those of a step, a checkpoint read into a new process's model, and a step."""
    packed = pack(PROMPTS, COMPLETIONS, 2, "cpu")

    def start():
        settings = SimpleNamespace(lora_r=0, gradient_checkpointing=False)
        model = prepare_training(load_model(folder, device="cpu"), settings, "CAUSAL_LM")
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer):
        packed_logprobs(model, packed)[packed.mask.bool()].sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = start()
    step(whole, optimizer)
    tensors: dict = {}
    tree = flatten({"model": state_of(whole), "optimizer": state_of(optimizer)}, tensors)
    save_file(tensors, folder / "checkpoint")
    state = unflatten(json.loads(json.dumps(tree)), load_file(folder / "checkpoint"))
    step(whole, optimizer)
    again, optimizer = start()
    put_back(again, state["model"])
    put_back(optimizer, state["optimizer"])
    step(again, optimizer)
    weights = zip(whole.parameters(), again.parameters())
    return max((x - y).abs().max().item() for x, y in weights if x.numel())


WORK = dict(zip(KINDS, (lm_packing, rlhf_packing, decoding, sampler, lora, reward_head, resume)))
ADMITTED = {"LM packing": "samples packed into one row", "RLHF packing": "completions that share a prompt",
            "decoding": "decoding"}  # fmt: skip


@torch.no_grad()
def examine(folder):
    """{kind of work: its cell} of the model in `folder`."""
    try:
        model = load_model(folder, device="cpu")
        load_tokenizer(folder)
    except UserError as error:
        return dict.fromkeys(KINDS, f"refused: {str(error).splitlines()[0]}")
    cells = {}
    for kind, work in WORK.items():
        try:
            far = work(model, folder)
        except UserError as error:
            cells[kind] = f"refused: {shorten(str(error).splitlines()[0], 160, placeholder=' …')}"
            continue
        except Exception as error:  # what a user would see as a traceback: the page says so
            first = (str(error).splitlines() or [""])[0]
            cells[kind] = f"FAILS: {type(error).__name__}: {shorten(first, 120, placeholder=' …')}"
            continue
        way = next((x for x in admitted(model) if x["kind"] == ADMITTED.get(kind) and x["differed"]), None)
        how = f"slower: {way['way']}" if way else "exact"
        cells[kind] = f"{how} ({far:.0e})" if far < FAR else f"WRONG: {far:.1e}"
    return cells


def page(found, left_out, seconds):
    """The Markdown of docs/models.md."""
    lines = [
        "# Models",
        "",
        f"What works with each of the {len(found)} causal architectures of transformers {transformers.__version__} "
        f"that can be built tiny from their configuration: measured in {duration(seconds)} by `make architectures` "
        "(`python proof/architectures.py`), on random models in float32.",
        "",
        "*exact*: the fast way; in brackets how far its log-probs, scores or logits are from the plain forward pass of "
        "transformers, one sequence at a time. *slower*: the fast way is wrong for this architecture, so another one "
        "is taken; see `models/admission.py`. *refused*: one message, and why. A window is 8 tokens here, shorter "
        "than the rows. A cell that said anything else would be an error of this project: the command would fail.",
        "",
        "*LM packing*: the loss of samples packed into one row. *RLHF packing*: log-probs of completions that share "
        "a prompt. *decoding*: prompts of different lengths in a left-padded batch. *sampler with adapter*: the merged "
        "copy that samples beside the policy. *LoRA*: an adapter that is saved, loaded again, and merged. *reward "
        "head*: scores. *resume*: the weights after two steps beside a step, a checkpoint and a step.",
        "",
        "| model_type | " + " | ".join(KINDS) + " |",
        "|---|" + "---|" * len(KINDS),
    ]
    for kind, cells in found.items():
        lines.append(f"| `{kind}` | " + " | ".join(cells[k].replace("|", "/") for k in KINDS) + " |")
    lines += ["", "Not built, because their configuration alone does not make a small model, or not a causal one: "
              + ", ".join(f"`{kind}`" for kind in left_out) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main(config):
    quiet_libraries()
    torch.set_num_threads(1)
    began, found, left_out = time.time(), {}, []
    kinds = [config.only] if config.only else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if config.only and config.only not in CONFIG_MAPPING:
        raise UserError(f"only = {config.only!r}: transformers knows no such model_type")
    for number, kind in enumerate(kinds, 1):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    build(kind, folder)
            except Exception as error:
                if config.only:
                    raise UserError(f"{kind} cannot be built: {type(error).__name__}: {error}") from None
                left_out.append(kind)
                continue
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found[kind] = {work: cell.replace(place, kind) for work, cell in examine(folder).items()}
        left = (time.time() - began) / number * (len(kinds) - number)
        odd = [f"{k}: {c}" for k, c in found[kind].items() if config.only or not c.startswith("exact")]
        say(
            f"{number:>4}/{len(kinds)} {kind} | eta {duration(left)}"
            + "".join("\n" + fold(f"       {line}", 9 * " ") for line in odd)
        )
    bad = [f"{kind}, {k}: {c}" for kind, cells in found.items() for k, c in cells.items() if c.startswith(BAD)]
    if not config.only:
        write_atomically(in_root(config.out), page(found, left_out, time.time() - began))
        say(f"\nwritten to {shown(in_root(config.out))}: {len(found)} architectures, {len(left_out)} not built")
    if bad:
        raise UserError(f"{len(bad)} cells are wrong. The first: {bad[0]}")


if __name__ == "__main__":
    cli(main, Config)
