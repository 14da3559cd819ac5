"""Load a model and its tokenizer by name.

A name is a folder, an embedded name (`smollm2-135m`), or a hub id (`gpt2`), tried in that order. A folder may hold a
full model or a PEFT adapter that names its base. Weights are read from safetensors only.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.config import UserError, shown
from models.device import pick_device
from models.fast.attention import use_matmul_attention
from models.fast.head import unwrapped
from models.fast.layers import use_memory_efficient_layers
from models.fast.quantised import Quantisation, quantise
from models.fetch import EMBEDDED_MODELS, fetch_model
from models.tiny import TINY_MODELS, build_tiny
from models.tokens import add_stop_ids, note_vocabulary, use_template_options, used_options
from runtime.console import say
from runtime.files import in_root, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTISATION = "quantization_config.json"  # in the folder of an adapter: how the weights of its base are rounded


def resolve_model(name: str | Path) -> str | Path:
    """The folder (a Path) or the hub id (a str) of a `model_name`. Raises UserError for a name that is neither."""
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
    if folder.is_file():
        raise UserError(f"model_name = {name!r} is a file: give the folder that holds config.json and the weights")
    if name.count("/") > 1 or name.startswith((".", "/", "~", "models/")):
        raise UserError(f"model_name = {name!r}: no such folder")
    return name


def load_model(
    name: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    merge_adapter: bool = False,
    trainable: bool = False,
    quantisation: Quantisation | None = None,
    **options,
) -> Any:
    """Load a causal language model in eval mode.

    dtype: dtype of the weights; use float32 for weights that will be trained. device: default `pick_device()`.
    merge_adapter: if the folder holds an adapter, merge it into the base and return a plain model.
    trainable: if the folder holds an adapter, load it so that its weights have gradients.
    quantisation: round the linear layers to 4 or 8 bits; None: as the adapter was trained. A merged model is plain.
    Raises UserError for a folder without a causal language model, for weights that are damaged, incomplete, of another
    shape or not safetensors, for an adapter of another base, and for a hub id that cannot be reached.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = resolve_model(name)
    if _is_adapter(path):
        from models.fast.lora import merged

        how = _base_quantisation(path, quantisation)
        model = load_model(adapter_base(path), dtype=dtype, device=device, quantisation=how, **options)
        model = _with_adapter(model, path, trainable)
        if merge_adapter:
            model = merged(model)
        return model.eval()
    architecture = (model_config(name).architectures or [None])[0]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if architecture and not any(architecture in (kind if isinstance(kind, tuple) else (kind,)) for kind in known):
        raise UserError(f"{name} is a {architecture}; this takes a causal language model (LlamaForCausalLM, say)")
    model = read_weights(AutoModelForCausalLM, path, name, dtype=dtype, **options)
    return quantise(model.to(device or pick_device()).eval(), quantisation)


def load_tokenizer(name: str | Path, chat_template_kwargs: dict | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. A missing pad token is set to eos: masks come from lengths, not from token ids.

    chat_template_kwargs: options of the chat template; see `use_template_options`.
    Raises UserError if it has no end-of-sequence token, if the model reads no text, or if its chat template does not
    use one of these options.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    if isinstance(path, Path) and not (path / "tokenizer_config.json").is_file():
        if _is_adapter(path):
            return load_tokenizer(adapter_base(path), chat_template_kwargs)
        raise UserError(f"{shown(path)} has no tokenizer (tokenizer_config.json and tokenizer.json are missing)")
    tokenizer = _read(AutoTokenizer, path, name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token, which marks where a completion stops")
    config = model_config(name)
    rows = config.get_text_config().to_dict().get("vocab_size")
    if rows is None:
        raise UserError(f"{name} is a {(config.architectures or [config.model_type])[0]}, which reads no text")
    known = set(tokenizer.get_vocab().values())
    note_vocabulary(tokenizer, rows, [i for i in range(rows) if i not in known])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    add_stop_ids(tokenizer, _generation_stops(name))
    use_template_options(tokenizer, chat_template_kwargs, name)
    return tokenizer


def _generation_stops(name):
    """`eos_token_id` of a model's generation_config: an id, a list of ids, or None without such a file."""
    from transformers import GenerationConfig

    path = resolve_model(name)
    if _is_adapter(path):
        return _generation_stops(adapter_base(path))
    local = isinstance(path, Path)
    if local and not (path / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(str(path), local_files_only=local).eos_token_id
    except OSError:  # a hub model without one
        return None


def same_tokens(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Raise UserError if the model `name` has another vocabulary than `tokenizer`: its log-probs would mean nothing.

    If the model was trained on prompts that were rendered with other options of the chat template, a message says so.
    """
    other = load_tokenizer(name)
    if other.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{name} has another tokenizer than the model that it is to work with: give another one")
    theirs, ours = used_options(other), used_options(tokenizer)
    if theirs and theirs != ours:
        say(f"note: the prompts of {name} had chat_template_kwargs = {theirs}, those of this run have {ours or None}")


def model_config(name: str | Path) -> Any:
    """The configuration of a model, as transformers reads it. For an adapter: the configuration of its base."""
    from transformers import AutoConfig

    path = resolve_model(name)
    return model_config(adapter_base(path)) if _is_adapter(path) else _read(AutoConfig, path, name)


def context_length(model: Any) -> int | None:
    """The most tokens that a model reads in a row; None where its positions have no end (ALiBi, recurrent layers)."""
    found = getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None  # XLNet says -1


def state_size(model: torch.nn.Module) -> int:
    """The size of the hidden states that the head reads: mostly `hidden_size`, but not in OPT-350m."""
    return unwrapped(model).get_output_embeddings().weight.shape[-1]


def check_length(model: torch.nn.Module, config: Any) -> None:
    """Raise UserError if config.max_length (in tokens) is longer than the context of the model."""
    context = context_length(model)
    if context and config.max_length > context:
        raise UserError(f"max_length = {config.max_length}: {config.model_name} reads at most {context} tokens")


def adapter_base(folder: str | Path) -> str:
    """The name of the base model in the adapter_config.json of the adapter in `folder`.

    Raises UserError if it names no base, a base that is not there, or another adapter, or if it is no LoRA adapter.
    """
    file = Path(folder) / "adapter_config.json"
    settings = read_json(file)
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{shown(file)}: peft_type = {kind!r}: must be LORA")
    if not base:
        raise UserError(f"{shown(file)} names no base model (base_model_name_or_path is empty)")
    try:
        path = resolve_model(base)
    except UserError as error:
        raise UserError(f"the base that {shown(file)} names is not there: {error}") from None
    if _is_adapter(path):
        raise UserError(f"{shown(file)} names another adapter, {base}, as its base: merge that one first")
    return base


def _is_adapter(path):
    return isinstance(path, Path) and (path / "adapter_config.json").is_file()


def read_quantisation(folder: Path) -> Quantisation | None:
    """How the weights of the base of the adapter in `folder` were rounded while it trained; None: they were not."""
    file = folder / QUANTISATION
    return Quantisation.from_dict(read_json(file)) if file.is_file() else None


def _base_quantisation(folder, asked):
    """The `Quantisation` of the base of an adapter: that of its training. UserError if another one is asked for."""
    trained = read_quantisation(folder)
    if trained and asked and trained.words != asked.words:
        raise UserError(f"the adapter in {shown(folder)} was trained on a base in {trained.words}, not {asked.words}")
    return trained or asked


def _with_adapter(model, folder, trainable):
    """`model` with the adapter in `folder`. Raises UserError if the weights are damaged or do not fit exactly."""
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    from models.fast.lora import use_memory_efficient_adapters

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{shown(folder)} has no weights: {file.name} is missing. {_pickles(folder)}".strip())
    try:
        with safe_open(file, "pt") as stored, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing weights; they raise UserError below
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a file, not a dict
            _resize_vocabulary(model, weights)
            model = use_memory_efficient_adapters(PeftModel.from_pretrained(model, str(folder), is_trainable=trainable))
    except SafetensorError as error:
        raise UserError(f"the weights in {shown(folder)} are damaged: {error}") from None
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"the adapter in {shown(folder)} does not fit its base: {_first_line(error)}") from None
    set_adapter_weights(model, weights, folder)
    return model


@torch.no_grad()
def set_adapter_weights(
    model: Any, weights: dict[str, torch.Tensor], folder: Path, adapter_name: str = "default"
) -> None:
    """Copy the weights of an adapter's file into the adapter `adapter_name` of a PEFT model.

    The names in the file are those of the model. peft's own loading renames the weights of some architectures, as
    transformers does with the checkpoints of those, and skips a name that does not fit then.
    Raises UserError, naming `folder`, if a weight of the adapter is missing or one in the file belongs to nothing.
    """
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    # peft may save embeddings, too. These tensors share their memory with the model
    known = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True)
    odd = sorted((wanted - set(weights)) | (set(weights) - set(known)))
    if odd:
        raise UserError(
            f"the adapter in {shown(folder)} does not fit its base: {odd[0]} is only in the "
            f"{'base' if odd[0] in wanted else 'adapter'}"
        )
    for name, weight in weights.items():
        known[name].copy_(weight)


def _resize_vocabulary(model, weights):
    """Give `model` as many embedding rows as the adapter's `weights` have, if they hold the embedding."""
    embedding = model.get_input_embeddings()
    module_name = next(name for name, module in model.named_modules() if module is embedding)
    for name, weight in weights.items():
        whole = name.startswith(f"base_model.model.{module_name}.") and name.endswith("weight") and "lora" not in name
        if whole and len(weight) != len(embedding.weight):
            model.resize_token_embeddings(len(weight), mean_resizing=False)
            return


def read_weights(auto_class: Any, path: str | Path, name: str | Path, new: Sequence[str] = (), **options) -> Any:
    """A transformers model with the memory-efficient layers of models/fast/layers.py and matmul attention.

    The weights are read from safetensors only. new: names of weights that may be missing, because training makes them.
    Raises UserError as `load_model` does.
    """
    where = shown(path) if isinstance(path, Path) else path
    if isinstance(path, Path) and not any(path.glob("*.safetensors")):
        raise UserError(f"{where} has no weights: there is no .safetensors file in it. {_pickles(path)}".strip())
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _read(auto_class, path, name, **options)
    if found["mismatched_keys"]:
        key, there, wanted = sorted(found["mismatched_keys"])[0]
        raise UserError(
            f"the weights in {where} do not fit its config.json: {key} is {tuple(there)} in the file, and "
            f"config.json asks for {tuple(wanted)}"
        )
    missing = sorted(set(found["missing_keys"]) - set(new))
    if missing:
        others = f" and {len(missing) - 1} more are" if missing[1:] else " is"
        raise UserError(f"the weights in {where} are incomplete: {missing[0]}{others} missing")
    for key, weight in model.named_parameters():
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            raise UserError(f"the weights in {where} are damaged: {key} holds numbers that are not finite")
    return use_matmul_attention(use_memory_efficient_layers(model))


def _pickles(folder):
    """A message about weights in `folder` that are pickles; empty if there are none."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    return f"{names[0]} is a pickle, which can run code, and is never read: convert it to safetensors" if names else ""


def _first_line(error):
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]


def portable_name(path: str | Path) -> str:
    """The name of an adapter's base: relative to the repository if it lies inside, so that a moved copy still loads."""
    return shown(path) if isinstance(path, Path) else path


def _read(auto_class, path, name, **options):
    """Call `from_pretrained`, and turn each exception of the library into a UserError of one sentence."""
    from safetensors import SafetensorError

    local = isinstance(path, Path)
    try:
        return auto_class.from_pretrained(str(path), local_files_only=local, trust_remote_code=False, **options)
    except SafetensorError as error:
        raise UserError(f"the weights in {shown(path) if local else path} are damaged: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged config.json raises many types; a damaged tokenizer.json raises Exception
        first = _first_line(error)
        if "trust_remote_code" in str(error):
            raise UserError(f"{name} brings its own code, which is never run: give another model") from None
        if local:
            what = {"AutoConfig": "config.json of ", "AutoTokenizer": "the tokenizer of "}.get(auto_class.__name__, "")
            raise UserError(f"cannot load {what}{shown(path)}: {first}") from None
        names = ", ".join((*EMBEDDED_MODELS, *TINY_MODELS))
        raise UserError(
            f"model_name = {name!r} is no folder, no embedded model, and the model hub gave no such model ({first}). "
            f"Without a hub these work: {names}, or any folder that holds a model"
        ) from None


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of all weights of the model, adapters included: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
