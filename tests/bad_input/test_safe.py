"""Safe by default: nothing that a file brings is run, nothing is sent unless asked for, no secret is written down."""

import os
import pickle
import socket

import pytest
import yaml
from bad_input.makers import adapter, damaged, file, model, put, reward, run, settings, tree, without, words_of

from configs.config import UserError, read_yaml
from models.loader import load_model, load_tokenizer
from models.tokens import prompt_ids
from rlhf.reward_model import RewardModel
from runtime.console import quiet_libraries

pytestmark = pytest.mark.slow

SECRET = "a-secret-that-is-nowhere-else"


class Payload:
    """Unpickled, it makes the folder that it names."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(name):
    """An edit that puts a pickle with a payload in place of weights."""
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Payload(folder / "ran"))) and None


def own_code(name):
    """An edit that puts a module beside the model that makes a folder when it is imported."""
    return lambda folder: (folder / name).write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n") and None


def test_the_payload_would_run(here):
    pickled("weights.bin")(here)
    pickle.loads((here / "weights.bin").read_bytes())
    assert (here / "ran").is_dir()


@pytest.mark.parametrize(
    ("make", "load"),
    [
        (model(without("model.safetensors"), pickled("pytorch_model.bin")), load_model),
        (adapter(without("adapter_model.safetensors"), pickled("adapter_model.bin")), load_model),
        (reward(without("model.safetensors"), pickled("pytorch_model.bin")), RewardModel.load),
    ],
    ids=["model", "adapter", "reward model"],
)
def test_a_pickle_of_weights_is_refused_and_never_read(make, load, here):
    folder = make(here)
    before = tree(here)
    with pytest.raises(UserError, match="_model.bin is a pickle, which can run code, and is never read: convert it"):
        load(str(folder), device="cpu")
    assert tree(here) == before


def test_a_pickle_beside_safetensors_is_not_read(here):
    folder = model(pickled("pytorch_model.bin"), pickled("training_args.bin"), pickled("optimizer.pt"))(here)
    load_model(str(folder), device="cpu")
    load_tokenizer(str(folder))
    assert not (folder / "ran").exists()


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize("load", [load_model, load_tokenizer, RewardModel.load])
def test_a_model_that_brings_its_own_code_is_refused(load, here):
    folder = model(settings(model_type="mine", auto_map=CODE), own_code("code.py"))(here)
    with pytest.raises(UserError, match="brings its own code, which is never run"):
        load(str(folder))
    assert not (folder / "ran").exists()


def test_own_code_beside_a_known_model_is_not_run(here):
    tokens = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    edits = settings(auto_map=CODE), settings("tokenizer_config.json", **tokens), own_code("code.py")
    folder = model(*edits)(here)
    load_model(str(folder), device="cpu")
    load_tokenizer(str(folder))
    assert not (folder / "ran").exists()


def test_a_chat_template_runs_in_a_sandbox(here):
    escape = "{{ cycler.__init__.__globals__.os.mkdir('ran') }}"
    tokenizer = load_tokenizer(str(model(put("chat_template.jinja", escape))(here)))
    with pytest.raises(UserError, match="the chat template of the tokenizer does not take this prompt"):
        prompt_ids(tokenizer, "hello")
    assert not (here / "ran").exists()


def test_a_yaml_makes_no_objects(here):
    path = file("run.yaml", f"lr: !!python/object/apply:os.mkdir [{here / 'ran'}]\n")(here)
    with pytest.raises(UserError, match="run.yaml line 1: not valid YAML"):
        read_yaml(path)
    assert not (here / "ran").exists()
    yaml.unsafe_load(path.read_text())
    assert (here / "ran").is_dir()


@pytest.fixture
def calls(monkeypatch):
    """Every address that this process asked for; it reaches none."""
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network in this test")

    def look_up(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_offline_the_hub_is_not_asked(load, calls):
    with pytest.raises(UserError, match="the model hub gave no such model.*Without a hub these work"):
        load("someone/some-model")
    assert not calls


def test_a_run_on_local_files_asks_nobody_and_writes_no_secret(good, here, calls, monkeypatch):
    for key in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, SECRET)
    quiet_libraries()
    assert run("dpo", words_of("dpo", {"max_steps": 1, "warmup_steps": 0}, good, here)) == 0
    assert run("pairs", words_of("pairs", {"limit": 24}, good, here)) == 0
    assert not calls
    made = tree(here)
    names = {path.name for path in made}
    assert {"config.yaml", "metrics.jsonl", "manifest.json", "out.jsonl", "out.manifest.json"} <= names
    assert not [path for path, content in made.items() if content and SECRET.encode() in content]


@pytest.mark.parametrize("options", [{}, {"wandb": "offline"}], ids=["no login", "a login, told to stay offline"])
def test_wandb_stays_offline_and_writes_no_secret(options, good, here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))  # where a login would be
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    if options:
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
    words = words_of("wandb", {"max_steps": 1, "warmup_steps": 0, "eval_every": 0, **options}, good, here)
    assert run("wandb", words) == 0
    assert list((here / "out" / "wandb").glob("offline-run-*"))
    assert not [path for path, content in tree(here).items() if content and SECRET.encode() in content]


def test_a_flipped_byte_of_a_header_is_damage_and_not_a_crash(here):
    """Wherever the header of the weights is changed, the model is refused or the very names were spared."""
    folder = model()(here)
    whole = (folder / "model.safetensors").read_bytes()
    refused = 0
    for place in range(0, 400, 13):
        damaged(lambda b, at=place: whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])(folder)
        try:
            load_model(str(folder), device="cpu")
        except UserError:
            refused += 1
    assert refused >= 25
