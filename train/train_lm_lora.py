"""LoRA: train small low-rank matrices beside the frozen weights of a language model (Hu et al. 2021, arXiv:2106.09685).

    python train/train_lm_lora.py                             # adapter on Shakespeare's plays
    python train/train_lm_lora.py --config configs/sft.yaml   # supervised fine-tuning on the chosen completions
    python train/train_lm_lora.py --merge true                # also a plain model, in OUT/merged
    python train/train_lm_lora.py --load_in_4bit true         # QLoRA: the frozen weights in 4 bits

A linear layer W x becomes W x + (alpha / r) B A x. A (r, in) starts random and B (out, r) starts at zero. The technique
changes the model, not the loop: this script uses `add_lora` and the `train` of train_lm.py. Frozen weights need no
float32, so they have the dtype of `precision`. bf16 needs half the memory. If the hardware computes in bf16, it is also
several times faster. With QLoRA (Dettmers et al. 2023, arXiv:2305.14314) they have 4 bits: about a quarter of the
memory of bf16, and more time, because each pass makes the weights from them (docs/machines.md).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from configs.config import UserError, option, shown
from models.device import PRECISIONS, cast_weights, pick_device, pick_precision
from models.fast.quantised import count_quantised, quantise
from models.loader import load_model, portable_name, resolve_model
from models.options import QuantisationOptions, check_quantisation, quantisation
from models.save import save_model
from runtime.cli import cli
from runtime.console import say
from train.common import LMConfig
from train.train_lm import train


@dataclass
class Config(QuantisationOptions, LMConfig):
    AUTOCAST: ClassVar[bool] = False  # the frozen weights have this dtype, and the matmuls theirs
    out: str = "models/lm_lora"
    lora_r: int = option(16, "rank of the adapter", at_least=1)
    lora_alpha: float = option(32.0, "the adapter's output is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = option(0.0, "dropout before the adapter", at_least=0, below=1)
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "dtype of the frozen weights")
    merge: bool = option(False, "also save the model with the adapter folded in, in OUT/merged")

    def check(self):
        super().check()
        check_quantisation(self)
        refuse_base(self.model_name)


def refuse_base(model_name):
    """Raise UserError for a base that an adapter cannot name: random weights, or another adapter."""
    if model_name == "scratch":
        raise UserError("model_name = 'scratch': an adapter needs a trained model that it can name as its base")
    path = resolve_model(model_name)
    if portable_name(path) != path and (path / "adapter_config.json").is_file():
        raise UserError(f"model_name = {model_name!r} is itself an adapter; train it with --merge true and use /merged")


def add_lora(model, model_name, r, alpha=None, dropout=0.0, dtype=torch.float32, how=None):
    """Freeze `model`, cast it to `dtype`, and add a float32 adapter to each linear layer except the head.

    how: the `Quantisation` of these layers, for QLoRA.

    alpha: default 2 r. A is drawn from torch's global generator. Returns the PEFT model; its adapter names
    `model_name` as its base.
    """
    from models.fast.lora import add_adapter

    model = quantise(cast_weights(model, dtype), how)
    model = add_adapter(model, r, alpha or 2 * r, lora_dropout=dropout, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = portable_name(resolve_model(model_name))
    trained, total = model.get_nb_trainable_parameters()
    total += count_quantised(model)
    say(f"LoRA of rank {r}: {trained:,} of {total:,} parameters train ({trained / total:.2%}); the rest are {dtype}")
    return model


def save_adapter(model, tokenizer, folder, merge):
    """Save the adapter. With `merge`, also save a plain model in folder/merged; it is merged in float32."""
    save_model(model, tokenizer, folder)
    if merge:
        merged = load_model(folder, dtype=torch.float32, merge_adapter=True)
        (folder / "merged").mkdir(exist_ok=True)
        save_model(merged, tokenizer, folder / "merged")
        say(f"merged model in {shown(folder / 'merged')}/")


def main(config):
    dtype = PRECISIONS[pick_precision(config.precision, pick_device())]
    if dtype == torch.float16:  # fp16 gradients would need a loss scaler: see train_lm_amp_ckpt.py
        dtype = torch.float32
    shape = {"r": config.lora_r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "dtype": dtype}
    shape["how"] = quantisation(config, dtype)
    change_model = partial(add_lora, model_name=config.model_name, **shape)
    train(config, change_model=change_model, save=partial(save_adapter, merge=config.merge))


if __name__ == "__main__":
    cli(main, Config)
